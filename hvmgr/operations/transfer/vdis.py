"""Every disk that can be sent or received, under Xen's word: VDI. The public API: ``Host.disks``.

| a VDI is                     | can be                                            |
|------------------------------|---------------------------------------------------|
| a slot of a VM               | sent, received (off), snapshotted                 |
| the slot of a snapshot       | sent; it goes with its snapshot                   |
| a snapshot of one disk alone | sent, destroyed                                   |
| a free disk                  | everything                                        |
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors, units
from hvmgr.model.image_format import ImageFormat
from hvmgr.model.plan import Plan
from hvmgr.model.tree import Tree
from hvmgr.operations import working
from hvmgr.operations.transfer import points, sending, shelving
from hvmgr.operations.transfer.points import Point
from hvmgr.storage import disk_snapshots, free_disks, images, vm_home

if TYPE_CHECKING:
    from hvmgr.operations.host import Host
    from hvmgr.operations.transfer.outgoing import Outgoing
    from hvmgr.operations.vm import VM
    from hvmgr.storage.disk_snapshots import DiskSnapshot
    from hvmgr.vhd.inlet import Readable


class Kind(StrEnum):
    """What a VDI is."""

    SLOT = "slot"
    SNAPSHOT = "snapshot"
    DISK_SNAPSHOT = "disk-snapshot"
    FREE = "free"


@dataclass(frozen=True, slots=True)
class Vdi:
    """One of them. ``snapshot_of`` is the uuid of the disk that it is a point of; ``snapshot`` the id of the VM's snapshot.

    ``size`` is what a guest sees, ``used`` what the top image alone takes, both in bytes. ``created`` (RFC 3339) is
    known of snapshots and free disks.
    """

    uuid: str
    kind: Kind
    name: str
    size: int
    used: int
    vm: str | None = None
    vm_id: str | None = None
    slot: str | None = None
    snapshot: str | None = None
    snapshot_of: str | None = None
    created: str | None = None


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a VDI of a VM is found."""

    vm: VM
    slot: str
    snapshot: str | None = None
    alone: DiskSnapshot | None = None

    def find(self) -> Point:
        home = self.vm.home
        if self.alone is not None:
            return points.of_disk_snapshot(home, self.alone)
        if self.snapshot is not None:
            return points.of_snapshot(home, self.snapshot, self.slot)
        return points.of_slot(home, self.slot)


