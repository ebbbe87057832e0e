"""Sets of bytes of a disk, as ranges: where something differs, lies, or was asked for."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator

Range = tuple[int, int]  # (start, end)

_END = 1 << 63


class Ranges:
    """Ranges in ascending order that neither overlap nor touch."""

    __slots__ = ("_ends", "_starts")

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        for start, end in sorted(ranges):
            if start >= end:
                continue
            if self._ends and start <= self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], end)
            else:
                self._starts.append(start)
                self._ends.append(end)

    @classmethod
    def everything(cls) -> Ranges:
        """All bytes that any disk can have."""
        return cls([(0, _END)])

    def __iter__(self) -> Iterator[Range]:
        return iter(zip(self._starts, self._ends, strict=True))

    def __len__(self) -> int:
        return len(self._starts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ranges) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # compared, never a key

    def __repr__(self) -> str:
        return f"Ranges({list(self)})"

    @property
    def size(self) -> int:
        """How many bytes."""
        return sum(self._ends) - sum(self._starts)

    def touch(self, start: int, end: int) -> bool:
        """Whether any of these bytes is one of them."""
        at = bisect.bisect_right(self._ends, start)
        return at < len(self._starts) and self._starts[at] < end and start < end

    def touch_any(self, ranges: Iterable[Range]) -> bool:
        """Whether any byte of any of them is."""
        return any(self.touch(start, end) for start, end in ranges)

    def within(self, start: int, end: int) -> Iterator[Range]:
        """What of a range belongs to them."""
        at = bisect.bisect_right(self._ends, start)
        while at < len(self._starts) and self._starts[at] < end:
            yield max(start, self._starts[at]), min(end, self._ends[at])
            at += 1

    def moved(self, start: int, end: int, to: int) -> Iterator[Range]:
        """What of a range belongs to them, told from another place: ``start`` becomes ``to``."""
        return ((first - start + to, last - start + to) for first, last in self.within(start, end))

    def joined(self, *others: Iterable[Range]) -> Ranges:
        """These and others together."""
        return Ranges([*self, *(one for other in others for one in other)])

    def blocks(self, size: int) -> Iterator[Range]:
        """The numbers of the blocks of a size that they touch, as ranges (first, behind the last)."""
        return iter(Ranges((start // size, -(-end // size)) for start, end in self))
