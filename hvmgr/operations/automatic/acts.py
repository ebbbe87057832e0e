"""What is done with one VM by itself: at its start, after its end, when its time has come.

Each act looks again under the home's lock whether it is still wanted: what libvirt's hook told may be told twice, late, or
never. What a dead command left a running VM to merge is waited for by ``merge_waiting`` alone, which stops for others.
What people did is never undone: nothing is touched while the undo slot holds what somebody put away lately, for
every snapshot operation empties it.

| act                | when                                                   | what                                              |
|--------------------|--------------------------------------------------------|---------------------------------------------------|
| ``at_start``       | the VM was started, not long ago, and has no snapshot  | a snapshot                                        |
| ``after_stop``     | its guest switched it off                              | snapshots of starts go                            |
|                    | it crashed and is to go back                           | its present becomes a snapshot, another is applied|
| ``on_schedule``    | a turn of its schedule came                            | a snapshot, unless it is off and nothing was written|
| ``prune``          | there are more automatic snapshots than are to be kept | they are deleted                                  |
| ``merge_waiting``  | images wait, and the VM runs or has been off a while   | they are merged, unless others want the VM        |
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path

from hvmgr import errors
from hvmgr.host.domain import State, StopReason
from hvmgr.model import configuration, retention, tree
from hvmgr.model.metadata import SnapshotRecord, SnapshotType
from hvmgr.model.policy import Origin, Policy, SnapshotDefault
from hvmgr.operations import merge, policies, replacement, vms, working
from hvmgr.operations.replacement import Replacement
from hvmgr.operations.session import Session
from hvmgr.operations.snapshots import Wish
from hvmgr.operations.steps import domain_steps
from hvmgr.operations.vm import VM
from hvmgr.storage import diary, images, journal, vm_home
from hvmgr.storage.diary import Diary

QUIET = timedelta(minutes=2)
UNDO_RESTS = timedelta(hours=24)  # what somebody put away is left alone that long
START_LASTS = timedelta(minutes=15)  # a snapshot taken later would not be of the start
DEPTH_MAX = 100  # images in a chain: automatic snapshots leave room for those that people take
RECOVERY_LASTS = timedelta(hours=1)  # later somebody may have plans of his own with a VM that is off
RECOVERIES_MAX = 3
RECOVERIES_WITHIN = timedelta(hours=1)

_ACTIVE = (State.RUNNING, State.PAUSED)


class Action(StrEnum):
    """What was done, for machines."""

    SNAPSHOT = "snapshot-taken"
    DELETED = "snapshots-deleted"
    MERGED = "images-merged"
    RECOVERED = "recovered"
    GIVEN_UP = "recovery-given-up"


@dataclass(frozen=True, slots=True)
class Deed:
    """One thing that was done; ``failure`` is what was not, and will not be tried again."""

    vm_id: str
    name: str
    action: Action
    sentence: str
    snapshots: tuple[str, ...] = ()
    failure: errors.HvmgrError | None = None


def at_start(one: VM, started: datetime, now: datetime) -> Iterator[Deed]:
    """The state that the VM was started in can be applied, as long as there is no other one."""
    policy = one.policy
    if not policy.takes_snapshots or one.home.entries():
        return
    if now - started > START_LASTS:
        one.host.reporter.notice(f"{one.name}: its start is too long ago for a snapshot of it")
        return
    with working.on(one, patient=False) as session:
        if session.state() in _ACTIVE and not one.home.entries():
            require_rest(session, now)
            yield _take_at_start(one, session, policy)


def after_stop(one: VM, told: str, stopped: datetime, now: datetime) -> Iterator[Deed]:
    """The VM is off; ``told`` is why, in the hook's words, for where libvirt does not know it any more."""
    with working.on(one, patient=False) as session:
        if session.state() is not State.OFF:
            return
        reason = session.domain().stop_reason()
        if reason is StopReason.UNKNOWN and told in set(StopReason):
            reason = StopReason(told)
        if reason is StopReason.CRASHED and one.policy.recovery is not None:
            yield from _recover(one, session, stopped, now)
            return
        if reason is StopReason.SHUTDOWN and one.policy.takes_snapshots:
            yield from _delete(one, session, retention.after_clean_stop(*_facts(one)), now)


def on_schedule(one: VM, now: datetime) -> Iterator[Deed]:
    """A turn that was missed is made up for once."""
    policy = one.policy
    if not _is_due(one, policy, now):
        return
    with working.on(one, patient=False) as session:
        policy, state = one.policy, session.state()
        if not _is_due(one, policy, now) or state not in (*_ACTIVE, State.OFF, State.SAVED):
            return
        if state not in _ACTIVE and not has_written(session):
            _note(session, Diary(now, diary.read(session.layout).recoveries))
            return
        try:
            require_rest(session, now)
            _require_short_chains(one)
            deed = _take(one, session, Origin.SCHEDULE, SnapshotType(policy.type.value))
        except (errors.NoSpace, errors.HostFailed, errors.Busy, errors.Cancelled):
            raise  # the same turn is tried again
        except errors.HvmgrError:
            _note(session, Diary(now, diary.read(session.layout).recoveries))
            raise
        _note(session, Diary(now, diary.read(session.layout).recoveries))
        yield deed


