"""A disk without a free block: nothing new is made, and what gives space back is done all the same."""

from __future__ import annotations

import os

import pytest

from hvmgr import errors
from hvmgr.model.metadata import SavedState
from hvmgr.storage import reserve
from tests import full_disk
from tests.operations.rules import conftest as rules

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts file systems")


@pytest.fixture
def place():
    """A folder that QEMU's user can pass."""
    yield from rules.place.__wrapped__()


@pytest.fixture(params=full_disk.MAKE)
def small(request, place, require_program):
    """A small file system, with all that hvmgr writes on it."""
    require_program(full_disk.MAKE[request.param][0][0])
    folder = place / "small"
    folder.mkdir()
    with full_disk.mounted(request.param, place / "image", folder):
        yield folder


@pytest.fixture
def bench(connection, small, monkeypatch):
    """A host without VMs there."""
    monkeypatch.setenv("HVMGR_INDEX", str(small / "index"))
    yield from rules.bench.__wrapped__(connection.uri, small)


@pytest.fixture
def vm(bench):
    """``one`` has a child ``two`` and the present below it."""
    vm = bench.make(4)
    vm.create_snapshot("one")
    vm.create_snapshot("two")
    vm.snapshot("one").apply()
    return vm


def names(vm):
    return {one.name for one in vm.snapshots()}


def require_no_more(vm):
    for make in (lambda: vm.create_snapshot("more"), vm.undo):
        with pytest.raises(errors.NoSpace):
            make()


def test_snapshot_that_nothing_stands_on_is_deleted(bench, small, vm):
    assert vm.home.layout.reserve.stat().st_blocks * 512 >= reserve.SIZE
    present = bench.photo(vm)["now hda"]
    full_disk.fill(small)
    assert full_disk.is_full(small)
    require_no_more(vm)
    vm.snapshot("two").delete()
    assert names(vm) == {"one"}
    assert not vm.can_undo()
    bench.check(vm)
    full_disk.clear(small)
    vm.create_snapshot("more")
    assert vm.home.layout.reserve.exists()
    assert bench.photo_of(vm, "more") == present


def test_merge_that_needs_space_is_refused_and_keeps_the_reserve(small, vm):
    vm.create_snapshot("three")
    full_disk.fill(small)
    with pytest.raises(errors.NoSpace, match=r"merging .* needs up to") as refused:
        vm.snapshot("three").delete()
    assert "nothing stands on" in refused.value.hint
    assert vm.home.layout.reserve.exists()
    assert names(vm) == {"one", "two", "three"}


def test_saved_memory_and_a_snapshot_of_a_running_vm_go(bench, small):
    vm = bench.make(4)
    bench.start(vm)
    vm.create_snapshot("one")
    vm.create_snapshot("two")
    vm.snapshot("one").apply(discard_state=True)
    full_disk.fill(small)
    require_no_more(vm)
    vm.snapshot("one").delete(state_only=True)
    assert vm.snapshot("one").state is SavedState.NONE
    assert vm.home.layout.reserve.exists()  # memory gave more than enough
    full_disk.fill(small)
    vm.snapshot("two").delete()
    assert names(vm) == {"one"}
    assert bench.domain(vm).is_active()
    vm.stop(force=True)
    bench.check(vm)


def test_what_needs_the_storage_daemon_first_says_so_too(small, vm):
    full_disk.fill(small)
    with pytest.raises(errors.NoSpace):
        vm.resize_disk("hda", 2 << 20, shrink=True)
    assert not (vm.home.layout.private / "daemon").exists()


def test_whole_vm_goes(small, bench, vm):
    full_disk.fill(small)
    vm.delete(with_disks=True)
    assert not vm.path.exists()


def test_operation_that_is_open_is_completed(small, vm, bench, monkeypatch):
    """The disk became full after the switch: what is left to be written has the reserve."""
    from hvmgr.model import plan
    from hvmgr.operations.steps import execution

    real = execution.DO[plan.WriteSnapshot]

    def meet_full_disk(session, step):
        monkeypatch.setitem(execution.DO, plan.WriteSnapshot, real)
        full_disk.fill(small)
        real(session, step)

    monkeypatch.setitem(execution.DO, plan.WriteSnapshot, meet_full_disk)
    vm.create_snapshot("three")
    assert names(vm) == {"one", "two", "three"}
    assert not vm.home.layout.journal.exists()
    bench.check(vm)
