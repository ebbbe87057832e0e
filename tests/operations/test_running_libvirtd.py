"""The same against a daemon, which may die in the middle: the next command asks QEMU, and completes or undoes."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from hvmgr import errors
from hvmgr.host import hypervisor
from hvmgr.model import plan, tree
from hvmgr.model.metadata import SavedState, SnapshotType

pytestmark = [pytest.mark.guest, pytest.mark.libvirtd]


@pytest.fixture
def machine(factory, libvirtd):
    """A running machine below a daemon of its own."""
    machine = factory.make(libvirtd.uri)
    machine.said.clear()
    return machine


def qemu_pid(libvirtd, machine):
    return int((libvirtd.root / "run" / "qemu" / f"{machine.vm.name}.pid").read_text())


def kill_when(libvirtd, condition):
    """Kills the daemon, from another thread, as soon as the condition holds; call the answer to wait for that."""

    def watch():
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, "the moment did not come"
        libvirtd.stop(signal_=signal.SIGKILL)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread.join


def opens_child(libvirtd, machine):
    """Whether QEMU has a new image open: libvirt adds it just before it switches to it."""
    known = {str(one) for one in machine.layout.images.iterdir()}
    folder = Path(f"/proc/{qemu_pid(libvirtd, machine)}/fd")

    def look():
        for link in folder.iterdir():
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if target.startswith(str(machine.layout.images)) and target not in known:
                return True
        return False

    return look


def writes_memory(machine):
    def look():
        return any(path.stat().st_size > 1 << 20 for path in machine.layout.snapshots.glob("*/memory.save"))

    return look


def test_snapshots_of_a_running_guest(machine):
    one = machine.vm.create_snapshot("one")
    machine.run_for(4)
    two = machine.vm.create_snapshot("two", type=SnapshotType.DISK_ONLY)
    late = machine.run_for(4)
    since = time.monotonic()
    one.apply()  # the memory of the present goes to disk and is thrown away
    assert machine.tick().memory <= machine.most(one, since)
    machine.check()
    machine.vm.undo(discard_state=True)
    assert machine.held() >= late.disk
    one.apply()
    two.delete()
    assert not tree.pending(machine.vm.tree())
    one.delete()
    assert not tree.pending(machine.vm.tree())
    late = machine.tick()
    machine.check()
    machine.vm.stop()
    assert not machine.vm.merge()
    assert machine.held() >= late.memory
    machine.check()


@pytest.mark.parametrize("kind", [SnapshotType.DISK_ONLY, SnapshotType.STANDARD])
def test_daemon_killed_when_the_switch_begins(libvirtd, machine, kind):
    late = machine.tick()
    wait = kill_when(libvirtd, opens_child(libvirtd, machine))
    with pytest.raises(errors.OutcomeUnknown) as failure:
        machine.vm.create_snapshot("one", type=kind)
    assert failure.value.exit_code == 9
    wait()
    assert machine.layout.journal.exists()
    libvirtd.start()
    snapshots = machine.vm.snapshots()  # the same Host: it connects again
    assert machine.said[-1].split()[0] == ("completed" if snapshots else "undid")
    assert machine.state() == "running"
    assert machine.tick().memory > late.memory
    (writing,) = machine.domain.writable_files()
    assert str(writing) == machine.vm.now().disks["vda"]
    if str(writing) in machine.domain.xml(live=True):  # else libvirt died too late to know of the switch
        snapshot = machine.vm.create_snapshot("two", type=kind)
        assert machine.tick().memory > machine.count_of(snapshot)
        machine.check()
    late = machine.tick()
    machine.vm.stop(force=True)
    assert machine.held() >= late.disk
    machine.check()


def test_daemon_killed_right_after_qemu_switched(libvirtd, machine, monkeypatch):
    """What libvirt does, and then it dies before it notes anything."""

    def switch(domain, children, **_):
        (child,) = children.values()
        (path,) = domain.writable_files()
        nodes = domain.monitor("query-named-block-nodes", flat=True)
        top = next(node["node-name"] for node in nodes if node["drv"] == "qcow2" and path.name in node["file"])
        file = {"driver": "file", "filename": str(child)}
        domain.monitor("blockdev-add", node_name="child", driver="qcow2", file=file, backing=None)
        domain.monitor("blockdev-snapshot", node=top, overlay="child")
        libvirtd.stop(signal_=signal.SIGKILL)
        domain.state()

    late = machine.tick()
    with monkeypatch.context() as patched:
        patched.setattr(hypervisor.Domain, "switch_disks", switch)
        with pytest.raises(errors.OutcomeUnknown):
            machine.vm.create_snapshot("one", type=SnapshotType.DISK_ONLY)
    libvirtd.start()
    (snapshot,) = machine.vm.snapshots()
    assert machine.said[-1].startswith("completed the interrupted creation")
    assert machine.tick().memory > machine.count_of(snapshot) >= late.disk

    # libvirt does not know the image that QEMU writes to: nothing goes on with it before a stop and a start.
    late = machine.tick()
    for call in (lambda: machine.vm.create_snapshot("two"), snapshot.apply):
        with pytest.raises(errors.Conflict, match="QEMU does not write to"):
            call()
    machine.vm.stop(force=True)
    assert machine.held() >= late.disk > machine.count_of(snapshot)
    machine.check()
    machine.boot()
    second = machine.vm.create_snapshot("two")
    assert machine.tick().memory > machine.count_of(second)
    machine.check()
    snapshot.apply(discard_state=True)
    assert machine.held() == machine.count_of(snapshot)


@pytest.mark.usefixtures("standing_still")
def test_daemon_killed_while_it_saves_memory(libvirtd, machine):
    late = machine.tick()
    wait = kill_when(libvirtd, writes_memory(machine))
    with pytest.raises(errors.OutcomeUnknown):
        machine.vm.create_snapshot("one")
    wait()
    libvirtd.start()
    assert machine.vm.snapshots() == []
    assert machine.said[-1].startswith("undid the interrupted creation")
    assert machine.state() == "running"
    assert machine.tick().memory > late.memory
    machine.check()
    assert machine.vm.create_snapshot("two").state is SavedState.RUNNING
    assert machine.tick().memory > late.memory
    machine.check()


def test_daemon_killed_while_it_saves_the_present(libvirtd, machine):
    snapshot = machine.vm.create_snapshot("one")
    late = machine.run_for(4)
    memory = machine.layout.put_away
    wait = kill_when(libvirtd, lambda: memory.exists() and memory.stat().st_size > 1 << 20)
    with pytest.raises(errors.OutcomeUnknown):
        snapshot.apply()
    wait()
    libvirtd.start()
    machine.vm.now()
    assert machine.state() == "running"
    assert machine.tick().memory > late.memory
    machine.check()
    snapshot.apply()
    assert machine.tick().memory > machine.count_of(snapshot)
    machine.check()


def test_present_that_was_put_away_and_autostarted(libvirtd, machine, kill_at, run_and_die):
    snapshot = machine.vm.create_snapshot("one")
    late = machine.run_for(4)
    machine.domain._handle().setAutostart(1)
    kill_at(plan.SavePresent, after=True)
    run_and_die(snapshot.apply)
    libvirtd.stop()
    for note in libvirtd.root.glob("run/**/autostarted"):  # as after a boot of the host
        note.unlink()
    libvirtd.start()
    with hypervisor.opened(libvirtd.uri, wait_s=5) as other:
        deadline = time.monotonic() + 60
        while not other.find_domain(machine.vm.id).is_active():
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert machine.vm.snapshots() == [snapshot]
    assert machine.state() == "running"
    with machine.screen() as screen:
        assert screen.next_tick(60).ok
    machine.vm.stop(force=True)
    assert machine.held() >= late.disk
    machine.check()
