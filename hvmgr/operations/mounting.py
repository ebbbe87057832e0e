"""``hvmgr mount`` and ``unmount``: the file system on a disk of a VM, a snapshot, an export or an image, in a directory.

| wanted             | what is mounted                                                                                     |
|--------------------|-----------------------------------------------------------------------------------------------------|
| to read            | the chain itself, read-only                                                                         |
| to read, but dirty | the same with a throw-away image on top, in which the kernel replays the journal                    |
| to write           | the same with an image on top that takes all writes; thrown away at the end, or kept (``--keep``)   |

The chain is shown as a block device by ``attaching``, whose record this is, too: written before the first act, gone after
the last. Nothing is written to the chain: QEMU has it open for reading only, and refuses when somebody else writes it.

An end: unmount, partitions and loop device, storage daemon, the image on top, the record. Each may have been gone before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors, settings, units
from hvmgr.host import file_systems, image_export, loop, qemu_img
from hvmgr.host.image_export import Link
from hvmgr.model.plan import Plan
from hvmgr.operations import attaching, user_mounting
from hvmgr.operations.inside import views, volumes
from hvmgr.storage import attachments, durable, images, index, kept_images, runtime, vm_home
from hvmgr.storage.attachments import Attachment, Mount, Phase
from hvmgr.storage.filesystems import journals
from hvmgr.storage.kept_images import Kept

if TYPE_CHECKING:
    from hvmgr.operations.host import Host
    from hvmgr.operations.inside.unlocking import Key
    from hvmgr.operations.inside.views import Volume
    from hvmgr.operations.inside.volumes import Chosen

_FOLDER = "mounts"
_OVERLAY = "overlay.qcow2"
_END_S = 20.0  # what ntfs-3g, or a program that looks at each new device, takes to let go of one
_POLL_S = 0.1
_IN_CLEAR = "what is written lies in clear below /run, in the memory of the host as a rule, until it is unmounted"
_WRITTEN_HINT = "hvmgr unmount {}, with --keep FILE when what was written is wanted"


class _JournalPending(Exception):
    """It cannot be mounted before its journal is replayed, which takes an image that can be written."""


class State(StrEnum):
    """What became of a mount."""

    MOUNTED = "mounted"
    LEFT_OVER = "left over"  # a process of it has died, a command was killed, or the host was started again
    UNMOUNTED = "unmounted"  # by hand; all else is there still


@dataclass(frozen=True, slots=True)
class Mounted:
    """A mount as it is now."""

    attachment: Attachment
    mount: Mount
    state: State


@dataclass(frozen=True, slots=True)
class Wanted:
    """Whose disk is to be mounted (a VM's by its name, an export's or home's by its folder, an image's by its path), and how."""

    vm: str | None = None
    folder: Path | None = None
    image: Path | None = None
    snapshot: str | None = None
    slot: str | None = None
    partition: int | str | None = None  # its number, or GROUP/VOLUME
    writable: bool = False
    keys: tuple[Key, ...] = ()


# --- up -------------------------------------------------------------------------------------------------------------


def require() -> None:
    """Unsupported where nothing can be mounted."""
    if settings.is_root():
        image_export.require()
        loop.require()
    else:
        user_mounting.require()


def require_directory(directory: Path) -> Path:
    """The directory is there, empty, and nothing is mounted on it; its true path."""
    real = Path(os.path.realpath(directory))
    here = file_systems.at(str(real))
    if here is not None:
        raise errors.Conflict(f"{real} is a mount point already, of {here.source}", hint="choose another directory")
    try:
        filled = any(real.iterdir())
    except FileNotFoundError as error:
        raise errors.NotFound(f"there is no directory {real}", hint=f"mkdir '{real}'") from error
    except NotADirectoryError as error:
        raise errors.UsageError(f"{real} is no directory", hint="name an empty directory") from error
    if filled:
        raise errors.Conflict(f"{real} is not empty: its files would be hidden", hint="name an empty directory")
    return real


def choose(host: Host, wanted: Wanted, directory: Path) -> tuple[Chosen, Mount]:
    """What is meant, and what the record says of it; which moment it is, where nobody named one, is told."""
    if wanted.image is not None:
        if wanted.snapshot is not None or wanted.slot is not None:
            raise errors.UsageError("an image has no snapshots and no slots", hint="name a partition with --partition")
        disks = [views.of_image(wanted.image)]
    elif wanted.folder is not None:
        disks = views.of_folder(wanted.folder, vm=wanted.vm, snapshot=wanted.snapshot, slot=wanted.slot)
    elif wanted.vm is not None:
        disks = views.of_vm(host.vm(wanted.vm), snapshot=wanted.snapshot, slot=wanted.slot)
    else:
        raise errors.UsageError("neither a VM nor an image is named", hint="hvmgr mount VM DIR")
    for sentence in dict.fromkeys(one.moment for one in disks if one.moment is not None):
        host.reporter.notice(sentence)
    chosen = volumes.choose(disks, None if wanted.partition is None else str(wanted.partition), wanted.keys)
    volume = chosen.volume
    assert volume.kind is not None
    title = volume.disk.name if volume.number is None else f"partition {volume.number} of {volume.disk.name}"
    title = f"{volume.title} of {volume.disk.name}" if volume.logical else title
    place = Mount(
        directory=str(directory),
        title=title,
        file_system=volume.kind.value,
        vm=wanted.vm,
        snapshot=wanted.snapshot,
        slot=volume.disk.slot,
        partition=volume.number,
        logical=volume.logical or None,
        encrypted=volume.encrypted,
        writable=wanted.writable,
        by_user=not settings.is_root(),
    )
    return chosen, place


def mount(host: Host, chosen: Chosen, directory: Path, place: Mount) -> Mounted:
    """The volume's file system is in the directory; the caller holds the locks of images and attachments."""
    volume = chosen.volume
    assert volume.kind is not None
    if place.by_user:
        user_mounting.require_kind(volume.kind)
    driver = None if place.by_user else file_systems.require(volume.kind)
    one = _record(chosen, place)
    if not host.reporter.approve(Plan(str(uuid.uuid4()), "", "mount", f"mount {place.title} at {directory}")):
        raise errors.Declined(f"mount {place.title} at {directory}: not done")
    if place.writable:
        if place.encrypted:
            host.reporter.notice(_IN_CLEAR)
        return _put_up(one, chosen, driver, with_overlay=True)
    try:
        return _put_up(one, chosen, driver, with_overlay=False)
    except _JournalPending:
        pass
    host.reporter.notice(
        f"{place.title} was not cleanly unmounted: its journal is replayed in a throw-away image, and what is shown is the"
        " file system after that"
    )
    return _put_up(_record(chosen, place), chosen, driver, with_overlay=True)


