"""Applies and creations that fail or are cut off while a guest runs: it goes on from where it was, or from where it is."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from hvmgr import errors
from hvmgr.host import saved_state
from hvmgr.model import plan
from hvmgr.model.metadata import SavedState
from tests import private_libvirt

pytestmark = pytest.mark.guest


def break_stream(memory, tmp_path):
    """Everything behind the first 64 KiB of QEMU's stream is gone."""
    start = saved_state.read(memory).data_offset
    os.truncate(memory, start + 65536)


def spoil_stream(memory, tmp_path):
    start = saved_state.read(memory).data_offset
    with memory.open("r+b") as file:
        file.seek(start)
        file.write(b"\x55" * 65536)


def wish_for_absent_machine(memory, tmp_path):
    xml = saved_state.read(memory).xml
    saved_state.replace_xml(memory, re.sub(r"""machine=(["'])[^"']*\1""", "machine='pc-i440fx-0.1'", xml))


@pytest.mark.parametrize("damage", [break_stream, spoil_stream, wish_for_absent_machine])
def test_running_present_goes_on_when_the_memory_of_a_snapshot_cannot_be_loaded(machine, damage, tmp_path):
    snapshot = machine.vm.create_snapshot("one")
    damage(machine.layout.memory(snapshot.id), tmp_path)
    before, late = machine.vm.tree(), machine.run_for(6)
    with pytest.raises(errors.HvmgrError) as failure:
        snapshot.apply()
    assert "--without-state" in failure.value.hint
    assert machine.vm.tree().nodes == before.nodes
    assert machine.vm.tree().present == before.present
    assert machine.state() == "running"
    assert late.memory < machine.tick().memory < late.memory + 100
    machine.check()
    snapshot.apply(without_state=True, discard_state=True)
    assert machine.held() == machine.count_of(snapshot)


def test_paused_present_is_put_back_paused(machine, at_step):
    snapshot = machine.vm.create_snapshot("one")
    machine.run_for(5)
    machine.domain.suspend()
    at_step(plan.StartFrom, errors.HostFailed("QEMU said no"))
    with pytest.raises(errors.HostFailed, match="QEMU said no"):
        snapshot.apply()
    assert machine.state() == "paused"
    assert machine.first_tick().memory > machine.count_of(snapshot) + 5
    machine.check()


def test_present_is_put_back_when_libvirt_refuses_the_new_configuration(machine, at_step):
    snapshot = machine.vm.create_snapshot("one")
    late = machine.run_for(6)
    at_step(plan.Define, errors.HostFailed("libvirt said no"))
    with pytest.raises(errors.HostFailed, match="libvirt said no"):
        snapshot.apply()
    assert machine.tick().memory > late.memory
    machine.check()


def test_incomplete_memory_is_refused_before_anything_is_stopped(machine):
    snapshot = machine.vm.create_snapshot("one")
    memory = machine.layout.memory(snapshot.id)
    with memory.open("r+b") as file:
        file.write(b"LibvirtQemudPart")
    with pytest.raises(errors.Corrupt, match="not complete") as failure:
        snapshot.apply()
    assert "--without-state" in failure.value.hint
    machine.tick()
    machine.check()


# --- cut off in the middle of an apply ------------------------------------------------------------------------------


def test_killed_after_the_present_was_put_away(machine, kill_at, run_and_die):
    snapshot = machine.vm.create_snapshot("one")
    late = machine.run_for(6)
    kill_at(plan.SavePresent, after=True)
    run_and_die(snapshot.apply)
    assert machine.state() == "off"
    assert machine.vm.snapshots() == [snapshot]  # reading puts it back
    assert machine.said[-1].startswith("undid the interrupted return")
    assert machine.tick().memory > late.memory
    machine.check()


def test_killed_with_the_present_put_away_and_started_by_somebody(machine, kill_at, run_and_die):
    snapshot = machine.vm.create_snapshot("one")
    late = machine.run_for(6)
    kill_at(plan.SavePresent, after=True)
    run_and_die(snapshot.apply)
    (held,) = machine.boot()  # as after a power cut
    assert held >= late.disk
    machine.vm.now()
    assert machine.state() == "running"
    assert machine.tick().memory > held
    machine.check()


def test_memory_that_was_put_away_never_comes_back_over_newer_disks(machine, kill_at, run_and_die):
    snapshot = machine.vm.create_snapshot("one")
    machine.run_for(5)
    kill_at(plan.SavePresent, after=True)
    run_and_die(snapshot.apply)
    machine.boot()
    late = machine.run_for(5)
    machine.domain.destroy()
    machine.vm.now()
    assert machine.state() == "off"
    assert any("newer" in sentence for sentence in machine.said)
    assert machine.held() >= late.disk
    machine.check()


