"""Starts, ends and crashes below a real libvirtd: what the hook tells, and what the worker makes of it."""

from __future__ import annotations

import shutil
import subprocess
from datetime import timedelta

import pytest

import hvmgr
from hvmgr.model import plan
from hvmgr.model.policy import Origin
from hvmgr.operations import snapshots, vms
from hvmgr.operations.automatic import acts
from hvmgr.operations.automatic.worker import Action
from hvmgr.storage import spool
from tests.operations.conftest import Killed

pytestmark = pytest.mark.libvirtd

ON = {"automatic_snapshots": True}


def origins(vm):
    return [snapshot.automatic for snapshot in vm.snapshots()]


def byte_at(path, offset):
    """One byte of a disk, through its chain, whoever has it open."""
    command = ["qemu-io", "-r", "-U", "-f", "qcow2", "-c", f"read -v {offset} 512", str(path)]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    return int(shown.split(":", 1)[1].split()[0], 16)


def again(bench, event):
    """The last marker of an event comes a second time."""
    (file,) = [path for path in spool.folder().iterdir() if f"_{event}_" in path.name]
    number, rest = file.name.split("_", 1)
    shutil.copy(file, file.with_name(f"{int(number) + 1}_{rest}"))


# --- starts and ends ------------------------------------------------------------------------------------------------


def test_snapshot_at_start_goes_after_a_clean_stop(bench):
    vm = bench.make()
    vm.set(**ON)
    image = vm.now().disks["hda"]
    bench.write(image, 7)
    assert bench.start() == ""
    assert bench.new() == ["started"]
    again(bench, "started")
    assert bench.done() == [Action.SNAPSHOT]
    (taken,) = vm.snapshots()
    assert (taken.automatic, taken.has_state, taken.name.startswith("web at start (")) == (Origin.START, True, True)
    assert bench.new() == []
    assert bench.done() == []
    bench.switch_off()
    again(bench, "release")
    assert Action.DELETED in bench.done()
    assert vm.snapshots() == []
    assert byte_at(vm.now().disks["hda"], 256 << 10) == 7
    assert len(vm.tree().images) == 1  # merged: nothing is left over
    assert bench.done() == []


@pytest.mark.parametrize("made_his_own", [True, False])
def test_snapshot_at_start_stays_when_the_plug_was_pulled_or_it_is_somebodys(bench, made_his_own):
    vm = bench.make()
    vm.set(**ON, snapshot_type="production")
    bench.start()
    assert bench.done() == [Action.SNAPSHOT]
    (taken,) = vm.snapshots()
    assert not taken.has_state  # the disks as they were before the start
    if made_his_own:
        taken.set_notes("the last good one")
        bench.switch_off()
    else:
        bench.virsh("destroy", "web", check=True)
    assert bench.done() == []
    assert origins(vm) == [None if made_his_own else Origin.START]
    bench.start()
    assert bench.done() == []  # there is one


def test_nothing_is_done_with_a_vm_that_asks_for_nothing(bench):
    vm = bench.make()
    bench.start()
    bench.switch_off()
    assert bench.done() == []
    assert vm.snapshots() == []
    assert list(spool.folder().with_name("taken").iterdir()) == []


def test_images_that_wait_are_merged_when_the_vm_has_been_off_for_a_while(bench, monkeypatch):
    vm = bench.make("one", "two")
    quiet = acts.QUIET
    monkeypatch.setattr(acts, "QUIET", timedelta(minutes=2))
    bench.start()
    vm.snapshot("one").delete()
    vm.snapshot("two").delete()
    bench.virsh("destroy", "web", check=True)
    bench.wait_until_off("release")
    if len(vm.tree().images) > 1:  # else they were merged while it ran
        ((_, error),) = bench.work().put_off
        assert "was at work a moment ago" in error.message
        monkeypatch.setattr(acts, "QUIET", quiet)
        assert bench.done() == [Action.MERGED]
    assert len(vm.tree().images) == 1
    assert byte_at(vm.now().disks["hda"], 256 << 10) == 3


def test_hook_that_refuses_the_snapshot_at_a_start_is_asked_once(bench, monkeypatch, tmp_path):
    vm = bench.make()
    vm.set(**ON)
    monkeypatch.setenv("HVMGR_CONFIG", str(tmp_path))
    hook, asked = tmp_path / "hooks.d" / "before-snapshot" / "no", tmp_path / "asked"
    hook.parent.mkdir(parents=True)
    hook.write_text(f"#!/bin/sh\necho once >> '{asked}'\nexit 1\n")
    hook.chmod(0o755)
    bench.start()
    assert [(name, error.code) for name, error in bench.work().failed] == [("web", "Vetoed")]
    assert asked.read_text() == "once\n"
    assert vm.snapshots() == []


