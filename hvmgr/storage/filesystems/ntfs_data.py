"""What NTFS stores in a record: attributes, where their contents lie, and how contents are compressed."""

from __future__ import annotations

import bisect
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hvmgr.storage.filesystems import window
from hvmgr.storage.filesystems.reader import Bytes, Content, Runs, Segment, damaged, possible
from hvmgr.storage.filesystems.window import Run
from hvmgr.storage.partitions import Disk

_COMPRESSED, _ENCRYPTED = 0x00FF, 0x4000
_END = 0xFFFFFFFF
_EPOCH = 116_444_736_000_000_000  # 1970, in the 100 ns since 1601 that NTFS counts
_FIXED_SECTOR = 512
_CHUNK = 4096


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes and places in bytes."""

    cluster: int
    record: int
    mft: int
    size: int


@dataclass(frozen=True, slots=True)
class Attribute:
    """One attribute, or a part of a long one: its value, or from which cluster of the content on it lies where."""

    kind: int
    name: str
    flags: int
    value: bytes  # of a resident one; else the packed list of runs
    is_resident: bool
    first: int = 0
    size: int = 0
    valid: int = 0
    allocated: int = 0
    unit: int = 0  # clusters that are compressed together, as a power of two; 0: none

    @property
    def is_encrypted(self) -> bool:
        """Whether only the guest can read it."""
        return bool(self.flags & _ENCRYPTED)


def read_geometry(boot: bytes, size: int) -> Geometry:
    """What the boot sector says."""
    sector, per_cluster = struct.unpack_from("<HB", boot, 11)
    sectors, mft = struct.unpack_from("<QQ", boot, 40)
    (per_record,) = struct.unpack_from("<b", boot, 64)
    count = per_cluster if per_cluster <= 0x80 else 1 << (256 - per_cluster)
    cluster = sector * count
    record = per_record * cluster if per_record > 0 else 1 << -per_record
    is_sane = sector in {256, 512, 1024, 2048, 4096} and 512 <= cluster <= 2 << 20 and 512 <= record <= 64 << 10
    if not is_sane or sectors * sector > size + sector or mft * cluster >= size:
        raise damaged("its boot sector makes no sense")
    return Geometry(cluster, record, mft * cluster, size)


def fixed(raw: bytes) -> bytes:
    """A record whose last two bytes of each sector are put back; Corrupt where it was only written in part."""
    place, count = struct.unpack_from("<HH", raw, 4)
    data = bytearray(raw)
    mark = raw[place : place + 2]
    for one in range(1, count):
        end = one * _FIXED_SECTOR
        if end > len(data):
            break
        if data[end - 2 : end] != mark:
            raise damaged("a record was written only in part")
        data[end - 2 : end] = raw[place + 2 * one : place + 2 * one + 2]
    return bytes(data)


def attributes_of(raw: bytes) -> Iterator[Attribute]:
    """The attributes in one record."""
    (at,) = struct.unpack_from("<H", raw, 20)
    while at + 8 <= len(raw):
        kind, length = struct.unpack_from("<II", raw, at)
        if kind == _END:
            return
        if length < 24 or at + length > len(raw):
            raise damaged("an attribute makes no sense")
        yield _attribute(kind, raw[at : at + length])
        at += length


def _attribute(kind: int, raw: bytes) -> Attribute:
    name_length, name_offset, flags = struct.unpack_from("<BHH", raw, 9)
    name = raw[name_offset : name_offset + 2 * name_length].decode("utf-16-le", "surrogatepass")
    if not raw[8]:
        length, offset = struct.unpack_from("<IH", raw, 16)
        value = raw[offset : offset + length]
        if len(value) < length:
            raise damaged("an attribute makes no sense")
        return Attribute(kind, name, flags, value, is_resident=True, size=length, valid=length)
    first, _, offset, unit = struct.unpack_from("<QQHH", raw, 16)
    allocated, size, valid = struct.unpack_from("<QQQ", raw, 40)
    return Attribute(kind, name, flags, raw[offset:], False, first, size, valid, allocated, unit)


def runs_of(parts: Sequence[Attribute], about: Geometry) -> list[Run]:
    """Where a content lies, in bytes of the volume."""
    runs: list[Run] = []
    at = 0
    for part in parts:
        if part.is_resident:
            raise damaged("a content is both in its record and outside of it")
        if part.first * about.cluster != at:
            raise damaged("a content has a gap")
        for run in _unpacked(part.value, about):
            runs.append(run)
            at += run.length
    return runs


def _unpacked(packed: bytes, about: Geometry) -> Iterator[Run]:
    at, cluster = 0, 0
    while at < len(packed) and packed[at]:
        head = packed[at]
        lengths, offsets = head & 15, head >> 4
        at += 1
        if at + lengths + offsets > len(packed) or not lengths:
            raise damaged("a list of clusters makes no sense")
        count = int.from_bytes(packed[at : at + lengths], "little")
        start: int | None = None
        if offsets:
            cluster += int.from_bytes(packed[at + lengths : at + lengths + offsets], "little", signed=True)
            start = cluster * about.cluster
        at += lengths + offsets
        if start is not None and (start < 0 or start + count * about.cluster > about.size):
            raise damaged("a content lies behind the end of the volume")
        if count > 1 << 48:
            raise damaged("a list of clusters makes no sense")
        yield Run(count * about.cluster, start)


def content_of(disk: Disk, parts: Sequence[Attribute], about: Geometry) -> Content:
    """The bytes of an attribute."""
    first = parts[0]
    if first.is_resident:
        return Bytes(first.value)
    runs = runs_of(parts, about)
    if first.unit and first.flags & _COMPRESSED:
        return Compressed(disk, runs, first, about)
    return Runs(disk, runs, first.size, first.valid)


class Compressed:
    """A content of which each unit of clusters lies as it is, compressed, or not at all."""

    def __init__(self, disk: Disk, runs: Sequence[Run], first: Attribute, about: Geometry) -> None:
        self.size = possible(first.size)
        self._end = min(first.size, first.valid)
        self._disk, self._runs, self._cluster = disk, runs, about.cluster
        if first.unit > 8:
            raise damaged("a compressed content makes no sense")
        self._unit = about.cluster << first.unit
        self._units: list[tuple[int, list[Run]]] | None = None  # where in the content each lies

    def pieces(self, start: int = 0, end: int | None = None) -> Iterator[tuple[int, bytes | memoryview]]:
        """The data, unit by unit."""
        last = self._end if end is None else min(end, self._end)
        units = self._placed()
        for number in range(bisect.bisect_right(units, start - self._unit, key=lambda one: one[0]), len(units)):
            offset, unit = units[number]
            if offset >= last:
                return
            allocated = sum(one.length for one in unit if one.start is not None)
            if allocated:
                raw = b"".join(window.read(self._disk, one.start, one.length) for one in unit if one.start is not None)
                data = raw if allocated == self._unit else expanded(raw, self._unit)
                yield offset, data[: self._end - offset]

    def segments(self) -> list[Segment]:
        """Each unit that holds something."""
        found: list[Segment] = []
        for offset, unit in self._placed():
            places = tuple((one.start, one.start + one.length) for one in unit if one.start is not None)
            if places:
                end = min(offset + self._unit, self._end)
                found.append(Segment(offset, end, -offset, (self._unit, places), places))
        return found

    def ranges(self) -> list[tuple[int, int]]:
        """All of it: holes are found by reading only."""
        return [(0, self._end)] if self._end else []

    def _placed(self) -> list[tuple[int, list[Run]]]:
        """The units in order, without those that hold nothing."""
        if self._units is None:
            self._units = []
            offset = 0
            for unit, empty in self._read_units():
                offset += empty * self._unit
                if offset >= self._end:
                    break
                self._units.append((offset, unit))
                offset += self._unit
        return self._units

    def _read_units(self) -> Iterator[tuple[list[Run], int]]:
        """Each unit with how many units of nothing lie in front of it."""
        unit: list[Run] = []
        empty = 0
        left = self._unit
        for length, start in self._runs:
            at = 0
            while at < length:
                if not unit and start is None and length - at >= self._unit:
                    count = (length - at) // self._unit
                    empty, at = empty + count, at + count * self._unit
                    continue
                take = min(left, length - at)
                unit.append(Run(take, None if start is None else start + at))
                at, left = at + take, left - take
                if not left:
                    yield unit, empty
                    unit, left, empty = [], self._unit, 0
        if unit:
            yield unit, empty


def expanded(raw: bytes, limit: int) -> bytes:
    """LZNT1, as [MS-XCA] 2.5 has it, up to ``limit`` bytes."""
    out = bytearray()
    at = 0
    while at + 2 <= len(raw) and len(out) < limit:
        (head,) = struct.unpack_from("<H", raw, at)
        if head == 0:
            break
        length = (head & 0xFFF) + 1
        chunk = raw[at + 2 : at + 2 + length]
        at += 2 + length
        if head & 0x8000:
            _expand_chunk(chunk, out)
        else:
            out += chunk
        missing = -len(out) % _CHUNK
        out += bytes(missing)  # a chunk that ends early is filled up with zeros
    return bytes(out[:limit])


def _expand_chunk(chunk: bytes, out: bytearray) -> None:
    start, at, end = len(out), 0, len(chunk)
    while at < end:
        flags = chunk[at]
        at += 1
        for bit in range(8):
            if at >= end:
                return
            if not flags >> bit & 1:
                out.append(chunk[at])
                at += 1
                continue
            if at + 2 > end:
                raise damaged("a compressed content makes no sense")
            token = chunk[at] | chunk[at + 1] << 8
            at += 2
            done = len(out) - start
            width = max(4, (done - 1).bit_length()) if done else 4
            shift = 16 - width
            back, count = (token >> shift) + 1, (token & (1 << shift) - 1) + 3
            if back > done or done + count > _CHUNK:
                raise damaged("a compressed content makes no sense")
            if back >= count:
                out += out[-back : len(out) - back + count]
            else:
                for _ in range(count):
                    out.append(out[-back])


def to_unix(ticks: int) -> int:
    """NTFS' time in nanoseconds since 1970."""
    return (ticks - _EPOCH) * 100
