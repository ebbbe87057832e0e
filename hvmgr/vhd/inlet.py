"""Bytes that arrive once and in order: from a pipe, a socket, the body of a request."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import stat
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from hvmgr import errors
from hvmgr.vhd import rules

_PIECE = 1 << 20


class Readable(Protocol):
    """All that is asked of a stream; open files, sockets' files and the bodies of HTTP requests have more."""

    def read(self, size: int, /) -> bytes | None:
        """At most so many bytes; none at the end."""
        ...


class Inlet:
    """Reads exactly what is asked for, counts, and says where a stream ended too early."""

    def __init__(self, file: Readable, name: str) -> None:
        self.at = 0
        self.total = 0  # the bytes of the whole stream, as far as they are known by now
        self._name = name
        self._file = file
        self._readinto = getattr(file, "readinto", None)
        self._scratch: memoryview | None = None
        _widen(file)

    def fill(self, view: memoryview) -> None:
        """The next bytes, as many as fit; Corrupt when there are fewer."""
        while view:
            count = self._some(view)
            if count == 0:
                raise self.fault("F51", at=self.at, total=max(self.total, self.at + len(view)))
            self.at += count
            view = view[count:]

    def take(self, count: int) -> bytes:
        """The next bytes; no more memory is taken than bytes arrive."""
        data = bytearray()
        while len(data) < count:
            piece = bytearray(min(count - len(data), _PIECE))
            self.fill(memoryview(piece))
            data += piece
        return bytes(data)

    def skip_to(self, offset: int) -> None:
        """What comes before this byte is of no interest."""
        while self.at < offset:
            self.fill(self._buffer()[: offset - self.at])

    def pour(self, sink: BinaryIO, end: int | None) -> None:
        """All that follows, up to byte ``end`` at most, into a file."""
        while end is None or self.at < end:
            view = self._buffer()
            count = self._some(view if end is None else view[: end - self.at])
            if count == 0:
                return
            sink.write(view[:count])
            self.at += count

    def peek(self, offset: int, count: int) -> bytes | None:
        """Bytes that come later, where the stream is a file; None where nobody can look ahead."""
        with contextlib.suppress(OSError, AttributeError, ValueError):
            descriptor = self._file.fileno()  # type: ignore[attr-defined]
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                begin = self._file.tell() - self.at  # type: ignore[attr-defined]
                return os.pread(descriptor, count, begin + offset)
        return None

    def is_at_end(self) -> bool:
        """Whether nothing follows; waits until the other end has said so."""
        return self._some(memoryview(bytearray(1))) == 0

    def fault(self, code: str, offset: int | None = None, **values: Any) -> errors.HvmgrError:
        """What is wrong with the stream, to be raised."""
        return rules.fault(code, offset, **values).error(Path(self._name))

    def _some(self, view: memoryview) -> int:
        """At least one byte, or 0 at the end; a file that does not block is waited for."""
        while (count := self._read(view)) is None:
            poll = select.poll()
            poll.register(self._file.fileno(), select.POLLIN)  # type: ignore[attr-defined]
            poll.poll()
        return count

    def _read(self, view: memoryview) -> int | None:
        if self._readinto is not None:
            count: int | None = self._readinto(view)
            return count
        data = self._file.read(len(view))
        if data is None:
            return None
        view[: len(data)] = data
        return len(data)

    def _buffer(self) -> memoryview:
        if self._scratch is None:
            self._scratch = memoryview(bytearray(_PIECE))
        return self._scratch


class Rewound(Inlet):
    """A stream that was spooled into a file: now there is a way back."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        super().__init__(file, name)
        self._spooled = file

    def skip_to(self, offset: int) -> None:
        """Goes there, forward or back."""
        self._spooled.seek(offset)
        self.at = offset


def _widen(file: Readable) -> None:
    """A pipe that holds what everybody may ask for is twice as fast as one with the usual 64 KiB."""
    with contextlib.suppress(OSError, AttributeError, ValueError):
        descriptor = file.fileno()  # type: ignore[attr-defined]
        if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, _PIECE)
