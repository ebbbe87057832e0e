"""A disk as a VHD stream, front to back: its exact length is known before the first byte, and nothing is read twice.

A dynamic disk has all blocks that hold data; a differencing one the blocks that differ from its parent, whole and
consolidated, so that readers which ignore bitmaps read them right. Blocks ascend by number and by offset.
"""

from __future__ import annotations

import os
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol, cast, runtime_checkable

from hvmgr import errors
from hvmgr.vhd import bits, format
from hvmgr.vhd.format import Code, Footer, Header, Kind, Locator
from hvmgr.vhd.outlet import Outlet
from hvmgr.vhd.source import Source

_PIECE = 2 << 20  # the most bytes of the disk in one chunk
_ZEROS = memoryview(bytes(1 << 20))

OnProgress = Callable[[int, int], None]
Locate = Callable[[int, int], "tuple[int, int] | None"]


@runtime_checkable
class Located(Protocol):
    """A source whose data may lie in files just as it is on the disk."""

    def locate(self, offset: int, length: int) -> tuple[int, int] | None:
        """Descriptor and offset of a file that holds this range in one piece; None where no file does."""
        ...


@dataclass(frozen=True, slots=True)
class Parent:
    """What a differencing disk says of the disk below it."""

    uid: bytes
    name: str  # of its file, without a folder
    time: int = 0  # when that was last written, in seconds since 2000; 0: unknown


