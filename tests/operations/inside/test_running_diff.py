"""What a running guest did to its files between two snapshots, told exactly: by the guest's own work, on its own ext4."""

from __future__ import annotations

import time

import pytest

from hvmgr.faces import cli
from hvmgr.model.metadata import SnapshotType

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

BEFORE = """
mkdir -p etc srv/many; for i in $(seq 100); do echo $i >srv/many/$i; done
echo old >etc/kept; echo old >etc/gone; echo old >etc/moved; echo old >etc/mode
dd if=/dev/zero of=srv/data bs=1024 count=300
"""
AFTER = """
echo new >etc/new; rm etc/gone; mv etc/moved srv/; chmod 600 etc/mode
printf X | dd of=srv/data bs=1 seek=200000 conv=notrunc; touch -d '2020-01-01 00:00' srv/data
"""
# The guest itself counts in this file all the time.
FOUND = {
    "/number": "changed",
    "/etc/new": "added",
    "/etc/gone": "removed",
    "/srv/moved": "renamed",
    "/etc/mode": "metadata",
    "/srv/data": "changed",
}


def do(machine, script):
    """The guest has done it, and all of it is on its disk."""
    words = ["sh", "-ec", f"export PATH=/bin; cd /files; {script}\nsync"]
    started = machine.agent.ask("guest-exec", **{"path": "/bin/busybox", "arg": words, "capture-output": True})
    deadline = time.monotonic() + 120
    while not (said := machine.agent.ask("guest-exec-status", pid=started["pid"]))["exited"]:
        assert time.monotonic() < deadline, "the guest did not come to its end"
        time.sleep(0.1)
    assert said["exitcode"] == 0, said


def test_diff_names_exactly_the_files_that_the_guest_changed(agents, connection, capsys):
    machine = agents.make(connection.uri)
    vm = machine.vm
    do(machine, BEFORE)
    vm.create_snapshot("a", type=SnapshotType.DISK_ONLY)
    do(machine, AFTER)
    vm.create_snapshot("b", type=SnapshotType.DISK_ONLY)
    before = machine.tick()
    outcome = vm.compare_files("a", "b")
    assert {one.path.decode(): one.change.value for one in outcome.differences} == FOUND
    assert outcome.left_out == {}
    assert all("journal was replayed" in one.reader.notes[0] for pair in outcome.browsers for one in pair)
    assert machine.tick().memory > before.memory, "the guest went on meanwhile"
    capsys.readouterr()
    words = ["-c", connection.uri, "--root", str(machine.host.root)]
    assert cli.run([*words, "file", "diff", vm.name, "a", "b", "/etc", "--null"]) == 0
    assert capsys.readouterr().out == "/etc/gone\0/etc/mode\0/etc/moved\0/etc/new\0"
    assert cli.run([*words, "file", "find", vm.name, "/etc/gone", "/etc/new", "--index"]) == 0
    assert capsys.readouterr().out == "/etc/gone\ta\n/etc/new\tb\n"
    do(machine, "rm etc/new; echo now >etc/now")
    assert cli.run([*words, "file", "diff", vm.name, "b", "--present", "/etc", "--null"]) == 0
    heard = capsys.readouterr()
    assert heard.out == "/etc/new\0/etc/now\0"
    assert "this is what a power cut would have left of it just now" in heard.err
    changes = {one.path: one.change.value for one in vm.compare_files("b", present=True, paths=[b"/etc"]).differences}
    assert changes == {b"/etc/new": "removed", b"/etc/now": "added"}
    assert len(vm.tree().images) == 3, "what was frozen is merged"
    machine.check()
