"""Views: the disks of a VM, a snapshot, an export, a home or an image file as they stood still at one moment, to be read.

    for disk in views.of_vm(vm, snapshot="before"):
        with views.opened(disk) as source:          # the raw disk: size, read_into(offset, buffer), stretches()
            for one in views.volumes(disk, source):
                print(one.number, one.kind, one.label)

Nothing is written, neither in an image nor beside it; no root is needed, and no libvirt. Images are held by QEMU's own
locks of a reader: a VM that runs on children of them is not disturbed, and nobody writes what is being read.

A program that needs the disk as a file of the host (a mount) gives ``Frozen.links`` to ``host/image_export``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors
from hvmgr.host import image_export, image_locks
from hvmgr.host.image_export import Link
from hvmgr.model import names
from hvmgr.storage import frozen, images, partitions
from hvmgr.storage.filesystems import signatures
from hvmgr.storage.filesystems.signatures import Kind
from hvmgr.storage.filesystems.window import Window
from hvmgr.storage.partitions import Disk
from hvmgr.vhd.source import RawSource, Source

if TYPE_CHECKING:
    from hvmgr.operations.snapshot import Snapshot
    from hvmgr.operations.transfer.points import Point
    from hvmgr.operations.vm import VM
    from hvmgr.storage.source_home import SourceHome


@dataclass(frozen=True, slots=True)
class Frozen:
    """One disk at one moment. ``links`` is its chain, top first, as ``image_export.start`` takes it.

    ``name`` is for people; ``moment`` says which moment it is where nobody named one; ``slot`` is None for a plain image.
    """

    name: str
    links: tuple[Link, ...]
    slot: str | None = None
    moment: str | None = None


@dataclass(frozen=True, slots=True)
class Volume:
    """A place on a disk that may hold a file system: a partition, or the whole disk (``number`` None).

    ``kind`` is None where nothing known was found; ``start`` and ``size`` are bytes of the disk; ``type`` is the
    partition table's own word. ``logical`` is the name of a logical volume (LVM), which may lie on several disks.
    """

    disk: Frozen
    number: int | None
    start: int
    size: int
    kind: Kind | None
    label: str = ""
    uuid: str = ""
    type: str = ""
    name: str = ""
    logical: str = ""
    why_not: str = ""  # nobody can read it
    encrypted: bool = False
    copied: str = ""  # where a copy of it is, which would not follow if it were written
    reader: str = ""  # what reads it, where that is no reader of ours

    @property
    def title(self) -> str:
        """What people call it."""
        if self.logical:
            return f"volume {self.logical}"
        place = self.disk.slot or Path(self.disk.links[0].path).name
        return place if self.number is None else f"{place} partition {self.number}"

    def is_meant(self, partition: str) -> bool:
        """Whether it is what was asked for, by the number of a partition or the name of a logical volume."""
        own = self.logical or ("" if self.number is None else str(self.number))
        return bool(own) and own == partition


# --- which disks ----------------------------------------------------------------------------------------------------


def of_vm(vm: VM, *, snapshot: str | None = None, slot: str | None = None) -> list[Frozen]:
    """The disks of a VM at a snapshot, or at present when it is off; only ``slot``, when given.

    The present of a VM that runs never stands still: it is seen at its latest snapshot, the parent of the present, and
    ``moment`` says so (``standing`` has it stand still). Conflict when there is none. NotFound for a snapshot or a slot that is not there.
    """
    from hvmgr.operations.transfer import points

    if snapshot is None:
        forest = vm.home.present_tree()
        slots = [slot] if slot is not None else sorted(forest.present.disks)
        found = [points.of_slot(vm.home, one, forest) for one in slots]
        if not any(_is_written(path) for point in found for path, _ in point.chain[:1]):
            return [of_point(one, None) for one in found]
        latest = vm.now().parent
        if latest is None:
            raise errors.Conflict(
                f"{vm.name} runs and has no snapshot, and what it writes to never stands still",
                hint="have it stand still for a moment, which the running VM hardly notices: --present; or take a snapshot:"
                f" hvmgr snapshot create {vm.name} --type disk-only",
            )
        chosen = next(one for one in vm.snapshots() if one.id == latest)
        moment: str | None = f"{vm.name} runs: this is its latest snapshot '{chosen.name}'"
    else:
        chosen, moment = vm.snapshot(snapshot), None
    return of_snapshot(vm, chosen, slot=slot, moment=moment)


def of_snapshot(vm: VM, chosen: Snapshot, *, slot: str | None = None, moment: str | None = None) -> list[Frozen]:
    """The disks of a VM at this very snapshot, whatever others are called; only ``slot``, when given."""
    from hvmgr.operations.transfer import points

    forest = vm.home.tree()
    slots = [slot] if slot is not None else sorted(forest.nodes[chosen.id].disks)
    found = [points.of_snapshot(vm.home, chosen.id, one, forest) for one in slots]
    return [of_point(one, _with_doubt(vm, one, moment)) for one in found]


def _with_doubt(vm: VM, point: Point, moment: str | None) -> str | None:
    """What somebody wrote to since it was frozen is shown all the same, for there may be something to save, and told."""
    for path, _ in point.chain:
        if frozen.is_changed(vm.home.layout, path):
            doubt = f"{path} was changed by others since the snapshot was taken: what is shown may be wrong"
            return doubt if moment is None else f"{moment}; {doubt}"
    return moment


def of_point(point: Point, moment: str | None) -> Frozen:
    """A point of a VM's disk, which nobody writes any more."""
    return Frozen(point.name, tuple(_links(point.chain)), point.slot, moment)


