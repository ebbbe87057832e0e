"""Disks that get another size: the present alone, with every byte that stays, and nothing cut off that somebody needs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from hvmgr import errors
from hvmgr.host.domain import State
from hvmgr.model.specification import DiskSpecification
from hvmgr.storage import images, partitions
from tests.operations.rules import conftest as rules
from tests.storage.test_partitions import Memory, put_gpt, put_mbr

MIB = 1 << 20
SLOT = "hda"


@pytest.fixture
def place():
    """A folder that QEMU's user can pass."""
    yield from rules.place.__wrapped__()


@pytest.fixture
def bench(connection, place):
    """A host without VMs."""
    yield from rules.bench.__wrapped__(connection.uri, place)


def size_of(bench, vm, slot=SLOT):
    """What QEMU says of the working image."""
    return json.loads(bench.run("qemu-img", "info", "-U", "--output=json", bench.disk(vm, slot)))["virtual-size"]


def with_table(bench, put, *wishes, size=16):
    """A VM on a raw base with this partition table and a byte pattern in the first partition."""
    disk = Memory(size * MIB)
    put(disk, *wishes)
    disk.data[2 * MIB : 2 * MIB + 4096] = b"p" * 4096
    path = bench.place / "table.raw"
    path.write_bytes(disk.data)
    return bench.make(DiskSpecification(path=path))


class TestOff:
    def test_grows_and_snapshots_keep_their_sizes(self, bench):
        vm = bench.make(4)
        bench.write(vm, 1, 3 * MIB)
        vm.create_snapshot("small")
        bench.write(vm, 2)
        assert vm.resize_disk(SLOT, 8 * MIB)
        assert not vm.resize_disk(SLOT, 8 * MIB)
        bench.check(vm)
        bench.write(vm, 3, 7 * MIB)
        size, pieces = bench.photo(vm)["now hda"]
        assert (size, sorted(pieces)) == (8 * MIB, [0, 3 * MIB, 7 * MIB])
        assert bench.photo_of(vm, "small")[0] == 4 * MIB
        vm.create_snapshot("large")
        before = bench.photo(vm)
        vm.snapshot("small").apply()
        assert size_of(bench, vm) == 4 * MIB
        vm.undo()
        assert bench.photo(vm) == before
        vm.snapshot("small").delete()
        assert bench.photo(vm)["now hda"] == before["now hda"]
        bench.check(vm)

    def test_what_a_larger_parent_holds_does_not_come_to_light(self, bench):
        vm = bench.make(8)
        vm.resize_disk(SLOT, 12 * MIB)
        bench.write(vm, 1, 10 * MIB)
        vm.create_snapshot("large")
        table = Memory(4096)
        put_mbr(table, [(7, 1, 2)])
        first = bench.place / "first"
        first.write_bytes(table.data[:512])
        bench.run("qemu-io", "-f", "qcow2", "-c", f"write -s {first} 0 512", bench.disk(vm))
        vm.resize_disk(SLOT, 4 * MIB, shrink=True)
        vm.resize_disk(SLOT, 12 * MIB)
        assert sorted(bench.photo(vm)["now hda"][1]) == [0]
        assert sorted(bench.photo_of(vm, "large")[1]) == [10 * MIB]
        bench.check(vm)

    def test_raw_base_in_place_grows(self, bench):
        path = bench.image("base.raw", fmt="raw")
        vm = bench.make(bench.in_place(path))
        vm.resize_disk(SLOT, 6 * MIB)
        assert path.stat().st_size == 6 * MIB
        assert bench.disk(vm) == str(path)

    def test_vhd_goes_on_in_a_larger_child_and_is_not_written(self, bench):
        path = bench.image("base.vhd", fmt="vpc", options="force_size=on")
        vm = bench.make(bench.in_place(path))
        before = hashlib.sha256(path.read_bytes()).digest()
        vm.resize_disk(SLOT, 9 * MIB)
        assert hashlib.sha256(path.read_bytes()).digest() == before
        assert vm.tree().chain(vm.now().disks[SLOT])[1].path == str(path)
        size, pieces = bench.photo(vm)["now hda"]
        assert (size, sorted(pieces)) == (9 * MIB, [0])
        bench.check(vm)

    def test_base_that_another_vm_stands_on_is_not_written(self, bench):
        path = bench.image("gold.qcow2")
        bench.image("other.qcow2", fmt="qcow2", backing=(path, "qcow2"))
        vm = bench.make(bench.in_place(path))
        other = bench.make(bench.in_place(bench.place / "other.qcow2"), name="other")
        assert other.now().disks
        before = path.read_bytes()
        vm.resize_disk(SLOT, 8 * MIB)
        assert path.read_bytes() == before
        assert size_of(bench, vm) == 8 * MIB
        assert size_of(bench, other) == 4 * MIB


