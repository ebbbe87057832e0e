"""An import that can be looked at and changed before it happens: the public API of ``Host.plan_import``.

plan = host.plan_import("/exports/web")
plan.nics[0].network = "dmz"
for finding in plan.check():
    print(finding.code, finding.sentence)
vm = plan.run()
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors
from hvmgr.model import manifest, maps
from hvmgr.model.import_options import ImportOptions, Mode
from hvmgr.model.maps import Maps
from hvmgr.operations.exchange import compare

if TYPE_CHECKING:
    from hvmgr.model.finding import Finding
    from hvmgr.operations.host import Host
    from hvmgr.operations.vm import VM
    from hvmgr.storage.source_home import SourceHome


@dataclass(slots=True)
class PlannedDisk:
    """A disk: ``recorded`` is its image as the source names it. ``source`` and ``target`` are for changing."""

    slot: str
    recorded: str
    size: int | None = None  # what the guest sees, bytes; None when the image is missing
    source: str | None = None  # where the image is instead
    target: str | None = None  # where its base is copied to


@dataclass(slots=True)
class PlannedNic:
    """A card: ``plugged`` says into what it was plugged. The rest is for changing."""

    mac: str
    plugged: str
    network: str | None = None  # a network, bridge=NAME, or disconnected
    vlan: str | None = None
    portgroup: str | None = None


@dataclass(slots=True)
class PlannedSnapshot:
    """A snapshot; without ``keep`` it stays away, and its children take its parent's place."""

    id: str
    name: str
    keep: bool = True


@dataclass(slots=True)
class ImportPlan:
    """What an import will do. Change the fields, ``check`` what stands in its way, then ``run`` it."""

    host: Host = field(repr=False)
    source: Path
    vm: str | None
    name: str
    mode: Mode
    new_id: bool
    replace: bool = False
    keep_macs: bool = False
    without_state: bool = False
    snapshot_source: Path | None = None
    vm_path: Path | None = None
    snapshot_path: Path | None = None
    disk_path: Path | None = None
    paths: dict[str, str] = field(default_factory=dict)
    networks: dict[str, str] = field(default_factory=dict)
    disks: list[PlannedDisk] = field(default_factory=list)
    nics: list[PlannedNic] = field(default_factory=list)
    snapshots: list[PlannedSnapshot] = field(default_factory=list)
    owner: str | None = None
    tags: list[str] = field(default_factory=list)
    original_name: str = ""

    def check(self, *, thorough: bool = False) -> list[Finding]:
        """What stands in its way now, worst first; nothing is touched. ``thorough`` reads images of known SHA-256."""
        return self.compare(thorough=thorough).findings

    def compare(self, *, thorough: bool = False) -> compare.Comparison:
        """The same with all that was read for it."""
        return compare.examine(self.host.connection, self.host.root, self.source, self.options(), thorough=thorough)

    def run(self) -> VM:
        """The VM; raises the error of the first thing that stands in its way, and has then done nothing."""
        return self.host.import_vm(self.source, self.options())

    def find_made(self) -> VM | None:
        """The VM that has the name, or the folder, that this import would give; UsageError with ``replace``."""
        if self.replace:
            raise errors.UsageError(
                "an import in the place of a VM always needs that VM: --if-exists would be ignored",
                hint="leave out --if-exists",
            )
        if self.mode is not Mode.REGISTER:
            return next((one for one in self.host.vms() if one.name == self.name), None)
        there = next((one for one in self.host.vms() if one.path == self.source), None)
        if there is None or there.home.facts().home != there.path or (there.path / manifest.FILE).exists():
            return None  # a folder that was moved, or an export: nobody has registered it
        return there if self.host.connection.find_domain(there.id) is not None else None

    def is_made(self, vm: VM) -> bool:
        """Whether a VM was made of this source in this mode; a registered folder is the VM."""
        if self.mode is Mode.REGISTER:
            return True
        opened, _, _ = compare.read(self.source, self.options())
        return vm.home.facts().origin == opened.as_origin(self.mode)

    def options(self) -> ImportOptions:
        """The plan as options."""
        return ImportOptions(
            vm=self.vm,
            name=self.name if self.name != self.original_name else None,
            mode=self.mode,
            new_id=self.new_id,
            replace=self.replace,
            keep_macs=self.keep_macs,
            without_state=self.without_state,
            drop_snapshots=tuple(one.id for one in self.snapshots if not one.keep),
            snapshot_source=self.snapshot_source,
            paths=dict(self.paths),
            disks={one.slot: one.source for one in self.disks if one.source},
            disk_targets={one.slot: one.target for one in self.disks if one.target},
            networks=dict(self.networks),
            nics={one.mac: one.network for one in self.nics if one.network},
            vlans={one.mac: one.vlan for one in self.nics if one.vlan},
            portgroups={one.mac: one.portgroup for one in self.nics if one.portgroup},
            vm_path=self.vm_path,
            snapshot_path=self.snapshot_path,
            disk_path=self.disk_path,
            owner=self.owner,
            tags=tuple(self.tags),
        )


