"""One of libvirt's own snapshots: its ``<domainsnapshot>`` XML read, and written so that libvirt takes it back.

    <domainsnapshot>
      <name>…</name> <description>…</description>
      <state>shutoff|running|paused|disk-snapshot|…</state>        disk-snapshot: it ran, and only its disks were kept
      <parent><name>…</name></parent> <creationTime>seconds</creationTime>
      <memory snapshot='no|internal|external' file='…'/>
      <disks>
        <disk name='vda' snapshot='no|internal|external|manual' type='file'>
          <driver type='qcow2'/> <source file='…'/>                external: the new image, where the VM went on
        </disk>
      </disks>
      <domain>…</domain>                                           as it was, still with the image that was frozen
      <inactiveDomain>…</inactiveDomain>                           of one that ran: what the next start would have taken
      <cookie>…</cookie>
    </domainsnapshot>

https://libvirt.org/formatsnapshot.html. Pure; what is not known here is neither kept nor missed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from lxml import etree

from hvmgr import errors
from hvmgr.model import xml_tree
from hvmgr.model.configuration import Configuration

_SOURCE_ATTRIBUTES = {"file": "file", "block": "dev", "dir": "dir", "network": "name", "volume": "volume"}


class Kind(StrEnum):
    """Where a snapshot keeps a disk or the memory."""

    NO = "no"  # not in the snapshot
    INTERNAL = "internal"  # inside a qcow2 image
    EXTERNAL = "external"  # the old image is frozen, a new one goes on; memory: in a file of its own
    MANUAL = "manual"  # somebody else did it, while libvirt waited


class Moment(StrEnum):
    """What the VM did when the snapshot was taken; anything else that libvirt knows cannot be gone back to."""

    OFF = "shutoff"
    RUNNING = "running"
    PAUSED = "paused"
    DISKS_ONLY = "disk-snapshot"  # it ran, its memory was not kept
    OTHER = "other"  # crashed, pmsuspended, …


@dataclass(frozen=True, slots=True)
class SnapshotDisk:
    """One disk of a snapshot; ``source`` is the image that the VM went on in, None unless external."""

    slot: str
    kind: Kind
    source: str | None = None
    format: str | None = None
    type: str = "file"


@dataclass(frozen=True, slots=True)
class LibvirtSnapshot:
    """What libvirt keeps of one snapshot.

    ``configuration`` is the domain at that moment, before its disks were switched; ``inactive`` what a running one
    would have been started with next, where libvirt says it. ``cookie`` is libvirt's own, an element as text.
    """

    name: str
    created: datetime
    state: Moment
    description: str = ""
    parent: str | None = None
    memory: Kind = Kind.NO
    memory_file: str | None = None
    disks: tuple[SnapshotDisk, ...] = ()
    configuration: Configuration | None = None
    inactive: Configuration | None = None
    cookie: str | None = None

    @property
    def is_internal(self) -> bool:
        """Whether some of it lies inside images, where hvmgr cannot reach it as an image of its own."""
        return self.memory is Kind.INTERNAL or any(disk.kind is Kind.INTERNAL for disk in self.disks)

    def frozen(self) -> Mapping[str, str]:
        """The image, as libvirt's XML names it, that each external disk stopped writing to, by slot.

        Empty without a configuration: libvirt before 0.9.5 kept none.
        """
        if self.configuration is None:
            return {}
        before = {disk.slot: disk.source for disk in self.configuration.disks()}
        external = [disk.slot for disk in self.disks if disk.kind is Kind.EXTERNAL]
        return {slot: path for slot in external if (path := before.get(slot)) is not None}

    def went_on(self) -> Mapping[str, str]:
        """The image that each external disk went on in, by slot."""
        return {disk.slot: disk.source for disk in self.disks if disk.kind is Kind.EXTERNAL and disk.source is not None}


def parse(data: bytes | str, *, source: str) -> LibvirtSnapshot:
    """Read a ``<domainsnapshot>``; ``source`` names it in errors. Corrupt when it is none, or lacks what all have."""
    root = xml_tree.parse(data, source=source)
    if root.tag != "domainsnapshot":
        raise errors.Corrupt(f"{source}: <{root.tag}> where <domainsnapshot> was expected", file=source)
    memory = root.find("memory")
    seconds = _require(root, "creationTime", source)
    if not seconds.isdecimal():
        raise errors.Corrupt(f"{source}: <creationTime> is no number of seconds", file=source)
    return LibvirtSnapshot(
        name=_require(root, "name", source),
        created=datetime.fromtimestamp(int(seconds), UTC),
        state=_moment(_require(root, "state", source)),
        description=root.findtext("description") or "",
        parent=root.findtext("parent/name"),
        memory=Kind.NO if memory is None else _kind(memory, source),
        memory_file=None if memory is None else memory.get("file"),
        disks=tuple(_disk(element, source) for element in root.findall("disks/disk")),
        configuration=_domain(root.find("domain"), source),
        inactive=_domain(root.find("inactiveDomain"), source),
        cookie=_as_text(root.find("cookie")),
    )


def build(snapshot: LibvirtSnapshot) -> str:
    """The XML with which libvirt takes the snapshot back (REDEFINE); ``parse`` gives an equal snapshot."""
    assert snapshot.state is not Moment.OTHER, "libvirt cannot be told of a state that is not known"
    root = etree.Element("domainsnapshot")
    xml_tree.set_text(etree.SubElement(root, "name"), snapshot.name)
    if snapshot.description:
        xml_tree.set_text(etree.SubElement(root, "description"), snapshot.description)
    etree.SubElement(root, "state").text = snapshot.state
    if snapshot.parent is not None:
        xml_tree.set_text(etree.SubElement(etree.SubElement(root, "parent"), "name"), snapshot.parent)
    etree.SubElement(root, "creationTime").text = str(int(snapshot.created.timestamp()))
    memory = etree.SubElement(root, "memory", snapshot=snapshot.memory)
    if snapshot.memory_file is not None:
        memory.set("file", snapshot.memory_file)
    _build_disks(etree.SubElement(root, "disks"), snapshot.disks)
    for tag, one in (("domain", snapshot.configuration), ("inactiveDomain", snapshot.inactive)):
        if one is not None:
            element = copy.deepcopy(one.root)
            element.tag, element.tail = tag, None
            root.append(element)
    if snapshot.cookie is not None:
        root.append(etree.fromstring(snapshot.cookie))
    return etree.tostring(root, encoding="unicode") + "\n"


def _build_disks(parent: etree._Element, disks: tuple[SnapshotDisk, ...]) -> None:
    for disk in disks:
        element = etree.SubElement(parent, "disk", name=disk.slot, snapshot=disk.kind)
        if disk.kind is not Kind.EXTERNAL:
            continue
        element.set("type", disk.type)
        if disk.format is not None:
            etree.SubElement(element, "driver", type=disk.format)
        if disk.source is not None:
            etree.SubElement(element, "source").set(_SOURCE_ATTRIBUTES.get(disk.type, "file"), disk.source)


def _disk(element: etree._Element, source: str) -> SnapshotDisk:
    kind = element.get("type", "file")
    image, driver = element.find("source"), element.find("driver")
    return SnapshotDisk(
        slot=element.get("name", ""),
        kind=_kind(element, source),
        source=None if image is None else image.get(_SOURCE_ATTRIBUTES.get(kind, "")),
        format=None if driver is None else driver.get("type"),
        type=kind,
    )


def _kind(element: etree._Element, source: str) -> Kind:
    text = element.get("snapshot", Kind.NO)
    try:
        return Kind(text)
    except ValueError as error:
        raise errors.Corrupt(
            f"{source}, line {element.sourceline}: snapshot='{text}' is not understood", file=source
        ) from error


def _moment(text: str) -> Moment:
    try:
        return Moment(text)
    except ValueError:
        return Moment.OTHER


def _domain(element: etree._Element | None, source: str) -> Configuration | None:
    """The element as the root of a document of its own, whatever it was called."""
    if element is None or element.find("uuid") is None:  # the oldest snapshots hold <domain><uuid/></domain> alone,
        return None
    if element.find("devices") is None:
        return None  # which is no configuration
    own = copy.deepcopy(element)
    own.tag, own.tail = "domain", None
    return Configuration(etree.ElementTree(own).getroot(), source)


def _as_text(element: etree._Element | None) -> str | None:
    return None if element is None else etree.tostring(element, encoding="unicode", with_tail=False)


def _require(root: etree._Element, tag: str, source: str) -> str:
    text = (root.findtext(tag) or "").strip() if tag != "name" else root.findtext(tag) or ""
    if not text:
        raise errors.Corrupt(f"{source}: no <{tag}>", file=source)
    return text
