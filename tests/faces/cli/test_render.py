"""Text for people, without a VM."""

from __future__ import annotations

import io
import sys

import pytest

from hvmgr.faces.cli import render


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ünï 木", "plain ünï 木"),
        ("a\nb\tc", "a\\nb\\tc"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\x9b31mred", "\\x9b31mred"),
        ("\u202eright-to-left", "\\u202eright-to-left"),
        ("\udcff", "\\udcff"),
    ],
    ids=["plain", "lines", "escape", "csi", "direction", "no-utf8"],
)
def test_what_cannot_be_printed_is_escaped(text, shown):
    assert render.clean(text) == shown


def test_notice_that_nobody_can_read_stops_nothing(monkeypatch):
    class Gone(io.StringIO):
        def write(self, _):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Gone())
    render.notice("said")


def test_wide_names_keep_the_columns(hvmgr, vm):
    for name in ("木木", "e\u0301", "plain"):
        hvmgr.ok("snapshot", "create", vm, name)
    lines = hvmgr.ok("snapshot", "tree", vm).out.splitlines()[1:4]
    columns = {render._width(line.partition("standard")[0]) for line in lines}
    assert len(columns) == 1


def test_deep_trees_are_drawn(hvmgr, vm):
    for number in range(35):
        answer = hvmgr("snapshot", "create", vm, f"number {number}")
        assert answer.code == 0
    assert "makes the next start slower" in answer.err
    lines = hvmgr.ok("snapshot", "tree", vm).out.splitlines()
    assert lines[-1].startswith("    " * 35 + "└── Now")


def test_sizes_stand_to_the_right(hvmgr, branched):
    lines = hvmgr.ok("snapshot", "tree", branched).out.splitlines()[1:]
    assert len({line.index("KiB") for line in lines}) == 1


def test_narrow_terminal_gets_paragraphs_instead_of_broken_words(monkeypatch, capsys):
    rows = [("web", "running", "0" * 36, "/srv/web"), ("old one", "off", "1" * 36, "")]
    monkeypatch.setattr(render, "is_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    render.table(("Name", "State", "Id", "Home"), rows)
    assert capsys.readouterr().out == (
        f"Name:   web\nState:  running\nId:     {'0' * 36}\nHome:   /srv/web\n"
        f"\nName:   old one\nState:  off\nId:     {'1' * 36}\n"
    )
    monkeypatch.setenv("COLUMNS", "80")
    render.table(("Name", "State", "Id", "Home"), rows)
    assert all(len(line) <= 80 for line in capsys.readouterr().out.splitlines())
