"""What a file has of the disk: its length, its holes, the space that is reserved for it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from hvmgr import errors
from hvmgr.os_errors import explained
from hvmgr.storage import durable

_KEEP_SIZE, _PUNCH_HOLE = 1, 1 | 2  # fallocate(2): FALLOC_FL_KEEP_SIZE, with FALLOC_FL_PUNCH_HOLE
_TAKE, _ZERO_RANGE = 0, 16  # space is taken, and reads as zeros: where there was none yet, everywhere
_SYNC_FILE_RANGE_WRITE = 2  # sync_file_range(2)


def reserve_file(path: Path, size: int) -> None:
    """An empty file that can become ``size`` bytes long whatever else takes space; Unsupported where nothing can do that.

    Its length is what was written so far: the reserved space lies behind its end, until ``settle_file``.
    """
    with explained(path), durable.replacing(path, 0o600, None) as descriptor:
        _reserve(descriptor, size)


def can_reserve(folder: Path) -> bool:
    """Whether the folder's file system can reserve space; nothing is left there."""
    try:
        descriptor = os.open(folder, os.O_RDWR | os.O_TMPFILE, 0o600)
    except OSError:
        return False
    try:
        _reserve(descriptor, 4096)
    except (OSError, errors.HvmgrError):
        return False
    finally:
        os.close(descriptor)
    return True


def _reserve(descriptor: int, size: int) -> None:
    try:
        _fallocate(descriptor, _KEEP_SIZE, 0, size)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            raise errors.Unsupported("this file system cannot reserve space for a file") from None
        raise


def start_writing(path: Path) -> None:
    """What another process has written into the file so far begins to go to disk; nobody waits for that.

    It promises nothing, and only makes ``settle_file`` quicker: whether it works does not matter.
    """
    libc = ctypes.CDLL(None)
    libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    with contextlib.suppress(OSError), path.open("rb") as file:
        libc.sync_file_range(file.fileno(), 0, 0, _SYNC_FILE_RANGE_WRITE)


def settle_file(path: Path) -> None:
    """What another process wrote into the file is on disk, and the space that was reserved behind its end is free."""
    with _changed(path) as descriptor:
        size = os.fstat(descriptor).st_size
        os.ftruncate(descriptor, size + 1)  # not every file system looks at a length that stays the same
        os.ftruncate(descriptor, size)


def make_sized(path: Path, length: int, *, filled: bool) -> None:
    """A new file of zeros, all of it a hole, or with all its space taken (``filled``)."""
    with _changed(path, os.O_CREAT | os.O_EXCL) as descriptor:
        os.ftruncate(descriptor, length)
        if filled:
            os.posix_fallocate(descriptor, 0, length)


def fill(path: Path) -> None:
    """All holes of the file have their space now; its bytes stay."""
    with _changed(path) as descriptor:
        os.posix_fallocate(descriptor, 0, os.fstat(descriptor).st_size)


def take(descriptor: int, length: int) -> None:
    """The file has this length and all its space, which reads as zeros; holes where the file system can only write them."""
    os.ftruncate(descriptor, length)
    _can(descriptor, _TAKE, length)


def _can(descriptor: int, mode: int, length: int) -> bool:
    try:
        _fallocate(descriptor, mode, 0, length)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        return False
    return True


def clear(path: Path, length: int, *, head: int) -> None:
    """The file is zeros of this length, with its space as ``take`` has it. Its first ``head`` bytes are that lastingly before anything else of it changes."""
    with _changed(path) as descriptor:
        os.pwrite(descriptor, bytes(head), 0)
    with _changed(path) as descriptor:
        os.ftruncate(descriptor, length)
        if not _can(descriptor, _ZERO_RANGE, length):
            os.ftruncate(descriptor, head)
            take(descriptor, length)


def set_length(path: Path, length: int) -> None:
    """The file has this many bytes, lastingly; what it grows by is a hole."""
    with _changed(path) as descriptor:
        os.ftruncate(descriptor, length)


def dig_holes(path: Path, ranges: Iterable[tuple[int, int]]) -> None:
    """The file's blocks in these ranges (offset, length), which hold zeros only, are holes; its length stays."""
    with _changed(path) as descriptor:
        for offset, length in ranges:
            _fallocate(descriptor, _PUNCH_HOLE, offset, length)


@contextlib.contextmanager
def _changed(path: Path, flags: int = 0) -> Iterator[int]:
    """A descriptor of the file; what the block does with it is on disk afterwards."""
    with explained(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o600)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
        durable.sync_file(path)


def _fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    while libc.fallocate(descriptor, mode, offset, length) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
