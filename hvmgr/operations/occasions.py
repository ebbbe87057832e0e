"""What becomes of an operation, told to the hooks and to the log of events: the one place where that is done.

``operation`` is put around the carrying out of a plan. Hooks that come before are asked there, while the home is locked:
what they let pass is what is done. What comes afterwards waits until the locks are free again (``Occasions``), so that a
hook may use hvmgr on the same VM; then it is written to the log, and the hooks hear of it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors, settings
from hvmgr.model import event, tree
from hvmgr.model.event import ErrorFacts, Event, Occurrence, VmFacts
from hvmgr.model.plan import Plan, WriteSnapshot
from hvmgr.operations import user_hooks
from hvmgr.operations.reporter import Reporter
from hvmgr.storage import event_log

if TYPE_CHECKING:
    from hvmgr.operations.session import Session


class Occasions(threading.local):
    """What has happened and is told when nothing is locked any more; each thread has its own."""

    def __init__(self, root: Path, reporter: Reporter) -> None:
        self.root = root
        self.notice = reporter.notice
        self._depth = 0
        self._waiting: list[Occurrence] = []

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """What happens in here is told at the end of the outermost of these blocks, also when it fails."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._tell_all()

    def add(self, one: Occurrence) -> None:
        """It has happened."""
        self._waiting.append(one)

    def _tell_all(self) -> None:
        while self._waiting:
            one = self._waiting.pop(0)
            try:
                event_log.append(one.to_json())
            except (errors.HvmgrError, OSError) as error:
                self.notice(f"warning: the event {one.event} is not in the log: {error}")
            user_hooks.tell(one, self.root, self.notice)


@contextlib.contextmanager
def operation(
    session: Session,
    one: Plan,
    *,
    name: str | None = None,
    snapshots: Sequence[str] = (),
    path: Path | str | None = None,
    is_approved: bool = False,
) -> Iterator[None]:
    """The plan is approved of and let pass by the hooks, and carried out in here; what becomes of it is told.

    ``name`` is the VM's where its home is still to be made; ``snapshots`` are those that it is about; ``path`` is where an
    export goes or an import comes from. ``is_approved``: the caller has asked already.
    """
    if not is_approved:
        session.require_approval(one)
    about, after = _asked(session, one, name, snapshots, path)
    try:
        yield
    except BaseException as error:
        if not (isinstance(error, errors.HvmgrError) and error.facts.get("done")):
            _add(session, about, Event.OPERATION_FAILED, error=_error_facts(error))
            raise
        _add(session, about, after)
        raise
    _add(session, about, after)


def require_leave(
    session: Session, operation: str, subject: str, path: Path | None
) -> Callable[[BaseException | None], None]:
    """The same for an act that has no plan and goes on after the locks are free: it is approved of, and the hooks let it pass.

    What this returns is called once when the act has ended, with what ended it too early, and tells that.
    """
    one = Plan(session.new_id(), session.home.vm_id, operation, subject)
    session.require_approval(one)
    about, after = _asked(session, one, None, (), path)

    def end(error: BaseException | None) -> None:
        with session.occasions.gathered():
            if error is None:
                _add(session, about, after)
            else:
                _add(session, about, Event.OPERATION_FAILED, error=_error_facts(error))

    return end


def _asked(
    session: Session, one: Plan, name: str | None, snapshots: Sequence[str], path: Path | str | None
) -> tuple[Occurrence, Event]:
    before, after = event.events_of(one.operation)
    about = _describe(session, before, one, name, snapshots, path)
    user_hooks.ask(about, session.occasions.root, session.say)
    session.interrupts.check()
    return about, after


@contextlib.contextmanager
def completion(session: Session, one: Plan) -> Iterator[None]:
    """What a dead command had begun is completed in here."""
    try:
        yield
    except errors.HvmgrError as error:
        if error.facts.get("done") and one.operation not in event.PARTS:
            completed(session, one)
        raise
    if one.operation not in event.PARTS:
        completed(session, one)


def completed(session: Session, one: Plan, *, path: Path | None = None) -> None:
    """What a dead command had begun was completed."""
    _, after = event.events_of(one.operation)
    _add(session, _describe(session, after, one, None, (), path), after, is_recovered=True)


