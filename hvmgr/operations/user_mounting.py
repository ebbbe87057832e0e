"""Mounts of ordinary users: the storage daemon shows the partition as a file, and fuse2fs what is on it. No root, no device.

Both are processes of the user's own, and end with the mount. ``mounting`` is above this; it has the record and the rules.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors
from hvmgr.host import file_systems, image_export, pids, process
from hvmgr.host.image_export import Link
from hvmgr.storage import attachments
from hvmgr.storage.attachments import Attachment, Phase
from hvmgr.storage.filesystems.signatures import Kind

if TYPE_CHECKING:
    from hvmgr.operations.inside.volumes import Chosen

KINDS = (Kind.EXT2, Kind.EXT3, Kind.EXT4)
_DRIVER = "fuse2fs"
_END_S = 300.0  # what a slow disk gets to take the last writes
_POLL_S = 0.05


def require() -> None:
    """Unsupported where this user cannot mount."""
    image_export.require_for_users()
    for program in (_DRIVER, "fusermount3"):
        process.require(program)


def require_kind(kind: Kind) -> None:
    """Unsupported for what only the kernel, or root's ntfs-3g, can mount."""
    if kind not in KINDS:
        raise errors.Unsupported(
            f"an ordinary user can mount ext2, ext3 and ext4, and this is {kind}",
            hint="run the command as root; hvmgr file list and hvmgr file get need no root",
        )


def put_up(one: Attachment, links: Sequence[Link], chosen: Chosen, *, with_overlay: bool) -> Attachment:
    """The file system is in the directory, and the record says so; ``Refused`` when fuse2fs does not like it.

    With an image on top, and nothing to be written by the user, the journal is replayed in that image first.
    """
    assert one.mount is not None
    folder = Path(one.folder)
    folder.mkdir(mode=0o700, parents=True)
    links = image_export.serve_lowest(folder, links, writable=False, volume=chosen.text)
    image_export.start(folder, links, writable=with_overlay, part=(chosen.start, chosen.volume.size))
    file = image_export.file_of(folder)
    if with_overlay and not one.mount.writable:
        file_systems.replay(file)
    file_systems.mount_as_user(file, Path(one.mount.directory), writable=one.mount.writable)
    served_by = (*image_export.processes(folder), *_drivers(one))
    one = dataclasses.replace(one, size=chosen.volume.size, processes=tuple(served_by), phase=Phase.ATTACHED)
    attachments.write(one)
    return one


def is_mounted(one: Attachment) -> bool:
    """Whether what is mounted at the directory is this."""
    assert one.mount is not None
    here = file_systems.at(one.mount.directory)
    return here is not None and here.source == os.fspath(image_export.file_of(Path(one.folder)))


def end(one: Attachment) -> None:
    """Not mounted, no process, no export: each may have been gone before. Conflict while a program uses it."""
    assert one.mount is not None
    folder = Path(one.folder)
    if is_mounted(one):
        file_systems.unmount_as_user(one.mount.directory, lazily=not (_drivers(one) and image_export.is_served(folder)))
    deadline = time.monotonic() + _END_S
    while _drivers(one):  # it writes out what it has
        if time.monotonic() > deadline:
            raise errors.HostFailed(f"{_DRIVER} does not let go of {one.mount.directory}", path=one.mount.directory)
        time.sleep(_POLL_S)
    image_export.end(folder)
    file = os.fspath(image_export.file_of(folder))
    if file_systems.at(file) is not None:  # of a daemon that was killed
        file_systems.unmount_as_user(file, lazily=True)


def _drivers(one: Attachment) -> list[tuple[int, int]]:
    return pids.naming(_DRIVER, os.fspath(image_export.file_of(Path(one.folder))))
