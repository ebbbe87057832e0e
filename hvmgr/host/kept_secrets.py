"""Short secrets that this process found and would take long to find again: in memory that goes nowhere else.

That memory is locked, so that it comes on no swap space; it comes into no core file, and a forked child sees zeros. Where that
cannot be had nothing is kept, and what is wanted is found again. All of it is gone with the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import resource
import struct

_SIZE = mmap.PAGESIZE
_SLOT = struct.Struct("=32sB95s")  # a name, how long the secret is, the secret
_LENGTH_MAX, _NONE = 95, 255  # the latter: it was looked for, and there is none
_WIPE_ON_FORK = 18  # madvise(2); Python has no name for it


class Page:
    """A page of such memory. When it is full, what was kept first makes room."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self._next = 0

    def find(self, name: bytes) -> tuple[bytes | None] | None:
        """What is kept by a name of 32 bytes: a secret, or that there is none; None when nothing is kept."""
        for at in range(0, _SIZE, _SLOT.size):
            known, length, secret = _SLOT.unpack_from(self._memory, at)
            if known == name:
                return (None,) if length == _NONE else (secret[:length],)
        return None

    def keep(self, name: bytes, secret: bytes | None) -> None:
        """It is kept, unless it is too long."""
        if secret is None or len(secret) <= _LENGTH_MAX:
            length = _NONE if secret is None else len(secret)
            _SLOT.pack_into(self._memory, self._next, name, length, secret or b"")
            self._next = (self._next + _SLOT.size) % _SIZE


def page() -> Page | None:
    """This process' page; None where it can have none."""
    return _page(os.getpid())


@functools.cache
def _page(_: int) -> Page | None:
    memory = mmap.mmap(-1, _SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
    try:
        memory.madvise(mmap.MADV_DONTDUMP)
        memory.madvise(_WIPE_ON_FORK)
    except OSError:
        return None
    return None if ctypes.CDLL(None).mlock(address, ctypes.c_size_t(_SIZE)) else Page(memory)


def leave_no_core() -> None:
    """Should this process crash, no core file is written: a user's keys are in the rest of its memory."""
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
