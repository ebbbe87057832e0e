"""Parts of a disk that are read like disks themselves: a partition, and any other list of ranges."""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from hvmgr import errors
from hvmgr.model.ranges import Range
from hvmgr.storage.partitions import Disk

_ZEROS = bytes(64 << 10)


class Run(NamedTuple):
    """Bytes of a file or a volume: ``length`` of them, from ``start`` of what is below; zeros where that is None."""

    length: int
    start: int | None


class Window:
    """The range of a disk from ``start`` on as a disk of its own."""

    def __init__(self, disk: Disk, start: int, size: int) -> None:
        self.disk = disk
        self.start = start
        self.size = size
        self._there = max(0, min(size, disk.size - start))

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """The bytes from ``offset`` on; Corrupt where a table promises more disk than there is."""
        if offset < 0 or offset + len(buffer) > self._there:
            raise errors.Corrupt(
                f"the file system reaches to byte {offset + len(buffer)}, its place ends at {self._there}"
            )
        self.disk.read_into(self.start + offset, buffer)

    def parts(self) -> list[Part]:
        """Where it lies on the disk."""
        return [(self.disk, self.start, self._there)]


Part = tuple[Disk | None, int, int]  # of which disk (None: zeros), where in it, how many bytes


class Mapped:
    """Ranges of other disks, one after the other, as one disk."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts: list[tuple[int, Disk | None, int, int]] = []
        at = 0
        for disk, start, length in parts:
            self._parts.append((at, disk, start, length))
            at += length
        self.size = at

    @property
    def piece(self) -> tuple[Disk, int] | None:
        """The one disk, and where on it, that all of it lies on in one piece; None when it does not."""
        _, disk, start, _ = self._parts[0]
        follow = all(below is disk and place == start + at for at, below, place, _ in self._parts)
        return (disk, start) if disk is not None and follow else None

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """The bytes from ``offset`` on."""
        end = offset + len(buffer)
        if offset < 0 or end > self.size:
            raise errors.Corrupt(f"the file system reaches to byte {end}, its volume ends at {self.size}")
        index = bisect.bisect_right(self._parts, offset, key=lambda one: one[0]) - 1
        for at, disk, start, length in self._parts[max(0, index) :]:
            if at >= end:
                break
            first, last = max(at, offset), min(at + length, end)
            if first >= last:
                continue
            part = buffer[first - offset : last - offset]
            if disk is None:
                part[:] = bytes(len(part))
            else:
                disk.read_into(start + first - at, part)

    def parts(self) -> list[Part]:
        """Where all of it lies."""
        return [(disk, start, length) for _, disk, start, length in self._parts]


def flattened(disk: Disk) -> list[Part]:
    """Where a part of disks, or a part of parts, lies on the disks themselves."""
    if not isinstance(disk, Window | Mapped):
        return [(disk, 0, disk.size)]
    found: list[Part] = []
    for below, start, length in disk.parts():
        if below is None:
            found.append((None, 0, length))
            continue
        at = 0
        for one, place, count in flattened(below):
            first, last = max(at, start), min(at + count, start + length)
            if first < last:
                found.append((one, place + first - at, last - first))
            at += count
    return found


class Cached:
    """A disk whose small reads are answered from whole pieces that were read before."""

    PIECE = 64 << 10
    _PIECES = 1024

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._pieces: dict[int, bytes] = {}
        self._asked: list[Range] | None = None
        self.size = disk.size

    @contextlib.contextmanager
    def watched(self) -> Iterator[list[Range]]:
        """Where whatever is read inside the block stands, be it remembered or not."""
        before, self._asked = self._asked, []
        try:
            yield self._asked
        finally:
            self._asked = before

    @property
    def is_watched(self) -> bool:
        """Whether somebody wants to know."""
        return self._asked is not None

    def note(self, offset: int, length: int) -> None:
        """Somebody needs these bytes, and has them already."""
        if self._asked is not None:
            self._asked.append((offset, offset + length))

    def read(self, offset: int, length: int) -> bytes:
        """Bytes; they end where the disk does."""
        length = max(0, min(length, self.size - offset))
        if self._asked is not None:
            self._asked.append((offset, offset + length))
        if length > self.PIECE:
            buffer = bytearray(length)
            self._disk.read_into(offset, memoryview(buffer))
            return bytes(buffer)
        number, inside = divmod(offset, self.PIECE)
        found = self._piece(number)[inside : inside + length]
        return found if len(found) == length else found + self._piece(number + 1)[: length - len(found)]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Large reads, past what is remembered."""
        self.note(offset, len(buffer))
        self._disk.read_into(offset, buffer)

    def _piece(self, number: int) -> bytes:
        found = self._pieces.get(number)
        if found is None:
            if len(self._pieces) >= self._PIECES:
                self._pieces.clear()
            at = number * self.PIECE
            buffer = bytearray(max(0, min(self.PIECE, self.size - at)))
            self._disk.read_into(at, memoryview(buffer))
            found = self._pieces[number] = bytes(buffer)
        return found


class Patched:
    """A disk with other bytes in some of its sectors, which are kept in memory."""

    def __init__(self, disk: Disk, sector: int) -> None:
        self._disk, self._sector = disk, sector
        self._changed: dict[int, bytes] = {}
        self.size = disk.size

    @property
    def is_changed(self) -> bool:
        """Whether anything was written."""
        return bool(self._changed)

    def ranges(self) -> list[Range]:
        """The sectors that have other bytes."""
        return [(number * self._sector, (number + 1) * self._sector) for number in self._changed]

    def write(self, offset: int, data: bytes) -> None:
        """From ``offset`` on the disk has these bytes; Corrupt where that is no place of it."""
        end, sector = offset + len(data), self._sector
        if offset < 0 or end > self.size:
            raise errors.Corrupt(f"the file system reaches to byte {end}, its place ends at {self.size}")
        for number in range(offset // sector, -(-end // sector)):
            at = number * sector
            first, last = max(at, offset), min(at + sector, end)
            if last - first == sector:
                self._changed[number] = data[first - offset : last - offset]
                continue
            whole = bytearray(self._changed.get(number) or read(self._disk, at, sector))
            whole[first - at : last - at] = data[first - offset : last - offset]
            self._changed[number] = bytes(whole)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """The bytes from ``offset`` on."""
        self._disk.read_into(offset, buffer)
        end, sector = offset + len(buffer), self._sector
        for number in range(offset // sector, -(-end // sector)):
            if number not in self._changed:
                continue
            at = number * sector
            start, stop = max(at, offset), min(at + sector, end)
            buffer[start - offset : stop - offset] = self._changed[number][start - at : stop - at]


def read(disk: Disk, offset: int, length: int) -> bytes:
    """Bytes of a disk; they end where the disk does."""
    buffer = bytearray(max(0, min(length, disk.size - offset)))
    if buffer:
        disk.read_into(offset, memoryview(buffer))
    return bytes(buffer)
