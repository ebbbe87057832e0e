"""Calls about tasks, and waiting for what changes."""

from __future__ import annotations

import math
from typing import Any

from hvmgr.faces.http import calls_host, calls_vdi
from hvmgr.faces.http.api import Asked, call, number, shown, text
from hvmgr.faces.http.events import Event
from hvmgr.faces.http.failure import XenFailure

_LONGEST_S = 120.0
_LOOK_S = 10.0  # how often disks are looked at while somebody waits: other commands change them too


@call("task.create", least=1, most=2)
def create(asked: Asked, label: str, description: str = "") -> str:
    """A new pending task, for a transfer or for work of the client's own."""
    return asked.service.tasks.create(asked.known.name, text("label", label), text("description", description))


@call("task.destroy", least=1)
def destroy(asked: Asked, ref: str) -> str:
    """The task is gone; a transfer for it stops."""
    asked.service.tasks.destroy(text("task", ref), asked.known.name)
    return ""


@call("task.cancel", least=1)
def cancel(asked: Asked, ref: str) -> str:
    """The task is cancelled; a transfer for it stops. An administrator may do that to anybody's."""
    asked.service.tasks.cancel(text("task", ref), None if asked.known.is_admin else asked.known.name)
    return ""


@call("task.set_status", least=2)
def set_status(asked: Asked, ref: str, status: str) -> str:
    """How the client's own work went."""
    asked.service.tasks.set_status(text("task", ref), asked.known.name, text("status", status))
    return ""


@call("task.set_progress", least=2)
def set_progress(asked: Asked, ref: str, value: Any) -> str:
    """How far the client is."""
    asked.service.tasks.set_progress(text("task", ref), asked.known.name, number("progress", value))
    return ""


@call("task.add_to_other_config", least=3)
def add_to_other_config(asked: Asked, ref: str, key: str, value: str) -> str:
    """A note on the task."""
    asked.service.tasks.set_other_config(text("task", ref), asked.known.name, text("key", key), text("value", value))
    return ""


@call("task.remove_from_other_config", least=2)
def remove_from_other_config(asked: Asked, ref: str, key: str) -> str:
    """The note is gone."""
    asked.service.tasks.set_other_config(text("task", ref), asked.known.name, text("key", key), None)
    return ""


@call("task.get_all")
def get_all(asked: Asked) -> list[str]:
    """All tasks."""
    return list(asked.service.tasks.records())


@call("task.get_all_records")
def get_all_records(asked: Asked) -> dict[str, Any]:
    """All tasks with their records."""
    return asked.service.tasks.records()


@call("task.get_record", least=1)
def get_record(asked: Asked, ref: str) -> dict[str, Any]:
    """One task."""
    return asked.service.tasks.record(text("task", ref))


@call("task.get_by_uuid", least=1)
def get_by_uuid(asked: Asked, uuid: str) -> str:
    """The reference of a task."""
    return asked.service.tasks.find_by_uuid(text("uuid", uuid))


def _field(name: str) -> None:
    @call(f"task.get_{name}", least=1)
    def get(asked: Asked, ref: str) -> Any:
        return asked.service.tasks.record(text("task", ref))[name]


for _name in (
    "uuid", "name_label", "name_description", "status", "progress", "error_info", "result", "other_config", "created",
    "finished",
):  # fmt: skip
    _field(_name)


# -- events ------------------------------------------------------------------------------------------------------------


@call("event.inject", least=2)
def inject(asked: Asked, kind: str, ref: str) -> str:
    """A change of an object that has not changed: whoever waits for it is woken. The token of that change."""
    records = _records(asked, text("class", kind).lower())
    if text("ref", ref) not in records:
        raise XenFailure("HANDLE_INVALID", kind, ref[:64])
    events = asked.service.events
    events.note(kind.lower(), "mod", ref, records[ref])
    return _token(asked, events.number)


@call("event.from", least=3)
def wait(asked: Asked, classes: Any, token: str, timeout: Any) -> dict[str, Any]:
    """What has changed since the token, as soon as anything has; an empty token is the beginning of time."""
    if not isinstance(classes, list) or not all(isinstance(one, str) for one in classes):
        raise XenFailure("INVALID_VALUE", "classes", shown(classes))
    wanted = {
        one.lower() if "/" not in one else one.partition("/")[0].lower() + "/" + one.partition("/")[2]
        for one in classes
    }
    left = min(max(number("timeout", timeout), 0.0), _LONGEST_S)
    events, service = asked.service.events, asked.service

    def wants(event: Event) -> bool:
        return bool({"*", event.kind, f"{event.kind}/{event.ref}"} & wanted)

    start = service.parse_token(text("token", token))
    if start is None or not events.has_all_since(start):
        service.look_at_disks(older_than_s=math.inf)  # what differs from the first look is told behind this number
        number_now = events.number
        everything = [
            Event(number_now, kind, "add", ref, record)
            for kind in _CLASSES
            for ref, record in _records(asked, kind).items()
        ]
        found = [one for one in everything if wants(one)]
        return _batch(asked, found, number_now)
    while True:
        service.look_at_disks(older_than_s=_LOOK_S)
        slice_s = min(left, _LOOK_S)
        found, start = events.since(start, wants, slice_s)
        left -= slice_s
        if found or left <= 0 or service.is_stopping:
            return _batch(asked, found, start)


def _batch(asked: Asked, found: list[Event], number_now: int) -> dict[str, Any]:
    return {
        "events": [_event(one) for one in found],
        "token": _token(asked, number_now),
        "valid_ref_counts": {kind: len(_records(asked, kind)) for kind in _CLASSES},
    }


def _event(one: Event) -> dict[str, Any]:
    told = {
        "id": str(one.id),
        "timestamp": f"{one.time:.6f}",
        "class": one.kind,
        "operation": one.operation,
        "ref": one.ref,
    }
    return told if one.record is None else {**told, "snapshot": dict(one.record)}


def _token(asked: Asked, number_now: int) -> str:
    return f"{asked.service.life},{number_now}"


_CLASSES = ("pool", "host", "sr", "vdi", "vm", "vbd", "task")


def _records(asked: Asked, kind: str) -> dict[str, Any]:
    if kind == "pool":
        return calls_host.pool_records(asked)
    if kind == "host":
        return calls_host.host_records(asked)
    if kind == "sr":
        return calls_host.sr_records(asked)
    if kind == "vdi":
        return calls_vdi.get_all_records(asked)
    if kind == "task":
        return asked.service.tasks.records()
    if kind in _CLASSES:
        return {}
    raise XenFailure("EVENT_SUBSCRIPTION_PARSE_FAILURE", kind[:64])
