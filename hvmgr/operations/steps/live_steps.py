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
| the host, just after the job           | the header may be on disk before the data | the header names the old parent again     |
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hvmgr import errors, units
from hvmgr.host import qemu_img
from hvmgr.host.domain import Domain, State
from hvmgr.model import configuration, live_chain, plan
from hvmgr.model.configuration import Configuration
from hvmgr.model.plan import Plan
from hvmgr.model.progress import Progress
from hvmgr.model.tree import Image, Keeper
from hvmgr.operations import chains
from hvmgr.operations.session import Session
from hvmgr.operations.steps import domain_steps, image_steps
from hvmgr.storage import durable, frozen, images, vm_home

_POLL_S = 0.1
_SETTLES_S = 20.0  # from the end of a job until libvirt's view and QEMU's files say so
_SYNC_S = 5.0
_LITTLE = 16 * units.MIB  # with so little left, a job that ended early had no space


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a pair of images is in the running VM: the disk, the names for block jobs, and what stands on the child."""

    slot: str
    child: str
    parent: str
    above: str | None


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
    if below is not None and not _is_same(str(below), step.below):
        fmt = session.home.tree().images[vm_home.canonical(str(below))].format
        step = dataclasses.replace(step, below=vm_home.canonical(str(below)), below_format=fmt)
    place = _find(session, child, parent)
    if place is not None and not _tried(
        session, child, parent, child, lambda domain: _stream(session, domain, place, step)
    ):
        return
    if _stands_on(child, parent):  # the VM has ended; or it was started again, and then they wait
        image_steps.merge_up(session, plan.MergeUp(step.child, step.parent, step.below, step.below_format, hide=None))
    elif _holds_all(session, child, parent):
        durable.sync_file(child)
    else:
        _take_back(session, child, parent)
    if session.recovering:
        _mend(session, child)
    session.forget_uses()


def _stream(session: Session, domain: Domain, place: _Place, step: plan.StreamLive) -> None:
    name = image_steps.name_of_parent(session, Path(step.child), step.below)
    base = next(one.name for one in _links(domain, place.slot) if _is_same(one.path, step.below))

    def start(*, relative: bool) -> None:
        domain.start_stream(place.slot, base, relative=relative, bandwidth=session.bandwidth)

    _run(session, domain, place, start, relative=not Path(name).is_absolute(), job=_Job(step.parent, Path(step.child)))
    _require_gone(domain, place.slot, step.parent)
    _write_name(domain, Path(step.child), name)


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
    if _has_to_wait(session, child, parent) or (child.exists() and not _brought_down(session, step, child, parent)):
        _wait(session, child, parent)
        _let_go_on(session)
        return
    _go_by_the_parent(session, child, parent)
    if step.writes:
        frozen.thaw(session.layout, parent)
        if session.recovering:
            _mend(session, parent)
        _write_present(session, child, parent)
        _let_go_on(session)
    session.forget_uses()
    if not step.writes:
        image_steps.settle(session, parent)


def _brought_down(session: Session, step: plan.CommitLive, child: Path, parent: Path) -> bool:
    """Whether the parent shows what the child shows, and no running VM needs the child any more."""
    place = _find(session, child, parent)
    if place is not None and not _tried(
        session, child, parent, parent, lambda domain: _commit(session, domain, place, child, parent)
    ):
        return False
    if step.writes:  # once the guest has written the parent, the child must never be written into it again
        return _has_gone_on(session, child, parent)
    busy = session.busy_images()
    if str(parent) not in busy:
        return _commit_off(session, child, parent)
    return str(child) not in busy and (place is not None or _shows_the_same(session, child, parent))


def _has_gone_on(session: Session, child: Path, parent: Path) -> bool:
    """Whether the parent is what the guest writes: by QEMU where it runs, else by what libvirt starts next."""
    domain = session.domain()
    if domain.is_active():
        return str(parent) in {vm_home.canonical(str(path)) for path in domain.writable_files()}
    if str(child) not in vm_home.disks_of(_inactive(session)).values():
        return True
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


def _commit(session: Session, domain: Domain, place: _Place, child: Path, parent: Path) -> None:
    above = None if place.above is None else Path(place.above)
    written = [parent] if above is None else [parent, above]
    for path in written:
        frozen.make_writable(session.layout, path)
    name = "" if above is None else image_steps.name_of_parent(session, above, str(parent))
    top = None if above is None else place.child

    def start(*, relative: bool) -> None:
        domain.start_commit(place.slot, place.parent, top, relative=relative, bandwidth=session.bandwidth)

    relative = above is not None and not Path(name).is_absolute()
    _run(session, domain, place, start, relative=relative, job=_Job(str(child), parent))
    if above is None:
        _go_on_in(session, domain, place.slot, child, parent)
    _require_gone(domain, place.slot, str(child))
    if above is not None:
        _write_name(domain, above, name)
    domain.flush_disks()
    for path in written:
        durable.sync_file(path)


def _go_on_in(session: Session, domain: Domain, slot: str, child: Path, parent: Path) -> None:
    """The guest writes to the parent from now on.

    It stands still until libvirt's configuration says so: what it wrote before would hide what it writes then.
    """
    with session.interrupts.held_back():
        with _ending_job(domain, slot):  # refused: the guest goes on where it was
            if domain.state() is State.RUNNING:
                durable.write_file(_stopped(session), b"")
                domain.suspend()
            try:
                domain.end_block_job(slot, pivot=True)
            except (errors.HostFailed, errors.Conflict):
                if not _lives(domain) or _find(session, child, parent) is not None:
                    raise  # otherwise it was done all the same
        _require_path(domain, slot, parent)
        durable.sync_file(parent)
        _let_go_on(session)


def _require_path(domain: Domain, slot: str, parent: Path) -> None:
    """QEMU, libvirt's live and its inactive configuration agree."""
    deadline = time.monotonic() + _SETTLES_S
    while True:
        texts = [domain.xml(live=live) for live in (True, False)]
        said = {vm_home.disks_of(configuration.parse(text, source="libvirt")).get(slot) for text in texts}
        writing = {vm_home.canonical(str(path)) for path in domain.writable_files()}
        if said == {str(parent)} and str(parent) in writing:
            return
        if time.monotonic() > deadline:
            raise errors.OutcomeUnknown(f"nobody can say whether disk {slot} of {domain.name} goes on in {parent}")
        time.sleep(_POLL_S)