def _require_short_chains(one: VM) -> None:
    if (depth := one.home.present_tree().depth()) > DEPTH_MAX:
        raise errors.Conflict(
            f"the disks of {one.name} stand on chains of {depth} images: no more are added automatically",
            hint=f"delete snapshots, or keep fewer: hvmgr vm set {one.name} --keep N",
        )


def prune(one: VM, now: datetime) -> Iterator[Deed]:
    """Only what hvmgr took by itself, and nobody has shown interest in."""
    if not retention.to_delete(*_facts(one)):
        return
    with working.on(one, patient=False) as session:
        yield from _delete(one, session, retention.to_delete(*_facts(one)), now)


def merge_waiting(one: VM, now: datetime, stop: Callable[[], bool]) -> Iterator[Deed]:
    """Images of snapshots that are gone; when somebody wants to work on the VM, or ``stop`` says so, it goes on later.

    A VM that has just ended may be started again at once, and could not be while its images are merged.
    """
    if not journal.is_open(one.home.layout.journal) and not tree.pending(one.home.tree()):
        return
    asked, gave_way = one.home.layout.give_way.exists, False

    def has_to_stop() -> bool:
        nonlocal gave_way
        gave_way = gave_way or asked() or stop()
        return gave_way

    try:  # around all of it: a merge that a dead command left to the running VM is followed before there is a session
        with working.on(one, stop=has_to_stop) as session:
            waiting = merge.plan_merge(session)
            if not waiting.finish:
                return
            if not session.is_active() and abs(now - _last_written(session)) < QUIET:
                raise errors.Busy(f"{one.name} was at work a moment ago: its images are merged later")
            working.carry_out(session, waiting)
            yield _deed(one, Action.MERGED, f"merged images of {one.name} that had waited")
    except errors.Cancelled as error:
        if not gave_way:
            raise
        raise errors.Busy(f"there is other work to do: images of {one.name} are merged later") from error


def _last_written(session: Session) -> datetime:
    """About when a VM that is off was switched off."""
    moments = [Path(path).stat().st_mtime for path in session.home.present_tree().present.disks.values()]
    return datetime.fromtimestamp(max(moments, default=0), UTC)


def require_rest(session: Session, now: datetime) -> None:
    """Busy while the undo slot holds what somebody put away lately."""
    try:
        filled = datetime.fromtimestamp(session.layout.undo.stat().st_mtime, UTC)
    except FileNotFoundError:
        return
    if now - filled < UNDO_RESTS:
        until = (filled + UNDO_RESTS).astimezone()
        raise errors.Busy(
            f"the undo slot of {session.home.name} holds what was put away at {filled.astimezone():%Y-%m-%d %H:%M}: "
            f"nothing that would empty it is done automatically before {until:%Y-%m-%d %H:%M}",
            hint="any snapshot operation of a person's ends that",
        )


def has_written(session: Session) -> bool:
    """Whether the disks of a VM that is off differ from those of the snapshot above its present."""
    present = session.home.present_tree()
    if present.present.parent is None:
        return True
    working = [present.chain(path)[0] for path in present.present.disks.values()]
    return any(image.parent is None or domain_steps.holds_data(image.path) for image in working)


def _was_edited(session: Session) -> bool:
    """Whether the VM's configuration is another than an apply of the snapshot above its present has made it."""
    present = session.home.present()
    facts = vm_home.require_facts(present)
    if facts.parent is None:
        return True
    now, then = present.without_metadata(), session.home.snapshot(facts.parent).without_metadata()
    then.set_name(now.name)
    if now.genid is not None:
        then.set_genid(now.genid)
    if now.nvram is not None and then.nvram is not None:
        then.set_nvram(now.nvram)
    for disk in then.disks():
        mine = now.find_disk(disk.slot)
        if disk.takes_part and mine is not None and mine.source is not None:
            then.set_disk_source(disk.slot, Path(mine.source), mine.format or images.RAW)
        elif disk.is_removable and disk.source is not None and not Path(disk.source).exists():
            then.eject(disk.slot)
    for one in (now, then):
        one.strip_backing_chains()
    return not configuration.same(now.to_xml(), then.to_xml())


