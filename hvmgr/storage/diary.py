"""What hvmgr did with one VM by itself: when its last scheduled snapshot was, and when it was put back after crashes.

A note in the home. Where it is lost, the snapshots themselves say when they were taken, and the count of crashes begins
anew: nothing depends on it but patience.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime

from hvmgr import units
from hvmgr.model.layout import Layout
from hvmgr.storage import durable


@dataclass(frozen=True, slots=True)
class Diary:
    """``scheduled``: the last turn that was kept; ``recoveries``: the latest returns after a crash, oldest first."""

    scheduled: datetime | None = None
    recoveries: tuple[datetime, ...] = ()


def read(layout: Layout) -> Diary:
    """The note; an empty one where there is none, or none that can be understood."""
    try:
        facts = json.loads(layout.diary.read_bytes())
        scheduled = facts.get("scheduled")
        return Diary(
            scheduled=None if scheduled is None else units.from_rfc3339(scheduled),
            recoveries=tuple(units.from_rfc3339(one) for one in facts.get("recoveries", [])),
        )
    except (OSError, ValueError, TypeError, AttributeError):
        return Diary()


def write(layout: Layout, diary: Diary) -> None:
    """The note says this; the home's lock is held."""
    facts = {
        "scheduled": None if diary.scheduled is None else units.to_rfc3339(diary.scheduled),
        "recoveries": [units.to_rfc3339(one) for one in diary.recoveries],
    }
    durable.write_file(layout.diary, json.dumps(facts).encode())
