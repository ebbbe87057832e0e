"""Btrfs on one device, read from bytes: subvolumes, inline and compressed extents, attributes.

Source: "Btrfs on-disk format" of the Btrfs documentation. The tree of the last commit is read, which is whole by design; what
single files were synced since then lies in a log, which is put over it in memory (``btrfs_log``).
"""

from __future__ import annotations

import bisect
import functools
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from hvmgr import errors
from hvmgr.model.ranges import Range
from hvmgr.storage.filesystems import btrfs_data, btrfs_leaves, btrfs_log, reader
from hvmgr.storage.filesystems.btrfs_data import Extent, Extents
from hvmgr.storage.filesystems.ext import type_of
from hvmgr.storage.filesystems.reader import Content, Node, Reader, Type, Watched, damaged
from hvmgr.storage.filesystems.window import Cached
from hvmgr.storage.partitions import Disk

_SUPER, _KNOWN = 64 << 10, 0x1FFF
_ROOT_TREE, _TOP, _FIRST, _ROOT_FOLDER = 1, 5, 256, 6
_INODE, _XATTR, _DIR, _DIR_INDEX, _EXTENT, _ROOT, _ROOT_REFERENCE, _CHUNK = 1, 24, 84, 96, 108, 132, 156, 228
_EMPTY = 0  # in place of a subvolume's number: a folder that holds nothing
_KEY, _ITEM, _POINTER = struct.Struct("<QBQ"), struct.Struct("<QBQII"), struct.Struct("<QBQQQ")
_HEADER = 101
_STRIPED = 0x8 | 0x40 | 0x80 | 0x100
_DEPTH_MAX, _REMEMBERED = 8, 256
_CHUNKS_MAX = 1 << 20
_LAST = (1 << 64) - 1
_LOG, _LOGGED_MAX = (1 << 64) - 6, 1 << 20


class _Key(NamedTuple):
    object: int
    type: int
    offset: int


@dataclass(frozen=True, slots=True)
class _Chunk:
    start: int
    length: int
    place: int | None  # None: on another device, or spread


@dataclass(frozen=True, slots=True)
class _Block:
    """A node of a tree: in a leaf, each key with where its data is; else with the block below."""

    keys: list[_Key]
    level: int
    places: list[tuple[int, int]]
    raw: bytes


@dataclass(frozen=True, slots=True)
class _Tree:
    root: int
    level: int


