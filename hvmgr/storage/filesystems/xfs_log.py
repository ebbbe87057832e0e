"""The log of XFS, replayed into a layer above a disk that is only read.

Source: "XFS Algorithms & Data Structures", 3rd edition, "Journaling Log"; what it leaves open was found by comparing with what
Linux makes of the same disk. As Linux does it: put the regions of each transaction in the records that count (``xfs_records``)
together, and replay those that were committed: buffers, new inodes, inodes. What only frees space or counts quota is of no
concern to a reader.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from hvmgr import errors
from hvmgr.storage.filesystems import window, xfs_inode_log
from hvmgr.storage.filesystems.reader import damaged
from hvmgr.storage.filesystems.window import Patched
from hvmgr.storage.filesystems.xfs_records import SECTOR, Record, Records
from hvmgr.storage.partitions import Disk

_LITTLE = 1
_MOST = 256 << 20  # of what is to be replayed; an ordinary log is below it as a whole
_OPERATION = struct.Struct(">IIBBH")
_START, _COMMIT, _CONTINUE, _CONTINUED, _END, _UNMOUNT = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_TRANSACTION_HEADER = 16
_BUFFER, _INODE, _NEW_INODES = 0x123C, 0x123B, 0x123F
_INTENTS = {0x1244: 0x1245, 0x1246: 0x1247, 0x1248: 0x1249}  # of what changes contents, and what says that it is done
_INODE_BUFFER, _CANCEL = 1, 2
_CHUNK = 128
_WORDS_MAX = 17  # of bits, one for each chunk of the largest block, and one word to spare
_BUFFER_HEAD = struct.Struct("<HHHHqI")
_NEW_HEAD = struct.Struct(">6I")
_INODES_AT_ONCE = 64
_PER_INODE = 32  # bytes of the log; each new inode has an item of its own later, which alone is larger


@dataclass(frozen=True, slots=True)
class Place:
    """Where the log is on the disk, in bytes, and what the file system says of itself."""

    start: int
    size: int
    inode: int
    block: int
    per_group: int
    cluster: int  # blocks that hold inodes and are written together
    is_5: bool


@dataclass(frozen=True, slots=True)
class Replayed:
    """The disk as it is after a replay; None when there was nothing to replay."""

    disk: Patched | None
    notes: list[str] = field(default_factory=list)


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
    try:
        records = Records(disk, place.start, place.size).to_replay(_MOST)
    except errors.Unsupported as error:
        return Replayed(None, [f"{error.message}, and is not: the newest changes are missing"])
    if not records:
        return Replayed(None)
    if any(one.form != _LITTLE for one, _ in records):
        return Replayed(
            None, ["its log was written by a machine of another kind and is not replayed: changes are missing"]
        )
    transactions = list(_transactions(records))
    layer = Patched(disk, SECTOR)
    _Replay(layer, place, sum(len(data) for _, data in records) // _PER_INODE).run(transactions)
    notes = ["the log was replayed in memory: the file system had not been unmounted"] if layer.is_changed else []
    if _unfinished(transactions):
        notes.append("something was under way that only a mount finishes: what it was about may be between two states")
    return Replayed(layer if layer.is_changed else None, notes)


# --- transactions ---------------------------------------------------------------------------------------------------


class _Transaction:
    def __init__(self) -> None:
        self.head = bytearray()
        self.items: list[_Item] = []
        self._rest = bytearray()  # of the last region, as far as it came by itself

    def add(self, data: bytes) -> None:
        """A region of its own: of the item that is not whole yet, or of a new one."""
        self.close()
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
            self._rest += data

    def close(self) -> None:
        """The last region is whole."""
        if self._rest:
            self.items[-1].regions[-1] += bytes(self._rest)
            self._rest.clear()


def _transactions(records: list[tuple[Record, bytes]]) -> Iterator[list[_Item]]:
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
                one.close()
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
    def __init__(self, layer: Patched, place: Place, new: int) -> None:
        """At most ``new`` new inodes are to be expected."""
        self._layer, self._place, self._new = layer, place, new + _INODES_AT_ONCE * 64
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
        if words > _WORDS_MAX:
            raise damaged("its log has a buffer that makes no sense")
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
            self._layer.write(sector * SECTOR + at * _CHUNK, region[: count * _CHUNK])
            at += count

    def _inode(self, item: _Item) -> None:
        what = xfs_inode_log.parsed(item.regions)
        if self._cancelled[what.sector, what.sectors] > 0:
            return
        at = what.sector * SECTOR + what.offset
        before = window.read(self._layer, at, self._place.inode)
        self._layer.write(at, xfs_inode_log.applied(what, before, is_5=self._place.is_5))

    def _new_inodes(self, item: _Item) -> None:
        """Their sectors hold inodes that nobody uses; what became of them is told by items of their own."""
        group, block, count, size, blocks, _ = _NEW_HEAD.unpack_from(item.regions[0], 4)
        place = self._place
        if (
            size != place.inode
            or count * size != blocks * place.block
            or count > max(_INODES_AT_ONCE, place.block // place.inode)
            or block + blocks > place.per_group
        ):
            raise damaged("its log has new inodes that make no sense")
        at = (group * place.per_group + block) * place.block
        step = place.cluster * place.block
        if any(self._cancelled[one // SECTOR, step // SECTOR] > 0 for one in range(at, at + count * size, step)):
            return  # they are given up further on, and something else may be there by now
        self._new -= count
        if self._new < 0:
            raise damaged("its log has more new inodes than it has room for")
        empty = b"IN\0\0\3".ljust(size, b"\0")
        for number in range(count):
            self._layer.write(at + number * size, empty)


def _buffer_of(item: _Item) -> tuple[int, int]:
    _, _, _, length, sector, _ = _BUFFER_HEAD.unpack_from(item.regions[0])
    return sector, length
