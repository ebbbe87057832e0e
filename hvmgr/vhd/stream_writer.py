"""A disk as a VHD stream, front to back: its exact length is known before the first byte, and nothing is read twice.

A dynamic disk has all blocks that hold data; a differencing one the blocks that differ from its parent, whole and
consolidated, so that readers which ignore bitmaps read them right. Blocks ascend by number and by offset.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import cast

from hvmgr import errors
from hvmgr.vhd import bits, carrier, format, layout
from hvmgr.vhd.carrier import Carrier, OnProgress, zeros
from hvmgr.vhd.chain import Chain
from hvmgr.vhd.format import SECTOR, Kind
from hvmgr.vhd.image import ZEROS
from hvmgr.vhd.layout import Parentage
from hvmgr.vhd.source import Place, Placed, Source


class StreamWriter:
    """One disk, ready to be sent.

    Without ``parent`` the whole disk, dynamic or fixed. With one, the blocks touched by ``changed`` (offset and length
    of all that may differ from the parent, ascending), each with what ``source`` reads as there. ``alignment`` is that
    of each block's data: 4096 for a file on which a disk will run.

    The source must not change as long as this is in use.
    """

    def __init__(
        self,
        source: Source,
        *,
        kind: Kind = Kind.DYNAMIC,
        parent: Parentage | None = None,
        changed: Iterable[tuple[int, int]] = (),
        uid: bytes | None = None,
        time: datetime | None = None,
        block_size: int = format.DEFAULT_BLOCK,
        alignment: int = SECTOR,
    ) -> None:
        self._source = source
        self.size = source.size
        self.kind = kind if parent is None else Kind.DIFFERENCING
        self._plan = layout.design(self.size, self.kind, block_size=block_size, parent=parent, uid=uid, time=time)
        self.footer = self._plan.footer
        self.block_size = block_size
        self.length = self.size + format.FOOTER_SIZE
        if self.kind is not Kind.FIXED:
            self._place_blocks(_data_ranges(source) if parent is None else changed, alignment)

    @classmethod
    def of_chain(cls, chain: Chain, base: int | None = None, *, alignment: int = SECTOR) -> StreamWriter:
        """The disk of a chain under its own id and time: as a whole, or what the images above number ``base`` changed.

        A delta's parent is the image with that number, so that whoever has that one can put the delta on it.
        """
        footer, block_size = chain.top.footer, chain.top.block_size or format.DEFAULT_BLOCK
        time = format.from_stamp(footer.time)
        if base is None:
            return cls(chain, uid=footer.uid, time=time, block_size=block_size, alignment=alignment)
        if not 0 < base < len(chain.images):
            raise errors.UsageError(f"{chain.top.path} has no ancestor number {base}")
        below = chain.images[base]
        name = below.path.name
        stamp = format.to_stamp(datetime.fromtimestamp(below.file.changed(), UTC))
        return cls(
            chain,
            parent=Parentage(below.uid, name, f".\\{name}", time=stamp),
            changed=_changes(chain, base),
            uid=footer.uid,
            time=time,
            block_size=block_size,
            alignment=alignment,
        )

    def chunks(self) -> Iterator[bytes | memoryview]:
        """All bytes of the stream, in pieces of about 2 MiB; each is valid until the next one is asked for."""
        return cast("Iterator[bytes | memoryview]", self._pieces(None))

    def send(self, descriptor: int, on_progress: OnProgress | None = None) -> None:
        """All bytes of the stream into a pipe, a socket or a file; by the kernel alone where a file holds them.

        ``on_progress`` gets bytes done and bytes in all. What the descriptor answers is the caller's (OSError).
        """
        placed = self._source if isinstance(self._source, Placed) else None
        carrier.deliver(self._pieces(placed), descriptor, self.length, on_progress)

    def _place_blocks(self, ranges: Iterable[tuple[int, int]], alignment: int) -> None:
        """Where each block stands, one after the other.

        In front of a block's data is its bitmap, and before that as much padding as the alignment of the data wants.
        """
        self._bitmap_size = self._plan.bitmap_size
        data = format.round_up(self._plan.start + self._bitmap_size, alignment)
        step = format.round_up(self._bitmap_size + self.block_size, alignment)
        self._room = max(step - self.block_size, data - self._plan.start)
        self._table = array("I", [format.UNUSED]) * format.block_count(self.size, self.block_size)
        self.allocated = 0
        for first, end in _block_runs(ranges, self.block_size):
            place = data - self._bitmap_size + self.allocated * step
            places = range(place // SECTOR, (place + (end - first) * step) // SECTOR, step // SECTOR)
            if places[-1] >= format.UNUSED:
                raise errors.UsageError(
                    f"a VHD in blocks of {self.block_size} bytes cannot hold so much data", hint="use larger blocks"
                )
            self._table[first:end] = array("I", places)
            self.allocated += end - first
        last = data + (self.allocated - 1) * step + self.block_size
        self.length = (last if self.allocated else self._plan.start) + format.FOOTER_SIZE

    def _pieces(self, placed: Placed | None) -> Iterator[bytes | memoryview | Place]:
        if self.kind is Kind.FIXED:
            yield from self._fixed(Carrier(self._source, placed, 0))
        else:
            yield from self._sparse(Carrier(self._source, placed, self._room))
        yield self.footer.pack()

    def _sparse(self, carried: Carrier) -> Iterator[bytes | memoryview | Place]:
        yield b"".join(data for _, data in self._plan.front())
        table = self._table[:]
        if sys.byteorder == "little":
            table.byteswap()
        yield table.tobytes().ljust(format.table_size(len(table)), b"\xff")
        at = self._plan.start
        for number, sector in enumerate(self._table):
            if sector == format.UNUSED:
                continue
            start = number * self.block_size
            held = min(self.block_size, self.size - start)
            lead = bytes(sector * SECTOR - at) + self._bitmap(held)
            at = sector * SECTOR + self._bitmap_size + self.block_size
            yield from carried.carry(start, held, lead)
            yield from zeros(self.block_size - held)

    def _fixed(self, carried: Carrier) -> Iterator[bytes | memoryview | Place]:
        for offset, length, data in self._source.stretches():
            yield from carried.carry(offset, length) if data else zeros(length)

    def _bitmap(self, held: int) -> bytes:
        """All sectors are here; those behind the end of the disk are nowhere."""
        bitmap = bytearray(self._bitmap_size)
        bits.put(bitmap, 0, held // SECTOR, value=True)
        return bytes(bitmap)


def _data_ranges(source: Source) -> Iterator[tuple[int, int]]:
    return ((offset, length) for offset, length, data in source.stretches() if data)


def _changes(chain: Chain, base: int) -> Iterator[tuple[int, int]]:
    """What the images above a base hold, and where they hide it by being shorter."""
    for piece in chain.pieces(depth=base):
        if piece.level is not None or piece.position == ZEROS:
            yield piece.offset, piece.length


def _block_runs(ranges: Iterable[tuple[int, int]], block_size: int) -> Iterator[tuple[int, int]]:
    """The blocks that the ranges touch, as runs: first and end."""
    first = end = 0
    for offset, length in ranges:
        if length <= 0:
            continue
        low, high = offset // block_size, format.block_count(offset + length, block_size)
        if low > end:
            if end > first:
                yield first, end
            first = low
        end = max(end, high)
    if end > first:
        yield first, end
