"""The index of files of a VM kept up to date: what came is taken in, what went goes, and what stays costs nothing.

What is encrypted is taken in as soon as a key for it is given. What no key opened is remembered with the snapshot, and tried
again at the next update with keys; what is in the index stays, for a snapshot does not change.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors, settings
from hvmgr.model.progress import Progress
from hvmgr.storage import access, durable, file_index, index_file
from hvmgr.storage.file_index import FileIndex, Locked, Point

if TYPE_CHECKING:
    from hvmgr.operations.inside.unlocking import Key
    from hvmgr.operations.snapshot import Snapshot
    from hvmgr.operations.vm import VM

Report = Callable[[Progress], None]


@dataclass(slots=True)
class Updated:
    """Which snapshots (ids) were taken in and which rows went; ``folders`` is how many folders were read for that.

    ``completed`` are those of which something encrypted was taken in now.
    """

    added: list[str] = field(default_factory=list)
    completed: list[str] = field(default_factory=list)
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
    there = {one.id for one in vm.snapshots()}
    known = {one.snapshot: one for one in index.points()}
    return (
        [one for one in _parents_first(vm) if one.id not in known],
        [one for one in known.values() if one.snapshot not in there],
    )


def _parents_first(vm: VM) -> list[Snapshot]:
    there = {one.id: one for one in vm.snapshots()}
    ordered: dict[str, Snapshot] = {}
    for one in there.values():
        trail = [one]
        while (parent := trail[-1].parent) is not None and parent in there and parent not in ordered:
            trail.append(there[parent])
        ordered.update((each.id, each) for each in reversed(trail))
    return list(ordered.values())


def to_complete(vm: VM, index: FileIndex) -> list[Snapshot]:
    """The snapshots in the index of which something is encrypted that no key has opened yet, parents first."""
    locked = {one.snapshot for one in index.points() if one.locked}
    return [one for one in _parents_first(vm) if one.id in locked]


def require_fitting(vm: VM, keys: Sequence[Key], *, wait_s: float, anew: bool = False) -> None:
    """NotFound, or UsageError, for a key that opens nothing of what an update would read, although something is locked there."""
    if not keys:
        return
    snapshots = _parents_first(vm)
    locked: dict[str, Sequence[Locked]] = {}
    if not anew:
        with (
            contextlib.suppress(errors.NotFound, errors.HostFailed),  # it is made anew
            opened(vm, wait_s=wait_s, reading=True) as index,
        ):
            snapshots = _to_read(vm, index, keys)
            locked = {one.snapshot: one.locked for one in index.points()}
    _require_fitting(vm, [(one, locked.get(one.id, ())) for one in snapshots], keys)


def _require_fitting(vm: VM, snapshots: Sequence[tuple[Snapshot, Sequence[Locked]]], keys: Sequence[Key]) -> None:
    from hvmgr.operations.inside import looking, unlocking, views

    left = list(keys)
    wrong: dict[Key, errors.HvmgrError] = {}
    tried: set[Locked] = set()
    for snapshot, locked in snapshots:
        if locked and tried.issuperset(locked):
            continue
        tried.update(locked)
        try:
            with looking.opened(views.of_snapshot(vm, snapshot), keys=keys, strict=False) as inside:
                volumes = inside.everything
        except errors.NotFound:  # an image that is not there: the update says so
            continue
        for key in tuple(left):
            try:
                unlocking.check(volumes, [key])
            except (errors.NotFound, errors.UsageError) as error:
                wrong.setdefault(key, error)
                continue
            if any(one.encrypted and key.is_for(one) for one in volumes):
                left.remove(key)
        if not left:
            return
    for key in left:
        if key in wrong:
            raise wrong[key]


def _to_read(vm: VM, index: FileIndex, keys: Sequence[Key]) -> list[Snapshot]:
    """The snapshots that have to be looked into, parents first: new ones, and with keys those that have something locked."""
    coming = {one.id for one in missing(vm, index)[0]}
    coming |= {one.id for one in to_complete(vm, index)} if keys else set()
    return [one for one in _parents_first(vm) if one.id in coming]


def update(vm: VM, index: FileIndex, report: Report, keys: Sequence[Key] = ()) -> Updated:
    """The index holds all snapshots of the VM, and no others; with what the ``keys`` open of them."""
    done = Updated()
    _, gone = missing(vm, index)
    for one in gone:
        with index.writing():
            still = next((each for each in index.points() if each.snapshot == one.snapshot), None)
            if still is not None:
                index.remove_point(still)
                done.removed.append(one.snapshot)
    if to_read := _to_read(vm, index, keys):
        _take_in(vm, index, to_read, report, keys, done)
    return done


def _take_in(
    vm: VM, index: FileIndex, to_read: Sequence[Snapshot], report: Report, keys: Sequence[Key], done: Updated
) -> None:
    from hvmgr.operations.inside import index_walk, views

    there = {one.id: one for one in vm.snapshots()}
    tried: set[Locked] = set()
    for number, snapshot in enumerate(to_read):
        report(Progress(number, len(to_read), f"index {snapshot.name}"))
        with index.writing():
            known = {one.snapshot: one for one in index.points()}
            point = known.get(snapshot.id)
            if point is not None and (not keys or tried.issuperset(point.locked)):
                continue  # another process was faster, or none of the keys opens anything there
            befores = [
                index_walk.Before(index, known[one.id], partial(views.of_snapshot, vm, one))
                for one in _above(snapshot, there, known)
            ]
            where = index.add_point(snapshot.id) if point is None else point
            taken = index_walk.take_in(index, where, views.of_snapshot(vm, snapshot), befores, keys)
            tried.update(taken.locked)
            done.folders += taken.folders
            if point is None:
                done.added.append(snapshot.id)
            elif taken.volumes:
                done.completed.append(snapshot.id)


def _above(snapshot: Snapshot, there: Mapping[str, Snapshot], known: Mapping[str, Point]) -> Iterator[Snapshot]:
    """What a snapshot stands on and the index has, nearest first."""
    above = snapshot.parent
    while above is not None and above in there:
        if above in known:
            yield there[above]
        above = there[above].parent
