"""What is done with free disks: made, snapshotted, filled from a stream, destroyed. Each change is one record written.

| cut off while                    | what the next command finds               | what it does        |
|----------------------------------|-------------------------------------------|---------------------|
| an image is made or filled       | an image that nothing names               | removes it          |
| the record is written            | the old disk or the new one               | nothing             |
| an image is merged into the one below | both, and the upper one shows the disk | merges them again   |
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors, units
from hvmgr.host import image_locks, nbd_client, qemu_img, storage_daemon
from hvmgr.model.image_format import ImageFormat
from hvmgr.model.image_info import Use
from hvmgr.model.progress import Progress
from hvmgr.operations import image_users
from hvmgr.operations.images import changes
from hvmgr.operations.transfer import outgoing
from hvmgr.operations.transfer.incoming import Incoming
from hvmgr.operations.transfer.outgoing import Outgoing
from hvmgr.operations.transfer.points import Point
from hvmgr.storage import contents, durable, images, locks, transfers
from hvmgr.storage.free_disks import FreeDisk, Shelf

if TYPE_CHECKING:
    from hvmgr.operations.host import Host

Report = Callable[[Progress], None]

_MERGE_WAIT_S = 600.0  # what has arrived is not thrown away because another disk is being merged
_MAX_SIZE = 63 << 40  # of QEMU's qcow2 with clusters of 64 KiB


def point_of(shelf: Shelf, one: FreeDisk) -> Point:
    """The disk, or its snapshot, as it can be read."""
    chain = shelf.chain(one)
    return Point(
        uuid=one.uuid,
        disk=one.disk,
        name=name_of(one),
        chain=tuple((path, images.QCOW2) for path in chain),
        size=images.read(chain[0], images.QCOW2).size,
        is_frozen=one.snapshot_of is not None,
        created=units.from_rfc3339(one.created) if one.snapshot_of else None,
    )


def name_of(one: FreeDisk) -> str:
    """What people call it."""
    return f"the {'disk' if one.snapshot_of is None else 'snapshot'} {one.uuid}"


def create(host: Host, shelf: Shelf, size: int, name: str, uuid: str) -> None:
    """A blank disk."""
    if size <= 0 or size % 512 or size > _MAX_SIZE:
        raise errors.UsageError(f"a disk cannot have {size} bytes", hint="give a multiple of 512 bytes, such as 20GiB")
    with shelf.locked(wait_s=host.wait_s):
        _settle(host, shelf)
        image = shelf.new_image()
        _make(shelf.folder / image, size)
        shelf.write(FreeDisk(uuid, name, size, image, units.to_rfc3339(datetime.now(UTC))))


def snapshot(host: Host, shelf: Shelf, wanted: str, name: str, uuid: str) -> None:
    """A point of the disk that stays: the disk goes on in a new image."""
    with _alone(host, shelf, wanted), shelf.locked(wait_s=host.wait_s):
        one = _disk(host, shelf, wanted)
        image = shelf.new_image()
        _make(shelf.folder / image, one.size, below=one.image)
        durable.set_mode(shelf.path(one), 0o400)
        shelf.write(one.pointing(image))  # first: at no moment does a disk that changes show what a snapshot names
        shelf.write(FreeDisk(uuid, name, one.size, one.image, units.to_rfc3339(datetime.now(UTC)), one.uuid))


def destroy(host: Host, shelf: Shelf, wanted: str) -> None:
    """The disk or the snapshot is gone; the snapshots of a disk stay."""
    with _alone(host, shelf, wanted), shelf.locked(wait_s=host.wait_s):
        one = _found(shelf, wanted)
        transfers.require_none([str(shelf.path(one))])
        for user in _users(host, shelf, shelf.path(one)):
            raise errors.Conflict(f"{name_of(one)} is needed by {user}", hint="let that end first, or give it a copy")
        if one.snapshot_of is None:
            _require_unused(host, shelf.path(one))
        shelf.remove(one)
        contents.forget(shelf.contents, shelf.path(one))
        durable.remove(shelf.lock(one.uuid))
        _settle(host, shelf)


def opened(host: Host, shelf: Shelf, wanted: str, base: Point | None, fmt: ImageFormat) -> Outgoing:
    """The stream of a disk or of a snapshot."""
    with shelf.locked(wait_s=host.wait_s):
        point = point_of(shelf, _found(shelf, wanted))
        outgoing.check(point, base, fmt)
        return outgoing.opened(point, base, fmt, report=host.reporter.progress)


def require_importable(host: Host, shelf: Shelf, wanted: str) -> FreeDisk:
    """The disk that an import would write, when it may."""
    one = _disk(host, shelf, wanted)
    with image_locks.held(shelf.path(one)):
        return one


def receive(host: Host, shelf: Shelf, wanted: str, stream: Incoming, *, force: bool) -> None:
    """The disk holds what arrives; on any failure it holds what it held."""
    with _alone(host, shelf, wanted):
        with shelf.locked(wait_s=host.wait_s):
            _settle(host, shelf)
            one = _disk(host, shelf, wanted)
            stream.require_meant(force=force)
            stream.require_fitting(one.size, name_of(one), "make a larger one with vdi-create", force=force)
            stream.require_held(_held(shelf, one), name_of(one), force=force)
            path = shelf.folder / shelf.new_image()
            _make(path, one.size, below=None if stream.parent is None else one.image)
            record = transfers.begin(f"what arrives for {name_of(one)}", [path])
        try:
            _fill(shelf, one, path, stream, host.reporter.progress)
            if stream.uuid is not None:
                contents.note(shelf.contents, path, stream.uuid)
            with shelf.locked(wait_s=max(host.wait_s, _MERGE_WAIT_S)):
                shelf.write(one.pointing(path.name))
        except BaseException:
            if _found(shelf, wanted).image != path.name:
                contents.forget(shelf.contents, path)
                durable.remove(path)
            raise
        finally:
            transfers.end(record)
        with contextlib.suppress(errors.Busy), shelf.locked(wait_s=host.wait_s):  # else the next command does it
            _settle(host, shelf)


def _fill(shelf: Shelf, one: FreeDisk, path: Path, stream: Incoming, report: Report) -> None:
    """The new image holds the disk. What the disk held before is locked meanwhile."""
    old = shelf.path(one)
    with image_locks.held(old, writable=False), durable.explained(path):
        extents = [] if stream.parent is None else qemu_img.map(old, images.QCOW2)
        below = [(part.start, part.length) for part in extents if part.data and not part.zero]
        with storage_daemon.started() as daemon:
            node = daemon.open(path, images.QCOW2, writable=True)
            with daemon.exported(node, writable=True) as uri, nbd_client.connected(uri) as client:
                stream.write(client, one.size, below, report)
        durable.sync_file(path)


@contextlib.contextmanager
def _alone(host: Host, shelf: Shelf, wanted: str) -> Iterator[None]:
    """One command at a time changes a disk."""
    _found(shelf, wanted)
    with locks.held(shelf.lock(wanted), wait_s=host.wait_s, what=f"the disk {wanted}"):
        yield


def _held(shelf: Shelf, one: FreeDisk) -> list[str]:
    """The points that the disk is known to be equal to."""
    names: dict[str, list[str]] = {}
    for other in shelf.all():
        if other.snapshot_of is not None:
            names.setdefault(other.image, []).append(other.uuid)
    chain = shelf.chain(one)
    extents = qemu_img.map(chain[0], images.QCOW2)
    empty = min((part.depth for part in extents if part.present), default=len(chain))
    found: list[str] = []
    for path in chain[: empty + 1]:
        if images.read(path, images.QCOW2).size != one.size:
            break
        known = contents.held(shelf.contents, path)
        found += names.get(path.name, []) + ([known] if known else [])
    return list(dict.fromkeys(found))


def _found(shelf: Shelf, wanted: str) -> FreeDisk:
    one = shelf.find(wanted)
    if one is None:
        raise errors.NotFound(f"there is no free disk {wanted}", hint="see: hvmgr vdi-list", uuid=wanted)
    return dataclasses.replace(one, size=images.read(shelf.path(one), images.QCOW2).size)


def _disk(host: Host, shelf: Shelf, wanted: str) -> FreeDisk:
    """A disk that can change, and that nobody uses."""
    one = _found(shelf, wanted)
    if one.snapshot_of is not None:
        raise errors.Conflict(f"{name_of(one)} never changes", hint=f"name the disk: {one.snapshot_of}")
    _require_unused(host, shelf.path(one))
    return one


def _require_unused(host: Host, path: Path) -> None:
    changes.require_unused(host, path)
    changes.require_closed([path])


def _users(host: Host, shelf: Shelf, path: Path) -> list[str]:
    """Who needs an image besides the records and images here: VMs, attachments, images elsewhere."""
    return [
        user.name
        for user in image_users.of(host, path)
        if user.use is not Use.SNAPSHOT and not (user.use is Use.PARENT and Path(user.name).parent == shelf.folder)
    ]


def _make(path: Path, size: int, below: str | None = None) -> None:
    qemu_img.create(path, images.QCOW2, size=size, backing=None if below is None else (below, images.QCOW2))
    durable.set_mode(path, 0o600)
    durable.sync_file(path)
    durable.sync_folder(path.parent)


def _settle(host: Host, shelf: Shelf) -> None:
    """Images that nothing needs are gone, and those that only one other stands on are merged with it.

    What somebody reads or has open waits for the next command.
    """
    while _remove_one(host, shelf):
        pass
    while (pair := _mergeable(host, shelf)) is not None:
        try:
            _merge(shelf, *pair)
        except (errors.Conflict, errors.NoSpace, errors.HostFailed):
            return


def _remove_one(host: Host, shelf: Shelf) -> bool:
    parents, named = shelf.parents(), {one.image for one in shelf.all()}
    needed = {parent for parent in parents.values() if parent is not None}
    for path in parents:
        if path.name in named or path in needed or transfers.users([str(path)]) or _users(host, shelf, path):
            continue
        contents.forget(shelf.contents, path)
        durable.remove(path)
        return True
    return False


def _mergeable(host: Host, shelf: Shelf) -> tuple[Path, Path] | None:
    """An image that nothing names, and the only one that stands on it."""
    parents, named = shelf.parents(), {one.image for one in shelf.all()}
    sizes = {path: images.read(path, images.QCOW2).size for path in parents}
    for path in parents:
        children = [child for child, parent in parents.items() if parent == path]
        if path.name in named or len(children) != 1 or sizes[path] != sizes[children[0]]:
            continue
        if not transfers.users(map(str, (path, *children))) and not _users(host, shelf, path):
            return path, children[0]
    return None


def _merge(shelf: Shelf, parent: Path, child: Path) -> None:
    """The child's data goes into the parent, which takes the child's name: at each moment the child shows the disk."""
    known, mode = contents.held(shelf.contents, child), child.stat().st_mode & 0o777
    durable.set_mode(parent, 0o600)
    with storage_daemon.started() as daemon:
        below = daemon.open(parent, images.QCOW2, writable=True)
        above = daemon.open(child, images.QCOW2, writable=True, backing=below)
        daemon.commit(above, below)
        durable.sync_file(parent)
        durable.set_mode(parent, mode)
        durable.rename(parent, child)
    contents.forget(shelf.contents, parent)
    if known is not None:
        contents.note(shelf.contents, child, known)