def undone(session: Session, one: Plan) -> None:
    """What a dead command had begun was undone."""
    if one.operation in event.PARTS:
        return
    about = _describe(session, Event.OPERATION_FAILED, one, None, (), None)
    error = ErrorFacts("Interrupted", f"the {one.subject} was interrupted and is undone", None)
    _add(session, about, about.event, error=error, is_recovered=True)


def tell_waiting(session: Session) -> None:
    """What an operation has left to merge, and nothing has merged until now, the end of the session."""
    import dataclasses

    one = session.left_images
    if one is not None and (waiting := _waiting_images(session)):
        left = dataclasses.replace(one, event=Event.MERGE_PENDING, time=session.now(), images=waiting)
        session.occasions.add(left)


def _add(
    session: Session,
    about: Occurrence,
    which: Event,
    *,
    error: ErrorFacts | None = None,
    is_recovered: bool = False,
) -> None:
    import dataclasses

    vm = dataclasses.replace(about.vm, name=_name(session, about.vm.name))
    now = dataclasses.replace(about, event=which, time=session.now(), vm=vm, error=error, recovered=is_recovered)
    session.occasions.add(now)
    if which is not Event.OPERATION_FAILED and about.operation in event.MERGING:
        session.left_images = now
    free = _low_space(session)
    if free is not None:
        session.occasions.add(dataclasses.replace(now, event=Event.SPACE_LOW, free=free))


def _describe(
    session: Session,
    which: Event,
    one: Plan,
    name: str | None,
    snapshots: Sequence[str],
    path: Path | str | None,
) -> Occurrence:
    vm = VmFacts(session.home.vm_id, _name(session, name or ""), str(session.home.path), session.connection.uri)
    return Occurrence(
        event=which,
        time=session.now(),
        operation=one.operation,
        id=one.plan_id,
        subject=one.subject,
        vm=vm,
        snapshots=_named(session, one, snapshots),
        path=None if path is None else str(path),
    )


def _name(session: Session, otherwise: str) -> str:
    """The VM's name now; what it was called before when there is no home (yet, or any more)."""
    with contextlib.suppress(errors.HvmgrError):
        return session.home.name
    return otherwise


def _named(session: Session, one: Plan, snapshots: Sequence[str]) -> tuple[tuple[str, str | None], ...]:
    """The snapshots that an operation is about, with their names: those given, and those that the plan makes."""
    from hvmgr.model import configuration

    found: dict[str, str | None] = {}
    for snapshot_id in snapshots:
        found[snapshot_id] = None
        with contextlib.suppress(errors.HvmgrError):
            found[snapshot_id] = session.home.entry(snapshot_id).record.name
    if one.operation == "snapshot create":
        for step in one.steps():
            if isinstance(step, WriteSnapshot):
                facts = configuration.parse(step.xml, source="the new snapshot").metadata()
                found[step.snapshot_id] = None if facts is None or facts.snapshot is None else facts.snapshot.name
    return tuple(found.items())


def _waiting_images(session: Session) -> tuple[str, ...]:
    """Unnamed images that nothing but a running VM keeps from being merged."""
    with contextlib.suppress(errors.HvmgrError):
        if not session.waiting and not session.is_active():
            return ()  # all that could be merged has been
        return tuple(sorted({parent for parent, _ in tree.pending(session.home.tree())}))
    return ()


def _low_space(session: Session) -> int | None:
    """The bytes that are free where the home lies, when that is less than it should be."""
    try:
        facts = os.statvfs(session.home.path if session.home.path.exists() else session.home.path.parent)
        wanted = settings.space_low(facts.f_blocks * facts.f_frsize)
    except (OSError, errors.UsageError):
        return None  # what was done is done, whatever a configuration file says
    free = facts.f_bavail * facts.f_frsize
    return free if free < wanted else None


def _error_facts(error: BaseException) -> ErrorFacts:
    if isinstance(error, errors.HvmgrError):
        return ErrorFacts(error.code, error.message, error.hint)
    if isinstance(error, KeyboardInterrupt):
        return ErrorFacts("Cancelled", "stopped", None)
    return ErrorFacts("Defect", f"{type(error).__name__}: {error}", None)