def _let_go_on(session: Session) -> None:
    """A guest that was stopped for this goes on, unless it is not known where."""
    note = _stopped(session)
    if not note.exists():
        return
    try:
        domain = session.find_domain()
        if domain is not None and domain.is_active() and domain.state() is State.PAUSED:
            domain.resume()
    except errors.HvmgrError:
        return  # libvirt is out of reach: the next command does it
    durable.remove(note)


def _stopped(session: Session) -> Path:
    return session.layout.private / "stopped"


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
        present = _inactive(session)
        for slot, path in vm_home.disks_of(present).items():
            if path in (str(child), str(parent)):
                present.set_disk_source(slot, parent, images.QCOW2)  # in the home's words, and without any chain
        session.connection.define(present.to_xml())
        domain_steps.write_present(session, plan.WritePresent())


# --- a job ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Job:
    """What a job takes away, for people, and the image that it writes."""

    source: str
    written: Path


def take_up(session: Session, domain: Domain, one: Plan) -> None:
    """A command died, and the running VM goes on with what it was asked for: Busy for who does not wait.

    Nobody leaves a guest standing that was stopped for a pivot.
    """
    if not session.patient and not _stopped(session).exists():
        raise errors.Busy(
            f"{session.home.name} still merges images: {one.subject}",
            hint="run it again when that is done",
            goes_on=True,
        )
    if domain.has_block_job():
        session.say(f"{session.home.name} still merges images for the interrupted {one.subject}; Ctrl-C puts that off")


