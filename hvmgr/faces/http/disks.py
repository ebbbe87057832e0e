"""The disks as the Xen API shows them: found by reference or uuid, each call with a host of its own."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvmgr.faces.http.failure import XenFailure
from hvmgr.faces.http.sessions import NULL, REF
from hvmgr.operations.host import Host
from hvmgr.operations.reporter import Reporter

if TYPE_CHECKING:
    from hvmgr.model.image_format import ImageFormat
    from hvmgr.operations.transfer.outgoing import Outgoing
    from hvmgr.operations.transfer.points import Point
    from hvmgr.operations.vm import VM
    from hvmgr.vhd.inlet import Readable


@dataclass(frozen=True, slots=True)
class Vdi:
    """One disk at one moment, as clients see it."""

    uuid: str
    size: int
    name: str
    vm: VM
    point: Point
    snapshot: str | None


class Disks:
    """The disks below one root."""

    def __init__(self, uri: str, root: Path, *, wait_s: float, sr: str) -> None:
        self._uri, self._root, self._wait_s, self._sr = uri, root, wait_s, sr
        self._notes: dict[str, dict[str, str]] = {}
        self._in_use: Counter[str] = Counter()
        self._let_go = threading.Condition()

    def _host(self, reporter: Reporter | None = None) -> Host:
        return Host.open(self._uri, root=self._root, wait_s=self._wait_s, reporter=reporter)

    def _all(self, host: Host) -> dict[str, Vdi]:
        from hvmgr.operations.transfer import points

        found = {}
        for vm in host.vms():
            forest = vm.tree()
            for slot in forest.present.disks:
                point = points.of_slot(vm.home, slot, forest)
                found[point.uuid] = Vdi(point.uuid, point.size, point.name, vm, point, None)
            for shot in vm.snapshots():
                for slot in shot.disks:
                    point = points.of_snapshot(vm.home, shot.id, slot, forest)
                    found[point.uuid] = Vdi(point.uuid, point.size, point.name, vm, point, shot.id)
        return found

    def uuids(self) -> list[str]:
        with self._host() as host:
            return list(self._all(host))

    def records(self) -> dict[str, dict[str, Any]]:
        with self._host() as host:
            return {REF + uuid: self._record(one) for uuid, one in self._all(host).items()}

    def record(self, ref: str) -> dict[str, Any]:
        with self._host() as host:
            return self._record(self._find(host, ref))

    def find_by_uuid(self, uuid: str) -> Vdi | None:
        with self._host() as host:
            return self._all(host).get(uuid)

    def _find(self, host: Host, ref: str) -> Vdi:
        found = self._all(host).get(ref.removeprefix(REF))
        if found is None:
            code = "HANDLE_INVALID" if ref.startswith(REF) else "UUID_INVALID"
            raise XenFailure(code, "VDI", ref[:64], status=HTTPStatus.NOT_FOUND)
        return found

    def create(self, label: str, size: int) -> str:
        raise XenFailure("NOT_IMPLEMENTED")

    def snapshot(self, ref: str) -> str:
        raise XenFailure("NOT_IMPLEMENTED")

    def destroy(self, ref: str) -> None:
        raise XenFailure("NOT_IMPLEMENTED")

    def add_note(self, ref: str, key: str, value: str) -> None:
        pass
    def remove_note(self, ref: str, key: str) -> None:
        pass

    @contextlib.contextmanager
    def exported(self, vdi: str, base: str | None, fmt: ImageFormat, reporter: Reporter) -> Iterator[Outgoing]:
        from hvmgr.operations.transfer import sending, points

        with self._host(reporter) as host:
            one = self._find(host, vdi)
            older = None if base is None else self._find(host, base).point
            with sending.of_vm(one.vm, lambda: one.point, None if older is None else (lambda: older), fmt) as stream:
                yield stream

    def require_writable(self, vdi: str, reporter: Reporter) -> Vdi:
        with self._host(reporter) as host:
            one = self._find(host, vdi)
            one.vm.require_importable(one.point.slot)
            return one

    def take_in(self, target: Vdi, source: Readable, fmt: ImageFormat, *, length: int | None, to_end: bool, reporter: Reporter) -> None:
        with self._host(reporter) as host:
            one = self._find(host, target.uuid)
            one.vm.import_disk(one.point.slot, source, format=fmt, length=length, to_end=to_end)

    def _record(self, one: Vdi) -> dict[str, Any]:
        return {
            "uuid": one.uuid,
            "name_label": one.name,
            "name_description": "",
            "virtual_size": one.size,
            "physical_utilisation": 0,
            "SR": self._sr,
            "type": "user",
            "VBDs": [],
            "snapshots": [],
            "snapshot_of": NULL,
            "is_a_snapshot": one.snapshot is not None,
            "snapshot_time": one.point.created or datetime(1970, 1, 1, tzinfo=UTC),
            "sm_config": {"image-format": "vhd"},
            "other_config": {},
            "xenstore_data": {},
            "tags": [],
            "read_only": one.point.is_frozen,
            "sharable": False,
            "managed": True,
            "missing": False,
            "cbt_enabled": False,
            "location": one.uuid,
            "parent": NULL,
            "allowed_operations": [],
            "current_operations": {},
        }
