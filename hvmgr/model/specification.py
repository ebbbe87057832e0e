"""What ``vm create`` was asked for, from options or from a file (``docs/specification.md``).

A specification says what the user wants and leaves open (None) what the template or the host decides.
"""

from __future__ import annotations

import re
import uuid as uuid_module
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from hvmgr import errors, units, yaml_text
from hvmgr.model.image_format import ImageFormat
from hvmgr.yaml_text import Value

DEFAULT_TEMPLATE = "generation2"

MEMORY_MINIMUM = units.MIB

# libvirt makes files named after the VM (<name>.save, <name>.log, channel sockets) where 255 bytes are the limit.
NAME_BYTES = 200

_SLOT = re.compile(r"(vd|sd|hd)[a-z]{1,2}")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", re.IGNORECASE)


class Acceleration(StrEnum):
    """What executes the guest; auto is KVM where the host can."""

    AUTO = "auto"
    KVM = "kvm"
    TCG = "tcg"


class Firmware(StrEnum):
    """What starts the guest."""

    BIOS = "bios"
    EFI = "efi"


class NetworkKind(StrEnum):
    """What a network interface is connected to."""

    NETWORK = "network"  # one of libvirt's networks, by name
    BRIDGE = "bridge"  # a bridge of the host, by name
    USER = "user"  # QEMU's own translation: outward only, needs nothing of the host


@dataclass(frozen=True, slots=True)
class DiskSpecification:
    """A new disk of ``size`` bytes, or one from the image at ``path``: copied into the home, or used where it is.

    ``linked``: the VM writes to a differencing image on that one, which stays where it is and as it is.
    """

    size: int | None = None
    path: Path | None = None
    in_place: bool = False
    slot: str | None = None
    format: ImageFormat | None = None
    linked: bool = False


@dataclass(frozen=True, slots=True)
class NetworkSpecification:
    """One network interface; ``name`` is the network's or the bridge's, None for user."""

    kind: NetworkKind
    name: str | None = None
    mac: str | None = None


@dataclass(frozen=True, slots=True)
class Specification:
    """A VM that is to be made. ``networks`` None means one interface on what the host has, () means none."""

    name: str
    template: str = DEFAULT_TEMPLATE
    memory: int | None = None
    vcpus: int | None = None
    disks: tuple[DiskSpecification, ...] = ()
    cdrom: Path | None = None
    networks: tuple[NetworkSpecification, ...] | None = None
    kernel: Path | None = None
    initrd: Path | None = None
    cmdline: str | None = None
    accel: Acceleration = Acceleration.AUTO
    tpm: bool | None = None
    firmware: Firmware | None = None
    uuid: str | None = None
    home: Path | None = None
    description: str | None = None


def load(text: str, *, source: str, folder: Path) -> Specification:
    """The specification in a YAML text; relative paths in it count from ``folder``.

    UsageError with file, line and key for whatever is not understood.
    """
    document = yaml_text.parse(text, source=source)
    optional = [name for name in Specification.__dataclass_fields__ if name != "name"]
    values = document.fields(required=["name"], optional=optional)
    spec = _read(values, folder)
    try:
        check(spec)
    except errors.UsageError as error:
        place = values.get(str(error.facts.get("key")), document)
        raise place.error(error.message, error.hint) from error
    return spec


def check(spec: Specification) -> None:
    """Raise UsageError, with the name of the field as fact ``key``, where the parts do not go together."""
    require_name(spec.name)
    if spec.memory is not None and spec.memory < MEMORY_MINIMUM:
        hint = f"write the unit: {spec.memory}M" if spec.memory >= 16 else "give a size with its unit, such as 2G"
        raise errors.UsageError(f"{units.format_size(spec.memory)} of memory is too little", hint=hint, key="memory")
    if spec.vcpus is not None and spec.vcpus < 1:
        raise errors.UsageError("at least one virtual CPU is needed", key="vcpus")
    for field in ("initrd", "cmdline"):
        if getattr(spec, field) is not None and spec.kernel is None:
            raise errors.UsageError(f"{field} is only used with a kernel", hint="name the kernel too", key=field)
    if spec.uuid is not None:
        _require_uuid(spec.uuid)
    for disk in spec.disks:
        _check_disk(disk)
    for network in spec.networks or ():
        if network.mac is not None and (not _MAC.fullmatch(network.mac) or int(network.mac[:2], 16) & 1):
            raise errors.UsageError(f"'{network.mac}' is not the address of one interface", key="networks")
    _refuse_doubles("slot", [disk.slot for disk in spec.disks], "disks")
    _refuse_doubles("address", [network.mac for network in spec.networks or ()], "networks")


def require_name(name: str) -> None:
    """UsageError unless libvirt takes this as the name of a VM and every file system as the name of a folder."""
    if not name or name != name.strip() or "/" in name or name.startswith(".") or not name.isprintable():
        raise errors.UsageError(
            f"{name!r} cannot be the name of a VM",
            hint="no '/', no dot in front, no space at the ends, nothing unprintable",
            key="name",
        )
    if len(name.encode()) > NAME_BYTES:
        raise errors.UsageError(f"a VM's name has at most {NAME_BYTES} bytes", key="name")