class TestSmaller:
    def test_down_to_the_end_of_the_last_partition(self, bench):
        vm = with_table(bench, put_mbr, [(7, 2048, 8192)])
        least = (2048 + 8192) * 512
        with pytest.raises(errors.Conflict, match=f"partitions end at {least} bytes"):
            vm.resize_disk(SLOT, least - 512, shrink=True)
        vm.resize_disk(SLOT, least, shrink=True)
        assert size_of(bench, vm) == least
        size, pieces = bench.photo(vm)["now hda"]
        assert (size, sorted(pieces)) == (least, [0, 2 * MIB])
        bench.check(vm)

    def test_second_copy_of_a_gpt_moves(self, bench):
        vm = with_table(bench, put_gpt, [(2048, 8191, "root")])
        path = bench.disk(vm)
        bench.run("qemu-img", "convert", "-O", "raw", path, bench.place / "before")
        with partitions.File(bench.place / "before") as disk:
            before = partitions.read(disk)
        vm.resize_disk(SLOT, 8 * MIB, shrink=True)
        bench.run("qemu-img", "convert", "-O", "raw", path, bench.place / "after")
        with partitions.File(bench.place / "after") as disk:
            assert partitions.read(disk) == dataclasses.replace(before, made_for=8 * MIB)
            assert disk.size == 8 * MIB
        bench.check(vm)

    def test_not_without_leave(self, bench):
        vm = bench.make(8)
        with pytest.raises(errors.UsageError, match="cuts off its end"):
            vm.resize_disk(SLOT, 4 * MIB)

    def test_not_where_nobody_knows_what_lies_there(self, bench):
        vm = bench.make(8)
        bench.write(vm, 1)
        with pytest.raises(errors.Conflict, match="no partition table"):
            vm.resize_disk(SLOT, 4 * MIB, shrink=True)
        assert size_of(bench, vm) == 8 * MIB
        bench.check(vm)


class TestRunning:
    def test_guest_is_told_of_a_larger_disk(self, bench):
        vm = bench.make(4)
        vm.create_snapshot("small", type="disk-only")
        bench.start(vm)
        with pytest.raises(errors.Conflict, match="smaller only while its VM is off"):
            vm.resize_disk(SLOT, 2 * MIB, shrink=True)
        assert vm.resize_disk(SLOT, 8 * MIB)
        (seen,) = [one for one in bench.domain(vm).monitor("query-block") if one.get("inserted")]
        assert seen["inserted"]["image"]["virtual-size"] == 8 * MIB
        assert vm.state() is State.RUNNING
        vm.stop(force=True)
        assert size_of(bench, vm) == 8 * MIB
        assert bench.photo_of(vm, "small")[0] == 4 * MIB
        bench.check(vm)

    def test_vhd_has_to_be_off(self, bench):
        path = bench.image("base.vhd", fmt="vpc", options="force_size=on")
        vm = bench.make(bench.in_place(path))
        bench.start(vm)
        with pytest.raises(errors.Unsupported, match="of the format vpc"):
            vm.resize_disk(SLOT, 8 * MIB)


def test_requests_that_change_nothing(bench):
    vm = bench.make(4)
    for size in (0, -512, 1000, 4 * MIB + 1):
        with pytest.raises(errors.UsageError, match="cannot have"):
            vm.resize_disk(SLOT, size)
    with pytest.raises(errors.NotFound, match="hdx"):
        vm.resize_disk("hdx", 8 * MIB)
    bench.start(vm)
    bench.domain(vm).managed_save()
    with pytest.raises(errors.Conflict, match="memory of web is saved"):
        vm.resize_disk(SLOT, 8 * MIB)
    bench.domain(vm).remove_managed_save()
    assert size_of(bench, vm) == 4 * MIB


@pytest.mark.parametrize(("length", "size"), [(0, 0), (1, 512), (512, 512), (1000, 1024), (MIB + 1, MIB + 512)])
def test_raw_image_of_any_length_has_the_size_that_qemu_shows(tmp_path, length, size):
    path = tmp_path / "odd.raw"
    path.write_bytes(bytes(length))
    assert images.read(Path(path), images.RAW).size == size
