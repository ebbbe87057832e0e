"""XFS, versions 4 and 5, read from bytes.

Source: "XFS Algorithms & Data Structures", 3rd edition. A log that has something to replay, as every snapshot of a running
guest has one, is replayed into a throw-away layer (``xfs_log``).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hvmgr import errors
from hvmgr.model.ranges import Range
from hvmgr.storage.filesystems import reader, xfs_attributes, xfs_log
from hvmgr.storage.filesystems.ext import type_of
from hvmgr.storage.filesystems.reader import Bytes, Content, Geometry, Node, Runs, Type, Watched, damaged
from hvmgr.storage.filesystems.window import Cached, Run
from hvmgr.storage.partitions import Disk

_DEVICE, _LOCAL, _EXTENTS, _BTREE = 0, 1, 2, 3
_FTYPE, _BIGTIME, _NREXT64, _KNOWN = 0x1, 0x8, 0x20, 0xFF
_FTYPE_4 = 0x200
_REALTIME = 1
_INODE_BIGTIME, _INODE_NREXT64 = 1 << 3, 1 << 4
_FOLDER_DATA_END = 1 << 35  # what lies behind it in a folder are indexes
_FREE = 0xFFFF
_DATA_MAGICS = {b"XD2D": 16, b"XD2B": 16, b"XDD3": 64, b"XDB3": 64}
_BLOCK_MAGICS = {b"XD2B", b"XDB3"}
_LINK_MAGIC, _LINK_HEADER, _LINK_MAX = b"XSLM", 56, 4096
_DEPTH_MAX, _ATTRIBUTE_BLOCKS_MAX = 9, 1 << 16
_CLUSTER, _SMALLEST = 8192, 256  # bytes of inodes that are written together; of a small inode
_EPOCH_BIG = (1 << 31) * 1_000_000_000
_LAST, _LAST_BIG = (1 << 31) * 1_000_000_000 - 1, (1 << 64) - 1 - _EPOCH_BIG


@dataclass(frozen=True, slots=True)
class _Super:
    block: int
    block_count: int
    root: int
    per_group: int
    groups: int
    inode: int
    inodes_log: int
    group_log: int
    cluster: int
    folder_block: int
    is_5: bool
    has_types: bool
    has_large_times: bool
    log_start: int
    log_size: int


@dataclass(frozen=True, slots=True)
class _Inode:
    number: int
    raw: bytes
    core: int
    mode: int
    format: int
    size: int
    data: bytes  # the data fork
    extents: int
    flags: int
    is_big: bool  # its times


class Xfs(Watched):
    """A volume with XFS."""

    ignores_case = False

    def __init__(self, disk: Disk) -> None:
        self.title = "hvmgr's own reader of XFS"
        self.notes: list[str] = []
        self._disk, self._cached = disk, Cached(disk)
        self._replaced: Sequence[Range] = ()
        with reader.parsing("its superblock"):
            self._super = _read_super(self._cached.read(0, 512), disk.size)
        with reader.parsing("its log"):
            self._replay()

    @property
    def last_time(self) -> int:
        """The last moment that it can keep, in nanoseconds since 1970."""
        return _LAST_BIG if self._super.has_large_times else _LAST

    # -- what a reader gives -------------------------------------------------------------------------------------

    def root(self) -> Node:
        return self.stat(self._super.root)

    def names(self, folder: Node) -> Iterator[tuple[bytes, Any]]:
        with reader.parsing(f"folder {folder.ref}"):
            inode = self._inode(folder.ref)
            found = self._short(inode) if inode.format == _LOCAL else self._long(inode)
            for name, number in found:
                if name not in {b".", b".."}:
                    yield name, number

    def _short(self, inode: _Inode) -> Iterator[tuple[bytes, int]]:
        count, wide = inode.data[0], inode.data[1] > 0
        width = 8 if wide else 4
        at = 2 + width
        for _ in range(count):
            length = inode.data[at]
            name = inode.data[at + 3 : at + 3 + length]
            at += 3 + length + int(self._super.has_types)
            yield name, struct.unpack_from(">Q" if wide else ">I", inode.data, at)[0]
            at += width

    def _long(self, inode: _Inode) -> Iterator[tuple[bytes, int]]:
        size = self._super.folder_block
        runs = self._runs(inode, min(inode.size, _FOLDER_DATA_END))
        for _, piece in Runs(self._cached, runs, sum(one.length for one in runs)).pieces():
            for at in range(0, len(piece) - size + 1, size):
                yield from self._block_entries(bytes(piece[at : at + size]), inode.number)

    def _block_entries(self, block: bytes, folder: int) -> Iterator[tuple[bytes, int]]:
        magic = block[:4]
        if magic not in _DATA_MAGICS:
            raise damaged(f"folder {folder} has a block that is none")
        at, end = _DATA_MAGICS[magic], len(block)
        if magic in _BLOCK_MAGICS:
            (count,) = struct.unpack_from(">I", block, len(block) - 8)
            end -= 8 + 8 * count
        while at + 8 <= end:
            if struct.unpack_from(">H", block, at)[0] == _FREE:
                length = struct.unpack_from(">H", block, at + 2)[0]
            else:
                number, name_length = struct.unpack_from(">QB", block, at)
                length = (11 + name_length + int(self._super.has_types) + 7) // 8 * 8
                if not name_length or at + length > end:
                    raise damaged(f"folder {folder} has an entry that makes no sense")
                yield block[at + 9 : at + 9 + name_length], number
            if length < 8:
                raise damaged(f"folder {folder} has an entry that makes no sense")
            at += length

    def stat(self, ref: Any) -> Node:
        with reader.parsing(f"inode {ref}"):
            return self._node(self._inode(ref))

    def _node(self, inode: _Inode) -> Node:
        raw = inode.raw
        uid, gid, links = struct.unpack_from(">III", raw, 8)
        (blocks,) = struct.unpack_from(">Q", raw, 64)
        kind = type_of(inode.mode, inode.number)
        return Node(
            id=inode.number,
            ref=inode.number,
            type=kind,
            size=inode.size if kind in {Type.FILE, Type.LINK, Type.FOLDER} else 0,
            mode=inode.mode & 0o7777,
            uid=uid,
            gid=gid,
            links=links,
            accessed=_time(inode, 32),
            modified=_time(inode, 40),
            changed=_time(inode, 48),
            born=_time(inode, 144) if inode.core > 100 else None,
            target=self._target(inode) if kind is Type.LINK else None,
            device=_device(inode.data) if kind in {Type.BLOCK, Type.CHARACTER} else None,
            used=blocks * self._super.block,
            generation=_generation(inode),
        )

    def _target(self, inode: _Inode) -> bytes:
        if inode.size > _LINK_MAX:
            raise damaged(f"the link {inode.number} has a target of {inode.size} bytes")
        if inode.format == _LOCAL:
            return inode.data[: inode.size]
        whole = b""
        for length, start in self._runs(inode, inode.size, whole=True):
            if start is None:
                raise damaged(f"the link {inode.number} has a target with a hole")
            for at in range(0, length, self._super.block):
                if len(whole) >= inode.size:
                    break
                block = self._cached.read(start + at, self._super.block)
                whole += block[_LINK_HEADER:] if block[:4] == _LINK_MAGIC else block
        return whole[: inode.size]

    def content(self, node: Node, stream: str = "") -> Content:
        if stream:
            raise errors.NotFound(f"XFS has no named streams, and so no '{stream}'")
        with reader.parsing(f"inode {node.ref}"):
            inode = self._inode(node.ref)
            if inode.flags & _REALTIME:
                raise errors.Unsupported("the file lies on a real-time device, which is another disk")
            if inode.format == _LOCAL:
                return Bytes(inode.data[: inode.size])
            return Runs(self._cached, self._runs(inode, inode.size), inode.size)

    def replaced(self) -> Sequence[Range]:
        return self._replaced

    def geometry(self) -> Geometry:
        about = self._super
        fixed = (about.block, about.inode, about.per_group, about.group_log, about.folder_block, about.root)
        return Geometry((*fixed, about.is_5, about.has_types))

    def extras(self, node: Node) -> Mapping[str, bytes]:
        with reader.parsing(f"the attributes of inode {node.ref}"):
            inode = self._inode(node.ref)
            fork, form = inode.raw[82] * 8, inode.raw[83]
            if not fork:
                return {}
            area = inode.raw[inode.core + fork :]
            if form == _LOCAL:
                return reader.nameable(xfs_attributes.of_short(area))
            (count,) = struct.unpack_from(">I", inode.raw, 76)
            if not self._has_many(inode):
                (count,) = struct.unpack_from(">H", inode.raw, 80)
            if not count:
                return {}  # there is room for them, and none
            places = dict[int, int]()
            blocks = 0
            for first, length, start, _ in self._extents(form, area, count, inode.number):
                blocks += length
                if blocks > _ATTRIBUTE_BLOCKS_MAX:
                    raise damaged("it has more extended attributes than any file can have")
                for one in range(length):
                    places[first + one] = start + one * self._super.block
            return reader.nameable(xfs_attributes.of_blocks(lambda number: self._attribute_block(places, number)))

    def _attribute_block(self, places: Mapping[int, int], number: int) -> bytes:
        if number not in places:
            raise damaged("an extended attribute lies nowhere")
        return self._cached.read(places[number], self._super.block)

    # -- inodes --------------------------------------------------------------------------------------------------

    def _inode(self, number: int) -> _Inode:
        about = self._super
        block, index = number >> about.inodes_log, number & (1 << about.inodes_log) - 1
        at = self._place(block) + index * about.inode
        raw = self._cached.read(at, about.inode)
        magic, mode, version, form = struct.unpack_from(">2sHBB", raw)
        core = 176 if version == 3 else 100
        if (
            magic != b"IN"
            or form > _BTREE
            or not mode
            or (core == 176 and struct.unpack_from(">Q", raw, 152)[0] != number)
        ):
            raise damaged(f"there is no inode {number}")
        (size,) = struct.unpack_from(">Q", raw, 56)
        (flags,) = struct.unpack_from(">H", raw, 90)
        (more,) = struct.unpack_from(">Q", raw, 120) if core == 176 else (0,)
        (count,) = struct.unpack_from(">Q", raw, 24) if more & _INODE_NREXT64 else struct.unpack_from(">I", raw, 76)
        fork = raw[82] * 8
        data = raw[core : core + fork] if fork else raw[core:]
        return _Inode(number, raw, core, mode, form, size, data, count, flags, bool(more & _INODE_BIGTIME))

    def _has_many(self, inode: _Inode) -> bool:
        return inode.core == 176 and bool(struct.unpack_from(">Q", inode.raw, 120)[0] & _INODE_NREXT64)

    def _place(self, block: int) -> int:
        """Where a block is that is named by its group and its number there."""
        about = self._super
        group, inside = block >> about.group_log, block & (1 << about.group_log) - 1
        place = group * about.per_group + inside
        if group >= about.groups or inside >= about.per_group or place >= about.block_count:
            raise damaged(f"there is no block {block}")
        return place * about.block

    # -- where contents lie --------------------------------------------------------------------------------------

    def _runs(self, inode: _Inode, size: int, *, whole: bool = False) -> list[Run]:
        """Up to ``size``; ``whole``: all there are, whatever the size says."""
        block = self._super.block
        limit = (1 << 54) if whole else -(-size // block)
        runs: list[Run] = []
        at = 0
        for first, count, start, unwritten in self._extents(inode.format, inode.data, inode.extents, inode.number):
            if first >= limit:
                break
            if first < at:
                raise damaged(f"inode {inode.number} has overlapping extents")
            if first > at:
                runs.append(Run((first - at) * block, None))
            at = min(first + count, limit)
            runs.append(Run((at - first) * block, None if unwritten else start))
        if at < limit and not whole:
            runs.append(Run((limit - at) * block, None))
        return runs

    def _extents(self, form: int, fork: bytes, count: int, number: int) -> Iterator[tuple[int, int, int, bool]]:
        """From which block of the content on, how many blocks, where, and whether they were never written."""
        if form == _EXTENTS:
            if 16 * count > len(fork):
                raise damaged(f"the extents of inode {number} make no sense")
            yield from self._packed(fork, count)
        elif form == _BTREE:
            level, records = struct.unpack_from(">HH", fork)
            pointers = 4 + (len(fork) - 4) // 16 * 8
            if not 0 < level <= _DEPTH_MAX or pointers + 8 * records > len(fork):
                raise damaged(f"the extents of inode {number} make no sense")
            seen = set[int]()
            for one in struct.unpack_from(f">{records}Q", fork, pointers):
                yield from self._tree(one, level - 1, seen)
        else:
            raise damaged(f"inode {number} has no extents")

    def _tree(self, block: int, level: int, seen: set[int]) -> Iterator[tuple[int, int, int, bool]]:
        if block in seen:  # so the work ends where the disk does
            raise damaged(f"the block {block} is in two places of a file")
        seen.add(block)
        raw = self._cached.read(self._place(block), self._super.block)
        magic, own, records = struct.unpack_from(">4sHH", raw)
        header = 72 if magic == b"BMA3" else 24
        if magic not in {b"BMA3", b"BMAP"} or own != level or not records or header + 16 * records > len(raw):
            raise damaged("the extents of a file make no sense")
        if level == 0:
            yield from self._packed(raw[header:], records)
            return
        pointers = header + (len(raw) - header) // 16 * 8
        for one in struct.unpack_from(f">{records}Q", raw, pointers):
            yield from self._tree(one, level - 1, seen)

    def _packed(self, raw: bytes, count: int) -> Iterator[tuple[int, int, int, bool]]:
        for one in range(count):
            high, low = struct.unpack_from(">QQ", raw, 16 * one)
            if not low & 0x1FFFFF:
                raise damaged("a file has an extent of nothing")
            start = (high & 0x1FF) << 43 | low >> 21
            yield high >> 9 & (1 << 54) - 1, low & 0x1FFFFF, self._place(start), bool(high >> 63)

    # -- the log -------------------------------------------------------------------------------------------------

    def _replay(self) -> None:
        about = self._super
        if not about.log_start:
            self.notes.append("its log is on another device: what it holds, if anything, is not seen")
            return
        log = xfs_log.Place(
            start=self._place(about.log_start),
            size=about.log_size,
            inode=about.inode,
            block=about.block,
            per_group=about.per_group,
            cluster=about.cluster,
            is_5=about.is_5,
        )
        found = xfs_log.replayed(self._disk, log)
        self.notes += found.notes
        if found.disk is not None:
            self._disk, self._cached = found.disk, Cached(found.disk)
            self._replaced = found.disk.ranges()
            self._super = _read_super(self._cached.read(0, 512), found.disk.size)


def _read_super(raw: bytes, size: int) -> _Super:
    magic, block, blocks = struct.unpack_from(">4sIQ", raw)
    log_start, root = struct.unpack_from(">QQ", raw, 48)
    per_group, groups, _, log_blocks = struct.unpack_from(">IIII", raw, 84)
    version, _, inode = struct.unpack_from(">HHH", raw, 100)
    block_log, _, _, inodes_log, group_log = struct.unpack_from(">5B", raw, 120)
    (alignment,) = struct.unpack_from(">I", raw, 180)
    features_2, incompatible = struct.unpack_from(">I", raw, 200)[0], struct.unpack_from(">I", raw, 216)[0]
    is_5 = version & 15 == 5
    is_sane = (
        magic == b"XFSB"
        and version & 15 in {4, 5}
        and 9 <= block_log <= 16
        and block == 1 << block_log
        and 256 <= inode <= 2048
        and per_group <= 1 << group_log
        and group_log < 32
        and raw[192] + block_log <= 16
        and inode << inodes_log == block
    )
    if not is_sane or blocks * block > size + block:
        raise damaged("its superblock makes no sense")
    if is_5 and incompatible & ~_KNOWN:
        raise errors.Unsupported("this XFS file system has features that no reader here knows")
    return _Super(
        block=block,
        block_count=blocks,
        root=root,
        per_group=per_group,
        groups=groups,
        inode=inode,
        inodes_log=inodes_log,
        group_log=group_log,
        cluster=_cluster(block, inode if is_5 else 0, alignment),
        folder_block=block << raw[192],
        is_5=is_5,
        has_types=bool(incompatible & _FTYPE if is_5 else features_2 & _FTYPE_4),
        has_large_times=is_5 and bool(incompatible & _BIGTIME),
        log_start=log_start,
        log_size=log_blocks * block,
    )


def _cluster(block: int, inode: int, alignment: int) -> int:
    """How many blocks of inodes are written together; ``inode`` is 0 in the old format."""
    size = _CLUSTER
    if inode and alignment >= size * inode // _SMALLEST // block:
        size = size * inode // _SMALLEST
    return max(1, size // block)


def _time(inode: _Inode, at: int) -> int:
    if inode.is_big:
        big: int = struct.unpack_from(">Q", inode.raw, at)[0]
        return big - _EPOCH_BIG
    seconds, nanoseconds = struct.unpack_from(">iI", inode.raw, at)
    whole: int = seconds * 1_000_000_000 + nanoseconds
    return whole


def _generation(inode: _Inode) -> int | None:
    """A random number that each use of an inode has, and its time of birth."""
    (number,) = struct.unpack_from(">I", inode.raw, 92)
    born = struct.unpack_from(">Q", inode.raw, 144)[0] if inode.core > 100 else 0
    return number | born << 32 or None


def _device(data: bytes) -> tuple[int, int]:
    (number,) = struct.unpack_from(">I", data)
    return number >> 18 & 0x3FFF, number & 0x3FFFF