def test_managed_save_that_was_put_away_never_comes_back_over_newer_disks(machine, kill_at, run_and_die):
    snapshot = machine.vm.create_snapshot("one")
    machine.domain.managed_save()
    kill_at(plan.TakeManagedSave, after=True)
    run_and_die(snapshot.apply)
    machine.boot()
    late = machine.run_for(5)
    machine.domain.destroy()
    machine.vm.now()
    assert machine.state() == "off"
    assert machine.held() >= late.disk
    machine.check()


@pytest.mark.parametrize("stopped", [False, True], ids=["runs", "stopped"])
def test_killed_after_the_snapshot_went_on_keeps_what_the_guest_wrote_since(machine, kill_at, run_and_die, stopped):
    snapshot = machine.vm.create_snapshot("one")
    machine.run_for(8)
    since = time.monotonic()
    kill_at(plan.StartFrom, after=True)
    run_and_die(snapshot.apply)
    back = machine.run_for(3)
    assert back.memory <= machine.most(snapshot, since)
    if stopped:
        machine.domain.destroy()
    most = machine.most(snapshot, since)
    assert machine.vm.now().parent == snapshot.id
    assert machine.said[-1].startswith("completed the interrupted return")
    assert machine.vm.can_undo()
    if stopped:
        assert back.disk <= machine.held() <= most
    else:
        assert machine.tick().memory > back.memory
    machine.check()


def test_killed_after_the_managed_save_was_pointed_to_new_images_and_started(machine, kill_at, run_and_die):
    machine.domain.managed_save()
    kill_at(plan.PointManagedSave, after=True)
    run_and_die(machine.vm.create_snapshot, "one")
    machine.domain.start()
    late = machine.run_for(5)
    (snapshot,) = machine.vm.snapshots()
    assert machine.state() == "running"
    assert machine.tick().memory > late.memory > machine.count_of(snapshot)
    machine.check()
    snapshot.apply(discard_state=True)
    assert machine.tick().memory > machine.count_of(snapshot)
    machine.check()


# --- cut off in the middle of a creation ----------------------------------------------------------------------------


def test_killed_after_the_switch_of_a_creation(machine, kill_at, run_and_die):
    before = machine.tick()
    kill_at(plan.Define)  # the first step that finishes
    run_and_die(machine.vm.create_snapshot, "one")
    (snapshot,) = machine.vm.snapshots()
    assert snapshot.state is SavedState.RUNNING
    assert machine.tick().memory > machine.count_of(snapshot) >= before.memory - 1
    machine.check()


def test_killed_before_the_switch_of_a_creation(machine, kill_at, run_and_die):
    kill_at(plan.SwitchDisks)
    run_and_die(machine.vm.create_snapshot, "one")
    assert machine.vm.snapshots() == []
    assert not list(machine.layout.images.iterdir())
    machine.tick()
    machine.check()


def end_qemu(machine):
    """SIGKILL for the QEMU, as the kernel does when memory is short."""
    pid = int((Path(machine.host.uri.partition("root=")[2]) / f"run/qemu/{machine.vm.name}.pid").read_text())

    def end():
        os.kill(pid, signal.SIGKILL)
        private_libvirt.wait_for_end(pid)  # a busy host may let it go on for a moment

    return end


def power_off(machine):
    def press():
        with machine.screen() as screen:
            machine.domain.shutdown()
            screen.wait_for("poweroff", 60)
        while machine.domain.is_active():
            pass

    return press


def await_end(machine):
    """libvirt hears a little later that a QEMU is gone."""
    deadline = time.monotonic() + 60
    while machine.domain.is_active():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("end", [end_qemu, power_off])
def test_guest_that_ends_before_the_switch_leaves_no_snapshot(machine, at_step, end):
    at_step(plan.SwitchDisks, before=end(machine))
    with pytest.raises(errors.HvmgrError):
        machine.vm.create_snapshot("one")
    await_end(machine)
    assert machine.vm.snapshots() == []
    assert machine.state() == "off"
    machine.check()


@pytest.mark.usefixtures("standing_still")
@pytest.mark.parametrize("end", [end_qemu, power_off])
def test_guest_that_ends_after_the_switch_leaves_a_whole_snapshot(machine, at_step, end):
    late = machine.tick()
    at_step(plan.SwitchDisks, after=end(machine))
    snapshot = machine.vm.create_snapshot("one")
    await_end(machine)
    assert snapshot.state is SavedState.RUNNING
    machine.check()
    assert machine.held() >= late.disk
    snapshot.apply(discard_state=True)
    assert machine.tick().memory > machine.count_of(snapshot)
    machine.check()
