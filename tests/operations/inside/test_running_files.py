"""Files of a VM that runs: its latest snapshot is found by itself, nothing is written, and the guest counts on."""

from __future__ import annotations

import hashlib
import subprocess

import pytest

from hvmgr import errors
from hvmgr.faces import cli
from hvmgr.model.metadata import SnapshotType
from hvmgr.model.specification import DiskSpecification
from hvmgr.operations.inside import views
from tests.storage import file_trees

pytestmark = pytest.mark.guest

_START = 2 << 20  # the guest counts in front of it


@pytest.fixture
def counting(make_machine, factory, tmp_path):
    """A guest that counts on a disk with a partition of known files."""
    tree, part = tmp_path / "tree", tmp_path / "part"
    (tree / "etc").mkdir(parents=True)
    for number in range(20):
        (tree / "etc" / f"file{number}").write_bytes(file_trees.pattern(1000 * number))
    file_trees.ext(part, tree, "-t", "ext4", size="8M")
    raw = factory.folder / "files.raw"
    raw.write_bytes(bytes(_START) + part.read_bytes())
    table = f"label: dos\nstart={_START // 512},type=83\n".encode()
    subprocess.run(["sfdisk", "-q", raw], input=table, check=True, timeout=60)
    machine = make_machine(disks=(DiskSpecification(path=raw),))
    yield machine, {path.name: path.read_bytes() for path in (tree / "etc").iterdir()}
    raw.unlink()


def test_the_latest_snapshot_of_a_running_vm_is_seen(counting):
    machine, files = counting
    with pytest.raises(errors.Conflict, match="runs and has no snapshot"):
        views.of_vm(machine.vm)
    machine.vm.create_snapshot("older", type=SnapshotType.DISK_ONLY)
    snapshot = machine.vm.create_snapshot("latest", type=SnapshotType.DISK_ONLY)
    count = machine.count_of(snapshot)
    before = machine.tick()
    (disk,) = views.of_vm(machine.vm)
    assert disk.moment == f"{machine.vm.name} runs: this is its latest snapshot 'latest'"
    assert len(disk.links) >= 2
    with machine.vm.look_inside() as inside:
        browser = inside.choose(b"/etc")
        for one in browser.children(browser.find(b"/etc")):
            expected = files[one.name.decode()]
            assert file_trees.hash_of(browser.reader, one.node) == hashlib.sha256(expected).hexdigest()
        machine.run_for(2)  # the guest goes on while its parents are being read
    assert machine.tick().memory > before.memory
    assert machine.count_of(snapshot) == count
    machine.check()


def number_in(inside):
    browser = inside.choose(b"/number")
    content = browser.content(browser.find(b"/number"))
    return int(b"".join(bytes(piece) for _, piece in content.pieces()))


def test_the_present_of_a_running_vm_stands_still_and_is_merged(agents, connection, capsys):
    """The guest writes to an ext4 all the time and is never stopped: what is read is of one moment, and nothing stays."""
    machine = agents.make(connection.uri)
    with machine.vm.look_inside(present=True) as inside:
        assert inside.disks[0].moment.startswith(f"{machine.vm.name} runs: this is what a power cut would have left")
        number = number_in(inside)
        assert number > 0
        machine.run_for(1)
        machine.vm.merge()  # not what is being read
        assert number_in(inside) == number
        assert len(machine.vm.tree().images) == 2
    assert len(machine.vm.tree().images) == 1, "what was frozen is merged"
    assert not machine.vm.snapshots()
    capsys.readouterr()
    where = ["-c", connection.uri, "--root", str(machine.host.root)]
    assert cli.run([*where, "file", "cat", machine.vm.name, "/number", "--present"]) == 0
    heard = capsys.readouterr()
    assert int(heard.out) > number
    assert "this is what a power cut would have left of it just now" in heard.err
    with pytest.raises(errors.NotFound), machine.vm.look_inside(present=True) as inside:
        inside.choose(b"/").find(b"/not there")
    assert len(machine.vm.tree().images) == 1
    machine.run_for(1)
    machine.check()
