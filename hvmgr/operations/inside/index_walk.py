"""One snapshot is taken into the index of files, as what differs from others that are in it already.

The index knows which blocks of a file system each folder followed from (its names, and what is said of each file in it): only
folders below which one of these was written are read again. Where a reader cannot say that, because the volume as a whole is
another one, or was encrypted anew, all of it is walked, and the rows are still those that differ.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from hvmgr import errors
from hvmgr.model.ranges import Range, Ranges
from hvmgr.operations.inside import changed, differing, looking
from hvmgr.operations.inside.browsing import Browser, Found
from hvmgr.storage import file_index
from hvmgr.storage.file_index import BLOCK, Entry, FileIndex, Locked, Place, Point
from hvmgr.storage.filesystems.signatures import Kind

if TYPE_CHECKING:
    from hvmgr.operations.inside.looking import Inside
    from hvmgr.operations.inside.unlocking import Key
    from hvmgr.operations.inside.views import Frozen, Volume


@dataclass(frozen=True, slots=True)
class Taken:
    """How many file systems of a snapshot were taken in, how many folders were read for that, and what is still locked."""

    volumes: int
    folders: int
    locked: Sequence[Locked]


class Before:
    """A snapshot in the index that another one is compared with; what that takes is found when it is asked for."""

    def __init__(self, index: FileIndex, point: Point, disks: Callable[[], Sequence[Frozen]]) -> None:
        self.point = point
        self._index, self._disks = index, disks
        self._ranges: dict[str, Ranges] | None = None

    @cached_property
    def places(self) -> dict[int, Place]:
        """Its file systems, by their topmost paths."""
        return {one.root: one for one in self._index.places(self.point)}

    @cached_property
    def disks(self) -> Sequence[Frozen]:
        """Its disks."""
        return self._disks()

    def ranges(self, disks: Sequence[Frozen]) -> dict[str, Ranges]:
        """Where the disks of the other one may differ from its own; they are always the same ones."""
        if self._ranges is None:
            self._ranges = differing.changed_ranges(self.disks, disks)
        return self._ranges


def take_in(
    index: FileIndex, point: Point, disks: Sequence[Frozen], befores: Sequence[Before] = (), keys: Sequence[Key] = ()
) -> Taken:
    """A snapshot's files are in the index, as what differs from the first of ``befores`` that has the file system.

    What is encrypted is, too, where one of the keys opens it; the rest is noted. A snapshot of which something was locked until
    now keeps what it has.
    """
    if befores and not any(befores[0].ranges(disks).values()):
        return _take_over(index, point, befores[0])
    has = {one.root for one in index.places(point)}
    volumes = folders = 0
    left_out = point.left_out
    with contextlib.ExitStack() as stack:
        inside = stack.enter_context(looking.opened(disks, keys=keys, strict=False))
        work = _Reading(index, point, disks, befores, inside, keys, stack)
        for volume in inside.volumes:
            if not looking.is_readable(volume) or (point.locked and not volume.encrypted):
                continue
            if (root := index.root(name_of(volume))) in has:
                continue
            try:
                with index.attempt():
                    walk = _Walk(work, volume, root)
                    walk.run()
            except (errors.Corrupt, errors.Unsupported):
                left_out += 1  # the other file systems may be sound
                continue
            volumes += 1
            left_out += walk.left_out
            folders += walk.folders
        locked = [_locked(inside, one) for one in inside.volumes if one.kind is Kind.LUKS]
    index.note(point, left_out, still := _still(point, locked))
    return Taken(volumes, folders, still)


def _take_over(index: FileIndex, point: Point, before: Before) -> Taken:
    """No byte is another one there: neither key nor disk is needed for what the other one has."""
    has = {one.root for one in index.places(point)}
    coming = [one for root, one in before.places.items() if root not in has]
    for place in coming:
        index.put_place(point, dataclasses.replace(place, base=before.point.id))
    index.note(point, point.left_out, still := _still(point, before.point.locked))
    return Taken(len(coming), 0, still)


def _locked(inside: Inside, volume: Volume) -> Locked:
    from hvmgr.storage.filesystems import luks

    return Locked(volume.title, volume.disk.slot, volume.number, luks.mark(inside.bytes_of(volume)))


def _still(point: Point, locked: Sequence[Locked]) -> list[Locked]:
    """What is locked of a snapshot by now: what another key opened before is in the index."""
    return [one for one in locked if not point.locked or one in point.locked]


def name_of(volume: Volume) -> str:
    """What a file system is called in the index."""
    return volume.logical or f"{volume.disk.slot or ''} {volume.number or ''}"


def entry_of(found: Found) -> Entry:
    """What the index says of a file. A folder's ``ref`` tells whether it is still the same one."""
    node = found.node
    ref = hashlib.blake2b(repr(node.ref).encode(), digest_size=8).digest() if node.is_folder else None
    entry = Entry(node.type.value, node.size, node.mode, node.uid, node.gid, node.links, node.modified, ref)
    return file_index.held(entry)


