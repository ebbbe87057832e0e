"""Deleting snapshots of a VM that runs, as it concerns its memory, its undo slot and other branches."""

from __future__ import annotations

import pytest

from hvmgr.model import tree
from hvmgr.model.metadata import SnapshotType

pytestmark = pytest.mark.guest


def test_memory_of_a_snapshot_fits_the_images_that_were_merged_below_it(machine):
    one = machine.vm.create_snapshot("one", type=SnapshotType.DISK_ONLY)
    two = machine.vm.create_snapshot("two", type=SnapshotType.DISK_ONLY)
    three = machine.vm.create_snapshot("three")
    count = machine.count_of(three)
    two.delete()
    assert not tree.pending(machine.vm.tree())
    assert not tree.unnamed(machine.vm.tree())
    three = machine.vm.snapshot("three")
    assert three.parent == one.id
    assert three.disks == two.disks  # the image below took its place
    machine.tick()
    machine.check()

    three.apply(discard_state=True)
    assert machine.run_for(3).memory > count
    machine.check()
    assert not machine.vm.merge()


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


def test_undo_slot_goes_with_a_deletion_while_the_guest_runs(machine):
    one = machine.vm.create_snapshot("one")
    machine.run_for(3)
    two = machine.vm.create_snapshot("two")
    two.apply(discard_state=True)
    one.delete()
    assert not machine.vm.can_undo()
    machine.tick()
    machine.check()