def test_busy_vm_is_left_for_the_next_run_and_one_without_savable_memory_has_its_disks_taken(bench, monkeypatch):
    vm = bench.make()
    vm.set(**ON)
    bench.start()
    with vm.home.locked(wait_s=5):
        outcome = bench.work()
    assert [(name, error.code) for name, error in outcome.put_off] == [("web", "Busy")]
    assert (outcome.done, outcome.failed) == ([], [])
    assert bench.new() == []

    def refuse(*_):
        raise hvmgr.errors.Unsupported("no memory")

    monkeypatch.setattr(snapshots, "require_memory", refuse)
    assert bench.done() == [Action.SNAPSHOT]
    (taken,) = vm.snapshots()
    assert (taken.type, taken.automatic) == (hvmgr.SnapshotType.DISK_ONLY, Origin.START)
    assert any("disks alone is taken" in one for one in bench.said)


def test_event_of_a_vm_that_was_released_is_settled(bench):
    vm = bench.make()
    vm.set(**ON)
    bench.start()
    vm.release()
    assert bench.done() == []
    assert list(spool.folder().with_name("taken").iterdir()) == []


# --- crashes --------------------------------------------------------------------------------------------------------


def crashed(bench, **wishes):
    """A VM with a snapshot that holds 3, whose present holds 9 when it crashes."""
    vm = bench.make("one")
    vm.set(recovery="revert", **wishes)
    bench.write(vm.now().disks["hda"], 9)
    assert bench.start() == ""
    bench.crash()
    return vm


def require_recovered(bench, vm, crashes=1):
    assert bench.is_running
    (kept,) = [one for one in vm.snapshots() if one.automatic is Origin.CRASH][:crashes]
    assert byte_at(kept.disks["hda"], 256 << 10) == 9
    now = vm.now()
    assert vm.snapshot("one").id == now.parent
    assert byte_at(now.disks["hda"], 256 << 10) == 0
    assert not vm.can_undo()


def test_crashed_vm_is_put_back_and_what_it_had_come_to_is_kept(bench):
    vm = crashed(bench)
    assert bench.done() == [Action.SNAPSHOT, Action.RECOVERED]
    require_recovered(bench, vm)
    assert bench.done() == []


def test_edit_of_a_vm_that_crashed_before_it_wrote_is_kept(bench):
    vm = bench.make("one")
    vm.create_snapshot("two")
    vm.set(recovery="revert")
    bench.virsh("setmem", "web", "48M", "--config", check=True)
    assert bench.start() == ""
    bench.crash()
    assert bench.done() == [Action.SNAPSHOT, Action.RECOVERED]
    (kept,) = [one for one in vm.snapshots() if one.automatic is Origin.CRASH]
    sizes = [one.root.findtext("currentMemory") for one in (vm.home.snapshot(kept.id), vm.home.present())]
    assert sizes == ["49152", "65536"]


@pytest.mark.parametrize("before", ["the switch", "the start"])
def test_worker_that_is_killed_is_made_up_for(bench, kill_at, run_and_die, monkeypatch, before):
    vm = crashed(bench)
    if before == "the switch":
        kill_at(plan.Define)
    else:
        kill_at(plan.WritePresent, after=True)  # of the snapshot; what follows it is killed below
    run_and_die(bench.work)
    if before == "the start":
        with monkeypatch.context() as patched:
            patched.setattr(vms, "start", die)
            run_and_die(bench.work)
    bench.work()
    require_recovered(bench, vm)
    assert bench.done() == []


def die(_session):
    raise Killed


def test_vm_that_crashes_again_and_again_stays_off(bench, monkeypatch):
    monkeypatch.setattr(acts, "RECOVERIES_MAX", 2)
    vm = crashed(bench)
    for _ in range(acts.RECOVERIES_MAX):
        bench.done()
        assert bench.is_running
        bench.crash()
    outcome = bench.work()
    assert outcome.done == []
    ((name, error),) = outcome.failed
    assert (name, "put back 2 times within an hour" in error.message) == ("web", True)
    assert not bench.is_running
    assert bench.done() == []  # said once
    assert origins(vm).count(Origin.CRASH) == 1  # nothing was written before the later ones


def test_crash_is_left_alone_without_the_wish_and_after_a_start(bench):
    vm = crashed(bench)
    vm.set(recovery="none")
    assert bench.done() == []
    assert not bench.is_running
    vm.set(recovery="revert")
    assert bench.done() == []  # the event is over
    bench.start()
    bench.crash()
    bench.start()
    assert bench.done() == []
    assert vm.now().parent == vm.snapshot("one").id
    assert len(vm.snapshots()) == 1


def test_snapshot_to_go_back_to_is_gone(bench):
    vm = bench.make("one", "two")
    vm.set(recovery="revert:one")
    said = []
    host = hvmgr.Host.open(bench.host.uri, root=bench.host.root, wait_s=60, reporter=hvmgr.Reporter(notice=said.append))
    with host:
        host.vm("web").snapshot("one").delete()
    assert any("was to go back to that snapshot" in one for one in said)
    bench.start()
    bench.crash()
    ((_, error),) = bench.work().failed
    assert "is not there: it stays off" in error.message
    assert not bench.is_running


def test_nothing_that_somebody_put_away_lately_is_thrown_away(bench):
    vm = crashed(bench)
    vm.snapshot("one").apply()  # before the worker comes
    ((_, error),) = bench.work().put_off
    assert "the undo slot of web holds" in error.message
    vm.undo()
    assert byte_at(vm.now().disks["hda"], 256 << 10) == 9
