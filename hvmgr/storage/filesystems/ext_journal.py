"""The journal of ext3 and ext4, replayed into a layer above a disk that is only read.

Source: "Journal (jbd2)" of the kernel documentation, filesystems/ext4. As the kernel does it: find the last whole
transaction, collect what was revoked, then take each block from its newest place in the journal. Nothing is copied: the
layer leads to the journal's own blocks.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from hvmgr.model.ranges import Range
from hvmgr.storage.filesystems import ext_fast_commits, window
from hvmgr.storage.filesystems.ext_fast_commits import Changes
from hvmgr.storage.filesystems.reader import damaged
from hvmgr.storage.filesystems.window import Run
from hvmgr.storage.partitions import Disk

_MAGIC = 0xC03B3998
_HEADER = struct.Struct(">III")
_DESCRIPTOR, _COMMIT, _REVOKE = 1, 2, 5
_64BIT, _CSUM_V2, _CSUM_V3, _FAST_COMMIT = 0x2, 0x8, 0x10, 0x20
_KNOWN = 0x1 | _64BIT | 0x4 | _CSUM_V2 | _CSUM_V3 | _FAST_COMMIT
_LARGEST = 64 << 30
_ESCAPED, _SAME_UUID, _LAST = 1, 2, 8


class Redirected:
    """A disk some of whose blocks are read at other places of it: (where, whether its first 4 bytes were escaped)."""

    def __init__(self, disk: Disk, block: int, places: dict[int, tuple[int, bool]]) -> None:
        self._disk, self._block, self._places = disk, block, places
        self._order = sorted(places)
        self.size = disk.size

    def ranges(self) -> list[Range]:
        """The blocks that are read elsewhere."""
        return [(number * self._block, (number + 1) * self._block) for number in self._order]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """The bytes from ``offset`` on."""
        import bisect

        self._disk.read_into(offset, buffer)
        end = offset + len(buffer)
        first = bisect.bisect_left(self._order, offset // self._block)
        for number in self._order[first : bisect.bisect_left(self._order, -(-end // self._block))]:
            place, is_escaped = self._places[number]
            block = window.read(self._disk, place, self._block)
            if is_escaped:
                block = struct.pack(">I", _MAGIC) + block[4:]
            at = number * self._block
            start, stop = max(at, offset), min(at + self._block, end)
            buffer[start - offset : stop - offset] = block[start - at : stop - at]


@dataclass(frozen=True, slots=True)
class Replayed:
    """The disk as it is after a replay, None when there was nothing to replay; and what fast commits say that came after it."""

    disk: Redirected | None
    fast: Changes = field(default_factory=Changes)


def replayed(disk: Disk, runs: Sequence[Run], size: int, block: int) -> Replayed:
    """The disk with the journal that lies in ``runs`` replayed over it."""
    journal = _Journal(disk, runs, size, block)
    if not journal.start:
        return Replayed(None)
    places = journal.replay()
    fast = ext_fast_commits.parsed(journal.fast_blocks(), journal.next_sequence)
    return Replayed(Redirected(disk, block, places) if places else None, fast)


class _Journal:
    def __init__(self, disk: Disk, runs: Sequence[Run], size: int, block: int) -> None:
        self._disk, self._block = disk, block
        if size > _LARGEST or len(runs) > size // block:
            raise damaged("its journal makes no sense")
        self._places: list[int] = []  # of each block of the journal, on the disk
        for length, start in runs:
            if start is None:
                raise damaged("its journal has a hole")
            self._places += range(start, start + length, block)
        about = self._read(0)
        magic, _, _, own_block, length, self._first, self._sequence, self.start = struct.unpack_from(">8I", about)
        (self.features,) = struct.unpack_from(">I", about, 40)
        if magic != _MAGIC or own_block != block or length > size // block or not 0 < self._first < length:
            raise damaged("its journal makes no sense")
        if self.features & ~_KNOWN:
            raise damaged("its journal has features that are not known")
        self._length = self._end = length
        if self.features & _FAST_COMMIT:
            self._length -= struct.unpack_from(">I", about, 84)[0] or 256
        self.next_sequence = self._sequence
        if self.start >= self._length:
            raise damaged("its journal makes no sense")

    def _read(self, number: int) -> bytes:
        if number >= len(self._places):
            raise damaged("its journal makes no sense")
        return window.read(self._disk, self._places[number], self._block)

    def _next(self, number: int, count: int = 1) -> int:
        number += count
        return number if number < self._length else self._first + number - self._length

    def fast_blocks(self) -> Iterator[bytes]:
        """The blocks of fast commits, which follow the journal's own."""
        for number in range(self._length + 1, self._end):
            yield self._read(number)

    def replay(self) -> dict[int, tuple[int, bool]]:
        """For each block that the journal holds: where its newest version is."""
        transactions = list(self._transactions())
        self.next_sequence = self._sequence + len(transactions)
        revoked: dict[int, int] = {}
        for sequence, blocks in transactions:
            for kind, number in blocks:
                if kind == _REVOKE:
                    for one in self._revoked(self._read(number)):
                        revoked[one] = sequence
        places: dict[int, tuple[int, bool]] = {}
        for sequence, blocks in transactions:
            for kind, number in blocks:
                if kind != _DESCRIPTOR:
                    continue
                at = number
                for target, is_escaped in self._tags(self._read(number)):
                    at = self._next(at)
                    if revoked.get(target, sequence - 1) < sequence:
                        places[target] = (self._places[at], is_escaped)
        return places

    def _transactions(self) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """The whole ones, in order: their sequence, and their blocks of descriptors and revocations."""
        at, sequence = self.start, self._sequence
        blocks: list[tuple[int, int]] = []
        for _ in range(self._length):
            raw = self._read(at)
            magic, kind, own = _HEADER.unpack_from(raw)
            if magic != _MAGIC or own != sequence & 0xFFFFFFFF:
                return
            if kind == _COMMIT:
                yield sequence, blocks
                blocks, sequence = [], sequence + 1
                at = self._next(at)
            elif kind == _DESCRIPTOR:
                blocks.append((kind, at))
                at = self._next(at, 1 + sum(1 for _ in self._tags(raw)))
            elif kind == _REVOKE:
                blocks.append((kind, at))
                at = self._next(at)
            else:
                return

    def _tags(self, raw: bytes) -> Iterator[tuple[int, bool]]:
        """The disk's blocks whose new versions follow a descriptor."""
        wide = bool(self.features & _64BIT)
        size = 8 + (4 if wide else 0) + (2 if self.features & _CSUM_V2 else 0)
        size = 16 if self.features & _CSUM_V3 else size
        end = len(raw) - (4 if self.features & (_CSUM_V2 | _CSUM_V3) else 0)
        at = _HEADER.size
        while at + size <= end:
            if self.features & _CSUM_V3:
                low, flags, high, _ = struct.unpack_from(">IIII", raw, at)
            else:
                low, _, flags = struct.unpack_from(">IHH", raw, at)
                high = struct.unpack_from(">I", raw, at + 8)[0] if wide else 0
            yield low | (high << 32 if wide else 0), bool(flags & _ESCAPED)
            at += size + (0 if flags & _SAME_UUID else 16)
            if flags & _LAST:
                return

    def _revoked(self, raw: bytes) -> Iterator[int]:
        (used,) = struct.unpack_from(">I", raw, _HEADER.size)
        width, shape = (8, ">Q") if self.features & _64BIT else (4, ">I")
        for at in range(16, min(used, len(raw)) - width + 1, width):
            yield struct.unpack_from(shape, raw, at)[0]
