"""The journal's lines: what was reached, and which start is named, also when a line was cut off."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from hvmgr.model import plan
from hvmgr.storage import journal

PLAN = plan.Plan(plan_id="p", vm_id="v", operation="o", subject="s")
DISKS = {"/b", "/a"}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "journal"
    journal.begin(path, PLAN)
    return path


def test_fresh_journal_names_nothing(path):
    assert journal.read(path) == journal.Entry(PLAN, switch_reached=False, start=None)


def test_switch_is_reached_also_after_a_start(path):
    with journal.start_named(path, DISKS):
        pass
    assert not journal.read(path).switch_reached
    journal.reach_switch(path)
    assert journal.read(path).switch_reached
    with journal.start_named(path, DISKS):
        assert journal.read(path).switch_reached


def test_start_is_named_while_it_is_made(path):
    with journal.start_named(path, DISKS):
        assert journal.read(path).start == journal.Start(os.getpid(), frozenset(DISKS))
    assert journal.read(path).start is None


def test_start_that_fails_is_taken_back(path):
    with pytest.raises(ZeroDivisionError), journal.start_named(path, DISKS):
        raise ZeroDivisionError
    assert journal.read(path).start is None


def test_every_cut_of_the_lines_is_read(path):
    """A death at any byte: the plan is there, and a start or a switch only when its line is whole."""
    fresh = len(path.read_bytes())
    with journal.start_named(path, DISKS):
        named = len(path.read_bytes())
    journal.reach_switch(path)
    data = path.read_bytes()
    taken_back = data.index(b"started\n") + len(b"started\n")
    for end in range(fresh, len(data) + 1):
        path.write_bytes(data[:end])
        entry = journal.read(path)
        assert (entry.start is not None) == (named <= end < taken_back), end
        assert entry.switch_reached == (end == len(data))
        journal.take_back_start(path)
        assert journal.read(path).start is None


def test_reader_alone_knows_the_steps_of_a_snapshot_in_the_background(path):
    """The hook imports nothing else."""
    step = {"step": "AwaitMemory", "path": "/memory.save"}
    path.write_text(json.dumps({**PLAN.to_json(), "finish": [step]}) + "\n")
    program = f"from pathlib import Path; from hvmgr.storage import journal; print(journal.read(Path({str(path)!r})))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert "AwaitMemory(path='/memory.save')" in done.stdout
