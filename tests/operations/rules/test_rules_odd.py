"""Raw images whose length is no whole number of sectors, homes in the place of others, VMs without disks."""

from __future__ import annotations

import os
import shutil

import pytest

import hvmgr

MIB = 1 << 20


@pytest.mark.parametrize("more", [1, 511, 700])
def test_raw_image_of_an_odd_length_in_place(bench, more):
    path = bench.place / "odd.raw"
    path.write_bytes(os.urandom(MIB + more))
    before = bench.file_of(path)
    vm = bench.make(bench.in_place(path))
    vm.create_snapshot("one")
    bench.write(vm, 0x11)
    vm.create_snapshot("two")
    bench.start(vm)
    vm.stop(force=True)
    vm.snapshot("one").apply()
    vm.undo()
    vm.snapshot("two").delete()
    assert bench.file_of(path)[:3] == before[:3]
    bench.check(vm)
    vm.delete()
    assert path.stat().st_size == MIB + more


def test_home_in_the_place_of_one_that_was_removed_by_hand(bench):
    dead = bench.make(4)
    dead.create_snapshot("one")
    shutil.rmtree(dead.path)
    bench.domain(dead).undefine()
    vm = bench.make(4)
    assert vm.path == dead.path
    vm.create_snapshot("one")
    bench.write(vm, 0x11)
    vm.snapshot("one").apply()
    vm.snapshot("one").delete()
    vm.merge()
    bench.check(vm)


def test_running_vm_without_disks(bench):
    vm = bench.host.create_vm(
        hvmgr.Specification(name="bare", template="generation1", accel="tcg", memory=64 * MIB, networks=(), disks=())
    )
    bench.start(vm)
    memory = vm.create_snapshot("memory")
    vm.create_snapshot("disks", type=hvmgr.SnapshotType.DISK_ONLY)
    assert [str(one.state) for one in vm.snapshots()] == ["running", "none"]
    made = vm.export(bench.place / "out")
    assert not [one for one in bench.host.verify(made) if one.severity == "error"]
    memory.apply(discard_state=True)
    assert str(vm.state()) == "running"
    vm.stop(force=True)
    bench.check(vm)
