"""How images are merged that a running VM has open: its own QEMU does it, asked by libvirt, while the guest goes on.

Neither job changes what any image shows before it is complete. A stream adds to the image that the guest writes; a commit
writes below an image that hides all of it. What is removed is removed by a step of its own, after libvirt's live XML and
QEMU itself no longer name it, and after what took its place is on disk.

| cut off                                | what is true                              | what follows                              |
|----------------------------------------|-------------------------------------------|-------------------------------------------|
| while the job runs                     | the job goes on in QEMU                   | the next command waits for its end        |
| libvirt ends, or is lost               | the job goes on in QEMU                   | the outcome is unknown until the next one |
| the VM ends                            | both images are there, and whole          | they are merged as those of a VM off      |
| at the end, before names are changed   | the old image and the new one show the    | names are changed                         |
|                                        | same                                      |                                           |
| the guest's image went into its base:  | the guest stands still; both show the     | the pivot, if it is missing, and the guest|
| around the pivot                       | same                                      | goes on                                   |
| between the pivots of several disks    | the same, for each disk                   | the pivots that are missing, or their     |
|                                        |                                           | images wait, where one is refused         |
| the host, just after the job           | the header may be on disk before the data | the header names the old parent again     |
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvmgr import errors
from hvmgr.host import qemu_img
from hvmgr.host.domain import Domain
from hvmgr.model import plan
from hvmgr.model.plan import Plan
from hvmgr.model.tree import Image, Keeper
from hvmgr.operations import chains
from hvmgr.operations.session import Session
from hvmgr.operations.steps import domain_steps, image_steps, live_images, live_jobs, live_pivot
from hvmgr.operations.steps.live_images import Place
from hvmgr.operations.steps.live_jobs import Job
from hvmgr.operations.steps.live_pivot import Pivot
from hvmgr.storage import durable, frozen, images, vm_home


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two images of the running VM that become one, and where it has them."""

    child: Path
    parent: Path
    place: Place


def is_live(one: Plan) -> bool:
    """Whether a plan has the running VM merge images."""
    return any(isinstance(step, plan.StreamLive | plan.CommitLive) for step in one.finish)


# --- into the image that the guest writes -----------------------------------------------------------------------------


def stream(session: Session, step: plan.StreamLive) -> None:
    """The child holds the parent's data and stands on what was below it."""
    child, parent = Path(step.child), Path(step.parent)
    if not parent.exists() or _has_to_wait(session, child, parent):
        return
    below = images.read(parent, images.QCOW2).parent  # another one than planned where an earlier merge had to wait
    if below is not None and not live_images.is_same(str(below), step.below):
        fmt = session.home.tree().images[vm_home.canonical(str(below))].format
        step = dataclasses.replace(step, below=vm_home.canonical(str(below)), below_format=fmt)
    place = live_images.find(session, child, parent)
    if place is not None and not _tried(
        session, [_Pair(child, parent, place)], [child], lambda domain: _stream(session, domain, place, step)
    ):
        return
    if live_images.stands_on(child, parent):  # the VM has ended; or it was started again, and then they wait
        image_steps.merge_up(session, plan.MergeUp(step.child, step.parent, step.below, step.below_format, hide=None))
    elif _holds_all(session, child, parent):
        durable.sync_file(child)
    else:
        _take_back(session, child, parent)
    if session.recovering:
        _mend(session, child)
    session.forget_uses()


def _stream(session: Session, domain: Domain, place: Place, step: plan.StreamLive) -> None:
    ours = live_jobs.left_over(session, domain, [place.slot])
    with live_jobs.ending(domain, ours):
        name = image_steps.name_of_parent(session, Path(step.child), step.below)
        links = live_images.links(domain, place.slot)
        base = next((one.name for one in links if live_images.is_same(one.path, step.below)), None)
        if base is None:  # it ended just now, or somebody else changed its chain
            raise errors.Conflict(f"{domain.name} does not have disk {place.slot} on {step.below}", slot=place.slot)

        def begin(*, relative: bool, bandwidth: int) -> None:
            domain.start_stream(place.slot, base, relative=relative, bandwidth=bandwidth)

        job = Job(place.slot, step.parent, Path(step.child), not Path(name).is_absolute(), begin)
        live_jobs.run(session, domain, [job], ours)
    live_jobs.require_gone(domain, place.slot, step.parent)
    with live_jobs.ended(domain):
        live_jobs.write_name(domain, Path(step.child), name)


