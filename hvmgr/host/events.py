"""What libvirt tells of its domains as it happens: starts and ends, block jobs, configurations, errors of disks.

libvirt calls us in the thread of its event loop; ``Follower`` keeps what it said until somebody takes it.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from hvmgr.host import libvirt_door

_KEEPALIVE_S, _KEEPALIVES = 5, 3  # a daemon that hangs is noticed after a quarter of a minute
_KEPT = 10_000  # events that nobody has taken yet; older ones are dropped


class Kind(StrEnum):
    """The closed set of what libvirt's events are called here."""

    DEFINED = "vm-defined"
    UNDEFINED = "vm-undefined"
    STARTED = "vm-started"
    SUSPENDED = "vm-suspended"
    RESUMED = "vm-resumed"
    STOPPED = "vm-stopped"
    SHUTDOWN = "vm-shutdown"
    SLEEPING = "vm-sleeping"
    CRASHED = "vm-crashed"
    JOB_COMPLETED = "job-completed"
    JOB_FAILED = "job-failed"
    JOB_CANCELLED = "job-cancelled"
    JOB_READY = "job-ready"
    METADATA_CHANGED = "metadata-changed"
    DISK_ERROR = "disk-error"


# libvirt's word in VIR_DOMAIN_EVENT_…; details follow as VIR_DOMAIN_EVENT_…_DETAIL
_LIFECYCLE = {
    "DEFINED": Kind.DEFINED,
    "UNDEFINED": Kind.UNDEFINED,
    "STARTED": Kind.STARTED,
    "SUSPENDED": Kind.SUSPENDED,
    "RESUMED": Kind.RESUMED,
    "STOPPED": Kind.STOPPED,
    "SHUTDOWN": Kind.SHUTDOWN,
    "PMSUSPENDED": Kind.SLEEPING,
    "CRASHED": Kind.CRASHED,
}
_JOB_ENDS = {
    "COMPLETED": Kind.JOB_COMPLETED,
    "FAILED": Kind.JOB_FAILED,
    "CANCELED": Kind.JOB_CANCELLED,
    "READY": Kind.JOB_READY,
}


@dataclass(frozen=True, slots=True)
class HostEvent:
    """One event: ``detail`` is libvirt's own word for why or what (``booted``, ``commit``), ``slot`` the disk's."""

    kind: Kind
    time: datetime
    vm_id: str
    name: str
    detail: str | None = None
    slot: str | None = None


class Follower:
    """Hears of every domain of a connection from now on, until it is closed or the connection is lost."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._heard: collections.deque[HostEvent] = collections.deque(maxlen=_KEPT)
        self._something = threading.Event()
        self._numbers: list[int] = []
        libvirt = libvirt_door.library()
        with contextlib.suppress(libvirt.libvirtError):
            handle.setKeepAlive(_KEEPALIVE_S, _KEEPALIVES)
        with libvirt_door.translated("follow libvirt's events"):
            self._register("LIFECYCLE", self._lifecycle)
            self._register("BLOCK_JOB_2", self._block_job)
            self._register("JOB_COMPLETED", self._job)
            self._register("METADATA_CHANGE", self._metadata)
            self._register("IO_ERROR_REASON", self._disk_error)

    def wait(self, timeout_s: float) -> None:
        """Returns when there is something to take, or after ``timeout_s``."""
        self._something.wait(timeout_s)

    def take(self) -> list[HostEvent]:
        """What has happened since the last call, in order."""
        self._something.clear()
        found = []
        with contextlib.suppress(IndexError):
            while True:
                found.append(self._heard.popleft())
        return found

    def close(self) -> None:
        """Nothing more is heard; fine when the connection is lost."""
        libvirt = libvirt_door.library()
        for number in self._numbers:
            with contextlib.suppress(libvirt.libvirtError):
                self._handle.domainEventDeregisterAny(number)
        self._numbers.clear()
        self._handle = None

    def _register(self, event: str, callback: Any) -> None:
        number = getattr(libvirt_door.library(), f"VIR_DOMAIN_EVENT_ID_{event}")
        self._numbers.append(self._handle.domainEventRegisterAny(None, number, callback, None))

    def _add(self, domain: Any, kind: Kind, detail: str | None, slot: str | None = None) -> None:
        self._heard.append(HostEvent(kind, datetime.now(UTC), domain.UUIDString(), domain.name(), detail, slot))
        self._something.set()

    # -- called by libvirt ---------------------------------------------------------------------------------------

    def _lifecycle(self, _connection: Any, domain: Any, event: int, detail: int, _opaque: Any) -> None:
        word = _words("VIR_DOMAIN_EVENT_", tuple(_LIFECYCLE)).get(event)
        if word is not None:
            self._add(domain, _LIFECYCLE[word], _word(f"VIR_DOMAIN_EVENT_{word}_", detail))

    def _block_job(self, _connection: Any, domain: Any, slot: str, job: int, status: int, _opaque: Any) -> None:
        word = _words("VIR_DOMAIN_BLOCK_JOB_", tuple(_JOB_ENDS)).get(status)
        if word is not None:
            self._add(domain, _JOB_ENDS[word], _word("VIR_DOMAIN_BLOCK_JOB_TYPE_", job), slot)

    def _job(self, _connection: Any, domain: Any, facts: dict[str, Any], _opaque: Any) -> None:
        has_worked = facts.get("success", True)
        operation = facts.get("operation")
        detail = None if operation is None else _word("VIR_DOMAIN_JOB_OPERATION_", int(operation))
        self._add(domain, Kind.JOB_COMPLETED if has_worked else Kind.JOB_FAILED, detail)

    def _metadata(self, _connection: Any, domain: Any, kind: int, namespace: str | None, _opaque: Any) -> None:
        self._add(domain, Kind.METADATA_CHANGED, namespace or _word("VIR_DOMAIN_METADATA_", kind))

    def _disk_error(
        self, _connection: Any, domain: Any, path: str, alias: str, _action: int, reason: str, _opaque: Any
    ) -> None:
        slot = alias.partition("-disk")[2] or alias
        self._add(domain, Kind.DISK_ERROR, f"{reason or 'error'}: {path}", slot or None)


@functools.cache
def _words(prefix: str, known: tuple[str, ...]) -> dict[int, str]:
    """Which of these words of libvirt's has which number; an older library does not know all of them."""
    libvirt = libvirt_door.library()
    return {getattr(libvirt, prefix + one): one for one in known if hasattr(libvirt, prefix + one)}


@functools.cache
def _word(prefix: str, number: int) -> str | None:
    """libvirt's own word for a number, as ``active-commit``."""
    for name, value in vars(libvirt_door.library()).items():
        if name.startswith(prefix) and value == number and not name.endswith("_LAST"):
            return str(name).removeprefix(prefix).lower().replace("_", "-")
    return None
