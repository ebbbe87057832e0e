"""The index of files of a VM kept up to date: what came is taken in, what went goes, and what stays costs nothing.

A snapshot is read as what differs from its nearest ancestor in the index. The index knows which blocks of a file system each
folder followed from (its names, and what is said of each file in it): only folders below which one of these was written are
read again. Where a reader cannot say that, because the volume as a whole is another one, all of it is walked, and the rows are
still those that differ.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors, settings
from hvmgr.model.progress import Progress
from hvmgr.model.ranges import Range, Ranges
from hvmgr.operations.inside import changed, differing, looking, views
from hvmgr.operations.inside.browsing import Browser, Found
from hvmgr.storage import access, durable, file_index, index_file
from hvmgr.storage.file_index import BLOCK, Entry, FileIndex, Place, Point

if TYPE_CHECKING:
    from hvmgr.operations.inside.looking import Inside
    from hvmgr.operations.inside.views import Frozen, Volume
    from hvmgr.operations.snapshot import Snapshot
    from hvmgr.operations.vm import VM

Report = Callable[[Progress], None]


@dataclass(slots=True)
class Updated:
    """Which snapshots (ids) were taken in and which rows went; ``folders`` is how many folders were read for that."""

    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    folders: int = 0


def place_of(vm: VM) -> Path:
    """Where the index of a VM is: in its home where that is this user's own and nobody else's to write, else in his cache."""
    layout = vm.home.layout
    file, private = layout.file_index, layout.private
    is_own = all(access.is_private(one) for one in (private.parent, private)) and access.is_writable(private)
    if is_own and (not os.path.lexists(file) or os.access(file, os.R_OK | os.W_OK, follow_symlinks=False)):
        return file
    return _cached(vm.id)


def _cached(vm_id: str) -> Path:
    return settings.cache_folder() / "files" / f"{vm_id}.sqlite"


def forget(vm_id: str) -> None:
    """The VM is gone, and so is what this user's cache has of it."""
    path = _cached(vm_id)
    if path.exists():
        index_file.remove(path)


@contextlib.contextmanager
def opened(vm: VM, *, wait_s: float, anew: bool = False, reading: bool = False) -> Iterator[FileIndex]:
    """The index of a VM as it is; made where there is none, or emptied with ``anew``.

    With ``reading`` nothing is written: NotFound where there is none.
    """
    path = place_of(vm)
    if not path.parent.is_dir() and not reading:
        for folder in (path.parent.parent.parent, path.parent.parent, path.parent):
            with contextlib.suppress(FileExistsError):
                durable.make_folder(folder, mode=0o700)
    with file_index.opened(path, vm.id, wait_s=wait_s, anew=anew, reading=reading) as index:
        yield index


def missing(vm: VM, index: FileIndex) -> tuple[list[Snapshot], list[Point]]:
    """The snapshots that are not in the index, parents first, and those in it that are there no more."""
    there = {one.id: one for one in vm.snapshots()}
    known = {one.snapshot: one for one in index.points()}
    ordered: dict[str, Snapshot] = {}
    for one in there.values():
        trail = [one]
        while (parent := trail[-1].parent) is not None and parent in there and parent not in ordered:
            trail.append(there[parent])
        ordered.update((each.id, each) for each in reversed(trail))
    return (
        [one for one in ordered.values() if one.id not in known],
        [one for one in known.values() if one.snapshot not in there],
    )


def update(vm: VM, index: FileIndex, report: Report) -> Updated:
    """The index holds all snapshots of the VM, and no others."""
    done = Updated()
    coming, gone = missing(vm, index)
    for point in gone:
        with index.writing():
            still = next((one for one in index.points() if one.snapshot == point.snapshot), None)
            if still is not None:
                index.remove_point(still)
                done.removed.append(point.snapshot)
    there = {one.id: one for one in vm.snapshots()}
    for number, snapshot in enumerate(coming):
        report(Progress(number, len(coming), f"index {snapshot.name}"))
        with index.writing():
            known = {one.snapshot: one for one in index.points()}
            if snapshot.id in known:  # another process was faster
                continue
            base = snapshot.parent
            while base is not None and base not in known:
                base = there[base].parent if base in there else None
            before = None if base is None else (known[base], views.of_snapshot(vm, there[base]))
            done.folders += take_in(index, snapshot.id, views.of_snapshot(vm, snapshot), before)
            done.added.append(snapshot.id)
    return done


