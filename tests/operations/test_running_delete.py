"""Deleting snapshots of a VM that runs: what it has open waits, everything else is merged at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvmgr.model import tree
from hvmgr.model.metadata import SnapshotType

pytestmark = pytest.mark.guest


def test_images_that_the_guest_has_open_wait_until_it_is_off(machine):
    one = machine.vm.create_snapshot("one", type=SnapshotType.DISK_ONLY)
    two = machine.vm.create_snapshot("two", type=SnapshotType.DISK_ONLY)
    three = machine.vm.create_snapshot("three")
    waits = two.disks["vda"]
    two.delete()
    assert tree.pending(machine.vm.tree()) == [(waits, three.disks["vda"])]
    assert tree.unnamed(machine.vm.tree()) == [waits]
    assert machine.vm.snapshot("three").parent == one.id
    machine.tick()
    machine.check()

    three.apply(discard_state=True)  # its memory still fits the chain with the waiting image
    late = machine.run_for(3)
    assert late.memory > machine.count_of(three)
    assert not machine.vm.merge()  # all of it is open
    machine.vm.stop(force=True)
    assert machine.vm.merge()
    assert not machine.vm.merge()
    assert not Path(waits).exists()
    assert not tree.pending(machine.vm.tree())
    assert machine.held() >= late.disk
    machine.check()
    machine.vm.snapshot("three").apply()
    assert machine.tick().memory > machine.count_of(three)
    machine.check()


def test_branch_that_the_guest_has_not_open_is_merged_at_once(machine):
    one = machine.vm.create_snapshot("one")
    machine.run_for(3)
    two = machine.vm.create_snapshot("two", type=SnapshotType.DISK_ONLY)
    machine.run_for(3)
    three = machine.vm.create_snapshot("three")
    one.apply(discard_state=True, keep_undo=False)
    count = machine.count_of(three)
    two.delete()
    three = machine.vm.snapshot("three")
    assert not tree.pending(machine.vm.tree())
    assert len(list(machine.layout.images.iterdir())) == 2  # three's and the present's
    assert machine.count_of(three) == count
    machine.tick()
    machine.check()
    three.apply(discard_state=True)
    assert machine.tick().memory > count
    machine.check()


def test_only_snapshot_of_a_running_guest_waits_and_is_merged_later(machine):
    one = machine.vm.create_snapshot("one")
    machine.run_for(3)
    one.delete()
    assert machine.vm.snapshots() == []
    assert machine.vm.now().parent is None
    assert len(tree.pending(machine.vm.tree())) == 1
    late = machine.tick()
    machine.check()
    machine.vm.stop(force=True)
    assert machine.vm.merge()
    assert machine.held() >= late.disk
    assert len(machine.vm.tree().images) == 1
    machine.check()
    (held,) = machine.boot()
    assert held >= late.disk


def test_undo_slot_goes_with_a_deletion_while_the_guest_runs(machine):
    one = machine.vm.create_snapshot("one")
    machine.run_for(3)
    two = machine.vm.create_snapshot("two")
    two.apply(discard_state=True)
    one.delete()
    assert not machine.vm.can_undo()
    machine.tick()
    machine.check()
