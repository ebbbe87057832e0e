"""What this host lacks for a VM: networks, machine types, firmware, CPU, files that configurations name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lxml import etree

from hvmgr.host.capabilities import Capabilities
from hvmgr.host.hypervisor import Connection
from hvmgr.model import maps, reach, xml_tree
from hvmgr.model.compatibility import found
from hvmgr.model.configuration import Configuration
from hvmgr.model.finding import Finding
from hvmgr.model.import_options import Mode

if TYPE_CHECKING:
    from hvmgr.operations.exchange.compare import Comparison

_DEVICES = Path("/sys/class/net")
_PACKAGED = "/usr/"  # firmware that came with the system


def findings(connection: Connection, comparison: Comparison) -> Iterator[Finding]:
    """Everything about the host, each thing once, however many configurations need it."""
    host = connection.capabilities()
    networks = connection.active_networks()
    seen: set[Finding] = set()
    for where, one, taken in _mapped(comparison):
        for finding in (
            *_network_findings(where, one, networks),
            *machine_findings(connection, host, one),
            *_file_findings(where, one, taken),
        ):
            if finding not in seen:
                seen.add(finding)
                yield finding
    if not comparison.source.trusted:
        yield from _access_findings(comparison, host)
    yield from _version_findings(host, comparison)
    yield from _cpu_findings(connection, comparison)
    yield from _state_findings(comparison)


def _mapped(comparison: Comparison) -> Iterator[tuple[str, Configuration, set[str]]]:
    """Every configuration as it will be, with whose it is, and the slots of the disks that it takes along.

    Saved states follow the maps like the rest.
    """
    named_disks = comparison.source.named
    named = [("now", comparison.source.present)]
    named += [(f"snapshot '{one.record.name}'", one.configuration) for one in comparison.snapshots]
    for where, one in named:
        changed = one.copy()
        maps.rewrite(changed, comparison.maps, comparison.used)
        yield where, changed, {disk.slot for disk in one.disks() if disk.is_left_out and disk.source in named_disks}
    for saved in (comparison.source.saved, *(each.saved for each in comparison.snapshots)):
        if saved is not None:
            maps.rewrite(saved.copy(), comparison.maps, comparison.used)


def _network_findings(where: str, one: Configuration, networks: frozenset[str]) -> Iterator[Finding]:
    for nic in one.nics():
        if nic.type == "network" and nic.source is not None and nic.source not in networks:
            repair = f"--network {nic.source}=OTHER, or --nic {nic.mac}=disconnected"
            sentence = f"there is no active network '{nic.source}' here, which card {nic.mac} needs"
            yield found("missing-network", sentence, nic.source, repair)
        if nic.type in {"bridge", "direct"} and nic.source is not None and not has_device(nic.source):
            repair = f"--network {nic.source}=OTHER, or --nic {nic.mac}=disconnected"
            sentence = f"there is no bridge or device '{nic.source}' here, which card {nic.mac} needs"
            yield found("missing-bridge", sentence, nic.source, repair)
    for disk in one.disks():
        if disk.type == "volume":
            sentence = f"disk {disk.slot} ({where}) comes from a storage pool, which does not travel with the VM"
            yield found("missing-pool", sentence, disk.slot, "export the VM with the disk as a file")


def machine_findings(connection: Connection, host: Capabilities, one: Configuration) -> Iterator[Finding]:
    """Emulator, machine type, acceleration and firmware that a configuration needs and this host does not have."""
    arch = one.arch or host.arch
    if arch not in host.emulators:
        yield found(
            "emulator-missing", f"there is no emulator for {arch} here", arch, "install its qemu-system package"
        )
        return
    known = host.machines.get(arch, {})
    if one.machine is not None and known and one.machine not in known:
        sentence = f"QEMU {host.qemu_version} does not know the machine type {one.machine}"
        yield found("machine-unknown", sentence, one.machine, "install a QEMU that has it")
    if one.type == "kvm" and not host.has_kvm:
        yield found("accelerator-missing", "KVM is not available here", "/dev/kvm", "enable virtualisation in the BIOS")
    loader = one.root.find("os/loader")
    if loader is not None and (path := (loader.text or "").strip()) and not Path(path).exists():
        yield found("firmware-missing", f"the firmware {path} is not here", path, f"install it, or --path {path}=OTHER")
    os_element = one.root.find("os")
    if os_element is not None and os_element.get("firmware") == "efi" and loader is None:
        facts = connection.machine_facts(arch=arch)
        if not facts.has_efi:
            yield found("firmware-missing", "libvirt finds no UEFI firmware here", "efi", "install the package ovmf")


def _file_findings(where: str, one: Configuration, taken: set[str]) -> Iterator[Finding]:
    removable = {disk.source for disk in one.disks() if disk.is_removable}
    for what, path in maps.paths_of(one):
        if (what == "loader" and path.startswith(_PACKAGED)) or what.removeprefix("drive ") in taken:
            continue
        if Path(path).exists():
            yield found("host-path", f"{what} is {path}, a file of this host", path)
        elif path in removable:
            sentence = f"{path} is not here: the {what} will be empty"
            yield found("drive-emptied", sentence, path, f"--path {path}=OTHER, or put it there")
        elif what not in {"log", "nvram", "loader"}:
            sentence = f"{path} is not here, which {where} needs ({what})"
            yield found("missing-file", sentence, path, f"--path {path}=OTHER, or put it there")


def _access_findings(comparison: Comparison, host: Capabilities) -> Iterator[Finding]:
    """What else of the host a stranger's VM would have, in any of its configurations, each thing once."""
    source = comparison.source
    named = [("the VM", source.present), ("the saved state", source.saved)]
    named += [("the undo slot", source.undo)] if comparison.options.mode is Mode.REGISTER else []
    for one in comparison.snapshots:
        named += [(f"snapshot '{one.record.name}'", one.configuration)]
        named += [(f"the saved state of snapshot '{one.record.name}'", one.saved)]
    seen: set[tuple[str, str]] = set()
    for where, each in named:
        for what, text in () if each is None else reach.of(each):
            if (what, text) not in seen:
                seen.add((what, text))
                yield found(
                    "host-access", f"{where} has {what}: {text}", text or what, f"see {source.origin} before it starts"
                )
    emulator, own = source.present.emulator, host.emulators.get(source.present.arch or "")
    if emulator is not None and own is not None and emulator.exists() and not emulator.samefile(own):
        sentence = f"the VM says that {emulator} is its emulator; it gets this host's own, {own}"
        yield found("host-access", sentence, emulator, "if that is right: virsh edit, after the import")