def _record(chosen: Chosen, place: Mount) -> Attachment:
    links = chosen.images
    number = str(uuid.uuid4())
    return Attachment(
        id=number,
        path=str(links[0].path),
        format=chosen.links[0].format,
        read_only=True,  # as far as these images are concerned
        images=tuple(str(link.path) for link in links),
        folder=str(runtime.own_folder(in_clear=place.encrypted) / uuid.uuid4().hex[:12]),
        boot=attachments.boot_id(),
        since=units.to_rfc3339(datetime.now(UTC)),
        file=images.identity(links[0].path),
        mount=place,
    )


def _put_up(one: Attachment, chosen: Chosen, driver: str | None, *, with_overlay: bool) -> Mounted:
    assert one.mount is not None
    scratch = settings.index_folder() / _FOLDER / one.id
    if one.mount.encrypted:  # what is in clear stays in memory, where the host has its /run there
        scratch = Path(f"{one.folder}.{_FOLDER}")
    if with_overlay:
        one = dataclasses.replace(one, mount=dataclasses.replace(one.mount, overlay=str(scratch / _OVERLAY)))
    attachments.write(one)
    source = image_export.file_of(Path(one.folder))
    try:
        links = list(chosen.links)
        if with_overlay:
            links.insert(0, _make_overlay(scratch, chosen))
        if driver is None:
            one = user_mounting.put_up(one, links, chosen, with_overlay=with_overlay)
        else:
            one = attaching.set_up(one, links, writable=with_overlay, volume=chosen.text)
            assert one.device is not None and one.mount is not None  # noqa: PT018
            source = Path(one.device) if chosen.number is None else loop.node(Path(one.device), chosen.number)
            file_systems.mount(source, Path(one.mount.directory), driver, writable=one.mount.writable)
    except BaseException as error:
        is_refused = isinstance(error, file_systems.Refused)
        waits = is_refused and not with_overlay and journals.is_pending(chosen.volume.kind, source)
        with contextlib.suppress(errors.HvmgrError):  # 'unmount' tries again; why it came to this is told first
            _take_down(one)
        if waits:
            raise _JournalPending from error
        if isinstance(error, file_systems.Refused):
            raise _explained(error, chosen.volume) from error
        raise
    assert one.mount is not None
    return Mounted(one, one.mount, State.MOUNTED)


