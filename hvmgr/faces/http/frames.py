"""A raw disk in frames, as ``chunked`` means it: u64 offset, u32 length (little-endian), the bytes; (0, 0) ends it.

What lies between the frames is zeros. They have to ascend: what was read is not gone back to.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from hvmgr import errors

if TYPE_CHECKING:
    from hvmgr.faces.http.body import Body

_HEAD = struct.Struct("<QI")


class Frames:
    """The disk that the frames hold, as a stream of ``size`` bytes."""

    def __init__(self, body: Body, size: int) -> None:
        self._body = body
        self._size = size
        self._at = 0
        self._data = 0  # bytes of the present frame that are still to come
        self._next = 0  # where that frame begins
        self._ended = False

    def readinto(self, view: memoryview) -> int:
        """At least one byte, or 0 at the end."""
        while not self._ended and not self._data and self._at >= self._next:
            self._begin_frame()
        end = self._next if not self._ended else self._size
        if self._at < end:  # a gap, or what follows the last frame
            count = min(len(view), end - self._at)
            view[:count] = bytes(count)
        elif self._data:
            count = self._body.readinto(view[: self._data])
            if not count:
                raise self._broken("in the middle of one")
            self._data -= count
            self._next += count
        else:
            return 0
        self._at += count
        return count

    def read(self, size: int) -> bytes:
        """At most so many bytes; none at the end."""
        data = bytearray(min(size, 1 << 20))
        return bytes(data[: self.readinto(memoryview(data))])

    def _begin_frame(self) -> None:
        head = bytearray()
        while len(head) < _HEAD.size:
            piece = self._body.read(_HEAD.size - len(head))
            if not piece:
                raise self._broken("before the last one")
            head += piece
        offset, length = _HEAD.unpack(head)
        if not offset and not length:
            self._ended = True
            return
        if offset < self._at:
            raise errors.UsageError(
                f"the frame for byte {offset} comes after byte {self._at}; they have to ascend", frame=True
            )
        if offset + length > self._size:
            raise errors.UsageError(
                f"a frame ends at byte {offset + length}, and the disk has {self._size}", frame=True
            )
        self._next, self._data = offset, length

    def _broken(self, where: str) -> errors.Corrupt:
        return errors.Corrupt(f"the frames end {where}, at byte {self._body.at}", premature=True)