def _has_to_wait(session: Session, child: Path, parent: Path) -> bool:
    """Not before a job that a dead command left is followed, or ended: nobody would know of it without the journal."""
    place = _find(session, child, parent) if session.recovering else None
    if place is not None and session.domain().block_job(place.slot) is not None:
        return False
    return image_steps.has_to_wait(session, child, parent, when_open=False)


def _tried(session: Session, child: Path, parent: Path, written: Path, act: Callable[[Domain], None]) -> bool:
    """Whether the VM merged them, or has ended; otherwise both wait, and why is said when all else is done."""
    domain = session.domain()
    try:
        with _contact(domain), session.interrupts.let_through():
            act(domain)
    except (errors.NoSpace, errors.HostFailed, errors.Conflict, errors.Unsupported, errors.Cancelled) as error:
        if isinstance(error, errors.Cancelled):
            if _find(session, child, parent) is None and domain.is_active():
                return True  # the job was quicker
        elif not _lives(domain):
            _mend(session, written)
            return True
        if "Permission denied" in str(error):
            session.say(f"{error}: {parent} waits until the VM is off, for its 'hvmgr snapshot merge' then")
        else:
            session.put_off = error
        image_steps.wait(session, child, parent)
        return False
    return True


@contextlib.contextmanager
def _contact(domain: Domain) -> Iterator[None]:
    """Not being able to ask how a merge went is a state of its own."""
    try:
        yield
    except errors.HostFailed as error:
        if error.facts.get("lost"):
            raise errors.OutcomeUnknown(f"lost contact with libvirt while {domain.name} merges images") from error
        raise


def _mend(session: Session, path: Path) -> None:
    """A QEMU that was killed may have taken clusters that nothing names yet; they cost space, nothing else."""
    with contextlib.suppress(errors.HvmgrError):  # somebody started the VM again
        if not session.is_active():
            frozen.make_writable(session.layout, path)
            qemu_img.check(path, images.QCOW2, repair_leaks=True)


def _lives(domain: Domain) -> bool:
    """Whether its QEMU is there; libvirt may hear of its end a little later."""
    deadline = time.monotonic() + _SETTLES_S
    while domain.is_active():
        with contextlib.suppress(errors.HvmgrError):
            domain.monitor("query-status")
            return True
        if time.monotonic() > deadline:
            return True
        time.sleep(_POLL_S)
    return False


def _run(
    session: Session, domain: Domain, place: _Place, start: Callable[..., None], *, relative: bool, job: _Job
) -> None:
    """A job from its start, or from where a dead command left it, to its end."""
    is_there = domain.block_job(place.slot) is not None
    if not is_there:
        _start(start, relative=relative)
    elif not session.recovering or live_chain.mirror(_live(domain), place.slot) not in (None, "active-commit"):
        raise errors.Busy(f"libvirt works on disk {place.slot} of {domain.name}", hint="run it again when that is done")
    with _ending_job(domain, place.slot):
        if is_there and session.bandwidth:
            domain.throttle_block_job(place.slot, session.bandwidth)
        _follow(session, domain, place.slot, job)


@contextlib.contextmanager
def _ending_job(domain: Domain, slot: str) -> Iterator[None]:
    """Whatever goes wrong here ends the job, of which nobody would know later; OutcomeUnknown where that cannot be done."""
    try:
        yield
    except errors.OutcomeUnknown:
        raise
    except errors.HvmgrError as error:
        if error.facts.get("lost"):
            raise
        try:
            domain.end_block_job(slot)
        except errors.HvmgrError as second:  # or it came to its end by itself, or with the VM
            if _lives(domain) and domain.block_job(slot) is not None:
                raise errors.OutcomeUnknown(
                    f"{error}; and the merge of disk {slot} of {domain.name} could not be ended ({second})"
                ) from error
        raise


