"""``export.yaml``: what an export holds and where it came from, so that an import can tell whether it fits.

    format: 1
    created: 2026-11-21T13:03:05.000000Z
    vm: {id: …, name: web, home: /var/lib/hvmgr/web, state: none|running|paused, disks: [{slot: vda, image: FILE}, …]}
    source: {hvmgr: …, libvirt: …, qemu: …, uri: …, arch: x86_64, machine: pc-q35-7.2, type: kvm, cpu: …}
    options: {snapshots: all|none|kept|one, disks: true, state: true, excluded: [vdb], format: qcow2, quiesced: false}
    disks:      every disk of the VM that is in the export: slot, id, size, where its image was
    snapshots:  id, name, parent, created, state, disks: [{slot, image}]
    images:     file, format, size, bytes, parent, path, sha256
    networks:   mac, type, source, portgroup, vlan
    outside:    files that the VM uses and that are not in the export: what, path

File names are relative to the export's folder, with ``/``; one that leads out of it is refused here. Absent means unknown
or none. A ``sha256`` is that of the file in the export; where disks were left out, that of the file at the source, which
``path`` names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Any, TypeVar

from hvmgr import errors, units, yaml_text
from hvmgr.model.metadata import SavedState
from hvmgr.yaml_text import Value

FORMAT = 1
FILE = "export.yaml"
SUMS = "SHA256SUMS"

_HEAD = """\
# An export of the VM {name}, made by hvmgr. 'sha256sum -c SHA256SUMS' checks its files, 'hvmgr verify' everything.
"""
_SHA256 = re.compile(r"[0-9a-f]{64}")

_STRING = "tag:yaml.org,2002:str"

T = TypeVar("T")


class _Odd(str):
    """A text with characters that cannot be printed."""

    __slots__ = ()


class Extent(StrEnum):
    """Which snapshots of the VM an export holds."""

    ALL = "all"
    NONE = "none"  # the present alone
    KEPT = "kept"  # the ones that were named, as a pruned tree
    ONE = "one"  # one snapshot as an independent VM: the export's present


@dataclass(frozen=True, slots=True)
class Source:
    """The host that the VM was exported from; saved state is only sure to go on where these agree."""

    hvmgr: str
    libvirt: str
    qemu: str
    uri: str
    arch: str | None = None
    machine: str | None = None
    type: str | None = None  # kvm or qemu
    cpu: str | None = None


@dataclass(frozen=True, slots=True)
class Used:
    """The options that an export was made with. ``disks`` is false for a configuration alone."""

    snapshots: Extent = Extent.ALL
    disks: bool = True
    state: bool = True
    quiesced: bool = False
    excluded: tuple[str, ...] = ()
    format: str | None = None  # of images that were flattened
    snapshot: str | None = None  # the one snapshot, by its id at the source


@dataclass(frozen=True, slots=True)
class SlotImage:
    """Which image a disk stands on: ``image`` is a file name of the export."""

    slot: str
    image: str


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk of the present: its id for life, the guest's size in bytes, and where its working image was."""

    slot: str
    id: str | None
    size: int
    path: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One snapshot of the export's tree; ``state`` tells whether its saved memory is in the export."""

    id: str
    name: str
    created: datetime
    parent: str | None
    state: SavedState
    disks: tuple[SlotImage, ...]


@dataclass(frozen=True, slots=True)
class Image:
    """One image: ``size`` is what the guest sees, ``bytes`` the length of the file, ``path`` where it was."""

    file: str
    format: str
    size: int
    bytes: int
    path: str
    parent: str | None = None
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Network:
    """A network card and what it was connected to."""

    mac: str
    type: str
    source: str | None = None
    portgroup: str | None = None
    vlan: str | None = None