def _version_findings(host: Capabilities, comparison: Comparison) -> Iterator[Finding]:
    told = comparison.source.manifest
    if told is None:
        return
    for program, there, here in (
        ("libvirt", told.source.libvirt, host.libvirt_version),
        ("QEMU", told.source.qemu, host.qemu_version),
    ):
        if _version(there) > _version(here):
            sentence = f"the VM was exported under {program} {there}; here is {here}"
            yield found("newer-host", sentence, program, "a machine type or device may be unknown here")


def _cpu_findings(connection: Connection, comparison: Comparison) -> Iterator[Finding]:
    """Saved states need the CPU that they were taken with."""
    if comparison.options.without_state:
        return
    saved = [("now", comparison.source.saved)]
    saved += [(f"snapshot '{one.record.name}'", one.saved) for one in comparison.snapshots]
    for where, one in saved:
        if one is None or not lacks_cpu(connection, one, None):
            continue
        sentence = f"this host's CPU cannot do what the saved state of {where} needs"
        yield found("cpu-unavailable", sentence, where, "apply it with --without-state, or import with --without-state")


def lacks_cpu(connection: Connection, saved: Configuration, cookie: str | None) -> bool:
    """Whether this host cannot offer the CPU of a saved state: the one in libvirt's ``cookie`` is that which QEMU had."""
    cpu = None if cookie is None else xml_tree.parse(cookie, source="the saved state").find("cpu")
    if cpu is None:
        cpu = saved.root.find("cpu")
    if cpu is None:
        return False
    text = etree.tostring(cpu, encoding="unicode", with_tail=False)
    return not connection.can_run_cpu(text, arch=saved.arch, accel=saved.type)


def has_device(name: str) -> bool:
    """Whether the host has a network device of this name."""
    return (_DEVICES / name).exists()


def _state_findings(comparison: Comparison) -> Iterator[Finding]:
    states = [one for one in (comparison.source.saved, *(each.saved for each in comparison.snapshots)) if one]
    if comparison.identity.macs and states and not comparison.options.without_state:
        sentence = "guests that go on from a saved state keep their old addresses until they restart"
        yield found("address-in-state", sentence, comparison.identity.name, "--keep-mac keeps them altogether")


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdecimal() else 0 for part in text.split("."))
