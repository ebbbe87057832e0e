"""Gives a VHD another size. At each moment the file is valid, and has the old size or the new one."""

from __future__ import annotations

from collections.abc import Iterable

from hvmgr.vhd import format
from hvmgr.vhd.format import SECTOR, UNUSED
from hvmgr.vhd.image import Image
from hvmgr.vhd.table import within

_ZEROS = memoryview(bytes(1 << 20))


def set_size(image: Image, size: int, hidden: Iterable[tuple[int, int]] = ()) -> None:
    """What the disk grows by is zeros, what it shrinks by is lost.

    ``hidden``: ranges behind the old end where the parents have data, which would come to light: they are written as
    zeros before the size changes.
    """
    image.flush()
    if size == image.size:
        return
    if not image.block_size:
        _set_fixed_size(image, size)
    elif size > image.size:
        _prepare_growth(image, size)
        for offset, length in hidden:
            for at in range(0, length, len(_ZEROS)):
                image.put(offset + at, _ZEROS[: length - at])
        image.flush()
        _say_size(image, size)
    else:
        _say_size(image, size)
        _drop_behind(image, size)


def _say_size(image: Image, size: int, *, end: int | None = None) -> None:
    """The creator changes with it: of some creators QEMU believes the geometry and not the size."""
    image.change_footer(
        end=end,
        size=size,
        geometry=format.geometry(size),
        creator=format.CREATOR,
        creator_version=format.CREATOR_VERSION,
        creator_host=format.CREATOR_HOST,
    )


def _set_fixed_size(image: Image, size: int) -> None:
    old = image.size
    _say_size(image, size, end=size)
    if size > old:
        image.file.write(old, bytes(min(format.FOOTER_SIZE, size - old)))  # the old footer is part of the disk now
    else:
        image.file.set_length(size + format.FOOTER_SIZE)
    image.file.sync()


def _prepare_growth(image: Image, size: int) -> None:
    """The table has place for the new size, and nothing old lies behind the old end."""
    assert image.header is not None
    old, needed = len(image.table), format.block_count(size, image.block_size)
    _clear_tail(image, old - 1)
    image.resize_table(needed)
    place, length = image.header.table_offset, format.table_size(needed)
    if place + length <= _table_limit(image):
        image.file.write(place + 4 * old, image.table.pack(old))
    else:
        place = image.take_space(length)
        image.file.write(place, image.table.pack().ljust(length, b"\xff"))
    image.file.sync()
    if place != image.header.table_offset or needed > image.header.entries:
        image.change_header(table_offset=place, entries=needed)


def _table_limit(image: Image) -> int:
    """Where the table would meet something else if it grew at its place."""
    assert image.header is not None
    place = image.header.table_offset
    areas = [area.start for area in image.structure.areas] + image.taken
    blocks = [sector * SECTOR for sector in within(image.table.places(), 1, place, image.end)]
    return min([image.end, *(start for start in areas if start > place), *blocks])


def _clear_tail(image: Image, block: int) -> None:
    """In the last block the bytes behind the disk's end are made zeros, and its bits cleared."""
    size = image.block_size
    tail = image.size - block * size
    if image.table[block] == UNUSED or tail == size:
        return
    place = image.table[block] * SECTOR + format.bitmap_size(size)
    image.reach(place + size)  # some writers cut the last block where the disk ends
    for at in range(tail, size, len(_ZEROS)):
        image.file.write(place + at, _ZEROS[: size - at])
    image.unset(block, tail // SECTOR, (size - tail) // SECTOR)
    image.flush()


def _drop_behind(image: Image, size: int) -> None:
    assert image.header is not None
    keep, old = format.block_count(size, image.block_size), len(image.table)
    image.resize_table(keep)
    image.file.write(image.header.table_offset + 4 * keep, b"\xff" * (4 * (old - keep)))
    image.file.sync()
    _clear_tail(image, keep - 1)
