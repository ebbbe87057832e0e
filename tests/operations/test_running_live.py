"""Memory that is saved while the guest goes on: of one instant with the disks, and whole whatever dies meanwhile.

QEMU runs as root and keeps its rights here, so that it gets userfaultfd whatever the host's setting is.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from hvmgr import errors
from hvmgr.host import background_snapshot, saved_state, userfault
from hvmgr.host.background_snapshot import Phase, Stream
from hvmgr.host.saved_state import Compression
from hvmgr.model import memory_plan
from hvmgr.model.metadata import SavedState, SnapshotType
from hvmgr.operations import background, stuck_memory
from hvmgr.operations.steps import execution, memory_steps
from tests import private_libvirt
from tests.operations.conftest import Killed
from tests.operations.test_running_export import Out

pytestmark = [pytest.mark.guest, pytest.mark.libvirtd, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def daemon(new_embed_root):
    if os.geteuid() != 0 or shutil.which("libvirtd") is None:
        pytest.skip("needs root and libvirtd")
    if not private_libvirt.has_userfaultfd():
        pytest.skip("no userfaultfd that write-protects here")
    with private_libvirt.daemon(new_embed_root(), qemu_conf=private_libvirt.WITH_RIGHTS) as daemon:
        yield daemon


@pytest.fixture
def live(factory, daemon):
    """A running machine whose QEMU may save memory in the background."""
    machine = factory.make(daemon.uri)
    yield machine
    for domain in machine.host.connection.domains():
        domain.destroy()


def assert_goes_back_to(machine, snapshot):
    snapshot.apply(discard_state=True)
    assert machine.tick().memory > machine.count_of(snapshot)
    machine.check()


def test_guest_goes_on_and_comes_back_to_the_instant(live):
    before = live.tick()
    snapshot = live.vm.create_snapshot("one", fallback=False)
    after = live.tick()
    assert snapshot.state is SavedState.RUNNING
    assert before.memory - 1 <= live.count_of(snapshot) < after.memory
    assert live.state() == "running"
    live.check()
    second = live.vm.create_snapshot("two", fallback=False, compress=True)  # one after the other, and compressed
    memory = live.layout.memory(second.id)
    assert saved_state.read(memory).compression is Compression.ZSTD
    assert memory.stat().st_blocks * 512 < live.layout.memory(snapshot.id).stat().st_blocks * 512
    live.run_for(5)
    assert_goes_back_to(live, second)
    assert_goes_back_to(live, snapshot)
    assert not list(live.layout.private.glob("*.save"))
    assert live.said == []


def test_libvirt_itself_reads_and_restores_the_file(live):
    snapshot = live.vm.create_snapshot("one", fallback=False)
    memory = live.layout.memory(snapshot.id)
    assert memory.stat().st_blocks * 512 <= memory.stat().st_size + (1 << 20)  # nothing is reserved any more
    virsh = ["virsh", "-q", "-c", live.host.uri]
    shown = subprocess.run(
        [*virsh, "save-image-dumpxml", memory], capture_output=True, text=True, check=True, timeout=60
    )
    assert live.vm.id in shown.stdout
    live.run_for(3)
    live.domain.destroy()
    working = Path(live.vm.now().disks["vda"])
    child = working.with_name("restored.qcow2")
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", snapshot.disks["vda"], "-F", "qcow2", child]
    subprocess.run(command, check=True, timeout=60)
    xml = live.layout.private / "restored.xml"
    xml.write_text(saved_state.read(memory).xml.replace(snapshot.disks["vda"], str(child)))
    subprocess.run([*virsh, "restore", memory, "--xml", xml], check=True, timeout=60, capture_output=True)
    assert live.tick().memory > live.count_of(snapshot)
    live.domain.destroy()


def test_paused_guest_stays_paused(live):
    live.domain.suspend()
    snapshot = live.vm.create_snapshot("one", fallback=False)
    assert (snapshot.state, live.state(), live.said) == (SavedState.PAUSED, "paused", [])


# --- exports ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def out(factory, live):
    folder = Path(tempfile.mkdtemp(prefix="out", dir=factory.folder))
    folder.chmod(0o711)
    yield Out(folder, live.host.connection)
    shutil.rmtree(folder)


def test_guest_goes_on_while_an_export_saves_its_memory(live, out, kill_at, run_and_die):
    before = live.tick()
    folder = out.export(live, with_state=True)
    after = live.tick()
    assert before.memory - 1 <= out.count(folder) < after.memory
    assert not any("stands still" in one for one in live.said)
    assert out.first_tick(folder).follows(out.count(folder))
    assert not live.layout.export.exists()
    live.check()
    shutil.rmtree(folder)
    kill_at(memory_plan.AwaitMemory)
    run_and_die(out.export, live, with_state=True)
    live.vm.now()
    assert live.state() == "running"
    assert background_snapshot.look(live.domain).phase is Phase.COMPLETED
    live.vm.create_snapshot("one", fallback=False)
    assert not live.layout.export.exists()
    live.check()


def test_export_whose_memory_does_not_come_through_is_none(live, out, at_step, monkeypatch):
    real = background_snapshot.look
    at_step(memory_plan.AwaitMemory, before=lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(errors.Cancelled, match="nothing was exported"):
        out.export(live, with_state=True)
    at_step(memory_plan.AwaitMemory, before=lambda: _wait_and_fake(monkeypatch, live, Stream(Phase.FAILED)))
    with pytest.raises(errors.HostFailed, match="nothing was exported") as failure:
        out.export(live, with_state=True)
    monkeypatch.setattr(background_snapshot, "look", real)
    assert "--with-state" in failure.value.hint
    assert not list(out.folder.rglob("*.xml"))
    assert not live.layout.export.exists()
    assert live.state() == "running"
    live.check()


# --- where it cannot be -----------------------------------------------------------------------------------------------


def test_refusal_is_one_line_and_the_guest_stands_still(live, monkeypatch):
    said = []
    monkeypatch.setattr("hvmgr.operations.session.Session.say", lambda _self, sentence: said.append(sentence))
    monkeypatch.setattr(background_snapshot, "refusal", lambda _: "Background-snapshot is not supported by host kernel")
    before = live.domain.xml(live=False)
    with pytest.raises(errors.Unsupported, match="userfaultfd") as failure:
        live.vm.create_snapshot("none", fallback=False)
    assert failure.value.exit_code == 5
    assert "sysctl -w vm.unprivileged_userfaultfd=1" in failure.value.hint
    assert live.domain.xml(live=False) == before
    assert live.vm.snapshots() == []
    snapshot = live.vm.create_snapshot("one")
    assert snapshot.state is SavedState.RUNNING
    assert len(said) == 1
    assert "sysctl -w vm.unprivileged_userfaultfd=1" in said[0]
    assert str(userfault.DROP_IN) in said[0]
    live.check()


def test_refusal_at_the_last_moment_is_the_same(live, monkeypatch):
    """As by a security module that does not let QEMU have the file."""
    real = type(live.domain).monitor

    def monitor(domain, command, **more):
        if command == "getfd":
            raise errors.HostFailed("no", words="No file descriptor supplied via SCM_RIGHTS")
        return real(domain, command, **more)

    monkeypatch.setattr(type(live.domain), "monitor", monitor)
    with pytest.raises(errors.Unsupported):
        live.vm.create_snapshot("none", fallback=False)
    assert live.vm.snapshots() == []
    snapshot = live.vm.create_snapshot("one")
    assert (snapshot.state, live.state()) == (SavedState.RUNNING, "running")
    monkeypatch.undo()
    live.check()
    assert_goes_back_to(live, snapshot)


def test_too_little_space_is_known_before(live, monkeypatch):
    monkeypatch.setattr(background, "_DEVICES", 1 << 60)
    with pytest.raises(errors.Unsupported, match="cannot be reserved"):
        live.vm.create_snapshot("none", fallback=False)
    assert live.vm.create_snapshot("one").state is SavedState.RUNNING
    live.check()


# --- what goes wrong meanwhile ----------------------------------------------------------------------------------------


def test_stop_in_the_middle_lets_it_end_and_removes_the_snapshot(live, at_step):
    late = live.tick()
    at_step(memory_plan.AwaitMemory, before=lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(errors.Cancelled):
        live.vm.create_snapshot("one", fallback=False)
    assert background_snapshot.look(live.domain).phase is Phase.COMPLETED
    assert live.vm.snapshots() == []
    assert live.tick().memory > late.memory
    live.check()
    snapshot = live.vm.create_snapshot("two", fallback=False)
    assert_goes_back_to(live, snapshot)


def test_failure_is_said_and_memory_is_refused_until_qemu_is_new(live, at_step, monkeypatch):
    failed = Stream(Phase.FAILED, words="Input/output error")
    real = background_snapshot.look
    at_step(memory_plan.AwaitMemory, before=lambda: _wait_and_fake(monkeypatch, live, failed))
    snapshot = live.vm.create_snapshot("one", fallback=False)
    monkeypatch.setattr(background_snapshot, "look", real)
    assert snapshot.state is SavedState.NONE
    assert "restarted" in live.said[0]
    assert "Input/output error" in live.said[0]
    live.tick()
    live.check()
    for call in (lambda: live.vm.create_snapshot("two"), snapshot.apply):
        with pytest.raises(errors.Conflict, match="restarted") as failure:
            call()
        assert failure.value.hint.startswith("restart the VM")
    assert live.vm.create_snapshot("disks", type=SnapshotType.DISK_ONLY).state is SavedState.NONE
    assert stuck_memory.is_noted(live.layout)
    live.domain.destroy()
    live.boot()
    assert live.vm.create_snapshot("three", fallback=False).state is SavedState.RUNNING
    assert not (live.layout.private / "stuck-memory").exists()
    live.check()


def _wait_and_fake(monkeypatch, machine, failed):
    """The stream really ends, so that nothing is left in QEMU; then it says that it failed."""
    while background_snapshot.look(machine.domain).phase is Phase.ACTIVE:
        time.sleep(0.05)
    monkeypatch.setattr(background_snapshot, "look", lambda _domain: failed)


def test_killed_while_the_memory_is_saved_is_completed_by_the_next_command(live, kill_at, run_and_die):
    before = live.tick()
    kill_at(memory_plan.AwaitMemory)
    run_and_die(live.vm.create_snapshot, "one", fallback=False)
    (snapshot,) = live.vm.snapshots()
    assert snapshot.state is SavedState.RUNNING
    assert live.tick().memory > live.count_of(snapshot) >= before.memory - 1
    live.check()
    assert_goes_back_to(live, snapshot)


def test_killed_command_is_completed_without_another_one(live):
    """A ``virsh save`` right after its death would else meet a QEMU that lets the guest run on while it saves."""
    command = [sys.executable, "-m", "hvmgr", "-c", live.host.uri, "--root", live.host.root]
    for _ in range(5):  # a busy host may look when it is over
        with subprocess.Popen([*command, "snapshot", "create", live.vm.id, "one", "--no-fallback"]) as killed:
            wait_until(lambda: background_snapshot.look(live.domain).phase is Phase.ACTIVE or killed.poll() is not None)
            killed.kill()
        if killed.returncode == -signal.SIGKILL:
            break
        live.vm.snapshot("one").delete()
        live.said.clear()
    assert killed.returncode == -signal.SIGKILL
    wait_until(lambda: not live.layout.journal.exists())
    able = {one["capability"]: one["state"] for one in live.domain.monitor("query-migrate-capabilities")}
    assert not able["background-snapshot"]
    (snapshot,) = live.vm.snapshots()
    assert snapshot.state is SavedState.RUNNING
    assert live.said == []  # nothing was left for us
    live.check()
    assert_goes_back_to(live, snapshot)


def wait_until(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_killed_with_the_guest_stopped_for_the_switch(live, monkeypatch, run_and_die):
    """Before the disks were switched: it runs on, and there is no snapshot."""
    late = live.tick()
    _die_in(monkeypatch, type(live.domain), "switch_disks", run_and_die, live)
    assert live.state() == "paused"
    assert live.vm.snapshots() == []
    assert live.tick().memory > late.memory
    live.check()
    assert live.vm.create_snapshot("two", fallback=False).state is SavedState.RUNNING


def test_killed_between_switch_and_stream(live, monkeypatch, run_and_die):
    """The disks of the snapshot are whole, and its memory is not there; the guest runs on."""
    late = live.tick()
    _die_in(monkeypatch, background_snapshot, "start", run_and_die, live)
    assert live.state() == "paused"
    (snapshot,) = live.vm.snapshots()
    assert snapshot.state is SavedState.NONE
    assert any("disks alone" in sentence for sentence in live.said)
    assert live.tick().memory > late.memory
    assert live.count_of(snapshot) >= late.memory - 1
    live.check()
    assert live.vm.create_snapshot("two", fallback=False).state is SavedState.RUNNING


def _die_in(monkeypatch, owner, name, run_and_die, machine):
    """The command dies instead of calling a function, in the middle of the switch; nothing is put right."""

    def die(*_, **__):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, die)
        patched.setattr(memory_steps, "_let_go", lambda _domain: None)
        patched.setattr(execution, "_ask_after", lambda *_: False)
        patched.setattr(execution, "_go_back", lambda *_: None)
        run_and_die(machine.vm.create_snapshot, "one", fallback=False)


def test_qemu_that_dies_meanwhile_leaves_the_disks(live, daemon, at_step):
    late = live.tick()
    pid = int((daemon.root / "run/qemu" / f"{live.vm.name}.pid").read_text())
    at_step(memory_plan.AwaitMemory, before=lambda: os.kill(pid, signal.SIGKILL))
    snapshot = live.vm.create_snapshot("one", fallback=False)
    assert snapshot.state is SavedState.NONE
    assert any("disks alone" in sentence for sentence in live.said)
    assert live.state() == "off"
    assert live.count_of(snapshot) >= late.memory - 1
    live.check()


def test_libvirtd_that_dies_meanwhile_is_asked_again(live, daemon, at_step):
    at_step(memory_plan.AwaitMemory, before=lambda: daemon.stop(signal_=signal.SIGKILL))
    with pytest.raises(errors.HvmgrError):
        live.vm.create_snapshot("one", fallback=False)
    assert live.layout.journal.exists()
    daemon.start()
    (snapshot,) = live.vm.snapshots()
    assert snapshot.state is SavedState.RUNNING
    assert live.said[-1].startswith("completed the interrupted creation")
    live.check()
    assert_goes_back_to(live, snapshot)


# --- under load -------------------------------------------------------------------------------------------------------


def test_snapshots_in_a_row_while_the_guest_writes(live):
    made, stop = [], threading.Event()
    ticks = []

    def watch():
        with live.screen() as screen:
            while not stop.is_set():
                ticks.append(screen.next_tick(60))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        made = [live.vm.create_snapshot(f"s{number}", fallback=False) for number in range(3)]
    finally:
        stop.set()
        thread.join(60)
    assert all(tick.ok for tick in ticks)
    assert [one.state for one in made] == [SavedState.RUNNING] * 3
    counts = [live.count_of(one) for one in made]
    assert counts == sorted(counts)
    assert_goes_back_to(live, made[1])
