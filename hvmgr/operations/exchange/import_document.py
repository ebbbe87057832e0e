"""An import plan as a YAML file that people edit: what was found stands in it as comments.

Read back, every value is checked where it stands, so that a typing error names its line. What only informs (``recorded``,
``plugged``, sizes, names of snapshots) may not be changed in the hope that something follows from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hvmgr import errors
from hvmgr.model import yaml_text
from hvmgr.model.finding import Finding
from hvmgr.model.import_options import ImportOptions, Mode
from hvmgr.model.yaml_text import Value
from hvmgr.operations.exchange import import_plan
from hvmgr.operations.exchange.import_plan import ImportPlan

if TYPE_CHECKING:
    from hvmgr.operations.host import Host

FORMAT = 1

_FLAGS = ("replace", "keep-mac", "without-state")
_PATHS = ("vm-path", "snapshot-path", "disk-path", "snapshot-source")
_LISTS = ("paths", "networks", "disks", "nics", "snapshots", "tags")
_IDENTITIES = {"new": True, "keep": False}

T = TypeVar("T")


def to_yaml(plan: ImportPlan, findings: Sequence[Finding]) -> str:
    """The file's text."""
    return "\n".join(_lines(plan, findings)) + "\n"


def from_yaml(host: Host, text: str, *, source: str) -> ImportPlan:
    """The plan in a text; ``source`` names the file in errors. UsageError with the line for what is not understood."""
    top = yaml_text.parse(text, source=source)
    required = ("format", "source", "mode", "identity")
    found = top.fields(required=required, optional=("vm", "name", "owner", *_FLAGS, *_PATHS, *_LISTS))
    if found["format"].integer(minimum=1) != FORMAT:
        raise found["format"].error(f"this hvmgr reads plans of format {FORMAT}")
    identity = found["identity"].text()
    if identity not in _IDENTITIES:
        raise found["identity"].error(f"'{identity}' is neither new nor keep")
    where = _path(found["source"])
    plan = import_plan.prepare(host, where, _options(found, new_id=_IDENTITIES[identity]))
    _read_disks(found, plan)
    _read_nics(found, plan)
    _read_snapshots(found, plan)
    return plan


# --- writing --------------------------------------------------------------------------------------------------------


def _lines(plan: ImportPlan, findings: Sequence[Finding]) -> Iterator[str]:
    yield f"# An import of {_comment(plan.original_name)}. Change what has to be changed, then run:"
    yield "#   hvmgr import --plan FILE"
    yield f"# {len(findings)} findings when it was written:" if findings else "# Nothing was in the way."
    yield from _comments(findings, "")
    yield f"format: {FORMAT}"
    yield f"source: {_text(str(plan.source))}"
    if plan.vm is not None:
        yield f"vm: {_text(plan.vm)}  # which one of the archive's"
    yield f"name: {_text(plan.name)}"
    yield f"mode: {plan.mode.value}  # copy, register or link"
    yield f"identity: {'new' if plan.new_id else 'keep'}  # new or keep"
    for name, flag in zip(_FLAGS, (plan.replace, plan.keep_macs, plan.without_state), strict=True):
        yield f"{name}: {'yes' if flag else 'no'}"
    places = (plan.vm_path, plan.snapshot_path, plan.disk_path, plan.snapshot_source)
    for name, place in zip(_PATHS, places, strict=True):
        yield f"{name}: {_text(None if place is None else str(place))}"
    yield f"owner: {_text(plan.owner)}"
    yield from _items("tags", [[("", _text(one))] for one in plan.tags])
    yield from _items("paths", [[("old", _text(old)), ("new", _text(new))] for old, new in plan.paths.items()])
    yield from _items("networks", [[("old", _text(old)), ("new", _text(new))] for old, new in plan.networks.items()])
    yield from _things("disks", [(_disk(one), ()) for one in plan.disks])
    yield from _things("nics", [(_nic(one), _about(one, findings)) for one in plan.nics])
    yield from _things("snapshots", [(_snapshot(one), ()) for one in plan.snapshots])


def _disk(one: import_plan.PlannedDisk) -> list[tuple[str, str]]:
    size = "~" if one.size is None else str(one.size)
    return [
        ("slot", _text(one.slot)),
        ("recorded", _text(one.recorded)),
        ("size", size),
        ("source", _text(one.source)),
        ("target", _text(one.target)),
    ]


def _nic(one: import_plan.PlannedNic) -> list[tuple[str, str]]:
    return [
        ("mac", _text(one.mac)),
        ("plugged", _text(one.plugged)),
        ("network", _text(one.network)),
        ("vlan", _text(one.vlan)),
        ("portgroup", _text(one.portgroup)),
    ]


def _snapshot(one: import_plan.PlannedSnapshot) -> list[tuple[str, str]]:
    return [("id", _text(one.id)), ("name", _text(one.name)), ("keep", "yes" if one.keep else "no")]


def _about(one: import_plan.PlannedNic, findings: Sequence[Finding]) -> list[Finding]:
    name = one.plugged.partition("=")[2]
    return [each for each in findings if each.where == one.mac or (name and each.where == name)]


def _things(key: str, things: Sequence[tuple[list[tuple[str, str]], Sequence[Finding]]]) -> Iterator[str]:
    yield f"{key}:" if things else f"{key}: []"
    for fields, findings in things:
        yield from _comments(findings, "  ")
        for number, (name, value) in enumerate(fields):
            yield f"  {'- ' if number == 0 else '  '}{name}: {value}"


