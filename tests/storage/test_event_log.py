"""The log of events: read from either end, through its turns, and whatever else writes into it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hvmgr import settings
from hvmgr.storage import event_log


def numbers(reader):
    return [one["number"] for one in reader.documents()]


def append(*wanted, size=0):
    for number in wanted:
        event_log.append({"number": number, "padding": "x" * size})


def test_reader_of_nothing_waits_for_the_first_event():
    reader = event_log.Reader(from_start=False)
    assert numbers(reader) == []
    append(1)
    assert numbers(reader) == [1]
    append(2, 3)
    assert numbers(reader) == [2, 3]
    reader.close()


def test_late_reader_sees_new_events_or_all():
    append(1, 2)
    late, whole = event_log.Reader(from_start=False), event_log.Reader(from_start=True)
    append(3)
    assert numbers(late) == [3]
    assert numbers(whole) == [1, 2, 3]


def test_no_event_is_missed_or_told_twice_when_the_log_turns(monkeypatch):
    monkeypatch.setattr(event_log, "LIMIT", 1000)
    early = event_log.Reader(from_start=False)
    told = []
    for number in range(40):
        append(number, size=150)
        if number % 3 == 0:
            told += numbers(early)
    assert told + numbers(early) == list(range(40))
    folder = settings.index_folder() / "events"
    assert sorted(path.name for path in folder.iterdir()) == ["lock", "log", "log.1"]
    assert all(path.stat().st_size <= 1000 for path in folder.iterdir())
    kept = numbers(event_log.Reader(from_start=True))
    assert kept == list(range(kept[0], 40))
    assert len(kept) > 3


def test_reader_that_opened_before_the_turn_sees_each_event_once(monkeypatch):
    append(1, 2)
    whole = event_log.Reader(from_start=True)
    monkeypatch.setattr(event_log, "LIMIT", 1)
    append(3)
    assert numbers(whole) == [1, 2, 3]


@pytest.mark.parametrize("junk", [b"nonsense\n", b"[1]\n", b'{"number": 7', b"\xff\xfe\n"])
def test_lines_that_nobody_understands_hide_no_others(junk):
    append(1)
    with (settings.index_folder() / "events" / "log").open("ab") as file:
        file.write(junk)
    append(2)
    assert numbers(event_log.Reader(from_start=True)) == [1, 2]


def test_removed_log_begins_anew():
    append(1)
    reader = event_log.Reader(from_start=False)
    (settings.index_folder() / "events" / "log").unlink()
    assert numbers(reader) == []
    append(2)
    assert numbers(reader) == [2]


def test_log_that_comes_and_is_turned_before_it_is_read(monkeypatch):
    reader = event_log.Reader(from_start=False)
    assert numbers(reader) == []
    monkeypatch.setattr(event_log, "LIMIT", 200)
    for number in range(3):
        event_log.append({"number": number, "padding": "x" * 60})
    assert numbers(reader) == [0, 1, 2]
    assert numbers(reader) == []


WRITER = """
import sys
from hvmgr.storage import event_log
event_log.LIMIT = 30_000
for number in range(int(sys.argv[1]), int(sys.argv[1]) + 50):
    event_log.append({"number": number, "padding": "x" * 300})
"""


def test_events_of_several_processes_never_mix():
    reader = event_log.Reader(from_start=False)
    root = Path(__file__).resolve().parents[2]
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(start)], cwd=root) for start in (0, 50)]
    told = []
    while any(one.poll() is None for one in writers):
        told += numbers(reader)
    assert [one.returncode for one in writers] == [0, 0]
    assert sorted(told + numbers(reader)) == list(range(100))
