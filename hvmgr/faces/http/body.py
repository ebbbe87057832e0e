"""The body of an upload as a stream that is read once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvmgr import errors
from hvmgr.faces.http.failure import Gone

if TYPE_CHECKING:
    from hvmgr.faces.http.transfer import Work

# What Xen Orchestra announces when it does not know the length: it ends the connection after the data.
UNKNOWN = 1 << 50


class Body:
    """Bytes as they arrive; ``length`` is that of all of them, None where nobody knows it."""

    def __init__(self, work: Work) -> None:
        head = work.head
        self.length = head.length if head.length is not None and head.length < UNKNOWN else None
        self.is_open_ended = self.length is None and not head.is_chunked
        self.at = 0
        self._work = work
        self._read = work.connection.read_body
        if head.length is None and not head.is_chunked:
            self._read = work.connection.read_to_end
        self._piece = memoryview(b"")

    def is_empty(self) -> bool:
        """Whether nothing comes at all; waits for the first byte."""
        return not self._piece and not self._fill()

    def readinto(self, view: memoryview) -> int:
        """At least one byte, or 0 at the end; Corrupt where it breaks off before that."""
        if not self._piece and not self._fill():
            return 0
        count = min(len(view), len(self._piece))
        view[:count] = self._piece[:count]
        self._piece = self._piece[count:]
        self.at += count
        return count

    def read(self, size: int) -> bytes:
        """At most so many bytes; none at the end."""
        if not self._piece and not self._fill():
            return b""
        data = bytes(self._piece[:size])
        self._piece = self._piece[size:]
        self.at += len(data)
        return data

    def _fill(self) -> bool:
        connection = self._work.connection
        self._work.check()
        connection.limit.set_stall(connection.limits.stall_s)
        try:
            data = self._read()
        except Gone as error:
            self._work.check()
            if connection.limit.expired:
                raise errors.Corrupt(f"no byte came for too long after byte {self.at}", premature=True) from error
            if not self.is_open_ended:
                of = "" if self.length is None else f" of {self.length}"
                raise errors.Corrupt(f"the upload breaks off at byte {self.at}{of}", premature=True) from error
            data = b""
        finally:
            connection.limit.set(None)
        self._work.check()
        self._piece = memoryview(data)
        self._work.done = self.at + len(data)
        return bool(data)