def _holds_all(session: Session, child: Path, parent: Path) -> bool:
    """Whether the child itself says something of all that its former parent holds, by what its file says."""
    domain = session.find_domain()
    if domain is not None and domain.is_active():
        domain.flush_disks()
    top, below = (
        Image(str(path), None, images.QCOW2, images.read(path, images.QCOW2).size, 0, Keeper.IMAGES)
        for path in (child, parent)
    )
    return chains.holds_all(top, [below], is_base=False)


def _take_back(session: Session, child: Path, parent: Path) -> None:
    """The host went down between header and data: the child names its old parent, which is still there, again."""
    if session.is_active():  # the journal stays open: nobody else would know what the child has to stand on
        raise errors.Conflict(
            f"{child} does not hold all data of {parent}: the host went down during their merge, and {session.home.name} was"
            " started since",
            hint=f"end it at once (virsh destroy {session.home.name}), and run the command again: the merge is taken back",
            path=str(child),
        )
    qemu_img.name_parent(child, image_steps.name_of_parent(session, child, str(parent)), images.QCOW2)
    durable.sync_file(child)
    session.say(f"the merge of {parent} into {child} was cut off by the host and is taken back")
    image_steps.wait(session, child, parent)


# --- into the parent --------------------------------------------------------------------------------------------------


def commit(session: Session, step: plan.CommitLive) -> None:
    """The parent holds the child's data, and whoever named the child names the parent."""
    child, parent = Path(step.child), Path(step.parent)
    is_done = step.writes and live_images.goes_on_in(session, child, parent)  # whatever else has to wait
    if not is_done and (
        _has_to_wait(session, child, parent) or (child.exists() and not _brought_down(session, step, child, parent))
    ):
        _wait(session, child, parent)
        live_pivot.let_go_on(session)
        return
    _go_by_the_parent(session, child, parent)
    if step.writes:
        frozen.thaw(session.layout, parent)
        if session.recovering:
            _mend(session, parent)
        _write_present(session, child, parent)
        live_pivot.let_go_on(session)
    session.forget_uses()
    if not step.writes:
        image_steps.settle(session, parent)


def together(session: Session, step: plan.CommitTogether) -> None:
    """The guest goes on in the parents, of all disks or of none; the steps that follow write down where it does."""
    found = [
        _Pair(child, parent, place)
        for child, parent in ((Path(child), Path(parent)) for child, parent in step.pairs)
        if (place := live_images.find(session, child, parent)) is not None
    ]
    if not found:
        return  # done, or off
    if not live_jobs.left_over(session, session.domain(), [one.place.slot for one in found]):
        found = [one for one in found if not image_steps.has_to_wait(session, one.child, one.parent, when_open=False)]
    if found:
        written = [one.parent for one in found]
        _tried(session, found, written, lambda domain: _commit_writing(session, domain, found))
    live_pivot.let_go_on(session)


def _brought_down(session: Session, step: plan.CommitLive, child: Path, parent: Path) -> bool:
    """Whether the parent shows what the child shows, and no running VM needs the child any more."""
    place = live_images.find(session, child, parent)
    if place is not None:
        pair, act = _Pair(child, parent, place), _commit_writing if step.writes else _commit_inner
        if not _tried(session, [pair], [parent], lambda domain: act(session, domain, [pair])):
            return False
    if step.writes:  # once the guest has written the parent, the child must never be written into it again
        return _has_gone_on(session, child, parent)
    busy = session.busy_images()
    if str(parent) not in busy:
        return _commit_off(session, child, parent)
    return str(child) not in busy and (place is not None or _shows_the_same(session, child, parent))