def _make_overlay(scratch: Path, chosen: Chosen) -> Link:
    """An image on top of the chain. Of what only we can read it does not name the parent: QEMU would read other bytes."""
    index.make_folder(_FOLDER)
    scratch.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
    durable.make_folder(scratch, mode=0o700)
    file, top = scratch / _OVERLAY, chosen.links[0]
    is_ours = top.format in {image_export.CODEC, image_export.VOLUME}
    qemu_img.create(file, images.QCOW2, size=chosen.size, backing=None if is_ours else (str(top.path), top.format))
    durable.set_mode(file, 0o600)
    return Link(file, images.QCOW2)


def _explained(refused: file_systems.Refused, volume: Volume) -> errors.HvmgrError:
    return errors.HostFailed(
        f"the {volume.kind} on {volume.title} cannot be mounted: {refused}",
        hint="the kernel's log says why: dmesg; it may be damaged, or still in use by other disks of the guest",
    )


# --- down -----------------------------------------------------------------------------------------------------------


def unmount(host: Host, directory: Path, keep: Path | None) -> Attachment:
    """Nothing of a mount is left; what was written is thrown away, or is the image ``keep``. Conflict while it is in use."""
    one = find(directory)
    assert one.mount is not None
    target = None if keep is None else _require_keepable(one, one.mount, keep)
    subject = f"unmount {one.mount.directory}"
    if not host.reporter.approve(Plan(str(uuid.uuid4()), "", "unmount", subject)):
        raise errors.Declined(f"{subject}: not done")
    was_alive = one.is_alive
    _end(one)
    if target is not None:
        return _keep(one, target, was_alive=was_alive)
    _forget(one)
    if not was_alive:
        lost = "; what was written is thrown away" if one.mount.writable else ""
        host.reporter.notice(f"{one.mount.directory}: its mount was broken off and is cleaned up{lost}")
    return one


def find(directory: Path) -> Attachment:
    """The record of the mount at a directory. The directory itself is not touched: a dead mount may let nobody go."""
    wanted = {os.path.abspath(directory), os.path.realpath(directory)}  # noqa: PTH100 - no link is followed here
    found = [one for one in records() if one.mount is not None and one.mount.directory in wanted]
    if not found:
        raise errors.NotFound(f"hvmgr has mounted nothing at {directory}", hint="list what is mounted: hvmgr mounts")
    return found[-1]


def records() -> list[Attachment]:
    """The mounts of this host, left-over ones too, but not the images that were kept of them."""
    return [one for one in attachments.all_records() if one.mount is not None and one.mount.kept is None]


def _require_keepable(one: Attachment, place: Mount, keep: Path) -> Path:
    target = Path(os.path.abspath(keep))  # noqa: PTH100
    if not place.writable or place.overlay is None:
        raise errors.UsageError(
            f"{place.directory} was mounted to be read: there is nothing to keep", hint="mount it with --writable"
        )
    real = Path(os.path.realpath(target.parent)) / target.name
    if real.is_relative_to(place.directory):
        raise errors.UsageError(
            f"{target} lies in {place.directory}, which is unmounted first", hint="keep it in another directory"
        )
    if not target.parent.is_dir():
        raise errors.NotFound(f"there is no directory {target.parent}", hint=f"mkdir -p '{target.parent}'")
    if (home := _home_around(real)) is not None:
        raise errors.UsageError(
            f"{target} lies in {home}, a VM's home or an export, and would pass for one of its images",
            hint="keep it in a directory outside it",
        )
    if not os.access(target.parent, os.W_OK):
        raise errors.HostFailed(f"nothing can be written in {target.parent}", hint="keep it in another directory")
    if os.path.lexists(target) and not _is_overlay(target, place.overlay):
        raise errors.Conflict(f"{target} is there already", hint="choose another name")
    if not Path(place.overlay).exists():
        raise errors.NotFound(
            f"what was written at {place.directory} is gone: there is no {place.overlay}",
            hint=f"hvmgr unmount {shlex.quote(place.directory)}",
        )
    if one.format == image_export.VOLUME:
        raise errors.Unsupported(
            "what was written on top of a logical or encrypted volume cannot be kept: no image can say what it stands on",
            hint="copy what is wanted out of it before it is unmounted",
        )
    if images.read(Path(place.overlay), images.QCOW2).parent is None:
        raise errors.Unsupported(
            "what was written on top of a differencing or dynamic VHD cannot be kept: QEMU would not read its parent right",
            hint="make a qcow2 of it first: hvmgr image convert",
        )
    return target


def _home_around(file: Path) -> Path | None:
    """The home or export that a file would lie in, also where that has its images elsewhere; None outside."""
    if (found := vm_home.around(file)) is not None:
        return found
    for entry in index.entries():
        with contextlib.suppress(errors.HvmgrError):  # one that cannot be read says nothing of other places
            if vm_home.open_home(entry.home).layout.owns(str(file)):
                return entry.home
    return None


