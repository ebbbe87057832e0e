"""A change of an image in place: locked, journaled, and completed by the next command when it was cut off.

The journal is a small file beside the image that is written, ``.NAME.hvmgr-change``, and is told in the host's index, so
that ``doctor`` names it.

| cut off                              | what is true                             | the next command |
|--------------------------------------|------------------------------------------|------------------|
| before the journal                   | nothing was changed                      | goes on          |
| in a step of ``NEUTRAL``             | every image shows its guest what it did  | does it again    |
| while children and files are settled | the data is where it belongs             | does the rest    |
| while work is written (``WriteWork``) | a part of it is in the image             | writes it again  |

An error, or Ctrl-C, in a step of the second row ends the change there and then: the state before is still true.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import stat
import uuid
from collections.abc import Collection, Container, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors
from hvmgr.host import image_locks
from hvmgr.model import image_plan
from hvmgr.model.image_info import Use, User
from hvmgr.model.plan import Plan, Step
from hvmgr.model.progress import Progress
from hvmgr.operations import image_users
from hvmgr.operations.images import recognition
from hvmgr.operations.images.recognition import Recognised
from hvmgr.storage import attachments, images, index, journal

if TYPE_CHECKING:
    from hvmgr.operations.host import Host

NEUTRAL = (
    image_plan.GrowImage,
    image_plan.MergeChain,
    image_plan.FitPartitions,
    image_plan.SetSize,
    image_plan.CompactImage,
    image_plan.RepairImage,
)


def plan_of(operation: str, subject: str, steps: Sequence[Step]) -> Plan:
    """The plan of a command on image files."""
    return Plan(plan_id=str(uuid.uuid4()), vm_id="", operation=operation, subject=subject, finish=tuple(steps))


def require_approval(host: Host, plan: Plan) -> None:
    """The caller has seen the plan and wants it; Declined otherwise."""
    if not host.reporter.approve(plan):
        raise errors.Declined("not done; nothing was changed")


@contextlib.contextmanager
def locked(host: Host, paths: Sequence[Path], *, seen: Sequence[Recognised] = ()) -> Iterator[None]:
    """No other command of hvmgr's works on these images; whatever else has one of them open is a Conflict.

    ``seen`` are those among them that the caller has looked at: a command that was waited for may have changed them.
    """
    for path in paths:
        if path.is_block_device():
            raise errors.Unsupported(
                f"{path} is a block device; only image files are changed in place",
                hint=f"make a file of it: hvmgr image convert {shlex.quote(str(path))} NEW.qcow2",
            )
    before = [images.identity(path) for path in paths]
    with index.locked(paths, wait_s=host.wait_s):
        for path, file in zip(paths, before, strict=True):
            if not path.exists() or images.identity(path) != file:
                raise changed_meanwhile(path)
        require_settled(paths)
        require_closed(paths)
        for one in seen:
            if recognition.look(one.path, folders=one.folders) != one:
                raise changed_meanwhile(one.path)
        yield


def require_settled(paths: Sequence[Path]) -> None:
    """Conflict when a command that was waited for has died in a change of one of these images: locked as they are now.

    ``complete`` has to come before the locks, and cannot see that.
    """
    for path in paths:
        if journal.is_open(journal.beside(path)) or next(_open_about(path), None) is not None:
            raise errors.Conflict(f"a change of {path} was cut off just now", hint="run the command again")


def changed_meanwhile(path: Path) -> errors.Conflict:
    """The refusal of a plan that was made for other files than are there now."""
    return errors.Conflict(f"{path} was changed by another command meanwhile", hint="run the command again")


def require_closed(paths: Sequence[Path]) -> None:
    """Conflict when any other program has one of the files open: a QEMU with its locks, one without, a loop device."""
    from hvmgr.host import loop, qemu_errors

    for path in paths:
        try:
            loop.require_not_shown(path)
            with image_locks.held(path):
                pass
        except errors.Conflict as error:
            for one in attachments.users([str(path)]).get(str(path), ()):
                raise needed(path, User(Use.ATTACHED, one.device or one.id), ()) from error
            raise
    if qemu_errors.holders_of(*paths):
        raise image_locks.in_use(next(path for path in paths if qemu_errors.holders_of(path)))


def require_unused(host: Host, path: Path, *, but: Collection[Use] = ()) -> None:
    """Conflict when anybody needs the image as it is; those of the kinds ``but`` may.

    A VM that libvirt has and hvmgr does not may use it while it is off: its disk is what the user wants to change.
    """
    managed = {entry.name for entry in index.entries()}
    for user in image_users.of(host, path):
        if user.use in but or (user.use is Use.OFF and user.vm not in managed):
            continue
        raise needed(path, user, managed)
    say_if_libvirt_is_silent(host)


def needed(path: Path, user: User, managed: Container[str]) -> errors.Conflict:
    """The refusal of an image that somebody needs, with what to do about it."""
    hint = "merge that one first, or make a complete image of it: hvmgr image convert"
    if user.use is Use.ATTACHED:
        hint = f"detach it first: hvmgr image detach {shlex.quote(str(path))}"
    elif user.use is Use.NATIVE:
        hint = "keep what it holds with 'hvmgr boot merge', or throw it away with 'hvmgr boot revert', first"
    elif user.vm in managed:
        name = shlex.quote(str(user.vm))
        hint = f"images of a VM are changed by commands on the VM: hvmgr snapshot merge {name}, hvmgr disk"
    elif user.vm is not None:
        hint = "stop that VM, or let it use another image first"
    running = ", which runs" if user.use is Use.RUNS else ""
    return errors.Conflict(f"{path} is needed by {user.name}{running}", hint=hint, path=str(path), user=user.name)


def say_if_libvirt_is_silent(host: Host) -> None:
    """Without libvirt nobody knows whether one of its VMs has a part in an image; people are told so."""
    if not image_users.is_libvirt_there(host):
        host.reporter.notice("libvirt could not be asked whether one of its VMs needs the image")


def complete(host: Host, chain: Sequence[Path]) -> list[Plan]:
    """What a dead command began on one of these images comes to its end, and is returned; a Conflict in a dry run."""
    found = []
    for image in chain:
        found += [*complete_about(host, image), *_complete(host, journal.beside(image))]
    return found


def complete_about(host: Host, image: Path) -> list[Plan]:
    """The same for a change whose journal lies beside another image and names this one, which may be gone by now."""
    found = []
    for place in list(_open_about(image)):
        found += _complete(host, place)
    return found


def _open_about(image: Path) -> Iterator[Path]:
    for place in filter(is_ours, index.open_changes()):
        entry = journal.read(place)
        if entry is not None and image in _images_of(entry.plan):
            yield place


def is_ours(place: Path) -> bool:
    """Whether a journal was written on this host by this user, or root. Anybody may put a file beside an image."""
    try:
        facts = place.lstat()
    except OSError:
        return False
    return stat.S_ISREG(facts.st_mode) and facts.st_uid in {0, os.geteuid()} and place in index.open_changes()


def _complete(host: Host, place: Path) -> list[Plan]:
    if not journal.is_open(place):
        return []
    if not is_ours(place):
        raise errors.Conflict(
            f"{place} says that a change of the image was cut off, and is not by this user on this host",
            hint="complete it where it was begun; remove the file only when you know that it is not true",
            journal=str(place),
        )
    entry = journal.read(place)
    if entry is None:
        return []
    if host.reporter.dry_run:
        raise errors.Conflict(
            f"an operation was cut off: {entry.plan.subject}",
            hint="run the command without --dry-run: it completes that first",
            journal=str(place),
        )
    named = _images_of(entry.plan)
    with index.locked(named, wait_s=host.wait_s):
        entry = journal.read(place)
        if entry is None:
            return []
        from hvmgr.operations.images import acts  # QEMU, which nobody needs who only looks

        acts.heal(named)
        _carry_out(host, entry.plan, place)
        host.reporter.notice(f"completed what was cut off: {entry.plan.subject}")
    return [entry.plan]


def run(host: Host, plan: Plan, written: Path) -> None:
    """The plan, which was approved and whose images are ``locked``, is carried out."""
    place = journal.beside(written)
    index.note_change(place)
    try:
        journal.begin(place, plan, alone=True)
    except errors.HvmgrError:
        if not journal.is_open(place):
            index.forget_change(place)
        raise
    _carry_out(host, plan, place)


def _carry_out(host: Host, plan: Plan, place: Path) -> None:
    from hvmgr.operations.images import acts
    from hvmgr.operations.session import Interrupts

    interrupts = Interrupts()
    is_neutral = True

    def report(progress: Progress) -> None:
        interrupts.check()
        host.reporter.progress(progress)

    worker = acts.Worker(report)
    try:
        for step in plan.steps():
            is_neutral = is_neutral and isinstance(step, NEUTRAL)
            with contextlib.nullcontext() if is_neutral else interrupts.held_back():
                worker.act(step)
    except Exception:
        if is_neutral or worker.is_untouched:
            _end(place)
        else:
            host.reporter.notice("a part of it is done: the next command on the image completes it")
        raise
    finally:
        interrupts.close()
    _end(place)


def _end(place: Path) -> None:
    journal.end(place)
    index.forget_change(place)


def _images_of(plan: Plan) -> list[Path]:
    """Every file that the steps name."""
    found: dict[Path, None] = {}
    for step in plan.steps():
        for name in ("path", "child", "parent"):
            if (value := getattr(step, name, None)) is not None:
                found[Path(value)] = None
        for value in getattr(step, "images", ()):
            found[Path(value)] = None
    return list(found)
