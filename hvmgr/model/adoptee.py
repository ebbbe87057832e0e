"""What only adopting asks of a domain XML that hvmgr did not make, and what only adopting changes in it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from enum import StrEnum

from lxml import etree

from hvmgr import errors
from hvmgr.model import xml_tree
from hvmgr.model.configuration import Configuration


class Internal(StrEnum):
    """What becomes of snapshots inside the images."""

    REFUSE = "refuse"
    CONVERT = "convert"
    DROP = "drop"


@dataclass(frozen=True, slots=True)
class Backing:
    """One parent as a ``<backingStore>`` states it; ``path`` is None when it is no file and no block device."""

    path: str | None
    format: str | None


@dataclass(frozen=True, slots=True)
class StatedChain:
    """The parents that the XML states below a disk's image, nearest first.

    ``is_complete``: it ends in an empty ``<backingStore/>``, so that nothing may stand below the last of them.
    """

    parents: tuple[Backing, ...]
    is_complete: bool


def stated_chain(one: Configuration, slot: str) -> StatedChain:
    """What the XML itself says of the chain below a disk; nothing at all where it leaves that to the headers."""
    element, parents = _disk(one, slot).find("backingStore"), list[Backing]()
    while element is not None:
        if element.get("type") is None and element.find("source") is None:
            return StatedChain(tuple(parents), is_complete=True)
        source, fmt = element.find("source"), element.find("format")
        path = None if source is None else source.get("file", source.get("dev"))
        parents.append(Backing(path, None if fmt is None else fmt.get("type")))
        element = element.find("backingStore")
    return StatedChain(tuple(parents), is_complete=False)


def has_mirror(one: Configuration, slot: str) -> bool:
    """Whether a copy of the disk is under way."""
    return _disk(one, slot).find("mirror") is not None


def volume(one: Configuration, slot: str) -> tuple[str, str]:
    """Pool and volume of a disk of the type ``volume``."""
    source = _disk(one, slot).find("source")
    return ("", "") if source is None else (source.get("pool", ""), source.get("volume", ""))


def use_file(one: Configuration, slot: str, path: str, *, is_device: bool) -> None:
    """A disk of the type ``volume`` names the file or device behind the volume, and keeps its format."""
    disk = _disk(one, slot)
    source = disk.find("source")
    assert source is not None
    for name in ("pool", "volume", "mode"):
        xml_tree.drop_attribute(source, name)
    disk.set("type", "block" if is_device else "file")
    source.set("dev" if is_device else "file", path)


def leave_out(one: Configuration, slot: str) -> None:
    """Snapshots do not concern the disk any more: libvirt's own mark, which libvirt heeds as well."""
    _disk(one, slot).set("snapshot", "no")


def take_disk(one: Configuration, slot: str, other: Configuration) -> None:
    """The disk in this slot becomes what it is in another configuration."""
    mine, theirs = _disk(one, slot), _disk(other, slot)
    new = copy.deepcopy(theirs)
    new.tail = mine.tail
    parent = mine.getparent()
    assert parent is not None
    parent.replace(mine, new)


def has_nvram_elsewhere(one: Configuration) -> bool:
    """Whether the firmware's variables are kept in something that is no file."""
    source = one.root.find("os/nvram/source")
    return source is not None and source.get("file") is None


def unsaveable(one: Configuration) -> list[str]:
    """Devices that keep QEMU from saving the VM's memory, in words."""
    found = [
        ("hostdev", "a device of the host"),
        ("filesystem/driver[@type='virtiofs']", "a virtiofs folder"),
        ("interface[@type='vhostuser']", "a vhost-user network interface"),
        ("interface[@type='hostdev']", "a network device of the host"),
        ("disk[@type='vhostuser']", "a vhost-user disk"),
        ("tpm/backend[@type='passthrough']", "the host's TPM"),
        ("shmem[@role='peer']", "memory shared with a peer"),
    ]
    return [what for path, what in found if one.root.find(f"devices/{path}") is not None]


def _disk(one: Configuration, slot: str) -> etree._Element:
    for disk in one.root.findall("devices/disk"):
        target = disk.find("target")
        if target is not None and target.get("dev") == slot:
            return disk
    raise errors.NotFound(f"no disk {slot} in {one.source}", slot=slot)
