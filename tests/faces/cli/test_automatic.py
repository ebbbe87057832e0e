"""``vm set`` and ``automatic run`` from the command line, on the embedded driver."""

from __future__ import annotations

import json

import pytest

from hvmgr.faces.cli import policy
from hvmgr.model.policy import Policy, Recovery
from hvmgr.operations import start_hook
from hvmgr.operations.automatic import systemd
from hvmgr.storage import locks

ON = ("--automatic-snapshots", "on", "--schedule", "hourly", "--keep", "last=2,daily=7")


@pytest.fixture
def due(hvmgr, vm, ahead):
    """A VM whose turn has come."""
    hvmgr.ok("vm", "set", vm, *ON)
    ahead(2)
    return vm


def test_set_says_what_it_set(hvmgr, vm):
    hvmgr.ok("snapshot", "create", vm, "one")
    told = hvmgr.ok("vm", "set", vm, *ON, "--snapshot-type", "production", "--recovery", "revert:one", "--json").json
    snapshot = hvmgr.ok("snapshot", "show", vm, "one", "--json").json["snapshots"][0]
    assert told["changed"] is True
    assert told["policy"] == {
        "snapshot_type": "production",
        "automatic_snapshots": True,
        "keep": {"last": 2, "hourly": 0, "daily": 7, "weekly": 0},
        "keep_source": "vm",
        "schedule": "hourly",
        "recovery": "revert",
        "recovery_snapshot": snapshot["id"],
    }
    assert hvmgr.ok("vm", "show", vm, "--json").json["policy"] == told["policy"]
    assert hvmgr.ok("vm", "set", vm, "--recovery", "revert:one").out == f"{vm} is set so already\n"
    shown = hvmgr.ok("vm", "show", vm).lines
    assert ["snapshot type", "production"] in shown
    assert ["automatic snapshots", "on; hourly, keep last=2,daily=7"] in shown
    assert ["recovery", f"revert to {snapshot['id']}"] in shown
    again = hvmgr.ok("vm", "set", vm, "--keep", "default", "--json").json["policy"]
    assert (again["keep"]["last"], again["keep_source"]) == (7, "default")


def test_owner_and_tags_are_set_and_stay(hvmgr, vm):
    hvmgr.ok("snapshot", "create", vm, "one")
    words = ("vm", "set", vm, "--owner", "anna", "--tag", "shop", "--tag", "test")
    told = hvmgr.ok(*words, "--json").json
    assert (told["changed"], told["owner"], told["tags"]) == (True, "anna", ["shop", "test"])
    assert hvmgr.ok(*words, "--json").json["changed"] is False
    hvmgr.ok("snapshot", "apply", vm, "one")
    assert [line[0] for line in hvmgr.ok("vm", "list", "--owner", "anna", "--tag", "test").lines] == [vm]
    told = hvmgr.ok("vm", "set", vm, "--no-owner", "--untag", "test", "--untag", "none", "--json").json
    assert (told["changed"], told["owner"], told["tags"]) == (True, None, ["shop"])
    for wrong in (("--tag", " "), ("--owner", "a\n"), ("--tag", "a", "--untag", "a")):
        answer = hvmgr("vm", "set", vm, *wrong)
        assert (answer.code, answer.out, len(answer.err.splitlines()) <= 2) == (2, "", True)


def test_set_says_what_rests(hvmgr, vm):
    assert "rests as long as automatic snapshots are off" in hvmgr("vm", "set", vm, "--schedule", "daily").err
    answer = hvmgr("vm", "set", vm, "--automatic-snapshots", "on", "--snapshot-type", "disabled")
    assert (answer.code, "none is taken automatically either" in answer.err) == (0, True)
    refused = hvmgr("snapshot", "create", vm)
    assert (refused.code, f"snapshots of {vm} are disabled" in refused.err, "vm set" in refused.err) == (4, True, True)
    hvmgr.ok("snapshot", "create", vm, "--type", "disk-only")


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ((), 2),
        (("--snapshot-type", "disk-only"), 2),
        (("--automatic-snapshots", "yes"), 2),
        (("--keep", "-1"), 2),
        (("--schedule", "1m"), 2),
        (("--recovery", "restart"), 2),
        (("--recovery", "revert:none"), 3),
    ],
    ids=lambda one: " ".join(one) if isinstance(one, tuple) else "",
)
def test_wrong_wish_is_refused_with_a_hint(hvmgr, vm, options, code):
    answer = hvmgr("vm", "set", vm, *options)
    assert (answer.code, answer.out) == (code, "")
    assert answer.err.startswith("hvmgr: ")


