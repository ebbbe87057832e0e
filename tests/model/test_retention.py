"""Which automatic snapshots go, and when the next one is due: against the words of docs/automatic.md, for any history."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvmgr import errors, keeping
from hvmgr.keeping import Keep
from hvmgr.model import policy, retention
from hvmgr.model.metadata import SnapshotRecord
from hvmgr.model.policy import Origin, Policy, Recovery, Rhythm, Schedule, SnapshotDefault

BERLIN = ZoneInfo("Europe/Berlin")
BEGIN = datetime(2026, 10, 20, tzinfo=UTC)  # the clocks are put back on the 25th
ON = Policy(automatic=True, keep=Keep(last=2))

moments = st.lists(st.integers(0, 15 * 24 * 60), unique=True, max_size=40).map(
    lambda minutes: [BEGIN + timedelta(minutes=one) for one in minutes]
)
keeps = st.builds(Keep, st.integers(0, 5), st.integers(0, 8), st.integers(0, 5), st.integers(0, 3))


def record(moment, origin=Origin.SCHEDULE, **more):
    return SnapshotRecord(id=moment.isoformat(), name="x", created=moment, automatic=origin, **more)


def line(*origins):
    """Snapshots one above the other, an hour apart."""
    records = []
    for number, origin in enumerate(origins):
        parent = records[-1].id if records else None
        records.append(record(BEGIN + timedelta(hours=number), origin, parent=parent))
    return records


def gone(records, keep):
    by_age = sorted(records, key=lambda one: one.created)
    return {one.id for one in retention.superseded(by_age, keep, BERLIN)}


# --- the numbers ----------------------------------------------------------------------------------------------------


def by_hand(records, keep):
    """The same in other words: walk back from the newest, and count the periods that were met."""
    kept = set()
    newest_first = sorted(records, key=lambda one: one.created, reverse=True)
    for count, period in [
        (keep.last, lambda one: one.id),
        (keep.hourly, lambda one: int(one.created.timestamp()) // 3600),
        (keep.daily, lambda one: f"{one.created.astimezone(BERLIN):%Y-%m-%d}"),
        (keep.weekly, lambda one: f"{one.created.astimezone(BERLIN):%G-%V}"),
    ]:
        met = []
        for one in newest_first:
            if period(one) not in met and len(met) < count:
                met.append(period(one))
                kept.add(one.id)
    return {one.id for one in records} - kept


@given(moments, keeps)
def test_each_rule_keeps_the_newest_of_its_newest_periods(found, keep):
    records = [record(moment) for moment in found]
    assert gone(records, keep) == by_hand(records, keep)


@given(moments, keeps)
def test_what_was_kept_is_kept_again(found, keep):
    records = [record(moment) for moment in found]
    left = [one for one in records if one.id not in gone(records, keep)]
    assert gone(left, keep) == set()


@given(moments, keeps)
def test_looking_after_each_snapshot_leaves_what_looking_once_leaves(found, keep):
    left = []
    for moment in sorted(found):
        left.append(record(moment))
        left = [one for one in left if one.id not in gone(left, keep)]
    everything = [record(moment) for moment in found]
    assert {one.id for one in left} == {one.id for one in everything} - gone(everything, keep)


@given(moments, keeps, st.sampled_from(["last", "hourly", "daily", "weekly"]))
def test_keeping_more_removes_no_other(found, keep, rule):
    records = [record(moment) for moment in found]
    more = dataclasses.replace(keep, **{rule: getattr(keep, rule) + 1})
    assert gone(records, more) <= gone(records, keep)


# --- what stays whatever the numbers say ----------------------------------------------------------------------------

trees = st.lists(
    st.tuples(st.sampled_from([None, *Origin]), st.integers(0, 30), st.booleans()), min_size=1, max_size=12
)


@given(trees, st.integers(0, 30), st.integers(-1, 12))
def test_nothing_of_a_persons_goes_and_no_place_that_somebody_went_back_to(shape, present, target):
    records = []
    for number, (origin, above, damaged) in enumerate(shape):
        parent = records[above % number].id if number and above % (number + 1) else None
        moment = BEGIN + timedelta(hours=number)
        records.append(record(moment, origin, parent=parent, damaged=("vda",) if damaged else ()))
    now = records[present % len(records)]
    recovery = Recovery(records[target].id) if 0 <= target < len(records) else None
    wanted = dataclasses.replace(ON, keep=Keep(last=1), recovery=recovery)
    by_id = {one.id: one for one in records}
    for ids in (retention.to_delete(records, now.id, wanted), retention.after_clean_stop(records, now.id, wanted)):
        for one in ids:
            standing = [other for other in records if other.parent == one]
            assert by_id[one].automatic is not None
            assert not by_id[one].damaged
            assert recovery is None or recovery.snapshot != one
            assert len(standing) + (now.id == one) <= 1
            assert now.id != one or one == records[-1].id


def test_a_line_is_cut_at_its_old_end():
    records = line(*[Origin.SCHEDULE] * 4)
    assert retention.to_delete(records, records[-1].id, ON) == [one.id for one in records[:2]]


def test_persons_snapshot_in_between_counts_for_nothing():
    records = line(Origin.SCHEDULE, None, Origin.SCHEDULE, Origin.SCHEDULE, None)
    assert retention.to_delete(records, records[-1].id, ON) == [records[0].id]


def test_place_to_go_on_from_stays():
    records = line(*[Origin.SCHEDULE] * 4)
    branch = dataclasses.replace(records[3], parent=records[0].id)
    assert retention.to_delete([*records[:3], branch], branch.id, ON) == [records[1].id]
    assert retention.to_delete(records, records[1].id, ON) == [records[0].id]


def test_what_was_taken_before_the_clock_was_set_back_is_older():
    """A clock that was years ahead for an hour would else have all that comes after it deleted at once."""
    ahead = [
        dataclasses.replace(one, created=one.created + timedelta(days=1000)) for one in line(*[Origin.SCHEDULE] * 3)
    ]
    mine = record(BEGIN + timedelta(hours=10), None, parent=ahead[-1].id)
    first = record(BEGIN + timedelta(hours=11), parent=mine.id)
    second = record(BEGIN + timedelta(hours=12), parent=first.id)
    records = [*ahead, mine, first, second]
    assert retention.to_delete(records, second.id, ON) == [one.id for one in ahead]
    hourly = dataclasses.replace(ON, keep=Keep(hourly=2))
    assert retention.to_delete(records, second.id, hourly) == [one.id for one in ahead]


def test_only_what_is_wanted_goes():
    records = line(*[Origin.SCHEDULE] * 4, *[Origin.CRASH] * 5, Origin.START)
    present = records[-1].id
    crashes = [one.id for one in records[4:6]]
    assert retention.to_delete(records, present, dataclasses.replace(ON, automatic=False)) == crashes
    assert retention.to_delete(records, present, dataclasses.replace(ON, type=SnapshotDefault.DISABLED)) == crashes
    assert retention.after_clean_stop(records, present, ON) == [present]
    assert retention.to_delete([], None, ON) == retention.after_clean_stop([], None, ON) == []


# --- when -----------------------------------------------------------------------------------------------------------


def local(text):
    return datetime.fromisoformat(text).replace(tzinfo=BERLIN).astimezone(UTC)


@pytest.mark.parametrize(
    ("schedule", "last", "not_yet", "due"),
    [
        ("hourly", "2026-11-03 10:05", "2026-11-03 10:59:59", "2026-11-03 11:00"),
        ("daily", "2026-11-03 00:01", "2026-11-03 23:59:59", "2026-11-04 00:00"),
        ("daily@02:30", "2026-11-03 02:30", "2026-11-04 02:29", "2026-11-04 02:30"),
        ("daily@23:00", "2026-11-03 01:00", "2026-11-03 22:59", "2026-11-03 23:00"),
        ("daily@12:00", "2026-10-24 12:00", "2026-10-25 11:59", "2026-10-25 12:00"),  # 25 hours
        ("daily@12:00", "2026-03-28 12:00", "2026-03-29 11:59", "2026-03-29 12:00"),  # 23 hours
        ("weekly", "2026-11-02 00:00", "2026-11-08 23:59", "2026-11-09 00:00"),
        ("weekly@sun@02:30", "2026-11-01 02:31", "2026-11-08 02:29", "2026-11-08 02:30"),
        ("30m", "2026-11-03 10:05", "2026-11-03 10:33:59", "2026-11-03 10:34:01"),
        ("6h", "2026-10-25 00:00", "2026-10-25 04:58", "2026-10-25 05:00"),  # the clocks were put back in between
    ],
)
def test_turn(schedule, last, not_yet, due):
    parsed = policy.parse_schedule(schedule)
    assert str(parsed) == schedule
    assert not retention.is_due(parsed, [local(last)], local(not_yet), BERLIN)
    assert retention.is_due(parsed, [local(last), BEGIN - timedelta(days=400)], local(due), BERLIN)


schedules = st.one_of(
    st.builds(Schedule, st.just(Rhythm.INTERVAL), st.integers(15, 9 * 24 * 60)),
    st.builds(Schedule, st.just(Rhythm.DAILY), st.integers(0, 24 * 60 - 1)),
    st.builds(Schedule, st.just(Rhythm.WEEKLY), st.integers(0, 7 * 24 * 60 - 1)),
    st.just(Schedule(Rhythm.HOURLY)),
)


@given(schedules)
def test_schedule_is_written_as_it_is_read(schedule):
    assert policy.parse_schedule(str(schedule)) == schedule


@given(keeps.filter(lambda keep: keep != Keep()))
def test_keep_is_written_as_it_is_read(keep):
    assert keeping.parse(str(keep)) == keep


@given(schedules, st.integers(0, 20 * 24 * 60), st.integers(0, 20 * 24 * 60))
def test_one_that_was_just_taken_is_never_due_and_one_long_ago_always(schedule, minutes, more):
    now = BEGIN + timedelta(minutes=minutes)
    assert not retention.is_due(schedule, [now], now, BERLIN)
    assert retention.is_due(schedule, [now - timedelta(days=15, minutes=more)], now, BERLIN)
    assert retention.is_due(schedule, [], now, BERLIN)
    assert retention.is_due(schedule, [now + timedelta(minutes=1 + more)], now, BERLIN)  # the clock was set back


def test_without_a_zone_it_is_this_hosts():
    now = datetime(2026, 11, 3, 12, tzinfo=UTC)
    midnight = now.astimezone().replace(hour=0, minute=0)
    daily = policy.parse_schedule("daily")
    assert not retention.is_due(daily, [midnight], now)
    assert retention.is_due(daily, [midnight - timedelta(seconds=1)], now)


@pytest.mark.parametrize(
    "text", ["", "0", "65", "last=2,last=3", "yearly=2", "last=-1", "last=40,daily=30", "3,4", "last"]
)
def test_wrong_numbers_are_refused(text):
    with pytest.raises(errors.UsageError):
        keeping.parse(text)


@pytest.mark.parametrize(
    "text", ["", "5m", "0h", "400d", "daily@24:00", "daily@sun", "hourly@05:00", "weekly@foo", "2w"]
)
def test_wrong_schedules_are_refused(text):
    with pytest.raises(errors.UsageError):
        policy.parse_schedule(text)
