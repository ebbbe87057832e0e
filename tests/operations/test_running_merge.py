"""Images that a running VM has open are merged by the VM itself: the guest never stops, and no snapshot shows other bytes."""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
import threading
from pathlib import Path

import pytest

from hvmgr.model import configuration, tree
from hvmgr.model.metadata import SnapshotType
from hvmgr.storage import images, vm_home

pytestmark = pytest.mark.guest

DISKS = SnapshotType.DISK_ONLY
TICK_S = 60


def write(machine, pattern, offset, length="64k", *, disk=0):
    """What a guest writes, besides its count: a pattern on one of its disks, flushed."""
    device = machine.domain.monitor("query-block")[disk]["qdev"]
    for command in (f"write -P {pattern} {offset} {length}", "flush"):
        answer = machine.domain.monitor("human-monitor-command", command_line=f'qemu-io -d {device} "{command}"')
        assert "rror" not in answer, answer


def shown(path, scratch):
    target = scratch / "shown.raw"
    command = ["qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", str(path), str(target)]
    subprocess.run(command, check=True, timeout=60)
    return hashlib.sha256(target.read_bytes()).hexdigest()


def contents(machine, scratch):
    """What the disks of each snapshot show."""
    return {
        (one.name, slot): shown(path, scratch) for one in machine.vm.snapshots() for slot, path in one.disks.items()
    }


def require_whole(machine, number_of_images):
    """Nothing waits, nothing is left over, every image is sound, and libvirt's views name what is there."""
    machine.check()
    assert not tree.pending(machine.vm.tree())
    forest = machine.vm.tree().images
    assert len(forest) == number_of_images
    private = machine.layout.private
    files = {str(file) for file in machine.vm.path.rglob("*.qcow2") if not file.is_relative_to(private)}
    assert files == set(forest)
    assert {one.name for one in machine.layout.frozen.iterdir()} <= {Path(path).name for path in forest}
    assert {one.name for one in private.iterdir() if one.is_file()} <= {"lock"}
    for path in forest:
        if path not in machine.vm.now().disks.values():  # that one changes while it is looked at
            subprocess.run(["qemu-img", "check", "-q", "-U", "-f", "qcow2", path], check=True, timeout=60)
    for path in forest.values():
        assert path.parent is None or not Path(images.read(Path(path.path), images.QCOW2).backing).is_absolute()
    for live in (True, False):
        text = machine.domain.xml(live=live)
        parsed = configuration.parse(text, source="libvirt")
        named = {vm_home.canonical(one.get("file")) for one in parsed.root.findall(".//disk//source[@file]")}
        assert named <= set(forest)


@contextlib.contextmanager
def watched(machine):
    """The guest's ticks meanwhile: it says each count once, one after the other, and never boots."""
    counts, over = [], threading.Event()

    def watch():
        with machine.screen() as screen:
            while not over.is_set():
                tick = screen.next_tick(TICK_S)
                assert tick.ok, tick
                counts.append(tick.memory)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield counts
    finally:
        over.set()
        thread.join()
    assert counts == list(range(counts[0], counts[0] + len(counts)))


def without(before, *names):
    return {key: value for key, value in before.items() if key[0] not in names}


def test_parent_of_the_present(machine, tmp_path):
    machine.vm.create_snapshot("one", type=DISKS)
    write(machine, 1, "64k")
    machine.vm.create_snapshot("two", type=DISKS)
    write(machine, 2, "64k", "128k")
    before = contents(machine, tmp_path)
    with watched(machine):
        machine.vm.snapshot("two").delete()
    assert contents(machine, tmp_path) == without(before, "two")
    require_whole(machine, 2)
    machine.tick()


def test_inner_snapshot_and_root(machine, tmp_path):
    for number, name in enumerate(("one", "two", "three", "four"), 1):
        write(machine, number, f"{number * 64}k", "128k")
        machine.vm.create_snapshot(name, type=DISKS)
    before = contents(machine, tmp_path)
    with watched(machine):
        machine.vm.snapshot("two").delete()
        require_whole(machine, 4)
        machine.vm.snapshot("one").delete()
    require_whole(machine, 3)
    assert contents(machine, tmp_path) == without(before, "one", "two")
    late = machine.tick()
    machine.vm.snapshot("three").apply(discard_state=True)
    machine.vm.undo(discard_state=True)
    assert machine.held() >= late.disk
    machine.check()


def test_only_snapshot(machine, tmp_path):
    machine.vm.create_snapshot("one", type=DISKS)
    write(machine, 1, "64k", "512k")
    with watched(machine):
        machine.vm.snapshot("one").delete()
    require_whole(machine, 1)
    assert machine.vm.now().parent is None
    late = machine.tick()
    machine.vm.create_snapshot("again", type=DISKS)
    machine.run_for(2)
    machine.vm.stop(force=True)
    assert machine.held() >= late.disk
    machine.check()
    (held,) = machine.boot()
    assert held >= late.disk


def test_branches_undo_slot_and_a_paused_guest(make_machine, two_disks, tmp_path):
    """base - one - two - three, two - left - (now); then ``two`` goes, which both stand on, and what that leaves."""
    machine = make_machine(two_disks)
    for number, name in enumerate(("one", "two", "three"), 1):
        for disk in (0, 1):
            write(machine, number + 8 * disk, f"{number * 64}k", "128k", disk=disk)
        machine.vm.create_snapshot(name, type=DISKS if name != "two" else SnapshotType.STANDARD)
    machine.vm.snapshot("two").apply(discard_state=True, keep_undo=False)
    write(machine, 7, "512k")
    machine.vm.create_snapshot("left", type=DISKS)
    write(machine, 8, "576k")
    machine.domain.suspend()
    before = contents(machine, tmp_path)
    machine.vm.snapshot("two").delete()
    assert machine.state() == "paused"
    assert len(tree.unnamed(machine.vm.tree())) == 2  # one of each disk, and two children of each
    machine.vm.snapshot("one").delete()
    assert contents(machine, tmp_path) == without(before, "one", "two")
    require_whole(machine, 2 * 4)  # base (one, two), three, left, now
    machine.vm.snapshot("three").delete()  # it is no more than the others' only child
    assert machine.state() == "paused"
    require_whole(machine, 2 * 2)
    assert contents(machine, tmp_path) == without(before, "one", "two", "three")
    machine.first_tick()
    machine.vm.snapshot("left").apply(discard_state=True)
    machine.check()
