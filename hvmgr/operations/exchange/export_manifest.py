"""What ``export.yaml`` says: of the host, the VM, its disks, snapshots and networks. Lengths and hashes come later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from hvmgr.host.hypervisor import Connection
from hvmgr.model import manifest
from hvmgr.model.configuration import Configuration
from hvmgr.model.export_options import ExportOptions
from hvmgr.model.export_plan import Exported
from hvmgr.model.manifest import Manifest, SlotImage
from hvmgr.model.metadata import SavedState, SnapshotRecord
from hvmgr.version import __version__

# Files of the host that a VM starts with, by where the XML names them.
_STARTED_WITH = ("os/loader", "os/kernel", "os/initrd")


@dataclass(frozen=True, slots=True)
class Content:
    """What is in the export: its present, and images by their path at the source.

    ``origin`` and the mappings beside the ``snapshots`` say which image each slot had at the source.
    """

    present: Configuration
    state: SavedState
    images: Mapping[str, Exported]
    origin: Mapping[str, str]
    snapshots: Sequence[tuple[SnapshotRecord, Mapping[str, str]]]


def build(
    content: Content,
    *,
    home: Path,
    connection: Connection,
    options: ExportOptions,
    snapshot_id: str | None,
    moment: datetime,
) -> Manifest:
    """The manifest of an export of the VM in ``home``, or of one snapshot of it."""
    present, images = content.present, content.images
    facts = present.metadata()
    ids = {} if facts is None else {one.slot: one.id for one in facts.disks}
    return Manifest(
        vm_id=present.uuid,
        name=present.name,
        home=str(home),
        created=moment,
        source=_source(present, connection),
        options=_used(options, snapshot_id),
        state=content.state,
        present=_slots(content.origin, images),
        disks=tuple(
            manifest.Disk(slot=slot, id=ids.get(slot), size=images[path].source.size, path=path)
            for slot, path in content.origin.items()
        ),
        snapshots=tuple(_snapshot(record, disks, images) for record, disks in content.snapshots),
        images=tuple(_image(one) for one in images.values()),
        networks=_networks(present),
        outside=_outside(present, images),
    )


def _source(present: Configuration, connection: Connection) -> manifest.Source:
    host = connection.capabilities()
    cpu = present.root.find("cpu")
    model = None if cpu is None else cpu.findtext("model") or cpu.get("mode")
    return manifest.Source(
        hvmgr=__version__,
        libvirt=host.libvirt_version,
        qemu=host.qemu_version,
        uri=connection.uri,
        arch=present.arch,
        machine=present.machine,
        type=present.type,
        cpu=model,
    )


def _used(options: ExportOptions, snapshot_id: str | None) -> manifest.Used:
    return manifest.Used(
        snapshots=options.extent,
        disks=not options.config_only,
        state=not options.without_state,
        quiesced=options.quiesce,
        excluded=options.exclude,
        format=None if options.format is None else options.format.value,
        snapshot=snapshot_id,
    )


def _slots(disks: Mapping[str, str], images: Mapping[str, Exported]) -> tuple[SlotImage, ...]:
    return tuple(SlotImage(slot, images[path].name) for slot, path in disks.items())


def _snapshot(record: SnapshotRecord, disks: Mapping[str, str], images: Mapping[str, Exported]) -> manifest.Snapshot:
    return manifest.Snapshot(
        id=record.id,
        name=record.name,
        created=record.created,
        parent=record.parent,
        state=record.state,
        disks=_slots(disks, images),
    )


def _image(one: Exported) -> manifest.Image:
    return manifest.Image(
        file=one.name,
        format=one.format,
        size=one.source.size,
        bytes=0,
        path=one.source.path,
        parent=None if one.parent is None else one.parent.name,
    )


def _networks(present: Configuration) -> tuple[manifest.Network, ...]:
    found = []
    for nic, element in zip(present.nics(), present.root.findall("devices/interface"), strict=True):
        source = element.find("source")
        tags = [tag.get("id", "") for tag in element.findall("vlan/tag")]
        found.append(
            manifest.Network(
                mac=nic.mac,
                type=nic.type,
                source=nic.source,
                portgroup=None if source is None else source.get("portgroup"),
                vlan=",".join(tags) or None,
            )
        )
    return tuple(found)


def _outside(present: Configuration, images: Mapping[str, Exported]) -> tuple[manifest.Outside, ...]:
    found = [
        manifest.Outside(path.rpartition("/")[2], text.strip())
        for path in _STARTED_WITH
        if (text := present.root.findtext(path)) and text.strip()
    ]
    inside = {one.name for one in images.values()}
    facts = present.metadata()
    for disk in present.disks():
        name = "" if disk.source is None or facts is None else disk.source.removeprefix(f"{facts.home}/")
        if disk.source is not None and name not in inside and (disk.is_removable or disk.type not in {"file", "block"}):
            found.append(manifest.Outside(disk.slot, disk.source))
    return tuple(found)
