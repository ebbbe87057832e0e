"""What an import is asked for, as values: where the VM goes, who it is afterwards, and what is mapped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from hvmgr import errors
from hvmgr.model import maps, metadata, specification
from hvmgr.model.maps import Maps


class Mode(StrEnum):
    """What becomes of the source's files."""

    COPY = "copy"  # they are copied; the source can be imported again
    REGISTER = "register"  # they stay where they are and become the VM
    LINK = "link"  # the images stay, read-only, and the VM writes to differencing images on them


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """How a source becomes a VM. ``new_id`` None means: a new one for copies and links, the old one for registering.

    ``vm`` chooses one of several VMs in the source's folder. Maps are old to new: ``paths`` by prefix, ``disks`` and
    ``disk_targets`` by slot, ``networks`` by name, ``nics``, ``vlans`` and ``portgroups`` by address.
    """

    vm: str | None = None
    name: str | None = None
    mode: Mode = Mode.COPY
    new_id: bool | None = None
    replace: bool = False
    keep_macs: bool = False
    without_state: bool = False
    without_snapshots: bool = False
    drop_snapshots: tuple[str, ...] = ()
    snapshot_source: Path | None = None
    paths: Mapping[str, str] = field(default_factory=dict)
    disks: Mapping[str, str] = field(default_factory=dict)
    disk_targets: Mapping[str, str] = field(default_factory=dict)
    networks: Mapping[str, str] = field(default_factory=dict)
    nics: Mapping[str, str] = field(default_factory=dict)
    vlans: Mapping[str, str] = field(default_factory=dict)
    portgroups: Mapping[str, str] = field(default_factory=dict)
    vm_path: Path | None = None
    snapshot_path: Path | None = None
    disk_path: Path | None = None
    owner: str | None = None
    tags: tuple[str, ...] = ()

    @property
    def makes_new_id(self) -> bool:
        """Whether the VM is another one afterwards."""
        return self.mode is not Mode.REGISTER if self.new_id is None else self.new_id

    def to_maps(self) -> Maps:
        """The maps, checked for themselves."""
        found = Maps(
            paths=maps.build("path", self.paths.items(), paths=True),
            disks=maps.build("disk", self.disks.items(), targets=True),
            disk_targets=maps.build("disk-target", self.disk_targets.items(), targets=True),
            networks=maps.build("network", self.networks.items()),
            nics=maps.build("nic", self.nics.items(), macs=True),
            vlans=maps.build("vlan", self.vlans.items(), macs=True),
            portgroups=maps.build("portgroup", self.portgroups.items(), macs=True),
            vm_path=self.vm_path,
            snapshot_path=self.snapshot_path,
            disk_path=self.disk_path,
        )
        maps.check_nics(found)
        return found


def check(options: ImportOptions) -> None:
    """UsageError where parts do not go together: whatever would be ignored is named."""
    if not isinstance(options.mode, Mode):
        raise errors.UsageError(f"{options.mode!r} is no mode", hint=f"modes: {', '.join(Mode)}")
    if options.name is not None:
        specification.require_name(options.name)
    metadata.require_labels(options.owner, *options.tags)
    _check_identity(options)
    places = {
        "--vm-path": options.vm_path,
        "--snapshot-path": options.snapshot_path,
        "--disk-path": options.disk_path,
        "--disk-target": options.disk_targets,
    }
    given = [name for name, value in places.items() if value]
    if options.mode is Mode.REGISTER and given:
        raise errors.UsageError(
            f"{given[0]} would be ignored: registering leaves every file where it is", hint="use --mode copy"
        )
    if options.mode is Mode.LINK and (also := [name for name in given if name in {"--disk-path", "--disk-target"}]):
        raise errors.UsageError(f"{also[0]} would be ignored: a linked import copies no disk", hint="use --mode copy")
    if options.replace and given:
        raise errors.UsageError(f"{given[0]} would be ignored: the VM that is replaced keeps its home")
    if options.mode is Mode.REGISTER:
        _check_registering(options)


def _check_registering(options: ImportOptions) -> None:
    """The folder is taken as it is."""
    if options.without_snapshots or options.drop_snapshots:
        raise errors.UsageError(
            "a registered home keeps its snapshots", hint="register it, then delete them: hvmgr snapshot delete"
        )
    if options.snapshot_source is not None:
        raise errors.UsageError(
            "--snapshot-source would be ignored: registering takes the snapshots where they are", hint="use --mode copy"
        )
    if options.disks:
        raise errors.UsageError(
            "--disk would be ignored: registering takes the images where they are", hint="use --path, or --mode copy"
        )


def _check_identity(options: ImportOptions) -> None:
    if options.replace and options.makes_new_id:
        raise errors.UsageError("--replace needs --keep-id: it puts the VM in the place of the one with its id")
    if options.replace and options.mode is not Mode.COPY:
        raise errors.UsageError("--replace copies: it cannot be combined with --mode")
    if options.replace and options.name is not None:
        raise errors.UsageError("--name would be ignored: the VM that is replaced keeps its name")
    if options.keep_macs and not options.makes_new_id:
        raise errors.UsageError("--keep-mac would be ignored: with the old id the addresses stay anyway")