@dataclass(frozen=True, slots=True)
class Outside:
    """A file that the VM uses and that the export does not hold: ``what`` is a slot, kernel, initrd, loader."""

    what: str
    path: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """All of ``export.yaml``; ``home`` is where the VM had its home, ``state`` what the present goes on from."""

    vm_id: str
    name: str
    home: str
    created: datetime
    source: Source
    options: Used
    state: SavedState = SavedState.NONE
    present: tuple[SlotImage, ...] = ()
    disks: tuple[Disk, ...] = ()
    snapshots: tuple[Snapshot, ...] = ()
    images: tuple[Image, ...] = ()
    networks: tuple[Network, ...] = ()
    outside: tuple[Outside, ...] = ()

    def chain(self, file: str) -> list[Image]:
        """The image and its parents down to the base; Corrupt when one is not listed or they run in a circle."""
        known = {one.file: one for one in self.images}
        found: list[Image] = []
        step: str | None = file
        while step is not None:
            if step not in known:
                raise errors.Corrupt(f"{FILE} does not list the image {step}", file=step)
            if known[step] in found:
                raise errors.Corrupt(f"{FILE}: the chain of {file} runs in a circle at {step}", file=step)
            found.append(known[step])
            step = found[-1].parent
        return found

    def to_yaml(self) -> str:
        """The file's text; ``parse`` gives an equal manifest."""
        vm = {"id": self.vm_id, "name": self.name, "home": self.home, "state": self.state, "disks": self.present}
        document = {
            "format": FORMAT,
            "created": self.created,
            "vm": vm,
            "source": self.source,
            "options": self.options,
            "disks": self.disks,
            "snapshots": self.snapshots,
            "images": self.images,
            "networks": self.networks,
            "outside": self.outside,
        }

        text = _dumped(_plain(document))
        return _HEAD.format(name=self.name if self.name.isprintable() else self.vm_id) + text


def _dumped(document: Any) -> str:
    """As YAML. What is no plain text is quoted, so that every character is escaped that a reader would take as a blank."""
    import yaml

    fast: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # libyaml's takes a tenth of the time
    for base in (fast, yaml.SafeDumper):
        dumper: Any = type("Dumper", (base,), {})
        dumper.add_representer(_Odd, lambda one, value: one.represent_scalar(_STRING, str(value), style='"'))
        with contextlib.suppress(UnicodeEncodeError):  # a name that is no text, which libyaml cannot write
            return str(yaml.dump(document, Dumper=dumper, sort_keys=False, allow_unicode=True, width=110))
    raise AssertionError("the slow one writes everything")


def parse(text: str, *, source: str) -> Manifest:
    """The manifest in a text; ``source`` names the file in errors.

    Corrupt, with the line, for what no export says; Unsupported for the format of a newer hvmgr.
    """
    try:
        top = yaml_text.parse(text, source=source)
        _require_format(top, source)
        return _read(top)
    except errors.UsageError as error:
        hint = error.hint or "get a whole copy of the export"
        raise errors.Corrupt(error.message, hint=hint, **error.facts) from error


def require_inside(name: str) -> str:
    """The name of a file below the export's folder; ValueError for any other."""
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or str(path) != name or "\0" in name or path.parts == ():
        raise ValueError(f"'{name}' is no plain name of a file in the export")
    return name


def read_sum(line: str) -> tuple[str, str]:
    """A line of ``SHA256SUMS``: the file's name and its hash; ValueError for anything else."""
    digest, mark, name = line[:64], line[64:66], line[66:]
    if _SHA256.fullmatch(digest) is None or mark not in ("  ", " *"):
        raise ValueError("no hash and file name")
    return require_inside(name), digest


# --- reading --------------------------------------------------------------------------------------------------------


def _require_format(top: Value, source: str) -> None:
    """Before anything else: what a newer hvmgr writes may look wrong to this one."""
    import yaml

    for key, value in top.node.value if isinstance(top.node, yaml.MappingNode) else ():
        if key.value == "format" and isinstance(value, yaml.ScalarNode):
            found = str(value.value)
            if found.isdecimal() and len(found) < 10 and int(found) > FORMAT:
                raise errors.Unsupported(
                    f"{source} was written by a newer hvmgr (format {found}, this one knows {FORMAT})",
                    hint="use the newer hvmgr",
                    file=source,
                )


