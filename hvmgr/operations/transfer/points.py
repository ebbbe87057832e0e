"""The points in the life of a disk that can be read: its present, and what snapshots froze. Each has a stable uuid.

| point                   | its uuid                                            |
|-------------------------|-----------------------------------------------------|
| a slot of a VM          | the disk's own id, as the configuration has it      |
| the slot of a snapshot  | made of the snapshot's id and the disk's id, always the same |
| a free disk, a snapshot of one disk alone | the one that it was made with     |
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors
from hvmgr.model import names
from hvmgr.model.metadata import DiskRecord
from hvmgr.model.tree import Image, Tree
from hvmgr.storage import disk_snapshots, vm_home
from hvmgr.storage.vm_home import VmHome

if TYPE_CHECKING:
    from hvmgr.operations.vm import VM


@dataclass(frozen=True, slots=True)
class Point:
    """One disk at one moment. ``disk`` is the same for all points of one disk; ``chain`` (path, format) the top first.

    ``is_frozen``: nothing writes it any more. ``name`` is for people.
    """

    uuid: str
    disk: str
    name: str
    chain: tuple[tuple[Path, str], ...]
    size: int
    is_frozen: bool
    created: datetime | None = None
    slot: str | None = None

    @property
    def uid(self) -> bytes:
        """The uuid as a VHD holds it."""
        return uuid.UUID(self.uuid).bytes

    @property
    def top(self) -> tuple[Path, str]:
        """The image that shows the disk."""
        return self.chain[0]


def snapshot_uuid(snapshot_id: str, disk: str) -> str:
    """The uuid of a disk as a snapshot froze it."""
    return str(uuid.uuid5(uuid.UUID(snapshot_id), disk))


def of_slot(home: VmHome, slot: str, forest: Tree | None = None) -> Point:
    """The disk as it is at present."""
    forest = forest or home.present_tree()
    path = forest.present.disks.get(slot)
    if path is None:
        raise _no_disk(home, slot, forest.present.disks)
    disk = record_of(home.facts().disks, slot, f"VM {home.name}").id
    return _point(forest, path, uuid=disk, disk=disk, name=f"disk {slot} of {home.name}", slot=slot)


def of_snapshot(home: VmHome, snapshot_id: str, slot: str, forest: Tree | None = None) -> Point:
    """The disk as a snapshot froze it; Corrupt when others wrote below it since."""
    forest = forest or home.tree()
    configuration = home.snapshot(snapshot_id)
    facts = vm_home.require_facts(configuration)
    assert facts.snapshot is not None
    what = f"snapshot '{facts.snapshot.name}' of {home.name}"
    path = forest.nodes[snapshot_id].disks.get(slot)
    if path is None:
        raise names.not_found("disk", slot, forest.nodes[snapshot_id].disks, where=f"in {what}")
    disk = record_of(facts.disks, slot, what).id
    return _point(
        forest,
        path,
        uuid=snapshot_uuid(snapshot_id, disk),
        disk=disk,
        name=f"disk {slot} of {what}",
        created=facts.snapshot.created,
        slot=slot,
        is_frozen=True,
    )


def of_disk_snapshot(home: VmHome, one: disk_snapshots.DiskSnapshot, forest: Tree | None = None) -> Point:
    """The disk as a snapshot of it alone froze it."""
    forest = forest or home.tree()
    path = str(one.path(home.layout))
    name = f"the snapshot {one.uuid} of disk {one.slot} of {home.name}"
    return _point(
        forest, path, uuid=one.uuid, disk=one.disk, name=name, created=one.created, slot=one.slot, is_frozen=True
    )


def named(vm: VM, slot: str, snapshot: str | None) -> Callable[[], Point]:
    """The disk at present, or as the named snapshot has it: looked up when it is called."""
    if snapshot is None:
        return lambda: of_slot(vm.home, slot)
    found = vm.snapshot(snapshot)
    return lambda: of_snapshot(vm.home, found.id, slot)


def record_of(disks: Sequence[DiskRecord], slot: str, where: str) -> DiskRecord:
    """What hvmgr knows of a slot's disk."""
    for one in disks:
        if one.slot == slot:
            return one
    raise errors.Corrupt(f"hvmgr's facts in {where} do not know disk {slot}", hint="see what is wrong: hvmgr doctor")


def _no_disk(home: VmHome, slot: str, known: Iterable[str]) -> errors.HvmgrError:
    for disk in home.present().disks():
        if disk.slot == slot and not disk.takes_part:
            return errors.Unsupported(
                f"disk {slot} of {home.name} takes no part in snapshots", hint="only disks that do can be transferred"
            )
    return names.not_found("disk", slot, known, where=f"in {home.name}")


def _point(
    forest: Tree,
    path: str,
    *,
    uuid: str,
    disk: str,
    name: str,
    slot: str,
    created: datetime | None = None,
    is_frozen: bool = False,
) -> Point:
    chain: list[Image] = forest.chain(path)
    return Point(
        uuid=uuid,
        disk=disk,
        name=name,
        chain=tuple((Path(one.path), one.format) for one in chain),
        size=chain[0].size,
        is_frozen=is_frozen,
        created=created,
        slot=slot,
    )