def _start(start: Callable[..., None], *, relative: bool) -> None:
    """libvirt keeps names relative only where all of them are; the one that counts is written afterwards."""
    try:
        start(relative=relative)
    except errors.HvmgrError as error:
        if not relative or "relative" not in str(error):
            raise
        start(relative=False)


def _follow(session: Session, domain: Domain, slot: str, job: _Job) -> None:
    """Until the job is gone, or ready to end. Its counters are for people and prove nothing.

    What it has written is brought to the disk now and then: its last act is a header, which should not come first.
    """
    synced = time.monotonic()
    while (far := domain.block_job(slot)) is not None and not live_chain.is_ready(_live(domain), slot):
        session.progress(Progress(*far, f"merge {Path(job.source).name}"))
        if time.monotonic() - synced > _SYNC_S:
            durable.sync_file(job.written)
            synced = time.monotonic()
        time.sleep(_POLL_S)


def _require_gone(domain: Domain, slot: str, path: str) -> None:
    """Neither libvirt's live configuration nor QEMU knows the image any more, and nothing copies the disk."""
    deadline = time.monotonic() + _SETTLES_S
    while True:
        in_chain = any(_is_same(one.path, path) for one in _links(domain, slot))
        is_open = any(_is_same(str(one), path) for one in domain.open_files())
        if not in_chain and not is_open and live_chain.mirror(_live(domain), slot) is None:
            return
        if in_chain and domain.block_job(slot) is None and not domain.has_block_job():
            _raise_early_end(path)
        if time.monotonic() > deadline:
            if in_chain:
                raise errors.OutcomeUnknown(f"the merge of {path} does not come to its end")
            raise errors.OutcomeUnknown(f"QEMU still has {path} open although its merge has ended")
        time.sleep(_POLL_S)


def _raise_early_end(path: str) -> None:
    facts = os.statvfs(Path(path).parent)
    if facts.f_bavail * facts.f_frsize < _LITTLE:
        raise errors.NoSpace(f"there was no space left in {Path(path).parent} to merge {path}")
    raise errors.HostFailed(f"the merge of {path} ended early: QEMU, or somebody else, stopped it")


def _write_name(domain: Domain, child: Path, name: str) -> None:
    """The header names the parent as the home does."""
    if images.read(child, images.QCOW2).backing != name:
        domain.name_parent(child, name)


# --- looking ----------------------------------------------------------------------------------------------------------


def _find(session: Session, child: Path, parent: Path) -> _Place | None:
    """Where the running VM has the child on the parent; None when it has not, or is off."""
    domain = session.find_domain()
    if domain is None or not domain.is_active():
        return None
    live = _live(domain)
    for slot in vm_home.disks_of(live):
        found = live_chain.links(live, slot)
        for number, (upper, lower) in enumerate(itertools.pairwise(found)):
            if _is_same(upper.path, str(child)) and _is_same(lower.path, str(parent)):
                above = vm_home.canonical(found[number - 1].path) if number else None
                return _Place(slot, upper.name, lower.name, above)
    return None


def _links(domain: Domain, slot: str) -> tuple[live_chain.Link, ...]:
    return live_chain.links(_live(domain), slot)


def _is_same(one: str, other: str) -> bool:
    if one == other:
        return True
    return Path(one).exists() and Path(other).exists() and images.identity(Path(one)) == images.identity(Path(other))


def _stands_on(child: Path, parent: Path) -> bool:
    below = images.read(child, images.QCOW2).parent
    return below is not None and _is_same(str(below), str(parent))


def _live(domain: Domain) -> Configuration:
    return configuration.parse(domain.xml(live=True), source=f"libvirt's live XML of {domain.name}")


def _inactive(session: Session) -> Configuration:
    domain = session.domain()
    return configuration.parse(domain.xml(live=False), source=f"libvirt's XML of {domain.name}")
