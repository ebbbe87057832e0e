"""One VHD file: what it holds itself, and writing to it so that a crash at any point leaves a valid file.

Order of writing (specification, and what power failures teach): space is taken by writing the footer at the new end and
syncing; then data; ``flush`` syncs it, writes the bitmaps, syncs, writes the table's entries, syncs. So a bitmap never says
that a sector is there before its bytes are, and the table never leads to a bitmap that is not. A crash loses space, and what
was written after the last ``flush``; nothing else.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Self

from hvmgr import errors
from hvmgr.vhd import bits, format, structure
from hvmgr.vhd.file import File
from hvmgr.vhd.format import NO_ID, SECTOR, UNUSED, Footer, Header, Kind
from hvmgr.vhd.source import Place, Source, Stretch, clear
from hvmgr.vhd.structure import Structure
from hvmgr.vhd.table import Table

_BITMAPS = 4 << 20  # bytes of bitmaps that are kept
_AHEAD = 64 << 20  # bytes of new blocks for which space is taken at once
ABSENT, ZEROS = -1, -2  # positions: the parent has it; zeros whatever the parents have


class Extent(NamedTuple):
    """A range of the disk and where its bytes stand in the file, or ``ABSENT`` or ``ZEROS``."""

    offset: int
    length: int
    position: int

    @property
    def is_held(self) -> bool:
        """Whether the file holds it."""
        return self.position >= 0


def open_image(path: Path | str, *, writable: bool = False, tolerant: bool = False) -> Image:
    """One VHD file, without its parents.

    Corrupt, Unsupported and so on when it breaks a rule. ``tolerant`` reads over wrong checksums and over footers that
    contradict each other, as long as the rest can be believed; ``Image.structure.faults`` tells what was read over.
    """
    file = File(Path(path), writable=writable)
    try:
        found = structure.read(file)
        found.refuse(tolerant=tolerant and not writable)
        return Image(file, found, writable=writable)
    except BaseException:
        file.close()
        raise


class Image:
    """An open VHD. As a ``Source`` it shows what this file holds: of a differencing disk that is not the whole disk."""

    def __init__(self, file: File, found: Structure, *, writable: bool = False) -> None:
        assert found.footer is not None
        self.file = file
        self.structure = found
        self.footer: Footer = found.footer
        self.header: Header | None = found.header
        self.writable = writable
        self._table = found.table or Table.empty(0)
        self._block = found.header.block_size if found.header else 0
        self._bitmap = format.bitmap_size(self._block) if self._block else 0
        self._room = max(8, _BITMAPS // self._bitmap) if self._block else 0  # bitmaps that are kept
        self._bitmaps: OrderedDict[int, bytearray] = OrderedDict()
        self._dirty: set[int] = set()  # blocks whose bitmap waits for its data to be on the disk
        self._fresh: set[int] = set()  # blocks whose entry waits for its bitmap
        self._end = found.end  # where the footer stands
        # The next block's place; behind a last block that its writer cut at the disk's end.
        self._free = max(found.end, found.blocks_end)
        self._reserve = 1
        self.taken: list[int] = []  # where spaces that were taken for something else begin

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def path(self) -> Path:
        """The file."""
        return self.file.path

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self.footer.size

    @property
    def kind(self) -> Kind:
        """Fixed, dynamic or differencing."""
        kind = self.footer.kind
        assert kind is not None
        return kind

    @property
    def uid(self) -> bytes:
        """The 16 bytes by which children know this file. They are compared as bytes: their order as text differs."""
        return self.footer.uid

    @property
    def parent_uid(self) -> bytes:
        """The id of the parent; zeros without one."""
        return self.header.parent_uid if self.header and self.kind is Kind.DIFFERENCING else NO_ID

    @property
    def block_size(self) -> int:
        """Bytes of a block; 0 for fixed disks."""
        return self._block

    @property
    def end(self) -> int:
        """Where the footer at the end stands."""
        return self._end

    @property
    def table(self) -> Table:
        """Where the blocks are; empty for fixed disks. Not to be changed by others."""
        return self._table

    # --- reading ---

    def extents(self, offset: int = 0, length: int | None = None) -> Iterator[Extent]:
        """What this file holds of the range, ascending and without gaps; unaligned ranges are fine."""
        end = self.size if length is None else offset + length
        if not self._block:
            if offset < end:
                yield Extent(offset, end - offset, offset)
            return
        size, last = self._block, -(-end // self._block)
        while offset < end:
            block = offset // size
            if self._table[block] == UNUSED:
                stop = min(self._table.next_allocated(block, last) * size, end)
                yield Extent(offset, stop - offset, ABSENT)
            else:
                stop = min((block + 1) * size, end)
                yield from self._block_extents(block, offset, stop)
            offset = stop

    def _block_extents(self, block: int, offset: int, end: int) -> Iterator[Extent]:
        start = block * self._block
        place = self._table[block] * SECTOR + self._bitmap
        first, stop = (offset - start) // SECTOR, -(-(end - start) // SECTOR)
        for low, high, is_set in bits.runs(self.bitmap(block), first, stop - first):
            begin = max(start + low * SECTOR, offset)
            length = min(start + high * SECTOR, end) - begin
            yield Extent(begin, length, place + begin - start if is_set else ABSENT)

    def stretches(self, offset: int = 0, length: int | None = None) -> Iterator[Stretch]:
        """What this file holds: ``data`` where it does."""
        for extent in self.extents(offset, length):
            yield Stretch(extent.offset, extent.length, extent.is_held)

    def places(self, offset: int = 0, length: int | None = None) -> Iterator[Place]:
        """Where this file holds the bytes of the range."""
        for extent in self.extents(offset, length):
            yield Place(extent.offset, extent.length, self.file if extent.is_held else None, extent.position)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """The bytes that this file holds, zeros elsewhere."""
        for extent in self.extents(offset, len(buffer)):
            piece = buffer[extent.offset - offset :][: extent.length]
            if extent.is_held:
                self.file.read_into(extent.position, piece)
            else:
                clear(piece)

    def bitmap(self, block: int) -> bytearray:
        """The bitmap of a block that the file holds. Not to be changed by others."""
        found = self._bitmaps.get(block)
        if found is None:
            found = self._bitmaps[block] = bytearray(self._bitmap)
            self.file.read_into(self._table[block] * SECTOR, memoryview(found))
            self._forget()
        else:
            self._bitmaps.move_to_end(block)
        return found

    def _forget(self) -> None:
        """Keeps the bitmaps that were used last, and all that still have to be written."""
        while len(self._bitmaps) > self._room and (oldest := next(iter(self._bitmaps))) not in self._dirty:
            del self._bitmaps[oldest]

    # --- writing ---

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """The bytes at that place of the disk; lasting after ``flush``.

        A differencing disk takes whole sectors only: the rest of a sector would be the parent's (``Chain.write`` knows it).
        NoSpace leaves a valid image.
        """
        view = memoryview(data).cast("B")
        if not self.writable:
            raise errors.UsageError(f"{self.path} was opened for reading only")
        if offset < 0 or offset + len(view) > self.size:
            raise errors.UsageError(f"{self.path} has {self.size} bytes; nothing can be written behind them")
        if not self._block:
            self.file.write(offset, view)
            return
        if offset % SECTOR or len(view) % SECTOR:
            if self.kind is Kind.DIFFERENCING:
                raise errors.UsageError("a differencing disk takes whole sectors")
            offset, view = whole_sectors(self, offset, view)
        self.put(offset, view)

    def put(self, offset: int, view: memoryview) -> None:
        """Whole sectors into blocks; for ``write``, and behind the disk's end for who is about to move it."""
        while view:
            block, start = divmod(offset, self._block)
            count = min(len(view), self._block - start)
            self.file.write(self._place(block) + start, view[:count])
            self._mark(block, start, count)
            offset, view = offset + count, view[count:]

    def copy_from(self, other: File, position: int, offset: int, length: int) -> None:
        """As ``write``, with whole sectors that stand in another file, moved by the kernel."""
        if not self._block:
            self.file.copy_from(other, position, offset, length)
            return
        while length:
            block, start = divmod(offset, self._block)
            count = min(length, self._block - start)
            place = self._place(block) + start
            self.file.copy_from(other, position, place, count)
            self._mark(block, start, count)
            position, offset, length = position + count, offset + count, length - count

    def _place(self, block: int) -> int:
        """Where the data of a block stands; it gets a place if it has none."""
        if self._table[block] == UNUSED:
            self._allocate(block)
        return self._table[block] * SECTOR + self._bitmap

    def _mark(self, block: int, start: int, length: int) -> None:
        bitmap = self.bitmap(block)
        first, count = start // SECTOR, length // SECTOR
        if not bits.are_set(bitmap, first, count):
            bits.put(bitmap, first, count, value=True)
            self._dirty.add(block)
            if len(self._dirty) * self._bitmap > _BITMAPS:
                self.flush()

    def _allocate(self, block: int) -> None:
        """A place for a block: where the footer stands, so that no old bytes lie below its clear bits."""
        place = format.round_up(self._free + self._bitmap, format.ALIGNMENT) - self._bitmap
        end = place + self._bitmap + self._block
        if end // SECTOR >= UNUSED:
            raise errors.NoSpace(f"{self.path} cannot become larger than 2 TiB", hint="compact it")
        if end > self._end:
            ahead = min(self._reserve - 1, _AHEAD // self._block)
            stride = format.round_up(self._bitmap + self._block, format.ALIGNMENT)
            self._write_footer(self.footer, end + ahead * stride)
            self._reserve *= 2
        self._table[block] = place // SECTOR
        self._free = end
        self._bitmaps[block] = bytearray(self._bitmap)
        self._dirty.add(block)
        self._fresh.add(block)

    def _write_footer(self, footer: Footer, end: int) -> None:
        try:
            self.file.write(end, footer.pack())
        except errors.NoSpace:
            self.file.set_length(self._end + format.FOOTER_SIZE)
            raise
        self.file.sync()
        self.footer, self._end = footer, end

    def flush(self) -> None:
        """All that was written is on the disk, and a reader of the file finds it."""
        self.file.sync()
        if self._dirty:
            for block in sorted(self._dirty, key=self._table.__getitem__):
                self.file.write(self._table[block] * SECTOR, self._bitmaps[block])
            self.file.sync()
            self._dirty.clear()
        if self._fresh:
            self._write_entries(sorted(self._fresh))
            self.file.sync()
            self._fresh.clear()
        self._forget()

    def _write_entries(self, blocks: list[int]) -> None:
        assert self.header is not None
        unit = SECTOR // 4
        for group in sorted({block // unit for block in blocks}):
            first = group * unit
            entries = self._table.pack(first, min(first + unit, len(self._table)))
            self.file.write(self.header.table_offset + 4 * first, entries)

    def close(self) -> None:
        """Everything is written, space that was taken ahead is given back, and the file is closed."""
        if self.file.descriptor < 0:
            return
        try:
            if self.writable:
                self.flush()
                self._give_back()
        finally:
            self.file.close()

    def _give_back(self) -> None:
        end = format.round_up(self._free, SECTOR)
        if self._block and end + SECTOR <= self._end:
            self._write_footer(self.footer, end)
            self.file.set_length(end + format.FOOTER_SIZE)

    # --- what the file says of itself ---

    def change_footer(self, *, end: int | None = None, **values: object) -> None:
        """Fields of both footers; the one at the end first, so that it is the newer one when they differ.

        ``end``: where that one is to stand from now on.
        """
        footer = replace(self.footer, **values)  # type: ignore[arg-type]
        self._write_footer(footer, self._end if end is None else end)
        if self._block:
            self.file.write(0, footer.pack())
            self.file.sync()

    def change_header(self, **values: object) -> None:
        """Fields of the header.

        It takes two sectors, of which a power failure may leave one old and one new. So a change of both is written
        elsewhere first, and the footers lead there until it stands at its own place.
        """
        assert self.header is not None
        old, place = self.header.pack(), self.footer.data_offset
        self.header = replace(self.header, **values)  # type: ignore[arg-type]
        data = self.header.pack()
        if data[SECTOR:] == old[SECTOR:]:
            self.file.write(place, data[:SECTOR])
        else:
            aside = self.take_space(len(data))
            self.file.write(aside, data)
            self.file.sync()
            self.change_footer(data_offset=aside)
            self.file.write(place, data)
            self.file.sync()
            self.change_footer(data_offset=place)
        self.file.sync()

    def take_space(self, length: int) -> int:
        """Where ``length`` new bytes of the file are free, in whole sectors. What stands there has no meaning."""
        place = self._free
        self.reach(place + format.round_up(length, SECTOR))
        self.taken.append(place)
        return place

    def reach(self, end: int) -> None:
        """The file's data may stand up to there, and new blocks stand behind it."""
        if end > self._end:
            self._write_footer(self.footer, end)
        self._free = max(self._free, end)

    def unset(self, block: int, first: int, count: int) -> None:
        """Sectors of a block are no longer held."""
        bits.put(self.bitmap(block), first, count, value=False)
        self._dirty.add(block)

    def resize_table(self, count: int) -> None:
        """So many blocks, in memory; for who is about to write the table."""
        for block in [one for one in self._bitmaps if one >= count]:
            del self._bitmaps[block]
        self._table.resize(count)


def whole_sectors(source: Source, offset: int, view: memoryview) -> tuple[int, memoryview]:
    """The same bytes with the rest of their first and last sector around them."""
    if not view or not (offset % SECTOR or len(view) % SECTOR):
        return offset, view
    start, end = offset // SECTOR * SECTOR, format.round_up(offset + len(view), SECTOR)
    whole = memoryview(bytearray(end - start))
    source.read_into(start, whole[:SECTOR])
    if end - start > SECTOR:
        source.read_into(end - SECTOR, whole[-SECTOR:])
    whole[offset - start : offset - start + len(view)] = view
    return start, whole
