"""What hvmgr does with a VM by itself: values, and the words that people and files have for them.

    <hvmgr:policy type="production" automatic="on" keep="last=3,daily=7" schedule="daily@02:30"
                  since="2026-11-29T20:14:05.000000Z" recovery="revert" snapshot="SNAPSHOT-ID"/>

Every attribute is absent where it says what it says by default; so is the element where all are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from hvmgr import errors
from hvmgr.keeping import Keep

MINUTES_MIN = 15  # the timer looks every 5 minutes
_MINUTES_MAX = 366 * 24 * 60
_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_MINUTES = {"m": 1, "h": 60, "d": 24 * 60}
_INTERVAL = re.compile(r"([1-9]\d{0,5})([mhd])")
_CALENDAR = re.compile(rf"(daily|weekly)(?:@({'|'.join(_DAYS)}))?(?:@([01]\d|2[0-3]):([0-5]\d))?")


class SnapshotDefault(StrEnum):
    """What snapshots of a VM are when nobody says otherwise; Hyper-V's CheckpointType."""

    STANDARD = "standard"
    PRODUCTION = "production"
    PRODUCTION_ONLY = "production-only"
    DISABLED = "disabled"


class Origin(StrEnum):
    """Why there is a snapshot that nobody asked for."""

    START = "start"  # the VM was started and had none
    SCHEDULE = "schedule"  # its time had come
    CRASH = "crash"  # the VM crashed and was put back: this is what it had come to


class Rhythm(StrEnum):
    """By what a schedule goes."""

    INTERVAL = "interval"
    HOURLY = "hourly"
    DAILY = "daily"
    WEEKLY = "weekly"


@dataclass(frozen=True, slots=True)
class Schedule:
    """When snapshots are taken: ``minutes`` after the last one, or else that many after the hour, midnight or the week began.

    Days and weeks are those of this host's time zone; a week begins on Monday.
    """

    rhythm: Rhythm
    minutes: int = 0

    def __str__(self) -> str:
        if self.rhythm is Rhythm.INTERVAL:
            unit = next(one for one in ("d", "h", "m") if self.minutes % _MINUTES[one] == 0)
            return f"{self.minutes // _MINUTES[unit]}{unit}"
        days, minutes = divmod(self.minutes, 24 * 60)
        text = self.rhythm.value
        if self.rhythm is Rhythm.WEEKLY and days:
            text += f"@{_DAYS[days]}"
        return text + (f"@{minutes // 60:02}:{minutes % 60:02}" if minutes else "")


@dataclass(frozen=True, slots=True)
class Recovery:
    """After a crash the VM goes back: to ``snapshot`` (its id), or to the one above its present."""

    snapshot: str | None = None


@dataclass(frozen=True, slots=True)
class Policy:
    """All of it for one VM; ``since`` is when its schedule was set. ``recovery`` None: after a crash it stays off.

    ``keep`` None: as many scheduled snapshots as this host's configuration says.

    What another hvmgr, or a hand, wrote and this one does not understand asks for nothing, and stays as it is in the file.
    """

    type: SnapshotDefault = SnapshotDefault.STANDARD
    automatic: bool = False
    keep: Keep | None = None
    schedule: Schedule | None = None
    since: datetime | None = None
    recovery: Recovery | None = None
    understood: bool = True

    @property
    def takes_snapshots(self) -> bool:
        """Whether hvmgr takes and removes any by itself."""
        return self.automatic and self.type is not SnapshotDefault.DISABLED


DEFAULT = Policy()


def parse_schedule(text: str) -> Schedule:
    """``hourly``, ``daily``, ``daily@02:30``, ``weekly@sun``, ``weekly@sun@02:30``, ``30m``, ``6h``, ``2d``."""
    word = text.strip().lower()
    if word == Rhythm.HOURLY:
        return Schedule(Rhythm.HOURLY)
    if match := _INTERVAL.fullmatch(word):
        minutes = int(match[1]) * _MINUTES[match[2]]
        if not MINUTES_MIN <= minutes <= _MINUTES_MAX:
            raise errors.UsageError(
                f"'{text}' is no time between two snapshots", hint=f"{MINUTES_MIN}m is the shortest, 366d the longest"
            )
        return Schedule(Rhythm.INTERVAL, minutes)
    match = _CALENDAR.fullmatch(word)
    if match is None or (match[1] == Rhythm.DAILY and match[2]):
        raise errors.UsageError(
            f"'{text}' is no schedule",
            hint="write hourly, daily, daily@02:30, weekly, weekly@sun@02:30, or a time between two, such as 30m or 6h",
        )
    days = _DAYS.index(match[2]) if match[2] else 0
    return Schedule(Rhythm(match[1]), days * 24 * 60 + int(match[3] or 0) * 60 + int(match[4] or 0))
