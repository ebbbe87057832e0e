"""Which snapshots have which files, answered from the index alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from hvmgr import errors
from hvmgr.model import names, patterns
from hvmgr.storage.file_index import Entry, FileIndex, Locked, Place, Point


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
        partition = place.logical or (None if place.partition is None else str(place.partition))
        return (self.disk is None or self.disk in disks_of(place)) and self.partition in {None, partition}

    def may_mean(self, locked: Locked) -> bool:
        """Whether what is looked for may be in what is encrypted: logical volumes, and partitions of a whole disk, lie in it."""
        number = None if locked.partition is None else str(locked.partition)
        return self.partition is None or number in {None, self.partition} or not self.partition.isdigit()


def disks_of(place: Place) -> set[str]:
    """The slots of the disks that a file system lies on."""
    return {place.disk} if place.disk is not None else {name for name, start, _ in place.parts if start is not None}


def search(index: FileIndex, wish: Wish) -> list[Hit]:
    """All that fit, by path; a file that changed in between is as many hits as it has been files.

    NotFound for a disk or a partition that no snapshot has, UsageError for ``..`` behind a link: the index does not know where
    that leads. What may be in something encrypted is told by ``locked``.
    """
    points = index.points()
    there = {point.id: index.places(point) for point in points}
    known = {slot for those in there.values() for one in those for slot in disks_of(one)}
    known |= {one.disk for point in points for one in point.locked if one.disk is not None}
    if wish.disk is not None and known and wish.disk not in known:
        raise names.not_found("disk", wish.disk, sorted(known), where="in the index")
    places = {point: {one.root: one for one in those if wish.means(one)} for point, those in there.items()}
    roots: dict[int, dict[bool, Place]] = {}
    for those in places.values():
        for root, one in those.items():
            roots.setdefault(root, {})[one.ignores_case] = one
    if wish.partition is not None and not roots and not locked(points, wish):
        raise errors.NotFound(f"there is no partition {wish.partition} in the index")
    _require_no_link_above(index, wish, roots)
    paths = _Paths(index, roots)
    orders = {root: _in_order(there, root) for root in roots}
    fitting = {one: path for one, name in _candidates(index, wish, roots) if (path := paths.fitting(one, name, wish))}
    hits: list[Hit] = []
    for number, rows in index.entries(fitting).items():
        root, parts, cases = fitting[number]
        state: dict[int, Entry | None] = {}
        same: dict[Entry, list[str]] = {}
        for at, base in orders[root]:
            state[at] = rows.get(at, None if base is None else state.get(base))
        for point in points:
            entry = state.get(point.id)
            is_meant = wish.snapshots is None or point.snapshot in wish.snapshots
            place = places[point.id].get(root)
            is_meant = is_meant and place is not None and place.ignores_case in cases
            if entry is not None and is_meant and wish.suits(entry):
                same.setdefault(entry, []).append(point.snapshot)
        whole = b"/" + b"/".join(parts)
        last = [*roots[root].values()][-1]
        hits += [Hit(whole, entry, last, tuple(snapshots)) for entry, snapshots in same.items()]
    return sorted(hits, key=lambda one: (one.place.disk or "", one.place.partition or 0, one.place.logical, one.path))


def locked(points: Sequence[Point], wish: Wish) -> dict[str, list[Locked]]:
    """By snapshot (ids) what is encrypted, was opened by no key, and may hold what is looked for."""
    found = {
        point.snapshot: [one for one in point.locked if wish.may_mean(one)]
        for point in points
        if wish.snapshots is None or point.snapshot in wish.snapshots
    }
    return {snapshot: those for snapshot, those in found.items() if those}


def _in_order(there: Mapping[int, list[Place]], root: int) -> list[tuple[int, int | None]]:
    """The points with a file system, each behind the one that it stands on there, and that one."""
    bases = {point: one.base for point, those in there.items() for one in those if one.root == root}
    ordered: dict[int, int | None] = {}
    for one in bases:
        trail: dict[int, int | None] = {}
        at: int | None = one
        while at is not None and at in bases and at not in ordered and at not in trail:
            trail[at] = bases[at]
            at = bases[at]
        ordered.update(reversed(trail.items()))
    return list(ordered.items())


class _Paths:
    """Numbers of paths as what they mean."""

    def __init__(self, index: FileIndex, roots: dict[int, dict[bool, Place]]) -> None:
        self._index, self._roots = index, roots
        self._known: dict[int, tuple[int, tuple[bytes, ...]] | None] = {root: (root, ()) for root in roots}

    def fitting(self, number: int, name: bytes, wish: Wish) -> tuple[int, tuple[bytes, ...], list[bool]] | None:
        """The file system and the names of a path that is looked for, and with case ignored or not; None for another one."""
        found = self._whole(number) if wish.name is None or self._may_fit(name, wish) else None
        if found is None:
            return None
        root, parts = found
        cases = [one for one in self._roots[root] if _fits(parts, name, wish, ignoring=one)]
        return (root, parts, cases) if cases else None

    def _may_fit(self, name: bytes, wish: Wish) -> bool:
        assert wish.name is not None
        return patterns.fits(name, wish.name, ignoring_case=True)

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


def _fits(parts: tuple[bytes, ...], name: bytes, wish: Wish, *, ignoring: bool) -> bool:
    """Whether a path is one that is looked for, in a file system that ignores case or does not."""
    if wish.name is not None and not patterns.fits(
        name if parts else b"", wish.name, ignoring_case=ignoring or wish.ignore_case
    ):
        return False
    wanted = [_resolved(patterns.parts_of(path, ignoring_case=ignoring)) for path in wish.paths]
    counts = [one for pattern in wanted for one in patterns.beginnings(parts, pattern, ignoring_case=ignoring)]
    return any(wish.depth is None or len(parts) - count <= wish.depth for count in counts)


def _candidates(index: FileIndex, wish: Wish, roots: dict[int, dict[bool, Place]]) -> Iterator[tuple[int, bytes]]:
    """Paths among which all that fit are, with their names."""
    if wish.name is not None:
        found = index.with_words(patterns.literals(wish.name))
        if found is not None:
            yield from found
            return
    tops: list[int] = []
    for path in wish.paths:
        for root, ignoring in ((root, one) for root, cases in roots.items() for one in cases):
            parts = _resolved(patterns.parts_of(path, ignoring_case=ignoring))
            tops += _reached(index, [root], parts, ignoring_case=ignoring)
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
            if any(patterns.beginnings([name], [part], ignoring_case=ignoring_case))
        ]
    return places


def _require_no_link_above(index: FileIndex, wish: Wish, roots: dict[int, dict[bool, Place]]) -> None:
    for path in wish.paths:
        for root, ignoring in ((root, one) for root, cases in roots.items() for one in cases):
            parts = patterns.parts_of(path, ignoring_case=ignoring)
            for count in (count for count, part in enumerate(parts) if part == b".."):
                before = _reached(index, [root], _resolved(parts[:count]), ignoring_case=ignoring)
                rows = index.entries(before).values()
                if any(one is not None and one.type == "link" for those in rows for one in those.values()):
                    raise errors.UsageError(
                        f"{os.fsdecode(path)} has .. behind a link, and the index follows none",
                        hint="write the path without .., or leave out --index",
                    )


def _resolved(parts: Sequence[bytes]) -> list[bytes]:
    """Without ``..``, which means the folder above."""
    found: list[bytes] = []
    for part in parts:
        if part == b"..":
            found = found[:-1]
        else:
            found.append(part)
    return found
