"""The block allocation table: for each block of the disk the sector where it begins in the file.

A disk of 2040 GiB has a million entries and more. They are kept in an array, and looked through by single calls over all
of them; a loop in Python is for blocks that are there.
"""

from __future__ import annotations

import re
import sys
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import islice
from operator import le, sub

from hvmgr.vhd.format import SECTOR, UNUSED

_UNUSED_RUN = re.compile(rb"\xff*")
_PART = 1 << 19  # numbers that are sorted at once
_SWAPPED = sys.byteorder == "little"


class Table:
    """Entries by block number; ``UNUSED`` where the file does not hold the block."""

    def __init__(self, entries: array[int]) -> None:
        self._entries = entries

    @classmethod
    def unpack(cls, data: bytes | bytearray) -> Table:
        """A table as it stands in a file."""
        entries = array("I", data)
        if _SWAPPED:
            entries.byteswap()
        return cls(entries)

    @classmethod
    def empty(cls, count: int) -> Table:
        """A table of so many blocks that are not there."""
        return cls(array("I", b"\xff" * (4 * count)))

    def pack(self, first: int = 0, end: int | None = None) -> bytes:
        """The entries from ``first`` up to ``end`` as they stand in a file."""
        entries = self._entries[first:end]
        if _SWAPPED:
            entries.byteswap()
        return entries.tobytes()

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, block: int) -> int:
        return self._entries[block]

    def __setitem__(self, block: int, sector: int) -> None:
        self._entries[block] = sector

    def resize(self, count: int) -> None:
        """So many entries; new ones are unused."""
        missing = count - len(self._entries)
        if missing > 0:
            self._entries.frombytes(b"\xff" * (4 * missing))
        else:
            del self._entries[count:]

    def next_allocated(self, block: int, end: int) -> int:
        """The first block from ``block`` on that the file holds; ``end`` when there is none before it."""
        if block >= end or self._entries[block] != UNUSED:
            return min(block, end)
        match = _UNUSED_RUN.match(memoryview(self._entries).cast("B"), 4 * block, 4 * end)
        return match.end() // 4 if match else end

    def allocated(self, first: int = 0, end: int | None = None) -> Iterator[int]:
        """The numbers of the blocks that the file holds, ascending."""
        stop = len(self._entries) if end is None else end
        block = self.next_allocated(first, stop)
        while block < stop:
            yield block
            block = self.next_allocated(block + 1, stop)

    def count(self) -> int:
        """How many blocks the file holds."""
        return len(self._entries) - self._entries.count(UNUSED)

    def block_at(self, sector: int, start: int = 0) -> int:
        """The block that begins at this sector."""
        return self._entries.index(sector, start)

    def _runs(self) -> Iterator[array[int]]:
        """The entries that are used, run by run."""
        entries, count, end = self._entries, len(self._entries), 0
        while (start := self.next_allocated(end, count)) < count:
            try:
                end = entries.index(UNUSED, start)
            except ValueError:
                end = count
            yield entries[start:end]

    def places(self) -> array[int]:
        """The sectors at which blocks begin, ascending; as many as the file holds."""
        found = array("I")
        for run in self._runs():
            found.extend(run)
        return found if _ascend(found) else _sorted(found)

    def by_place(self) -> array[int]:
        """The numbers of the blocks that the file holds, in the order in which they stand there."""
        found, places, start = array("I"), array("I"), 0
        for run in self._runs():
            start = self.next_allocated(start, len(self._entries))
            found.extend(array("I", range(start, start + len(run))))
            places.extend(run)
            start += len(run)
        return found if _ascend(places) else array("I", sorted(found, key=self._entries.__getitem__))


def _ascend(places: array[int]) -> bool:
    """Whether they need no sorting, which is the rule: then a million of them takes no list."""
    return all(map(le, places, islice(places, 1, None)))


def _sorted(places: array[int]) -> array[int]:
    """In parts, because a list of numbers takes ten times the memory of an array."""
    low, high, found = min(places), max(places), array("I")
    step = (high - low) // (len(places) // _PART + 1) + 1
    for start in range(low, high + 1, step):
        found.extend(sorted(filter(range(start, start + step).__contains__, places)))
    return found


def overlaps(places: Sequence[int], stride: int) -> list[tuple[int, int]]:
    """Pairs of neighbours that are closer than ``stride`` sectors; the first few."""
    if len(places) < 2 or min(map(sub, islice(places, 1, None), places)) >= stride:
        return []
    pairs = ((one, other) for one, other in zip(places, islice(places, 1, None), strict=False) if other - one < stride)
    return list(islice(pairs, 16))


def within(places: Sequence[int], stride: int, start: int, end: int) -> Sequence[int]:
    """The blocks of ``stride`` sectors that reach into the bytes from ``start`` to ``end``; the first few."""
    low = bisect_left(places, start // SECTOR - stride + 1)
    high = bisect_left(places, -(-end // SECTOR))
    return places[low : min(high, low + 16)]