def _recover(one: VM, session: Session, stopped: datetime, now: datetime) -> Iterator[Deed]:
    """Back to the snapshot; what the VM had come to becomes one of its own, so that nothing is lost.

    The attempt is noted first: whatever kills it, there are no more than a few.
    """
    target = _target(one)
    if now - stopped > RECOVERY_LASTS:
        one.host.reporter.notice(
            f"{one.name} crashed at {stopped.astimezone():%Y-%m-%d %H:%M}: too long ago to put it back"
        )
        return
    if target is None:
        failure: errors.HvmgrError = errors.NotFound(
            f"{one.name} crashed, and the snapshot that it was to go back to is not there: it stays off",
            hint=f"choose another one: hvmgr vm set {one.name} --recovery revert:SNAPSHOT",
        )
        yield _deed(one, Action.GIVEN_UP, failure.message, failure=failure)
        return
    require_rest(session, now)
    known = diary.read(session.layout)
    recent = tuple(moment for moment in known.recoveries if abs(now - moment) < RECOVERIES_WITHIN)
    if len(recent) >= RECOVERIES_MAX:
        failure = errors.Conflict(
            f"{one.name} crashed again, after it was put back {len(recent)} times within an hour: it stays off",
            hint=f"see why, then start it: hvmgr vm start {one.name}",
        )
        yield _deed(one, Action.GIVEN_UP, failure.message, failure=failure)
        return
    _note(session, Diary(known.scheduled, (*recent, now)))
    if has_written(session) or _was_edited(session):
        yield _take(one, session, Origin.CRASH, SnapshotType.STANDARD)
        session.forget_uses()
    working.carry_out(session, replacement.plan_apply(session, target.id, Replacement(keep_undo=False)))
    if session.state() is State.OFF:
        vms.start(session)
    sentence = f"{one.name} crashed; it was put back to snapshot '{target.name}' and started"
    yield _deed(one, Action.RECOVERED, sentence, target.id)


def _target(one: VM) -> SnapshotRecord | None:
    """Where the VM goes back to; what it had come to at an earlier crash is no such place."""
    records, above = _facts(one)[:2]
    known = {record.id: record for record in records}
    recovery = one.policy.recovery
    if recovery is not None and recovery.snapshot is not None:
        return known.get(recovery.snapshot)
    while above is not None and (record := known.get(above)) is not None:
        if record.automatic is not Origin.CRASH:
            return record
        above = record.parent
    return None


def _take(one: VM, session: Session, why: Origin, kind: SnapshotType) -> Deed:
    made = one._create(session, Wish(type=kind, automatic=why))  # noqa: SLF001 - as people's are made
    return _deed(one, Action.SNAPSHOT, f"took snapshot '{made.name}' of {one.name}", made.id)


def _delete(one: VM, session: Session, gone: list[str], now: datetime) -> Iterator[Deed]:
    """The snapshots go at once; their images wait for ``merge_waiting``, for which nobody else has to wait."""
    if not gone:
        return
    require_rest(session, now)
    names = [f"'{one.home.entry(snapshot_id).record.name}'" for snapshot_id in gone]
    working.carry_out(session, merge.plan_delete(session, gone, merging=False))
    session.forget_uses()
    yield _deed(one, Action.DELETED, f"deleted {', '.join(names)} of {one.name}", *gone)


def _take_at_start(one: VM, session: Session, policy: Policy) -> Deed:
    """No agent answers yet; and the disks are at rest, as the guest left them when it was switched off.

    That is why the disks alone do as well, where the memory cannot be saved.
    """
    if policy.type is SnapshotDefault.STANDARD:
        try:
            return _take(one, session, Origin.START, SnapshotType.STANDARD)
        except (errors.Busy, errors.Vetoed):
            raise
        except (errors.Unsupported, errors.Conflict, errors.NoSpace) as error:
            session.say(f"a snapshot of the disks alone is taken at the start of {one.name}: {error}")
    return _take(one, session, Origin.START, SnapshotType.DISK_ONLY)


def _is_due(one: VM, policy: Policy, now: datetime) -> bool:
    if not policy.takes_snapshots or policy.schedule is None:
        return False
    taken = [record.created for record in _facts(one)[0] if record.automatic is Origin.SCHEDULE]
    noted = (diary.read(one.home.layout).scheduled, policy.since)
    return retention.is_due(policy.schedule, [*taken, *(moment for moment in noted if moment is not None)], now)


def _facts(one: VM) -> tuple[list[SnapshotRecord], str | None, Policy]:
    """What decides which snapshots go, as the home says now."""
    facts = one.home.facts()
    keep, _ = policies.kept(facts.policy)
    return [entry.record for entry in one.home.entries()], facts.parent, dataclasses.replace(facts.policy, keep=keep)


def _note(session: Session, what: Diary) -> None:
    if not session.dry_run:
        diary.write(session.layout, what)


def _deed(one: VM, action: Action, sentence: str, *ids: str, failure: errors.HvmgrError | None = None) -> Deed:
    return Deed(one.id, one.name, action, sentence, ids, failure)
