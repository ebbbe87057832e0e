"""Production snapshots with Debian's own qemu-guest-agent in a real guest, which writes to an ext4 meanwhile."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest

import hvmgr
from hvmgr import errors
from hvmgr.faces.cli import json_out
from hvmgr.host import guest_agent, pids
from hvmgr.model import plan
from hvmgr.model.metadata import SavedState, SnapshotType
from hvmgr.storage import journal, source_home
from tests.operations.agent_guest import was_at_rest

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

PRODUCTION, ONLY, STANDARD = SnapshotType.PRODUCTION, SnapshotType.PRODUCTION_ONLY, SnapshotType.STANDARD


@pytest.fixture
def machine(agents, connection):
    return agents.make(connection.uri)


@pytest.fixture
def place(factory):
    folder = Path(tempfile.mkdtemp(prefix="place", dir=factory.folder))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


def take(machine, type=PRODUCTION):
    return machine.vm.create_snapshot("one", type=type)


def disk_of(snapshot):
    (path,) = snapshot.disks.values()
    return path


def kill_qemu(machine):
    pid, _ = pids.find(machine.vm.id)
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while machine.domain.is_active():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_file_systems_rest_at_that_instant_and_the_vm_comes_back_off(machine, at_step, place):
    assert not was_at_rest(disk_of(take(machine, SnapshotType.DISK_ONLY)))
    seen = []
    at_step(plan.SwitchDisks, before=lambda: seen.append((machine.agent.is_frozen(), machine.state())))
    snapshot = machine.vm.create_snapshot("two", type=ONLY)
    assert seen == [(True, "running")]
    assert not machine.agent.is_frozen()
    assert (snapshot.type, snapshot.state) == (PRODUCTION, SavedState.NONE)
    assert json_out.snapshot(snapshot)["type"] == "production"
    assert was_at_rest(disk_of(snapshot))
    assert machine.said == []
    machine.run_for(3)
    machine.check()

    tree = source_home.open_source(machine.vm.export(place / "tree"))
    assert [one.record.type for one in tree.snapshots] == [SnapshotType.DISK_ONLY, PRODUCTION]
    one = source_home.open_source(machine.vm.export(place / "one", hvmgr.ExportOptions(snapshot="two")))
    (image,) = one.disks.values()
    assert was_at_rest(image, one.images[image].format)
    back = machine.host.import_vm(place / "tree" / machine.vm.name, hvmgr.ImportOptions(name="back"))
    assert [one.type for one in back.snapshots()] == [SnapshotType.DISK_ONLY, PRODUCTION]

    snapshot.apply(discard_state=True)
    assert machine.state() == "off"
    assert machine.held() == machine.count_of(snapshot)
    off = machine.vm.create_snapshot("off", type=PRODUCTION)  # whose file systems rest anyway
    assert (off.type, off.state) == (PRODUCTION, SavedState.NONE)
    machine.check()


@pytest.mark.parametrize("stop", ["hung", "paused", "saved"])
def test_without_its_help_it_is_a_standard_one_or_none(machine, stop):
    why = {"hung": "gave no answer within 5 s", "paused": "is paused", "saved": "is saved"}[stop]
    {"hung": machine.agent.stop, "paused": machine.domain.suspend, "saved": machine.domain.managed_save}[stop]()
    before = machine.vm.now()
    with pytest.raises(errors.Conflict, match=why) as failure:
        take(machine, ONLY)
    assert "--type production, standard or disk-only" in failure.value.hint
    assert (machine.vm.now(), machine.vm.snapshots()) == (before, [])
    assert machine.said == []
    snapshot = take(machine)
    assert snapshot.type is STANDARD
    assert snapshot.has_state
    (line,) = (one for one in machine.said if "stands still" not in one)
    assert line.startswith("a standard snapshot is taken instead of a production one: ")
    assert why in line
    machine.check()


@pytest.mark.parametrize("command", ["guest-fsfreeze-status", "guest-fsfreeze-freeze"])
def test_agent_that_must_not_is_an_agent_that_does_not(machine, command):
    machine.agent.forbid(command)
    with pytest.raises(errors.HvmgrError, match="disabled") as failure:
        take(machine, ONLY)
    assert failure.value.hint
    assert machine.vm.snapshots() == []
    machine.check()
    snapshot = take(machine)
    assert (snapshot.type, snapshot.has_state) == (STANDARD, True)
    assert "disabled" in machine.said[0]
    assert "\n" not in machine.said[0]
    machine.tick()
    machine.check()


@pytest.mark.parametrize("fate", ["hang_at_nudge", "die_at_nudge"])
def test_agent_that_is_gone_when_it_should_wake_them(machine, fate, at_step, monkeypatch):
    def gone():
        machine.agent.nudge()
        machine.agent.await_silence()

    getattr(machine.agent, fate)()
    at_step(plan.SwitchDisks, before=gone)
    with monkeypatch.context() as hasty:
        hasty.setattr(guest_agent, "THAW_S", 2)
        with pytest.raises(errors.HostFailed, match=r"done, but .* may still be at rest: .* within 2 s") as failure:
            take(machine)
    assert "virsh destroy" in failure.value.hint
    assert not journal.is_open(machine.layout.journal)
    (snapshot,) = machine.vm.snapshots()  # which asks again, and is told the same
    assert was_at_rest(disk_of(snapshot))
    assert ["may still be at rest" in one for one in machine.said] == [True]
    machine.said.clear()

    machine.agent.nudge()
    machine.agent.await_answer()
    assert machine.agent.is_frozen()
    snapshot.rename("two")
    assert not machine.agent.is_frozen()
    assert "has woken them" in machine.said[0]
    assert not machine.layout.guest_at_rest.exists()
    machine.run_for(2)
    machine.check()
    assert take(machine, ONLY).type is PRODUCTION


def test_agent_that_hangs_while_it_puts_them_to_rest(machine, at_step, monkeypatch):
    """Whether they rest nobody knows, so that no memory is saved; who stopped the guest waits no more."""
    monkeypatch.setattr(guest_agent, "THAW_S", 2)
    monkeypatch.setattr(guest_agent, "FREEZE_S", 2)
    at_step(plan.QuiesceGuest, before=machine.agent.stop)
    with pytest.raises(errors.HostFailed, match="did not put its file systems to rest within 2 s") as failure:
        take(machine)
    assert "--type" in failure.value.hint
    assert "did not wake them within 2 s" in machine.said[0]
    assert not journal.is_open(machine.layout.journal)
    machine.vm.stop(force=True)
    machine.said.clear()
    assert machine.vm.snapshots() == []
    assert machine.said == []
    machine.check()


def test_next_command_wakes_them(machine, kill_at, run_and_die):
    for step, taken in ((plan.SwitchDisks, 0), (plan.WakeGuest, 1)):
        kill_at(step)
        run_and_die(take, machine)
        assert machine.agent.is_frozen()
        assert len(machine.vm.snapshots()) == taken
        assert not machine.agent.is_frozen()
        machine.run_for(2)
        machine.check()


@pytest.mark.parametrize(("step", "taken"), [(plan.QuiesceGuest, 0), (plan.SwitchDisks, 1), (plan.WakeGuest, 1)])
def test_vm_that_crashes_in_the_middle(machine, at_step, step, taken):
    """Once its file systems rest, what it leaves is what was wanted."""
    at_step(step, before=lambda: kill_qemu(machine))
    if taken:
        assert was_at_rest(disk_of(take(machine)))
    else:
        with pytest.raises(errors.HostFailed, match="did not put its file systems to rest"):
            take(machine)
    assert [one.type for one in machine.vm.snapshots()] == [PRODUCTION] * taken
    assert machine.said == []
    assert machine.state() == "off"
    machine.check()


def test_nobody_is_put_to_rest_while_somebody_else_works_on_the_disks(machine, place, monkeypatch):
    copy = place / "copy.qcow2"
    asked = []
    monkeypatch.setattr(guest_agent, "freeze", asked.append)
    handle = machine.domain._handle()
    disk = f"<disk type='file'><source file='{copy}'/><driver type='qcow2'/></disk>"
    place.chmod(0o777)
    handle.blockCopy("vda", disk, {"bandwidth": 1024}, 4)  # VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB
    for type in SnapshotType:
        with pytest.raises(errors.Busy):
            take(machine, type)
    handle.blockJobAbort("vda", 0)
    assert asked == []
    assert machine.vm.snapshots() == []
    machine.check()