def _read(top: Value) -> Manifest:
    lists = ("disks", "snapshots", "images", "networks", "outside")
    found = top.fields(required=("format", "created", "vm", "source", "options"), optional=lists)
    if found["format"].integer(minimum=1) != FORMAT:
        raise found["format"].error("is not a format that this hvmgr reads")
    vm = found["vm"].fields(required=("id", "name", "home"), optional=("state", "disks"))
    state = vm.get("state")
    return Manifest(
        vm_id=vm["id"].text(),
        name=vm["name"].text(),
        home=vm["home"].text(),
        created=_moment(found["created"]),
        source=_source(found["source"]),
        options=_used(found["options"]),
        state=SavedState.NONE if state is None else state.choice(SavedState),
        present=_each(vm, "disks", _slot_image),
        disks=_each(found, "disks", _disk),
        snapshots=_each(found, "snapshots", _snapshot),
        images=_each(found, "images", _image),
        networks=_each(found, "networks", _network),
        outside=_each(found, "outside", _outside),
    )


def _each(found: Mapping[str, Value], key: str, read: Callable[[Value], T]) -> tuple[T, ...]:
    return tuple(read(one) for one in found[key].items()) if key in found else ()


def _source(value: Value) -> Source:
    required = ("hvmgr", "libvirt", "qemu", "uri")
    found = value.fields(required=required, optional=("arch", "machine", "type", "cpu"))
    return Source(**{key: one.text() for key, one in found.items()})


def _used(value: Value) -> Used:
    flags = ("disks", "state", "quiesced")
    found = value.fields(required=("snapshots",), optional=(*flags, "excluded", "format", "snapshot"))
    return Used(
        snapshots=found["snapshots"].choice(Extent),
        excluded=_each(found, "excluded", Value.text),
        format=_text(found, "format"),
        snapshot=_text(found, "snapshot"),
        **{key: found[key].boolean() for key in flags if key in found},
    )


def _slot_image(value: Value) -> SlotImage:
    found = value.fields(required=("slot", "image"))
    return SlotImage(found["slot"].text(), _file(found["image"]))


def _disk(value: Value) -> Disk:
    found = value.fields(required=("slot", "size", "path"), optional=("id",))
    return Disk(
        slot=found["slot"].text(),
        id=_text(found, "id"),
        size=found["size"].integer(minimum=0),
        path=found["path"].text(),
    )


def _snapshot(value: Value) -> Snapshot:
    found = value.fields(required=("id", "name", "created"), optional=("parent", "state", "disks"))
    state = found.get("state")
    return Snapshot(
        id=found["id"].text(),
        name=found["name"].text(),
        created=_moment(found["created"]),
        parent=_text(found, "parent"),
        state=SavedState.NONE if state is None else state.choice(SavedState),
        disks=_each(found, "disks", _slot_image),
    )


def _image(value: Value) -> Image:
    found = value.fields(required=("file", "format", "size", "bytes", "path"), optional=("parent", "sha256"))
    digest = _text(found, "sha256")
    if digest is not None and _SHA256.fullmatch(digest) is None:
        raise found["sha256"].error("is no SHA-256: 64 digits of 0-9 and a-f are")
    return Image(
        file=_file(found["file"]),
        format=found["format"].text(),
        size=found["size"].integer(minimum=0),
        bytes=found["bytes"].integer(minimum=0),
        path=found["path"].text(),
        parent=_file(found["parent"]) if "parent" in found else None,
        sha256=digest,
    )


def _network(value: Value) -> Network:
    found = value.fields(required=("mac", "type"), optional=("source", "portgroup", "vlan"))
    return Network(**{key: one.text() for key, one in found.items()})


def _outside(value: Value) -> Outside:
    found = value.fields(required=("what", "path"))
    return Outside(found["what"].text(), found["path"].text())


def _text(found: Mapping[str, Value], key: str) -> str | None:
    return found[key].text() if key in found else None


def _moment(value: Value) -> datetime:
    try:
        return units.from_rfc3339(value.text())
    except ValueError as error:
        raise value.error(f"'{value.text()}' is no time such as 2026-11-21T13:03:05.000000Z") from error


def _file(value: Value) -> str:
    try:
        return require_inside(value.text())
    except ValueError as error:
        raise value.error(str(error)) from error


# --- writing --------------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """Dictionaries, lists and scalars; what is None or an empty list is left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items() if one is not None and one != ()}
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    if isinstance(value, datetime):
        return units.to_rfc3339(value)
    if isinstance(value, str):
        return str(value) if value.isprintable() else _Odd(value)
    return value