def _has_gone_on(session: Session, child: Path, parent: Path) -> bool:
    """Whether the parent is what the guest writes; said when the VM ended before."""
    if live_images.goes_on_in(session, child, parent):
        return True
    if not session.is_active():
        session.say(
            f"{session.home.name} ended before {child} was merged into {parent}: they wait for 'hvmgr snapshot merge'"
        )
    return False


def _shows_the_same(session: Session, child: Path, parent: Path) -> bool:
    """Looked at where nobody saw the job end: the host may have gone down before all of it was on disk."""
    if qemu_img.same((child, images.QCOW2), (parent, images.QCOW2), force_share=True):
        return True
    session.say(f"{parent} does not show what {child} shows, which is kept: go back to a snapshot, or to a backup")
    return False


def _wait(session: Session, child: Path, parent: Path) -> None:
    """Both are as they were, and so is what stands on the child."""
    image_steps.wait(session, child, parent)
    for path in session.home.tree().children().get(str(child), ()):
        image_steps.settle(session, Path(path))


def _commit_off(session: Session, child: Path, parent: Path) -> bool:
    """The VM is off: from the start, for nobody knows what of it came to the disk. It makes no difference to do it twice."""
    try:
        with session.interrupts.let_through():
            image_steps.commit_into(session, child, parent)
    except (errors.NoSpace, errors.HostFailed, errors.Conflict, errors.Cancelled) as error:
        image_steps.put_off(session, error, child, parent)
        return False
    return True


def _commit_inner(session: Session, domain: Domain, pairs: Sequence[_Pair]) -> None:
    """Between images that nobody writes: the job ends by itself."""
    (pair,) = pairs
    slot, above = pair.place.slot, Path(pair.place.above or "")
    ours = live_jobs.left_over(session, domain, [slot])
    with live_jobs.ending(domain, ours):
        for path in (pair.parent, above):
            frozen.make_writable(session.layout, path)
        name = image_steps.name_of_parent(session, above, str(pair.parent))
        job = _commit_job(domain, pair, top=pair.place.child, relative=not Path(name).is_absolute())
        live_jobs.run(session, domain, [job], ours)
    live_jobs.require_gone(domain, slot, str(pair.child))
    with live_jobs.ended(domain):
        live_jobs.write_name(domain, above, name)
        domain.flush_disks()
        for path in (pair.parent, above):
            durable.sync_file(path)


def _commit_writing(session: Session, domain: Domain, pairs: Sequence[_Pair]) -> None:
    """Of images that the guest writes, into which it goes on: all at once, when all jobs are ready."""
    ours = live_jobs.left_over(session, domain, [one.place.slot for one in pairs])
    with live_jobs.ending(domain, ours):
        for one in pairs:
            frozen.make_writable(session.layout, one.parent)
        jobs = [_commit_job(domain, one, top=None, relative=False) for one in pairs]
        live_jobs.run(session, domain, jobs, ours)
        for one in pairs:
            is_there = domain.block_job(one.place.slot) is not None
            if not is_there and live_images.find(session, one.child, one.parent) is not None:
                live_jobs.raise_early_end(str(one.child))
    live_pivot.go_on(session, domain, [Pivot(one.place.slot, one.child, one.parent) for one in pairs])
    with live_jobs.ended(domain):
        for one in pairs:
            live_jobs.require_gone(domain, one.place.slot, str(one.child))
        domain.flush_disks()
        for one in pairs:
            durable.sync_file(one.parent)


def _commit_job(domain: Domain, pair: _Pair, *, top: str | None, relative: bool) -> Job:
    def begin(*, relative: bool, bandwidth: int) -> None:
        domain.start_commit(pair.place.slot, pair.place.parent, top, relative=relative, bandwidth=bandwidth)

    return Job(pair.place.slot, str(pair.child), pair.parent, relative, begin)