@dataclass(frozen=True, slots=True)
class _Place:
    """Bytes of the stream that lie in a file."""

    descriptor: int
    offset: int
    length: int

    def __len__(self) -> int:
        return self.length


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
        parent: Parent | None = None,
        changed: Iterable[tuple[int, int]] = (),
        uid: bytes | None = None,
        time: datetime | None = None,
        block_size: int = format.DEFAULT_BLOCK,
        alignment: int = format.SECTOR,
    ) -> None:
        _require(source.size, block_size)
        self._source = source
        self.size = source.size
        self.kind = kind if parent is None else Kind.DIFFERENCING
        self.footer = _footer(self.size, self.kind, uid or os.urandom(16), time or datetime.now(UTC))
        self.block_size = block_size
        self.length = self.size + format.FOOTER_SIZE
        if self.kind is not Kind.FIXED:
            ranges = _data_ranges(source) if parent is None else changed
            self._lay_out(parent, ranges, alignment)

    def chunks(self) -> Iterator[bytes | memoryview]:
        """All bytes of the stream, in pieces of about 2 MiB; each is valid until the next one is asked for."""
        return cast("Iterator[bytes | memoryview]", self._pieces(_nowhere))

    def send(self, descriptor: int, on_progress: OnProgress | None = None) -> None:
        """All bytes of the stream into a pipe, a socket or a file; by the kernel alone where a file holds them.

        ``on_progress`` gets bytes done and bytes in all. What the descriptor answers is the caller's (OSError).
        """
        outlet, done = Outlet(descriptor), 0
        locate = self._source.locate if isinstance(self._source, Located) else _nowhere
        for piece in self._pieces(locate):
            if isinstance(piece, _Place):
                outlet.send(piece.descriptor, piece.offset, piece.length)
            else:
                outlet.write(piece)
            done += len(piece)
            if on_progress is not None:
                on_progress(done, self.length)

    def _lay_out(self, parent: Parent | None, ranges: Iterable[tuple[int, int]], alignment: int) -> None:
        """Where everything stands: the table of blocks, and the bytes before it."""
        self._bitmap_size = format.bitmap_size(self.block_size)
        entries = format.block_count(self.size, self.block_size)
        locators, texts = _locators(parent, format.FOOTER_SIZE + format.HEADER_SIZE)
        table_offset = format.FOOTER_SIZE + format.HEADER_SIZE + len(texts)
        header = _header(table_offset, entries, self.block_size, locators, parent)
        self._front = self.footer.pack() + header.pack() + texts
        self._table = array("I", [format.UNUSED]) * entries
        self._table_end = table_offset + format.table_size(entries)
        # In front of a block's data stands its bitmap, and as much padding as the alignment of the data wants.
        data = format.round_up(self._table_end + self._bitmap_size, alignment)
        step = format.round_up(self._bitmap_size + self.block_size, alignment)
        self.allocated = 0
        for first, end in _block_runs(ranges, self.block_size):
            sector = (data + self.allocated * step - self._bitmap_size) // format.SECTOR
            if sector + (end - first) * (step // format.SECTOR) > format.UNUSED:
                raise errors.Unsupported(
                    f"a VHD in blocks of {self.block_size} bytes cannot hold so much data", hint="use larger blocks"
                )
            self._table[first:end] = array("I", range(sector, sector + (end - first) * step // 512, step // 512))
            self.allocated += end - first
        self._first = data - self._bitmap_size
        self._padding = step - self._bitmap_size - self.block_size
        last = data + (self.allocated - 1) * step + self.block_size
        self.length = (last if self.allocated else self._table_end) + format.FOOTER_SIZE

    def _pieces(self, locate: Locate) -> Iterator[bytes | memoryview | _Place]:
        if self.kind is Kind.FIXED:
            yield from self._fixed(_Carrier(self._source, locate, 0))
        else:
            room = self._bitmap_size + max(self._padding, self._first - self._table_end)
            yield from self._sparse(_Carrier(self._source, locate, room))
        yield self.footer.pack()

    def _sparse(self, carrier: _Carrier) -> Iterator[bytes | memoryview | _Place]:
        yield self._front
        table = self._table[:]
        if sys.byteorder == "little":
            table.byteswap()
        yield table.tobytes().ljust(format.table_size(len(table)), b"\xff")
        at = self._table_end
        for number, sector in enumerate(self._table):
            if sector == format.UNUSED:
                continue
            start = number * self.block_size
            held = min(self.block_size, self.size - start)
            lead = bytes(sector * format.SECTOR - at) + self._bitmap(held)
            at = sector * format.SECTOR + self._bitmap_size + self.block_size
            yield from carrier.carry(start, held, lead)
            yield from _zeros(self.block_size - held)

    def _fixed(self, carrier: _Carrier) -> Iterator[bytes | memoryview | _Place]:
        for offset, length, data in self._source.stretches():
            yield from carrier.carry(offset, length) if data else _zeros(length)

    def _bitmap(self, held: int) -> bytes:
        """All sectors are here; those behind the end of the disk are nowhere."""
        bitmap = bytearray(self._bitmap_size)
        bits.put(bitmap, 0, held // format.SECTOR, value=True)
        return bytes(bitmap)


class _Carrier:
    """Ranges of the disk as pieces of the stream, all through one buffer where no file holds them."""

    def __init__(self, source: Source, locate: Locate, room: int) -> None:
        self._source = source
        self._locate = locate
        self._room = room
        self._buffer: memoryview | None = None

    def carry(self, start: int, length: int, lead: bytes = b"") -> Iterator[bytes | memoryview | _Place]:
        """A range of the disk, with ``lead`` before it."""
        place = self._locate(start, length)
        if place is not None:
            if lead:
                yield lead
            yield _Place(*place, length)
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


def _zeros(length: int) -> Iterator[memoryview]:
    for at in range(0, length, len(_ZEROS)):
        yield _ZEROS[: length - at]


def _nowhere(_offset: int, _length: int) -> None:
    return None


def _require(size: int, block_size: int) -> None:
    if size <= 0 or size % format.SECTOR:
        raise errors.UsageError(f"a VHD cannot have {size} bytes", hint="its size is a multiple of 512, and not 0")
    if size > format.MAX_SIZE:
        raise errors.Unsupported(
            f"a VHD cannot have {size} bytes: 2040 GiB is the most", hint="use another format for this disk"
        )
    if block_size < format.SECTOR or block_size & (block_size - 1):
        raise errors.UsageError(f"a VHD cannot have blocks of {block_size} bytes", hint="2 MiB is usual")


def _footer(size: int, kind: Kind, uid: bytes, time: datetime) -> Footer:
    return Footer(
        size=size,
        original_size=size,
        type=kind.number,
        uid=uid,
        time=format.to_stamp(time),
        geometry=format.geometry(size),
        data_offset=format.NOWHERE if kind is Kind.FIXED else format.FOOTER_SIZE,
    )


def _header(
    table_offset: int, entries: int, block_size: int, locators: tuple[Locator, ...], parent: Parent | None
) -> Header:
    if parent is None:
        return Header(table_offset, entries, block_size)
    return Header(
        table_offset,
        entries,
        block_size,
        parent_uid=parent.uid,
        parent_time=parent.time,
        parent_name=format.encode_name(parent.name),
        locators=locators,
    )


def _locators(parent: Parent | None, at: int) -> tuple[tuple[Locator, ...], bytes]:
    """The entries in the header, and their texts, which begin at ``at``."""
    entries, texts = [], b""
    for code, text in () if parent is None else ((Code.RELATIVE, f".\\{parent.name}"), (Code.URL, f"file://./{parent.name}")):
        data = format.encode_text(code, text)
        space = format.round_up(len(data), format.SECTOR)
        entries.append(Locator(code.encode(), space, len(data), at + len(texts)))
        texts += data.ljust(space, b"\0")
    unused = [Locator()] * (format.LOCATORS - len(entries))
    return (*entries, *unused), texts


def _data_ranges(source: Source) -> Iterator[tuple[int, int]]:
    return ((offset, length) for offset, length, data in source.stretches() if data)


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
