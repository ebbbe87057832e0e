"""The worker outside libvirt's hook: sees to every VM of this host, one after the other (docs/automatic.md).

The hook leaves a marker for each start and end and lets libvirt go on; systemd starts the worker when there is one, and
every few minutes. One worker at a time. A VM that is busy, or whose home does not answer, comes again with the next run;
it holds up no other. An event is settled when what it asked for is done, so that a worker that died loses none.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

from hvmgr import errors, settings
from hvmgr.host.domain import State
from hvmgr.model.policy import Policy
from hvmgr.operations.automatic import acts
from hvmgr.operations.automatic.acts import Action, Deed
from hvmgr.operations.host import Host
from hvmgr.operations.reporter import Reporter
from hvmgr.operations.vm import VM
from hvmgr.storage import index, locks, spool, vm_home
from hvmgr.storage.index import Entry
from hvmgr.storage.spool import Event, Marker
from hvmgr.storage.vm_home import VmHome

_ANSWER_S = 10.0  # how long a home may take to be read: on a dead NFS mount it would be for ever
_VM_WAIT_S = 2.0  # for a VM that is busy: the next run will find it again, and the others wait as well
_EVENTS_LAST = timedelta(days=7)
_TRIED_AGAIN = (errors.NoSpace, errors.HostFailed, errors.OutcomeUnknown)  # all else stays as it is until somebody acts
_MERGES_S = 600.0
_ROUNDS = 20  # events that come while the worker works are seen to as well; what comes without end waits for the next

T = TypeVar("T")

__all__ = ["Action", "Deed", "Outcome", "Scope", "run"]


@dataclass(frozen=True, slots=True)
class Scope:
    """Which VMs: those of one connection, those below one root; all without."""

    uri: str | None = None
    root: Path | None = None

    def holds(self, entry: Entry) -> bool:
        """Whether a VM of the index is one of them."""
        return self.uri in (None, entry.uri) and (self.root is None or entry.home.is_relative_to(self.root))


@dataclass(slots=True)
class Outcome:
    """What was done, what comes again with the next run and why, and what failed; each with the VM's name."""

    done: list[Deed] = field(default_factory=list)
    put_off: list[tuple[str, errors.HvmgrError]] = field(default_factory=list)
    failed: list[tuple[str, errors.HvmgrError]] = field(default_factory=list)


def run(
    reporter: Reporter, *, scope: Scope | None = None, wait_s: float, on_deed: Callable[[Deed], None] = lambda _: None
) -> Outcome:
    """Everything that is due on this host is done, as far as it can be now. Busy when another worker does it."""
    lock = index.make_folder("automatic") / "lock"
    with locks.held(lock, wait_s=wait_s, what="what hvmgr does by itself"), contextlib.ExitStack() as stack:
        worker = _Worker(reporter, scope or Scope(), wait_s, on_deed, stack)
        worker.work()
        return worker.outcome


