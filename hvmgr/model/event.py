"""What happens to VMs, as programs are told it: by ``hvmgr watch`` and on the stdin of the administrator's hooks.

``Occurrence.to_json`` is a contract (docs/hooks.md): keys may be added within a version, never taken away.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from hvmgr import units

VERSION = 1


class Event(StrEnum):
    """The closed set of what hooks are run for; those called ``before-…`` may refuse the operation."""

    BEFORE_SNAPSHOT = "before-snapshot"
    BEFORE_APPLY = "before-apply"
    BEFORE_DELETE = "before-delete"
    BEFORE_EXPORT = "before-export"
    BEFORE_IMPORT = "before-import"
    BEFORE_OPERATION = "before-operation"
    SNAPSHOT_CREATED = "snapshot-created"
    AFTER_APPLY = "after-apply"
    SNAPSHOT_DELETED = "snapshot-deleted"
    AFTER_EXPORT = "after-export"
    AFTER_IMPORT = "after-import"
    AFTER_OPERATION = "after-operation"
    OPERATION_FAILED = "operation-failed"
    MERGE_PENDING = "merge-pending"
    SPACE_LOW = "space-low"

    @property
    def may_refuse(self) -> bool:
        """Whether it comes before the operation, which a hook may refuse then."""
        return self.value.startswith("before-")


_OWN_EVENTS: Mapping[str, tuple[Event, Event]] = {
    "snapshot create": (Event.BEFORE_SNAPSHOT, Event.SNAPSHOT_CREATED),
    "snapshot apply": (Event.BEFORE_APPLY, Event.AFTER_APPLY),
    "snapshot undo": (Event.BEFORE_APPLY, Event.AFTER_APPLY),
    "snapshot delete": (Event.BEFORE_DELETE, Event.SNAPSHOT_DELETED),
    "export": (Event.BEFORE_EXPORT, Event.AFTER_EXPORT),
    "disk export": (Event.BEFORE_EXPORT, Event.AFTER_EXPORT),
    "import": (Event.BEFORE_IMPORT, Event.AFTER_IMPORT),
}

# Plans that are part of something: freezing a VM for its export, taking over what others did, a cure of doctor's.
PARTS = frozenset({"export", "take over", "doctor"})

# What leaves images that wait, when somebody has them open.
MERGING = frozenset({"snapshot delete", "snapshot merge", "vdi-destroy"})


def events_of(operation: str) -> tuple[Event, Event]:
    """What comes before an operation (by the word in its plan), and what after it; each operation has one of both."""
    return _OWN_EVENTS.get(operation, (Event.BEFORE_OPERATION, Event.AFTER_OPERATION))


@dataclass(frozen=True, slots=True)
class VmFacts:
    """The VM that it is about."""

    id: str
    name: str
    home: str
    connection: str

    def to_json(self) -> dict[str, str]:
        """The VM's part of the document."""
        return {"id": self.id, "name": self.name, "home": self.home, "connection": self.connection}


@dataclass(frozen=True, slots=True)
class ErrorFacts:
    """Why an operation failed, as the JSON of a failed command says it."""

    code: str
    message: str
    hint: str | None


@dataclass(frozen=True, slots=True)
class Occurrence:
    """One thing that is about to happen or has happened.

    ``snapshots`` are (id, name; None when nobody knows it any more), ``path`` is an export's place or an import's source,
    ``images`` are those that wait to be merged, ``free`` are the bytes left where the home lies.
    """

    event: Event
    time: datetime
    operation: str
    id: str
    subject: str
    vm: VmFacts
    snapshots: tuple[tuple[str, str | None], ...] = ()
    path: str | None = None
    images: tuple[str, ...] = ()
    free: int | None = None
    error: ErrorFacts | None = None
    recovered: bool = False  # a command that died had begun it, another one has completed or undone it

    def to_json(self) -> dict[str, Any]:
        """The document; every key is always there."""
        error = self.error
        return {
            "version": VERSION,
            "event": self.event.value,
            "time": units.to_rfc3339(self.time),
            "operation": self.operation,
            "id": self.id,
            "subject": self.subject,
            "vm": self.vm.to_json(),
            "snapshots": [{"id": one, "name": name} for one, name in self.snapshots],
            "path": self.path,
            "images": list(self.images),
            "free": self.free,
            "error": None if error is None else {"code": error.code, "message": error.message, "hint": error.hint},
            "recovered": self.recovered,
        }
