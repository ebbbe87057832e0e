"""Disks that snapshots leave out: each VM has its own, and a source is never written."""

from __future__ import annotations

import pytest
from lxml import etree

import hvmgr
from hvmgr import errors
from hvmgr.storage import vm_home

CloneOptions = hvmgr.CloneOptions


def leave_out(bench, vm, slot="hdb", **attributes):
    def change(edited):
        for disk in edited.root.findall("devices/disk"):
            if disk.find("target").get("dev") == slot:
                disk.set("snapshot", "no")

    bench.edit(vm, change)


def data_of(vm, slot="hdb"):
    """Where the disk lies that snapshots leave out, by every configuration of the VM."""
    home = vm_home.open_home(vm.path)
    every = [home.present(), *(home.snapshot(one.id) for one in vm.snapshots())]
    (found,) = {disk.source for one in every for disk in one.disks() if disk.slot == slot}
    return found


@pytest.fixture
def with_data(bench):
    """A VM whose second disk takes no part in its snapshot."""
    vm = bench.make(4, 8)
    leave_out(bench, vm)
    bench.write_image(vm.now().disks["hda"], 0x11)
    vm.create_snapshot("one")
    bench.write_image(data_of(vm), 0x22)
    return vm


def is_own(bench, vm, old):
    """The VM writes to a copy in its home, and to nothing else that there was."""
    new = data_of(vm)
    assert new.startswith(f"{vm.path}/")
    assert new != old
    assert bench.bytes_of(new) == (8 << 20, bench.bytes_of(new)[1])
    bench.write_image(new, 0x33, 1 << 20)
    vm.snapshot("one").apply()
    assert data_of(vm) == new
    bench.start(vm)
    vm.stop(force=True)
    return new


class TestImport:
    def test_copy_has_its_own(self, bench, with_data):
        export = with_data.export(bench.place / "out")
        with_data.delete(with_disks=True)
        source = export / "Virtual Hard Disks" / "hdb.qcow2"
        before, seen = bench.file_of(source), bench.bytes_of(source)
        first, second = bench.bring(export), bench.bring(export, name="other")
        for vm in (first, second):
            assert bench.bytes_of(data_of(vm)) == seen
        is_own(bench, first, str(source))
        assert bench.bytes_of(data_of(second)) == seen
        assert bench.file_of(source) == before
        assert bench.host.verify(export) == []

    def test_link_copies_what_it_writes(self, bench, with_data):
        export = with_data.export(bench.place / "out")
        with_data.delete(with_disks=True)
        source = export / "Virtual Hard Disks" / "hdb.qcow2"
        before, seen = bench.file_of(source), bench.bytes_of(source)
        vm = bench.bring(export, mode=hvmgr.Mode.LINK)
        assert bench.bytes_of(data_of(vm)) == seen
        is_own(bench, vm, str(source))
        assert bench.file_of(source) == before

    def test_registered_where_it_lies(self, bench, with_data):
        folder = bench.copy(with_data, "moved")
        old = data_of(with_data)
        before = bench.file_of(old)
        vm = bench.bring(folder, mode=hvmgr.Mode.REGISTER, new_id=True, name="other")
        assert is_own(bench, vm, old) == str(folder / "Virtual Hard Disks" / "hdb.qcow2")
        assert bench.file_of(old) == before

    def test_place_and_source_are_asked_for_by_slot(self, bench, with_data):
        export = with_data.export(bench.place / "out", hvmgr.ExportOptions(config_only=True))
        shelf = bench.place / "shelf"
        shelf.mkdir(mode=0o711)
        vm = bench.bring(
            export, name="other", without_snapshots=True,
            paths={str(with_data.path): str(with_data.path)}, disk_targets={"hdb": str(shelf / "x.qcow2")},
        )  # fmt: skip
        assert data_of(vm) == str(shelf / "x.qcow2")

    def test_file_of_the_host_needs_a_word(self, bench):
        outside = bench.image("outside.qcow2", size=8)
        vm = bench.make(4, bench.in_place(outside))
        leave_out(bench, vm)
        vm.create_snapshot("one")
        folder = bench.take_away(vm)
        assert bench.codes(folder) == ["image-outside"]
        before = bench.file_of(outside)
        vm = bench.bring(folder, paths={str(outside): str(outside)})
        assert is_own(bench, vm, str(outside)).startswith(str(vm.path))
        assert bench.file_of(outside) == before

    def test_missing_one_is_named(self, bench, with_data):
        folder = bench.take_away(with_data, export=False)
        (folder / "Virtual Hard Disks" / "hdb.qcow2").unlink()
        assert bench.codes(folder) == ["missing-disk"]

    def test_replaced_present_keeps_its_own(self, bench, with_data):
        export = with_data.export(bench.place / "out")
        old = data_of(with_data)
        seen = bench.bytes_of(old)
        bench.write_image(old, 0x44, 2 << 20)
        changed = bench.bytes_of(old)
        vm = bench.bring(export, new_id=False, replace=True)
        now = vm_home.open_home(vm.path).present().find_disk("hdb").source
        assert bench.bytes_of(now) == seen
        assert now != old
        vm.undo()
        assert bench.bytes_of(vm_home.open_home(vm.path).present().find_disk("hdb").source) == changed


class TestHost:
    def test_clone(self, bench, with_data):
        old = data_of(with_data)
        before, seen = bench.file_of(old), bench.bytes_of(old)
        clone = with_data.clone("two")
        assert bench.bytes_of(data_of(clone)) == seen
        is_own(bench, clone, old)
        assert bench.file_of(old) == before

    @pytest.mark.parametrize("linked", [False, True])
    def test_clone_of_a_snapshot(self, bench, with_data, linked):
        old = data_of(with_data)
        before, seen = bench.file_of(old), bench.bytes_of(old)
        clone = with_data.clone("two", CloneOptions(snapshot="one", linked=linked))
        assert bench.bytes_of(data_of(clone)) == seen
        bench.write_image(data_of(clone), 0x33, 1 << 20)
        assert bench.file_of(old) == before

    def test_clone_of_a_running_vm_is_refused(self, bench, with_data):
        bench.start(with_data)
        with pytest.raises(errors.Conflict, match="is being written"):
            with_data.clone("two", CloneOptions(snapshot="one", linked=True))
        with_data.stop(force=True)

    def test_shared_disk_stays_shared(self, bench, with_data):
        shared = bench.image("shared.raw", fmt="raw", size=8)

        def change(edited):
            for disk in edited.root.findall("devices/disk"):
                if disk.find("target").get("dev") == "hdb":
                    disk.find("source").set("file", str(shared))
                    disk.find("driver").set("type", "raw")
                    etree.SubElement(disk, "shareable")

        bench.edit(with_data, change)
        clone = with_data.clone("two", CloneOptions(without_snapshots=True))
        assert data_of(clone) == str(shared)

    def test_move(self, bench, with_data):
        old, seen = data_of(with_data), bench.bytes_of(data_of(with_data))
        moved = with_data.move(bench.place / "else")
        assert bench.bytes_of(data_of(moved)) == seen
        assert is_own(bench, moved, old) == str(moved.path / "Virtual Hard Disks" / "hdb.qcow2")

    def test_move_leaves_what_lies_outside(self, bench):
        outside = bench.image("outside.qcow2", size=8)
        vm = bench.make(4, bench.in_place(outside))
        leave_out(bench, vm)
        moved = vm.move(bench.place / "else")
        assert data_of(moved) == str(outside)
