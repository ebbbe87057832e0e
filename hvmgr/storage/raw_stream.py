"""The bytes of a disk as they are, as a stream: as a whole or any range of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import cast

from hvmgr.vhd import carrier
from hvmgr.vhd.carrier import Carrier, OnProgress, Piece
from hvmgr.vhd.outlet import Outlet
from hvmgr.vhd.source import Place, Placed, Source

_RUN = 64 << 20  # of the disk, looked up at once


class RawStream:
    """One disk, ready to be sent. It must not change as long as this is in use."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.length = source.size

    def chunks(self, start: int = 0, length: int | None = None) -> Iterator[bytes | memoryview]:
        """A range in pieces of at most 2 MiB; each is valid until the next one is asked for."""
        return cast("Iterator[bytes | memoryview]", self._pieces(start, self._end(start, length), None))

    def send(
        self,
        descriptor: int,
        on_progress: OnProgress | None = None,
        *,
        start: int = 0,
        length: int | None = None,
        sparse: bool = False,
    ) -> None:
        """A range into a pipe, a socket or a file; ``sparse``: a new file, in which zeros become holes."""
        end = self._end(start, length)
        placed = self._source if isinstance(self._source, Placed) else None
        if sparse:
            self._send_sparse(descriptor, start, end, placed, on_progress)
        else:
            carrier.deliver(self._pieces(start, end, placed), descriptor, end - start, on_progress)

    def _end(self, start: int, length: int | None) -> int:
        return self.length if length is None else min(self.length, start + length)

    def _pieces(self, start: int, end: int, placed: Placed | None) -> Iterator[Piece]:
        carried = Carrier(self._source, placed, 0)
        for offset, length, data in self._source.stretches(start, end - start):
            if not data:
                yield from carrier.zeros(length)
                continue
            for at in range(offset, offset + length, _RUN):
                yield from carried.carry(at, min(_RUN, offset + length - at))

    def _send_sparse(
        self, descriptor: int, start: int, end: int, placed: Placed | None, on_progress: OnProgress | None
    ) -> None:
        outlet, carried = Outlet(descriptor, end - start), Carrier(self._source, placed, 0)
        for offset, length, data in self._source.stretches(start, end - start):
            if not data:
                os.lseek(descriptor, length, os.SEEK_CUR)
                continue
            for at in range(offset, offset + length, _RUN):
                for piece in carried.carry(at, min(_RUN, offset + length - at)):
                    if isinstance(piece, Place):
                        assert piece.file is not None
                        outlet.send(piece.file.descriptor, piece.position, piece.length)
                    else:
                        outlet.write(piece)
                if on_progress is not None:
                    on_progress(min(at + _RUN, end) - start, end - start)
        os.ftruncate(descriptor, end - start)
