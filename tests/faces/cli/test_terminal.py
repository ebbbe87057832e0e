"""What a person at a terminal sees and is asked: in a process of its own, on a pseudo-terminal."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hvmgr.faces.cli import progress
from hvmgr.model.progress import Progress
from tests.faces.cli.conftest import files_of

ROOT = Path(__file__).resolve().parents[3]
QUESTION = "Go on? [y/N] "


class Terminal:
    """One command on a pseudo-terminal of 100 columns."""

    def __init__(self, *arguments, **environment):
        self.said = ""
        self.descriptor, end = pty.openpty()
        # Not pty.fork: this process has threads. Signals are as in a login shell, whoever runs the tests.
        take = (
            "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
            "signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", take, "-m", "hvmgr", *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100", **environment},
            stdin=end,
            stdout=end,
            stderr=end,
            start_new_session=True,
        )
        os.close(end)

    def until(self, text, timeout_s=60):
        """Reads until the text was said."""
        deadline = time.monotonic() + timeout_s
        while text not in self.said:
            assert time.monotonic() < deadline, self.said
            self._read(0.1)

    def answer(self, text):
        os.write(self.descriptor, text.encode())

    def end(self, timeout_s=30):
        """The exit code, when all was said."""
        deadline = time.monotonic() + timeout_s
        with contextlib.suppress(OSError):
            while self._read(0.1):
                if time.monotonic() > deadline:
                    self.process.kill()
        os.close(self.descriptor)
        return self.process.wait(timeout=60)

    def _read(self, timeout_s):
        """Whether more may come; raises OSError at the end."""
        if select.select([self.descriptor], [], [], timeout_s)[0]:
            data = os.read(self.descriptor, 65536)
            self.said += data.decode().replace("\r\n", "\n")
            return bool(data)
        return True


def plain(text):
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


@pytest.fixture
def far(branched, monkeypatch):
    """The VM, for commands that have to do without libvirt: this process holds the embedded driver."""
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", "qemu+unix:///system?socket=/nowhere")
    return branched


def test_list_is_a_table(far):
    terminal = Terminal("snapshot", "list", far)
    assert terminal.end() == 0
    told = plain(terminal.said)
    assert re.search(r"Name +Type +State +Created +Id", told)
    assert re.search(r"three +standard +off +\d{4}-", told)
    assert "\t" not in told


def test_tree_has_colours(far):
    terminal = Terminal("snapshot", "tree", far)
    assert terminal.end() == 0
    assert "\x1b[" in terminal.said
    assert re.search(r"└── Now +\d", plain(terminal.said))


def test_colours_can_be_refused(far):
    terminal = Terminal("snapshot", "tree", far, NO_COLOR="1")
    assert terminal.end() == 0
    assert "\x1b[3" not in terminal.said


def test_json_on_a_terminal_is_the_same(far):
    terminal = Terminal("snapshot", "list", far, "--json")
    assert terminal.end() == 0
    assert terminal.said.startswith('{\n  "schema": 1')
    assert "\x1b" not in terminal.said


@pytest.mark.parametrize("answer", ["n\n", "\n", "yep\n", "\x04"], ids=["no", "nothing", "something", "end"])
def test_deleting_a_subtree_lists_names_and_takes_no_for_an_answer(far, root, answer):
    before = files_of(root)
    terminal = Terminal("snapshot", "delete", far, "one", "--subtree")
    terminal.until(QUESTION)
    assert "one\n  two\n  three\n" in terminal.said
    terminal.answer(answer)
    assert terminal.end() == 130
    assert files_of(root) == before


def test_interrupt_at_a_question_is_a_no(far, root):
    before = files_of(root)
    terminal = Terminal("vm", "delete", far, "--with-disks")
    terminal.until(QUESTION)
    assert "/Virtual Hard Disks/vda.qcow2\n" in terminal.said
    terminal.answer("\x03")
    assert terminal.end() == 130
    assert files_of(root) == before


def test_losing_the_present_is_asked(far):
    terminal = Terminal("snapshot", "apply", far, "one", "--no-undo")
    terminal.until(QUESTION)
    assert f"the present of {far} will be lost" in terminal.said
    terminal.answer("n\n")
    assert terminal.end() == 130


@pytest.mark.parametrize(("words", "typed"), [([], "y\n"), (["--yes"], "")], ids=["asked", "yes-in-advance"])
def test_consent_lets_it_go_on(far, words, typed):
    terminal = Terminal("snapshot", "delete", far, "one", "--subtree", *words)
    if typed:
        terminal.until(QUESTION)
        terminal.answer(typed)
    assert terminal.end() == 8  # as far as libvirt, which is out of reach
    assert (QUESTION in terminal.said) is bool(typed)


def test_plain_apply_asks_nothing(far):
    terminal = Terminal("snapshot", "apply", far, "one")
    assert terminal.end() == 8
    assert QUESTION not in terminal.said


def test_losing_memory_is_asked_only_where_there_is_some(hvmgr, vm, monkeypatch):
    hvmgr.ok("snapshot", "create", vm, "off")
    hvmgr.ok("vm", "start", vm)
    asked = []
    monkeypatch.setattr("hvmgr.faces.cli.request._is_person_there", lambda: True)
    monkeypatch.setattr("sys.stdin", type("Person", (), {"readline": lambda _: asked.append(1) or "y\n"})())
    assert hvmgr("snapshot", "apply", vm, "off", "--discard-state").code == 0
    assert len(asked) == 1
    assert hvmgr("snapshot", "undo", vm, "--discard-state").code == 0
    assert len(asked) == 1


def test_bars_come_and_go(capsys):
    bars = progress.Bars()
    for done in range(0, 101, 50):
        bars.update(Progress(done=done << 20, total=100 << 20, what="merge [bold] vda"))
    bars.update(Progress(done=1, total=0, what="copy"))
    assert [one.total for one in bars._drawn.tasks] == [None]  # not a hundred, which nobody said
    bars.close()
    assert capsys.readouterr().out == ""
