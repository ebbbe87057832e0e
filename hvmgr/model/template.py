"""What a new VM looks like: a template's values and XML skeleton, the host's facts, and a specification, made one.

A template is two files: ``NAME.yaml`` says what is chosen (families of machines, buses, models, defaults), ``NAME.xml``
holds what every VM of it has. Values are set in the XML tree, never pasted into text.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lxml import etree

from hvmgr import errors, yaml_text
from hvmgr.model import configuration, xml_tree
from hvmgr.model.configuration import Configuration
from hvmgr.model.specification import (
    Acceleration,
    Firmware,
    NetworkKind,
    NetworkSpecification,
    Specification,
)
from hvmgr.yaml_text import Value

DEFAULT_NETWORK = "default"


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What the host offers a new VM, as libvirt's capabilities say."""

    emulator: Path
    arch: str
    machines: Mapping[str, str]  # family (pc, q35, virt) → its present canonical name
    kvm: bool
    uefi: bool  # libvirt can choose a firmware by itself
    tpm: bool  # an emulated TPM 2.0 can be had
    genid: bool = True
    networks: frozenset[str] = field(default_factory=frozenset)  # libvirt's active networks


@dataclass(frozen=True, slots=True)
class Bus:
    """A bus that takes ``count`` disks in slots named ``prefix`` + a, b, c …; some need a controller to be added."""

    name: str
    prefix: str
    count: int
    controller: str | None = None

    def slots(self) -> Iterator[str]:
        """The slots in their order; behind vdz comes vdaa."""
        for number in range(self.count):
            high, low = divmod(number, 26)
            yield self.prefix + (string.ascii_lowercase[high - 1] if high else "") + string.ascii_lowercase[low]


@dataclass(frozen=True, slots=True)
class Template:
    """A template as read; ``skeleton`` is the domain XML that everything is set in."""

    name: str
    description: str
    machine: tuple[str, ...]
    firmware: Firmware
    memory: int
    vcpus: int
    cpu: Mapping[Acceleration, str]
    buses: tuple[Bus, ...]
    cdrom_bus: str
    cdrom_slot: str
    network: str
    genid: bool
    tpm_model: str
    tpm: bool
    boot: tuple[str, ...]
    skeleton: str


def parse(name: str, values: str, skeleton: str, *, source: str) -> Template:
    """A template from its two texts; UsageError or Corrupt naming the file and line of what is not understood."""
    document = yaml_text.parse(values, source=f"{source}.yaml")
    required = ["description", "machine", "firmware", "memory", "vcpus", "cpu", "disks", "cdrom", "network"]
    top = document.fields(required=[*required, "genid", "tpm", "boot"])
    cpu = top["cpu"].fields(required=["kvm", "tcg"])
    cdrom = top["cdrom"].fields(required=["bus", "slot"])
    tpm = top["tpm"].fields(required=["model", "default"])
    configuration.parse(skeleton, source=f"{source}.xml")
    return Template(
        name=name,
        description=top["description"].text(),
        machine=tuple(item.text() for item in top["machine"].items()),
        firmware=top["firmware"].choice(Firmware),
        memory=top["memory"].size(),
        vcpus=top["vcpus"].integer(minimum=1),
        cpu={Acceleration.KVM: cpu["kvm"].text(), Acceleration.TCG: cpu["tcg"].text()},
        buses=tuple(_read_bus(item) for item in top["disks"].items()),
        cdrom_bus=cdrom["bus"].text(),
        cdrom_slot=cdrom["slot"].text(),
        network=top["network"].text(),
        genid=top["genid"].boolean(),
        tpm_model=tpm["model"].text(),
        tpm=tpm["default"].boolean(),
        boot=tuple(item.text() for item in top["boot"].items()),
        skeleton=skeleton,
    )


def slots(template: Template, spec: Specification) -> tuple[str, ...]:
    """The slot of each disk of the specification, in its order: the one it asks for, else the next free one."""
    every = [slot for bus in template.buses for slot in bus.slots()]
    wanted = {disk.slot for disk in spec.disks if disk.slot}
    if spec.cdrom is not None and template.cdrom_slot in wanted:
        raise errors.UsageError(f"slot {template.cdrom_slot} is the CD drive's", key="disks")
    for slot in sorted(wanted - set(every)):
        prefixes = ", ".join(f"{bus.prefix}a…" for bus in template.buses)
        hint = f"it has {prefixes}"
        raise errors.UsageError(f"template {template.name} has no slot {slot}", hint=hint, key="disks")
    # The CD drive's place stays free even without one: a drive that is added later is where guests look for it.
    free = (slot for slot in every if slot not in wanted and slot != template.cdrom_slot)
    found = [disk.slot or next(free, None) for disk in spec.disks]
    if None in found:
        raise errors.UsageError(f"template {template.name} has no room for {len(found)} disks", key="disks")
    return tuple(slot for slot in found if slot is not None)


