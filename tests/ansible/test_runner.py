"""The runner, where hvmgr is absent, too old, stuck or no hvmgr at all; such faults have to be forced."""

from __future__ import annotations

import os
import time

import pytest


@pytest.fixture
def fake(tmp_path):
    """``fake(script)``: a program in the place of hvmgr that says its version and then does what the script says."""

    def make(script, version="0.1.0"):
        path = tmp_path / "fake"
        said = f'{{"schema": 1, "version": "{version}"}}'
        path.write_text(f"#!/bin/sh\ncase \"$*\" in *version) echo '{said}'; exit 0;; esac\n{script}\n")
        path.chmod(0o755)
        return str(path)

    return make


def refused(result):
    assert result.code == 1
    return result.facts["msg"]


def test_absent_says_how_to_install(module, monkeypatch, tmp_path):
    assert "the role hvmgr.hvmgr.host" in refused(module("vm_info", executable=str(tmp_path / "nothing")))


def test_is_found_in_path(module, kvm1, monkeypatch, tmp_path):
    (tmp_path / "hvmgr").symlink_to(kvm1.executable)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert module("vm_info", executable=None).facts["vms"] == []


@pytest.mark.parametrize("version", ["0.0.9", "", "x"])
def test_too_old_says_so(module, fake, version):
    told = refused(module("vm_info", executable=fake("", version)))
    assert "needs 0.1.0 or later" in told
    assert "role hvmgr.hvmgr.host updates it" in told


def test_newer_documents_are_refused(module, fake):
    assert "update the collection" in refused(module("vm_info", executable=fake("echo '{\"schema\": 2}'; exit 1")))


@pytest.mark.parametrize("script", ["exit 3", "echo 'no json'; exit 0", "echo '[1]'", "echo boom >&2; exit 1"])
def test_nonsense_is_one_sentence(module, fake, script):
    told = refused(module("vm_info", executable=fake(script)))
    assert "ended with" in told
    assert "\n" not in told


def test_failure_keeps_code_hint_and_facts(module, fake):
    script = (
        """echo '{"schema":1,"error":{"code":"Busy","message":"web is busy","hint":"wait","facts":{"a":1}}}'; exit 4"""
    )
    result = module("vm_info", executable=fake(script))
    assert result.facts["msg"] == "web is busy (wait)"
    assert result.facts["error"] == {"code": "Busy", "message": "web is busy", "hint": "wait", "facts": {"a": 1}}


def test_time_limit_stops_it_and_says_what_is_left(module, fake):
    script = """trap 'echo "{\\"schema\\":1,\\"error\\":{\\"code\\":\\"Cancelled\\",\\"message\\":\\"left nothing\\"}}"; exit 130' TERM
while :; do sleep 0.1; done"""
    start = time.monotonic()
    told = refused(module("vm_info", executable=fake(script), timeout=1))
    assert "stopped after 1 seconds; it said: left nothing" in told
    assert time.monotonic() - start < 60
    assert "1 second or more" in refused(module("vm_info", executable=fake(""), timeout=0))


def test_notices_are_warnings(module, fake):
    script = """echo 'left out: a home' >&2; echo '{"schema":1,"details":[]}'"""
    assert "left out: a home" in str(module("vm_info", executable=fake(script)).facts["warnings"])