def test_policy_that_nobody_carries_out_is_said(capsys, monkeypatch):
    for installed in (False, True):
        who = start_hook.Asked.US if installed else start_hook.Asked.NOBODY
        monkeypatch.setattr(start_hook, "asked", lambda _, who=who: who)
        for uri in ("qemu:///system", "qemu:///session"):
            for wanted in (Policy(automatic=True), Policy(recovery=Recovery()), Policy()):
                policy.say_what_is_missing(uri, wanted)
                said = "hvmgr hook install" in capsys.readouterr().err
                assert said == (not installed and uri == "qemu:///system" and wanted != Policy())


def test_policy_that_is_not_understood_is_said(hvmgr, vm, root):
    hvmgr.ok("vm", "set", vm, *ON)
    (path,) = (root / vm / "Virtual Machines").glob("*.xml")
    path.write_text(path.read_text().replace("hourly", "often"))
    assert hvmgr.ok("vm", "show", vm, "--json").json["policy"] is None
    assert ["automatic snapshots", "not understood: set them anew with 'hvmgr vm set'"] in hvmgr.ok(
        "vm", "show", vm
    ).lines
    hvmgr("vm", "set", vm, "--recovery", "revert")
    assert hvmgr.ok("vm", "show", vm, "--json").json["policy"]["recovery"] == "revert"


def test_set_in_a_dry_run_shows_the_plan(hvmgr, vm):
    assert f"new settings of {vm}:" in hvmgr.ok("vm", "set", vm, *ON, "--dry-run").out
    assert hvmgr.ok("vm", "show", vm, "--json").json["policy"]["automatic_snapshots"] is False


def test_run_says_what_it_did_and_lists_show_it(hvmgr, due):
    shown = hvmgr.ok("automatic", "run", "--dry-run", "--json").json
    assert [plan["operation"] for plan in shown["plans"]] == ["snapshot create"]
    told = hvmgr.ok("automatic", "run", "--json").json
    (deed,) = told["done"]
    assert (told["changed"], deed["vm"]["name"], deed["action"]) == (True, due, "snapshot-taken")
    (taken,) = hvmgr.ok("snapshot", "list", due, "--json").json["snapshots"]
    assert ([taken["id"]], taken["automatic"]) == (deed["snapshots"], "schedule")
    assert hvmgr.ok("snapshot", "list", due).lines[0][6] == "schedule"
    assert "standard, automatic" in hvmgr.ok("snapshot", "tree", due).out
    assert ["automatic", "schedule"] in hvmgr.ok("snapshot", "show", due, taken["id"]).lines
    hvmgr.ok("snapshot", "notes", due, taken["id"], "mine")
    assert hvmgr.ok("snapshot", "list", due, "--json").json["snapshots"][0]["automatic"] is None
    assert hvmgr.ok("automatic", "run").out == "nothing to do\n"


def test_run_for_another_connection_or_root_leaves_the_others(hvmgr, due, tmp_path):
    assert hvmgr.ok("automatic", "run", "-c", "test:///default").out == "nothing to do\n"
    assert hvmgr.ok("automatic", "run", "--root", tmp_path).out == "nothing to do\n"


def test_failure_and_what_is_put_off_are_told(hvmgr, due, root):
    (path,) = (root / due / "Virtual Machines").glob("*.xml")
    whole = path.read_text()
    path.write_text("<domain")
    answer = hvmgr("automatic", "run", "--json")
    assert answer.code == 6
    assert [(one["name"], one["error"]["code"]) for one in answer.json["failed"]] == [(due, "Corrupt")]
    path.write_text(whole)
    with locks.held(root / due / ".hvmgr" / "lock", wait_s=0, what="a test"):
        answer = hvmgr("automatic", "run", "--wait", "0")
    assert (answer.code, answer.out) == (0, "")
    assert f"{due} is left for the next run: another command works on" in answer.err
    assert json.loads(hvmgr("automatic", "run", "--json").out)["changed"] is True


def test_hook_install_brings_the_units_where_it_is_the_hosts_libvirt(hvmgr, tmp_path, monkeypatch):
    from hvmgr.faces.cli import hook

    folder = tmp_path / "hooks"
    called = []
    monkeypatch.setattr(hook, "_FOLDER", str(folder))
    monkeypatch.setattr(
        systemd, "install", lambda *, dry_run: called.append(dry_run) or systemd.Units(present=True, changed=True)
    )
    assert hvmgr("hook", "install", "--dir", folder, "--json").json["worker"] is True
    monkeypatch.setattr(systemd, "install", lambda **_: systemd.Units())
    answer = hvmgr("hook", "install", "--dir", folder)
    assert "no systemd: let cron do" in answer.err
    assert "-m hvmgr automatic run" in answer.err
    assert hvmgr("hook", "install", "--dir", tmp_path / "other", "--json").json["worker"] is False
    assert called == [False]
