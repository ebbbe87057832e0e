"""hvmgr's own facts inside a libvirt domain XML: one ``<hvmgr:vm>`` element in ``<metadata>``.

    <hvmgr:vm xmlns:hvmgr="urn:hvmgr:vm:1" format="1" home="/var/lib/hvmgr/web" uri="qemu:///system"
              created="2026-11-21T13:03:05.000000Z" parent="SNAPSHOT-ID"            parent: absent at the root
              change="UUID"                                                         the plan that last changed the disks
              owner="anna">                                                         absent when nobody was named
      <hvmgr:tag name="shop"/>                                                      as many as there are
      <hvmgr:origin vm="UUID" mode="copy|register|link" digest="SHA-256"/>          of an imported VM; digest: of an export
      <hvmgr:disk slot="vda" id="UUID" image="UUID" apart="yes"/>                   image: absent when unnamed
      <hvmgr:snapshot id="UUID" name="before the update" created="…" type="standard|production|disk-only"
                      state="none|running|paused" automatic="no" parent="SNAPSHOT-ID"
                      damaged="vda vdb">                    the disks that others wrote below it; absent when it is whole
        <hvmgr:notes>…</hvmgr:notes>
      </hvmgr:snapshot>                                                             only in Snapshots/<id>.xml
    </hvmgr:vm>

A newer format is Unsupported, a broken one Corrupt with the line; attributes and children that are not listed here stay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from lxml import etree

from hvmgr import errors, units
from hvmgr.model import xml_tree

NAMESPACE = "urn:hvmgr:vm:1"
PREFIX = "hvmgr"
FORMAT = 1

_VM = f"{{{NAMESPACE}}}vm"
_DISK = f"{{{NAMESPACE}}}disk"
_SNAPSHOT = f"{{{NAMESPACE}}}snapshot"
_NOTES = f"{{{NAMESPACE}}}notes"
_TAG = f"{{{NAMESPACE}}}tag"
_ORIGIN = f"{{{NAMESPACE}}}origin"

T = TypeVar("T")


class SnapshotType(StrEnum):
    """How the disks and the memory of a snapshot belong together."""

    STANDARD = "standard"
    PRODUCTION = "production"
    DISK_ONLY = "disk-only"


class SavedState(StrEnum):
    """What a snapshot holds beside its disks, and in which state the VM goes on from it."""

    NONE = "none"
    RUNNING = "running"
    PAUSED = "paused"


@dataclass(frozen=True, slots=True)
class DiskRecord:
    """A disk keeps its id for life; the slot is where it is plugged in at present.

    ``apart``: others gave it another chain, found whole, than the one below the snapshot above the present.
    """

    slot: str
    id: str
    image: str | None = None
    apart: bool = False


@dataclass(frozen=True, slots=True)
class SnapshotRecord:
    """What a snapshot is called, when and how it was taken, and its parent in the tree (None: a root).

    ``damaged`` names the slots whose images somebody wrote after they were frozen, for good: an image has one past.
    """

    id: str
    name: str
    created: datetime
    type: SnapshotType = SnapshotType.STANDARD
    state: SavedState = SavedState.NONE
    parent: str | None = None
    automatic: bool = False
    notes: str = ""
    damaged: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Origin:
    """What an import made a VM of: the VM's id there, the mode, and the SHA-256 of the export's own description.

    ``digest`` is None when the source was no export: it may have changed since.
    """

    vm: str
    mode: str
    digest: str | None = None


@dataclass(frozen=True, slots=True)
class Metadata:
    """The facts of one VM; ``snapshot`` is there only in the configuration of a snapshot.

    ``change`` is the id of the plan that last gave the VM its disks: whoever finds it in libvirt's XML knows that the
    plan's switch happened.
    """

    home: Path
    uri: str
    created: datetime
    parent: str | None = None
    disks: tuple[DiskRecord, ...] = ()
    snapshot: SnapshotRecord | None = None
    change: str | None = None
    owner: str | None = None
    tags: tuple[str, ...] = ()
    origin: Origin | None = None


def find_element(metadata: etree._Element | None) -> etree._Element | None:
    """The ``<hvmgr:vm>`` inside a ``<metadata>`` element."""
    return None if metadata is None else metadata.find(_VM)


def new_element(metadata: etree._Element) -> etree._Element:
    """An empty element at the end of ``<metadata>``; ``write`` fills it."""
    return etree.SubElement(metadata, _VM, nsmap={PREFIX: NAMESPACE})


def read(vm: etree._Element, *, source: str) -> Metadata:
    """The facts in hvmgr's element; ``source`` names the file in errors."""
    _require_format(vm, source)
    snapshot = vm.find(_SNAPSHOT)
    return Metadata(
        home=Path(_text(vm, "home", source)),
        uri=_text(vm, "uri", source),
        created=_value(vm, "created", source, units.from_rfc3339),
        parent=vm.get("parent"),
        disks=tuple(
            DiskRecord(
                _text(disk, "slot", source),
                _text(disk, "id", source),
                disk.get("image") or None,
                disk.get("apart") == "yes",
            )
            for disk in vm.findall(_DISK)
        ),
        snapshot=None if snapshot is None else _read_snapshot(snapshot, source),
        change=vm.get("change"),
        owner=vm.get("owner"),
        tags=tuple(_text(tag, "name", source) for tag in vm.findall(_TAG)),
        origin=None if (origin := vm.find(_ORIGIN)) is None else _read_origin(origin, source),
    )


