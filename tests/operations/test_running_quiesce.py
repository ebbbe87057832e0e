"""``export --quiesce`` with Debian's own qemu-guest-agent in a real guest, which writes to an ext4 meanwhile."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import hvmgr
from hvmgr import errors
from hvmgr.host import guest_agent
from hvmgr.model import manifest, plan
from hvmgr.operations import snapshots
from hvmgr.operations.exchange import freezing
from hvmgr.storage import journal, source_home
from tests.operations import agent_guest

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

DYING = """
import os, signal, sys
from pathlib import Path
import hvmgr
from hvmgr.model import plan
from hvmgr.operations.steps import execution

def die(session, step):
    os.kill(os.getpid(), signal.SIGKILL)

execution.DO = {**execution.DO, plan.SwitchDisks: die}
uri, root, vm, out, what = sys.argv[1:]
with hvmgr.Host.open(uri, root=Path(root)) as host:
    if what == "export":
        host.vm(vm).export(out, hvmgr.ExportOptions(quiesce=True))
    else:
        host.vm(vm).create_snapshot(type=hvmgr.SnapshotType.PRODUCTION)
"""


@pytest.fixture
def machine(agents, connection):
    return agents.make(connection.uri)


@pytest.fixture
def out():
    folder = Path(tempfile.mkdtemp(prefix="out", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


def export(machine, out, **options):
    """To a folder of its own each time."""
    folder = machine.vm.export(out / f"{len(list(out.iterdir()))}", hvmgr.ExportOptions(**options))
    assert machine.host.verify(folder) == []
    return folder


def disk_was_at_rest(folder):
    source = source_home.open_source(folder)
    (path,) = source.disks.values()
    return agent_guest.was_at_rest(path, source.images[path].format)


def is_frozen(machine):
    return guest_agent.is_frozen(machine.domain)


def test_file_systems_rest_at_that_moment_and_not_any_longer(machine, out, at_step, monkeypatch, tmp_path):
    assert not disk_was_at_rest(export(machine, out)), "without --quiesce they are as after a power cut"
    seen = []
    at_step(plan.SwitchDisks, before=lambda: seen.append((is_frozen(machine), machine.state())))
    folder = export(machine, out, quiesce=True)
    assert seen == [(True, "running")]
    assert not is_frozen(machine)
    assert disk_was_at_rest(folder)
    assert manifest.parse((folder / manifest.FILE).read_text(), source="it").options.quiesced
    machine.run_for(2)
    machine.check()

    # Copies of NVRAM or TPM state need a paused guest, whose agent could do nothing any more.
    source = tmp_path / "nvram"
    source.write_bytes(b"variables")
    copy = plan.CopyFile(source=str(source), target=str(machine.layout.export / "nvram"))
    monkeypatch.setattr(snapshots, "copies_of_firmware", lambda *_: [copy])
    monkeypatch.setattr(freezing, "firmware", lambda *_: (None, None))
    at_step(plan.Suspend, before=lambda: seen.append(is_frozen(machine)))
    at_step(plan.SwitchDisks, before=lambda: seen.append(machine.state()))
    folder = export(machine, out, quiesce=True)
    assert seen[1:] == [True, "paused"]
    assert disk_was_at_rest(folder)
    assert (machine.state(), is_frozen(machine)) == ("running", False)
    machine.check()


def test_they_are_woken_whatever_happens(machine, out, at_step, kill_at, run_and_die):
    at_step(plan.SwitchDisks, errors.HostFailed("no"))
    with pytest.raises(errors.HostFailed, match="no"):
        export(machine, out, quiesce=True)
    assert not is_frozen(machine)
    machine.check()
    for step in (plan.SwitchDisks, plan.WakeGuest):
        kill_at(step)
        run_and_die(export, machine, out, quiesce=True)
        assert is_frozen(machine)
        machine.vm.now()
        assert not is_frozen(machine)
        machine.run_for(2)
        machine.check()
    at_step(plan.WakeGuest, errors.HostFailed("the agent is gone"))
    with pytest.raises(errors.HostFailed, match="the agent is gone"):
        export(machine, out, quiesce=True)
    assert journal.is_open(machine.layout.journal), "nobody else knows that the guest waits"
    machine.vm.now()
    assert not is_frozen(machine)
    machine.check()
    kill_at(plan.WakeGuest)
    run_and_die(export, machine, out, quiesce=True)
    machine.domain.destroy()  # who is off waits for nobody
    machine.vm.now()
    machine.check()


@pytest.mark.libvirtd
@pytest.mark.parametrize("what", ["export", "snapshot"])
def test_next_command_wakes_them_after_kill_9(agents, libvirtd, out, what):
    machine = agents.make(libvirtd.uri)
    died = subprocess.run(
        [sys.executable, "-c", DYING, libvirtd.uri, machine.host.root, machine.vm.name, out, what],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert died.returncode == -signal.SIGKILL, died
    assert is_frozen(machine)
    machine.host.vm(machine.vm.name).now()
    assert not is_frozen(machine)
    assert any("undid the interrupted " in one for one in machine.said)
    assert machine.vm.snapshots() == []
    machine.check()


def test_who_cannot_be_put_to_rest_is_refused(machine, out, monkeypatch):
    def refuse(words):
        with pytest.raises(errors.Conflict, match=words):
            export(machine, out, quiesce=True)
        assert not journal.is_open(machine.layout.journal)

    guest_agent.freeze(machine.domain)
    refuse("at rest already")
    assert is_frozen(machine), "somebody else needs that"
    guest_agent.thaw(machine.domain)
    machine.domain.suspend()
    refuse("is paused")
    machine.domain.resume()
    monkeypatch.setattr(guest_agent, "ANSWER_S", 1)
    machine.agent.stop()
    refuse("gave no answer within 1 s")
    machine.check()