def _items(key: str, items: Sequence[list[tuple[str, str]]]) -> Iterator[str]:
    yield f"{key}:" if items else f"{key}: []"
    for fields in items:
        inner = ", ".join(f"{name}: {value}" if name else value for name, value in fields)
        yield f"  - {inner}" if not fields[0][0] else f"  - {{{inner}}}"


def _comments(findings: Sequence[Finding], indent: str) -> Iterator[str]:
    for one in findings:
        yield f"{indent}# {one.severity} {one.code}: {_comment(one.sentence)}"
        if one.repair:
            yield f"{indent}#   {_comment(one.repair)}"


def _comment(text: str) -> str:
    """One line, whatever the source's names hold."""
    return json.dumps(text, ensure_ascii=not text.isprintable())[1:-1].replace('\\"', '"')


def _text(value: str | None) -> str:
    return "~" if value is None else json.dumps(value, ensure_ascii=not value.isprintable())


# --- reading --------------------------------------------------------------------------------------------------------


def _options(found: Mapping[str, Value], *, new_id: bool) -> ImportOptions:
    flags = {key: found[key].boolean() for key in _FLAGS if key in found}
    places = {key: _path(found[key]) for key in _PATHS if key in found}
    return ImportOptions(
        vm=found["vm"].text() if "vm" in found else None,
        name=found["name"].text() if "name" in found else None,
        mode=found["mode"].choice(Mode),
        new_id=new_id,
        replace=flags.get("replace", False),
        keep_macs=flags.get("keep-mac", False),
        without_state=flags.get("without-state", False),
        vm_path=places.get("vm-path"),
        snapshot_path=places.get("snapshot-path"),
        disk_path=places.get("disk-path"),
        snapshot_source=places.get("snapshot-source"),
        paths=_pairs(found, "paths"),
        networks=_pairs(found, "networks"),
        owner=found["owner"].text() if "owner" in found else None,
        tags=tuple(one.text() for one in found["tags"].items()) if "tags" in found else (),
    )


def _path(value: Value) -> Path:
    path = Path(value.text())
    if not path.is_absolute():
        raise value.error(f"'{path}' is not an absolute path")
    return path


def _pairs(found: Mapping[str, Value], key: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for item in found[key].items() if key in found else ():
        fields = item.fields(required=("old", "new"))
        old = fields["old"].text()
        if key == "paths":
            _path(fields["old"])
            _path(fields["new"])
        if old in pairs:
            raise item.error(f"'{old}' is there twice")
        pairs[old] = fields["new"].text()
    return pairs


def _read_disks(found: Mapping[str, Value], plan: ImportPlan) -> None:
    known = {one.slot: one for one in plan.disks}
    for item in found["disks"].items() if "disks" in found else ():
        fields = item.fields(required=("slot",), optional=("recorded", "size", "source", "target"))
        one = _known(fields["slot"], known, "disk")
        _same(fields, "recorded", one.recorded, "write the new place to 'source'")
        one.source = str(_path(fields["source"])) if "source" in fields else None
        one.target = str(_path(fields["target"])) if "target" in fields else None


def _read_nics(found: Mapping[str, Value], plan: ImportPlan) -> None:
    known = {one.mac: one for one in plan.nics}
    for item in found["nics"].items() if "nics" in found else ():
        fields = item.fields(required=("mac",), optional=("plugged", "network", "vlan", "portgroup"))
        one = _known(fields["mac"], known, "card")
        _same(fields, "plugged", one.plugged, "write the new one to 'network'")
        one.network = fields["network"].text() if "network" in fields else None
        one.vlan = fields["vlan"].text() if "vlan" in fields else None
        one.portgroup = fields["portgroup"].text() if "portgroup" in fields else None


def _read_snapshots(found: Mapping[str, Value], plan: ImportPlan) -> None:
    known = {one.id: one for one in plan.snapshots}
    for item in found["snapshots"].items() if "snapshots" in found else ():
        fields = item.fields(required=("id",), optional=("name", "keep"))
        keep = fields["keep"].boolean() if "keep" in fields else True
        snapshot_id = fields["id"].text()
        if snapshot_id not in known and not keep:  # one that is missing, and that the user drops
            plan.snapshots.append(import_plan.PlannedSnapshot(snapshot_id, "(missing)", keep=False))
            continue
        one = _known(fields["id"], known, "snapshot")
        _same(fields, "name", one.name, "rename it after the import")
        one.keep = keep


def _known(value: Value, known: Mapping[str, T], what: str) -> T:
    if value.text() not in known:
        raise value.error(f"the source has no {what} '{value.text()}'", f"it has {', '.join(known) or 'none'}")
    return known[value.text()]


def _same(fields: Mapping[str, Value], key: str, expected: str, hint: str) -> None:
    if key in fields and fields[key].text() != expected:
        raise fields[key].error(f"'{key}' only says what the source holds ('{expected}')", hint)


def read_file(host: Host, file: Path) -> ImportPlan:
    """The plan in a file."""
    try:
        text = file.read_text("utf-8")
    except FileNotFoundError as error:
        raise errors.NotFound(f"there is no file {file}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise errors.UsageError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return from_yaml(host, text, source=str(file))
