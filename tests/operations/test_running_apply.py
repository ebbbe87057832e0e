"""Snapshots with memory of a VM that runs: what the guest counts and what its disk holds stay of one moment."""

from __future__ import annotations

import time

import pytest

from hvmgr.model.metadata import SavedState, SnapshotType

pytestmark = pytest.mark.guest


def test_guest_goes_on_while_a_snapshot_is_created(machine):
    before = machine.tick()
    snapshot = machine.vm.create_snapshot("one")
    after = machine.tick()
    assert snapshot.state is SavedState.RUNNING
    assert before.memory - 1 <= machine.count_of(snapshot) < after.memory
    assert machine.state() == "running"
    machine.check()


def test_snapshots_of_a_running_guest_branch(machine):
    first = machine.vm.create_snapshot("first")
    machine.run_for(8)
    second = machine.vm.create_snapshot("second")
    machine.run_for(8)
    since = time.monotonic()
    first.apply()
    back = machine.tick()
    assert machine.count_of(first) < back.memory <= machine.most(first, since)
    machine.check()

    branch = machine.vm.create_snapshot("branch")
    assert branch.parent == second.parent == first.id
    second.apply(discard_state=True)
    assert machine.count_of(second) < machine.tick().memory
    branch.apply(discard_state=True)
    assert machine.tick().memory > machine.count_of(branch)
    machine.check()


def test_paused_guest_stays_paused_and_goes_on_with_the_very_next_tick(machine):
    machine.domain.suspend()
    snapshot = machine.vm.create_snapshot("paused")
    assert snapshot.state is SavedState.PAUSED
    assert machine.state() == "paused"
    machine.domain.resume()
    machine.run_for(5)
    snapshot.apply()
    assert machine.state() == "paused"
    assert machine.first_tick().follows(machine.count_of(snapshot))
    machine.check()


def test_two_disks_are_taken_at_one_instant(make_machine, two_disks):
    machine = make_machine(two_disks)
    snapshot = machine.vm.create_snapshot("both")
    count = machine.count_of(snapshot)
    machine.run_for(5)
    snapshot.apply(discard_state=True)
    tick = machine.tick()  # it says itself when the disks are not of one instant
    assert tick.memory > count
    assert len(set(tick.disks)) == 1
    assert len(tick.disks) == 2
    machine.check()


def test_undo_brings_back_the_disks_of_the_present_that_ran(machine):
    snapshot = machine.vm.create_snapshot("one")
    late = machine.run_for(8)
    since = time.monotonic()
    snapshot.apply()
    machine.vm.undo()
    most = machine.most(snapshot, since)
    assert machine.state() == "off"
    (held,) = machine.boot()
    assert held >= late.disk
    assert machine.tick().memory > held
    machine.check()

    machine.vm.undo(discard_state=True)  # and undone again: the disks that ran for a moment after the apply
    assert machine.count_of(snapshot) <= machine.held() <= most
    machine.check()


def test_revert_goes_to_the_snapshot_above_the_present(machine):
    machine.vm.create_snapshot("one")
    machine.run_for(8)
    two = machine.vm.create_snapshot("two")
    machine.run_for(8)
    assert machine.vm.revert(discard_state=True).name == "two"
    assert machine.state() == "running"
    assert machine.tick().memory > machine.count_of(two)
    machine.check()


def test_without_state_leaves_it_off_with_the_disks_of_that_instant(machine):
    snapshot = machine.vm.create_snapshot("one")
    machine.run_for(3)
    snapshot.apply(without_state=True, discard_state=True)
    assert machine.state() == "off"
    assert machine.boot() == (machine.count_of(snapshot),)
    machine.check()


def test_disk_only_snapshot_of_a_running_guest(machine):
    before = machine.tick()
    snapshot = machine.vm.create_snapshot("disks", type=SnapshotType.DISK_ONLY)
    assert not snapshot.has_state
    assert machine.tick().memory > machine.count_of(snapshot) >= before.memory - 1
    snapshot.apply(discard_state=True)
    assert machine.state() == "off"
    assert machine.held() == machine.count_of(snapshot)
    machine.check()


def test_snapshot_first_keeps_the_memory_of_the_present(machine):
    one = machine.vm.create_snapshot("one")
    machine.run_for(5)
    first = one.apply(snapshot_first=True, discard_state=True)
    assert first.state is SavedState.RUNNING
    assert first.parent == one.id
    machine.tick()
    first.apply(discard_state=True)
    assert machine.tick().memory > machine.count_of(first) >= machine.count_of(one) + 5
    machine.check()


def test_no_undo_leaves_one_image_on_the_snapshot(machine):
    snapshot = machine.vm.create_snapshot("one")
    snapshot.apply(keep_undo=False)
    machine.tick()
    assert not machine.vm.can_undo()
    assert len(list(machine.layout.images.iterdir())) == 1
    machine.check()


def test_renamed_vm_goes_on_from_the_memory_under_its_new_name(machine):
    snapshot = machine.vm.create_snapshot("one")
    machine.vm.stop(force=True)
    machine.vm.rename("renamed")
    snapshot.apply()
    assert machine.tick().memory > machine.count_of(snapshot)
    assert machine.vm.name == machine.domain.name == "renamed"
    assert not (machine.layout.private / "renamed.save").exists()
    snapshot = machine.vm.create_snapshot("two")  # its memory holds the new name
    snapshot.apply(discard_state=True)
    assert machine.tick().memory > machine.count_of(snapshot)
    machine.check()


def test_state_only_deletion_leaves_a_snapshot_of_the_disks(machine):
    snapshot = machine.vm.create_snapshot("one")
    snapshot.delete(state_only=True)
    machine.vm.snapshot("one").apply(discard_state=True)
    assert machine.state() == "off"
    assert (machine.held(),) == (machine.count_of(snapshot),)
    machine.check()
