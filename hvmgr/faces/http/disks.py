"""The disks as the Xen API shows them, found by reference or uuid. Each call opens a host of its own, in its own thread."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvmgr import errors, units
from hvmgr.faces.http import failure
from hvmgr.faces.http.failure import XenFailure
from hvmgr.faces.http.notes import Notes
from hvmgr.faces.http.sessions import NULL, REF
from hvmgr.operations.host import Host
from hvmgr.operations.reporter import Reporter
from hvmgr.operations.transfer.vdis import Kind, Vdi

if TYPE_CHECKING:
    from hvmgr.model.image_format import ImageFormat
    from hvmgr.operations.transfer.outgoing import Outgoing
    from hvmgr.vhd.inlet import Readable

_NEVER = datetime(1970, 1, 1, tzinfo=UTC)
_MOMENT_S = 5.0
_OPERATIONS = {
    Kind.SLOT: ("snapshot", "import", "export"),
    Kind.SNAPSHOT: ("export",),
    Kind.DISK_SNAPSHOT: ("export", "destroy"),
    Kind.FREE: ("snapshot", "import", "export", "destroy"),
}


class Disks:
    """The disks below one root."""

    def __init__(self, uri: str, root: Path, *, wait_s: float, sr: str, report: Callable[[str], None]) -> None:
        self._uri, self._root, self._wait_s, self._sr, self._report = uri, root, wait_s, sr, report
        self.notes = Notes("VDI")
        self._let_go = threading.Condition()
        self._sending: Counter[str] = Counter()

    # -- looking -------------------------------------------------------------------------------------------------

    def uuids(self) -> list[str]:
        """All disks."""
        return [one.uuid for one in self._list()]

    def records(self) -> dict[str, dict[str, Any]]:
        """All disks with their records, by reference."""
        found = self._list()
        return {REF + one.uuid: self._record(one, found) for one in found}

    def record(self, ref: str) -> dict[str, Any]:
        """The record of one."""
        found = self._list()
        return self._record(_pick(ref, found), found)

    def get(self, ref: str) -> Vdi:
        """One disk, by reference or uuid; XenFailure for none."""
        return _pick(ref, self._list())

    # -- changing ------------------------------------------------------------------------------------------------

    def create(self, label: str, size: int) -> str:
        """The uuid of a new free disk."""
        with self._host() as host:
            return host.disks.create(size, name=label)

    def snapshot(self, ref: str) -> str:
        """The uuid of a snapshot of this disk alone."""
        one = self.get(ref)
        with self._host() as host:
            return host.disks.snapshot(one.uuid, name=one.name)

    def destroy(self, ref: str) -> None:
        """A free disk or a snapshot of one disk is gone. What this server still sends of it is waited for."""
        uuid = self.get(ref).uuid
        if not self._is_let_go(uuid, self._wait_s):
            raise XenFailure("VDI_IN_USE", REF + uuid, "a transfer still sends it", status=HTTPStatus.CONFLICT)
        with self._host() as host, self._done():
            host.disks.destroy(uuid)
        self.notes.forget(REF + uuid)

    # -- sending and receiving -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def exported(self, vdi: str, base: str | None, fmt: ImageFormat, reporter: Reporter) -> Iterator[Outgoing]:
        """The disk, or what differs from the base, as a stream that is ready to be sent."""
        found = self._list()
        uuid = _pick(vdi, found).uuid
        older = None if base is None else _pick(base, found).uuid
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._noted([uuid] if older is None else [uuid, older]))
            host = stack.enter_context(self._host(reporter))
            yield stack.enter_context(host.disks.export(uuid, base=older, format=fmt))

    def writable(self, vdi: str, reporter: Reporter) -> Vdi:
        """The disk, which can take something in now; raises what speaks against that."""
        one = self.get(vdi)
        self._is_let_go(one.uuid, min(self._wait_s, _MOMENT_S))  # an export that goes on is refused by the disk itself
        with self._host(reporter) as host:
            host.disks.require_importable(one.uuid)
        return one

    def take_in(
        self,
        vdi: Vdi,
        source: Readable,
        fmt: ImageFormat,
        *,
        length: int | None,
        to_end: bool,
        reporter: Reporter,
    ) -> None:
        """The disk holds what arrives, or what it held."""
        with self._host(reporter) as host, self._done():
            host.disks.receive(vdi.uuid, source, format=fmt, length=length, to_end=to_end, name="the upload")

    # -- within --------------------------------------------------------------------------------------------------

    def _host(self, reporter: Reporter | None = None) -> Host:
        return Host.open(self._uri, root=self._root, wait_s=self._wait_s, reporter=reporter)

    @contextlib.contextmanager
    def _done(self) -> Iterator[None]:
        """What is done is no failure, although images behind it wait for a merge: the log is told."""
        try:
            yield
        except errors.HvmgrError as error:
            if not failure.is_done(error):
                raise
            self._report(error.message)

    def _list(self) -> Sequence[Vdi]:
        with self._host() as host:
            return host.disks.list()

    @contextlib.contextmanager
    def _noted(self, uuids: Sequence[str]) -> Iterator[None]:
        with self._let_go:
            self._sending.update(uuids)
        try:
            yield
        finally:
            with self._let_go:
                self._sending.subtract(uuids)
                self._sending += Counter()  # those that are 0 go
                self._let_go.notify_all()

    def _is_let_go(self, uuid: str, wait_s: float) -> bool:
        """Whether nothing here sends the disk any more. A client that has the last byte may be back before it is let go."""
        until = time.monotonic() + wait_s
        with self._let_go:
            while self._sending[uuid] and (left := until - time.monotonic()) > 0:
                self._let_go.wait(left)
            return not self._sending[uuid]

    def _record(self, one: Vdi, known: Sequence[Vdi]) -> dict[str, Any]:
        is_snapshot = one.snapshot_of is not None
        created = None if one.created is None else units.from_rfc3339(one.created)
        return {
            "uuid": one.uuid,
            "name_label": one.name or _described(one),
            "name_description": _described(one),
            "virtual_size": one.size,
            "physical_utilisation": one.used,
            "SR": self._sr,
            "type": "user",
            "VBDs": [],
            "snapshots": [REF + other.uuid for other in known if other.snapshot_of == one.uuid],
            "snapshot_of": NULL if one.snapshot_of is None else REF + one.snapshot_of,
            "is_a_snapshot": is_snapshot,
            "snapshot_time": created if is_snapshot and created is not None else _NEVER,
            "sm_config": {"image-format": "vhd"},
            "other_config": self.notes.of(REF + one.uuid),
            "xenstore_data": {},
            "tags": [],
            "read_only": is_snapshot,
            "sharable": False,
            "managed": True,
            "missing": False,
            "cbt_enabled": False,
            "location": one.uuid,
            "parent": NULL,
            "allowed_operations": list(_OPERATIONS[one.kind]),
            "current_operations": {},
        }


def _pick(ref: str, known: Sequence[Vdi]) -> Vdi:
    """The disk with this reference or uuid."""
    for one in known:
        if ref in {REF + one.uuid, one.uuid}:
            return one
    code = "HANDLE_INVALID" if ref.startswith(REF) else "UUID_INVALID"
    raise XenFailure(code, "VDI", ref[:64], status=HTTPStatus.NOT_FOUND)


def _described(one: Vdi) -> str:
    if one.vm is None:
        return "a free disk" if one.snapshot_of is None else "a snapshot of a free disk"
    place = f"disk {one.slot} of {one.vm}"
    if one.snapshot is not None:
        return f"{place} in the snapshot '{one.name}'"
    return place if one.kind is Kind.SLOT else f"a snapshot of {place}"
