"""Whether two contents of one file are the same: nothing is read of what comes from the same bytes that nobody changed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from hvmgr.model.ranges import Range, Ranges

if TYPE_CHECKING:
    from hvmgr.storage.filesystems.reader import Content, Segment

_PIECE = 1 << 20


def are_same(old: Content, new: Content, touched: Ranges) -> bool:
    """Whether every byte is; ``touched`` are the bytes of the volume that may have changed in between."""
    if old.size != new.size:
        return False
    unknown = Ranges(uncertain(old.segments(), new.segments(), touched))  # neighbours as one: each costs a search
    return all(_same_bytes(old, new, *one) for one in unknown)


def is_untouched(content: Content, touched: Ranges) -> bool:
    """Whether nothing that it comes from may have changed."""
    return not any(touched.touch_any(one.lies()) for one in content.segments())


def uncertain(old: Sequence[Segment], new: Sequence[Segment], touched: Ranges) -> Iterator[Range]:
    """The ranges of the content that have to be read to know."""
    for start, end, one, other in _side_by_side(old, new):
        if one is None and other is None:
            continue
        if one is None or other is None or (one.shift, one.how, one.places) != (other.shift, other.how, other.places):
            yield start, end
        elif one.how is None:
            yield from touched.moved(start + one.shift, end + one.shift, start)
        elif touched.touch_any(one.places):
            yield start, end


def _side_by_side(
    old: Sequence[Segment], new: Sequence[Segment]
) -> Iterator[tuple[int, int, Segment | None, Segment | None]]:
    """Both from the beginning to the end, cut where either begins or ends; None where one has a hole."""
    edges = sorted({edge for one in itertools.chain(old, new) for edge in (one.start, one.end)})
    first, second = iter(old), iter(new)
    one, other = next(first, None), next(second, None)
    for start, end in itertools.pairwise(edges):
        while one is not None and one.end <= start:
            one = next(first, None)
        while other is not None and other.end <= start:
            other = next(second, None)
        yield start, end, _at(one, start), _at(other, start)


def _at(one: Segment | None, start: int) -> Segment | None:
    return one if one is not None and one.start <= start else None


def _same_bytes(old: Content, new: Content, start: int, end: int) -> bool:
    pairs = zip(_blocks(old, start, end), _blocks(new, start, end), strict=True)
    return all(one == other for one, other in pairs)


def _blocks(content: Content, start: int, end: int) -> Iterator[bytearray]:
    """The bytes of a range, zeros included, in blocks of one size."""
    at, block = start, bytearray(min(_PIECE, end - start))
    for offset, piece in content.pieces(start, end):
        first, last = max(offset, start), min(offset + len(piece), end)
        while first < last:
            while first >= at + len(block):
                yield block
                at += len(block)
                block = bytearray(min(_PIECE, end - at))
            stop = min(last, at + len(block))
            block[first - at : stop - at] = piece[first - offset : stop - offset]
            first = stop
    while at < end:
        yield block
        at += len(block)
        block = bytearray(min(_PIECE, end - at))
