"""The log of XFS, replayed into a layer above a disk that is only read.

Source: "XFS Algorithms & Data Structures", 3rd edition, "Journaling Log"; what it leaves open was found by comparing with what
Linux makes of the same disk. As Linux does it: find the last record that is whole, go from its tail to it, put the regions
of each transaction together, and replay those that were committed: buffers, new inodes, inodes. What only frees space or
counts quota is of no concern to a reader.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from hvmgr.storage.filesystems import window, xfs_inode_log
from hvmgr.storage.filesystems.reader import damaged
from hvmgr.storage.filesystems.window import Patched
from hvmgr.storage.partitions import Disk

_SECTOR = 512
_MAGIC = b"\xfe\xed\xba\xbe"
_LITTLE = 1
_CYCLES = 64  # of how many sectors one header keeps the words that cycles were stamped over
_LOG_MAX, _PIECE = 256 << 20, 4 << 20
_HEADERS_MAX = 64
_OPERATION = struct.Struct(">IIBBH")
_START, _COMMIT, _CONTINUE, _CONTINUED, _END, _UNMOUNT = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_TRANSACTION_HEADER = 16
_BUFFER, _INODE, _NEW_INODES = 0x123C, 0x123B, 0x123F
_INTENTS = {0x1244: 0x1245, 0x1246: 0x1247, 0x1248: 0x1249}  # of what changes contents, and what says that it is done
_INODE_BUFFER, _CANCEL = 1, 2
_CHUNK = 128
_BUFFER_HEAD = struct.Struct("<HHHHqI")
_NEW_HEAD = struct.Struct(">6I")


@dataclass(frozen=True, slots=True)
class Place:
    """Where the log is on the disk, in bytes, and what the file system says of itself."""

    start: int
    size: int
    inode: int
    block: int
    per_group: int
    is_5: bool


@dataclass(frozen=True, slots=True)
class Replayed:
    """The disk as it is after a replay; None when there was nothing to replay."""

    disk: Patched | None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Record:
    at: int  # the sector of the log that it begins in
    cycle: int
    headers: int
    length: int
    operations: int
    lsn: int
    tail: int
    form: int
    head: bytes

    @property
    def sectors(self) -> int:
        return self.headers + -(-self.length // _SECTOR)


@dataclass(slots=True)
class _Item:
    """What one transaction says of one thing: how many regions there are to be, and those that came."""

    total: int
    regions: list[bytes]

    @property
    def type(self) -> int:
        return int.from_bytes(self.regions[0][:2], "little")

    @property
    def order(self) -> int:
        """Buffers first, those of inodes after the inodes, what is taken back at last."""
        if self.type == _BUFFER:
            (flags,) = struct.unpack_from("<H", self.regions[0], 4)
            return 3 if flags & _CANCEL else 2 if flags & _INODE_BUFFER else 0
        return 0 if self.type == _NEW_INODES else 1


def replayed(disk: Disk, place: Place) -> Replayed:
    """The disk with its log replayed over it; what cannot be replayed is told."""
    if place.size > _LOG_MAX:
        return Replayed(None, ["its log is too large to be looked at: what it holds, if anything, is not seen"])
    records = _Log(disk, place).records()
    if not records:
        return Replayed(None)
    if any(one.form != _LITTLE for one, _ in records):
        return Replayed(
            None, ["its log was written by a machine of another kind and is not replayed: changes are missing"]
        )
    transactions = list(_transactions(records))
    layer = Patched(disk, _SECTOR)
    _Replay(layer, place).run(transactions)
    notes = ["the log was replayed in memory: the file system had not been unmounted"] if layer.is_changed else []
    if _unfinished(transactions):
        notes.append("something was under way that only a mount finishes: what it was about may be between two states")
    return Replayed(layer if layer.is_changed else None, notes)


class _Log:
    def __init__(self, disk: Disk, place: Place) -> None:
        self._disk, self._place = disk, place
        self._sectors = place.size // _SECTOR

    def records(self) -> list[tuple[_Record, bytes]]:
        """The records that Linux would replay, in order, each with its data; none when the log is clean."""
        known = self._found()
        last = max(known, key=lambda at: known[at].lsn, default=None)
        while last is not None:
            walked: list[tuple[_Record, bytes]] = []
            target, (cycle, at) = known[last], divmod(known[last].tail, 1 << 32)
            last = None
            for _ in range(len(known)):
                one = known.get(at)
                data = None if one is None or one.cycle != cycle else self._data(one)
                if one is None or data is None:
                    break
                walked.append((one, data))
                if one is target:
                    return [] if self._is_unmount(one, data) else walked
                at += one.sectors
                cycle, at = (cycle + 1, at - self._sectors) if at >= self._sectors else (cycle, at)
            if walked:
                last = walked[-1][0].at  # behind it is a hole: what was written after that never counted
            else:
                del known[target.at]
                last = max(known, key=lambda at: known[at].lsn, default=None)
        return []

    @staticmethod
    def _is_unmount(record: _Record, data: bytes) -> bool:
        return record.operations == 1 and bool(data[9] & _UNMOUNT)

    def _found(self) -> dict[int, _Record]:
        """All that begins as a record of this log does and says that it stands there."""
        found: dict[int, _Record] = {}
        for start in range(0, self._place.size, _PIECE):
            piece = window.read(self._disk, self._place.start + start, min(_PIECE, self._place.size - start))
            at = piece.find(_MAGIC)
            while at >= 0:
                if (
                    at % _SECTOR == 0
                    and (one := _record(piece[at : at + _SECTOR], (start + at) // _SECTOR)) is not None
                ):
                    found[one.at] = one
                at = piece.find(_MAGIC, at + 4)
        return found

    def _data(self, record: _Record) -> bytes | None:
        """The record's operations; None where not all of its sectors were written."""
        raw = bytearray(self._read(record.at, record.sectors))
        data = memoryview(raw)[record.headers * _SECTOR :]
        for number in range(len(data) // _SECTOR):
            wrapped = record.at + record.headers + number >= self._sectors
            if int.from_bytes(data[number * _SECTOR : number * _SECTOR + 4], "big") != record.cycle + wrapped:
                return None
            header, index = divmod(number, _CYCLES)
            at = 44 + 4 * index if header == 0 else header * _SECTOR + 4 + 4 * index
            if header >= record.headers:
                return None
            data[number * _SECTOR : number * _SECTOR + 4] = raw[at : at + 4]
        return bytes(data)[: record.length]

    def _read(self, sector: int, count: int) -> bytes:
        first = min(count, self._sectors - sector)
        found = window.read(self._disk, self._place.start + sector * _SECTOR, first * _SECTOR)
        return found + window.read(self._disk, self._place.start, (count - first) * _SECTOR) if first < count else found


def _record(head: bytes, at: int) -> _Record | None:
    if len(head) < _SECTOR:
        return None
    _, cycle, version, length, lsn, tail = struct.unpack_from(">4sIIIQQ", head)
    (operations,) = struct.unpack_from(">I", head, 40)
    (form,) = struct.unpack_from(">I", head, 300)
    (size,) = struct.unpack_from(">I", head, 320)
    headers = -(-size // (_CYCLES * _SECTOR)) if version & 2 and size > _CYCLES * _SECTOR else 1
    if lsn != cycle << 32 | at or headers > _HEADERS_MAX or length > headers * _CYCLES * _SECTOR or tail > lsn:
        return None
    return _Record(at, cycle, headers, length, operations, lsn, tail, form, head)


# --- transactions ---------------------------------------------------------------------------------------------------


class _Transaction:
    def __init__(self) -> None:
        self.head = b""
        self.items: list[_Item] = []

    def add(self, data: bytes) -> None:
        """A region of its own: of the item that is not whole yet, or of a new one."""
        if not data:
            return
        if len(self.head) < _TRANSACTION_HEADER:
            self.head += data
            return
        if not self.items or len(self.items[-1].regions) >= self.items[-1].total:
            if len(data) < 4:
                raise damaged("its log has an item that makes no sense")
            self.items.append(_Item(max(1, int.from_bytes(data[2:4], "little")), []))
        self.items[-1].regions.append(data)

    def go_on(self, data: bytes) -> None:
        """The rest of the last region, which did not fit into its record."""
        if not self.items:
            self.head += data
        else:
            self.items[-1].regions[-1] += data


def _transactions(records: list[tuple[_Record, bytes]]) -> Iterator[list[_Item]]:
    """The items of each transaction that was committed, in the order of the commits."""
    open_ones: dict[int, _Transaction] = {}
    for record, data in records:
        at = 0
        for _ in range(record.operations):
            if at + _OPERATION.size > len(data):
                raise damaged("its log has a record that makes no sense")
            number, length, _, flags, _ = _OPERATION.unpack_from(data, at)
            at += _OPERATION.size
            part = data[at : at + length]
            at += length
            one = open_ones.get(number)
            if flags & _START:
                open_ones[number] = _Transaction()
            elif one is None:
                continue  # it began before the tail: all of it is on the disk
            elif flags & _COMMIT:
                yield [item for item in one.items if len(item.regions) >= item.total]
                del open_ones[number]
            elif flags & _CONTINUED:
                one.go_on(part)
            elif not flags & _UNMOUNT:
                one.add(part)


def _unfinished(transactions: list[list[_Item]]) -> bool:
    begun, done = set[tuple[int, bytes]](), set[tuple[int, bytes]]()
    for item in (one for items in transactions for one in items):
        number = item.regions[0][8:16]
        if item.type in _INTENTS:
            begun.add((_INTENTS[item.type], number))
        elif item.type in _INTENTS.values():
            done.add((item.type, number))
    return bool(begun - done)


# --- replay ---------------------------------------------------------------------------------------------------------


class _Replay:
    def __init__(self, layer: Patched, place: Place) -> None:
        self._layer, self._place = layer, place
        self._cancelled = Counter[tuple[int, int]]()  # buffers that are given up further on

    def run(self, transactions: list[list[_Item]]) -> None:
        """All of it is in the layer."""
        for items in transactions:
            for item in items:
                if item.order == 3:
                    self._cancelled[_buffer_of(item)] += 1
        for items in transactions:
            for item in sorted(items, key=lambda one: one.order):
                if item.type == _BUFFER:
                    self._buffer(item)
                elif item.type == _INODE:
                    self._inode(item)
                elif item.type == _NEW_INODES:
                    self._new_inodes(item)

    def _buffer(self, item: _Item) -> None:
        about = item.regions[0]
        _, _, flags, _, sector, words = _BUFFER_HEAD.unpack_from(about)
        if flags & _CANCEL:
            self._cancelled[_buffer_of(item)] -= 1
            return
        if flags & _INODE_BUFFER or self._cancelled[_buffer_of(item)] > 0:
            return  # of a buffer of inodes only the list of those that were unlinked would be replayed
        bits = int.from_bytes(about[_BUFFER_HEAD.size : _BUFFER_HEAD.size + 4 * words], "little")
        at, regions = 0, iter(item.regions[1:])
        while bits >> at:
            at += ((bits >> at) & -(bits >> at)).bit_length() - 1
            region = next(regions, None)
            if region is None:
                break
            rest = bits >> at
            count = min(((rest + 1) & ~rest).bit_length() - 1, len(region) // _CHUNK)
            if not count:
                break
            self._layer.write(sector * _SECTOR + at * _CHUNK, region[: count * _CHUNK])
            at += count

    def _inode(self, item: _Item) -> None:
        what = xfs_inode_log.parsed(item.regions)
        if self._cancelled[what.sector, what.sectors] > 0:
            return
        at = what.sector * _SECTOR + what.offset
        before = window.read(self._layer, at, self._place.inode)
        self._layer.write(at, xfs_inode_log.applied(what, before, is_5=self._place.is_5))

    def _new_inodes(self, item: _Item) -> None:
        """Their sectors hold inodes that nobody uses; what became of them is told by items of their own."""
        group, block, count, size, blocks, _ = _NEW_HEAD.unpack_from(item.regions[0], 4)
        if (
            size != self._place.inode
            or count * size != blocks * self._place.block
            or block + blocks > self._place.per_group
        ):
            raise damaged("its log has new inodes that make no sense")
        at = (group * self._place.per_group + block) * self._place.block
        for number in range(count):
            self._layer.write(at + number * size, b"IN\0\0\3".ljust(size, b"\0"))


def _buffer_of(item: _Item) -> tuple[int, int]:
    _, _, _, length, sector, _ = _BUFFER_HEAD.unpack_from(item.regions[0])
    return sector, length