class Btrfs(Watched):
    """A volume with Btrfs. A file's ``ref`` is its subvolume and its number there.

    Each change anywhere makes a new way from the root to every file. What an answer follows from is therefore the leaves alone,
    and ``departed`` tells the leaves that are not where they were, in their place among the others (``btrfs_leaves``).
    """

    ignores_case = False

    def __init__(self, disk: Disk) -> None:
        self.title = "hvmgr's own reader of Btrfs"
        self.notes: list[str] = []
        self._disk, self._cached = disk, Cached(disk)
        self._blocks: dict[int, _Block] = {}
        self._trees: dict[int, _Tree] = {}
        self._changed: dict[tuple[int, int, int], btrfs_log.Items] = {}
        with reader.parsing("its superblock"):
            self._read_super(self._cached.read(_SUPER, 4096))
        with reader.parsing("its trees"):
            self._read_chunks()
            self._start = _TOP
            self._start = self._default()
        if self._log is not None:
            self._replay(self._log)

    def _read_super(self, raw: bytes) -> None:
        if raw[64:72] != b"_BHRfS_M":
            raise damaged("its superblock makes no sense")
        root, chunks, log = struct.unpack_from("<QQQ", raw, 0x50)
        devices, self._sector, self._node = struct.unpack_from("<QII", raw, 0x88)
        (size,) = struct.unpack_from("<I", raw, 0xA0)
        (incompatible,) = struct.unpack_from("<Q", raw, 0xBC)
        root_level, chunk_level, log_level = struct.unpack_from("<BBB", raw, 0xC6)
        (self._device,) = struct.unpack_from("<Q", raw, 0xC9)
        if incompatible & ~_KNOWN:
            raise errors.Unsupported("this Btrfs file system has features that no reader here knows")
        if not 4096 <= self._node <= 64 << 10 or self._node & (self._node - 1) or size > 2048 or not self._sector:
            raise damaged("its superblock makes no sense")
        self._chunks: list[_Chunk] = []
        self._chunk_tree = _Tree(chunks, chunk_level)
        self._trees[_ROOT_TREE] = _Tree(root, root_level)
        at, end = 0x32B, 0x32B + size
        while at + _KEY.size + 48 <= end:
            key = _Key(*_KEY.unpack_from(raw, at))
            at += _KEY.size
            (stripes,) = struct.unpack_from("<H", raw, at + 44)
            self._add_chunk(key.offset, raw[at : at + 48 + 32 * stripes])
            at += 48 + 32 * stripes
        if devices > 1:
            self.notes.append(
                f"the Btrfs file system lies on {devices} devices, of which this is one: what is on others is not seen"
            )
        self._log = _Tree(log, log_level) if log else None

    def _replay(self, log: _Tree) -> None:
        """The log is put over the trees; one that makes no sense is left out, for they are whole without it."""
        try:
            with reader.parsing("its log"):
                changed: dict[tuple[int, int, int], btrfs_log.Items] = {}
                for key, data in self._range(log, _Key(_LOG, _ROOT, 0), _Key(_LOG, _ROOT, _LAST)):
                    tree = _Tree(struct.unpack_from("<Q", data, 176)[0], data[238])
                    items = ((*one, content) for one, content in self._logged(tree))
                    done = btrfs_log.Replay(functools.partial(self._as_committed, key.offset), items, self._sector)
                    changed |= {(key.offset, *what): found for what, found in done.changed.items()}
        except (errors.Corrupt, errors.Unsupported) as error:
            self.notes.append(f"{error.message}: what single files were synced since its last commit is not seen")
            return
        self._changed = changed
        self.notes.append("the log was replayed in memory: the file system had not been unmounted")

    def _logged(self, tree: _Tree) -> Iterator[tuple[_Key, bytes]]:
        for count, one in enumerate(self._range(tree, _Key(0, 0, 0), _Key(_LAST, 255, _LAST))):
            if count >= _LOGGED_MAX:
                raise damaged("its log has too many items")
            yield one

    def _as_committed(self, tree: int, number: int, kind: int) -> btrfs_log.Items:
        return {key.offset: data for key, data in self._items(tree, number, kind)}

    # -- what a reader gives -------------------------------------------------------------------------------------

    def root(self) -> Node:
        return self.stat((self._start, _FIRST))

    def names(self, folder: Node) -> Iterator[tuple[bytes, Any]]:
        tree, number = folder.ref
        if tree == _EMPTY:
            return
        with reader.parsing(f"folder {number}"):
            for _, data in self._items(tree, number, _DIR_INDEX):
                place, name, _ = _entry(data)
                if name in {b".", b".."}:
                    continue
                if place.type == _ROOT:
                    # In a snapshot the name of a subvolume that was left out of it is an empty folder.
                    belongs = self._belongs(tree, number, place.object, name)
                    yield (
                        name,
                        (place.object, _FIRST) if belongs else (_EMPTY, (tree << 64 | number) << 64 | place.object),
                    )
                else:
                    yield name, (tree, place.object)

    def _belongs(self, tree: int, folder: int, child: int, name: bytes) -> bool:
        """Whether a subvolume is really at this name, as its reference in the tree of roots says."""
        for key, data in self._items(_ROOT_TREE, tree, _ROOT_REFERENCE):
            if key.offset == child and struct.unpack_from("<Q", data)[0] == folder and data[18:] == name:
                return self._find_tree(child) is not None
        return False

    def stat(self, ref: Any) -> Node:
        tree, number = ref
        if tree == _EMPTY:
            return Node(id=-number, ref=ref, type=Type.FOLDER, size=0)
        with reader.parsing(f"inode {number}"):
            raw = self._inode(tree, number)
            size, used, _, links, uid, gid, mode, device = struct.unpack_from("<QQQIIIIQ", raw, 16)
            kind = type_of(mode, number)
            target = None
            if kind is Type.LINK:
                target = reader.whole(self._content(tree, number, size), 4096)
            return Node(
                id=number if tree == self._start else tree << 64 | number,
                ref=ref,
                type=kind,
                size=size if kind is not Type.FOLDER else 0,
                mode=mode & 0o7777,
                uid=uid,
                gid=gid,
                links=links,
                accessed=_time(raw, 112),
                changed=_time(raw, 124),
                modified=_time(raw, 136),
                born=_time(raw, 148) or None,
                target=target,
                device=(device >> 20, device & 0xFFFFF) if kind in {Type.BLOCK, Type.CHARACTER} else None,
                used=used,
                generation=struct.unpack_from("<Q", raw)[0],  # the transaction that made it; numbers are used once
            )

    def content(self, node: Node, stream: str = "") -> Content:
        if stream:
            raise errors.NotFound(f"Btrfs has no named streams, and so no '{stream}'")
        tree, number = node.ref
        with reader.parsing(f"inode {number}"):
            return self._content(tree, number, node.size)

    def _content(self, tree: int, number: int, size: int) -> Content:
        extents: list[Extent] = []
        for key, data in self._items(tree, number, _EXTENT):
            one = btrfs_data.read_extent(key.offset, data)
            if one is not None:
                extents.append(one)
        return Extents(size, extents, self._read, self._place)

    def extras(self, node: Node) -> Mapping[str, bytes]:
        tree, number = node.ref
        if tree == _EMPTY:
            return {}
        with reader.parsing(f"the attributes of inode {number}"):
            found = dict[str, bytes]()
            for _, data in self._items(tree, number, _XATTR):
                at = 0
                while at + 30 <= len(data):  # names of one hash share an item
                    _, name, value = _entry(data[at:])
                    found[name.decode("utf-8", "surrogateescape")] = value
                    at += 30 + len(name) + len(value)
            return reader.nameable(found)

    # -- what is still the same ----------------------------------------------------------------------------------

    def departed(self, other: Reader) -> Sequence[Range] | None:
        if not isinstance(other, Btrfs):
            return None
        with reader.parsing("its trees"):
            return btrfs_leaves.departed(other.standing(), self.standing())

    def standing(self) -> btrfs_leaves.Standing:
        """Where everything is that answers follow from."""
        return btrfs_leaves.Standing(self._start, frozenset(self._chunks), list(self._leaves()), not self._changed)

    def _leaves(self) -> Iterator[btrfs_leaves.Leaf]:
        """The leaves of the tree of roots, and of all subvolumes."""
        yield from self._leaves_of(_ROOT_TREE, self._trees[_ROOT_TREE])
        roots = list(self._range(self._trees[_ROOT_TREE], _Key(_TOP, _ROOT, 0), _Key(_LAST, _ROOT, _LAST)))
        for number in dict.fromkeys(key.object for key, _ in roots if key.type == _ROOT):
            found = self._find_tree(number) if number == _TOP or _FIRST <= number < 1 << 63 else None
            if found is not None:
                yield from self._leaves_of(number, found)

    def _leaves_of(self, number: int, tree: _Tree) -> Iterator[btrfs_leaves.Leaf]:
        if not tree.level:
            (generation,) = struct.unpack_from("<Q", self._load(tree.root, 0).raw, 80)
            yield btrfs_leaves.Leaf(number, (0, 0, 0), self._places(tree.root), generation)
            return
        pending, seen = [(tree.root, tree.level)], set[int]()
        while pending:
            place, level = pending.pop()
            if place in seen or level > _DEPTH_MAX:
                raise damaged(f"the block {place} is in two places of a tree")
            seen.add(place)
            block = self._load(place, level)
            if level == 1:
                for key, (leaf, generation) in zip(block.keys, block.places, strict=True):
                    yield btrfs_leaves.Leaf(number, tuple(key), self._places(leaf), generation)
            else:
                pending += [(one, level - 1) for one, _ in reversed(block.places)]

    # -- trees ---------------------------------------------------------------------------------------------------

    def _inode(self, tree: int, number: int) -> bytes:
        for _, data in self._items(tree, number, _INODE):
            if len(data) >= 160:
                return data
        raise damaged(f"there is no inode {number}")

    def _default(self) -> int:
        """The subvolume that a mount shows when none is named."""
        for _, data in self._items(_ROOT_TREE, _ROOT_FOLDER, _DIR):
            place, name, _ = _entry(data)
            if name == b"default" and self._find_tree(place.object) is not None:
                return place.object
        return _TOP

    def _find_tree(self, number: int) -> _Tree | None:
        """The tree of a subvolume; None for one that is gone."""
        if number not in self._trees:
            for _, data in self._items(_ROOT_TREE, number, _ROOT):
                (block,) = struct.unpack_from("<Q", data, 176)
                self._trees[number] = _Tree(block, data[238])
        return self._trees.get(number)

    def _items(self, tree: int, number: int, kind: int) -> Iterator[tuple[_Key, bytes]]:
        """All items of one type that belong to one object, in order."""
        changed = self._changed.get((tree, number, kind))
        if changed is not None:
            yield from ((_Key(number, kind, offset), data) for offset, data in sorted(changed.items()))
            return
        found = self._find_tree(tree) if tree != _ROOT_TREE else self._trees[_ROOT_TREE]
        if found is None:
            raise damaged(f"there is no subvolume {tree}")
        yield from self._range(found, _Key(number, kind, 0), _Key(number, kind, _LAST))

    def _range(self, tree: _Tree, first: _Key, last: _Key) -> Iterator[tuple[_Key, bytes]]:
        if tree.level > _DEPTH_MAX:
            raise damaged("a tree is too deep")
        pending, seen = [(tree.root, tree.level)], set[int]()
        while pending:
            place, level = pending.pop()
            if place in seen:
                raise damaged(f"the block {place} is in two places of a tree")
            seen.add(place)
            block = self._load(place, level)
            start = bisect.bisect_left(block.keys, first)
            if level == 0:
                for key, (offset, size) in zip(block.keys[start:], block.places[start:], strict=True):
                    if key > last:
                        return
                    if _HEADER + offset + size > len(block.raw):
                        raise damaged("an item lies behind its block")
                    yield key, block.raw[_HEADER + offset : _HEADER + offset + size]
                continue
            start = max(0, start if start < len(block.keys) and block.keys[start] == first else start - 1)
            end = bisect.bisect_right(block.keys, last)
            pending += [(one, level - 1) for one, _ in reversed(block.places[start:end])]

    def _load(self, logical: int, level: int) -> _Block:
        found = self._blocks.get(logical)
        if level == 0 and self._cached.is_watched:
            for start, end in self._places(logical):
                self._cached.note(start, end - start)
        if found is None:
            with self._cached.watched():  # the way to a leaf is nothing that an answer follows from
                raw = self._read(logical, self._node)
            own, count, at_level = struct.unpack_from("<Q40xIB", raw, 48)
            if own != logical:
                raise damaged(f"there is no block {logical}")
            shape = _ITEM if at_level == 0 else _POINTER
            if _HEADER + count * shape.size > len(raw):
                raise damaged(f"the block {logical} makes no sense")
            rows = list(shape.iter_unpack(raw[_HEADER : _HEADER + count * shape.size]))
            keys = [_Key(*row[:3]) for row in rows]
            found = _Block(keys, at_level, [(row[3], row[4]) for row in rows], raw)
            if len(self._blocks) >= _REMEMBERED:
                self._blocks.clear()
            self._blocks[logical] = found
        if found.level != level:
            raise damaged(f"the block {logical} is on another level")
        return found

    # -- where logical bytes lie ---------------------------------------------------------------------------------

    def _read_chunks(self) -> None:
        found = list[tuple[_Key, bytes]]()
        for one in self._range(self._chunk_tree, _Key(_FIRST, _CHUNK, 0), _Key(_FIRST, _CHUNK, _LAST)):
            if len(found) >= _CHUNKS_MAX:
                raise damaged("it has too many chunks")
            found.append(one)
        self._chunks.clear()
        for key, data in found:
            self._add_chunk(key.offset, data)
        self._blocks.clear()

    def _add_chunk(self, start: int, data: bytes) -> None:
        (length,) = struct.unpack_from("<Q", data)
        (kind,) = struct.unpack_from("<Q", data, 24)
        (stripes,) = struct.unpack_from("<H", data, 44)
        place = None
        for one in range(stripes):
            device, offset = struct.unpack_from("<QQ", data, 48 + 32 * one)
            if device == self._device and not kind & _STRIPED:
                place = offset
                break
        bisect.insort(self._chunks, _Chunk(start, length, place), key=lambda one: one.start)

    def _place(self, logical: int, length: int) -> Sequence[tuple[int, int]]:
        """Where on this device a range is: (place, how many bytes) of each part."""
        parts = []
        while length > 0:
            index = bisect.bisect_right(self._chunks, logical, key=lambda one: one.start) - 1
            chunk = self._chunks[index] if index >= 0 else None
            if chunk is None or logical >= chunk.start + chunk.length:
                raise damaged(f"nothing is at {logical}")
            if chunk.place is None:
                raise errors.Unsupported("it lies on another device of this Btrfs file system")
            count = min(length, chunk.start + chunk.length - logical)
            parts.append((chunk.place + logical - chunk.start, count))
            logical, length = logical + count, length - count
        return parts

    def _places(self, logical: int) -> tuple[Range, ...]:
        """Where a block of a tree is."""
        return tuple((place, place + count) for place, count in self._place(logical, self._node))

    def _read(self, logical: int, length: int) -> bytes:
        found = b"".join(self._cached.read(place, count) for place, count in self._place(logical, length))
        if len(found) < length:
            raise damaged(f"what is at {logical} lies behind the end of the disk")
        return found


def _entry(data: bytes) -> tuple[_Key, bytes, bytes]:
    """An entry of a folder, or an attribute: what it leads to, its name, its value."""
    place = _Key(*_KEY.unpack_from(data))
    length, name_length = struct.unpack_from("<HH", data, 25)
    name = data[30 : 30 + name_length]
    return place, name, data[30 + name_length : 30 + name_length + length]


def _time(raw: bytes, at: int) -> int:
    seconds, nanoseconds = struct.unpack_from("<qI", raw, at)
    found: int = seconds * 1_000_000_000 + nanoseconds
    return found