@dataclass(slots=True)
class _Reading:
    """What all file systems of one snapshot are read with."""

    index: FileIndex
    point: Point
    disks: Sequence[Frozen]
    befores: Sequence[Before]
    inside: Inside
    keys: Sequence[Key]
    _stack: contextlib.ExitStack
    _formers: dict[int, Inside] = dataclasses.field(default_factory=dict)

    def before(self, root: int) -> Before | None:
        """The nearest one that has the file system."""
        return next((one for one in self.befores if root in one.places), None)

    def former(self, before: Before) -> Inside:
        """Its disks, open."""
        if before.point.id not in self._formers:
            opened = looking.opened(before.disks, keys=self.keys, strict=False)
            self._formers[before.point.id] = self._stack.enter_context(opened)
        return self._formers[before.point.id]


class _Walk:
    """One file system of one snapshot is taken in."""

    def __init__(self, work: _Reading, volume: Volume, root: int) -> None:
        self._index, self._point, self._root = work.index, work.point, root
        self._browser: Browser = work.inside.browser(volume)
        reader = self._browser.reader
        before = work.before(root)
        self._place = Place(
            root=root,
            disk=None if volume.logical else volume.disk.slot,
            partition=volume.number,
            logical=volume.logical,
            ignores_case=reader.ignores_case,
            parts=[
                (one, None if disk is None else start, length)
                for one, (disk, start, length) in work.inside.parts(volume)
            ],
            geometry=file_index.known(reader.geometry()),
            replaced=list(reader.replaced()),
            base=None if before is None else before.point.id,
            seal=_seal(work.inside, volume),
        )
        self._line = self._index.line(None if before is None else before.point, root)
        self._touched = None if before is None else self._where(work, before, volume)
        self._read: set[int] = set()
        self._seen: set[bytes | None] = set()
        self.folders = self._unread = 0

    @property
    def left_out(self) -> int:
        """How much could not be read."""
        return self._unread + sum(self._browser.left_out.values())

    def _where(self, work: _Reading, before: Before, volume: Volume) -> Ranges | None:
        """All bytes that may differ from those that the folders of before follow from; None where all have to be read again."""
        was = before.places[self._root]
        gone = self._departed(work, before, volume) if was.seal == self._place.seal else None
        if gone is None:
            return None
        old, new = (
            [(name, (None if start is None else name, start or 0, length)) for name, start, length in one.parts]
            for one in (was, self._place)
        )
        touched = changed.of_volume(old, new, before.ranges(work.disks), encrypted=volume.encrypted)
        return touched.joined(was.replaced, self._place.replaced, gone)

    def _departed(self, work: _Reading, before: Before, volume: Volume) -> Sequence[Range] | None:
        """Which bytes the folders of before may follow from and these do not; None where nobody knows."""
        geometry, was = self._place.geometry, before.places[self._root].geometry
        if geometry is not None and was is not None:
            return () if geometry.goes_on(was) else None
        former = work.former(before)
        older = [one for one in former.volumes if name_of(one) == name_of(volume)]
        if not older or not looking.is_readable(older[0]):
            return None
        try:
            return self._browser.reader.departed(former.browser(older[0]).reader)
        except (errors.Corrupt, errors.Unsupported):
            return None

    def run(self) -> None:
        """The rows are there."""
        index = self._index
        index.put_place(self._point, self._place)
        root = self._browser.root()
        row, before = entry_of(root), index.entry(self._line, self._root)
        if before != row:
            index.put(self._root, self._point, row)
        if self._touched is None or before is None or before.ref != row.ref:
            self._walk(self._root, root)
            return
        stale = index.touched(self._line, self._root, self._touched.blocks(BLOCK))
        for path in sorted(stale, key=lambda one: len(self._parts(one))):
            if path not in self._read and (found := self._find(path, root)) is not None:
                self._walk(path, found, deep=False)

    def _parts(self, path: int) -> list[bytes]:
        parts: list[bytes] = []
        while path != self._root and (above := self._index.above(path)) is not None:
            path = above[0]
            parts.append(above[1])
        return parts[::-1]

    def _find(self, path: int, root: Found) -> Found | None:
        """The folder, if it is still the one that was read; what became of another is told by the folder above it."""
        found: Found | None = root
        try:
            for part in self._parts(path):
                found = self._browser.child(found, part) if found is not None and found.node.is_folder else None
                if found is None or found.name != part:  # a name that differs in case alone is another one
                    return None
        except (errors.Corrupt, errors.Unsupported):
            return None
        before = self._index.entry(self._line, path)
        if found is None or before is None or not found.node.is_folder or entry_of(found).ref != before.ref:
            return None
        return found

    def _walk(self, path: int, folder: Found, *, deep: bool = True) -> None:
        """A folder is read, and ``deep`` all below it; else what is new in it."""
        pending = [(path, folder, deep)]
        while pending:
            path, folder, deep = pending.pop()
            ref = entry_of(folder).ref
            if path in self._read or (deep and ref in self._seen):
                continue
            self._read.add(path)
            if deep:
                self._seen.add(ref)
            pending += self._one(path, folder, deep=deep)

    def _one(self, path: int, folder: Found, *, deep: bool) -> Iterator[tuple[int, Found, bool]]:
        """Takes in one folder; which folders in it are to be read as well."""
        index, browser = self._index, self._browser
        self.folders += 1
        browser.forget()
        children: list[Found] = []
        with browser.reader.watching() as asked:
            try:
                children += browser.children(folder)
            except (errors.Corrupt, errors.Unsupported):
                self._unread += 1
        index.put_unit(self._root, path, self._point, Ranges(asked).blocks(BLOCK))
        before = index.children(self._line, path)
        for child in children:
            row = entry_of(child)
            number, old = before.pop(child.name, (None, None))
            number = index.path(path, child.name) if number is None else number
            if old != row:
                index.put(number, self._point, row)
            if child.node.is_folder and (deep or old is None or old.ref != row.ref):
                yield number, child, True
            elif old is not None and old.ref is not None and row.ref is None:
                self._gone_below(number)
        for number, old in before.values():
            index.put(number, self._point, None)
            if old.ref is not None:
                self._gone_below(number)

    def _gone_below(self, folder: int) -> None:
        pending = [folder]
        while pending:
            for number, old in self._index.children(self._line, pending.pop()).values():
                self._index.put(number, self._point, None)
                if old.ref is not None:
                    pending.append(number)


def _seal(inside: Inside, volume: Volume) -> str:
    """The same at two moments if a file system is encrypted alike, or not at all; it tells nobody the key."""
    seals = inside.seals(volume)
    return hashlib.blake2b(b"".join(sorted(seals)), digest_size=16).hexdigest() if seals else ""