def of_image(path: Path, fmt: str | None = None) -> Frozen:
    """The disk in an image file or a block device, with the parents that its header names.

    ``fmt`` (qcow2, raw, vhd, vhdx) where the content is not to decide. Conflict when a VM that runs writes it.
    """
    from hvmgr.operations.images import links as image_links

    image_links.require_image(path)
    real = Path(os.path.realpath(path))
    stated = images.VPC if fmt == "vhd" else fmt
    if stated is None and images.identify(real).format == Kind.LUKS:
        stated = images.RAW  # it is a disk that is encrypted as a whole
    return Frozen(str(path), tuple(image_links.chain_of(real, stated or image_links.probe(real))))


def of_folder(
    folder: Path, *, vm: str | None = None, snapshot: str | None = None, slot: str | None = None
) -> list[Frozen]:
    """The disks of an export (folder or unpacked), or of a VM home wherever it lies now, also on read-only media.

    Paths in it are those of the place where it was written; only what lies inside the folder is followed, and the bases
    that a home of this host has elsewhere.
    """
    from hvmgr.storage import source_home

    source = source_home.open_source(folder, vm=vm)
    if source.archive is not None:
        raise errors.Unsupported(
            f"{folder} is an archive, and disks in it cannot be looked into", hint="unpack it first: tar -xf FILE"
        )
    where = f"{source.present.name} in {source.folder}"
    disks, what = dict(source.disks), where
    if snapshot is not None:
        record = names.find_snapshot(snapshot, [one.record for one in source.snapshots], where=f"in {where}")
        disks = next(dict(one.disks) for one in source.snapshots if one.record is record)
        what = f"snapshot '{record.name}' of {where}"
    if slot is not None and slot not in disks:
        raise names.not_found("disk", slot, disks, where=f"in {what}")
    wanted = sorted(disks) if slot is None else [slot]
    return [Frozen(f"disk {one} of {what}", tuple(_links(_source_chain(source, disks[one]))), one) for one in wanted]


def _source_chain(source: SourceHome, path: str) -> list[tuple[Path, str]]:
    chain = source.chain(path)
    if not chain or chain[-1].parent is not None:
        gone = path if not chain else str(chain[-1].parent)
        words = next((one.sentence for one in source.problems if one.where == gone), f"the image {gone} is not there")
        raise errors.NotFound(
            words, hint="its images have to lie where the configuration says, or in the folder", path=gone
        )
    return [(Path(one.path), one.format) for one in chain]


def _links(chain: Sequence[tuple[Path, str]]) -> Iterator[Link]:
    """A chain as ``image_export`` takes it: what QEMU does not read right is left to our own codec, with all below it."""
    from hvmgr.operations.images import links as image_links

    for path, fmt in chain:
        if fmt == images.VPC:
            yield from image_links.chain_of(path, fmt)
            return
        yield Link(path, fmt)


def _is_written(path: Path) -> bool:
    """Whether somebody has an image open for writing: by QEMU's own locks, without asking libvirt."""
    try:
        os.close(image_locks.take(path, writable=False))
    except errors.Conflict:
        return True
    return False


# --- the bytes ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(disk: Frozen) -> Iterator[Source]:
    """The raw disk, for reading, as long as the block lasts; nobody writes its images meanwhile.

    Conflict when somebody writes one of them already.
    """
    first = disk.links[0]
    with contextlib.ExitStack() as stack:
        if first.format == image_export.CODEC:
            from hvmgr import vhd

            for link in disk.links:
                stack.enter_context(image_locks.held(link.path, writable=False))
            yield stack.enter_context(vhd.open_chain(first.path))
        elif first.format == images.RAW:
            stack.enter_context(image_locks.held(first.path, writable=False))
            yield stack.enter_context(RawSource(first.path))
        else:
            yield stack.enter_context(_served(disk.links))


@contextlib.contextmanager
def _served(links: Sequence[Link]) -> Iterator[Source]:
    """What QEMU reads, by a storage daemon of ours; formats and parents are stated, never found in headers."""
    from hvmgr.host import nbd_client, storage_daemon
    from hvmgr.operations.images.disks import QemuSource

    for link in links:
        if link.format == image_export.CODEC:
            raise errors.Unsupported(f"{links[0].path} stands on the VHD {link.path}, which QEMU would not read right")
    with (
        storage_daemon.started() as daemon,
        daemon.chain(links) as node,
        daemon.exported(node) as uri,
        nbd_client.connected(uri) as client,
    ):
        yield QemuSource(client, [(0, client.size, True)])


# --- what lies on them ----------------------------------------------------------------------------------------------


def volumes(disk: Frozen, source: Disk) -> list[Volume]:
    """The places of a disk that may hold file systems, with what was found there; one, the whole disk, without a table."""
    table = partitions.read(source)
    whole = _volume(disk, source, None, 0, source.size)
    if whole.kind is Kind.ISO:  # one that also starts from a stick has a partition table besides
        return [whole]
    if table is None or (table.scheme is partitions.Scheme.MBR and not table.partitions):
        return [whole]
    return [
        _volume(disk, source, one.number, one.start, one.size, type=one.type, name=one.name)
        for one in table.partitions
        if not one.is_extended
    ]


def window(volume: Volume, source: Disk) -> Window:
    """The volume's own bytes."""
    return Window(source, volume.start, volume.size)


def _volume(
    disk: Frozen, source: Disk, number: int | None, start: int, size: int, *, type: str = "", name: str = ""
) -> Volume:
    found = signatures.recognise(Window(source, start, size))
    if found is None:
        return Volume(disk, number, start, size, None, type=type, name=name)
    return Volume(disk, number, start, size, found.kind, found.label, found.uuid, type, name)
