"""Bytes on their way into a pipe, a socket or a file, through the kernel alone where they lie in another file.

A descriptor that does not block is waited for. What the kernel moves by itself into a pipe or a socket stays the file's own
pages until the other end has read it, however long that takes. So the last bytes of a stream, as many as pipe or socket
can hold, are copied: when they are handed over, everything before them has been read, and the file may change.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import stat
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec

from hvmgr import errors
from hvmgr.write_behind import WriteBehind

P = ParamSpec("P")

_PIECE = 16 << 20  # for each call into the kernel: few calls, and Ctrl-C is heard soon
_BUFFER = 1 << 20
_PIPE = 1 << 20  # the most that everybody may ask for; with the usual 64 KiB a pipe is half as fast
# What copy_file_range(2) and sendfile(2) answer when they cannot do it between these two; nothing was moved then.
_CANNOT = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)


class Outlet:
    """Writes ``length`` bytes in all to one descriptor from its present position on; it stays open."""

    def __init__(self, descriptor: int, length: int) -> None:
        self._descriptor = descriptor
        self._left = length
        mode = os.fstat(descriptor).st_mode
        self._behind = WriteBehind(descriptor) if stat.S_ISREG(mode) else None
        self._movers: list[Callable[[int, int, int], int]] = [self._sendfile]
        if stat.S_ISREG(mode):
            self._movers.insert(0, self._copy_file_range)  # may share blocks
        if stat.S_ISFIFO(mode):
            with contextlib.suppress(OSError):  # beyond what a user's pipes may have in all: it works without
                fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, _PIPE)
        self._copied = _held_by(descriptor, mode)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """All of it is handed over."""
        view = memoryview(data)
        while view:
            count = self._patiently(os.write, self._descriptor, view)
            view = view[count:]
            self._push(count)

    def send(self, source: int, offset: int, length: int) -> None:
        """A range of another file; Corrupt when that ends within it."""
        end = offset + length
        while self._movers and (count := min(_PIECE, end - offset, self._left - self._copied)) > 0:
            try:
                count = self._patiently(self._movers[0], source, offset, count)
            except OSError as error:
                if error.errno not in _CANNOT:
                    raise
                self._movers.pop(0)
            else:
                _require(count, offset)
                offset += count
                self._push(count)
        if offset < end:
            self._carry(source, offset, end)

    def _push(self, count: int) -> None:
        self._left -= count
        if self._behind is not None:
            self._behind.wrote(os.lseek(self._descriptor, 0, os.SEEK_CUR) - count, count)

    def _carry(self, source: int, offset: int, end: int) -> None:
        buffer = memoryview(bytearray(min(_BUFFER, end - offset)))
        while offset < end:
            count = os.preadv(source, [buffer[: end - offset]], offset)
            _require(count, offset)
            self.write(buffer[:count])
            offset += count

    def _sendfile(self, source: int, offset: int, count: int) -> int:
        return os.sendfile(self._descriptor, source, offset, count)

    def _copy_file_range(self, source: int, offset: int, count: int) -> int:
        return os.copy_file_range(source, self._descriptor, count, offset_src=offset)

    def _patiently(self, act: Callable[P, int], *args: P.args, **kwargs: P.kwargs) -> int:
        while True:
            try:
                return act(*args, **kwargs)
            except BlockingIOError:
                poll = select.poll()
                poll.register(self._descriptor, select.POLLOUT)
                poll.poll()


def _held_by(descriptor: int, mode: int) -> int:
    """How many bytes may be on their way at most, between our hands and those of the other end."""
    if stat.S_ISFIFO(mode):
        return fcntl.fcntl(descriptor, fcntl.F_GETPIPE_SZ)
    if not stat.S_ISSOCK(mode):
        return 0
    return sum(max(_limits(f"ipv4/tcp_{way}mem"), 2 * _limits(f"core/{way}mem_max")) for way in "rw")


def _limits(name: str) -> int:
    """The last number of a limit on the buffers of sockets; 64 MiB where the kernel does not tell."""
    try:
        return int(Path("/proc/sys/net", name).read_text("ascii").split()[-1])
    except (OSError, ValueError):
        return 64 << 20


def _require(count: int, offset: int) -> None:
    if count == 0:
        raise errors.Corrupt(f"a file of the disk ends at byte {offset}, within its data")