def parse_network(text: str) -> NetworkSpecification | None:
    """``NAME``, ``bridge=BRIDGE``, ``user``, or ``none`` (None), each but the last with ``,mac=ADDRESS`` behind it."""
    target, _, mac = text.partition(",mac=")
    kind, equals, name = target.partition("=")
    if target == "none" and not mac:
        return None
    if target == "user":
        return NetworkSpecification(NetworkKind.USER, mac=mac or None)
    if not equals and target:
        return NetworkSpecification(NetworkKind.NETWORK, target, mac or None)
    if kind in {NetworkKind.NETWORK, NetworkKind.BRIDGE} and name:
        return NetworkSpecification(NetworkKind(kind), name, mac or None)
    hint = "write a network's name, bridge=BRIDGE, user, or none"
    raise errors.UsageError(f"'{text}' is not a network", hint=hint, key="networks")


def parse_networks(texts: Sequence[str]) -> tuple[NetworkSpecification, ...] | None:
    """All of a command's ``--network``: None without any, () for a single ``none``."""
    found = [parse_network(text) for text in texts]
    if None in found and len(found) > 1:
        raise errors.UsageError("'none' excludes other networks", key="networks")
    return tuple(network for network in found if network is not None) if found else None


def _read(values: dict[str, Value], folder: Path) -> Specification:
    def path(name: str) -> Path | None:
        return folder / values[name].text() if name in values else None

    def text(name: str) -> str | None:
        return values[name].text() if name in values else None

    return Specification(
        name=values["name"].text(),
        template=text("template") or DEFAULT_TEMPLATE,
        memory=values["memory"].size() if "memory" in values else None,
        vcpus=values["vcpus"].integer(minimum=1) if "vcpus" in values else None,
        disks=tuple(_read_disk(item, folder) for item in values["disks"].items()) if "disks" in values else (),
        cdrom=path("cdrom"),
        networks=_read_networks(values["networks"]) if "networks" in values else None,
        kernel=path("kernel"),
        initrd=path("initrd"),
        cmdline=text("cmdline"),
        accel=values["accel"].choice(Acceleration) if "accel" in values else Acceleration.AUTO,
        tpm=values["tpm"].boolean() if "tpm" in values else None,
        firmware=values["firmware"].choice(Firmware) if "firmware" in values else None,
        uuid=text("uuid"),
        home=path("home"),
        description=text("description"),
    )


def _read_disk(item: Value, folder: Path) -> DiskSpecification:
    values = item.fields(optional=list(DiskSpecification.__dataclass_fields__))
    disk = DiskSpecification(
        size=values["size"].size() if "size" in values else None,
        path=folder / values["path"].text() if "path" in values else None,
        in_place=values["in_place"].boolean() if "in_place" in values else False,
        slot=values["slot"].text() if "slot" in values else None,
        format=values["format"].choice(ImageFormat) if "format" in values else None,
        linked=values["linked"].boolean() if "linked" in values else False,
    )
    try:
        _check_disk(disk)
    except errors.UsageError as error:
        raise item.error(error.message, error.hint) from error
    return disk


def _read_networks(value: Value) -> tuple[NetworkSpecification, ...]:
    if value.is_scalar and value.text() == "none":
        return ()
    return tuple(_read_network(item) for item in value.items())


def _read_network(item: Value) -> NetworkSpecification:
    try:
        if not item.is_scalar:
            values = item.fields(optional=["network", "bridge", "user", "mac"])
            kinds = [kind for kind in NetworkKind if kind in values]
            if len(kinds) != 1 or (kinds[0] is NetworkKind.USER and not values["user"].boolean()):
                raise item.error("one of network, bridge and user is expected")
            mac = values["mac"].text() if "mac" in values else None
            name = None if kinds[0] is NetworkKind.USER else values[kinds[0]].text()
            return NetworkSpecification(kinds[0], name, mac)
        network = parse_network(item.text())
    except errors.UsageError as error:
        raise error if "line" in error.facts else item.error(error.message, error.hint) from error
    if network is None:
        raise item.error("'none' excludes other networks", "write 'networks: none'")
    return network


def _check_disk(disk: DiskSpecification) -> None:
    if (disk.size is None) == (disk.path is None):
        raise errors.UsageError("a disk has either a size (new) or a path (an image that is there)", key="disks")
    if disk.size is not None and (disk.size < 1 or disk.size % 512):
        raise errors.UsageError(
            f"a disk cannot have {disk.size} bytes", hint="give a multiple of 512 bytes, such as 20G", key="disks"
        )
    if disk.linked and (disk.path is None or disk.in_place):
        raise errors.UsageError(
            "only an image that is there, and stays as it is, can be linked to", hint="give its path, without in_place"
        )
    if disk.in_place and disk.path is None:
        raise errors.UsageError("only an image that is there can be used in place", key="disks")
    if disk.slot is not None and not _SLOT.fullmatch(disk.slot):
        raise errors.UsageError(f"'{disk.slot}' is not a slot", hint="slots are called vda, sda, hda, …", key="disks")


def _require_uuid(text: str) -> None:
    try:
        plain = str(uuid_module.UUID(text)) == text.lower()
    except ValueError:
        plain = False
    if not plain:
        hint = "write it as 01234567-89ab-cdef-0123-456789abcdef"
        raise errors.UsageError(f"'{text}' is not a UUID", hint=hint, key="uuid")


def _refuse_doubles(what: str, words: Sequence[str | None], key: str) -> None:
    for word, count in Counter(word.lower() for word in words if word is not None).items():
        if count > 1:
            raise errors.UsageError(f"{what} {word} is there twice", key=key)
