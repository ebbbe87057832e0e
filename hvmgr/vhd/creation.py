"""Makes new VHDs: empty ones, children, and whole disks copied from a ``Source``. Complete, or not there at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

from hvmgr import errors
from hvmgr.vhd import bits, format, layout
from hvmgr.vhd.file import File, created
from hvmgr.vhd.format import SECTOR, UNUSED, Kind
from hvmgr.vhd.image import open_image
from hvmgr.vhd.layout import Layout, Parentage
from hvmgr.vhd.source import Source, is_zero
from hvmgr.vhd.table import Table

OnProgress = Callable[[int, int], None]
_PIECE = 2 << 20
_GRAIN = 64 << 10  # zeros of this size become holes of the file


def create(
    path: Path | str,
    size: int | None = None,
    *,
    kind: Kind = Kind.DYNAMIC,
    block_size: int | None = None,
    parent: Path | str | None = None,
    windows_path: str | None = None,
    uid: bytes | None = None,
    time: datetime | None = None,
) -> None:
    """A new disk of zeros, or a new child of ``parent`` (which makes the kind differencing).

    Size and block size of a child are its parent's unless they are said. ``windows_path`` is what Windows calls the
    parent. Conflict when ``path`` exists; UsageError for sizes that a VHD cannot have.
    """
    path = Path(path)
    origin = None
    if parent is not None:
        kind = Kind.DIFFERENCING
        with open_image(parent) as found:
            size = found.size if size is None else size
            if found.block_size >= format.MIN_BLOCK:
                block_size = block_size or found.block_size
        origin = describe_parent(path, Path(parent), windows_path=windows_path)
    if size is None:
        raise errors.UsageError("a new disk needs a size")
    plan = layout.design(size, kind, block_size=block_size or format.DEFAULT_BLOCK, parent=origin, uid=uid, time=time)
    with created(path) as file:
        Writer(file, plan).finish()


def describe_parent(child: Path, parent: Path, *, windows_path: str | None = None) -> Parentage:
    """What a file at ``child`` has to say of the VHD at ``parent``. Corrupt when that is none."""
    if not _is_unicode(parent.name) or not _is_unicode(os.path.relpath(parent, child.parent)):
        raise errors.Unsupported(
            f"a VHD cannot name a parent whose name is not UTF-8: {parent}", hint="rename the parent, or its folder"
        )
    with open_image(parent) as image:
        if image.uid == format.NO_ID:
            raise errors.Corrupt(f"{parent} has no id, so no child can know it", hint="convert it: a new file has one")
        changed = int(image.file.changed() - format.EPOCH.timestamp())
        time = min(max(0, changed), 0xFFFFFFFF)
        return layout.parentage(child, parent, image.uid, absolute=windows_path, time=time)


def _is_unicode(name: str) -> bool:
    return not any("\ud800" <= one <= "\udfff" for one in name)


def write_image(
    path: Path | str,
    source: Source,
    *,
    kind: Kind = Kind.DYNAMIC,
    block_size: int = format.DEFAULT_BLOCK,
    parent: Parentage | None = None,
    uid: bytes | None = None,
    time: datetime | None = None,
    on_progress: OnProgress | None = None,
) -> None:
    """A new disk with the bytes of ``source``; zeros take no space.

    With ``parent`` it is a child, and holds exactly the stretches of data of the source, be they zeros or not.
    """
    plan = layout.design(source.size, kind, block_size=block_size, parent=parent, uid=uid, time=time)
    with created(Path(path)) as file:
        Writer(file, plan).copy(source, on_progress).finish()


class Writer:
    """Fills a new file, which nobody sees before it is complete: so nothing is synced on the way."""

    def __init__(self, file: File, plan: Layout) -> None:
        self._file, self._plan = file, plan
        header, footer = plan.header, plan.footer
        self._table = Table.empty(header.entries if header else 0)
        self._block_size = header.block_size if header else footer.size
        self._keeps_zeros = footer.kind is Kind.DIFFERENCING
        self._end = plan.start if header else footer.size
        self._block = -1
        self._bitmap = bytearray()

    def copy(self, source: Source, on_progress: OnProgress | None) -> Writer:
        """All data of the source; of a fixed disk and of a dynamic one only what is not zeros."""
        buffer = memoryview(bytearray(min(_PIECE, self._block_size)))
        for offset, length in _pieces(source, self._block_size):
            piece = buffer[:length]
            source.read_into(offset, piece)
            self._put(offset, piece)
            if on_progress is not None:
                on_progress(offset + length, source.size)
        self._end_block()
        return self

    def _put(self, offset: int, piece: memoryview) -> None:
        if not self._keeps_zeros and is_zero(piece):
            return
        if self._plan.header is None:
            write_sparse(self._file, offset, piece)
            return
        block, start = divmod(offset, self._block_size)
        if block != self._block:
            self._end_block()
            self._begin_block(block)
        write_sparse(self._file, self._table[block] * SECTOR + len(self._bitmap) + start, piece)
        if self._keeps_zeros:
            low, high = start // SECTOR, -(-(start + len(piece)) // SECTOR)
            bits.put(self._bitmap, low, high - low, value=True)

    def _begin_block(self, block: int) -> None:
        place = self._plan.place(self._end)
        self._end = place + self._plan.bitmap_size + self._block_size
        if self._end // SECTOR >= UNUSED:
            raise errors.NoSpace(f"{self._file.path} cannot become larger than 2 TiB", hint="write a fixed disk")
        self._table[block] = place // SECTOR
        self._block, self._bitmap = block, bytearray(self._plan.bitmap_size)
        if not self._keeps_zeros:  # every reader agrees about a block that is there as a whole
            inside = min(self._block_size, self._plan.footer.size - block * self._block_size)
            bits.put(self._bitmap, 0, inside // SECTOR, value=True)

    def _end_block(self) -> None:
        if self._block >= 0:
            self._file.write(self._table[self._block] * SECTOR, self._bitmap)
            self._block = -1

    def finish(self) -> None:
        """Everything but the blocks."""
        for offset, data in self._plan.front():
            self._file.write(offset, data)
        if (header := self._plan.header) is not None:
            entries = self._table.pack()
            self._file.write(header.table_offset, entries.ljust(format.table_size(len(self._table)), b"\xff"))
        self._file.write(format.round_up(self._end, SECTOR), self._plan.footer.pack())


def write_raw(path: Path | str, source: Source, *, on_progress: OnProgress | None = None) -> None:
    """A new raw file with the bytes of ``source``; zeros are holes. Conflict when ``path`` exists."""
    with created(Path(path)) as file:
        file.set_length(source.size)
        buffer = memoryview(bytearray(_PIECE))
        for offset, length in _pieces(source, _PIECE):
            piece = buffer[: min(length, source.size - offset)]
            source.read_into(offset, piece)
            write_sparse(file, offset, piece)
            if on_progress is not None:
                on_progress(offset + len(piece), source.size)


def write_sparse(file: File, position: int, piece: memoryview) -> None:
    """All but the zeros, which are holes of a new file already."""
    run = 0
    for at in range(0, len(piece), _GRAIN):
        if is_zero(piece[at : at + _GRAIN]):
            file.write(position + run, piece[run:at])
            run = at + _GRAIN
    file.write(position + run, piece[run:])


def _pieces(source: Source, block_size: int) -> Iterator[tuple[int, int]]:
    """The data of a source in whole sectors, in pieces that do not cross a block's border."""
    for stretch in source.stretches():
        if not stretch.data:
            continue
        offset = stretch.offset // SECTOR * SECTOR
        end = format.round_up(stretch.offset + stretch.length, SECTOR)
        while offset < end:
            length = min(end - offset, _PIECE, block_size - offset % block_size)
            yield offset, length
            offset += length
