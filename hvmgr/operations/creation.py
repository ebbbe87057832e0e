"""Making a new VM: from a specification and a template to a home and a defined domain."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from hvmgr import errors, units
from hvmgr.host.hypervisor import Connection, Driver
from hvmgr.model import plan, specification, template
from hvmgr.model.configuration import Configuration
from hvmgr.model.layout import Layout
from hvmgr.model.metadata import DiskRecord, Metadata
from hvmgr.model.plan import Plan, Step
from hvmgr.model.specification import DiskSpecification, NetworkKind, Specification
from hvmgr.model.template import HostFacts, Template
from hvmgr.model.tree import Leaf, Tree
from hvmgr.operations import strangers, vhd_bases
from hvmgr.operations.session import Session
from hvmgr.storage import access, images, templates, vm_home

_QEMU_FORMATS = {"vhd": images.VPC}
_SUFFIXES = {images.QCOW2: ".qcow2", images.VPC: ".vhd", images.RAW: ".img"}


@dataclass(frozen=True, slots=True)
class _Placed:
    """One disk of the new VM: its working image, and the step that makes it (None: it is used where it is)."""

    path: Path
    format: str
    step: Step | None

    @property
    def base_format(self) -> str:
        """The format of what it stands on, or is."""
        below = self.step.parent_format if isinstance(self.step, plan.CreateImage) else None
        return below or self.format


def plan_create(session: Session, spec: Specification) -> Plan:
    """The home of a new VM with its base images, and its domain, off."""
    specification.check(spec)
    layout, connection = session.layout, session.connection
    if (other := connection.find_domain_by_name(spec.name)) is not None:
        raise errors.Conflict(f"libvirt has a VM '{spec.name}' already", hint="choose another name", id=other.uuid)
    if connection.find_domain(layout.vm_id) is not None:
        raise errors.Conflict(f"libvirt has a VM with the id {layout.vm_id} already")
    access.require_way(layout.home, session.owner)
    kind = templates.load(spec.template)
    facts = host_facts(connection, spec, kind)
    _require_networks(connection, spec, facts)
    for sentence in template.notes(kind, spec, facts):
        session.say(sentence)
    for path in (spec.kernel, spec.initrd, spec.cdrom):
        _require_readable(session, path)
    slots = template.slots(kind, spec)
    placed = {slot: _place(session, slot, disk) for slot, disk in zip(slots, spec.disks, strict=True)}
    vhd_bases.say_what_it_costs(session, spec.name, ((slot, disk.base_format) for slot, disk in placed.items()))
    _require_space(layout, placed)
    built = template.build(
        kind,
        spec,
        facts,
        {slot: (disk.path, disk.format) for slot, disk in placed.items()},
        uuid=layout.vm_id,
        genid=session.new_id(),
        macs=[_new_mac() for _ in template.networks(spec, facts)],
        nvram=layout.nvram(session.new_id()),
    )
    change = session.new_id()
    _set_facts(session, built, tuple(slots), change)
    steps = [disk.step for disk in placed.values() if disk.step is not None]
    return Plan(
        plan_id=change,
        vm_id=layout.vm_id,
        operation="vm create",
        subject=f"creation of {spec.name}",
        prepare=(plan.MakeHome(home=str(layout.home), vm_id=layout.vm_id), *steps),
        switch=plan.Define(xml=built.to_xml()),
        finish=(plan.WritePresent(),),
    )


def host_facts(connection: Connection, spec: Specification, kind: Template) -> HostFacts:
    """What this host offers a VM of this kind."""
    host = connection.capabilities()
    known = host.machines.get(host.arch, {})
    machines = {family: known[family] for family in kind.machine if family in known}
    kvm = host.has_kvm and os.access("/dev/kvm", os.R_OK | os.W_OK)
    accel = "kvm" if kvm and spec.accel != "tcg" else "qemu"
    machine = next(iter(machines.values()), None)
    offer = connection.machine_facts(arch=host.arch, accel=accel, machine=machine)
    return HostFacts(
        emulator=offer.emulator,
        arch=host.arch,
        machines=machines,
        kvm=kvm,
        uefi=offer.has_efi,
        tpm=offer.has_tpm_emulator,
        networks=connection.active_networks(),
    )


def _require_networks(connection: Connection, spec: Specification, facts: HostFacts) -> None:
    """An ordinary user's libvirt cannot reach the system's networks; the VM would never start."""
    if connection.driver is not Driver.SESSION:
        return
    for network in spec.networks or ():
        if network.kind is NetworkKind.NETWORK and network.name not in facts.networks:
            raise errors.Unsupported(
                f"{connection.uri} has no network '{network.name}': libvirt's networks belong to the system",
                hint="use --network user, or --network bridge=BRIDGE where qemu-bridge-helper lets you",
            )


def _place(session: Session, slot: str, disk: DiskSpecification) -> _Placed:
    layout = session.layout
    if disk.path is None:
        assert disk.size is not None
        path = layout.bases / f"{slot}.qcow2"
        step = plan.CreateImage(path=str(path), size=disk.size, parent=None, parent_format=None)
        return _Placed(path, images.QCOW2, step)
    source = Path(vm_home.canonical(str(disk.path)))
    stated = None if disk.format is None else _QEMU_FORMATS.get(disk.format.value, disk.format.value)
    fmt = stated or images.probe(source)
    header = images.read(source, fmt)
    if header.has_internal_snapshots:
        raise errors.Unsupported(
            f"{source} has internal snapshots, which would be lost to hvmgr",
            hint=f"list them: qemu-img snapshot -l {source}; delete them with -d, or convert the image",
        )
    if disk.linked:
        return _linked(session, slot, header)
    if disk.in_place:
        return _in_place(session, slot, header)
    if header.backing is not None:
        raise errors.Unsupported(
            f"{source} is a differencing image of {header.backing} and cannot be copied alone",
            hint=f"use it where it is with --in-place, or convert it: qemu-img convert -O qcow2 {source} NEW.qcow2",
        )
    target = layout.bases / f"{slot}{_SUFFIXES[fmt]}"
    return _Placed(target, fmt, plan.CopyImage(source=str(source), target=str(target)))


def _in_place(session: Session, slot: str, header: images.Header) -> _Placed:
    """An image that others stand on is never written: the new VM gets a differencing image on it."""
    path = str(header.path)
    if writer := strangers.writers(session, [path]).get(path):
        raise errors.Conflict(
            f"{path} is the disk of the VM '{writer}'",
            hint="copy it (without --in-place), or use another image",
            path=path,
        )
    below = _require_whole(session, header)
    users = strangers.of(session, [path]).get(path)
    for image in below:
        _require_usable(session, Path(image), writable=image == path and not users)
    if not users:
        return _Placed(header.path, header.format, None)
    child = session.layout.image(slot, session.new_id())
    session.say(f"{path} is the base of {', '.join(users)}: the new VM writes to a differencing image on it")
    step = plan.CreateImage(path=str(child), size=header.size, parent=path, parent_format=header.format)
    return _Placed(child, images.QCOW2, step)


def _linked(session: Session, slot: str, header: images.Header) -> _Placed:
    """A differencing image on one that stays as it is, whoever else stands on it."""
    path = str(header.path)
    if writer := strangers.writers(session, [path]).get(path):
        raise errors.Conflict(f"{path} is the disk of the VM '{writer}'", hint="use another image", path=path)
    for image in _require_whole(session, header):
        _require_usable(session, Path(image), writable=False)
    child = session.layout.image(slot, session.new_id())
    step = plan.CreateImage(path=str(child), size=header.size, parent=path, parent_format=header.format)
    return _Placed(child, images.QCOW2, step)


def _require_whole(session: Session, header: images.Header) -> list[str]:
    """Every image below is there, and one that VMs can stand on; found later, it would keep the VM from any command."""
    path = str(header.path)
    found = session.home.load_images({path: header.format})
    return [image.path for image in Tree(images=found, nodes={}, present=Leaf(parent=None, disks={})).chain(path)]


def _set_facts(session: Session, built: Configuration, slots: tuple[str, ...], change: str) -> None:
    built.set_metadata(
        Metadata(
            home=session.layout.home,
            uri=session.connection.uri,
            created=session.now(),
            disks=tuple(DiskRecord(slot=slot, id=session.new_id()) for slot in slots),
            change=change,
        )
    )


def _require_space(layout: Layout, placed: dict[str, _Placed]) -> None:
    copies = [Path(disk.step.source) for disk in placed.values() if isinstance(disk.step, plan.CopyImage)]
    needed = sum(path.stat().st_blocks * 512 for path in copies)
    folder = next(one for one in (layout.home, *layout.home.parents) if one.is_dir())
    facts = os.statvfs(folder)
    free = facts.f_bavail * facts.f_frsize
    if needed > free:
        raise errors.NoSpace(
            f"the copies need {units.format_size(needed)}, {folder} has {units.format_size(free)} free",
            hint="free space there, or choose another place with --home",
        )


def _require_readable(session: Session, path: Path | None) -> None:
    if path is None:
        return
    if not path.is_file():
        what = f"{path} is no file" if path.exists() else f"there is no file {path}"
        raise errors.NotFound(what, hint="name an existing file")
    _require_usable(session, path, writable=False)


def _require_usable(session: Session, path: Path, *, writable: bool) -> None:
    """A file that stays outside the home is one that this host's QEMU may use."""
    dynamic = session.connection.has_dynamic_ownership()
    access.require_usable(Path(os.path.realpath(path)), session.owner, dynamic=dynamic, writable=writable)


def _new_mac() -> str:
    """An address in the range that QEMU and KVM use."""
    tail = secrets.token_bytes(3)
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in tail)
