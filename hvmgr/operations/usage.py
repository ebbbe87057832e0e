"""What a VM's home takes, and who would give it back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hvmgr.model import outside_images, tree
from hvmgr.model.tree import Keeper, Tree
from hvmgr.storage import vm_home
from hvmgr.storage.vm_home import VmHome


@dataclass(frozen=True, slots=True)
class SnapshotUsage:
    """What the files of one snapshot take, in bytes: its own images, and its saved memory."""

    snapshot_id: str
    name: str
    images: int
    memory: int


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes on disk by what they are for. ``pending`` is part of ``unnamed``; ``outside`` is in nobody's sum.

    ``by_name`` is part of ``outside``, or of ``unnamed`` for what lies in the home.
    """

    snapshots: tuple[SnapshotUsage, ...]
    now: int
    undo: int
    unnamed: int
    pending: int
    orphans: tuple[tuple[str, int], ...]  # detached disks and files that nobody knows
    by_name: tuple[tuple[str, int], ...]  # images that others made, which a merge takes only when they are named
    outside: int

    @property
    def total(self) -> int:
        """Everything in the home."""
        inside = sum(one.images + one.memory for one in self.snapshots)
        return inside + self.now + self.undo + self.unnamed + sum(size for _, size in self.orphans)

    @property
    def reclaimable(self) -> int:
        """At most this much comes back by merging, emptying the undo slot, and removing orphans."""
        return self.pending + self.undo + sum(size for _, size in self.orphans)


def measure(home: VmHome) -> Usage:
    """The usage of one home; every image is counted once, for the oldest that names it."""
    forest = home.tree()
    inside = {path: image.data for path, image in forest.images.items() if image.keeper is not Keeper.OUTSIDE}
    counted: set[str] = set()

    def take(paths: list[str]) -> int:
        new = [path for path in dict.fromkeys(paths) if path in inside and path not in counted]
        counted.update(new)
        return sum(inside[path] for path in new)

    snapshots = tuple(
        SnapshotUsage(one.record.id, one.record.name, take(list(one.disks.values())), _memory(home, one.record.id))
        for one in home.snapshots()
    )
    now = take(list(forest.present.disks.values()))
    undo = take([] if forest.undo is None else list(forest.undo.disks.values()))
    hidden = [*tree.unnamed(forest), *(path for path in forest.strangers if path in forest.images)]
    waiting = take([parent for parent, _ in tree.pending(forest)])
    unnamed = waiting + take(hidden)
    return Usage(
        snapshots=snapshots,
        now=now,
        undo=undo,
        unnamed=unnamed,
        pending=waiting,
        orphans=_orphans(home, set(forest.images) - set(tree.detached(forest)), inside),
        by_name=_by_name(forest),
        outside=sum(image.data for image in forest.images.values() if image.keeper is Keeper.OUTSIDE),
    )


def _by_name(forest: Tree) -> tuple[tuple[str, int], ...]:
    """Those that would go; what is only written for them stays."""
    return tuple(
        (path, forest.images[path].data)
        for path in outside_images.names_needed(forest)
        if forest.images[path].keeper is not Keeper.IMAGES
    )


def _memory(home: VmHome, snapshot_id: str) -> int:
    folder = home.layout.snapshot_folder(snapshot_id)
    return sum(_size(file) for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0


def _orphans(home: VmHome, known: set[str], inside: dict[str, int]) -> tuple[tuple[str, int], ...]:
    found = []
    for folder in (home.layout.images, home.layout.bases):
        for file in sorted(folder.iterdir()) if folder.is_dir() else ():
            path = vm_home.canonical(str(file))
            if path not in known and file.is_file():
                found.append((path, inside.get(path, _size(file))))
    left_out = _left_out(home) if found else set()  # not for each list: it reads every configuration
    return tuple(one for one in found if one[0] not in left_out)


def _left_out(home: VmHome) -> set[str]:
    """The disks that the VM uses and that no snapshot freezes."""
    every = (home.present(), home.undo(), *(home.snapshot(one.record.id) for one in home.entries()))
    named = {disk.source for one in every if one is not None for disk in one.disks() if disk.is_left_out}
    return {vm_home.canonical(path) for path in named if path is not None}


def _size(file: Path) -> int:
    return file.stat().st_blocks * 512
