"""``hvmgr freeze``: a command of the host's own runs while guests stand still, a snapshot by LVM, Btrfs, ZFS or a storage box.

| a VM that is …          | meanwhile                                                                          |
|-------------------------|------------------------------------------------------------------------------------|
| running, with an agent  | its agent puts its file systems to rest, and wakes them                            |
| off, or saved           | QEMU's own locks on its working images are ours: nobody starts it                  |
| anything else           | nothing is done for any of them, and why is said                                   |

They are woken whatever happens. Each way on which a guest could be left behind has somebody who wakes it:

| what happens                               | who wakes the guest                                                      |
|--------------------------------------------|--------------------------------------------------------------------------|
| the command ends, fails, or takes too long | we do; one that takes too long is asked to end first, and killed later   |
| Ctrl-C, SIGTERM, an error                  | we do                                                                    |
| we are killed (kill -9)                    | a process that waits for just that (``Request.seconded``), at once       |
| so is that process                         | the next command on the VM, by the note that is in its home beforehand   |
| libvirt's daemon is restarted              | we do, connected anew                                                    |
| the agent hangs                            | every command on the VM asks it again                                    |

Nothing here needs a journal: no file of the VM is changed, so that the snapshot holds a home in which nothing is open.
"""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from hvmgr import errors
from hvmgr.host import guest_agent, process
from hvmgr.host.domain import Domain, State
from hvmgr.model.plan import Plan, QuiesceGuest, WakeGuest
from hvmgr.operations import occasions, quiescing, reconcile, resting_guest, running_qemu, snapshots, user_hooks
from hvmgr.storage import durable

if TYPE_CHECKING:
    from hvmgr.operations.host import Host
    from hvmgr.operations.session import Session
    from hvmgr.operations.vm import VM

T = TypeVar("T")

LIMIT_S = 60.0
GRACE_S = 30.0  # a command that is asked to end may have devices to resume

_PAUSE_S = 0.5

_STILL = (State.OFF, State.SAVED)


@dataclass(frozen=True, slots=True)
class Frozen:
    """A VM that stood still; ``file_systems`` is the number that its agent gave, None for a VM that is not running."""

    id: str
    name: str
    state: State
    file_systems: int | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the command, and how long the guests stood still for it."""

    exit_code: int
    vms: tuple[Frozen, ...]
    seconds: float


@dataclass(slots=True)
class _Guest:
    """One VM of the command."""

    session: Session
    state: State
    domain: Domain
    file_systems: int | None = None
    woke_early: str | None = None  # why its file systems did not rest until the command had ended
    unwoken: errors.HvmgrError | None = None

    @property
    def name(self) -> str:
        return self.session.home.name

    @property
    def is_running(self) -> bool:
        return self.state not in _STILL


def run(
    host: Host, vms: Sequence[VM], argv: Sequence[str], *, limit_s: float = LIMIT_S, stdout: int | None = None
) -> Outcome:
    """The command has run while all these VMs stood still, and ended well.

    HostFailed when it did not end well, or not within ``limit_s`` from when the first guest was asked to rest; or when a
    guest did not rest until its end, or may rest still. Conflict when one cannot be put to rest: then nothing was done.
    """
    _require_sensible(vms, argv, limit_s)
    process.require(argv[0])
    with contextlib.ExitStack() as stack:
        guests = [_enter(stack, host, one) for one in sorted(vms, key=lambda one: one.id)]
        host_plan = _plan(guests, argv)
        if not host.reporter.approve(host_plan):
            raise errors.Declined(f"{host_plan.subject}: not done")
        for one in guests:
            stack.enter_context(occasions.operation(one.session, _plan([one], argv), is_approved=True))
        for one in guests:
            _hold_when_off(one)
        return _run(host, guests, argv, limit_s, stdout)


# --- before ---------------------------------------------------------------------------------------------------------


def _require_sensible(vms: Sequence[VM], argv: Sequence[str], limit_s: float) -> None:
    if not vms:
        raise errors.UsageError("no VM is named", hint="hvmgr freeze VM… -- COMMAND")
    if not argv:
        raise errors.UsageError("no command is given", hint="give it after two dashes: hvmgr freeze VM… -- COMMAND")
    if limit_s <= 0:
        raise errors.UsageError("the time limit is 0 seconds", hint="give the command some time with --limit")


def _enter(stack: contextlib.ExitStack, host: Host, vm: VM) -> _Guest:
    """The VM's home is locked until the end, and nothing is in the way of putting its guest to rest."""
    session = stack.enter_context(host.session(vm.home))
    reconcile.bring_together(session, needs_present=False)
    state = session.state()
    obstacle = None if state in _STILL else quiescing.find_obstacle(session, state)
    if obstacle is not None:
        raise errors.Conflict(
            f"{session.home.name} cannot stand still: {obstacle.reason}", hint=obstacle.remedy, vm=session.home.name
        )
    return _Guest(session, state, session.domain())


