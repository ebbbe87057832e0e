"""QEMU's own locks on an image file: seen, and held so that no QEMU opens the file meanwhile.

QEMU takes shared open-file-description locks on single bytes: from 100 on one for each permission that it uses, from 200
on one for each that it grants to nobody else (``block/file-posix.c``, RAW_LOCK_PERM_BASE and RAW_LOCK_SHARED_BASE). A
file that QEMU has open, and only then, has such locks, unless it was told to do without (``locking=off``), which the
caller finds by who has the file open.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from hvmgr import errors
from hvmgr.host import qemu_errors

_START, _LENGTH = 100, 200
_FLOCK = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux: type, whence, start, length, pid


def is_locked(path: Path) -> bool:
    """Whether a QEMU has the file open."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _START, _LENGTH, 0))
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """No QEMU has the file open, and none opens it before the block ends; Conflict when one has, naming its process.

    On a file system without such locks nobody is kept out, and QEMU itself does without there.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        try:
            wanted = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _START, _LENGTH, 0)
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, wanted)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise in_use(path) from error
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL):
                raise
        yield
    finally:
        os.close(descriptor)


def in_use(path: Path) -> errors.Conflict:
    """The refusal of a file that others have open."""
    holders = qemu_errors.holders_of(path)
    who = f"process {', '.join(map(str, holders))}" if holders else "another process"
    return errors.Conflict(
        f"'{path}' is in use by {who}",
        hint="a running VM, an attachment or another command uses it: let that end first",
        path=str(path),
        pids=holders,
    )