def prepare(host: Host, source: Path, options: ImportOptions) -> ImportPlan:
    """The plan of an import with these options, with every disk, card and snapshot of the source in it."""
    opened, wanted, _ = compare.read(source, options)
    disks, nics = _disks(opened, options), _nics(opened, options)
    _require_known(opened, wanted, {one.slot for one in disks}, {one.mac for one in nics})
    gone = set(options.drop_snapshots)
    missing = {one for one in gone if one not in {each.record.name for each in opened.snapshots}}
    snapshots = [
        PlannedSnapshot(
            id=one.record.id,
            name=one.record.name,
            keep=not (options.without_snapshots or gone & {one.record.id, one.record.name}),
        )
        for one in opened.snapshots
    ]
    known = {one.id for one in snapshots}
    if options.without_snapshots:
        parents = [one.record.parent for one in opened.snapshots] + [opened.facts.parent if opened.facts else None]
        missing |= {one for one in parents if one is not None}
    snapshots += [PlannedSnapshot(id=one, name="(missing)", keep=False) for one in sorted(missing - known)]
    return ImportPlan(
        host=host,
        source=opened.origin if opened.is_home else opened.file,
        vm=None if opened.archive is None else options.vm,  # a folder is that of the VM already
        name=options.name or opened.present.name,
        mode=options.mode,
        new_id=options.makes_new_id,
        replace=options.replace,
        keep_macs=options.keep_macs,
        without_state=options.without_state,
        snapshot_source=options.snapshot_source,
        vm_path=options.vm_path,
        snapshot_path=options.snapshot_path,
        disk_path=options.disk_path,
        paths=dict(options.paths),
        networks=dict(options.networks),
        disks=disks,
        nics=nics,
        snapshots=snapshots,
        owner=options.owner,
        tags=list(options.tags),
        original_name=opened.present.name,
    )


def _require_known(opened: SourceHome, wanted: Maps, slots: set[str], macs: set[str]) -> None:
    """What a plan lists has a place in it; the rest would be lost."""
    for entry in (*wanted.disks, *wanted.disk_targets, *wanted.nics, *wanted.vlans, *wanted.portgroups):
        if entry.old not in (slots if entry.option in {"disk", "disk-target"} else macs):
            raise compare.ignored(opened, entry)


def _disks(opened: SourceHome, options: ImportOptions) -> list[PlannedDisk]:
    """Those of the present, then those that only snapshots have."""
    recorded = {disk.slot: disk.source or "" for disk in opened.present.disks() if disk.takes_part or disk.is_left_out}
    present = {**opened.disks, **opened.left_out}
    places = dict(present)
    for one in opened.snapshots:
        places = {**one.disks, **places}
    planned = []
    for slot, path in sorted(places.items(), key=lambda pair: pair[0] not in present):
        image = opened.images.get(path)
        planned.append(
            PlannedDisk(
                slot=slot,
                recorded=recorded.get(slot, path),
                size=None if image is None else image.size,
                source=options.disks.get(slot),
                target=options.disk_targets.get(slot),
            )
        )
    return planned


def _nics(opened: SourceHome, options: ImportOptions) -> list[PlannedNic]:
    found: dict[str, PlannedNic] = {}
    nics, vlans, groups = (_by_mac(one) for one in (options.nics, options.vlans, options.portgroups))
    for one in opened.configurations():
        for mac, (kind, name) in maps.networks_of(one).items():
            plugged = kind if name is None else f"{kind}={name}"
            planned = PlannedNic(mac, plugged, nics.get(mac), vlans.get(mac), groups.get(mac))
            found.setdefault(mac, planned)
    return list(found.values())


def _by_mac(mapping: Mapping[str, str]) -> dict[str, str]:
    return {mac.lower().replace("-", ":"): value for mac, value in mapping.items()}