def take_in(
    index: FileIndex, snapshot: str, disks: Sequence[Frozen], before: tuple[Point, Sequence[Frozen]] | None
) -> int:
    """A snapshot's files are in the index, as what differs from another one that is; how many folders were read for it."""
    base = None if before is None else before[0]
    point, ranges = index.add_point(snapshot, base), None
    if before is not None:
        ranges = differing.changed_ranges(before[1], disks)
        if not any(ranges.values()):
            for place in index.places(before[0]):
                index.put_place(point, place)
            return 0
    left_out = folders = 0
    with contextlib.ExitStack() as stack:
        inside = stack.enter_context(looking.opened(disks))
        former = None
        if before is not None and any(one.geometry is None for one in index.places(before[0])):
            former = stack.enter_context(looking.opened(before[1]))
        for volume in inside.volumes:
            if looking.is_readable(volume):
                try:
                    with index.attempt():
                        work = _Walk(index, point, base, (former, inside), volume, ranges)
                        work.run()
                except (errors.Corrupt, errors.Unsupported):
                    left_out += 1  # the other file systems may be sound
                    continue
                left_out += work.left_out
                folders += work.folders
    index.note_left_out(point, left_out)
    return folders


class _Walk:
    """One file system of one snapshot is taken in."""

    def __init__(
        self, index: FileIndex, point: Point, base: Point | None, moments: tuple[Inside | None, Inside], volume: Volume,
        ranges: Mapping[str, Ranges] | None,
    ) -> None:  # fmt: skip
        self._index, self._point = index, point
        former, inside = moments
        self._browser: Browser = inside.browser(volume)
        reader = self._browser.reader
        self._root = index.root(_name(volume))
        self._line = index.line(base)
        parts = inside.parts(volume)
        slot = None if volume.logical else volume.disk.slot
        self._place = Place(
            root=self._root,
            disk=slot,
            partition=volume.number,
            logical=volume.logical,
            ignores_case=reader.ignores_case,
            parts=[(one, None if disk is None else start, length) for one, (disk, start, length) in parts],
            geometry=file_index.known(reader.geometry()),
            replaced=list(reader.replaced()),
        )
        before = [] if base is None else [one for one in index.places(base) if one.root == self._root]
        self._touched = None
        if before and ranges is not None and (gone := self._departed(before[0], former, volume)) is not None:
            self._touched = self._where(before[0], ranges, gone)
        self._read: set[int] = set()
        self._seen: set[bytes | None] = set()
        self.folders = self._unread = 0

    @property
    def left_out(self) -> int:
        """How much could not be read."""
        return self._unread + sum(self._browser.left_out.values())

    def _departed(self, before: Place, former: Inside | None, volume: Volume) -> Sequence[Range] | None:
        """Which bytes the base's folders may follow from and these do not; None where all have to be read again."""
        geometry = self._place.geometry
        if geometry is not None and before.geometry is not None:
            return () if geometry.goes_on(before.geometry) else None
        older = [] if former is None else [one for one in former.volumes if _name(one) == _name(volume)]
        if former is None or not older or not looking.is_readable(older[0]):
            return None
        try:
            return self._browser.reader.departed(former.browser(older[0]).reader)
        except (errors.Corrupt, errors.Unsupported):
            return None

    def _where(self, before: Place, ranges: Mapping[str, Ranges], gone: Sequence[Range]) -> Ranges:
        """All bytes that may differ from those that the base's folders follow from."""
        old, new = (
            [(name, (None if start is None else name, start or 0, length)) for name, start, length in one.parts]
            for one in (before, self._place)
        )
        return changed.of_volume(old, new, dict(ranges)).joined(before.replaced, self._place.replaced, gone)

    def run(self) -> None:
        """The rows are there."""
        index = self._index
        index.put_place(self._point, self._place)
        root = self._browser.root()
        row, before = _entry(root), index.entry(self._line, self._root)
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
        if found is None or before is None or not found.node.is_folder or _entry(found).ref != before.ref:
            return None
        return found

    def _walk(self, path: int, folder: Found, *, deep: bool = True) -> None:
        """A folder is read, and ``deep`` all below it; else what is new in it."""
        pending = [(path, folder, deep)]
        while pending:
            path, folder, deep = pending.pop()
            ref = _entry(folder).ref
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
            row = _entry(child)
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


def _name(volume: Volume) -> str:
    """What a file system is called in the index."""
    return volume.logical or f"{volume.disk.slot or ''} {volume.number or ''}"


def _entry(found: Found) -> Entry:
    """What the index says of a file. A folder's ``ref`` tells whether it is still the same one."""
    node = found.node
    ref = hashlib.blake2b(repr(node.ref).encode(), digest_size=8).digest() if node.is_folder else None
    entry = Entry(node.type.value, node.size, node.mode, node.uid, node.gid, node.links, node.modified, ref)
    return file_index.held(entry)
