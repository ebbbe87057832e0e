"""A VHD that arrives as a stream: read once, front to back, with neither its length nor a way back needed.

All that real writers produce is read as long as its parts come in a forward order: footer, header, block table, blocks in
any order of their numbers. Where a part lies before what was read already, the stream is spooled into a file first.

The stream is complete when its closing footer has arrived, whatever a transport says of its length. One that ends before,
or goes on behind it, is Corrupt, and whoever wrote its data somewhere has to undo that.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Self, cast

from hvmgr import errors
from hvmgr.vhd import bits, format, structure
from hvmgr.vhd.file import File
from hvmgr.vhd.format import FOOTER_SIZE, HEADER_SIZE, SECTOR, Footer, Header, Kind
from hvmgr.vhd.inlet import Inlet, Readable, Rewound
from hvmgr.vhd.structure import Structure
from hvmgr.vhd.table import Table

_PIECE = 2 << 20
_MAX_FRONT = 16 << 20  # what may stand before the table: locators and padding; more are blocks
_MAX_PADDING = 64 << 20  # zeros before the closing footer
_FAR = 1 << 62  # an end that no part reaches
_ZEROS = bytes(SECTOR)


class StreamReader:
    """Footer and header at once, then the data by iterating: offset on the disk and bytes, valid until the next ones.

    ``length`` (bytes of the whole stream) is needed for fixed disks only. ``spool`` is a folder for streams that cannot
    be read forward; without one they are Unsupported. ``to_end=False`` is for transports that stay open: what follows the
    closing footer is then not looked at. Offsets ascend with the place in the stream, which need not be that on the disk.
    """

    kind: Kind
    size: int
    footer: Footer | None = None  # of a fixed disk only known at the end
    header: Header | None = None

    def __init__(
        self,
        file: Readable,
        *,
        length: int | None = None,
        spool: Path | None = None,
        to_end: bool = True,
        name: str = "the stream",
    ) -> None:
        self._inlet = Inlet(file, name)
        self._name = name
        self._length = length
        self._spool = spool
        self._to_end = to_end
        self._blocks = array("I")
        self._stack = contextlib.ExitStack()
        self._closed = False  # the closing footer was seen
        self._begin()

    def __iter__(self) -> Iterator[tuple[int, memoryview]]:
        """Raises when the stream turns out to be damaged, at its very end at the latest."""
        with self:
            if self.kind is Kind.FIXED:
                yield from self._fixed()
            else:
                yield from self._sparse()
                self._require_closing()
            if self._to_end and not self._inlet.is_at_end():
                raise self._inlet.fault("F53", self._inlet.at, what="more bytes follow it")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """What was spooled is gone; the stream's own file is left to who opened it. Iterating to the end does this too."""
        self._stack.close()

    # --- the front ---

    def _begin(self) -> None:
        first = self._first_sector()
        footer = Footer.unpack(first)
        if footer.cookie != format.FOOTER_COOKIE or footer.kind is Kind.FIXED:
            self._begin_fixed(first)
            return
        if not format.has_right_sum(first, format.FOOTER_SUM_AT):
            raise self._inlet.fault("F6", 0, what="the first footer")
        if footer.kind is None:
            raise self._inlet.fault("F10", 60, type=footer.type)
        self.kind, self.size, self.footer = footer.kind, footer.size, footer
        at = footer.data_offset
        if at % SECTOR or not FOOTER_SIZE <= at <= _MAX_FRONT:
            raise self._inlet.fault("F13", 16, where=at, what="no header is there")
        self._inlet.total = at + HEADER_SIZE + FOOTER_SIZE
        front = first + self._inlet.take(at + HEADER_SIZE - self._inlet.at)
        self.header = self._read_header(front, at)
        if not self._inlet.at <= self.header.table_offset <= _MAX_FRONT:
            self._go_back(front, "block table")
            return
        needed = format.block_count(self.size, self.header.block_size)
        end = self.header.table_offset + format.table_size(self.header.entries)
        self._inlet.total = end + FOOTER_SIZE
        front += self._inlet.take(end - self._inlet.at)
        table = Table.unpack(bytes(memoryview(front)[self.header.table_offset :][: 4 * needed]))
        if footer.creator == b"tap\0" and end // SECTOR not in table.places():
            front += self._batmap_header(first)
        self._judge(structure.read(cast("File", _Front(self._name, front))))
        if self._blocks and self._table[self._blocks[0]] * SECTOR < self._inlet.at:
            self._go_back(front, f"block {self._blocks[0]}")

    def _first_sector(self) -> bytes:
        try:
            return self._inlet.take(FOOTER_SIZE)
        except errors.Corrupt as error:
            if self._inlet.at == self._length:  # all of it is there
                raise self._no_vhd() from error
            raise

    def _read_header(self, front: bytes, at: int) -> Header:
        """As far as everything else hangs on it."""
        header, fault = Header.unpack(front[at:]), self._inlet.fault
        if header.cookie != format.HEADER_COOKIE:
            raise fault("F21", at)
        if not format.has_right_sum(front[at:], format.HEADER_SUM_AT):
            raise fault("F22", at)
        if self.size == 0 or self.size % SECTOR or self.size > format.MAX_SIZE:
            raise fault("F14", 48, size=self.size, what="a multiple of 512 up to 2040 GiB is possible")
        if header.block_size < SECTOR or header.block_size & (header.block_size - 1):
            raise fault("F26", at + 32, size=header.block_size, what="it must be 512 times a power of two")
        needed = format.block_count(self.size, header.block_size)
        if header.entries < needed:
            raise fault("F27", at + 28, entries=header.entries, needed=needed)
        if 4 * header.entries > structure.MAX_TABLE:
            raise fault(
                "F26", at + 32, size=header.block_size, what=f"that takes a table of {4 * header.entries} bytes"
            )
        if header.table_offset < FOOTER_SIZE or header.table_offset % SECTOR:
            raise fault("F25", at + 16, where=header.table_offset, what="no table is there")
        return header

    def _batmap_header(self, closing: bytes) -> bytes:
        """XenServer keeps a second map behind its table; without one, an empty disk ends there."""
        sector = self._inlet.take(SECTOR)
        self._closed = sector == closing
        return sector

    def _judge(self, found: Structure) -> None:
        """That everything fits together, and in which order the blocks come."""
        found.refuse()
        assert found.table is not None
        table = found.table
        self._table, self._data_end = table, found.data_end
        self._inlet.total = found.data_end + FOOTER_SIZE
        self._blocks = table.by_place()

    def _go_back(self, front: bytes, what: str) -> None:
        """The whole stream into a file without a name, which is gone when it is closed."""
        if self._spool is None:
            raise self._inlet.fault("F52", what=what)
        with contextlib.ExitStack() as stack:
            spooled = cast("BinaryIO", stack.enter_context(tempfile.TemporaryFile(dir=self._spool, buffering=0)))
            spooled.write(front)
            self._inlet.pour(spooled, self._length)
            file = File.adopt(Path(self._name), os.dup(spooled.fileno()))
            with contextlib.closing(file):
                self._judge(structure.read(file))
            self._inlet = Rewound(spooled, self._name)
            self._stack = stack.pop_all()
        self._closed, self._to_end = True, False  # that the file ends with its footer was just seen

    # --- the data ---

    def _sparse(self) -> Iterator[tuple[int, memoryview]]:
        assert self.header is not None
        block_size = self.header.block_size
        bitmap_size = format.bitmap_size(block_size)
        buffer = memoryview(bytearray(min(block_size, _PIECE)))
        for block in self._blocks:
            start = block * block_size
            self._inlet.skip_to(self._table[block] * SECTOR)
            bitmap = self._inlet.take(bitmap_size)
            for at in range(0, block_size, _PIECE):
                piece = buffer[: block_size - at]
                self._inlet.fill(piece)
                held = min(len(piece), self.size - start - at)
                for first, end, is_here in bits.runs(bitmap, at // SECTOR, max(0, held) // SECTOR):
                    if is_here:
                        yield start + first * SECTOR, piece[first * SECTOR - at : end * SECTOR - at]

    def _require_closing(self) -> None:
        """Zeros at most, and then the first footer once more."""
        assert self.footer is not None
        inlet, wanted = self._inlet, self.footer.pack()
        if self._closed:
            return
        inlet.skip_to(self._data_end)
        while (sector := inlet.take(SECTOR)) != wanted:
            at = inlet.at - SECTOR
            if sector != _ZEROS:
                raise inlet.fault("F53", at, what="neither zeros nor the first footer once more")
            if at > self._data_end + _MAX_PADDING:
                raise inlet.fault("F53", at, what="nothing but zeros")
            inlet.total = inlet.at + FOOTER_SIZE

    def _begin_fixed(self, first: bytes) -> None:
        if self._length is None:
            raise errors.Corrupt(
                f"{self._name} begins with no footer of a VHD",
                hint="state its format: raw or qcow2; a fixed VHD can be read when its length is known, as of a file",
            )
        self.kind, self.size = Kind.FIXED, self._length - FOOTER_SIZE
        closing = self._inlet.peek(self._length - FOOTER_SIZE, FOOTER_SIZE)
        if self.size <= 0 or self.size % SECTOR or not _is_footer(closing):
            raise self._no_vhd()
        self._first, self._inlet.total = first, self._length

    def _no_vhd(self) -> errors.Corrupt:
        return errors.Corrupt(
            f"{self._name} is no VHD: no footer of one is at its beginning or its end",
            hint="state its format: raw or qcow2",
        )

    def _fixed(self) -> Iterator[tuple[int, memoryview]]:
        buffer = memoryview(bytearray(min(self.size, _PIECE)))
        buffer[:SECTOR] = self._first
        self._inlet.fill(buffer[SECTOR:])
        yield 0, buffer
        while self._inlet.at < self.size:
            at = self._inlet.at
            piece = buffer[: self.size - at]
            self._inlet.fill(piece)
            yield at, piece
        closing = self._inlet.take(FOOTER_SIZE)
        if not _is_footer(closing):
            raise self._no_vhd()
        found = structure.read(cast("File", _Front(self._name, self._first, closing, self.size)))
        found.refuse()
        self.footer = found.footer


def _is_footer(sector: bytes | None) -> bool:
    """Whether it may be one; nobody can say of bytes that cannot be looked at yet."""
    return sector is None or sector.startswith(format.FOOTER_COOKIE)


class _Front:
    """The bytes that came so far as a file, which ends with the closing footer that has to come."""

    def __init__(self, name: str, front: bytes, closing: bytes | None = None, end: int = _FAR) -> None:
        self.path = Path(name)
        self._front = front
        self._closing = closing or front[:FOOTER_SIZE]
        self._end = end

    def length(self) -> int:
        return self._end + FOOTER_SIZE

    def read(self, offset: int, length: int) -> bytes:
        if offset >= self._end:
            return self._closing[offset - self._end :][:length]
        return self._front[offset : offset + length].ljust(length, b"\0")