class Disks:
    """The VDIs of one host's root."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._shelf = free_disks.shelf(host.root)

    def list(self) -> list[Vdi]:
        """All of them: those of VMs first, each disk before its snapshots; what cannot be read is told and left out."""
        found: list[Vdi] = []
        for vm in self._host.vms():
            try:
                found += _of_vm(vm)
            except errors.HvmgrError as error:
                self._host.reporter.notice(f"the disks of {vm.name} are left out: {error}")
        return found + [_free(self._shelf, one) for one in self._shelf.all()]

    def get(self, wanted: str) -> Vdi:
        """The one with this uuid."""
        for one in self.list():
            if one.uuid == wanted:
                return one
        raise _not_found(wanted)

    def create(self, size: int, *, name: str = "") -> str:
        """The uuid of a new free disk, blank."""
        made = str(uuid.uuid4())
        self._require_approval("vdi-create", f"creation of a free disk of {units.format_size(size)}")
        shelving.create(self._host, self._shelf, size, name, made)
        return made

    def snapshot(self, wanted: str, *, name: str = "") -> str:
        """The uuid of a new snapshot of this disk alone; a VM may run, and its tree does not know of it."""
        place = self._place(wanted)
        if place is None:
            made = str(uuid.uuid4())
            self._require_approval("vdi-snapshot", f"snapshot of the disk {wanted}")
            shelving.snapshot(self._host, self._shelf, wanted, name, made)
            return made
        from hvmgr.operations.transfer import disk_snapshotting

        _require_disk(place, wanted)
        with working.on(place.vm) as session:
            return disk_snapshotting.create(session, place.slot, name)

    def destroy(self, wanted: str) -> None:
        """The free disk or the snapshot of one disk alone is gone."""
        place = self._place(wanted)
        if place is None:
            self._require_approval("vdi-destroy", f"destruction of the disk {wanted}")
            shelving.destroy(self._host, self._shelf, wanted)
            return
        if place.alone is None:
            raise _belongs(place, wanted)
        from hvmgr.operations.transfer import disk_snapshotting

        with working.on(place.vm) as session:
            disk_snapshotting.destroy(session, place.alone)

    def export(
        self, wanted: str, *, base: str | None = None, format: ImageFormat = ImageFormat.RAW, path: Path | None = None
    ) -> Outgoing:
        """The disk as a stream; with ``base``, an older point of the same disk, only what differs from that one.

        ``path`` is where it goes, if that is a file, for the administrator's hooks.
        """
        place = self._place(wanted)
        older = None if base is None else self._finder(base)
        if place is not None:
            return sending.of_vm(place.vm, place.find, older, format, path)
        self._require_approval("vdi-export", f"export of the disk {wanted}")
        return shelving.opened(self._host, self._shelf, wanted, None if older is None else older(), format)

    def receive(
        self,
        wanted: str,
        source: Readable,
        *,
        format: ImageFormat = ImageFormat.RAW,
        length: int | None = None,
        force: bool = False,
        to_end: bool = True,
        name: str = "the stream",
    ) -> None:
        """The disk holds what arrives, as ``VM.import_disk`` says."""
        place = self._place(wanted)
        if place is not None:
            _require_disk(place, wanted)
            place.vm.import_disk(
                place.slot, source, format=format, length=length, force=force, to_end=to_end, name=name
            )
            return
        from hvmgr.operations.transfer.incoming import Incoming

        shelving.require_importable(self._host, self._shelf, wanted)
        self._require_approval("vdi-import", f"import into the disk {wanted}")
        folder = self._shelf.folder
        with Incoming(source, format, spool=folder, length=length, to_end=to_end, name=name) as stream:
            shelving.receive(self._host, self._shelf, wanted, stream, force=force)

    def require_importable(self, wanted: str) -> None:
        """Raises what ``receive`` would say of the disk before anything arrives."""
        place = self._place(wanted)
        if place is None:
            shelving.require_importable(self._host, self._shelf, wanted)
            return
        _require_disk(place, wanted)
        place.vm.require_importable(place.slot)

    def _finder(self, wanted: str) -> Callable[[], Point]:
        place = self._place(wanted)
        if place is not None:
            return place.find
        one = self._shelf.find(wanted)
        assert one is not None
        return lambda: shelving.point_of(self._shelf, one)

    def _place(self, wanted: str) -> _Place | None:
        """Where the VDI is; None for a free disk, NotFound for none at all."""
        _require_uuid(wanted)
        found = [place for vm in self._host.vms() for place in _places(vm, wanted)]
        if len(found) > 1:
            names = " and ".join(one.vm.name for one in found)
            raise errors.Conflict(f"{names} have a disk {wanted} each", hint="see what is wrong: hvmgr doctor")
        if found:
            return found[0]
        if self._shelf.find(wanted) is None:
            raise _not_found(wanted)
        return None

    def _require_approval(self, operation: str, subject: str) -> None:
        plan = Plan(plan_id=str(uuid.uuid4()), vm_id="", operation=operation, subject=subject)
        if not self._host.reporter.approve(plan):
            raise errors.Declined("not done; nothing was changed")


def _require_uuid(text: str) -> None:
    try:
        is_uuid = str(uuid.UUID(text)) == text
    except ValueError:
        is_uuid = False
    if not is_uuid:
        raise errors.UsageError(f"'{text}' is no uuid", hint="see: hvmgr vdi-list")


def _not_found(wanted: str) -> errors.NotFound:
    return errors.NotFound(f"there is no disk {wanted}", hint="see: hvmgr vdi-list", uuid=wanted)


def _require_disk(place: _Place, wanted: str) -> None:
    """A snapshot's disk neither changes nor has snapshots."""
    if place.alone is not None or place.snapshot is not None:
        disk = points.of_slot(place.vm.home, place.slot).uuid if place.alone is None else place.alone.disk
        raise errors.Conflict(f"{wanted} is a snapshot, which never changes", hint=f"name the disk: {disk}")


