"""Ranges of a disk as pieces of a stream, and pieces on their way out: by the kernel alone where files hold them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from hvmgr.vhd.outlet import Outlet
from hvmgr.vhd.source import Place, Placed, Source

_PIECE = 2 << 20  # the most bytes of the disk in one chunk
_GRAIN = 64 << 10  # in smaller pieces than that, what is in many places goes through memory
_ZEROS = memoryview(bytes(1 << 20))

OnProgress = Callable[[int, int], None]
Piece = bytes | memoryview | Place


class Carrier:
    """Ranges of the disk as pieces of the stream, through one buffer where the kernel cannot move them.

    ``room`` is what may come before a range, in one piece with its first bytes.
    """

    def __init__(self, source: Source, placed: Placed | None, room: int) -> None:
        self._source = source
        self._placed = placed
        self._room = room
        self._buffer: memoryview | None = None

    def carry(self, start: int, length: int, lead: bytes = b"") -> Iterator[Piece]:
        """A range of the disk, with ``lead`` before it."""
        places = list(islice(self._placed.places(start, length), length // _GRAIN + 2)) if self._placed else []
        if places and places[-1].offset + places[-1].length == start + length:
            if lead:
                yield lead
            for place in places:
                yield from zeros(place.length) if place.file is None else (place,)
            return
        if self._buffer is None:
            self._buffer = memoryview(bytearray(self._room + _PIECE))
        for at in range(0, length, _PIECE):
            count = min(_PIECE, length - at)
            piece = self._buffer[: len(lead) + count]
            piece[: len(lead)] = lead
            self._source.read_into(start + at, piece[len(lead) :])
            yield piece
            lead = b""


def zeros(length: int) -> Iterator[memoryview]:
    """So many bytes that are zero."""
    for at in range(0, length, len(_ZEROS)):
        yield _ZEROS[: length - at]


def deliver(pieces: Iterable[Piece], descriptor: int, length: int, on_progress: OnProgress | None) -> None:
    """All pieces into a pipe, a socket or a file; ``on_progress`` gets bytes done and ``length``."""
    outlet, done = Outlet(descriptor, length), 0
    for piece in pieces:
        if isinstance(piece, Place):
            assert piece.file is not None
            outlet.send(piece.file.descriptor, piece.position, piece.length)
            done += piece.length
        else:
            outlet.write(piece)
            done += len(piece)
        if on_progress is not None:
            on_progress(done, length)
