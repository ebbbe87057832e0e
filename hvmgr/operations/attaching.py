"""Images as block devices: ``image attach`` and ``image detach``, and what is left over of those that died.

| what                                     | how it is attached                                                      |
|------------------------------------------|-------------------------------------------------------------------------|
| an image that only one VM, off, works on | writable, or read-only as asked; the VM cannot start meanwhile          |
| an image that nobody uses                | writable, or read-only as asked                                         |
| frozen, with children, several users     | read-only, and why is said                                              |
| a VM's that is saved, in the undo slot   | read-only: what is put away there has to fit                            |
| the working image of a VM that runs      | not at all                                                              |

The record comes before the first act and goes after the last one, and ``take_down`` can be done again from any point:
whatever dies in between, the next command finds the record and takes down what is left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import stat
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors, settings, units
from hvmgr.host import image_export, loop
from hvmgr.host.image_export import Link
from hvmgr.model.image_info import Use, User
from hvmgr.model.plan import Plan
from hvmgr.operations import image_users
from hvmgr.operations.images.links import chain_of as chain_of  # noqa: PLC0414 - part of what this module gives
from hvmgr.operations.images.links import probe as probe  # noqa: PLC0414
from hvmgr.operations.images.links import require_image as require_image  # noqa: PLC0414
from hvmgr.storage import attachments, durable, images, partitions
from hvmgr.storage.attachments import Attachment, Phase
from hvmgr.storage.partitions import Partition

if TYPE_CHECKING:
    from hvmgr.operations.host import Host

_VHD = "vhd"  # in hvmgr's words; QEMU calls it vpc
_EXTENDED_SHOWN = 1024
_HINT = "list what is attached: hvmgr image attachments"
_READ_ONLY_USES = {
    Use.SNAPSHOT: "it is frozen: {} needs it unchanged",
    Use.PARENT: "{} stands on it",
    Use.UNDO: "it lies in {}",
    Use.SAVED: "the saved memory of {} has to fit it",
    Use.NATIVE: "{}, has to fit it",
    Use.UNKNOWN: "{} may need it",
}


@dataclass(frozen=True, slots=True)
class Shown:
    """An attachment as it is now: whether it works, and its partitions by node."""

    attachment: Attachment
    is_alive: bool
    partitions: tuple[tuple[str, Partition], ...]


def attach(host: Host, path: Path, *, read_only: bool, fmt: str | None) -> Shown:
    """The disk in an image is a block device until ``detach``; the caller holds the locks of image and attachments."""
    image_export.require()
    loop.require()
    clean(host)
    links = chain_of(path, (images.VPC if fmt == _VHD else fmt) or image_users.stated_format(host, path) or probe(path))
    users = image_users.of(host, path)
    _require_free(users, path)
    if not read_only:
        loop.require_not_shown(path)
    reason = None if read_only else _why_read_only(users, path)
    one = Attachment(
        id=str(uuid.uuid4()),
        path=str(path),
        format=_VHD if links[0].format in {images.VPC, image_export.CODEC} else links[0].format,
        read_only=read_only or reason is not None,
        images=tuple(str(link.path) for link in links),
        folder=str(settings.runtime_folder() / uuid.uuid4().hex[:12]),
        boot=attachments.boot_id(),
        since=units.to_rfc3339(datetime.now(UTC)),
        reason=reason,
        file=images.identity(path),
    )
    _approve(host, "attach", f"attach {path}{' read-only' if one.read_only else ''}")
    if reason is not None:
        host.reporter.notice(f"{path} is attached read-only: {reason}")
    attachments.write(one)
    try:
        return shown(set_up(one, links, writable=not one.read_only))
    except BaseException:
        with contextlib.suppress(errors.HvmgrError):  # the next command tries again; why it came to this is told first
            take_down(one)
        raise


def detach(host: Host, reference: str) -> Attachment:
    """Nothing of an attachment is left, and what was written to the device is in the image."""
    one = _find(reference)
    if one.mount is not None:
        raise errors.Conflict(
            f"{one.device or one.path} belongs to the mount at {one.mount.directory}",
            hint=attachments.use_of(one)[1],
            device=one.device,
        )
    _approve(host, "detach", f"detach {one.path} from {one.device or 'nothing'}")
    is_alive = one.is_alive
    if is_alive:
        attachments.write(dataclasses.replace(one, phase=Phase.DETACHING))
    try:
        take_down(one)
    except (errors.Conflict, errors.HostFailed):
        if is_alive and one.is_alive:
            attachments.write(one)
        raise
    if not is_alive:
        host.reporter.notice(f"{one.path}: {_LEFT_OVER}")
    clean(host)
    if not one.is_in_place and not one.read_only:
        raise errors.HostFailed(
            f"{one.path} was removed or replaced while it was attached: what was written to {one.device} is not in it",
            hint="it is in the file that had this name before, if that one has another name still",
            path=one.path,
        )
    return one


def shown(one: Attachment) -> Shown:
    """An attachment as it is now."""
    if not one.is_alive or one.device is None:
        return Shown(one, False, ())
    device = Path(one.device)
    try:
        with partitions.File(device) as disk:
            table = partitions.read(disk)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
            raise
        return Shown(one, False, ())  # it was detached, or died, just now
    there = {part.number for part in loop.partitions(device)}
    found = [part for part in (() if table is None else table.partitions) if part.number in there]
    return Shown(one, True, tuple((str(loop.node(device, part.number)), part) for part in found))


def clean(host: Host) -> list[Attachment]:
    """What dead commands, dead daemons or a restart of the host left over is gone, and that is said; which it was."""
    done = []
    for one in left_over():
        if host.reporter.dry_run:
            continue
        try:
            take_down(one)
        except (errors.Conflict, errors.HostFailed) as error:
            host.reporter.notice(f"what is left of the attachment of {one.path} stays: {error}")
            continue
        host.reporter.notice(f"{one.path}: {_LEFT_OVER}")
        done.append(one)
    return done


def left_over() -> list[Attachment]:
    """Attachments that do not work any more, or were never complete; none while another command is at work on them."""
    if attachments.is_busy():
        return []
    return [one for one in attachments.all_records() if one.mount is None and not one.is_alive]


_LEFT_OVER = "its attachment was broken off and is cleaned up; what had not been written out then is lost"


# --- what to attach -------------------------------------------------------------------------------------------------


def _why_read_only(users: Sequence[User], path: Path) -> str | None:
    for one in users:
        if one.use in _READ_ONLY_USES:
            return _READ_ONLY_USES[one.use].format(one.name)
    names = list(dict.fromkeys(one.name for one in users))
    if len(names) > 1:
        return f"{' and '.join(names)} use it"
    facts = path.stat()
    if stat.S_ISREG(facts.st_mode) and not facts.st_mode & 0o222:
        return "its mode lets nobody write it"
    return None


def _require_free(users: Sequence[User], path: Path) -> None:
    for one in users:
        if one.use is Use.ATTACHED:
            raise errors.Conflict(f"{path} is attached already, as {one.name}", hint=_HINT, device=one.name)
        if one.use is Use.RUNS:
            raise errors.Conflict(
                f"{path} belongs to {one.name}, which runs",
                hint=f"stop it, or take a snapshot and attach the image that it froze: hvmgr snapshot create {one.vm}",
                users=[one.name],
            )


# --- up and down ----------------------------------------------------------------------------------------------------


def set_up(one: Attachment, links: Sequence[Link], *, writable: bool, volume: bytes = b"") -> Attachment:
    """The disk of a chain is a block device, with its partitions; the record, which is there already, says so.

    ``volume`` describes what lies at the bottom of it, where that is no disk but a volume (``image_export.VOLUME``).
    """
    folder = Path(one.folder)
    folder.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700)
    links = image_export.serve_lowest(folder, links, writable=writable, volume=volume)
    image_export.start(folder, links, writable=writable)
    with image_export.opened(folder, writable=writable) as file:
        size = os.fstat(file).st_size
        device = loop.attach(file, read_only=not writable, name=one.path)
    served_by = tuple(image_export.processes(folder))
    one = dataclasses.replace(one, size=size, device=str(device), life=loop.life_of(device), processes=served_by)
    attachments.write(one)
    with partitions.File(device) as disk:
        table = None if volume else partitions.read(disk)
    loop.set_partitions(device, map(_to_kernel, () if table is None else table.partitions))
    one = dataclasses.replace(one, phase=Phase.ATTACHED)
    attachments.write(one)
    return one


def _to_kernel(part: Partition) -> loop.Partition:
    """As Linux has it: of an extended partition only the start, for logical ones may not lie over another one."""
    return loop.Partition(part.number, part.start, min(part.size, _EXTENDED_SHOWN) if part.is_extended else part.size)


def take_down(one: Attachment) -> None:
    """Device, then daemon, then record: each is gone afterwards, and may have been before."""
    end(one)
    attachments.remove(one)


def end(one: Attachment) -> None:
    """The same, but for the record."""
    folder = Path(one.folder)
    if one.boot == attachments.boot_id():
        served = image_export.is_served(folder)
        for device in _devices(one):
            # Without a daemon nothing can be written out any more.
            loop.detach(device, sync=durable.sync_file if served else _sync_nothing)
        image_export.end(folder)
        with contextlib.suppress(FileNotFoundError):
            durable.sync_file(Path(one.path))
    durable.remove_folder(folder)


def _devices(one: Attachment) -> list[Path]:
    found = loop.devices_of(image_export.file_of(Path(one.folder)))
    if one.device is not None and loop.shows_nothing_any_more(Path(one.device), one.life):
        found.append(Path(one.device))
    return found


def _sync_nothing(_: Path) -> None:
    pass


def _find(reference: str) -> Attachment:
    records = [one for one in attachments.all_records() if one.mount is None or one.device is not None]
    path = Path(os.path.realpath(reference))
    whole = str(path).rpartition("p")[0] if path.name.startswith("loop") else str(path)
    for is_meant in _ways(reference, path, whole):
        found = [one for one in records if is_meant(one)]
        if found:
            return found[-1]
    raise errors.NotFound(f"'{reference}' is not attached", hint=_HINT)


def _ways(reference: str, path: Path, whole: str) -> Sequence[Callable[[Attachment], bool]]:
    """By device, by the image's path, by a partition of the device, by the record's id."""
    return (
        lambda one: one.device == str(path) and one.device is not None,
        lambda one: one.path == str(path),
        lambda one: one.device == whole and one.device is not None,
        lambda one: one.id == reference,
    )


def _approve(host: Host, operation: str, subject: str) -> None:
    plan = Plan(str(uuid.uuid4()), "", operation, subject)
    if not host.reporter.approve(plan):
        raise errors.Declined(f"{subject}: not done")
