"""QEMU's background snapshot: the memory of one instant is written once, in the background, while the guest goes on.

QEMU write-protects the guest's memory (userfaultfd) and saves a page before the guest's first write to it. The stream is
an ordinary one; libvirt has no part in it and only sees that the guest runs again. Source: QEMU, migration/migration.c
(``bg_migration_thread``), qapi/migration.json.

It must neither be cancelled nor fail: QEMU 7.2 then keeps the memory protected for good, refuses every later save, and
may stand still in a page fault. Nothing here cancels it.
"""

from __future__ import annotations

import contextlib
import re
import time
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from hvmgr import errors
from hvmgr.host.domain import State

if TYPE_CHECKING:
    from hvmgr.host.domain import Domain

_CAPABILITY = "background-snapshot"
_DESCRIPTOR = "hvmgr-memory"  # the file's name inside QEMU
_POLL_S = 0.005
_RUNNING_S = 10.0  # for libvirt to hear that the guest runs

# Block Name, page size, offset, used, total: of each block of memory (QEMU: HMP "info ramblock").
_BLOCK = re.compile(r"0x[0-9a-f]+\s+0x[0-9a-f]+\s+(0x[0-9a-f]+)", re.IGNORECASE)
_ENDED = {"completed", "failed", "cancelled", "none"}


class Phase(StrEnum):
    """How far the last stream of a QEMU is."""

    NONE = "none"  # it never had one
    ACTIVE = "active"
    COMPLETED = "completed"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Stream:
    """The last stream of a QEMU: ``done`` of ``total`` bytes of memory are written; ``words`` say why it failed."""

    phase: Phase
    done: int = 0
    total: int = 0
    has_pages: bool = False
    words: str = ""


def look(domain: Domain) -> Stream:
    """How far the last stream is, whoever asked for it."""
    return _stream(domain.monitor("query-migrate"))


def _stream(facts: dict[str, Any]) -> Stream:
    status = str(facts.get("status", "none"))
    phase = Phase.ACTIVE if status not in _ENDED else Phase.FAILED if status == "cancelled" else Phase(status)
    memory = facts.get("ram", {})
    total = int(memory.get("total", 0))
    return Stream(
        phase,
        done=max(0, total - int(memory.get("remaining", 0))),
        total=total,
        has_pages=bool(memory.get("normal", 0) or memory.get("duplicate", 0)),
        words=str(facts.get("error-desc", "")),
    )


def refusal(domain: Domain) -> str | None:
    """QEMU's words why this guest's memory cannot be saved in the background now; None when it can."""
    try:
        _allow(domain, wanted=True)
    except errors.HostFailed as error:
        return str(error.facts.get("words", error))
    _allow(domain, wanted=False)
    return None


def memory_size(domain: Domain) -> int:
    """The bytes of all memory that a stream may hold: the guest's, its graphics card's, its firmware's."""
    told = str(domain.monitor("human-monitor-command", command_line="info ramblock"))
    return sum(int(total, 16) for total in _BLOCK.findall(told))


def has_helper(domain: Domain) -> bool:
    """Whether part of the guest's state lies in a helper of libvirt's (slirp), of which a stream of ours knows nothing."""
    objects = domain.monitor("qom-list", path="/objects")
    return any(str(one.get("type", "")).startswith("child<dbus-vmstate") for one in objects)


def arrange(domain: Domain, descriptor: int) -> None:
    """All that QEMU may refuse is asked for, and it has the file; the guest runs. HostFailed leaves nothing behind."""
    try:
        _allow(domain, wanted=True)
        domain.monitor("getfd", files=[descriptor], fdname=_DESCRIPTOR)
    except errors.HostFailed:
        dismiss(domain)
        raise


def dismiss(domain: Domain) -> None:
    """QEMU has no file of ours and no wish for a background snapshot; fine when it never had, or has ended."""
    for command in (lambda: domain.monitor("closefd", fdname=_DESCRIPTOR), lambda: _allow(domain, wanted=False)):
        with contextlib.suppress(errors.HvmgrError):
            command()


def start(domain: Domain) -> None:
    """The guest, which stands still, goes on, and the stream of this instant is on its way into the file.

    When QEMU refuses, HostFailed, and the guest stands still as before. A stream that fails at once is none of this
    function's business: ``look`` says so.
    """
    domain.monitor("migrate", uri=f"fd:{_DESCRIPTOR}")
    # QEMU 7.2 lets the guest run by itself, later ones leave it as it was. Before the first page is there its memory
    # is not protected yet, and running it would mix two instants.
    while not _goes_on(domain):
        time.sleep(_POLL_S)
    deadline = time.monotonic() + _RUNNING_S
    if not domain.monitor("query-status")["running"] and domain.state() is State.PAUSED:
        domain.resume()
    while domain.state() is State.PAUSED and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    if domain.state() is State.PAUSED:
        domain.resume()


def _goes_on(domain: Domain) -> bool:
    if domain.monitor("query-status")["running"]:  # what QEMU 7.2 needs no second question for
        return True
    stream = look(domain)
    return stream.has_pages or stream.phase is not Phase.ACTIVE


def _allow(domain: Domain, *, wanted: bool) -> None:
    domain.monitor("migrate-set-capabilities", capabilities=[{"capability": _CAPABILITY, "state": wanted}])
