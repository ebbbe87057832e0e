"""Whether an image that ``unmount --keep`` made still needs the images below it.

Its file may be on a disk that is unplugged, or on a share that is out of reach: that it is not seen says nothing. It is gone
when its own folder is there, the same one on the same file system, and has no such file.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

from hvmgr import errors
from hvmgr.storage import images


class Kept(StrEnum):
    """What is known of such an image."""

    NEEDS_THEM = "needs them"
    UNKNOWN = "unknown"  # it cannot be seen, or read: to be taken as one that needs them
    NEEDS_NOTHING = "needs nothing"  # removed, or it has other parents by now


def folder(file: Path) -> tuple[int, ...] | None:
    """Which folder it is that a file is, or was, in: its device, inode and file system; None when it is not there.

    An empty mount point is another one, and so is a disk that is plugged in in place of the first.
    """
    with contextlib.suppress(OSError):
        return _in_folder(file)[0]
    return None


def look(file: Path, kept_in: tuple[int, ...] | None, below: Sequence[str]) -> Kept:
    """What the kept image in ``file``, made in the folder ``kept_in``, has to do with the images ``below``."""
    try:
        found, is_there = _in_folder(file)
    except OSError:
        return Kept.UNKNOWN
    if not is_there:
        return Kept.NEEDS_NOTHING if found == kept_in else Kept.UNKNOWN
    try:
        return Kept.NEEDS_THEM if _stands_on(file, below) else Kept.NEEDS_NOTHING
    except (errors.HvmgrError, OSError):
        return Kept.UNKNOWN


def _in_folder(file: Path) -> tuple[tuple[int, ...], bool]:
    """The folder, and whether the file is in it, both of one moment."""
    descriptor = os.open(file.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        facts = os.fstat(descriptor)
        identity = (facts.st_dev, facts.st_ino, os.fstatvfs(descriptor).f_fsid)
        try:
            os.stat(file.name, dir_fd=descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return identity, False
        return identity, True
    finally:
        os.close(descriptor)


def _stands_on(file: Path, below: Sequence[str]) -> bool:
    known = {images.identity(Path(path)) for path in below if Path(path).exists()}
    seen: set[Path] = set()
    while file not in seen:
        seen.add(file)
        header = images.read(file, images.QCOW2)
        parent = header.parent
        if parent is None:
            return False
        if str(parent) in below or images.identity(parent) in known:
            return True
        if header.backing_format != images.QCOW2:
            return False
        file = parent
    return False