def write(vm: etree._Element, facts: Metadata) -> None:
    """Make the element say exactly these facts; what hvmgr does not know in it stays."""
    for child in [child for tag in (_TAG, _ORIGIN, _DISK, _SNAPSHOT) for child in vm.findall(tag)]:
        vm.remove(child)
    try:
        _set(vm, format=str(FORMAT), home=str(facts.home), uri=facts.uri)
        _set(vm, created=units.to_rfc3339(facts.created), parent=facts.parent, change=facts.change)
        _set(vm, owner=facts.owner)
        for tag in facts.tags:
            _set(etree.SubElement(vm, _TAG), name=tag)
        if facts.origin is not None:
            origin = facts.origin
            _set(etree.SubElement(vm, _ORIGIN), vm=origin.vm, mode=origin.mode, digest=origin.digest)
        for disk in facts.disks:
            apart = "yes" if disk.apart else None
            _set(etree.SubElement(vm, _DISK), slot=disk.slot, id=disk.id, image=disk.image, apart=apart)
        if facts.snapshot is not None:
            _write_snapshot(etree.SubElement(vm, _SNAPSHOT), facts.snapshot)
    except ValueError as error:  # lxml's word for characters that no XML can hold
        raise errors.UsageError(
            "a name or note holds a control character, which XML cannot keep",
            hint="remove it and run the command again",
        ) from error


def _read_origin(element: etree._Element, source: str) -> Origin:
    return Origin(
        vm=_text(element, "vm", source), mode=_text(element, "mode", source), digest=element.get("digest") or None
    )


def _read_snapshot(element: etree._Element, source: str) -> SnapshotRecord:
    return SnapshotRecord(
        id=_text(element, "id", source),
        name=_text(element, "name", source),
        created=_value(element, "created", source, units.from_rfc3339),
        type=_value(element, "type", source, SnapshotType),
        state=_value(element, "state", source, SavedState),
        parent=element.get("parent"),
        automatic=element.get("automatic") == "yes",
        notes=element.findtext(_NOTES) or "",
        damaged=tuple(element.get("damaged", "").split()),
    )


def _write_snapshot(element: etree._Element, facts: SnapshotRecord) -> None:
    _set(element, id=facts.id, name=facts.name, created=units.to_rfc3339(facts.created), type=facts.type)
    _set(element, state=facts.state, automatic="yes" if facts.automatic else "no", parent=facts.parent)
    _set(element, damaged=" ".join(facts.damaged) or None)
    if facts.notes:
        etree.SubElement(element, _NOTES).text = facts.notes


def _require_format(vm: etree._Element, source: str) -> None:
    found = _value(vm, "format", source, int)
    if found > FORMAT:
        raise errors.Unsupported(
            f"{source} was written by a newer hvmgr (format {found}, this one knows {FORMAT})",
            hint="use the newer hvmgr",
            file=source,
        )


def _set(element: etree._Element, **attributes: str | None) -> None:
    for name, value in attributes.items():
        if value is None:
            xml_tree.drop_attribute(element, name)
        else:
            element.set(name, value)


def _text(element: etree._Element, name: str, source: str) -> str:
    value = element.get(name)
    if value is None:
        raise _corrupt(element, source, f"has no {name}")
    return value


def _value(element: etree._Element, name: str, source: str, convert: Callable[[str], T]) -> T:
    text = _text(element, name, source)
    try:
        return convert(text)
    except ValueError as error:
        raise _corrupt(element, source, f"says {name}='{text}', which is not understood") from error


def _corrupt(element: etree._Element, source: str, what: str) -> errors.Corrupt:
    tag = etree.QName(element).localname
    return errors.Corrupt(f"{source}, line {element.sourceline}: hvmgr's <{tag}> {what}", file=source)
