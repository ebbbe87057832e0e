"""Which automatic snapshots go, and when the next one is due. Pure: moments come in, and the time zone.

A snapshot goes only when hvmgr took it by itself and nobody has shown interest in it since. Renaming it or giving it
notes makes it a person's own. Besides that it stays, whatever the numbers say, while

- the VM would go back to it after a crash,
- more than one snapshot or present stands on it: somebody went back to it and went on another way,
- the present stands on it although there are newer ones: somebody went back to it,
- it is damaged: somebody has to see that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta, tzinfo

from hvmgr.keeping import KEEP, Keep
from hvmgr.model.metadata import SnapshotRecord
from hvmgr.model.policy import Origin, Policy, Rhythm, Schedule

CRASHES = Keep(last=3)
_SLACK = timedelta(minutes=1)  # a timer is never exact, and must not miss its turn by a second


def to_delete(
    records: Sequence[SnapshotRecord], now_parent: str | None, policy: Policy, zone: tzinfo | None = None
) -> list[str]:
    """The ids of the scheduled snapshots that are not to be kept, and of those of crashes; oldest first."""
    rules = [(Origin.CRASH, CRASHES), *([(Origin.SCHEDULE, policy.keep or KEEP)] if policy.takes_snapshots else [])]
    by_age = _by_age(records)
    gone = {
        one.id
        for origin, keep in rules
        for one in superseded([record for record in by_age if record.automatic is origin], keep, zone)
    }
    free = _free(by_age, now_parent, policy)
    return [one.id for one in by_age if one.id in gone & free]


def after_clean_stop(records: Sequence[SnapshotRecord], now_parent: str | None, policy: Policy) -> list[str]:
    """The ids of the snapshots that were taken at a start, which a clean stop makes needless."""
    by_age = _by_age(records)
    free = _free(by_age, now_parent, policy)
    return [one.id for one in by_age if one.automatic is Origin.START and one.id in free]


def superseded(by_age: Sequence[SnapshotRecord], keep: Keep, zone: tzinfo | None = None) -> list[SnapshotRecord]:
    """What no rule keeps, oldest first as they come. Each rule keeps the newest of each of its newest periods that have any."""
    newest_first = by_age[::-1]
    kept = {one.id for one in newest_first[: keep.last]}
    rules: tuple[tuple[int, Callable[[datetime], object]], ...] = (
        (keep.hourly, lambda moment: moment.astimezone(UTC).replace(minute=0, second=0, microsecond=0)),
        (keep.daily, lambda moment: moment.astimezone(zone).date()),
        (keep.weekly, lambda moment: moment.astimezone(zone).isocalendar()[:2]),
    )
    for count, period in rules:
        firsts: dict[object, str] = {}
        for one in newest_first:
            firsts.setdefault(period(one.created), one.id)
        kept |= set(list(firsts.values())[:count])
    return [one for one in newest_first[::-1] if one.id not in kept]


def is_due(schedule: Schedule, known: Iterable[datetime], now: datetime, zone: tzinfo | None = None) -> bool:
    """Whether a snapshot is to be taken now, when the others are ``known``; turns that were missed count once.

    One from the future means that the clock was set back: it does not count, for waiting could take for ever.
    """
    last = max((one for one in known if one <= now), default=None)
    if last is None:
        return True
    if schedule.rhythm is Rhythm.INTERVAL:
        return now - last >= timedelta(minutes=schedule.minutes) - _SLACK
    return _latest_turn(schedule, now, zone) > last


def _latest_turn(schedule: Schedule, now: datetime, zone: tzinfo | None) -> datetime:
    local = now.astimezone(zone)
    if schedule.rhythm is Rhythm.HOURLY:
        return local.replace(minute=0, second=0, microsecond=0)
    midnight = local.replace(hour=0, minute=0, second=0, microsecond=0, tzinfo=None)
    period = timedelta(days=1 if schedule.rhythm is Rhythm.DAILY else 7)
    begin = midnight if schedule.rhythm is Rhythm.DAILY else midnight - timedelta(days=local.weekday())
    turn = _as_utc(begin + timedelta(minutes=schedule.minutes), zone)
    return turn if turn <= now else _as_utc(begin + timedelta(minutes=schedule.minutes) - period, zone)


def _as_utc(wall: datetime, zone: tzinfo | None) -> datetime:
    """What the clock on the wall means; without a zone that of this host."""
    return (wall if zone is None else wall.replace(tzinfo=zone)).astimezone(UTC)


def _free(by_age: Sequence[SnapshotRecord], now_parent: str | None, policy: Policy) -> set[str]:
    """Those in which nobody has shown interest."""
    standing = Counter([*(one.parent for one in by_age), now_parent])
    newest = by_age[-1].id if by_age else None
    target = None if policy.recovery is None else policy.recovery.snapshot
    return {
        one.id
        for one in by_age
        if one.automatic is not None
        and not one.damaged
        and one.id != target
        and standing[one.id] <= 1
        and (one.id != now_parent or one.id == newest)
    }


def _by_age(records: Iterable[SnapshotRecord]) -> list[SnapshotRecord]:
    """Oldest first. None is older than what it stands on, whatever the clock said then: it may have been set back."""
    known = {one.id: one for one in records}
    ages: dict[str, tuple[datetime, int]] = {}
    for one in known.values():
        line: dict[str, SnapshotRecord] = {}
        above: SnapshotRecord | None = one
        while above is not None and above.id not in ages and above.id not in line:
            line[above.id] = above
            above = known.get(above.parent or "")
        for each in reversed(line.values()):
            latest, depth = ages.get(each.parent or "", (each.created, 0))
            ages[each.id] = (max(each.created, latest), depth + 1)
    return sorted(known.values(), key=lambda one: (*ages[one.id], one.id))
