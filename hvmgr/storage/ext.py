"""Reads files of an ext2, ext3 or ext4 file system in a disk's bytes; nothing is mounted or run, and no root is needed.

Layout: Linux' Documentation/filesystems/ext4. Only what is at rest is read: a journal that waits to be played back is a
Conflict, a feature that is not known here Unsupported. Everything else that cannot be is Corrupt.
"""

from __future__ import annotations

import posixpath
import struct
import uuid
from collections.abc import Iterator
from typing import Protocol

from hvmgr import errors

_SUPER, _SUPER_SIZE, _MAGIC = 1024, 1024, 0xEF53
_COMPRESSED, _JOURNAL_WAITS, _JOURNAL_DEVICE, _META_GROUPS, _WIDE = 0x1, 0x4, 0x8, 0x10, 0x80
_KNOWN = 0x2 | 0x40 | _WIDE | 0x100 | 0x200 | 0x400 | 0x2000 | 0x4000 | 0x8000 | 0x10000 | 0x20000
_EXTENTS, _INLINE, _ENCRYPTED = 0x80000, 0x10000000, 0x800  # flags of an inode
_EXTENT_MAGIC, _UNWRITTEN = 0xF30A, 0x8000
_ROOT = 2
_FOLDER, _FILE, _LINK = 0x4000, 0x8000, 0xA000
_LINKS_MAX = 40
_FILE_MAX = 512 << 20  # nobody reads more than a kernel and its initramfs
_DEPTH_MAX = 5


class Disk(Protocol):
    """What is needed of a disk: its size, and its bytes."""

    @property
    def size(self) -> int:
        """Bytes."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole buffer with the bytes from ``offset``."""


class Inode:
    """One file, folder or link: its kind, its length, and where its blocks are."""

    def __init__(self, number: int, raw: bytes) -> None:
        self.number = number
        self.kind = struct.unpack_from("<H", raw)[0] & 0xF000
        (self.flags,) = struct.unpack_from("<I", raw, 32)
        self.map = raw[40:100]
        low, high = struct.unpack_from("<I", raw, 4)[0], struct.unpack_from("<I", raw, 108)[0]
        self.size = low | (high << 32 if self.kind == _FILE else 0)


def is_ext(disk: Disk, start: int = 0) -> bool:
    """Whether such a file system begins there."""
    return start + _SUPER + _SUPER_SIZE <= disk.size and _bytes(disk, start + _SUPER + 56, 2) == b"\x53\xef"


