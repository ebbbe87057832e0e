"""The JSON documents of the command line (docs/commands.md): one per command, on stdout, with ``"schema": 1``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hvmgr import units
from hvmgr.faces.cli import render

if TYPE_CHECKING:
    from hvmgr.errors import HvmgrError
    from hvmgr.model.finding import Finding
    from hvmgr.model.policy import Policy
    from hvmgr.model.tree import Image, Tree
    from hvmgr.operations.doctor.repair import Repaired
    from hvmgr.operations.snapshot import Snapshot
    from hvmgr.operations.transfer.outgoing import Outgoing
    from hvmgr.operations.transfer.recurrence import FoundDisk
    from hvmgr.operations.transfer.vdis import Vdi
    from hvmgr.operations.usage import Usage
    from hvmgr.operations.vm import VM

SCHEMA = 1

Document = dict[str, Any]


def show(document: Mapping[str, Any]) -> None:
    """The one document of this command."""
    render.put(_text(document))


def failure(error: HvmgrError) -> Document:
    """A failure inside a document about several things."""
    return {"code": error.code, "message": error.message, "hint": error.hint, "facts": dict(error.facts)}


def show_error(code: str, message: str, hint: str | None, facts: Mapping[str, object]) -> None:
    """The document of a failure."""
    sys.stdout.write(_text({"error": {"code": code, "message": message, "hint": hint, "facts": dict(facts)}}))


def _text(document: Mapping[str, Any]) -> str:
    """ASCII only, so that no locale stands in its way."""
    import json

    return json.dumps({"schema": SCHEMA, **document}, indent=2, default=str) + "\n"


def vm(one: VM, state: str | None) -> Document:
    """A VM; ``state`` is null when libvirt cannot be asked."""
    return {"id": one.id, "name": one.name, "state": state, "home": str(one.path)}


def snapshot(one: Snapshot) -> Document:
    """A snapshot."""
    return {
        "id": one.id,
        "name": one.name,
        "notes": one.notes,
        "created": units.to_rfc3339(one.created),
        "parent": one.parent,
        "type": one.type.value,
        "has_state": one.has_state,
        "automatic": None if one.automatic is None else one.automatic.value,
        "damaged": list(one.damaged),
        "disks": dict(one.disks),
    }


def snapshots(of: VM, state: str | None, shown: list[Snapshot]) -> Document:
    """What ``snapshot list``, ``tree`` and ``show`` say."""
    now = of.now()
    return {
        "vm": vm(of, state),
        "now": {"parent": now.parent, "disks": dict(now.disks)},
        "snapshots": [snapshot(one) for one in shown],
    }


def policy(one: Policy) -> Document | None:
    """What a VM's owner wants of its snapshots, and of the VM after a crash; null when that is not understood."""
    from hvmgr.operations import policies

    if not one.understood:
        return None
    keep, source = policies.kept(one)
    return {
        "snapshot_type": one.type.value,
        "automatic_snapshots": one.automatic,
        "keep": {"last": keep.last, "hourly": keep.hourly, "daily": keep.daily, "weekly": keep.weekly},
        "keep_source": source,
        "schedule": None if one.schedule is None else str(one.schedule),
        "recovery": "none" if one.recovery is None else "revert",
        "recovery_snapshot": None if one.recovery is None else one.recovery.snapshot,
    }


def stream(one: Outgoing | FoundDisk, file: str) -> Document:
    """A disk that was written into a file; ``base`` is the uuid that a delta starts from, null for a whole disk."""
    return {
        "file": file,
        "format": one.format.value,
        "uuid": one.uuid,
        "base": one.base,
        "size": one.size,
        "length": one.length,
    }


def vdi(one: Vdi) -> Document:
    """A disk by its uuid; ``size`` is what a guest sees, ``used`` what its top image takes, both in bytes."""
    return {
        "uuid": one.uuid,
        "kind": one.kind.value,
        "name": one.name,
        "size": one.size,
        "used": one.used,
        "vm": one.vm,
        "vm_id": one.vm_id,
        "slot": one.slot,
        "snapshot": one.snapshot,
        "snapshot_of": one.snapshot_of,
        "created": one.created,
    }


def image(one: Image) -> Document:
    """An image: ``size`` is what the guest sees, ``data`` what the file takes; both in bytes."""
    return {
        "path": one.path,
        "parent": one.parent,
        "format": one.format,
        "size": one.size,
        "data": one.data,
        "keeper": one.keeper.value,
    }


def space(of: VM, usage: Usage, tree: Tree) -> Document:
    """What one VM takes; bytes on disk."""
    return {
        "id": of.id,
        "name": of.name,
        "home": str(of.path),
        "total": usage.total,
        "reclaimable": usage.reclaimable,
        "now": usage.now,
        "undo": usage.undo,
        "unnamed": usage.unnamed,
        "pending": usage.pending,
        "outside": usage.outside,
        "orphans": [{"path": path, "size": size} for path, size in usage.orphans],
        "by_name": [{"path": path, "size": size} for path, size in usage.by_name],
        "snapshots": [
            {"id": one.snapshot_id, "name": one.name, "images": one.images, "memory": one.memory}
            for one in usage.snapshots
        ],
        "images": [image(one) for one in tree.images.values()],
    }


def finding(one: Finding) -> Document:
    """What doctor found."""
    return {
        "code": str(one.code),
        "severity": one.severity.value,
        "sentence": one.sentence,
        "where": one.where,
        "repair": one.repair,
        "vm": one.vm,
    }


def repaired(one: Repaired) -> Document:
    """What doctor put right, or tried to; ``failure`` is null when it came through."""
    about = one.finding
    return {
        "code": str(about.code),
        "where": about.where,
        "vm": about.vm,
        "done": one.done,
        "failure": one.failure,
        "hint": one.hint,
    }