def _hold_when_off(one: _Guest) -> None:
    """A VM that is off stays off: QEMU's own locks on what it would write are ours."""
    if one.is_running:
        return
    for path, fmt in snapshots.working(one.session.home.tree()):
        one.session.hold(path, fmt)
    if one.session.state() not in _STILL:
        raise errors.Conflict(f"{one.name} was started in the meantime", hint="run the command again")


def _plan(guests: Sequence[_Guest], argv: Sequence[str]) -> Plan:
    running = [one for one in guests if one.is_running]
    names = ", ".join(one.name for one in guests)
    return Plan(
        guests[0].session.new_id(),
        guests[0].session.home.vm_id,
        "freeze",
        f"freeze of {names} for '{shlex.join(argv)}'",
        prepare=tuple(QuiesceGuest() for _ in running),
        finish=tuple(WakeGuest() for _ in running),
    )


# --- meanwhile ------------------------------------------------------------------------------------------------------


def _run(host: Host, guests: Sequence[_Guest], argv: Sequence[str], limit_s: float, stdout: int | None) -> Outcome:
    started = time.monotonic()
    deadline = started + limit_s
    interrupts = guests[-1].session.interrupts  # the last session has the signals
    environment = {
        user_hooks.FROZEN: ",".join(one.session.home.vm_id for one in guests),
        "HVMGR_FROZEN_NAMES": " ".join(one.name for one in guests),
    }
    # The guests are woken first; a command that takes too long has its time to end after that.
    with contextlib.ExitStack() as command_stack, _at_rest(host, guests, limit_s):
        interrupts.check()
        command = command_stack.enter_context(
            process.attended(argv, environment=environment, stdout=stdout, grace_s=GRACE_S)
        )
        code = command.wait(until=lambda: interrupts.wanted or time.monotonic() >= deadline)
        if code is None:
            command.ask_to_end()
    seconds = time.monotonic() - started
    _require_woken(guests, argv, code)
    again = "; the guests run again" if any(one.is_running for one in guests) else ""
    if code is None and interrupts.wanted:
        raise errors.Cancelled(f"'{shlex.join(argv)}' was stopped{again}", hint="what it made is not whole")
    if code is None:
        raise errors.HostFailed(
            f"'{shlex.join(argv)}' did not end within {limit_s:g} s and was stopped{again}",
            hint="what it made is not whole; give it more time with --limit",
            exit_code=None,
        )
    if code != 0:
        how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
        raise errors.HostFailed(f"'{shlex.join(argv)}' {how}{again}", exit_code=code)
    _require_held(guests, argv)
    found = tuple(Frozen(one.session.home.vm_id, one.name, one.state, one.file_systems) for one in guests)
    return Outcome(code, found, seconds)


