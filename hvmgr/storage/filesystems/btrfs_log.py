"""The log of Btrfs: what single files were synced since the last commit, put over the items of the tree as it was then.

Source: "Btrfs on-disk format" of the Btrfs documentation, and what Linux makes of the same disk. A log has copies of whole items. In
its order: what is gone from folders, inodes, names by their folder, names by their file, contents, attributes.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

_INODE, _REFERENCE, _XATTR, _DIR_LOG, _DIR_INDEX, _EXTENT = 1, 12, 24, 72, 96, 108
_KEY = struct.Struct("<QBQ")
_SIZE, _LINKS, _MODE = 16, 40, 52
_EXTENT_HEAD, _EXTENT_PLACE = struct.Struct("<QQBBHB"), struct.Struct("<QQQQ")
_INLINE = 0

Items = dict[int, bytes]  # by the last number of their keys


class Name(NamedTuple):
    """A name in a folder, at its number there, and what it leads to."""

    at: int
    name: bytes
    object: int
    type: int


class Replay:
    """The items of one subvolume with its log put over them: ``changed`` has all that are not as they were, by object and type."""

    def __init__(
        self, base: Callable[[int, int], Items], log: Iterable[tuple[int, int, int, bytes]], sector: int
    ) -> None:
        """``base`` gives the items of an object and type; ``log``: object, type, last number, data."""
        self.changed: dict[tuple[int, int], Items] = {}
        self._base, self._sector = base, sector
        self._names: dict[int, dict[bytes, int]] = {}
        self._log: dict[tuple[int, int], Items] = {}
        for number, kind, offset, data in log:
            self._log.setdefault((number, kind), {})[offset] = data
        self._run()

    def _run(self) -> None:
        inodes = sorted(number for number, kind in self._log if kind == _INODE)
        for number in inodes:
            self._inode(number)
        for folder, items in self._of(_DIR_INDEX):
            for index, data in items.items():
                self._put_name(folder, entry(index, data))
        for number, items in self._of(_REFERENCE):
            for folder, data in items.items():
                self._put_references(number, folder, list(references(data)))
        for number, items in self._of(_EXTENT):
            for at, data in items.items():
                self._drop(number, at, at + self._length(data))
                self._items(number, _EXTENT)[at] = data
        for number, items in self._of(_XATTR):
            self._items(number, _XATTR).update(items)
        for number in {one for one, kind in self.changed if kind == _REFERENCE}:
            self._count_links(number)

    def _of(self, kind: int) -> list[tuple[int, Items]]:
        return [(number, items) for (number, own), items in sorted(self._log.items()) if own == kind]

    def _items(self, number: int, kind: int) -> Items:
        """Those of the subvolume as they are by now, to be changed."""
        found = self.changed.get((number, kind))
        if found is None:
            found = self.changed[number, kind] = dict(self._base(number, kind))
        return found

    def _is_there(self, number: int) -> bool:
        return bool(self._items(number, _INODE))

    # -- inodes --------------------------------------------------------------------------------------------------

    def _inode(self, number: int) -> None:
        logged = self._log.get((number, _XATTR), {})
        for offset in [one for one in self._items(number, _XATTR) if one not in logged]:
            del self._items(number, _XATTR)[offset]
        for start, data in self._log.get((number, _DIR_LOG), {}).items():
            self._forget_names(number, start, struct.unpack_from("<Q", data)[0])
        (new,) = self._log[number, _INODE].values()
        items = self._items(number, _INODE)
        before = next(iter(items.values()), None)
        (generation,) = struct.unpack_from("<Q", new)
        (size,) = struct.unpack_from("<Q", new, _SIZE)
        is_file = stat.S_ISREG(struct.unpack_from("<I", new, _MODE)[0])
        if before is not None and generation == 0:  # logged only because it is there
            if not is_file or not size:
                return
            new = before[:_SIZE] + new[_SIZE : _SIZE + 8] + before[_SIZE + 8 :]
        items[0] = new
        if is_file:
            self._drop(number, -(-size // self._sector) * self._sector, 1 << 64)

    def _count_links(self, number: int) -> None:
        inode = self._items(number, _INODE).get(0)
        if inode is None or stat.S_ISDIR(struct.unpack_from("<I", inode, _MODE)[0]):
            return
        count = sum(1 for data in self._items(number, _REFERENCE).values() for _ in references(data))
        self._items(number, _INODE)[0] = inode[:_LINKS] + struct.pack("<I", count) + inode[_LINKS + 4 :]

    # -- names ---------------------------------------------------------------------------------------------------

    def _forget_names(self, folder: int, start: int, end: int) -> None:
        """Of this range the log has all names that there are."""
        logged = self._log.get((folder, _DIR_INDEX), {})
        for index, data in list(self._items(folder, _DIR_INDEX).items()):
            if start <= index <= end:
                old = entry(index, data)
                if index not in logged or entry(index, logged[index]).name != old.name:
                    self._unlink(folder, old)

    def _put_name(self, folder: int, new: Name) -> None:
        if not self._is_there(folder):
            return
        for old in self._conflicts(folder, new):
            if (old.object, old.type, old.name) == (new.object, new.type, new.name):
                return
            self._unlink(folder, old)
        reference = self._log.get((new.object, _REFERENCE), {}).get(folder, b"")
        if any(name == new.name for _, name in references(reference)):
            return  # it comes by its file
        if new.type == _INODE and self._is_there(new.object):
            self._link(folder, new)

    def _put_references(self, number: int, folder: int, wanted: list[tuple[int, bytes]]) -> None:
        if not (self._is_there(number) and self._is_there(folder)):
            return
        names = {name for _, name in wanted}
        for index, name in list(references(self._items(number, _REFERENCE).get(folder, b""))):
            if name not in names:
                self._unlink(folder, Name(index, name, number, _INODE))
        for index, name in wanted:
            new = Name(index, name, number, _INODE)
            for old in self._conflicts(folder, new):
                self._unlink(folder, old)
            self._link(folder, new)

    def _conflicts(self, folder: int, new: Name) -> list[Name]:
        items, named = self._items(folder, _DIR_INDEX), self._names_of(folder).get(new.name, new.at)
        return [entry(at, items[at]) for at in dict.fromkeys((new.at, named)) if at in items]

    def _names_of(self, folder: int) -> dict[bytes, int]:
        """The numbers of the names in a folder, as they are by now."""
        found = self._names.get(folder)
        if found is None:
            items = self._items(folder, _DIR_INDEX).items()
            found = self._names[folder] = {entry(index, data).name: index for index, data in items}
        return found

    def _link(self, folder: int, new: Name) -> None:
        head = _KEY.pack(new.object, new.type, 0) + bytes(8) + struct.pack("<HHB", 0, len(new.name), 0)
        self._items(folder, _DIR_INDEX)[new.at] = head + new.name
        self._names_of(folder)[new.name] = new.at
        known = self._items(new.object, _REFERENCE)
        known[folder] = known.get(folder, b"") + struct.pack("<QH", new.at, len(new.name)) + new.name

    def _unlink(self, folder: int, old: Name) -> None:
        index = self._items(folder, _DIR_INDEX).get(old.at)
        if index is not None and entry(old.at, index).name == old.name:
            del self._items(folder, _DIR_INDEX)[old.at]
            self._names_of(folder).pop(old.name, None)
        if old.type != _INODE:
            return
        known = self._items(old.object, _REFERENCE)
        left = [one for one in references(known.pop(folder, b"")) if one[1] != old.name]
        if left:
            known[folder] = b"".join(struct.pack("<QH", at, len(name)) + name for at, name in left)

    # -- contents ------------------------------------------------------------------------------------------------

    def _length(self, data: bytes) -> int:
        _, whole, _, _, _, kind = _EXTENT_HEAD.unpack_from(data)
        if kind == _INLINE:
            return int(-(-whole // self._sector) * self._sector)
        return int(_EXTENT_PLACE.unpack_from(data, _EXTENT_HEAD.size)[3])

    def _drop(self, number: int, start: int, end: int) -> None:
        """The file has nothing in this range any more."""
        items = self._items(number, _EXTENT)
        for at, data in list(items.items()):
            stop = at + self._length(data)
            if at >= end or stop <= start:
                continue
            del items[at]
            if data[_EXTENT_HEAD.size - 1] == _INLINE:
                continue
            if at < start:
                items[at] = _part(data, 0, start - at)
            if end < stop:
                items[end] = _part(data, end - at, stop - end)


def _part(data: bytes, skipped: int, length: int) -> bytes:
    disk, disk_length, offset, _ = _EXTENT_PLACE.unpack_from(data, _EXTENT_HEAD.size)
    return data[: _EXTENT_HEAD.size] + _EXTENT_PLACE.pack(disk, disk_length, offset + skipped, length)


def entry(index: int, data: bytes) -> Name:
    """A name in a folder, as its item has it."""
    number, kind, _ = _KEY.unpack_from(data)
    (length,) = struct.unpack_from("<H", data, 27)
    return Name(index, data[30 : 30 + length], number, kind)


def references(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The names of a file in one folder, each with its number there."""
    at = 0
    while at + 10 <= len(data):
        index, length = struct.unpack_from("<QH", data, at)
        yield index, data[at + 10 : at + 10 + length]
        at += 10 + length
