"""``export --quiesce`` with Debian's own qemu-guest-agent in a real guest, which writes to an ext4 meanwhile."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import hvmgr
from hvmgr import errors
from hvmgr.host import guest_agent, libvirt_door
from hvmgr.model import manifest, plan
from hvmgr.model.specification import DiskSpecification
from hvmgr.operations.exchange import freezing
from hvmgr.storage import journal, source_home
from tests.operations import agent_guest
from tests.operations.conftest import Factory, Kind

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

AGENT_S = 120

DYING = """
import os, signal, sys
from pathlib import Path
import hvmgr
from hvmgr.model import plan
from hvmgr.operations.steps import execution

def die(session, step):
    os.kill(os.getpid(), signal.SIGKILL)

execution.DO = {**execution.DO, plan.SwitchDisks: die}
uri, root, vm, out = sys.argv[1:]
with hvmgr.Host.open(uri, root=Path(root)) as host:
    host.vm(vm).export(out, hvmgr.ExportOptions(quiesce=True))
"""


class Agents:
    """Machines with an agent: the first one boots, later ones go on from its memory, agent and all."""

    def __init__(self, factory):
        self.factory = factory

    def make(self, uri):
        if Kind() in self.factory.games:
            machine = self.factory.make(uri)
        else:
            disk = agent_guest.make_disk(self.factory.folder / "disk.qcow2")
            machine = self.factory.make(uri, disks=(DiskSpecification(path=disk),))
            self.wait_for(machine)
            self.factory._keep(machine, Kind())
        self.wait_for(machine)
        machine.said.clear()
        return machine

    def wait_for(self, machine):
        deadline = time.monotonic() + AGENT_S
        while not guest_agent.is_connected(machine.domain):
            assert time.monotonic() < deadline, "the guest's agent did not come"
            time.sleep(0.1)


@pytest.fixture(scope="module")
def _agents(counting_guest, request, require_program):
    for name in ("ldd", "mke2fs"):
        require_program(name)
    folder = Path(tempfile.mkdtemp(prefix="hv", dir="/tmp"))
    folder.chmod(0o711)
    made = agent_guest.build(counting_guest, request.config.cache.mkdir("guest-agent"))
    initrd = folder / "initrd"  # where QEMU's user gets at it
    shutil.copyfile(made.initrd, initrd)
    initrd.chmod(0o644)
    yield Agents(Factory(dataclasses.replace(made, initrd=initrd), folder))
    shutil.rmtree(folder)


@pytest.fixture
def agents(_agents):
    yield _agents
    for host in _agents.factory.hosts:
        host.close()
        shutil.rmtree(host.root)
    _agents.factory.hosts.clear()


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


def silence_agent(machine):
    """The agent stops, and the channel stays open: its process sleeps."""
    arguments = {"path": "/bin/busybox", "arg": ["killall", "-STOP", "qemu-ga"]}
    request = json.dumps({"execute": "guest-exec", "arguments": arguments})
    libvirt_door.agent_command(machine.domain._handle(), request, 20)
    deadline = time.monotonic() + AGENT_S
    with contextlib.suppress(errors.HvmgrError):
        while True:  # the process that stops it comes a little later
            machine.domain.ask_agent("guest-ping", timeout_s=1)
            assert time.monotonic() < deadline, "the guest's agent did not stop"


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
    monkeypatch.setattr(freezing, "_copies", lambda *_, **__: [copy])
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
def test_next_command_wakes_them_after_kill_9(agents, libvirtd, out):
    machine = agents.make(libvirtd.uri)
    died = subprocess.run(
        [sys.executable, "-c", DYING, libvirtd.uri, machine.host.root, machine.vm.name, out],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert died.returncode == -signal.SIGKILL, died
    assert is_frozen(machine)
    machine.host.vm(machine.vm.name).now()
    assert not is_frozen(machine)
    assert any("undid the interrupted freezing" in one for one in machine.said)
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
    silence_agent(machine)
    refuse("gave no answer within 1 s")
    machine.check()
