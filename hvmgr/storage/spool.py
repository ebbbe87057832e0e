"""What libvirt's hook has told, until somebody has seen to it: one empty file for each event, its name says all.

    <runtime folder>/events/new/<time in ns>_<vm id>_<event>_<reason>       written by ``faces/hook.py``
    <runtime folder>/events/taken/…                                         a worker has seen it, and may have to wait

A file appears at once and as a whole, twice the same is two files. ``new`` is empty when every event was seen: that is
what systemd's path unit watches. The folder is gone with the host's next start, and so is every VM that it speaks of.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from hvmgr import settings
from hvmgr.storage import durable

_NAME = re.compile(r"(\d{1,20})_([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})_(started|release)_([a-z]*)")


class Event(StrEnum):
    """The hook's operations of which it leaves a word."""

    STARTED = "started"
    RELEASE = "release"


@dataclass(frozen=True, slots=True)
class Marker:
    """One event; ``reason`` is what libvirt 10.5 and newer say of an end, else ''."""

    file: Path
    vm_id: str
    event: Event
    time: datetime
    reason: str


def folder() -> Path:
    """Where the hook writes."""
    return settings.runtime_folder() / "events" / "new"


def look(*, take: bool) -> list[Marker]:
    """Every event that nobody has settled yet, oldest first; with ``take`` none of them is new from here on.

    What is no event is none of ours: it is left in ``new``'s neighbour, where it starts nothing.
    """
    new, taken = folder(), folder().with_name("taken")
    with durable.explained(new):
        if take and new.is_dir():
            durable.make_folder(taken, mode=0o700)
            for file in sorted(new.iterdir()):
                durable.rename(file, taken / file.name)
        files = [file for place in (new, taken) if place.is_dir() for file in place.iterdir()]
    found = [marker for marker in map(_read, files) if marker is not None]
    return sorted(found, key=lambda one: (one.time, one.file.name))


def has_news() -> bool:
    """Whether something happened that nobody has looked at yet."""
    try:
        with os.scandir(folder()) as entries:
            return next(entries, None) is not None
    except OSError:
        return False


def settle(markers: Iterable[Marker]) -> None:
    """What these events asked for is done."""
    for one in markers:
        durable.remove(one.file)


def _read(file: Path) -> Marker | None:
    match = _NAME.fullmatch(file.name)
    if match is None or not file.is_file():
        return None
    try:
        moment = datetime.fromtimestamp(int(match[1]) / 1e9, UTC)
    except (OverflowError, ValueError, OSError):
        return None
    return Marker(file, match[2], Event(match[3]), moment, match[4])
