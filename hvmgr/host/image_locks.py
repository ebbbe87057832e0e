"""QEMU's locks on image files, for programs that are not QEMU: who writes an image keeps QEMU away, and is kept away.

QEMU (block/file-posix.c) locks single bytes of the file with open-file-description locks: one for each thing that it does
(from 100 on), one for each that it forbids others (from 200 on), both shared; and then looks whether others hold the
opposite ones. The bytes need not exist.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from hvmgr import errors
from hvmgr.host import qemu_errors

_DOES, _FORBIDS = 100, 200
_READ, _WRITE, _RESIZE = 0, 1, 3
_FLOCK = struct.Struct("hh4xqqi4x")  # l_type, l_whence, l_start, l_len, l_pid


def take(path: Path, *, writable: bool) -> int:
    """A descriptor that holds the locks of a reader, or a writer, until it is closed; nobody else may write meanwhile.

    Conflict when somebody writes the image, or for a writer when somebody needs it unchanged.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise errors.NotFound(f"there is no {path}", path=str(path)) from error
    except OSError as error:
        raise errors.HostFailed(f"{path} cannot be opened: {error.strerror}", path=str(path)) from error
    does = (_READ, _WRITE, _RESIZE) if writable else (_READ,)
    forbids = (_WRITE, _RESIZE)
    try:
        for byte in (*(_DOES + one for one in does), *(_FORBIDS + one for one in forbids)):
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
        opposite = (*(_FORBIDS + one for one in does), *(_DOES + one for one in forbids))
        if any(_is_held(descriptor, byte) for byte in opposite):
            raise in_use(path)
    except OSError as error:
        os.close(descriptor)
        raise errors.HostFailed(f"{path} cannot be locked: {error.strerror}", path=str(path)) from error
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextlib.contextmanager
def held(path: Path, *, writable: bool = True) -> Iterator[None]:
    """The locks of a writer, or of a reader, for the length of the block."""
    descriptor = take(path, writable=writable)
    try:
        yield
    finally:
        os.close(descriptor)


def _is_held(descriptor: int, byte: int) -> bool:
    """Whether another one holds the byte."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    answer: bytes = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, asked)
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def in_use(path: Path) -> errors.Conflict:
    """The refusal of a file that others have open, which names them."""
    holders = qemu_errors.holders_of(path)
    who = f"process {', '.join(map(str, holders))}" if holders else "another process"
    hint = "a running VM, another command or an attachment (hvmgr image attachments) uses it: let that end first"
    return errors.Conflict(f"'{path}' is in use by {who}", hint=hint, path=str(path), pids=holders)