@dataclass(slots=True)
class _Worker:
    reporter: Reporter
    scope: Scope
    wait_s: float
    on_deed: Callable[[Deed], None]
    stack: contextlib.ExitStack
    outcome: Outcome = field(default_factory=Outcome)
    hosts: dict[str, Host] = field(default_factory=dict)
    seen: set[Path] = field(default_factory=set)
    troubled: set[str] = field(default_factory=set)
    ended: dict[str, list[Marker]] = field(default_factory=dict)  # whose images may be merged now
    begun: float = field(default_factory=time.monotonic)

    def work(self) -> None:
        """Events first, for they are of now; then what has its time; last what may take long, and stops for new events."""
        self._see_to_events()
        for entry in self._entries():
            self._try(entry, [], self._keep_time)
        for entry in self._entries():
            if entry.vm_id not in self.troubled:
                self._try(entry, self.ended.pop(entry.vm_id, []), self._merge)
                self._see_to_events()

    def _see_to_events(self) -> None:
        for _ in range(_ROUNDS):
            markers = [one for one in spool.look(take=not self.reporter.dry_run) if one.file not in self.seen]
            self.seen |= {one.file for one in markers}
            if not markers:
                break
            self._see_to(markers)

    def _see_to(self, markers: Sequence[Marker]) -> None:
        entries = {entry.vm_id: entry for entry in self._entries(every=True)}
        by_vm: dict[str, list[Marker]] = {}
        for one in markers:
            by_vm.setdefault(one.vm_id, []).append(one)
        for vm_id, told in by_vm.items():
            entry = entries.get(vm_id)
            if entry is None or all(datetime.now(UTC) - one.time > _EVENTS_LAST for one in told):
                self._settle(told)  # released, deleted, or waited for too long
            elif self.scope.holds(entry):
                self._try(entry, told, self._answer)

    def _entries(self, *, every: bool = False) -> list[Entry]:
        found = [note.entry for note in index.notes() if note.entry is not None]
        return [entry for entry in found if every or self.scope.holds(entry)]

    def _try(self, entry: Entry, told: Sequence[Marker], act: Callable[[VM, Policy, Sequence[Marker]], None]) -> None:
        """One VM's trouble is its own; a wish to stop ends the run."""
        try:
            found = _within(_ANSWER_S, lambda: _look(entry), entry.home)
            if found is not None:
                act(VM(self._host(entry.uri), found[0]), found[1], told)
        except errors.Cancelled:
            raise
        except errors.Busy as error:
            self.outcome.put_off.append((entry.name, error))
            return
        except errors.HvmgrError as error:
            self._fail(entry, error)
            if isinstance(error, _TRIED_AGAIN):
                return
        except Exception as error:  # noqa: BLE001 - a defect with one VM must not keep the others waiting for ever
            what = errors.HvmgrError(f"a defect in hvmgr: {type(error).__name__}: {error}")
            what.__cause__ = error
            self._fail(entry, what)
        self._settle([one for one in told if one not in self.ended.get(entry.vm_id, ())])

    def _fail(self, entry: Entry, error: errors.HvmgrError) -> None:
        self.outcome.failed.append((entry.name, error))
        self.troubled.add(entry.vm_id)

    def _answer(self, one: VM, policy: Policy, told: Sequence[Marker]) -> None:
        """What the last start or end of a VM asks for. Only its state now counts: what came before is over."""
        starts = [marker for marker in told if marker.event is Event.STARTED]
        ends = [marker for marker in told if marker.event is Event.RELEASE]
        asks = policy.takes_snapshots or policy.recovery is not None
        state = one.state() if asks else None
        if starts and state in (State.RUNNING, State.PAUSED):
            self._do(acts.at_start(one, starts[-1].time, datetime.now(UTC)))
        elif ends and state is State.OFF:
            self._do(acts.after_stop(one, ends[-1].reason, ends[-1].time, datetime.now(UTC)))
        if ends:
            self.ended[one.id] = ends

    def _keep_time(self, one: VM, policy: Policy, _told: Sequence[Marker]) -> None:
        if not policy.takes_snapshots and policy.recovery is None:
            return
        failures: list[errors.HvmgrError] = []
        for act in (acts.on_schedule, acts.prune):  # also when there is no space: it may be the one that makes some
            try:
                self._do(act(one, datetime.now(UTC)))
            except errors.Cancelled:
                raise
            except errors.HvmgrError as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def _merge(self, one: VM, policy: Policy, told: Sequence[Marker]) -> None:
        if told or policy.takes_snapshots or policy.recovery is not None:
            self._do(acts.merge_waiting(one, datetime.now(UTC), self._has_to_stop))

    def _has_to_stop(self) -> bool:
        """A merge may take hours, and goes on where it was: others have events and schedules of their own."""
        return spool.has_news() or time.monotonic() - self.begun > _MERGES_S

    def _do(self, deeds: Iterator[Deed]) -> None:
        """Each deed is told as soon as it is done; in a dry run nobody agrees to any."""
        with contextlib.suppress(errors.Declined):
            for deed in deeds:
                if deed.failure is not None:
                    self.outcome.failed.append((deed.name, deed.failure))
                    continue
                self.outcome.done.append(deed)
                self.on_deed(deed)

    def _settle(self, told: Sequence[Marker]) -> None:
        if not self.reporter.dry_run:
            spool.settle(told)

    def _host(self, uri: str) -> Host:
        """One connection for each; it is opened when something needs it."""
        if uri not in self.hosts:
            wait_s = min(self.wait_s, _VM_WAIT_S)
            host = Host.open(uri, root=settings.default_root(), wait_s=wait_s, reporter=self.reporter)
            self.hosts[uri] = self.stack.enter_context(host)
        return self.hosts[uri]


def _look(entry: Entry) -> tuple[VmHome, Policy] | None:
    """The home and what its VM's owner wants; None when it is gone, or another VM's."""
    if not entry.home.exists():
        return None
    try:
        home = vm_home.open_home(entry.home)
    except errors.NotFound:
        return None  # being made, or deleted
    return (home, home.facts().policy) if home.vm_id == entry.vm_id else None


def _within(timeout_s: float, look: Callable[[], T], home: Path) -> T:
    """What ``look`` gives, as long as the file system answers; a look that hangs is left to itself."""
    found: list[T] = []
    failed: list[BaseException] = []

    def body() -> None:
        try:
            found.append(look())
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            failed.append(error)

    thread = threading.Thread(target=body, name="look", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if failed:
        raise failed[0]
    if not found:
        raise errors.HostFailed(f"{home} does not answer within {timeout_s:.0f} s", hint="is its file server there?")
    return found[0]
