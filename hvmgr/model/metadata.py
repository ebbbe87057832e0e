"""hvmgr's own facts inside a libvirt domain XML: one ``<hvmgr:vm>`` element in ``<metadata>``.

    <hvmgr:vm xmlns:hvmgr="urn:hvmgr:vm:1" format="1" home="/var/lib/hvmgr/web" uri="qemu:///system"
              created="2026-11-21T13:03:05.000000Z" parent="SNAPSHOT-ID"            parent: absent at the root
              change="UUID"                                                         the plan that last changed the disks
              owner="anna">                                                         absent when nobody was named
      <hvmgr:tag name="shop"/>                                                      as many as there are
      <hvmgr:policy …/>                                                             absent where nothing was set; see ``policy``
      <hvmgr:origin vm="UUID" mode="copy|register|link" digest="SHA-256"/>          of an imported VM; digest: of an export
      <hvmgr:disk slot="vda" id="UUID" image="UUID" apart="yes"/>                   image: absent when unnamed
      <hvmgr:snapshot id="UUID" name="before the update" created="…" type="standard|production|disk-only"
                      state="none|running|paused" automatic="no|start|schedule|crash" parent="SNAPSHOT-ID"
                      damaged="vda vdb"                     the disks that others wrote below it; absent when it is whole
                      qemu="7.2.22" host="UUID">            what saved its state, and where; absent when unknown
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

from hvmgr import errors, keeping, units
from hvmgr.model import policy, xml_tree
from hvmgr.model.policy import Origin, Policy

NAMESPACE = "urn:hvmgr:vm:1"
PREFIX = "hvmgr"
FORMAT = 1

_VM = f"{{{NAMESPACE}}}vm"
_DISK = f"{{{NAMESPACE}}}disk"
_SNAPSHOT = f"{{{NAMESPACE}}}snapshot"
_NOTES = f"{{{NAMESPACE}}}notes"
_TAG = f"{{{NAMESPACE}}}tag"
_LABEL_MAX = 100
_POLICY = f"{{{NAMESPACE}}}policy"
_ORIGIN = f"{{{NAMESPACE}}}origin"

T = TypeVar("T")


class SnapshotType(StrEnum):
    """What a snapshot is, or is asked to be: memory and disks, or disks of which the guest knew, or disks alone."""

    STANDARD = "standard"
    PRODUCTION = "production"  # asked for: where the guest does not help, a standard one is taken
    PRODUCTION_ONLY = "production-only"  # only ever asked for: what it makes is a production snapshot
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

    ``automatic`` says why hvmgr took it by itself; None: somebody asked for it, or has made it his own.
    ``damaged`` names the slots whose images somebody wrote after they were frozen, for good: an image has one past.
    ``qemu`` is the version that saved its state, ``host`` libvirt's id of the host where that was.
    """

    id: str
    name: str
    created: datetime
    type: SnapshotType = SnapshotType.STANDARD
    state: SavedState = SavedState.NONE
    parent: str | None = None
    automatic: Origin | None = None
    notes: str = ""
    damaged: tuple[str, ...] = ()
    qemu: str | None = None
    host: str | None = None


@dataclass(frozen=True, slots=True)
class ImportOrigin:
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
    policy: Policy = policy.DEFAULT
    origin: ImportOrigin | None = None


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
        policy=_read_policy(vm.find(_POLICY)),
        origin=None if (origin := vm.find(_ORIGIN)) is None else _read_origin(origin, source),
    )


def require_labels(*texts: str | None) -> None:
    """UsageError for what can be neither an owner nor a tag."""
    for text in texts:
        if text is not None and not (text.strip() and text.isprintable() and len(text) <= _LABEL_MAX):
            raise errors.UsageError(f"{text!r} cannot be an owner or a tag", hint="1 to 100 printable characters")


def write(vm: etree._Element, facts: Metadata) -> None:
    """Make the element say exactly these facts; what hvmgr does not know in it stays."""
    for child in [child for tag in (_TAG, _ORIGIN, _DISK, _SNAPSHOT) for child in vm.findall(tag)]:
        vm.remove(child)
    _write_policy(vm, facts.policy)
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


def _read_origin(element: etree._Element, source: str) -> ImportOrigin:
    return ImportOrigin(
        vm=_text(element, "vm", source), mode=_text(element, "mode", source), digest=element.get("digest") or None
    )


def _read_snapshot(element: etree._Element, source: str) -> SnapshotRecord:
    return SnapshotRecord(
        id=_text(element, "id", source),
        name=_text(element, "name", source),
        created=_value(element, "created", source, units.from_rfc3339),
        type=_value(element, "type", source, _recorded_type),
        state=_value(element, "state", source, SavedState),
        parent=element.get("parent"),
        automatic=_origin(element.get("automatic")),
        notes=element.findtext(_NOTES) or "",
        damaged=tuple(element.get("damaged", "").split()),
        qemu=element.get("qemu"),
        host=element.get("host"),
    )


def _origin(text: str | None) -> Origin | None:
    """One that is not known is nobody's to remove."""
    return Origin(text) if text in set(Origin) else None


def _read_policy(element: etree._Element | None) -> Policy:
    """A VM whose policy is not understood is a VM like any other: nothing is done with it by itself."""
    if element is None:
        return policy.DEFAULT
    schedule, since, keep = element.get("schedule"), element.get("since"), element.get("keep")
    try:
        return Policy(
            type=policy.SnapshotDefault(element.get("type", policy.DEFAULT.type)),
            automatic=element.get("automatic") == "on",
            keep=None if keep is None else keeping.parse(keep),
            schedule=None if schedule is None else policy.parse_schedule(schedule),
            since=None if since is None else units.from_rfc3339(since),
            recovery=policy.Recovery(element.get("snapshot")) if element.get("recovery") == "revert" else None,
        )
    except (ValueError, errors.UsageError):
        return Policy(understood=False)


def _write_policy(vm: etree._Element, facts: Policy) -> None:
    """The element of what was set; attributes that this hvmgr does not know stay in it."""
    if not facts.understood:
        return
    element = vm.find(_POLICY)
    if element is None:
        if facts == policy.DEFAULT:
            return
        element = etree.SubElement(vm, _POLICY)
    _set(element, type=None if facts.type is policy.DEFAULT.type else facts.type)
    _set(
        element,
        automatic="on" if facts.automatic else None,
        keep=None if facts.keep is None else str(facts.keep),
    )
    _set(element, schedule=None if facts.schedule is None else str(facts.schedule))
    _set(element, since=None if facts.since is None else units.to_rfc3339(facts.since))
    _set(element, recovery=None if facts.recovery is None else "revert")
    _set(element, snapshot=None if facts.recovery is None else facts.recovery.snapshot)
    if not element.attrib and len(element) == 0:
        vm.remove(element)


def _recorded_type(text: str) -> SnapshotType:
    if text == SnapshotType.PRODUCTION_ONLY:
        raise ValueError("no snapshot is that; one is asked for so")
    return SnapshotType(text)


def _write_snapshot(element: etree._Element, facts: SnapshotRecord) -> None:
    _set(element, id=facts.id, name=facts.name, created=units.to_rfc3339(facts.created), type=facts.type)
    _set(element, state=facts.state, automatic=facts.automatic or "no", parent=facts.parent)
    _set(element, damaged=" ".join(facts.damaged) or None)
    has_state = facts.state is not SavedState.NONE
    _set(element, qemu=facts.qemu if has_state else None, host=facts.host if has_state else None)
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
