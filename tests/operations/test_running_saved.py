"""Managed save is part of the present: snapshots keep it usable, and it never starts on a frozen image."""

from __future__ import annotations

import pytest

from hvmgr import errors
from hvmgr.model import configuration, plan
from hvmgr.model.metadata import SavedState, SnapshotType
from hvmgr.storage import vm_home

pytestmark = pytest.mark.guest


@pytest.fixture
def saved(machine):
    """A machine whose present is a managed save."""
    machine.domain.managed_save()
    assert machine.state() == "saved"
    return machine


def saved_disks(machine):
    text = machine.domain.managed_save_xml()
    return vm_home.disks_of(configuration.parse(text, source="the managed save"))


@pytest.mark.parametrize("kind", [SnapshotType.STANDARD, SnapshotType.DISK_ONLY])
def test_snapshot_of_a_saved_vm_keeps_its_saved_state_usable(saved, kind):
    snapshot = saved.vm.create_snapshot("one", type=kind)
    assert saved.state() == "saved"
    assert saved_disks(saved) == dict(saved.vm.now().disks)
    saved.check()
    saved.vm.start()
    assert saved.tick().memory > saved.count_of(snapshot)
    saved.check()


def test_apply_of_a_snapshot_of_a_saved_vm_resumes_it(saved):
    snapshot = saved.vm.create_snapshot("one")
    assert snapshot.state is SavedState.RUNNING
    saved.vm.start()
    saved.run_for(4)
    snapshot.apply(discard_state=True)
    assert saved.state() == "running"
    assert saved.tick().memory > saved.count_of(snapshot)
    saved.check()


def test_saved_while_paused_is_applied_paused(machine):
    machine.domain.suspend()
    machine.domain.managed_save()
    snapshot = machine.vm.create_snapshot("one")
    assert snapshot.state is SavedState.PAUSED
    snapshot.apply()
    assert machine.state() == "paused"
    assert machine.first_tick().follows(machine.count_of(snapshot))
    machine.check()


def test_apply_over_a_saved_present_leaves_no_managed_save(machine):
    snapshot = machine.vm.create_snapshot("one", type=SnapshotType.DISK_ONLY)
    machine.domain.managed_save()
    snapshot.apply()
    assert machine.state() == "off"
    assert machine.held() == machine.count_of(snapshot)
    machine.check()


def test_failed_apply_gives_a_saved_present_its_saved_state_back(machine, at_step):
    snapshot = machine.vm.create_snapshot("one")
    machine.run_for(5)
    machine.domain.managed_save()
    before = machine.vm.tree()
    at_step(plan.StartFrom, errors.HostFailed("QEMU said no"))
    with pytest.raises(errors.HostFailed, match="QEMU said no"):
        snapshot.apply()
    assert machine.vm.tree() == before
    assert machine.state() == "saved"
    machine.check()

    # libvirt itself must agree, or the next snapshot would leave the saved state on a frozen image.
    second = machine.vm.create_snapshot("two")
    assert second.state is SavedState.RUNNING
    machine.domain.start()
    assert machine.tick().memory > machine.count_of(second) >= machine.count_of(snapshot) + 5
    machine.check()


def test_managed_save_that_was_put_back_can_be_discarded(machine, at_step):
    snapshot = machine.vm.create_snapshot("one")
    machine.domain.managed_save()
    at_step(plan.StartFrom, errors.HostFailed("QEMU said no"))
    with pytest.raises(errors.HostFailed):
        snapshot.apply()
    snapshot.apply(without_state=True, discard_state=True)
    assert machine.state() == "off"
    assert machine.held() == machine.count_of(snapshot)
    machine.check()


def test_deletion_below_a_saved_present_leaves_it_usable(machine):
    snapshot = machine.vm.create_snapshot("one")
    machine.run_for(5)
    machine.domain.managed_save()
    snapshot.delete()
    assert machine.state() == "saved"
    machine.check()
    machine.domain.start()
    machine.tick()
    machine.check()
