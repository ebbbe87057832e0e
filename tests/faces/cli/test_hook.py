"""``hvmgr hook``: what it says and what it leaves; the hook itself is tested where it runs."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from hvmgr.operations import start_hook


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "hooks"


def test_install_and_uninstall_say_what_they_did(hvmgr, folder):
    script = start_hook.path_in(folder)
    first = hvmgr("hook", "install", "--dir", folder)
    assert first.out == f"installed {script}\n"
    assert "restart it" in first.err
    assert hvmgr.ok("hook", "install", "--dir", folder).out == f"{script} is there already\n"
    assert hvmgr.ok("hook", "uninstall", "--dir", folder).out == f"removed {script}\n"
    assert hvmgr.ok("hook", "uninstall", "--dir", folder).out == f"there is no {script}\n"


def test_dry_runs_change_nothing(hvmgr, folder, vm, root):
    assert hvmgr.ok("hook", "install", "--dir", folder, "--dry-run").out == (
        f"installation of {start_hook.path_in(folder)}\n"
    )
    assert not folder.exists()
    assert hvmgr.ok("hook", "uninstall", "--dir", folder, "--dry-run").out == "nothing to do\n"
    assert hvmgr.ok("hook", "allow", vm, "--once", "--dry-run").out == f"permission for the next start of {vm}\n"
    assert not (root / vm / ".hvmgr" / "allow-start").exists()


def test_foreign_script_is_a_conflict(hvmgr, folder):
    script = start_hook.path_in(folder)
    script.parent.mkdir(parents=True)
    script.write_text("theirs")
    answer = hvmgr("hook", "install", "--dir", folder)
    assert (answer.code, answer.out) == (4, "")
    assert f"{script} is not hvmgr's" in answer.err


def test_allow_says_what_is_ignored(hvmgr, branched, root):
    assert hvmgr.ok("hook", "allow", branched, "--once", "--json").json["ignored"] == []
    shown = hvmgr.ok("snapshot", "show", branched, "one", "--json").json
    (path,) = shown["snapshots"][0]["disks"].values()
    with Path(path).open("ab") as file:
        file.write(bytes(512))
    (found,) = hvmgr.ok("hook", "allow", branched, "--once", "--json").json["ignored"]
    assert (found["code"], found["where"]) == ("image-changed", path)
    assert (root / branched / ".hvmgr" / "allow-start").exists()


def test_allow_waits_for_nobody_who_works_on_the_vm(hvmgr, vm, root):
    lock = root / vm / ".hvmgr" / "lock"
    descriptor = os.open(lock, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        answer = hvmgr("hook", "allow", vm, "--once", "--wait", "0")
    finally:
        os.close(descriptor)
    assert answer.code == 4
    assert "another command works on" in answer.err
