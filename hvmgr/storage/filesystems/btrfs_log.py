"""The log of Btrfs: what single files were synced since the last commit, put over the items of the tree as it was then.

Source: "Btrfs on-disk format" of the Btrfs documentation, and what Linux makes of the same disk. A log has copies of whole items. In
its order: what is gone from folders, inodes, names by their folder, names by their file, contents, attributes.
"""

from __future__ import annotations

import bisect
import itertools
import stat
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from hvmgr import errors
from hvmgr.storage.filesystems.reader import damaged

_INODE, _REFERENCE, _MORE_REFERENCES, _XATTR, _DIR_LOG, _DIR_INDEX, _EXTENT = 1, 12, 13, 24, 72, 96, 108
_KEY = struct.Struct("<QBQ")
_SIZE, _LINKS, _MODE = 16, 40, 52
_EXTENT_HEAD, _EXTENT_PLACE = struct.Struct("<QQBBHB"), struct.Struct("<QQQQ")
_INLINE = 0

Items = dict[int, bytes]  # by the last number of their keys
Links = dict[int, dict[bytes, int]]  # of a file: by folder and name, the number of the name there


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
        self._links: dict[int, Links] = {}
        self._logged_links: dict[int, Links] = {}
        for number, kind, offset, data in log:
            if kind == _MORE_REFERENCES:
                raise _too_many_names()
            if kind == _REFERENCE:
                _add_links(self._logged_links.setdefault(number, {}), offset, data)
            else:
                self._log.setdefault((number, kind), {})[offset] = data
        self._run()

    def _run(self) -> None:
        inodes = sorted(number for number, kind in self._log if kind == _INODE)
        for number in inodes:
            self._inode(number)
        for folder, items in self._of(_DIR_INDEX):
            for index, data in items.items():
                self._put_name(folder, entry(index, data))
        for number, links in sorted(self._logged_links.items()):
            for folder, wanted in links.items():
                self._put_links(number, folder, wanted)
        for number, items in self._of(_EXTENT):
            self._put_contents(number, items)
        for number, items in self._of(_XATTR):
            self._items(number, _XATTR).update(items)
        for number, links in self._links.items():
            self._count_links(number, links)

    def _of(self, kind: int) -> list[tuple[int, Items]]:
        return [(number, items) for (number, own), items in sorted(self._log.items()) if own == kind]

    def _items(self, number: int, kind: int) -> Items:
        """Those of the subvolume as they are by now, to be changed."""
        found = self.changed.get((number, kind))
        if found is None:
            found = self.changed[number, kind] = dict(self._base(number, kind))
        return found

    def _links_of(self, number: int) -> Links:
        """The names of a file as they are by now, to be changed."""
        found = self._links.get(number)
        if found is None:
            found = self._links[number] = {}
            for folder, data in self._base(number, _REFERENCE).items():
                _add_links(found, folder, data)
            if self._base(number, _MORE_REFERENCES):
                raise _too_many_names()
        return found

    def _is_there(self, number: int) -> bool:
        return bool(self._items(number, _INODE))

    # -- inodes --------------------------------------------------------------------------------------------------

    def _inode(self, number: int) -> None:
        logged = self._log.get((number, _XATTR), {})
        for offset in [one for one in self._items(number, _XATTR) if one not in logged]:
            del self._items(number, _XATTR)[offset]
        self._forget_names(number, self._log.get((number, _DIR_LOG), {}))
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
            self._drop(number, [(-(-size // self._sector) * self._sector, 1 << 64)])

    def _count_links(self, number: int, links: Links) -> None:
        inode = self._items(number, _INODE).get(0)
        if inode is None or stat.S_ISDIR(struct.unpack_from("<I", inode, _MODE)[0]):
            return
        count = sum(map(len, links.values()))
        self._items(number, _INODE)[0] = inode[:_LINKS] + struct.pack("<I", count) + inode[_LINKS + 4 :]

    # -- names ---------------------------------------------------------------------------------------------------

    def _forget_names(self, folder: int, ranges: Items) -> None:
        """Of each range, from a key to the number in its data, the log has all names that there are."""
        if not ranges:
            return
        logged = self._log.get((folder, _DIR_INDEX), {})
        starts = sorted(ranges)
        ends = list(itertools.accumulate((struct.unpack_from("<Q", ranges[one])[0] for one in starts), max))
        for index, data in list(self._items(folder, _DIR_INDEX).items()):
            before = bisect.bisect_right(starts, index)
            if before and index <= ends[before - 1]:
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
        if new.name in self._logged_links.get(new.object, {}).get(folder, {}):
            return  # it comes by its file
        if new.type == _INODE and self._is_there(new.object):
            self._link(folder, new)

    def _put_links(self, number: int, folder: int, wanted: dict[bytes, int]) -> None:
        if not (self._is_there(number) and self._is_there(folder)):
            return
        for name, index in list(self._links_of(number).get(folder, {}).items()):
            if name not in wanted:
                self._unlink(folder, Name(index, name, number, _INODE))
        for name, index in wanted.items():
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
        self._links_of(new.object).setdefault(folder, {})[new.name] = new.at

    def _unlink(self, folder: int, old: Name) -> None:
        index = self._items(folder, _DIR_INDEX).get(old.at)
        if index is not None and entry(old.at, index).name == old.name:
            del self._items(folder, _DIR_INDEX)[old.at]
            self._names_of(folder).pop(old.name, None)
        if old.type == _INODE:
            self._links_of(old.object).get(folder, {}).pop(old.name, None)

    # -- contents ------------------------------------------------------------------------------------------------

    def _length(self, data: bytes) -> int:
        _, whole, _, _, _, kind = _EXTENT_HEAD.unpack_from(data)
        if kind == _INLINE:
            return int(-(-whole // self._sector) * self._sector)
        return int(_EXTENT_PLACE.unpack_from(data, _EXTENT_HEAD.size)[3])

    def _put_contents(self, number: int, items: Items) -> None:
        ranges = [(at, at + self._length(data)) for at, data in sorted(items.items())]
        self._drop(number, ranges)
        self._items(number, _EXTENT).update(items)

    def _drop(self, number: int, ranges: list[tuple[int, int]]) -> None:
        """The file has nothing in these ranges any more, which are in order; nor may its own extents lie one over the other."""
        items, left = self._items(number, _EXTENT), Items()
        known = sorted(items.items())
        _require_apart(ranges)
        _require_apart([(at, at + self._length(data)) for at, data in known])
        first = 0
        for at, data in known:
            start, stop = at, at + self._length(data)
            while first < len(ranges) and ranges[first][1] <= start:
                first += 1
            if first == len(ranges) or stop <= ranges[first][0]:
                left[at] = data
                continue
            if data[_EXTENT_HEAD.size - 1] == _INLINE:
                continue
            for which in range(first, len(ranges)):
                begin, end = ranges[which]
                if begin >= stop:
                    break
                if start < begin:
                    left[start] = _part(data, start - at, begin - start)
                start = max(start, end)
            if start < stop:
                left[start] = _part(data, start - at, stop - start)
        items.clear()
        items.update(left)


def _require_apart(ranges: list[tuple[int, int]]) -> None:
    """So the work ends where the items do."""
    if any(stop > start for (_, stop), (start, _) in itertools.pairwise(ranges)):
        raise damaged("a file has contents that lie one over the other")


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


def _add_links(links: Links, folder: int, data: bytes) -> None:
    for index, name in references(data):
        links.setdefault(folder, {})[name] = index


def _too_many_names() -> errors.Unsupported:
    """Names that found no room in the items for them stand in others, which are replayed in a way of their own."""
    return errors.Unsupported("its log is about a file with very many names")
