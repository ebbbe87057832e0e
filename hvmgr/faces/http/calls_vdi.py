"""Calls about disks, which are Xen's VDIs: slots of VMs, of snapshots, and free disks."""

from __future__ import annotations

from typing import Any

from hvmgr.faces.http.api import Asked, call, mapping, shown, size, text
from hvmgr.faces.http.failure import XenFailure
from hvmgr.faces.http.sessions import NULL, REF
from hvmgr.model.user import Role


@call("VDI.get_all")
def get_all(asked: Asked) -> list[str]:
    """All disks."""
    return [REF + one for one in asked.service.disks.uuids()]


@call("VDI.get_all_records")
def get_all_records(asked: Asked) -> dict[str, Any]:
    """All disks with their records."""
    return asked.service.disks.records()


@call("VDI.get_record", least=1)
def get_record(asked: Asked, ref: str) -> dict[str, Any]:
    """One disk."""
    return asked.service.disks.record(text("VDI", ref))


@call("VDI.get_by_uuid", least=1)
def get_by_uuid(asked: Asked, uuid: str) -> str:
    """The reference of a disk."""
    if text("uuid", uuid).startswith(REF):
        raise XenFailure("UUID_INVALID", "VDI", uuid[:64])
    return REF + asked.service.disks.get(uuid).uuid


@call("VDI.get_by_name_label", least=1)
def get_by_name_label(asked: Asked, label: str) -> list[str]:
    """The references of the disks with this name."""
    return [ref for ref, one in asked.service.disks.records().items() if one["name_label"] == label]


@call("VDI.create", role=Role.ADMIN, least=1, is_async=True)
def create(asked: Asked, record: Any) -> str:
    """A new free disk that reads as zeros; its reference."""
    wish = mapping("record", record)
    where = wish.get("SR", NULL)
    if where not in ("", NULL, asked.service.place.sr):
        raise XenFailure("HANDLE_INVALID", "SR", shown(where))
    label = text("name_label", wish.get("name_label", ""))
    made = asked.service.disks.create(label, size("virtual_size", wish.get("virtual_size", "")))
    asked.service.look_at_disks()
    return REF + made


@call("VDI.snapshot", role=Role.ADMIN, least=1, most=2, is_async=True)
def snapshot(asked: Asked, ref: str, driver_params: Any = None) -> str:
    """The disk as it is now, for good; its reference."""
    del driver_params
    made = asked.service.disks.snapshot(text("VDI", ref))
    asked.service.look_at_disks()
    return REF + made


@call("VDI.destroy", role=Role.ADMIN, least=1, is_async=True)
def destroy(asked: Asked, ref: str) -> str:
    """A free disk, or a snapshot of one disk, is gone."""
    asked.service.disks.destroy(text("VDI", ref))
    asked.service.look_at_disks()
    return ""


@call("VDI.add_to_other_config", role=Role.ADMIN, least=3)
def add_to_other_config(asked: Asked, ref: str, key: str, value: str) -> str:
    """A note on a disk, as long as the server runs."""
    disks = asked.service.disks
    disks.notes.add(REF + disks.get(text("VDI", ref)).uuid, text("key", key), text("value", value))
    return ""


@call("VDI.remove_from_other_config", role=Role.ADMIN, least=2)
def remove_from_other_config(asked: Asked, ref: str, key: str) -> str:
    """The note is gone."""
    disks = asked.service.disks
    disks.notes.remove(REF + disks.get(text("VDI", ref)).uuid, text("key", key))
    return ""


@call("VDI.get_nbd_info", least=1)
def get_nbd_info(asked: Asked, ref: str) -> list[Any]:
    """Where the disk is served by NBD: nowhere. Xen Orchestra asks, and then takes it by HTTP."""
    asked.service.disks.get(text("VDI", ref))
    return []


def _field(name: str) -> None:
    @call(f"VDI.get_{name}", least=1)
    def get(asked: Asked, ref: str) -> Any:
        return asked.service.disks.record(text("VDI", ref))[name]


for _name in (
    "uuid", "name_label", "name_description", "virtual_size", "physical_utilisation", "SR", "type", "VBDs", "snapshots",
    "snapshot_of", "is_a_snapshot", "snapshot_time", "sm_config", "other_config", "read_only", "sharable", "managed",
    "missing", "location", "parent", "xenstore_data", "tags", "cbt_enabled", "allowed_operations", "current_operations",
):  # fmt: skip
    _field(_name)
