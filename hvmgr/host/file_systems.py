"""File systems of guests mounted on this host, by the system's own mount and umount. No decisions.

The kernel, or ntfs-3g, reads what a guest wrote: nothing on such a file system is run, no device on it opened.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from hvmgr import errors
from hvmgr.host import process

_SAFE = ("nosuid", "nodev", "noexec")
_NTFS = "ntfs-3g"
# A copy has the id of its original, which may be mounted as well.
_OPTIONS = {"xfs": ("nouuid",), _NTFS: ("streams_interface=windows",)}
_MOUNT_S, _UNMOUNT_S = 300.0, 600.0  # a large journal is replayed; all that was written is written out
_ESCAPED = re.compile(rb"\\([0-7]{3})")
_KNOWN = Path("/proc/filesystems")


class Point(NamedTuple):
    """One line of the table of mounts: where, by which driver, from what."""

    directory: str
    type: str
    source: str


class Refused(Exception):
    """The kernel, or a program, did not mount it; its words are the message. Whoever asked for it says what was asked."""


def require(kind: str) -> str:
    """The driver for a kind of file system; Unsupported where this host has none."""
    process.require("mount")
    if kind == "ntfs":
        if shutil.which(_NTFS) is not None or not _is_known("ntfs3"):
            process.require(_NTFS)
            return _NTFS
        return "ntfs3"
    return {"fat": "vfat"}.get(kind, kind)


def mount(device: Path, directory: Path, driver: str, *, writable: bool) -> None:
    """The file system on the device is in the directory. Refused with the words of the kernel, or of ntfs-3g."""
    options = ["rw" if writable else "ro", *_SAFE, *_OPTIONS.get(driver, ())]
    argv = ["mount", "-t", driver, "-o", ",".join(options), "--", str(device), str(directory)]
    done = process.run(argv, timeout_s=_MOUNT_S, ok_codes=range(256))
    if done.code == 0:
        return
    words = " ".join(done.stderr.split()) or f"mount ended with code {done.code}"
    if "unknown filesystem type" in words:
        raise errors.Unsupported(
            f"this host's kernel cannot mount {driver}", hint="without mounting it: hvmgr file list, hvmgr file get"
        )
    raise Refused(words)


def unmount(directory: str, *, lazily: bool = False) -> None:
    """It is not mounted there any more; Conflict while a program uses it. ``lazily`` is for what is dead already."""
    argv = ["umount", *(["--lazy"] if lazily else []), "--", directory]
    done = process.run(argv, timeout_s=_UNMOUNT_S, ok_codes=range(256))
    if done.code == 0:
        return
    words = " ".join(done.stderr.split())
    if "busy" in words:
        raise errors.Conflict(
            f"a program uses {directory}", hint=f"see which one: fuser --verbose --mount '{directory}'", path=directory
        )
    raise errors.HostFailed(f"{directory} cannot be unmounted: {words}", path=directory)


def replay(file: Path) -> None:
    """The journal of the ext3 or ext4 in a file that can be written is replayed; nothing else is put right. Refused."""
    done = process.run(["e2fsck", "-p", "-E", "journal_only", "--", file], timeout_s=_MOUNT_S, ok_codes=range(256))
    if done.code not in (0, 1):
        words = " ".join((done.stdout.decode("utf-8", "replace") + done.stderr).split())
        raise Refused(words or f"e2fsck ended with code {done.code}")


def mount_as_user(file: Path, directory: Path, *, writable: bool) -> None:
    """The ext2, ext3 or ext4 in a file is in the directory, by fuse2fs; Refused with its words.

    The user sees all of it, whoever its files belong to in the guest.
    """
    options = ["rw" if writable else "ro", "fakeroot", *_SAFE]
    argv = ["fuse2fs", "-o", ",".join(options), os.fspath(file), os.fspath(directory)]
    done = process.run(argv, timeout_s=_MOUNT_S, ok_codes=range(256))
    if done.code != 0 or at(os.fspath(directory)) is None:
        words = " ".join((done.stderr + done.stdout.decode("utf-8", "replace")).split())
        raise Refused(words or f"fuse2fs ended with code {done.code}")


def unmount_as_user(directory: str, *, lazily: bool) -> None:
    """What this user has mounted by FUSE is not any more; Conflict while a program uses it."""
    argv = ["fusermount3", "-u", *(["-z"] if lazily else []), "--", directory]
    done = process.run(argv, timeout_s=_UNMOUNT_S, ok_codes=range(256))
    if done.code == 0:
        return
    words = " ".join(done.stderr.split())
    if "busy" in words:
        raise errors.Conflict(
            f"a program uses {directory}", hint=f"see which one: fuser --verbose --mount '{directory}'", path=directory
        )
    raise errors.HostFailed(f"{directory} cannot be unmounted: {words}", path=directory)


def at(directory: str) -> Point | None:
    """What is mounted at a directory now, the last one on top; it is not touched: a dead one may let nobody go."""
    return next((one for one in reversed(list(points())) if one.directory == directory), None)


def full(what: str) -> errors.NoSpace:
    """What is said of one that a program of ours has no room to write in."""
    return errors.NoSpace(f"{what} has no space left for it", hint="free space in the guest, or put less")


def points(pid: int | None = None) -> Iterator[Point]:
    """The table of mounts, as this process, or another one, sees it."""
    for line in Path(f"/proc/{pid or 'self'}/mountinfo").read_bytes().splitlines():
        before, _, after = line.partition(b" - ")
        driver, source = after.split(b" ")[:2]
        yield Point(_text(before.split(b" ")[4]), os.fsdecode(driver), _text(source))


def _text(word: bytes) -> str:
    return os.fsdecode(_ESCAPED.sub(lambda one: bytes([int(one[1], 8)]), word))


def _is_known(driver: str) -> bool:
    return driver in _KNOWN.read_text().split()