def _belongs(place: _Place, wanted: str) -> errors.Conflict:
    vm, slot = place.vm.name, place.slot
    if place.snapshot is not None:
        name = place.vm.home.entry(place.snapshot).record.name
        return errors.Conflict(
            f"{wanted} is disk {slot} of the snapshot '{name}' of {vm}, and goes with it",
            hint=f"hvmgr snapshot delete {vm} {place.snapshot}",
        )
    return errors.Conflict(f"{wanted} is disk {slot} of {vm}", hint="detach it from the VM, or delete the VM")


def _places(vm: VM, wanted: str) -> Iterator[_Place]:
    """What of a VM has this uuid; the whole tree is not read for that."""
    home = vm.home
    with contextlib.suppress(errors.HvmgrError):  # what is wrong with a home is said when it is used
        for disk in home.facts().disks:
            if disk.id == wanted:
                yield _Place(vm, disk.slot)
        for snapshot_id, disks in _snapshots(vm):
            for slot, disk_id in disks.items():
                if points.snapshot_uuid(snapshot_id, disk_id) == wanted:
                    yield _Place(vm, slot, snapshot_id)
        for alone in disk_snapshots.read_all(home.layout):
            if alone.uuid == wanted:
                yield _Place(vm, alone.slot, alone=alone)


def _snapshots(vm: VM) -> Iterator[tuple[str, dict[str, str]]]:
    """The disks' ids of each snapshot, by slot."""
    for entry in vm.home.entries():
        facts = vm_home.require_facts(vm.home.snapshot(entry.record.id))
        yield entry.record.id, {one.slot: one.id for one in facts.disks}


def _of_vm(vm: VM) -> list[Vdi]:
    forest = vm.tree()
    found = [_slot(vm, points.of_slot(vm.home, slot, forest), forest) for slot in sorted(forest.present.disks)]
    for one in vm.snapshots():
        for slot in sorted(forest.nodes[one.id].disks):
            point = points.of_snapshot(vm.home, one.id, slot, forest)
            found.append(_frozen(vm, point, forest, Kind.SNAPSHOT, one.name, one.id))
    for alone in disk_snapshots.read_all(vm.home.layout):
        point = points.of_disk_snapshot(vm.home, alone, forest)
        found.append(_frozen(vm, point, forest, Kind.DISK_SNAPSHOT, alone.label, None))
    return found


def _slot(vm: VM, point: Point, forest: Tree) -> Vdi:
    return Vdi(
        uuid=point.uuid,
        kind=Kind.SLOT,
        name=f"{vm.name} {point.slot}",
        size=point.size,
        used=forest.images[str(point.top[0])].data,
        vm=vm.name,
        vm_id=vm.id,
        slot=point.slot,
    )


def _frozen(vm: VM, point: Point, forest: Tree, kind: Kind, name: str, snapshot: str | None) -> Vdi:
    return Vdi(
        uuid=point.uuid,
        kind=kind,
        name=name,
        size=point.size,
        used=forest.images[str(point.top[0])].data,
        vm=vm.name,
        vm_id=vm.id,
        slot=point.slot,
        snapshot=snapshot,
        snapshot_of=point.disk,
        created=None if point.created is None else units.to_rfc3339(point.created),
    )


def _free(shelf: free_disks.Shelf, one: free_disks.FreeDisk) -> Vdi:
    kind = Kind.FREE if one.snapshot_of is None else Kind.DISK_SNAPSHOT
    path, size, used = shelf.path(one), one.size, 0
    with contextlib.suppress(errors.HvmgrError, OSError):  # what is wrong with it is said when it is used
        size, used = images.read(path, images.QCOW2).size, path.stat().st_blocks * 512
    return Vdi(one.uuid, kind, one.name, size, used, snapshot_of=one.snapshot_of, created=one.created)
