"""What a host can run, read from libvirt's capabilities: emulators, machine types, firmware, QEMU's user.

Hosts differ (RHEL has no ``qemu-system-*`` in PATH and no i440fx), so nothing here is a constant of hvmgr.
Formats: https://libvirt.org/formatcaps.html and https://libvirt.org/formatdomaincaps.html
"""

from __future__ import annotations

import grp
import pwd
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lxml import etree

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The host as libvirt sees it.

    ``uuid`` is libvirt's id of the host, made up at each start of libvirt where the board has none. ``qemu_owner`` is the (uid, gid) that libvirt runs QEMU as and chowns images to; None where it changes no
    owners (session connections), so that QEMU runs as the caller.
    """

    uuid: str
    arch: str
    libvirt_version: str
    qemu_version: str
    qemu_owner: tuple[int, int] | None
    has_kvm: bool
    security_models: frozenset[str]  # by which libvirt confines its guests: apparmor, selinux, dac
    emulators: Mapping[str, Path]  # by architecture
    machines: Mapping[str, Mapping[str, str]]  # by architecture: every known name or alias -> canonical name


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """What one kind of machine on this host offers to a new VM."""

    arch: str
    accel: str
    emulator: Path
    machine: str  # canonical
    max_vcpus: int
    has_efi: bool  # libvirt finds an EFI firmware by itself (<os firmware='efi'>)
    has_secure_boot: bool
    loaders: tuple[Path, ...]
    disk_buses: tuple[str, ...]
    tpm_models: tuple[str, ...]
    has_tpm_emulator: bool


def parse_host(xml: str, *, libvirt_version: int, qemu_version: int) -> Capabilities:
    """The host's facts from ``virConnectGetCapabilities`` and libvirt's two version numbers."""
    root = etree.fromstring(xml.encode())
    arch = root.findtext("host/cpu/arch") or ""
    emulators: dict[str, Path] = {}
    machines: dict[str, dict[str, str]] = {}
    for guest in root.iterfind("guest/arch"):
        name = guest.get("name", "")
        emulators[name] = Path(guest.findtext("emulator") or "")
        machines[name] = {m.text or "": m.get("canonical", m.text or "") for m in guest.iterfind("machine")}
    return Capabilities(
        uuid=root.findtext("host/uuid") or "",
        arch=arch,
        libvirt_version=_version(libvirt_version),
        qemu_version=_version(qemu_version),
        qemu_owner=_qemu_owner(root),
        has_kvm=bool(root.xpath("guest/arch[@name=$arch]/domain[@type='kvm']", arch=arch)),
        security_models=frozenset(model.text or "" for model in root.iterfind("host/secmodel/model")),
        emulators=emulators,
        machines=machines,
    )


def parse_machine(xml: str) -> MachineFacts:
    """The facts of one machine type from ``virConnectGetDomainCapabilities``."""
    root = etree.fromstring(xml.encode())
    vcpu = root.find("vcpu")
    return MachineFacts(
        arch=root.findtext("arch") or "",
        accel=root.findtext("domain") or "",
        emulator=Path(root.findtext("path") or ""),
        machine=root.findtext("machine") or "",
        max_vcpus=int(vcpu.get("max", "1")) if vcpu is not None else 1,
        has_efi="efi" in _values(root, "os/enum[@name='firmware']"),
        has_secure_boot="yes" in _values(root, "os/loader/enum[@name='secure']"),
        loaders=tuple(Path(value) for value in _values(root, "os/loader")),
        disk_buses=_values(root, "devices/disk/enum[@name='bus']"),
        tpm_models=_values(root, "devices/tpm/enum[@name='model']"),
        has_tpm_emulator="emulator" in _values(root, "devices/tpm/enum[@name='backendModel']"),
    )


def _qemu_owner(root: etree._Element) -> tuple[int, int] | None:
    for model in root.iterfind("host/secmodel"):
        if model.findtext("model") == "dac":
            label = model.findtext("baselabel[@type='qemu']") or model.findtext("baselabel") or ""
            user, _, group = label.partition(":")
            if user and group:
                return _uid(user), _gid(group)
    return None


def _uid(text: str) -> int:
    # "+64055" is a number for certain, a bare word may be a name
    return int(text) if text.lstrip("+").isdigit() else pwd.getpwnam(text).pw_uid


def _gid(text: str) -> int:
    return int(text) if text.lstrip("+").isdigit() else grp.getgrnam(text).gr_gid


def _values(root: etree._Element, path: str) -> tuple[str, ...]:
    return tuple(value.text or "" for value in root.iterfind(f"{path}/value"))


def _version(number: int) -> str:
    # libvirt packs versions as major * 1000000 + minor * 1000 + release
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"
