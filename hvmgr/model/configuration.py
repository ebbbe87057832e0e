"""A libvirt domain XML with hvmgr's metadata element in it.

``Configuration`` reads and changes what hvmgr has to know of a VM; every element, attribute and comment that it does
not know stays where it is. Format: https://libvirt.org/formatdomain.html.
"""

from __future__ import annotations

import contextlib
import copy
import re
from dataclasses import dataclass
from pathlib import Path

from lxml import etree

from hvmgr import errors
from hvmgr.model import metadata as metadata_element
from hvmgr.model import xml_tree
from hvmgr.model.metadata import Metadata

# https://libvirt.org/formatdomain.html#memory-allocation: without a unit KiB; "KB" is 1000, "K" and "KiB" 1024.
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5, "E": 6}

# Where <source> keeps the name, by type of disk; anything else is known by type only.
_SOURCE_ATTRIBUTES = {"file": "file", "block": "dev", "dir": "dir", "network": "name", "volume": "volume"}

# Parts of a disk that describe one image and would be wrong, or unsafe, on another one.
_IMAGE_PARTS = ("encryption", "source/encryption", "source/slices", "source/dataStore")

# hvmgr's element as ``to_xml`` writes it, and what could make the same bytes mean something else.
_FRAGMENT = re.compile(rb'<hvmgr:vm xmlns:hvmgr="urn:hvmgr:vm:1" .*?</hvmgr:vm>', re.DOTALL)
_AMBIGUOUS = re.compile(rb"<[!?]")

_REMOVABLE = ("cdrom", "floppy")


@dataclass(frozen=True, slots=True)
class Disk:
    """One ``<disk>`` as it is plugged in. ``source`` is None when a removable drive is empty."""

    slot: str
    device: str
    type: str
    source: str | None
    format: str | None
    readonly: bool
    shareable: bool
    transient: bool
    bus: str | None
    serial: str | None
    snapshot: str | None  # the user's own wish: 'no' leaves the disk out
    image_parts: tuple[str, ...]  # encryption, slices, dataStore: such a disk cannot be pointed elsewhere

    @property
    def takes_part(self) -> bool:
        """Whether snapshots freeze this disk: a writable hard disk in a file or block device that is not left out."""
        return self.device == "disk" and self.type in {"file", "block"} and not self.readonly and self.snapshot != "no"

    @property
    def is_left_out(self) -> bool:
        """Whether it is a hard disk in a file or device of the host that snapshots do not freeze."""
        return self.device == "disk" and self.type in {"file", "block"} and not self.takes_part

    @property
    def is_removable(self) -> bool:
        """Whether the medium can be taken out."""
        return self.device in _REMOVABLE


@dataclass(frozen=True, slots=True)
class Nic:
    """One ``<interface>``; ``source`` is the network, bridge or device, None for type user."""

    mac: str
    type: str
    source: str | None
    model: str | None