def notes(template: Template, spec: Specification, facts: HostFacts) -> tuple[str, ...]:
    """What the user should hear of choices that the host made for them."""
    found = []
    if spec.firmware is None and template.firmware is Firmware.EFI and not facts.uefi:
        found.append("no UEFI firmware is installed on this host: the VM starts with BIOS")
    if spec.accel is Acceleration.AUTO and not facts.kvm:
        found.append("KVM is not usable on this host: the VM is emulated, which is slow")
    if spec.networks is None and DEFAULT_NETWORK not in facts.networks:
        found.append(f"libvirt's network '{DEFAULT_NETWORK}' is not active: the VM is behind QEMU's user network")
    return tuple(found)


def networks(spec: Specification, facts: HostFacts) -> tuple[NetworkSpecification, ...]:
    """The interfaces that the VM gets; for each of them ``build`` needs an address."""
    if spec.networks is not None:
        return spec.networks
    if DEFAULT_NETWORK in facts.networks:
        return (NetworkSpecification(NetworkKind.NETWORK, DEFAULT_NETWORK),)
    return (NetworkSpecification(NetworkKind.USER),)


def build(
    template: Template,
    spec: Specification,
    facts: HostFacts,
    disks: Mapping[str, tuple[Path, str]],
    *,
    uuid: str,
    genid: str,
    macs: Sequence[str],
    nvram: Path,
) -> Configuration:
    """The configuration of the new VM, without hvmgr's metadata.

    ``disks`` maps ``slots()`` to image files and QEMU's word for their format (qcow2, raw, vpc); ``macs`` has one
    address for each of ``networks()`` and is overruled by what the specification says; ``genid`` and ``nvram`` are
    used where the VM has such a thing. Unsupported when the host lacks what was asked for in so many words.
    """
    accel, firmware = _acceleration(spec, facts), _firmware(template, spec, facts)
    config = configuration.parse(template.skeleton, source=f"template {template.name}")
    root = config.root
    root.set("type", "kvm" if accel is Acceleration.KVM else "qemu")
    _add_head(root, template, spec, uuid=uuid, genid=genid if template.genid and facts.genid else None)
    _set_os(root, template, spec, machine=_machine(template, facts), arch=facts.arch)
    if firmware is Firmware.EFI:
        _set_efi(root, nvram)
    _set_cpu(root, template.cpu[accel])
    devices = _require(root, "devices")
    added = [_element(None, "emulator", str(facts.emulator))]
    added += [_controller(bus) for bus in template.buses if bus.controller and _is_used(bus, disks)]
    added += [_disk(template, slot, path, image_format) for slot, (path, image_format) in disks.items()]
    if spec.cdrom is not None:
        added.append(_cdrom(template, spec.cdrom))
    added += [_nic(network, mac, template.network) for network, mac in zip(networks(spec, facts), macs, strict=True)]
    if _tpm(template, spec, facts):
        added.append(_tpm_device(template.tpm_model))
    for position, element in enumerate(added):
        devices.insert(position, element)
    etree.indent(root, space="  ")
    return config


# Choices between what is wanted and what is there


def _acceleration(spec: Specification, facts: HostFacts) -> Acceleration:
    if spec.accel is Acceleration.AUTO:
        return Acceleration.KVM if facts.kvm else Acceleration.TCG
    if spec.accel is Acceleration.KVM and not facts.kvm:
        raise errors.Unsupported("KVM is not usable on this host", hint="use --accel tcg, which emulates and is slow")
    return spec.accel


def _firmware(template: Template, spec: Specification, facts: HostFacts) -> Firmware:
    if spec.firmware is Firmware.EFI and not facts.uefi:
        raise errors.Unsupported(
            "no UEFI firmware is installed on this host",
            hint="install it (Debian: ovmf, Fedora: edk2-ovmf), or use --firmware bios",
        )
    wanted = spec.firmware or template.firmware
    return wanted if facts.uefi else Firmware.BIOS


def _machine(template: Template, facts: HostFacts) -> str:
    for family in template.machine:
        if family in facts.machines:
            return facts.machines[family]
    raise errors.Unsupported(
        f"this host's QEMU for {facts.arch} has no machine {' or '.join(template.machine)},"
        f" which template {template.name} needs",
        hint="choose another template",
    )


def _tpm(template: Template, spec: Specification, facts: HostFacts) -> bool:
    if spec.tpm and not facts.tpm:
        raise errors.Unsupported("this host cannot emulate a TPM 2.0", hint="install swtpm, or leave the TPM out")
    return facts.tpm and (template.tpm if spec.tpm is None else spec.tpm)