@contextlib.contextmanager
def _at_rest(host: Host, guests: Sequence[_Guest], limit_s: float) -> Iterator[None]:
    """The file systems of all guests that run are at rest, and take writes again afterwards, or that is noted."""
    running = [one for one in guests if one.is_running]
    try:
        for one in running:
            resting_guest.announce(one.session)
        for one, count in zip(running, _each(running, lambda one: _freeze(one, limit_s)), strict=True):
            one.file_systems = count
            if count == 0:
                one.session.say(f"the agent of {one.name} found no file system that could be put to rest")
        yield
    except BaseException:
        _wake_all(host, running)
        for one in running:
            if one.unwoken is not None:  # what failed is raised; this is worth knowing all the same
                one.session.say(f"{one.unwoken}; {one.unwoken.hint}")
        raise
    _wake_all(host, running)


def _freeze(one: _Guest, limit_s: float) -> int:
    return guest_agent.freeze(one.domain, limit_s=limit_s)


def _each(guests: Sequence[_Guest], act: Callable[[_Guest], T]) -> list[T]:
    """All at once, so that none waits for the others; the first error when all have ended."""
    if len(guests) < 2:
        return [act(one) for one in guests]
    with ThreadPoolExecutor(len(guests)) as pool:
        tasks = [pool.submit(act, one) for one in guests]
    return [one.result() for one in tasks]


# --- afterwards -----------------------------------------------------------------------------------------------------


def _wake_all(host: Host, guests: Sequence[_Guest]) -> None:
    """Each guest is woken, or it is known which is not; nothing is raised."""

    def wake(one: _Guest) -> None:
        try:
            one.woke_early = _why_awake(one) or guest_agent.thaw(one.domain)
        except errors.HvmgrError as error:
            one.unwoken = error

    with contextlib.ExitStack() as stack:
        for one in guests:
            stack.enter_context(one.session.interrupts.held_back())
        _each(guests, wake)
        for one in guests:
            if one.unwoken is not None and not one.session.connection.is_alive():
                _wake_anew(host, one)
            if one.unwoken is None:
                durable.remove(one.session.layout.guest_at_rest)
            else:
                with contextlib.suppress(errors.HvmgrError):
                    running_qemu.note(one.session, one.session.layout.guest_at_rest)


def _why_awake(one: _Guest) -> str | None:
    """Why a guest no longer is at rest, before it is woken; None when it is, as far as its agent says."""
    if one.file_systems is None:
        return None
    try:
        return None if guest_agent.is_frozen(one.domain) else "somebody else has woken them"
    except errors.OutcomeUnknown:
        raise
    except errors.HvmgrError:
        return None if one.domain.is_active() else "its VM has ended"


def _wake_anew(host: Host, one: _Guest) -> None:
    """The same by a new connection: libvirt's daemon has ended, and is started again perhaps; the guest has not."""
    deadline = time.monotonic() + guest_agent.THAW_S
    while one.unwoken is not None:
        try:
            domain = host.connection.find_domain(one.session.home.vm_id)
            if domain is not None and domain.is_active():
                guest_agent.thaw(domain)
            one.unwoken = None
        except errors.HvmgrError as error:
            one.unwoken = error
            if time.monotonic() >= deadline:
                return
            time.sleep(_PAUSE_S)


def _require_woken(guests: Sequence[_Guest], argv: Sequence[str], code: int | None) -> None:
    for one in guests:
        if one.unwoken is not None:
            how = "was stopped" if code is None else f"ended with code {code}"
            words = str(one.unwoken)
            if "at rest" not in words:
                words = f"the file systems of {one.name} may still be at rest: {words}"
            raise errors.HostFailed(
                f"'{shlex.join(argv)}' {how}, but {words}",
                hint=one.unwoken.hint or f"every command on this VM tries again: hvmgr vm show {one.name}",
                exit_code=code,
                vm=one.name,
            )


def _require_held(guests: Sequence[_Guest], argv: Sequence[str]) -> None:
    reasons: Mapping[str, str] = {one.name: one.woke_early for one in guests if one.woke_early is not None}
    for name, why in reasons.items():
        raise errors.HostFailed(
            f"the file systems of {name} did not rest until '{shlex.join(argv)}' had ended: {why}",
            hint="what it made holds that guest as after a power cut; Windows lets its own rest for 10 s only",
            exit_code=0,
            vm=name,
        )
