"""``hvmgr freeze`` at the command line; what it does to guests is tests/operations/test_standstill.py."""

from __future__ import annotations

import pytest


def test_vm_that_is_off_is_kept_from_starting_while_the_command_runs(hvmgr, vm):
    (image,) = hvmgr.ok("vm", "show", vm, "--json").json["now"]["disks"].values()
    writes = f"qemu-io -f qcow2 -c 'write 0 512' '{image}'"
    answer = hvmgr("freeze", vm, "--json", "--", "sh", "-c", f"{writes} && exit 3; echo still $HVMGR_FROZEN_NAMES")
    assert answer.code == 0, answer
    told = answer.json
    assert (told["exit_code"], told["changed"], told["command"][0]) == (0, True, "sh")
    assert [(one["name"], one["state"], one["file_systems"]) for one in told["vms"]] == [(vm, "off", None)]
    assert hvmgr("freeze", vm, "--", "sh", "-c", f"{writes} >&2 && exit 3; echo still $HVMGR_FROZEN_NAMES").code == 0
    assert hvmgr("freeze", vm, "--", "true").out == (
        f"'true' ended well: nothing had to stand still; {vm} is off and could not start meanwhile\n"
    )


def test_exit_code_of_the_command_is_told(hvmgr, vm):
    answer = hvmgr("freeze", vm, "--json", "--", "sh", "-c", "exit 5")
    assert answer.code == 8
    assert answer.json["error"]["facts"]["exit_code"] == 5
    assert answer.json["error"]["message"].endswith("ended with code 5")


def test_command_that_is_stopped_had_begun(hvmgr, vm):
    answer = hvmgr("freeze", vm, "--", "sh", "-c", "kill $PPID; exec sleep 60")
    assert answer.code == 130, answer
    assert "was stopped" in answer.err
    assert "what it made is not whole" in answer.err
    assert "nothing was changed" not in answer.err


def test_what_cannot_be_run_is_named_as_that(hvmgr, vm, tmp_path):
    file = tmp_path / "script"
    file.touch(0o644)
    for path, what in ((file, "not executable"), (tmp_path, "a directory")):
        answer = hvmgr("freeze", vm, "--", path)
        assert answer.code == 5, answer
        assert f"'{path}' is {what}" in answer.err


def test_command_that_would_wait_for_itself_is_told_at_once(hvmgr, vm, monkeypatch):
    monkeypatch.setenv("HVMGR_FROZEN", hvmgr.ok("vm", "show", vm, "--json").json["vm"]["id"])
    answer = hvmgr("snapshot", "create", vm)
    assert answer.code == 4
    assert "would wait for itself" in answer.err
    assert hvmgr.ok("snapshot", "list", vm)


def test_dry_run_runs_nothing(hvmgr, vm, tmp_path):
    answer = hvmgr("freeze", vm, "--dry-run", "--", "touch", tmp_path / "ran")
    assert answer.code == 0
    assert f"freeze of {vm} for 'touch" in answer.out
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        ((), 2, "no command is given"),
        (("VM",), 2, "no command is given"),
        (("VM", "--"), 2, "nothing comes after --"),
        (("--", "true"), 2, "VM"),
        (("VM", "--limit", "0", "--", "true"), 2, "0 seconds"),
        (("VM", "--limit", "soon", "--", "true"), 2, "'soon' is not a number"),
        (("nobody", "--", "true"), 3, "nobody"),
        (("VM", "--", "no-such-program"), 5, "'no-such-program' is not installed"),
    ],
)
def test_bad_input(hvmgr, vm, words, code, sentence):
    answer = hvmgr("freeze", *(vm if word == "VM" else word for word in words))
    assert answer.code == code, answer
    assert sentence in answer.err
