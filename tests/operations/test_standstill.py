"""``hvmgr freeze``: the host's own command runs while the guest stands still; Debian's qemu-guest-agent in a real guest.

The host's snapshot of the file system is a copy of the working image here, made by the command while QEMU has it open.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from hvmgr import errors
from hvmgr.faces import cli
from hvmgr.host import guest_agent
from hvmgr.operations import resting_guest, running_qemu, standstill
from tests.operations.agent_guest import was_at_rest

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

LONG = ["sleep", "100"]


@pytest.fixture
def machine(agents, connection):
    return agents.make(connection.uri)


@pytest.fixture
def freeze(machine):
    """``freeze(*command, limit_s=…)``: of the machine."""
    return lambda *argv, **more: machine.host.freeze([machine.vm], argv, **more)


def image_of(machine):
    (path,) = machine.vm.now().disks.values()
    return path


def is_awake(machine):
    """The guest runs on, whole, and nobody believes anything else."""
    assert not machine.agent.is_frozen()
    assert not machine.layout.guest_at_rest.exists()
    machine.run_for(1)
    machine.check()
    return True


def test_command_runs_at_rest_and_the_guest_runs_on_whatever_becomes_of_it(
    machine, freeze, tmp_path, capfd, monkeypatch
):
    copy = tmp_path / "copy.qcow2"
    outcome = freeze("sh", "-c", f"cp '{image_of(machine)}' {copy}; echo $HVMGR_FROZEN; echo heard >&2")
    assert was_at_rest(copy), "what the host took its snapshot of is whole"
    assert not was_at_rest(image_of(machine)), "the guest has its file system mounted, and writes"
    (one,) = outcome.vms
    assert (outcome.exit_code, one.file_systems, one.state) == (0, 1, "running")
    said = capfd.readouterr()
    assert said.out == f"{machine.vm.id}\n"
    assert said.err.endswith("heard\n")  # an embedded libvirt may have said something before
    assert is_awake(machine)

    for script, words, code in (("exit 5", "ended with code 5", 5), ("kill -9 $$", "was ended by signal 9", -9)):
        with pytest.raises(errors.HostFailed, match=words) as failure:
            freeze("sh", "-c", script)
        assert failure.value.facts["exit_code"] == code
        assert is_awake(machine)

    with pytest.raises(errors.HostFailed, match="did not end within 1 s and was stopped"):
        freeze("sh", "-c", f"trap 'echo asked > {tmp_path}/asked; exit 0' TERM; sleep 100 & wait", limit_s=1)
    assert (tmp_path / "asked").read_text() == "asked\n", "it could put right what it had begun"
    assert is_awake(machine)

    with pytest.raises(errors.Unsupported, match="'no-such-program' is not installed"):
        freeze("no-such-program")
    for signalled in (signal.SIGTERM, signal.SIGINT):
        with pytest.raises(errors.Cancelled):
            freeze("sh", "-c", f"kill -{signalled} {os.getpid()}; exec sleep 100")
        assert is_awake(machine)

    real = standstill._why_awake
    monkeypatch.setattr(standstill, "_why_awake", lambda one: (guest_agent.thaw(one.domain), real(one))[1])
    with pytest.raises(errors.HostFailed, match="did not rest until 'true' had ended: somebody else has woken them"):
        freeze("true")
    assert is_awake(machine)


def test_who_cannot_be_put_to_rest_is_refused_and_the_command_not_run(machine, freeze, tmp_path, monkeypatch):
    def refuse(words, error=errors.Conflict):
        with pytest.raises(error, match=words):
            freeze("touch", str(tmp_path / "ran"))
        assert not (tmp_path / "ran").exists()

    guest_agent.freeze(machine.domain)
    refuse("at rest already")
    assert machine.agent.is_frozen(), "somebody else needs that"
    guest_agent.thaw(machine.domain)
    machine.domain.suspend()
    refuse("is paused")
    machine.domain.resume()

    monkeypatch.setattr(guest_agent, "FREEZE_S", 2)
    monkeypatch.setattr(guest_agent, "THAW_S", 2)
    monkeypatch.setattr(resting_guest, "announce", lambda session: (announce(session), machine.agent.stop()))
    refuse("did not put its file systems to rest within 2 s", errors.HostFailed)
    assert any("may still be at rest: its agent did not wake them within 2 s" in one for one in machine.said)
    assert running_qemu.is_noted(machine.layout.guest_at_rest), "whoever comes next asks again"
    machine.check()


announce = resting_guest.announce


def test_agent_that_is_gone_when_it_should_wake_them(machine, freeze, monkeypatch):
    def gone(one):
        machine.agent.nudge()
        machine.agent.await_silence()

    monkeypatch.setattr(guest_agent, "THAW_S", 2)
    monkeypatch.setattr(standstill, "_why_awake", gone)
    for fate in (machine.agent.hang_at_nudge, machine.agent.die_at_nudge):
        fate()
        words = r"ended with code 0, but .* may still be at rest: .* within 2 s"
        with pytest.raises(errors.HostFailed, match=words) as failure:
            freeze("true")
        assert "virsh destroy" in failure.value.hint
        machine.agent.nudge()
        machine.agent.await_answer()
        assert machine.agent.is_frozen()
        machine.vm.now()
        assert is_awake(machine)


@pytest.mark.libvirtd
def test_killed_with_kill_9(agents, libvirtd, tmp_path, monkeypatch):
    """A process that waits for just that wakes the guest; were it killed too, the next command would, by the note."""
    machine = agents.make(libvirtd.uri)
    options = ["-c", libvirtd.uri, "--root", str(machine.host.root)]
    begun, ended = tmp_path / "begun", tmp_path / "ended"
    script = f"trap 'touch {ended}; exit' TERM; touch {begun}; sleep 100 & wait"
    argv = [sys.executable, "-m", "hvmgr", *options, "freeze", machine.vm.name, "--", "sh", "-c", script]
    with subprocess.Popen(argv) as command:
        wait_for(begun.exists)
        assert machine.agent.is_frozen()
        assert running_qemu.is_noted(machine.layout.guest_at_rest)
        with monkeypatch.context() as patch, pytest.raises(errors.Busy):
            patch.setattr(machine.host, "wait_s", 0)
            machine.host.vm(machine.vm.name).create_snapshot("now")  # nobody works on a VM that is held still
        command.kill()
        command.wait(60)
        wait_for(lambda: not machine.agent.is_frozen())
        wait_for(ended.exists)  # the command has heard that nobody needs it any more
    wait_for(lambda: not machine.layout.guest_at_rest.exists())
    assert is_awake(machine)

    def restarted(one):
        libvirtd.stop(signal_=signal.SIGKILL)
        libvirtd.start()
        return real(one)

    real = standstill._why_awake
    with monkeypatch.context() as patch:
        patch.setattr(standstill, "_why_awake", restarted)
        machine.host.freeze([machine.vm], ["true"])  # libvirt's daemon was another one in the end
    assert is_awake(machine)

    resting_guest.announce(session := Noted(machine))
    guest_agent.freeze(machine.domain)
    assert not resting_guest._was_silent(session), "whoever wakes it next is patient"
    assert cli.run([*options, "snapshot", "list", machine.vm.name]) == 0
    assert is_awake(machine)


class Noted:
    """What ``announce`` needs of a session."""

    def __init__(self, machine):
        self.home, self.layout = machine.vm.home, machine.layout


def wait_for(is_so):
    deadline = time.monotonic() + 90
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_two_vms_one_of_which_is_off(machine, make_machine, capfd, tmp_path):
    """The one that is off cannot be started meanwhile; both names are told; JSON is one document."""
    off = make_machine(running=False)
    probe = ["qemu-io", "-f", "qcow2", "-c", "write 0 512", str(image_of(off))]
    outcome = machine.host.freeze(
        [machine.vm, off.vm], ["sh", "-c", f"! {' '.join(map(repr, probe))} && echo $HVMGR_FROZEN_NAMES >&2"]
    )
    by_name = {one.name: (one.state, one.file_systems) for one in outcome.vms}
    assert by_name == {machine.vm.name: ("running", 1), off.vm.name: ("off", None)}
    heard = capfd.readouterr()
    assert "lock" in heard.out + heard.err
    assert {machine.vm.name, off.vm.name} <= set(heard.err.split())
    assert is_awake(machine)
