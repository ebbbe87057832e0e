"""The records in the log of XFS: which of them count, as Linux decides it.

Source: "XFS Algorithms & Data Structures", 3rd edition, "Journaling Log"; what it leaves open was found by comparing with what
Linux makes of the same disk. The last record is whole, and so is all from its tail to it. Several records are written at a time, so
that after a crash some of the last ones may be missing or torn: what is behind the first hole among those never counted. A hole
anywhere else is a damage, and no older state is shown in its place.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from hvmgr import errors
from hvmgr.storage.filesystems import crc32c, window
from hvmgr.storage.filesystems.reader import damaged
from hvmgr.storage.partitions import Disk

SECTOR = 512
_MAGIC = b"\xfe\xed\xba\xbe"
_CYCLES = 64  # of how many sectors one header keeps the words that cycles were stamped over
_PIECE = 4 << 20
_HEADERS_MAX = 64
_UNMOUNT = 0x20
_UNDER_WAY = 8  # so many records are written at a time,
_LARGEST = (256 << 10) // SECTOR  # none of them larger
_SUM = slice(32, 36)
_HEADS = (328, 324)  # of machines with 64 and with 32 bits
_NEXT_HEAD = 260
_ALL = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Record:
    """A record, as its head tells of it."""

    at: int  # the sector of the log that it begins in
    cycle: int
    headers: int
    length: int
    operations: int
    lsn: int
    tail: int
    form: int

    @property
    def sectors(self) -> int:
        """All of it."""
        return self.headers + -(-self.length // SECTOR)


class Records:
    """The log that begins at byte ``start`` of a disk."""

    def __init__(self, disk: Disk, start: int, size: int) -> None:
        self._disk, self._start, self._size = disk, start, size
        self._sectors = size // SECTOR

    def to_replay(self, most: int) -> list[tuple[Record, bytes]]:
        """What Linux would replay, in order, each with its data; none when the log is clean.

        Corrupt where it makes no sense; Unsupported where there are more than ``most`` bytes.
        """
        known = self._found()
        order = sorted(known.values(), key=lambda one: one.lsn)
        if not order:
            return []
        newest = order[-1]
        for _ in range(_UNDER_WAY + 1):
            if not order:
                break
            target = order.pop()
            data = self._data(target)
            if data is not None and target.operations == 1 and len(data) > 9 and data[9] & _UNMOUNT:
                return []
            walked, hole = self._walk(known, target, most) if data is not None else ([], target.at)
            if hole is None:
                return walked
            if (newest.at - hole) % self._sectors > _UNDER_WAY * _LARGEST:
                raise damaged("its log has a hole")
            if hole == target.at:
                continue
            if not walked:
                raise damaged("its log has lost its tail")
            while order and order[-1].lsn > walked[-1][0].lsn:
                order.pop()
        raise damaged("its log has no record that is whole")

    def _walk(
        self, known: dict[int, Record], target: Record, most: int
    ) -> tuple[list[tuple[Record, bytes]], int | None]:
        """The records from the tail of ``target`` to it, and in which sector the first hole among them is."""
        walked: list[tuple[Record, bytes]] = []
        cycle, at = divmod(target.tail, 1 << 32)
        while True:
            one = known.get(at)
            if one is None or one.cycle != cycle or one.lsn > target.lsn:
                return walked, at
            most -= one.length
            if most < 0:
                raise errors.Unsupported("its log holds too much to be replayed in memory")
            data = self._data(one)
            if data is None:
                return walked, at
            walked.append((one, data))
            if one is target:
                return walked, None
            at += one.sectors
            cycle, at = (cycle + 1, at - self._sectors) if at >= self._sectors else (cycle, at)

    def _found(self) -> dict[int, Record]:
        """All that begins as a record of this log does and says that it stands there."""
        found: dict[int, Record] = {}
        for start in range(0, self._size, _PIECE):
            piece = window.read(self._disk, self._start + start, min(_PIECE, self._size - start))
            at = piece.find(_MAGIC)
            while at >= 0:
                if at % SECTOR == 0 and (one := _record(piece[at : at + SECTOR], (start + at) // SECTOR)) is not None:
                    found[one.at] = one
                at = piece.find(_MAGIC, at + 4)
        return found

    def _data(self, record: Record) -> bytes | None:
        """The record's operations; None where not all of its sectors were written, or its sum is another one."""
        if record.sectors > self._sectors:
            return None
        raw = bytearray(self._read(record.at, record.sectors))
        data = memoryview(raw)[record.headers * SECTOR :]
        if len(data) < record.length or not _is_right(raw, data[: record.length]):
            return None
        for number in range(len(data) // SECTOR):
            wrapped = record.at + record.headers + number >= self._sectors
            if int.from_bytes(data[number * SECTOR : number * SECTOR + 4], "big") != record.cycle + wrapped:
                return None
            header, index = divmod(number, _CYCLES)
            at = 44 + 4 * index if header == 0 else header * SECTOR + 4 + 4 * index
            if header >= record.headers:
                return None
            data[number * SECTOR : number * SECTOR + 4] = raw[at : at + 4]
        return bytes(data)[: record.length]

    def _read(self, sector: int, count: int) -> bytes:
        first = min(count, self._sectors - sector)
        found = window.read(self._disk, self._start + sector * SECTOR, first * SECTOR)
        return found + window.read(self._disk, self._start, (count - first) * SECTOR) if first < count else found


def _record(head: bytes, at: int) -> Record | None:
    if len(head) < SECTOR:
        return None
    _, cycle, version, length, lsn, tail = struct.unpack_from(">4sIIIQQ", head)
    (operations,) = struct.unpack_from(">I", head, 40)
    (form,) = struct.unpack_from(">I", head, 300)
    (size,) = struct.unpack_from(">I", head, 320)
    headers = -(-size // (_CYCLES * SECTOR)) if version & 2 and size > _CYCLES * SECTOR else 1
    if lsn != cycle << 32 | at or headers > _HEADERS_MAX or length > headers * _CYCLES * SECTOR or tail > lsn:
        return None
    return Record(at, cycle, headers, length, operations, lsn, tail, form)


def _is_right(raw: bytearray, data: memoryview) -> bool:
    """Whether the sum in the head is that of the record as it was written; old systems, and mkfs, write none."""
    stated = int.from_bytes(raw[_SUM], "little")
    if not stated:
        return True
    following = -(-len(data) // (_CYCLES * SECTOR))
    rest = b"".join(raw[number * SECTOR : number * SECTOR + _NEXT_HEAD] for number in range(1, following)) + data
    heads = (bytes(raw[: _SUM.start]) + bytes(4) + raw[_SUM.stop : size] for size in _HEADS)
    return any(crc32c.updated(crc32c.updated(_ALL, head), rest) ^ _ALL == stated for head in heads)
