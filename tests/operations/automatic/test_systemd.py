"""The units: as systemd reads them, and as they are installed where it runs (here only what it is told can be seen)."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hvmgr import errors, settings
from hvmgr.operations.automatic import systemd

NAMES = {"hvmgr-automatic.service", "hvmgr-automatic.path", "hvmgr-automatic.timer"}


@pytest.fixture
def booted(tmp_path, monkeypatch):
    """A host that systemd runs; gives the words that systemctl was called with."""
    log = tmp_path / "calls"
    log.touch()
    program = tmp_path / "bin" / "systemctl"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >>{shlex.quote(str(log))}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(systemd, "_BOOTED", tmp_path)
    return lambda: log.read_text().splitlines()


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "units"
    place.mkdir()
    return place


def test_shipped_units_are_those_that_are_installed(tmp_path):
    assert set(systemd.texts()) == NAMES
    assert {path.name for path in settings.units_folder().iterdir()} == {*NAMES, "hvmgr.service"}  # who serves says so
    service = systemd.texts()["hvmgr-automatic.service"]
    assert f"ExecStart={sys.executable} -m hvmgr automatic run --wait 60\n" in service
    assert f"={settings.runtime_folder()}/events/new\n" in systemd.texts()["hvmgr-automatic.path"]


def test_systemd_understands_the_units(folder, require_program):
    require_program("systemd-analyze")
    for name, text in systemd.texts().items():
        (folder / name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(str(folder / name) for name in sorted(NAMES))],
        check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "hvmgr" not in done.stderr, done.stderr
    timer = systemd.texts()["hvmgr-automatic.timer"]
    (calendar,) = [line.partition("=")[2] for line in timer.splitlines() if line.startswith("OnCalendar=")]
    told = subprocess.run(["systemd-analyze", "calendar", calendar], check=True, capture_output=True, text=True)
    assert "Normalized form: *-*-* *:00/5:00" in told.stdout


def test_program_runs_as_the_service_runs_it():
    service = systemd.texts()["hvmgr-automatic.service"]
    (line,) = [line for line in service.splitlines() if line.startswith("ExecStart=")]
    words = [*shlex.split(line.partition("=")[2]), "--json"]
    done = subprocess.run(words, check=True, capture_output=True, text=True, cwd="/", timeout=60)
    assert '"changed": false' in done.stdout


def test_install_and_uninstall(booted, folder):
    assert systemd.install(folder, dry_run=True) == systemd.Units(present=True, changed=True)
    assert (list(folder.iterdir()), booted()) == ([], [])
    assert systemd.install(folder) == systemd.Units(present=True, changed=True)
    assert {path.name for path in folder.iterdir()} == NAMES
    enable = "enable --now hvmgr-automatic.path hvmgr-automatic.timer"
    assert booted() == ["daemon-reload", enable]
    assert systemd.install(folder) == systemd.Units(present=True, changed=False)
    assert booted()[2:] == [enable]
    assert systemd.uninstall(folder) == systemd.Units(present=False, changed=True)
    assert list(folder.iterdir()) == []
    assert booted()[3:] == ["disable --now hvmgr-automatic.path hvmgr-automatic.timer", "daemon-reload"]
    assert not systemd.uninstall(folder).changed


def test_without_systemd_nothing_is_installed(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(systemd, "_BOOTED", tmp_path / "none")
    assert systemd.install(folder) == systemd.Units()
    assert list(folder.iterdir()) == []


def test_units_of_others_stay(booted, folder):
    path = folder / "hvmgr-automatic.timer"
    path.write_text("[Timer]\n")
    for act in (systemd.install, systemd.uninstall):
        with pytest.raises(errors.Conflict, match="is not hvmgr's"):
            act(folder)
    assert [one.name for one in folder.iterdir()] == [path.name]
    assert booted() == []


def test_path_with_a_percent_sign_is_no_specifier(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/opt/50% off/bin/python")
    assert "ExecStart='/opt/50%% off/bin/python' -m hvmgr" in systemd.texts()["hvmgr-automatic.service"]


def test_wheel_brings_the_units():
    text = (Path(__file__).resolve().parents[3] / "pyproject.toml").read_text("utf-8")
    assert '"share/systemd" = "hvmgr/systemd"' in text
