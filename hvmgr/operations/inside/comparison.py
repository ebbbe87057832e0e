"""What became of the files of one file system between two moments: exactly those that are not the same any more.

Both trees are walked side by side. An answer of the reader follows from the bytes that it asked for, and from what it knows of
the volume: where no such byte can have changed, the older tree need not be asked, and no data is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from hvmgr import errors
from hvmgr.model.ranges import Ranges
from hvmgr.operations.inside import contents
from hvmgr.operations.inside.browsing import DAMAGED
from hvmgr.storage.filesystems.reader import Type

if TYPE_CHECKING:
    from hvmgr.operations.inside.browsing import Browser, Found
    from hvmgr.operations.inside.views import Volume
    from hvmgr.storage.filesystems.reader import Node, Reader

UNREADABLE = "contents that cannot be read, and so not be compared"
_FIELDS = {
    "mode": "mode", "uid": "owner", "gid": "group", "links": "links", "modified": "modified", "changed": "changed",
    "born": "born", "attributes": "attributes",
}  # fmt: skip
_OF_FOLDERS = ("mode", "uid", "gid", "attributes")  # their times and links follow from what is in them
_MATTER = {"type": "type", "target": "target", "device": "device"}


class Change(StrEnum):
    """What became of a name."""

    ADDED = "added"
    REMOVED = "removed"
    CHANGED = "changed"  # what is in it, or what it is
    METADATA = "metadata"  # only what is said of it
    RENAMED = "renamed"  # and perhaps changed


@dataclass(frozen=True, slots=True)
class Difference:
    """One name whose file is not the same. ``what`` says what of it: ``content``, ``target``, ``mode``, ``modified``, …

    ``old`` is None for what was added, ``new`` for what was removed; ``source`` is the path that a renamed one had.
    """

    change: Change
    path: bytes
    old: Node | None
    new: Node | None
    volume: Volume
    what: tuple[str, ...] = ()
    source: bytes | None = None


@dataclass(slots=True)
class _Listing:
    """A folder: what is found by its names; whether the names, and which of the children, follow from nothing that was written."""

    refs: dict[bytes, Any] = field(default_factory=dict)
    children: dict[bytes, Found] = field(default_factory=dict)
    is_untouched: bool = False
    untouched: set[bytes] = field(default_factory=set)


Tops = Iterable[tuple["Found | None", "Found | None"]]


class Comparison:
    """One file system at two moments; either browser may be None where there was none. ``left_out`` counts, by the reason."""

    def __init__(self, old: Browser | None, new: Browser | None, touched: Ranges) -> None:
        self._old, self._new = old, new
        self.left_out: dict[str, int] = {}
        self._trusts = False
        self._touched = touched
        self._knows_moves = False
        self._same: dict[tuple[int, int], bool] = {}  # contents of files with several names
        if old is not None and new is not None:
            self._knows_moves = bool(new.volume.uuid) and old.volume.uuid == new.volume.uuid
            gone = old.reader.departed(new.reader)  # it is the newer one whose answers are watched
            self._trusts = gone is not None
            self._touched = touched.joined(old.reader.replaced(), new.reader.replaced(), gone or ())

    def differences(self, tops: Tops) -> list[Difference]:
        """All below the tops, by their paths; a top that was not there at one of the moments is None there."""
        removed: dict[bytes, Found] = {}
        added: dict[bytes, Found] = {}
        found: list[Difference] = []
        for top in tops:
            pending = [top]
            seen: tuple[set[int], set[int]] = (set(), set())  # folders of both moments
            while pending:
                old, new = pending.pop()
                if self._are_in_themselves((old, new), seen):
                    continue
                if old is not None and new is not None:
                    found += self._one(old, new)
                try:
                    pending += self._below(old, new)
                except (errors.Corrupt, errors.Unsupported) as error:
                    self._leave_out(error)
                if new is None and old is not None:
                    removed[old.path] = old
                if old is None and new is not None:
                    added[new.path] = new
        found += self._moves(removed, added)
        return sorted(found, key=lambda one: one.path)

    def _leave_out(self, error: errors.HvmgrError) -> None:
        why = DAMAGED if isinstance(error, errors.Corrupt) else UNREADABLE
        self.left_out[why] = self.left_out.get(why, 0) + 1

    # -- folders -------------------------------------------------------------------------------------------------

    def _are_in_themselves(self, pair: tuple[Found | None, Found | None], seen: tuple[set[int], set[int]]) -> bool:
        """Whether one of them is a folder that was here before, as it lies in itself or in two places; it counts as damaged."""
        is_one = False
        for browser, one, those in zip((self._old, self._new), pair, seen, strict=True):
            if browser is None or one is None or not one.node.is_folder:
                continue
            if one.node.id in those:
                browser.leave_out(one.path)
                is_one = True
            those.add(one.node.id)
        return is_one

    def _below(self, old: Found | None, new: Found | None) -> Iterator[tuple[Found | None, Found | None]]:
        """What is in two folders, by name."""
        after = _Listing() if new is None or not new.node.is_folder else self._listed(new)
        before = {} if old is None or not old.node.is_folder else self._listed_before(old, new, after)
        for name in before.keys() | after.children.keys():
            one, other = before.get(name), after.children.get(name)
            path = _join((new or old or one or other).path, name)  # type: ignore[union-attr]  # one of them is there
            if not self._is_damaged(path, one, other):
                yield one, other

    def _listed(self, folder: Found) -> _Listing:
        """What is in a folder now, and what that follows from."""
        assert self._new is not None
        found, browser = _Listing(), self._new
        with browser.reader.watching() as asked:
            found.refs = browser.entries(folder)
        found.is_untouched = self._trusts and not self._touched.touch_any(asked)
        for name, ref in found.refs.items():
            with browser.reader.watching() as asked:
                child = browser.sound(folder, name, ref)
            if child is not None:
                found.children[name] = child
                if self._trusts and not self._touched.touch_any(asked):
                    found.untouched.add(name)
        return found

    def _listed_before(self, old: Found, new: Found | None, after: _Listing) -> dict[bytes, Found]:
        """What was in it; of what nobody wrote to it is known by now."""
        assert self._old is not None
        is_same = new is not None and old.path == new.path
        known = is_same and new is not None and old.node.ref == new.node.ref and after.is_untouched
        refs = after.refs if known else self._old.entries(old)
        found: dict[bytes, Found] = {}
        for name, ref in refs.items():
            if is_same and name in after.untouched and after.refs[name] == ref:
                found[name] = after.children[name]
            elif (child := self._old.sound(old, name, ref)) is not None:
                found[name] = child
        return found

    def _is_damaged(self, path: bytes, old: Found | None, new: Found | None) -> bool:
        """Whether it is only missing because it cannot be read."""
        return (old is None and self._old is not None and self._old.is_damaged(path)) or (
            new is None and self._new is not None and self._new.is_damaged(path)
        )

    # -- files ---------------------------------------------------------------------------------------------------

    def _one(self, old: Found, new: Found, *, moved: bool = False) -> Iterator[Difference]:
        what, matter = self._what(old, new, moved=moved)
        if what:
            kind = Change.CHANGED if matter else Change.METADATA
            yield Difference(kind, new.path, old.node, new.node, self._volume, tuple(what))

    @property
    def _volume(self) -> Volume:
        browser = self._new or self._old
        assert browser is not None
        return browser.volume

    def _what(self, old: Found, new: Found, *, moved: bool) -> tuple[list[str], bool]:
        """What is not the same, and whether that is more than what is said of the file."""
        assert self._old is not None
        assert self._new is not None
        one, other = old.node, new.node
        alike = self._trusts and one == other
        if alike and self._is_untouched(self._new.reader, other):
            return [], False
        what = [word for name, word in _MATTER.items() if getattr(one, name) != getattr(other, name)]
        if one.type is Type.FILE and other.type is Type.FILE and not self._are_same(one, other, ""):
            what.append("content")
        if self._streams_differ(one, other):
            what.append("streams")
        matter = bool(what)
        fields = _OF_FOLDERS if one.is_folder and other.is_folder else _FIELDS
        what += [_FIELDS[name] for name in fields if getattr(one, name) != getattr(other, name)]
        if self._extras_differ(one, other):
            what.append("extended")
        if moved and "changed" in what:
            what.remove("changed")  # a rename does that
        return what, matter

    def _is_untouched(self, reader: Reader, node: Node) -> bool:
        """Whether nothing that the file's contents and attributes follow from may have changed."""
        with reader.watching() as asked:
            try:
                found = [reader.stored(node, one) for one in _contents(node)]
                reader.extras(node)
            except (errors.Corrupt, errors.Unsupported):
                return False
            segments = [one for content in found for one in content.segments()]
        if self._touched.touch_any(asked):
            return False
        return not any(self._touched.touch_any(one.lies()) for one in segments)

    def _are_same(self, one: Node, other: Node, stream: str) -> bool:
        key = (one.id, other.id)
        if not stream and key in self._same:
            return self._same[key]
        assert self._old is not None
        assert self._new is not None
        try:
            before, after = self._old.reader.stored(one, stream), self._new.reader.stored(other, stream)
            same = contents.are_same(before, after, self._touched)
        except (errors.Corrupt, errors.Unsupported) as error:
            self._leave_out(error)
            same = one.size == other.size
        if not stream and max(one.links, other.links) > 1:
            self._same[key] = same
        return same

    def _streams_differ(self, one: Node, other: Node) -> bool:
        if one.streams != other.streams:
            return True
        return not all(self._are_same(one, other, name) for name, _ in one.streams)

    def _extras_differ(self, one: Node, other: Node) -> bool:
        assert self._old is not None
        assert self._new is not None
        try:
            return dict(self._old.reader.extras(one)) != dict(self._new.reader.extras(other))
        except (errors.Corrupt, errors.Unsupported) as error:
            self._leave_out(error)
            return False

    # -- renames -------------------------------------------------------------------------------------------------

    def _moves(self, removed: Mapping[bytes, Found], added: Mapping[bytes, Found]) -> Iterator[Difference]:
        """What is gone and what is new; one of each that is provably one file was renamed."""
        gone: dict[tuple[int, int, Type], list[Found]] = {}
        for _, one in sorted(removed.items(), reverse=True):
            if (key := self._identity(one.node)) is not None:
                gone.setdefault(key, []).append(one)
        moved: dict[bytes, bytes] = {}  # from where to where
        for path, one in sorted(added.items()):
            key = self._identity(one.node)
            if key is None or not gone.get(key):
                yield Difference(Change.ADDED, path, None, one.node, self._volume)
                continue
            old = gone[key].pop()
            moved[old.path] = path
            what, matter = self._what(old, one, moved=True)
            folder, _, name = path.rpartition(b"/")
            before, _, former = old.path.rpartition(b"/")
            if name != former or moved.get(before) != folder:
                yield Difference(Change.RENAMED, path, old.node, one.node, self._volume, tuple(what), old.path)
            elif what:  # its folder was renamed, and it came along
                kind = Change.CHANGED if matter else Change.METADATA
                yield Difference(kind, path, old.node, one.node, self._volume, tuple(what), old.path)
        for path, one in removed.items():
            if path not in moved:
                yield Difference(Change.REMOVED, path, one.node, None, self._volume)

    def _identity(self, node: Node) -> tuple[int, int, Type] | None:
        """What is a file's own; of another file system the same numbers mean nothing."""
        return None if node.generation is None or not self._knows_moves else (node.id, node.generation, node.type)


def _contents(node: Node) -> Iterator[str]:
    """The file's own content, and those of its named streams."""
    if node.type is Type.FILE:
        yield ""
    for name, _ in node.streams:
        yield name


def _join(folder: bytes, name: bytes) -> bytes:
    return folder + name if folder.endswith(b"/") else folder + b"/" + name