def _go_by_the_parent(session: Session, child: Path, parent: Path) -> None:
    """Images and snapshots that name the child name the parent, which shows the same."""
    for path in map(Path, session.home.tree().children().get(str(child), ())):
        frozen.make_writable(session.layout, path)
        qemu_img.name_parent(path, image_steps.name_of_parent(session, path, str(parent)), images.QCOW2)
        durable.sync_file(path)
    for file in vm_home.snapshot_files(session.layout):
        _rename_in(file, child, parent)
    session.forget_uses()
    for path in map(Path, session.home.tree().children().get(str(parent), ())):
        if path != child:
            image_steps.settle(session, path)


def _rename_in(file: Path, child: Path, parent: Path) -> None:
    one = vm_home.parse_file(file)
    slots = [slot for slot, path in vm_home.disks_of(one).items() if path == str(child)]
    for slot in slots:
        one.set_disk_source(slot, parent, images.QCOW2)
    if slots:
        durable.write_file(file, one.to_xml().encode())


def _write_present(session: Session, child: Path, parent: Path) -> None:
    """The home says what libvirt says; a chain that libvirt noted at the pivot would hide what later comes below the disk."""
    if str(child) in vm_home.disks_of(session.home.present()).values():
        present = live_images.inactive(session)
        for slot, path in vm_home.disks_of(present).items():
            if path in (str(child), str(parent)):
                present.set_disk_source(slot, parent, images.QCOW2)  # in the home's words, and without any chain
        session.connection.define(present.to_xml())
        domain_steps.write_present(session, plan.WritePresent())


# --- whether, and what if not ------------------------------------------------------------------------------------------


def take_up(session: Session, domain: Domain, one: Plan) -> None:
    """A command died, and the running VM goes on with what it was asked for: Busy for who does not wait.

    Nobody leaves a guest standing that was stopped for a pivot.
    """
    if not session.patient and not live_pivot.is_held(session):
        raise errors.Busy(
            f"{session.home.name} still merges images: {one.subject}",
            hint="run it again when that is done",
            goes_on=True,
        )
    if domain.has_block_job():
        session.say(f"{session.home.name} still merges images for the interrupted {one.subject}; Ctrl-C puts that off")


def _has_to_wait(session: Session, child: Path, parent: Path) -> bool:
    """Not before a job that a dead command left is followed, or ended: nobody would know of it without the journal."""
    place = live_images.find(session, child, parent) if session.recovering else None
    if place is not None and session.domain().block_job(place.slot) is not None:
        return False
    return image_steps.has_to_wait(session, child, parent, when_open=False)


def _tried(session: Session, pairs: Sequence[_Pair], written: Sequence[Path], act: Callable[[Domain], None]) -> bool:
    """Whether the VM merged them, or has ended; otherwise those wait that it did not, and why is said when all is done."""
    domain = session.domain()
    try:
        with live_jobs.contact(domain), session.interrupts.let_through():
            act(domain)
    except (errors.NoSpace, errors.HostFailed, errors.Conflict, errors.Unsupported, errors.Cancelled) as error:
        if not isinstance(error, errors.Cancelled) and not live_images.lives(domain):
            for path in written:
                _mend(session, path)
            return True
        left = [one for one in pairs if live_images.find(session, one.child, one.parent) is not None]
        if isinstance(error, errors.Cancelled) and not left and domain.is_active():
            return True  # the job was quicker
        if "Permission denied" in str(error):
            session.denied = error
        else:
            session.put_off = error
        for one in left or pairs:
            image_steps.wait(session, one.child, one.parent)
        return False
    return True


def _mend(session: Session, path: Path) -> None:
    """A QEMU that was killed may have taken clusters that nothing names yet; they cost space, nothing else."""
    with contextlib.suppress(errors.HvmgrError):  # somebody started the VM again
        if not session.is_active():
            frozen.make_writable(session.layout, path)
            qemu_img.check(path, images.QCOW2, repair_leaks=True)
