"""One volume of a chain as an ordinary file that programs write: a storage daemon of ours shows it by FUSE. No root, no mount.

The daemon dies with this process, and with it, for root, the mount namespace that the file is in. An ordinary user's dead
export is left in his runtime folder; ``clear`` takes it away.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from hvmgr.host import file_systems, image_export, process, storage_daemon
from hvmgr.host.image_export import Link
from hvmgr.storage import durable

_FILE = "volume"


def require() -> None:
    """Unsupported where this user cannot have such a file."""
    image_export.require_for_users()
    process.require("unshare" if os.geteuid() == 0 else "fusermount3")


@contextlib.contextmanager
def shown(links: Sequence[Link], work: Path, *, start: int, size: int) -> Iterator[Path]:
    """A part of a disk as a file; all writes go into the first of the links, the top one. Nobody else writes any of them.

    ``work`` is a folder for it, which is gone afterwards. What was written is in the image when the block has ended.
    """
    durable.make_folder(work.parent, mode=0o711)
    durable.make_folder(work, mode=0o700)
    try:
        mountpoint = work / _FILE
        mountpoint.touch(0o600)
        with (
            storage_daemon.started(apart=True) as daemon,
            daemon.chain(links, writable=True) as node,
            daemon.shown(node, mountpoint, start=start, size=size) as file,
        ):
            yield file
    finally:
        clear(work)


def clear(work: Path) -> None:
    """Nothing is left of what a process that died showed there."""
    file = work / _FILE
    if file_systems.at(str(file)) is not None:
        file_systems.unmount_as_user(str(file), lazily=True)
    durable.remove_folder(work)
