"""Following a host: what libvirt tells of its domains, and what hvmgr's own commands wrote into the log of events.

The two come from two sources, so that things that happen at one moment may come in either order. libvirt's events are
told while they happen and kept nowhere; those of hvmgr's are in the log, and a reader who starts late can ask for them.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from hvmgr import errors, units
from hvmgr.host import hypervisor
from hvmgr.host.hypervisor import Connection, Driver
from hvmgr.storage import event_log

if TYPE_CHECKING:
    from hvmgr.host.events import Follower, HostEvent
    from hvmgr.operations.host import Host

_POLL_S = 0.2
_RETRY_S = 1.0


class Source(StrEnum):
    """Who tells of an event."""

    HVMGR = "hvmgr"  # its own commands
    LIBVIRT = "libvirt"
    WATCH = "watch"  # about the following itself


@dataclass(frozen=True, slots=True)
class Happening:
    """One event: its name, when, of which VM (None: of none), a sentence for people, and the whole as a document."""

    source: Source
    event: str
    time: datetime
    vm: str | None
    sentence: str
    document: dict[str, Any]


def watch(host: Host, vm_ids: Collection[str], since: datetime | None) -> Iterator[Happening | None]:
    """Everything that happens from now on, of these VMs or (none given) of all; None now and then while nothing does.

    With ``since`` hvmgr's own events of the time after that come first. It ends with the connection's errors only when it
    cannot be had at the beginning; a libvirt that goes away is waited for.
    """
    follower = _Libvirt(host.uri, host.wait_s)
    reader = event_log.Reader(from_start=since is not None)
    wanted = set(vm_ids)
    try:
        yield _about_us("watching", host.uri, follower.sentence)
        while True:
            for one in [*follower.news(), *_own(reader, host.uri, since)]:
                if one.source is Source.WATCH or not wanted or _vm_id(one) in wanted:
                    yield one
            yield None
            follower.wait(_POLL_S)
    finally:
        reader.close()
        follower.close()


def find(host: Host, name: str) -> str:
    """The id of a VM that is hvmgr's, or of a domain that is libvirt's alone."""
    try:
        return host.vm(name).id
    except errors.NotFound:
        if hypervisor.parse_uri(host.uri).driver is Driver.EMBED:
            raise
        found = host.connection.find_domain_by_name(name)
        if found is None:
            raise
        return found.uuid


class _Libvirt:
    """libvirt's side: connected, or waited for."""

    def __init__(self, uri: str, wait_s: float) -> None:
        self._uri, self._wait_s = uri, wait_s
        self._connection: Connection | None = None
        self._follower: Follower | None = None
        self._next_try = 0.0
        # An embedded driver belongs to one process at a time: to follow it would keep all others out.
        self._is_followed = hypervisor.parse_uri(uri).driver is not Driver.EMBED
        if self._is_followed:
            self._connect()

    @property
    def sentence(self) -> str:
        """What is followed."""
        if self._is_followed:
            return f"following libvirt ({self._uri}) and hvmgr's own events"
        return "following hvmgr's own events; an embedded libvirt belongs to one process at a time"

    def news(self) -> Iterator[Happening]:
        """What libvirt told since the last call, and what became of the connection."""
        if not self._is_followed:
            return
        if self._follower is None:
            yield from self._try_again()
        if self._follower is None or self._connection is None:
            return
        for one in self._follower.take():
            yield _from_libvirt(one, self._uri)
        if not self._connection.is_alive():
            self.close()
            yield _about_us("connection-lost", self._uri, f"lost libvirt ({self._uri}); waiting for it")

    def wait(self, timeout_s: float) -> None:
        """Until there may be something new."""
        if self._follower is not None:
            self._follower.wait(timeout_s)
        else:
            time.sleep(timeout_s)

    def close(self) -> None:
        """Nothing is open."""
        if self._follower is not None:
            self._follower.close()
        if self._connection is not None:
            self._connection.close()
        self._follower = self._connection = None

    def _connect(self) -> None:
        self._connection = hypervisor.connect(self._uri, wait_s=self._wait_s)
        try:
            self._follower = self._connection.follow()
        except errors.HvmgrError:
            self.close()
            raise

    def _try_again(self) -> Iterator[Happening]:
        if time.monotonic() < self._next_try:
            return
        self._next_try = time.monotonic() + _RETRY_S
        with contextlib.suppress(errors.HvmgrError):
            self._connect()
            yield _about_us("connection-restored", self._uri, f"libvirt ({self._uri}) is back")


def _own(reader: event_log.Reader, uri: str, since: datetime | None) -> Iterator[Happening]:
    for document in reader.documents():
        with contextlib.suppress(KeyError, TypeError, ValueError):
            moment, vm = units.from_rfc3339(document["time"]), document["vm"]
            if vm["connection"] != uri or (since is not None and moment < since):
                continue
            event, sentence = str(document["event"]), str(document["subject"])
            if document["error"] is not None:
                sentence = f"{sentence}: {document['error']['message']}"
            if document["recovered"]:
                sentence += " (left open by a command that died)"
            facts = {key: value for key, value in document.items() if key != "version"}
            yield Happening(Source.HVMGR, event, moment, str(vm["name"]), sentence, facts)


def _from_libvirt(one: HostEvent, uri: str) -> Happening:
    document = {
        "event": one.kind.value,
        "time": units.to_rfc3339(one.time),
        "vm": {"id": one.vm_id, "name": one.name, "connection": uri},
        "detail": one.detail,
        "slot": one.slot,
    }
    sentence = " ".join(filter(None, (one.slot, one.detail)))
    return Happening(Source.LIBVIRT, one.kind.value, one.time, one.name, sentence, document)


def _about_us(event: str, uri: str, sentence: str) -> Happening:
    now = datetime.now(UTC)
    document = {"event": event, "time": units.to_rfc3339(now), "vm": None, "connection": uri}
    return Happening(Source.WATCH, event, now, None, sentence, document)


def _vm_id(one: Happening) -> str | None:
    vm = one.document["vm"]
    return None if vm is None else str(vm["id"])