def _is_overlay(target: Path, overlay: str) -> bool:
    """Whether an earlier command has given the image its new name, and was killed then."""
    try:
        return durable.is_same_or_copy(target, Path(overlay))
    except OSError:
        return False


def _end(one: Attachment) -> None:
    """Not mounted, no device, no process; the image on top and the record are there still."""
    assert one.mount is not None
    directory = one.mount.directory
    if one.mount.by_user:
        user_mounting.end(one)
    elif _is_mounted(one):
        is_dead = not one.is_alive
        file_systems.unmount(directory, lazily=is_dead)
    deadline = time.monotonic() + _END_S
    while True:
        try:
            attaching.end(one)
        except errors.Conflict:
            if time.monotonic() > deadline or _is_mounted(one):
                raise
            time.sleep(_POLL_S)
        else:
            return


def _forget(one: Attachment) -> None:
    """The image on top is gone, then the record."""
    durable.remove_folder(settings.index_folder() / _FOLDER / one.id)
    durable.remove_folder(Path(f"{one.folder}.{_FOLDER}"))
    attachments.remove(one)


def _take_down(one: Attachment) -> None:
    _end(one)
    _forget(one)


def _keep(one: Attachment, target: Path, *, was_alive: bool) -> Attachment:
    """The image on top has its new name, and a record says what it stands on: those images have a user as long as it is there."""
    assert one.mount is not None and one.mount.overlay is not None  # noqa: PT018
    overlay = Path(one.mount.overlay)
    if not was_alive:  # its daemon had no time to put it right
        qemu_img.check(overlay, images.QCOW2, repair_leaks=True)
    durable.sync_file(overlay)
    if not _is_overlay(target, one.mount.overlay):
        durable.link_or_copy(overlay, target)
    place = dataclasses.replace(one.mount, kept=str(target), kept_in=kept_images.folder(target))
    kept = dataclasses.replace(one, phase=Phase.DETACHING, device=None, processes=(), mount=place)
    attachments.write(kept)
    durable.remove_folder(settings.index_folder() / _FOLDER / one.id)
    return kept


# --- what there is --------------------------------------------------------------------------------------------------


def listed() -> list[Mounted]:
    """Every mount of this host, the oldest first, with what became of it."""
    return [Mounted(one, one.mount, state_of(one)) for one in records() if one.mount is not None]


def state_of(one: Attachment) -> State:
    """What became of a mount; one that another mount namespace has counts as mounted."""
    if not one.is_alive:
        return State.LEFT_OVER
    if _is_mounted(one):
        return State.MOUNTED
    if one.device is None:
        return State.UNMOUNTED
    try:
        with loop.claimed(Path(one.device)):
            return State.UNMOUNTED
    except errors.Conflict:
        return State.MOUNTED
    except errors.HostFailed:
        return State.LEFT_OVER


def left_over() -> list[Attachment]:
    """Mounts that do not work any more; none while another command is at work on them."""
    return [] if attachments.is_busy() else [one for one in records() if state_of(one) is State.LEFT_OVER]


def is_worth_keeping(one: Attachment) -> bool:
    """Whether a user may have written what nobody has decided about yet."""
    return one.mount is not None and one.mount.writable and Path(one.mount.overlay or "").is_file()


def clean_up(one: Attachment) -> None:
    """A left-over mount is gone. What was written on top of it goes by ``unmount`` only."""
    if is_worth_keeping(one):
        assert one.mount is not None
        raise errors.Conflict(
            f"something may have been written at {one.mount.directory}",
            hint=_WRITTEN_HINT.format(shlex.quote(one.mount.directory)),
        )
    _take_down(one)


def forget_kept() -> None:
    """Images that were kept and are provably gone, or stand on others by now, need nothing any more."""
    for one in attachments.all_records():
        if one.mount is None or one.mount.kept is None:
            continue
        found, folder = one.kept, kept_images.folder(Path(one.mount.kept))
        if found is Kept.NEEDS_NOTHING:
            attachments.remove(one)
        elif (
            found is Kept.NEEDS_THEM and folder != one.mount.kept_in
        ):  # its device has another number since the host's start
            attachments.write(dataclasses.replace(one, mount=dataclasses.replace(one.mount, kept_in=folder)))


def _is_mounted(one: Attachment) -> bool:
    """Whether what is mounted at its directory is it, and not another thing by now."""
    assert one.mount is not None
    if one.mount.by_user:
        return user_mounting.is_mounted(one)
    if one.boot != attachments.boot_id() or one.device is None or loop.life_of(Path(one.device)) != one.life:
        return False
    here = file_systems.at(one.mount.directory)
    if here is None:
        return False
    return here.source == one.device or here.source.startswith(f"{one.device}p")