class FileSystem:
    """A file system that begins at byte ``start`` of a disk; ``what`` names it in sentences."""

    def __init__(self, disk: Disk, start: int, what: str) -> None:
        self._disk, self._start, self.what = disk, start, what
        if not is_ext(disk, start):
            raise errors.Unsupported(f"{what} is not ext2, ext3 or ext4")
        head = _bytes(disk, start + _SUPER, _SUPER_SIZE)
        (scale,) = struct.unpack_from("<I", head, 24)
        self._first, self._per_group = struct.unpack_from("<I", head, 20)[0], struct.unpack_from("<I", head, 40)[0]
        (self._inodes,) = struct.unpack_from("<I", head)
        revision, incompatible = struct.unpack_from("<I", head, 76)[0], struct.unpack_from("<I", head, 96)[0]
        self._inode_size = struct.unpack_from("<H", head, 88)[0] if revision else 128
        self._group_size = struct.unpack_from("<H", head, 254)[0] if incompatible & _WIDE else 32
        if scale > 6 or not self._per_group or self._inode_size < 128 or self._group_size < 32:
            raise self._corrupt("its superblock makes no sense")
        self._block = 1024 << scale
        if incompatible & _JOURNAL_WAITS:
            raise errors.Conflict(
                f"{what} was not unmounted cleanly", hint="start it once as a VM, and shut the system in it down"
            )
        if incompatible & ~_KNOWN:
            raise errors.Unsupported(f"{what} has features that are not read here: {incompatible & ~_KNOWN:#x}")
        self.uuid = str(uuid.UUID(bytes=head[104:120]))

    def listing(self, path: str) -> list[str]:
        """The names in a folder, sorted; none where there is no such folder."""
        inode = self._find(path)
        if inode is None or inode.kind != _FOLDER:
            return []
        return sorted(name for name in self._entries(inode) if name not in {".", ".."})

    def exists(self, path: str) -> bool:
        """Whether there is such a file or folder, links followed."""
        return self._find(path) is not None

    def read(self, path: str) -> bytes | None:
        """The bytes of a file, links followed; None where there is none."""
        inode = self._find(path)
        return self._content(inode) if inode is not None and inode.kind == _FILE else None

    # --- paths ---

    def _find(self, path: str) -> Inode | None:
        parts, inode, trail = _parts(path), self._inode(_ROOT), ""
        links = 0
        while parts:
            name = parts.pop(0)
            if inode.kind != _FOLDER:
                return None
            number = self._entries(inode).get(name)
            if number is None:
                return None
            found = self._inode(number)
            if found.kind != _LINK:
                inode, trail = found, f"{trail}/{name}"
                continue
            links += 1
            if links > _LINKS_MAX:
                return None
            # Texts of a link lead within the file system only, whatever they say.
            target = posixpath.normpath(posixpath.join(trail or "/", self._target(found)))
            parts, inode, trail = [*_parts(target), *parts], self._inode(_ROOT), ""
        return inode

    def _target(self, inode: Inode) -> str:
        raw = inode.map[: inode.size] if inode.size < 60 else self._content(inode)
        return raw.decode("utf-8", "surrogateescape")

    def _entries(self, inode: Inode) -> dict[str, int]:
        found, data, at = {}, self._content(inode), 0
        while at + 8 <= len(data):
            number, length, count = struct.unpack_from("<IHB", data, at)
            if length < 8 or length % 4:
                raise self._corrupt(f"the folder {inode.number} is damaged")
            if number and count:
                found[data[at + 8 : at + 8 + count].decode("utf-8", "surrogateescape")] = number
            at += length
        return found

    # --- inodes ---

    def _inode(self, number: int) -> Inode:
        if not 1 <= number <= self._inodes:
            raise self._corrupt(f"it names an inode {number}, which it does not have")
        group, index = divmod(number - 1, self._per_group)
        table = (self._first + 1) * self._block + group * self._group_size
        entry = self._bytes(table, self._group_size)
        (place,) = struct.unpack_from("<I", entry, 8)
        if self._group_size >= 64:
            place |= struct.unpack_from("<I", entry, 40)[0] << 32
        return Inode(number, self._bytes(place * self._block + index * self._inode_size, 128))

    def _content(self, inode: Inode) -> bytes:
        if inode.size > _FILE_MAX:
            raise errors.Unsupported(f"a file in {self.what} is larger than {_FILE_MAX >> 20} MiB")
        if inode.flags & (_INLINE | _ENCRYPTED):
            raise errors.Unsupported(f"a file in {self.what} is encrypted, or lies in its inode: that is not read here")
        data = bytearray(inode.size)
        view = memoryview(data)
        runs = self._extents(inode.map, 0) if inode.flags & _EXTENTS else self._mapped(inode)
        for logical, physical, count in runs:
            part = view[logical * self._block : (logical + count) * self._block]
            if part:
                self._read_into(physical * self._block, part)
        return bytes(data)

    def _extents(self, node: bytes, depth: int) -> Iterator[tuple[int, int, int]]:
        """(logical block, block, count) of an extent tree; what was reserved and never written is a hole."""
        magic, entries, _, level = struct.unpack_from("<HHHH", node)
        if magic != _EXTENT_MAGIC or depth > _DEPTH_MAX or 12 + entries * 12 > len(node):
            raise self._corrupt("the map of a file is damaged")
        for at in range(12, 12 + entries * 12, 12):
            if level:
                _, low, high = struct.unpack_from("<IIH", node, at)
                yield from self._extents(self._bytes((low | high << 32) * self._block, self._block), depth + 1)
                continue
            logical, count, high, low = struct.unpack_from("<IHHI", node, at)
            if count <= _UNWRITTEN:
                yield logical, low | high << 32, count

    def _mapped(self, inode: Inode) -> Iterator[tuple[int, int, int]]:
        """The same of the block maps of ext2 and ext3."""
        count = -(-inode.size // self._block)
        blocks = struct.unpack("<15I", inode.map)
        numbers: list[int] = list(blocks[:12])
        for level, block in enumerate(blocks[12:], 1):
            if len(numbers) < count:
                numbers += self._indirect(block, level, count - len(numbers))
        for logical, block in enumerate(numbers[:count]):
            if block:
                yield logical, block, 1

    def _indirect(self, block: int, level: int, wanted: int) -> list[int]:
        per = self._block // 4
        if not block:
            return [0] * min(wanted, per**level)
        below = struct.unpack(f"<{per}I", self._bytes(block * self._block, self._block))
        if level == 1:
            return list(below[:wanted])
        found: list[int] = []
        for one in below:
            if len(found) >= wanted:
                break
            found += self._indirect(one, level - 1, wanted - len(found))
        return found

    # --- bytes ---

    def _bytes(self, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        self._read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def _read_into(self, offset: int, buffer: memoryview) -> None:
        if self._start + offset + len(buffer) > self._disk.size:
            raise self._corrupt("it names a block behind the disk's end")
        self._disk.read_into(self._start + offset, buffer)

    def _corrupt(self, why: str) -> errors.Corrupt:
        return errors.Corrupt(f"{self.what} is damaged: {why}", hint="check it in the system itself, with e2fsck")


def _parts(path: str) -> list[str]:
    return [part for part in posixpath.normpath(f"/{path}").split("/") if part]


def _bytes(disk: Disk, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    disk.read_into(offset, memoryview(buffer))
    return bytes(buffer)