def _is_used(bus: Bus, disks: Mapping[str, tuple[Path, str]]) -> bool:
    return any(slot.startswith(bus.prefix) for slot in disks)


# Elements


def _add_head(root: etree._Element, template: Template, spec: Specification, *, uuid: str, genid: str | None) -> None:
    head = [_element(None, "name", spec.name), _element(None, "uuid", uuid)]
    if genid is not None:
        head.append(_element(None, "genid", genid))
    if spec.description:
        head.append(_element(None, "description", spec.description))
    memory = template.memory if spec.memory is None else spec.memory
    head.append(_element(None, "memory", str(-(-memory // 1024)), unit="KiB"))
    head.append(_element(None, "vcpu", str(template.vcpus if spec.vcpus is None else spec.vcpus)))
    for position, element in enumerate(head):
        root.insert(position, element)


def _set_os(root: etree._Element, template: Template, spec: Specification, *, machine: str, arch: str) -> None:
    element = _require(root, "os")
    _element(element, "type", "hvm", arch=arch, machine=machine)
    for name, value in (("kernel", spec.kernel), ("initrd", spec.initrd), ("cmdline", spec.cmdline)):
        if value is not None:
            _element(element, name, str(value))
    for device in template.boot:
        _element(element, "boot", dev=device)


def _set_efi(root: etree._Element, nvram: Path) -> None:
    """Let libvirt choose the firmware: without Secure Boot, whose enrolled keys would refuse unsigned guests."""
    element = _require(root, "os")
    element.set("firmware", "efi")
    firmware = _element(element, "firmware")
    _element(firmware, "feature", enabled="no", name="secure-boot")
    _element(firmware, "feature", enabled="no", name="enrolled-keys")
    _element(element, "nvram", str(nvram))


def _set_cpu(root: etree._Element, model: str) -> None:
    cpu = etree.Element("cpu")
    root.insert(root.index(_require(root, "features")) + 1, cpu)
    if model.startswith(("host-", "maximum")):
        cpu.set("mode", model)
        return
    # No check of the model's features against the host: the emulator leaves out what it cannot do.
    cpu.attrib.update({"mode": "custom", "match": "exact", "check": "none"})
    _element(cpu, "model", model, fallback="allow")


def _controller(bus: Bus) -> etree._Element:
    return _element(None, "controller", type=bus.name, model=bus.controller or "")


def _disk(template: Template, slot: str, path: Path, image_format: str) -> etree._Element:
    bus = next(bus for bus in template.buses if slot.startswith(bus.prefix))
    is_block = path.is_relative_to("/dev") and not path.is_relative_to("/dev/shm")  # noqa: S108
    disk = _element(None, "disk", type="block" if is_block else "file", device="disk")
    _element(disk, "driver", name="qemu", type=image_format, discard="unmap")
    _element(disk, "source", **{"dev" if is_block else "file": str(path)})
    _element(disk, "target", dev=slot, bus=bus.name)
    return disk


def _cdrom(template: Template, path: Path) -> etree._Element:
    disk = _element(None, "disk", type="file", device="cdrom")
    _element(disk, "driver", name="qemu", type="raw")
    _element(disk, "source", file=str(path))
    _element(disk, "target", dev=template.cdrom_slot, bus=template.cdrom_bus)
    _element(disk, "readonly")
    return disk


def _nic(network: NetworkSpecification, mac: str, model: str) -> etree._Element:
    nic = _element(None, "interface", type=network.kind)
    _element(nic, "mac", address=network.mac or mac)
    if network.name is not None:
        _element(nic, "source", **{network.kind: network.name})
    _element(nic, "model", type=model)
    return nic


def _tpm_device(model: str) -> etree._Element:
    tpm = _element(None, "tpm", model=model)
    # Its state outlives an undefine that hvmgr has not made.
    _element(tpm, "backend", type="emulator", version="2.0", persistent_state="yes")
    return tpm


def _require(root: etree._Element, tag: str) -> etree._Element:
    element = root.find(tag)
    if element is None:
        raise errors.Corrupt(f"a template's skeleton has no <{tag}>")
    return element


def _element(parent: etree._Element | None, tag: str, text: str | None = None, **attributes: str) -> etree._Element:
    try:
        element = etree.Element(tag, attributes)
        element.text = text
    except ValueError as error:
        told = " ".join([*attributes.values(), *([] if text is None else [text])])
        raise xml_tree.unfit(told) from error
    if parent is not None:
        parent.append(element)
    return element


def _read_bus(item: Value) -> Bus:
    values = item.fields(required=["bus", "slots", "count"], optional=["controller"])
    return Bus(
        name=values["bus"].text(),
        prefix=values["slots"].text(),
        count=values["count"].integer(minimum=1),
        controller=values["controller"].text() if "controller" in values else None,
    )