class Configuration:
    """A parsed domain XML. Setters change it in place; take a ``copy()`` first where the old one is still needed."""

    __slots__ = ("_root", "source")

    def __init__(self, root: etree._Element, source: str) -> None:
        self._root = root
        self.source = source

    def copy(self) -> Configuration:
        """An independent one with the same content."""
        return Configuration(copy.deepcopy(self._root.getroottree()).getroot(), self.source)

    def to_xml(self) -> str:
        """The XML without a declaration, ended by a line feed; parsing it gives the same text again."""
        # libxml2 keeps comments outside the root element, but not the line feeds between them.
        parts = [*reversed(list(self._root.itersiblings(preceding=True))), self._root, *self._root.itersiblings()]
        return "".join(etree.tostring(part, encoding="unicode", with_tail=False) + "\n" for part in parts)

    @property
    def root(self) -> etree._Element:
        """The ``<domain>`` element, for what has no property here."""
        return self._root

    # What the VM is

    @property
    def name(self) -> str:
        """The VM's name in libvirt."""
        return self._require_text("name")

    @property
    def uuid(self) -> str:
        """The VM's id, in lower case with hyphens."""
        return self._require_text("uuid").lower()

    @property
    def genid(self) -> str | None:
        """The VM generation id; '' when libvirt is to make one at each start."""
        element = self._root.find("genid")
        return None if element is None else (element.text or "").strip()

    @property
    def memory(self) -> int:
        """Maximum memory, bytes."""
        element = self._root.find("memory")
        if element is None:
            raise self._corrupt("no <memory>")
        unit = re.fullmatch(r"(?:b|bytes|([kmgtpe])(ib|b)?)", element.get("unit", "KiB"), re.IGNORECASE)
        number = (element.text or "").strip()
        if unit is None or not number.isdecimal():
            raise self._corrupt("<memory> is not a size", element)
        base = 1000 if (unit[2] or "").lower() == "b" else 1024
        return int(number) * int(base ** _POWERS[(unit[1] or "").upper()])

    @property
    def vcpus(self) -> int:
        """Maximum number of virtual CPUs."""
        text = self._text("vcpu") or "1"
        if not text.isdecimal():
            raise self._corrupt("<vcpu> is not a number", self._root.find("vcpu"))
        return int(text)

    @property
    def type(self) -> str:
        """What runs it: kvm or qemu (emulation)."""
        return self._root.get("type", "")

    @property
    def machine(self) -> str | None:
        """The machine type, as versioned as the XML says it."""
        element = self._root.find("os/type")
        return None if element is None else element.get("machine")

    @property
    def arch(self) -> str | None:
        """The guest's architecture."""
        element = self._root.find("os/type")
        return None if element is None else element.get("arch")

    @property
    def emulator(self) -> Path | None:
        """The QEMU that runs it, when the XML names one."""
        text = (self._root.findtext("devices/emulator") or "").strip()
        return Path(text) if text else None

    @property
    def nvram(self) -> Path | None:
        """The file of the UEFI variables, in both of libvirt's spellings."""
        element = self._root.find("os/nvram")
        if element is None:
            return None
        source = element.find("source")
        path = (element.text or "").strip() if source is None else source.get("file")
        return Path(path) if path else None

    @property
    def has_tpm(self) -> bool:
        """Whether there is an emulated TPM, whose state has to travel with the VM."""
        return self._root.find("devices/tpm/backend[@type='emulator']") is not None

    @property
    def has_persistent_tpm(self) -> bool:
        """Whether libvirt keeps the state of the emulated TPM even when the VM is undefined."""
        return self._root.find("devices/tpm/backend[@type='emulator'][@persistent_state='yes']") is not None

    def disks(self) -> tuple[Disk, ...]:
        """All disks in the order of the XML."""
        return tuple(self._disk(element) for element in self._root.findall("devices/disk"))

    def find_disk(self, slot: str) -> Disk | None:
        """The disk in this slot."""
        return next((disk for disk in self.disks() if disk.slot == slot), None)

    def backing_file(self, slot: str) -> str | None:
        """The file below the image of a disk, in an XML where libvirt resolved the chain; None when it is not said."""
        source = self._require_disk(slot).find("backingStore/source")
        return None if source is None else source.get("file") or source.get("dev")

    def nics(self) -> tuple[Nic, ...]:
        """All network interfaces in the order of the XML; a MAC that libvirt has yet to choose is ''."""
        return tuple(_nic(element) for element in self._root.findall("devices/interface"))

    # Changes

    def set_name(self, name: str) -> None:
        """Give the VM another name."""
        xml_tree.set_text(self._ensure("name"), name)

    def set_uuid(self, uuid: str) -> None:
        """Give the VM another id, also where the SMBIOS tables repeat it (libvirt refuses two different ones)."""
        xml_tree.set_text(self._ensure("uuid"), uuid)
        for entry in self._root.findall("sysinfo/system/entry[@name='uuid']"):
            entry.text = uuid

    def set_genid(self, uuid: str, *, add: bool = False) -> None:
        """Give the VM another generation id; one that had none gets it only with ``add``."""
        if add or self._root.find("genid") is not None:
            self._ensure("genid", after="uuid").text = uuid

    def set_memory(self, size: int) -> None:
        """Set maximum and present memory, bytes, rounded up to KiB."""
        for element in (self._ensure("memory"), self._root.find("currentMemory")):
            if element is not None:
                element.set("unit", "KiB")
                element.text = str(-(-size // 1024))

    def set_vcpus(self, count: int) -> None:
        """Set the number of virtual CPUs, all of them on line."""
        element = self._ensure("vcpu")
        xml_tree.drop_attribute(element, "current")
        element.text = str(count)

    def set_nvram(self, path: Path) -> None:
        """Point to another file of UEFI variables, in the spelling that the XML has."""
        parent = self._ensure("os")
        element = parent.find("nvram")
        if element is None:
            element = xml_tree.insert(parent, "nvram", after="loader")
        source = element.find("source")
        if source is None:
            xml_tree.set_text(element, str(path))
        else:
            xml_tree.set_attribute(source, "file", str(path))

    def set_disk_source(self, slot: str, path: Path, image_format: str) -> None:
        """Point a disk to another image file.

        Everything that libvirt had resolved of the old chain goes: a left-over ``<backingStore/>`` would make the guest
        see an empty disk without an error. Unsupported when the disk carries parts that belong to its old image.
        """
        disk = self._require_disk(slot)
        if parts := _image_parts(disk):
            raise errors.Unsupported(
                f"{self.source}: disk {slot} has <{parts[0]}>, which another image cannot take over"
            )
        _strip_chain(disk)
        element = disk.find("source")
        if element is None:
            element = xml_tree.insert(disk, "source", after="driver")
        if disk.get("type") != "file":
            _make_plain(element)
            disk.set("type", "file")
        xml_tree.set_attribute(element, "file", str(path))
        driver = disk.find("driver")
        if driver is None:
            driver = xml_tree.insert(disk, "driver", after=None)
            driver.set("name", "qemu")
        driver.set("type", image_format)

    def strip_backing_chains(self) -> None:
        """Remove what libvirt resolved or runs at present on any disk: chains, mirrors, node indices."""
        for disk in self._root.findall("devices/disk"):
            _strip_chain(disk)

    @property
    def has_backing_chains(self) -> bool:
        """Whether any disk names parents of its image: what libvirt resolved, or was told."""
        return self._root.find("devices/disk/backingStore/source") is not None

    def eject(self, slot: str) -> None:
        """Take the medium out of a removable drive."""
        disk = self._require_disk(slot)
        if disk.get("device") not in _REMOVABLE:
            raise errors.UsageError(f"{slot} is a hard disk and cannot be ejected", slot=slot)
        _strip_chain(disk)
        for element in disk.findall("source"):
            xml_tree.remove(element)
        disk.set("type", "file")

    def remove_disk(self, slot: str) -> None:
        """The VM has no disk in this slot."""
        xml_tree.remove(self._require_disk(slot))

    def set_mac(self, old: str, new: str) -> None:
        """Give one network interface another address."""
        self._require_nic(old).set("address", new)

    # hvmgr's own facts

    def metadata(self) -> Metadata | None:
        """What hvmgr knows of the VM; None in an XML that hvmgr has never seen."""
        element = metadata_element.find_element(self._root.find("metadata"))
        return None if element is None else metadata_element.read(element, source=self.source)

    def set_metadata(self, facts: Metadata) -> None:
        """Write what hvmgr knows; other programs' metadata stays as it is."""
        parent = self._root.find("metadata")
        if parent is None:
            parent = xml_tree.insert(self._root, "metadata", after="genid", otherwise="uuid")
        element = metadata_element.find_element(parent)
        if element is None:
            element = metadata_element.new_element(parent)
        metadata_element.write(element, facts)
        xml_tree.indent(element)

    def without_metadata(self) -> Configuration:
        """A copy that hvmgr has left no trace in."""
        result = self.copy()
        parent = result.root.find("metadata")
        element = metadata_element.find_element(parent)
        if parent is not None and element is not None:
            xml_tree.remove(element)
            if len(parent) == 0:
                xml_tree.remove(parent)
        return result

    # Inside

    def _disk(self, disk: etree._Element) -> Disk:
        kind = disk.get("type", "file")
        target, source, driver = disk.find("target"), disk.find("source"), disk.find("driver")
        if target is None or not target.get("dev"):
            raise self._corrupt("a <disk> without a target", disk)
        return Disk(
            slot=target.get("dev", ""),
            device=disk.get("device", "disk"),
            type=kind,
            source=None if source is None else source.get(_SOURCE_ATTRIBUTES.get(kind, "")),
            format=None if driver is None else driver.get("type"),
            readonly=disk.find("readonly") is not None,
            shareable=disk.find("shareable") is not None,
            transient=disk.find("transient") is not None,
            bus=target.get("bus"),
            serial=disk.findtext("serial"),
            snapshot=disk.get("snapshot"),
            image_parts=_image_parts(disk),
        )

    def _require_disk(self, slot: str) -> etree._Element:
        for disk in self._root.findall("devices/disk"):
            target = disk.find("target")
            if target is not None and target.get("dev") == slot:
                return disk
        slots = [disk.slot for disk in self.disks()]
        hint = f"it has {', '.join(slots)}" if slots else "it has no disks"
        raise errors.NotFound(f"no disk {slot} in {self.source}", hint=hint, slot=slot)

    def _require_nic(self, mac: str) -> etree._Element:
        for element in self._root.findall("devices/interface/mac"):
            if element.get("address", "").lower() == mac.lower():
                return element
        raise errors.NotFound(f"no network interface {mac} in {self.source}", mac=mac)

    def _text(self, path: str) -> str | None:
        text = self._root.findtext(path)
        return None if text is None else text.strip()

    def _require_text(self, tag: str) -> str:
        text = self._text(tag)
        if not text:
            raise self._corrupt(f"no <{tag}>")
        return text

    def _ensure(self, tag: str, after: str = "name") -> etree._Element:
        element = self._root.find(tag)
        return xml_tree.insert(self._root, tag, after=after, otherwise="name") if element is None else element

    def _corrupt(self, what: str, element: etree._Element | None = None) -> errors.Corrupt:
        line = "" if element is None else f", line {element.sourceline}"
        return errors.Corrupt(f"{self.source}{line}: {what}", file=self.source)


def parse(data: bytes | str, *, source: str) -> Configuration:
    """Read a domain XML in any encoding that it declares; ``source`` names it in errors.

    Corrupt with line and column when it is not well-formed, has a DOCTYPE, or is not a ``<domain>``.
    """
    root = xml_tree.parse(data, source=source)
    if root.tag != "domain":
        raise errors.Corrupt(f"{source}, line {root.sourceline}: <{root.tag}> where <domain> was expected", file=source)
    return Configuration(root, source)


def metadata_of(data: bytes, *, source: str) -> Metadata | None:
    """``parse(data).metadata()``, in half the time for a file that hvmgr wrote (lists read 1,000 snapshots at once).

    Of such a file only hvmgr's element is parsed; that it is complete is seen from its end. Wherever the bytes alone
    do not prove what they mean, the whole is parsed.
    """
    found = _FRAGMENT.findall(data)
    if len(found) == 1 and data.rstrip().endswith(b"</domain>") and not _AMBIGUOUS.search(data):
        with contextlib.suppress(errors.Corrupt):  # said again below, with the line in the whole file
            return metadata_element.read(xml_tree.parse(found[0], source=source), source=source)
    return parse(data, source=source).metadata()


def salvage_metadata(data: bytes) -> Metadata | None:
    """hvmgr's facts in a file that is damaged elsewhere; None when they are not whole either."""
    found = _FRAGMENT.findall(data)
    if len(found) != 1:
        return None
    try:
        return metadata_element.read(xml_tree.parse(found[0], source="the damaged file"), source="the damaged file")
    except errors.HvmgrError:
        return None


def same(first: bytes | str, second: bytes | str) -> bool:
    """Whether two domain XMLs describe the same configuration.

    White space between elements, the order of attributes and of controllers, comments and the id of a running domain do not
    count. libvirt sorts the controllers that it added by itself when it reads the domain again.
    """
    if first == second:
        return True
    one, other = parse(first, source="first XML"), parse(second, source="second XML")
    for configuration in (one, other):
        xml_tree.drop_attribute(configuration.root, "id")
        for devices in configuration.root.findall("devices"):
            controllers = devices.findall("controller")
            devices.extend(sorted(controllers, key=xml_tree.canonical))  # they move to the end
    return xml_tree.canonical(one.root) == xml_tree.canonical(other.root)


def _nic(element: etree._Element) -> Nic:
    mac, source, model = element.find("mac"), element.find("source"), element.find("model")
    kind = element.get("type", "")
    name = None
    if source is not None:
        name = next((source.get(key) for key in (kind, "network", "bridge", "dev", "path") if source.get(key)), None)
    return Nic(
        mac="" if mac is None else mac.get("address", "").lower(),
        type=kind,
        source=name,
        model=None if model is None else model.get("type"),
    )


def _image_parts(disk: etree._Element) -> tuple[str, ...]:
    return tuple(path.rpartition("/")[2] for path in _IMAGE_PARTS if disk.find(path) is not None)


def _strip_chain(disk: etree._Element) -> None:
    for tag in ("backingStore", "mirror"):
        for element in disk.findall(tag):
            xml_tree.remove(element)
    for element in disk.findall("source"):
        xml_tree.drop_attribute(element, "index")


def _make_plain(source: etree._Element) -> None:
    # What names a device, a volume or a server means nothing for a file; labels and the start-up policy still do.
    for name in source.attrib:
        if name != "startupPolicy":
            del source.attrib[name]
    for child in source.iterchildren(etree.Element):
        if child.tag != "seclabel":
            xml_tree.remove(child)
