"""ext2, ext3 and ext4, read from bytes.

Source: "ext4 Data Structures and Algorithms" (kernel documentation, filesystems/ext4). A journal that was not replayed,
as every snapshot of a running guest has one, is replayed into a throw-away layer (``ext_journal``).
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hvmgr import errors
from hvmgr.model.ranges import Range
from hvmgr.storage.filesystems import ext_attributes, ext_journal, reader
from hvmgr.storage.filesystems.ext_fast_commits import Changes
from hvmgr.storage.filesystems.reader import Bytes, Content, Geometry, Node, Runs, Type, Watched, damaged
from hvmgr.storage.filesystems.window import Cached, Run
from hvmgr.storage.partitions import Disk

_ROOT = 2
_MAGIC = 0xEF53
_RECOVER, _META_BG, _64BIT, _LARGE_FOLDERS = 0x4, 0x10, 0x80, 0x4000
_REFUSED = {0x1: "compression", 0x8: "being the journal of another file system", 0x1000: "data in folders"}
_QUOTA = 0x100
_SPARSE_SUPER, _SPARSE_SUPER2 = 0x1, 0x200
_FLAG_ENCRYPTED, _FLAG_EXTENTS, _FLAG_EA_INODE, _FLAG_INLINE = 0x800, 0x80000, 0x200000, 0x10000000
_EXTENT_MAGIC, _EXTENT_DEPTH = 0xF30A, 5
_UNWRITTEN = 0x8000
_ENTRY = struct.Struct("<IHBB")
_INODE = struct.Struct("<HHIIIIIHHII4x60s8xII")
_FOLDER_MAX = 2 << 30
TYPES = {
    stat.S_IFREG: Type.FILE,
    stat.S_IFDIR: Type.FOLDER,
    stat.S_IFLNK: Type.LINK,
    stat.S_IFBLK: Type.BLOCK,
    stat.S_IFCHR: Type.CHARACTER,
    stat.S_IFIFO: Type.PIPE,
    stat.S_IFSOCK: Type.SOCKET,
}


def type_of(mode: int, number: int) -> Type:
    """What an inode is; Corrupt for one that is free, or of a kind that nobody knows: no name may lead to it."""
    kind = TYPES.get(stat.S_IFMT(mode))
    if kind is None:
        raise damaged(f"inode {number} is free, or of no known type")
    return kind


@dataclass(frozen=True, slots=True)
class _Super:
    """What the superblock says."""

    inode_count: int
    block_count: int
    first_block: int
    block: int
    per_group: int
    inodes_per_group: int
    inode_size: int
    compatible: int
    incompatible: int
    read_only: int
    journal: int
    descriptor: int
    first_meta_group: int
    backups: tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Inode:
    number: int
    raw: bytes
    mode: int
    size: int
    flags: int
    data: bytes  # the 60 bytes that hold block numbers, extents or a short content


class Ext(Watched):
    """A volume with ext2, ext3 or ext4."""

    ignores_case = False

    def __init__(self, disk: Disk) -> None:
        self.notes: list[str] = []
        self.title = "hvmgr's own reader of ext2/3/4"
        self._disk: Disk = disk
        self._cached = Cached(disk)
        with reader.parsing("its superblock"):
            self._super = _read_super(self._cached.read(1024, 1024))
        self._tables: dict[int, int] = {}
        self._fast = Changes()
        self._replaced: Sequence[Range] = ()
        if self._super.incompatible & _RECOVER:
            with reader.parsing("its journal"):
                self._replay()

    @property
    def has_quota(self) -> bool:
        """Whether it counts in hidden files whose the space is."""
        return bool(self._super.read_only & _QUOTA)

    def _replay(self) -> None:
        if not self._super.journal:
            self.notes.append("the file system was not unmounted cleanly, and its journal is on another device")
            return
        inode = self._inode(self._super.journal)
        found = ext_journal.replayed(self._disk, self._runs(inode), inode.size, self._super.block)
        self._fast = found.fast
        if found.disk is not None:
            self._disk, self._cached = found.disk, Cached(found.disk)
            self._replaced = found.disk.ranges()
            self._tables.clear()
            self._super = _read_super(self._cached.read(1024, 1024))
        if found.disk is not None or found.fast:
            self.notes.append("the journal was replayed in memory: the file system had not been unmounted")

    # -- what a reader gives -------------------------------------------------------------------------------------

    def root(self) -> Node:
        return self.stat(_ROOT)

    def names(self, folder: Node) -> Iterator[tuple[bytes, Any]]:
        changed = self._fast.names.get(folder.ref, {})
        for name, number in self._names(folder):
            if name not in changed:
                yield name, number
        yield from ((name, number) for name, number in changed.items() if number is not None)

    def _names(self, folder: Node) -> Iterator[tuple[bytes, int]]:
        with reader.parsing(f"folder {folder.ref}"):
            inode = self._inode(folder.ref)
            if inode.flags & _FLAG_ENCRYPTED:
                raise errors.Unsupported("this folder is encrypted (fscrypt), and its key is only in the guest")
            if inode.flags & _FLAG_INLINE:
                rest = self._attributes(inode).get("system.data", b"")
                for part in (inode.data[4:], rest):
                    yield from self._entries(part, folder.ref)
                return
            if inode.size > _FOLDER_MAX:
                raise damaged(f"folder {folder.ref} has {inode.size} bytes")
            content = Runs(self._cached, self._runs(inode), inode.size)
            for _, piece in content.pieces():
                for at in range(0, len(piece), self._super.block):
                    yield from self._entries(bytes(piece[at : at + self._super.block]), folder.ref)

    def _entries(self, block: bytes, folder: int) -> Iterator[tuple[bytes, int]]:
        at = 0
        while at + 8 <= len(block):
            number, length, name_length, _ = _ENTRY.unpack_from(block, at)
            length = length if length not in {0, 0xFFFF} else 0x10000
            if length < 8 or length % 4 or (number and 8 + name_length > length):
                raise damaged(f"folder {folder} has an entry that makes no sense")
            name = block[at + 8 : at + 8 + name_length]
            if number and name_length and name not in {b".", b".."}:
                yield name, number
            at += length

    def stat(self, ref: Any) -> Node:
        with reader.parsing(f"inode {ref}"):
            return self._node(self._inode(ref))

    def _node(self, inode: _Inode) -> Node:
        raw, number = inode.raw, inode.number
        _, uid, _, atime, ctime, mtime, _, gid, links, blocks, *_ = _INODE.unpack_from(raw)
        blocks_high, _, uid_high, gid_high = struct.unpack_from("<HHHH", raw, 116)
        extra = struct.unpack_from("<H", raw, 128)[0] if len(raw) > 128 else 0
        kind = type_of(inode.mode, number)
        target = self._target(inode) if kind is Type.LINK else None
        unit = self._super.block if inode.flags & 0x40000 else 512
        return Node(
            id=number,
            ref=number,
            type=kind,
            size=inode.size if kind in {Type.FILE, Type.LINK, Type.FOLDER} else 0,
            mode=inode.mode & 0o7777,
            uid=uid | uid_high << 16,
            gid=gid | gid_high << 16,
            links=links,
            accessed=_time(raw, atime, extra, 140),
            changed=_time(raw, ctime, extra, 132),
            modified=_time(raw, mtime, extra, 136),
            born=_time(raw, struct.unpack_from("<i", raw, 144)[0], extra, 148) if extra >= 24 else None,
            target=target,
            device=_device(inode.data) if kind in {Type.BLOCK, Type.CHARACTER} else None,
            attributes=("encrypted",) if inode.flags & _FLAG_ENCRYPTED else (),
            used=(blocks | blocks_high << 32) * unit,
            generation=_generation(raw, extra),
        )

    def _target(self, inode: _Inode) -> bytes:
        if inode.flags & _FLAG_ENCRYPTED:
            return b""
        if inode.size > 65536:
            raise damaged(f"the link {inode.number} has a target of {inode.size} bytes")
        if inode.size < 60 and not inode.flags & (_FLAG_EXTENTS | _FLAG_INLINE):
            return inode.data[: inode.size]
        return reader.whole(self._content(inode), 65536)

    def content(self, node: Node, stream: str = "") -> Content:
        found = self.stored(node, stream)
        if "encrypted" in node.attributes:
            raise errors.Unsupported("this file is encrypted (fscrypt), and its key is only in the guest")
        return found

    def stored(self, node: Node, stream: str = "") -> Content:
        if stream:
            raise errors.NotFound(f"ext file systems have no named streams, and so no '{stream}'")
        with reader.parsing(f"inode {node.ref}"):
            return self._content(self._inode(node.ref))

    def geometry(self) -> Geometry | None:
        if self._fast:
            return None  # what its fast commits changed is in memory alone
        about = self._super
        with reader.parsing("its groups"):
            groups = -(-(about.block_count - about.first_block) // about.per_group)
            tables = tuple(self._table(group) for group in range(groups))
        fixed = (about.block, about.inode_size, about.inodes_per_group, about.incompatible & ~_RECOVER)
        return Geometry(fixed, tables)

    def replaced(self) -> Sequence[Range]:
        return self._replaced

    def _content(self, inode: _Inode) -> Content:
        if inode.flags & _FLAG_INLINE:
            rest = self._attributes(inode).get("system.data", b"") if inode.size > 60 else b""
            return Bytes((inode.data + rest)[: inode.size].ljust(min(inode.size, 65536), b"\0"))
        return Runs(self._cached, self._runs(inode), inode.size)

    def extras(self, node: Node) -> Mapping[str, bytes]:
        with reader.parsing(f"the attributes of inode {node.ref}"):
            found = self._attributes(self._inode(node.ref))
        found.pop("system.data", None)
        return reader.nameable(found)

    # -- inodes --------------------------------------------------------------------------------------------------

    def _inode(self, number: int) -> _Inode:
        about = self._super
        if not 0 < number <= about.inode_count:
            raise damaged(f"there is no inode {number}")
        group, index = divmod(number - 1, about.inodes_per_group)
        at = self._table(group) * about.block + index * about.inode_size
        raw = self._cached.read(at, about.inode_size)
        if len(raw) < about.inode_size:
            raise damaged(f"inode {number} lies behind the end")
        raw = self._fast.inode(number, raw)
        mode, _, size, _, _, _, _, _, _, _, flags, data, size_high, _ = _INODE.unpack_from(raw)
        if stat.S_ISREG(mode) or about.incompatible & _LARGE_FOLDERS:  # of others these bytes mean something else
            size |= size_high << 32
        return _Inode(number, raw, mode, size, flags, data)

    def _table(self, group: int) -> int:
        """The block where a group's inodes begin."""
        found = self._tables.get(group)
        if found is None:
            about = self._super
            per_block = about.block // about.descriptor
            block, index = divmod(group, per_block)
            if about.incompatible & _META_BG and block >= about.first_meta_group:
                first = block * per_block
                place = about.first_block + first * about.per_group + (1 if _has_backup(about, first) else 0)
            else:
                place = about.first_block + 1 + block
            raw = self._cached.read(place * about.block + index * about.descriptor, about.descriptor)
            low = struct.unpack_from("<I", raw, 8)[0]
            high = struct.unpack_from("<I", raw, 40)[0] if about.descriptor >= 64 else 0
            found = self._tables[group] = low | high << 32
            if not 0 < found < about.block_count:
                raise damaged(f"the inodes of group {group} lie outside of it")
        return found

    # -- where contents lie --------------------------------------------------------------------------------------

    def _runs(self, inode: _Inode) -> list[Run]:
        block = self._super.block
        last = -(-inode.size // block)
        pieces = self._extents(inode) if inode.flags & _FLAG_EXTENTS else self._mapped(inode, last)
        pieces = iter(self._fast.content(inode.number, pieces))
        runs: list[Run] = []
        at = 0
        for first, count, place in pieces:
            if first >= last:
                break
            if first < at:
                raise damaged(f"inode {inode.number} has overlapping extents")
            if first > at:
                runs.append(Run((first - at) * block, None))
            at = min(first + count, last)
            runs.append(Run((at - first) * block, None if place is None else place * block))
        if at < last:
            runs.append(Run((last - at) * block, None))
        return runs

    def _extents(self, inode: _Inode) -> Iterator[tuple[int, int, int | None]]:
        yield from self._extent_node(inode.number, inode.data, _EXTENT_DEPTH + 1, set())

    def _extent_node(
        self, number: int, node: bytes, below: int, seen: set[int]
    ) -> Iterator[tuple[int, int, int | None]]:
        magic, count, _, depth = struct.unpack_from("<HHHH", node)
        if magic != _EXTENT_MAGIC or depth >= below or 12 * (count + 1) > len(node):
            raise damaged(f"the extents of inode {number} make no sense")
        for one in range(1, count + 1):
            if depth == 0:
                first, length, high, low = struct.unpack_from("<IHHI", node, 12 * one)
                if not length:
                    raise damaged(f"inode {number} has an extent of nothing")
                unwritten = length > _UNWRITTEN
                yield first, length - _UNWRITTEN if unwritten else length, None if unwritten else low | high << 32
            else:
                _, low, high = struct.unpack_from("<IIH", node, 12 * one)
                yield from self._extent_node(number, self._once(low | high << 32, seen), depth, seen)

    def _mapped(self, inode: _Inode, last: int) -> Iterator[tuple[int, int, int | None]]:
        """The block numbers of ext2: twelve, then one, two and three steps away."""
        numbers = struct.unpack("<15I", inode.data)
        at = 0
        for number in numbers[:12]:
            yield at, 1, number or None
            at += 1
        per_block = self._super.block // 4
        seen = set[int]()
        for depth, number in enumerate(numbers[12:], 1):
            if at >= last:
                return
            yield from self._indirect(number, depth, at, last, seen)
            at += per_block**depth

    def _indirect(
        self, block: int, depth: int, at: int, last: int, seen: set[int]
    ) -> Iterator[tuple[int, int, int | None]]:
        per_block = self._super.block // 4
        if block == 0:
            yield at, per_block**depth, None
            return
        if depth == 0:
            yield at, 1, block
            return
        for number in struct.unpack(f"<{per_block}I", self._once(block, seen)):
            if at >= last:
                return
            yield from self._indirect(number, depth - 1, at, last, seen)
            at += per_block ** (depth - 1)

    def _once(self, number: int, seen: set[int]) -> bytes:
        """A block that leads to others, of which no file has one twice: so the work ends where the disk does."""
        if number in seen:
            raise damaged(f"the block {number} is in two places of a file")
        seen.add(number)
        return self._block(number)

    def _block(self, number: int) -> bytes:
        if not 0 < number < self._super.block_count:
            raise damaged(f"there is no block {number}")
        return self._cached.read(number * self._super.block, self._super.block)

    # -- extended attributes -------------------------------------------------------------------------------------

    def _attributes(self, inode: _Inode) -> dict[str, bytes]:
        raw = inode.raw
        found = ext_attributes.of_inode(raw, self._large_value)
        (low,) = struct.unpack_from("<I", raw, 104)
        (high,) = struct.unpack_from("<H", raw, 118)
        if place := low | high << 32 if self._super.incompatible & _64BIT else low:
            found |= ext_attributes.of_block(self._block(place), self._large_value)
        return found

    def _large_value(self, number: int, size: int) -> bytes:
        inode = self._inode(number)
        if not inode.flags & _FLAG_EA_INODE or inode.size != size:
            raise damaged(f"inode {number} holds no extended attribute")
        return reader.whole(Runs(self._cached, self._runs(inode), size), 64 << 10)


def _read_super(raw: bytes) -> _Super:
    fields = struct.unpack_from("<II12xII4xI4xI", raw)
    inode_count, blocks_low, first_block, log_block, per_group, inodes_per_group = fields
    (magic,) = struct.unpack_from("<H", raw, 56)
    (revision,) = struct.unpack_from("<I", raw, 76)
    (inode_size,) = struct.unpack_from("<H", raw, 88)
    compatible, incompatible, read_only = struct.unpack_from("<III", raw, 92)
    if magic != _MAGIC or log_block > 6 or not per_group or not inodes_per_group:
        raise damaged("its superblock makes no sense")
    for flag, what in _REFUSED.items():
        if incompatible & flag:
            raise errors.Unsupported(
                f"this ext file system uses {what}, which no reader here knows",
                hint="libguestfs may know it: --reader libguestfs",
            )
    inode_size = inode_size if revision else 128
    block = 1024 << log_block
    is_64 = bool(incompatible & _64BIT)
    descriptor = struct.unpack_from("<H", raw, 254)[0] if is_64 else 32
    if not (128 <= inode_size <= block and 32 <= descriptor <= block) or inode_size & (inode_size - 1):
        raise damaged("its superblock makes no sense")
    return _Super(
        inode_count=inode_count,
        block_count=blocks_low | (struct.unpack_from("<I", raw, 336)[0] << 32 if is_64 else 0),
        first_block=first_block or int(block == 1024),  # bigalloc counts from 0 where the superblock is in block 1
        block=block,
        per_group=per_group,
        inodes_per_group=inodes_per_group,
        inode_size=inode_size,
        compatible=compatible,
        incompatible=incompatible,
        read_only=read_only,
        journal=struct.unpack_from("<I", raw, 224)[0],
        descriptor=descriptor,
        first_meta_group=struct.unpack_from("<I", raw, 260)[0],
        backups=struct.unpack_from("<II", raw, 588),
    )


def _has_backup(about: _Super, group: int) -> bool:
    if group == 0:
        return True
    if about.compatible & _SPARSE_SUPER2:
        return group in about.backups
    if group == 1 or not about.read_only & _SPARSE_SUPER:
        return True
    for base in (3, 5, 7):
        power = base
        while power < group:
            power *= base
        if power == group:
            return True
    return False


def _time(raw: bytes, seconds: int, extra: int, at: int) -> int:
    signed = seconds - (1 << 32) if seconds & 0x80000000 and seconds > 0 else seconds
    if at + 4 > 128 + extra:
        return signed * 1_000_000_000
    more: int = struct.unpack_from("<I", raw, at)[0]
    return (signed + ((more & 3) << 32)) * 1_000_000_000 + (more >> 2)


def _generation(raw: bytes, extra: int) -> int | None:
    """A random number that each use of an inode has, and its time of birth; some tools leave one of them out."""
    (number,) = struct.unpack_from("<I", raw, 100)
    born = struct.unpack_from("<II", raw, 144) if extra >= 24 else (0, 0)
    return number | born[0] << 32 | born[1] << 64 or None


def _device(data: bytes) -> tuple[int, int]:
    old, new = struct.unpack_from("<II", data)
    if old:
        return old >> 8 & 0xFF, old & 0xFF
    return new >> 8 & 0xFFF, (new & 0xFF) | (new >> 12 & 0xFFF00)
