"""Which snapshots have which files, answered from the index alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from hvmgr import errors
from hvmgr.operations.inside import browsing
from hvmgr.storage.file_index import Entry, FileIndex, Place


@dataclass(frozen=True, slots=True)
class Hit:
    """A file that is the same at some snapshots (ids, each behind those that it stands on)."""

    path: bytes
    entry: Entry
    place: Place
    snapshots: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Wish:
    """What is looked for: at and below ``paths``, which may be patterns; a name that fits ``name``; an entry that suits."""

    paths: tuple[bytes, ...]
    name: bytes | None = None
    ignore_case: bool = False
    depth: int | None = None
    suits: Callable[[Entry], bool] = lambda _: True
    snapshots: frozenset[str] | None = None  # only at these
    disk: str | None = None
    partition: str | None = None

    def means(self, place: Place) -> bool:
        """Whether the file system may be the one."""
        return (self.disk is None or self.disk == place.disk) and (
            self.partition is None or self.partition in {str(place.partition), place.logical}
        )


def search(index: FileIndex, wish: Wish) -> list[Hit]:
    """All that fit, by path; a file that changed in between is as many hits as it has been files."""
    points = index.points()
    places = {point.id: {one.root: one for one in index.places(point) if wish.means(one)} for point in points}
    roots = {root: one for those in places.values() for root, one in those.items()}
    if wish.partition is not None and not roots:
        raise errors.NotFound(f"there is no partition {wish.partition} in the index")
    paths = _Paths(index, roots)
    fitting = {one: path for one, name in _candidates(index, wish, roots) if (path := paths.fitting(one, name, wish))}
    hits: list[Hit] = []
    for number, rows in index.entries(fitting).items():
        root, parts = fitting[number]
        state: dict[int, Entry | None] = {}
        same: dict[Entry, list[str]] = {}
        for point in points:
            entry = state[point.id] = rows.get(point.id, None if point.base is None else state.get(point.base))
            is_meant = wish.snapshots is None or point.snapshot in wish.snapshots
            if entry is not None and is_meant and root in places[point.id] and wish.suits(entry):
                same.setdefault(entry, []).append(point.snapshot)
        whole = b"/" + b"/".join(parts)
        hits += [Hit(whole, entry, roots[root], tuple(snapshots)) for entry, snapshots in same.items()]
    return sorted(hits, key=lambda one: (one.place.disk or "", one.place.partition or 0, one.place.logical, one.path))


class _Paths:
    """Numbers of paths as what they mean."""

    def __init__(self, index: FileIndex, roots: dict[int, Place]) -> None:
        self._index, self._roots = index, roots
        self._known: dict[int, tuple[int, tuple[bytes, ...]] | None] = {root: (root, ()) for root in roots}

    def fitting(self, number: int, name: bytes, wish: Wish) -> tuple[int, tuple[bytes, ...]] | None:
        """The file system and the names of a path that is looked for; None for another one."""
        found = self._whole(number) if wish.name is None or self._may_fit(name, wish) else None
        if found is None:
            return None
        root, parts = found
        ignoring = self._roots[root].ignores_case
        if wish.name is not None and not browsing.fits(
            name if parts else b"", wish.name, ignoring_case=ignoring or wish.ignore_case
        ):
            return None
        for path in wish.paths:
            pattern = _resolved(browsing.parts_of(path, ignoring_case=ignoring))
            for count in browsing.beginnings(parts, pattern, ignoring_case=ignoring):
                if wish.depth is None or len(parts) - count <= wish.depth:
                    return found
        return None

    def _may_fit(self, name: bytes, wish: Wish) -> bool:
        assert wish.name is not None
        return browsing.fits(name, wish.name, ignoring_case=True)

    def _whole(self, number: int) -> tuple[int, tuple[bytes, ...]] | None:
        trail: list[tuple[int, bytes]] = []
        at = number
        while at not in self._known:
            above = self._index.above(at)
            if above is None or not above[0]:
                self._known[at] = None  # a file system that is not meant
                break
            trail.append((at, above[1]))
            at = above[0]
        found = self._known[at]
        for one, name in reversed(trail):
            found = None if found is None else (found[0], (*found[1], name))
            self._known[one] = found
        return found


def _candidates(index: FileIndex, wish: Wish, roots: dict[int, Place]) -> Iterator[tuple[int, bytes]]:
    """Paths among which all that fit are, with their names."""
    if wish.name is not None:
        found = index.with_words(browsing.literals(wish.name))
        if found is not None:
            yield from found
            return
    tops: list[int] = []
    for path in wish.paths:
        for root, place in roots.items():
            parts = _resolved(browsing.parts_of(path, ignoring_case=place.ignores_case))
            tops += _reached(index, [root], parts, ignoring_case=place.ignores_case)
    for number in dict.fromkeys(index.all_below(tops)):
        above = index.above(number)
        if above is not None:
            yield number, above[1]


def _reached(index: FileIndex, places: list[int], parts: Sequence[bytes], *, ignoring_case: bool) -> list[int]:
    """What the beginning of a path means, up to the first part that may mean any number of folders."""
    for part in parts:
        if part == b"**":
            break
        places = [
            number
            for place in places
            for number, name in index.below(place)
            if any(browsing.beginnings([name], [part], ignoring_case=ignoring_case))
        ]
    return places


def _resolved(parts: Sequence[bytes]) -> list[bytes]:
    """Without ``..``, which means the folder above."""
    found: list[bytes] = []
    for part in parts:
        if part == b"..":
            found = found[:-1]
        else:
            found.append(part)
    return found
