"""Where two points of one disk differ, from their chains alone: neither a bitmap nor a look at the data is needed.

What both stand on is the same for both. They can differ only where one of the images that just one of them stands on
says something, be it zeros; and behind the end of the older point, where nothing of what both stand on shows.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence

from hvmgr.host.qemu_img import Extent

Range = tuple[int, int]  # offset and length


def between(
    mine: Sequence[Extent], own: int, theirs: Sequence[Extent], their_own: int, *, size: int, their_size: int
) -> Iterator[Range]:
    """The ranges, ascending and joined, of a disk of ``size`` bytes.

    ``own`` and ``their_own`` are how many images from the top only this point stands on.
    """
    parts = [
        _said(mine, own),
        _said(theirs, their_own),
        _behind(mine, their_size),
    ]
    return joined(heapq.merge(*parts), size)


def joined(ranges: Iterable[Range], size: int) -> Iterator[Range]:
    """Ranges that ascend by their offsets, as few as they can be, within ``size``."""
    start = end = 0
    for offset, length in ranges:
        first, last = min(offset, size), min(offset + length, size)
        if first > end:
            if end > start:
                yield start, end - start
            start = first
        elif end == start:
            start = first
        end = max(end, last)
    if end > start:
        yield start, end - start


def _said(extents: Sequence[Extent], own: int) -> Iterator[Range]:
    return ((one.start, one.length) for one in extents if one.present and one.depth < own)


def _behind(extents: Sequence[Extent], end: int) -> Iterator[Range]:
    for one in extents:
        start = max(one.start, end)
        stop = one.start + one.length
        if start < stop and one.data and not one.zero:
            yield start, stop - start
