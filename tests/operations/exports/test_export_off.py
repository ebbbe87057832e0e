"""A VM that is off, as a folder: all of its tree, a part of it, one disk for each, or no disks at all."""

from __future__ import annotations

import os
import shutil

import pytest

import hvmgr
from hvmgr import errors
from hvmgr.model.image_format import ImageFormat
from hvmgr.model.manifest import Extent
from hvmgr.storage import copy

MIB = 1 << 20


class TestWhole:
    def test_export_holds_the_whole_tree(self, bench, branched, untouched):
        seen, files = bench.photo(branched), untouched(branched)
        folder = bench.export(branched)
        assert folder == bench.out / "web"
        bench.check_export(folder)
        assert bench.photo_of_export(folder) == seen
        assert untouched(branched) == files
        bench.check(branched)

    def test_tree_and_ids_are_the_same(self, bench, branched):
        source = bench.look(bench.export(branched))
        assert source.vm_id == branched.id
        records = {one.id: (one.name, one.parent, one.notes) for one in branched.snapshots()}
        assert {
            one.record.id: (one.record.name, one.record.parent, one.record.notes) for one in source.snapshots
        } == records
        assert source.facts.parent == branched.now().parent
        assert source.facts.home == bench.out / "web"
        assert source.undo is None

    def test_paths_are_those_of_the_export(self, bench, branched):
        folder = bench.export(branched)
        source = bench.look(folder)
        for one in source.configurations():
            for disk in one.disks():
                assert disk.source is None or disk.source.startswith(f"{folder}/")
        assert all(image.inside for image in source.images.values())

    def test_headers_are_relative_and_state_the_format(self, bench, branched):
        source = bench.look(bench.export(branched))
        backed = [one for one in source.images.values() if one.parent is not None]
        assert backed
        assert all(not os.path.isabs(one.backing) and one.parent_format for one in backed)

    def test_manifest_tells_what_is_in_it(self, bench, branched):
        told = bench.told(bench.export(branched))
        assert (told.vm_id, told.name, told.home) == (branched.id, "web", str(branched.path))
        assert {one.name for one in told.snapshots} == {"one", "two", "three", "left"}
        assert told.options.snapshots is Extent.ALL
        (disk,) = told.disks
        assert (disk.slot, disk.size, disk.path) == ("hda", 4 * MIB, branched.now().disks["hda"])
        assert len(told.chain(told.present[0].image)) == 3
        assert told.source.libvirt
        assert told.source.machine

    def test_undo_slot_stays_at_home(self, bench, branched):
        branched.snapshot("two").apply()
        bench.export(branched)
        assert branched.can_undo()
        branched.undo()
        bench.check(branched)

    def test_copy_on_another_place_is_whole_by_itself(self, bench, branched):
        seen = bench.photo(branched)
        folder = bench.export(branched)
        branched.delete(with_disks=True)
        moved = bench.place / "moved"
        shutil.copytree(folder, moved)
        assert bench.photo_of_export(moved) == seen

    def test_vm_without_snapshots(self, bench):
        vm = bench.make(4, 2, name="plain")
        bench.write(vm, 0x42, slot="hda")
        bench.write(vm, 0x43, slot="hdb")
        folder = bench.export(vm)
        bench.check_export(folder)
        assert bench.photo_of_export(folder) == bench.photo(vm)

    def test_vm_without_disks(self, bench):
        vm = bench.make(name="none")
        bench.edit(vm, lambda edited: edited.remove_disk("hda"))
        folder = bench.export(vm)
        bench.check_export(folder)
        assert bench.told(folder).images == ()

    def test_cdrom_is_named_and_not_copied(self, bench):
        iso = bench.image("some.iso", fmt="raw")
        vm = bench.make(4, cdrom=iso)
        folder = bench.export(vm)
        assert [one.path for one in bench.told(folder).outside] == [str(iso)]
        bench.check_export(folder)


class TestOutside:
    @pytest.mark.parametrize("fmt", ["qcow2", "raw", "vpc"])
    def test_base_outside_the_home_comes_along(self, bench, fmt):
        path = bench.image(f"gold.{fmt}", fmt=fmt, options="force_size=on" if fmt == "vpc" else None)
        vm = bench.make(bench.in_place(path))
        vm.create_snapshot("one")
        bench.write(vm, 0x42, 2 << 20)
        seen, before = bench.photo(vm), bench.file_of(path)
        folder = bench.export(vm)
        bench.check_export(folder)
        assert bench.photo_of_export(folder) == seen
        assert bench.file_of(path) == before
        assert {image.path for image in bench.told(folder).images} >= {str(path)}

    def test_chain_outside_the_home_comes_along(self, bench):
        base = bench.image("base.qcow2")
        middle = bench.image("middle.qcow2", backing=(base.name, "qcow2"), fill=(7,))
        vm = bench.make(bench.in_place(middle))
        vm.create_snapshot("one")
        folder = bench.export(vm)
        bench.check_export(folder)
        base.unlink()
        middle.unlink()
        assert bench.photo_of_export(folder)["now hda"][1]

    def test_two_bases_of_one_name_keep_apart(self, bench):
        disks = []
        for number in (1, 2):
            (bench.place / str(number)).mkdir()
            disks.append(bench.in_place(bench.image(f"{number}/disk.raw", fmt="raw", fill=(number,))))
        vm = bench.make(*disks)
        seen = bench.photo(vm)
        folder = bench.export(vm)
        bench.check_export(folder)
        assert bench.photo_of_export(folder) == seen

    def test_disk_that_snapshots_leave_out_is_copied_once(self, bench):
        vm = bench.make(4, 2)
        bench.write(vm, 0x42, slot="hdb")

        def leave_out(edited):
            next(d for d in edited.root.findall("devices/disk") if d.find("target").get("dev") == "hdb").set(
                "snapshot", "no"
            )

        bench.edit(vm, leave_out)
        vm.create_snapshot("one")
        folder = bench.export(vm)
        assert len(bench.told(folder).images) == 3
        assert bench.host.verify(folder) == []


class TestParts:
    def test_without_snapshots_each_disk_is_one_image(self, bench, branched):
        now = bench.photo(branched)["now hda"]
        folder = bench.export(branched, snapshots=Extent.NONE)
        bench.check_export(folder)
        assert bench.photo_of_export(folder) == {"now hda": now}
        (image,) = bench.told(folder).images
        assert (image.file, image.parent) == ("Virtual Hard Disks/hda.qcow2", None)
        assert bench.look(folder).vm_id == branched.id

    @pytest.mark.parametrize("fmt", [ImageFormat.QCOW2, ImageFormat.RAW, ImageFormat.VHD])
    def test_flattened_disk_has_the_wanted_format_and_the_exact_size(self, bench, fmt):
        size = 5 * MIB + 512 * 3
        vm = bench.make(hvmgr.DiskSpecification(size=size))
        bench.write(vm, 0x42)
        vm.create_snapshot("one")
        bench.write(vm, 0x43, 1 << 20)
        folder = bench.export(vm, snapshots=Extent.NONE, format=fmt)
        bench.check_export(folder)
        assert bench.photo_of_export(folder) == {"now hda": bench.photo(vm)["now hda"]}
        assert bench.told(folder).images[0].format == {"vhd": "vpc"}.get(fmt, fmt)

    @pytest.mark.parametrize("keep", [["one"], ["three"], ["two", "left"], ["one", "three"]])
    def test_pruned_tree_keeps_the_kept(self, bench, branched, untouched, keep):
        seen, files = bench.photo(branched), untouched(branched)
        folder = bench.export(branched, keep=tuple(keep))
        bench.check_export(folder)
        assert bench.photo_of_export(folder) == {
            name: one for name, one in seen.items() if name.split()[0] in (*keep, "now")
        }
        assert untouched(branched) == files
        unnamed = {image.file for image in bench.told(folder).images} - named(bench.told(folder))
        assert all(
            bench.told(folder).chain(one)[0].parent is None or is_shared(bench.told(folder), one) for one in unnamed
        )

    def test_pruned_tree_closes_over_the_gap(self, bench, branched):
        source = bench.look(bench.export(branched, keep=("three",)))
        (three,) = source.snapshots
        assert three.record.parent is None
        assert source.facts.parent is None

    def test_merged_copy_hides_what_a_shorter_image_hid(self, bench):
        vm = bench.make(8)
        bench.write(vm, 0x11, 6 * MIB)  # of a time when the disk was long
        vm.create_snapshot("long")
        vm.create_snapshot("short")
        bench.run("qemu-img", "resize", "--shrink", "-f", "qcow2", vm.now().disks["hda"], 4 * MIB)
        vm.create_snapshot("cut")
        bench.run("qemu-img", "resize", "-f", "qcow2", vm.now().disks["hda"], 8 * MIB)
        vm.create_snapshot("grown")
        seen = bench.photo(vm)
        folder = bench.export(vm, keep=("long", "grown"))
        bench.check_export(folder)
        assert bench.photo_of_export(folder) == {
            name: one for name, one in seen.items() if "short" not in name and "cut" not in name
        }

    def test_excluded_disk_is_left_out_everywhere(self, bench):
        vm = bench.make(4, 2)
        vm.create_snapshot("one")
        folder = bench.export(vm, exclude=("hdb",))
        bench.check_export(folder)
        assert set(bench.photo_of_export(folder)) == {"one hda", "now hda"}
        assert bench.told(folder).options.excluded == ("hdb",)
        assert [one.slot for one in bench.look(folder).facts.disks] == ["hda"]

    def test_configuration_alone_proves_its_disks(self, bench, branched):
        folder = bench.export(branched, config_only=True)
        told = bench.told(folder)
        assert not told.options.disks
        assert {image.path for image in told.images} >= set(branched.now().disks.values())
        for image in told.images:
            assert copy.sha256(hvmgr_path(image.path)) == image.sha256
            assert hvmgr_path(image.path).stat().st_size == image.bytes
            assert not (folder / image.file).exists()
        assert bench.host.verify(folder) == []

    def test_one_snapshot_becomes_a_vm_of_its_own(self, bench, branched):
        seen = bench.photo(branched)["two hda"]
        folder = bench.export(branched, snapshot="two")
        bench.check_export(folder)
        source = bench.look(folder)
        assert source.snapshots == ()
        assert source.vm_id != branched.id
        assert source.facts.parent is None
        assert source.facts.snapshot is None
        assert bench.photo_of_export(folder) == {"now hda": seen}
        assert bench.told(folder).options.snapshot == branched.snapshot("two").id

    def test_without_checksums_nothing_is_hashed(self, bench, branched):
        folder = bench.export(branched, checksums=False)
        assert not (folder / "SHA256SUMS").exists()
        assert all(image.sha256 is None for image in bench.told(folder).images)
        assert [one.code for one in bench.host.verify(folder)] == ["no-checksums"]


class TestRefusals:
    def test_what_is_not_there(self, bench):
        vm = bench.make(4)
        for options, kind in [
            ({"keep": ("nobody",)}, errors.NotFound),
            ({"snapshot": "nobody"}, errors.NotFound),
            ({"exclude": ("vdz",)}, errors.NotFound),
            ({"with_state": True}, errors.Conflict),
            ({"quiesce": True}, errors.Conflict),
            ({"format": ImageFormat.RAW}, errors.UsageError),
        ]:
            with pytest.raises(kind):
                bench.export(vm, **options)
        assert not bench.out.exists()

    def test_export_into_the_home_itself(self, bench):
        vm = bench.make(4)
        for inside in ("", "Snapshots", "new"):
            with pytest.raises(errors.UsageError, match="own home"):
                bench.export(vm, vm.path / inside)
        with pytest.raises(errors.UsageError, match="holds the home"):
            bench.export(vm, vm.path.parent)
        for file in (bench.image("file"), bench.place / "file" / "below"):
            with pytest.raises(errors.UsageError, match="file is no folder"):
                bench.export(vm, file)

    def test_existing_destination_is_never_replaced(self, bench):
        vm = bench.make(4)
        (bench.out / "web").mkdir(parents=True)
        with pytest.raises(errors.Conflict, match="exists already"):
            bench.export(vm)
        assert list((bench.out / "web").iterdir()) == []

    def test_changed_frozen_image_is_not_passed_on(self, bench, branched):
        path = branched.snapshot("two").disks["hda"]
        os.chmod(path, 0o600)
        bench.write_image(path, 0x99, 3 << 20)
        with pytest.raises(errors.Corrupt, match="changed after it was frozen"):
            bench.export(branched)
        assert not bench.out.exists()

    def test_vm_cannot_be_started_meanwhile(self, bench, branched, monkeypatch):
        seen = []
        real = copy.copy_files

        def copying(*arguments, **more):
            with pytest.raises(errors.HvmgrError) as caught:
                bench.domain(branched).start()
            seen.append(caught.value.message)
            return real(*arguments, **more)

        monkeypatch.setattr(copy, "copy_files", copying)
        bench.check_export(bench.export(branched))
        assert "lock" in seen[0]


class TestResume:
    @pytest.fixture(autouse=True)
    def _note_small_files_too(self, monkeypatch):
        monkeypatch.setattr(copy, "_SMALL", 0)

    def fail_in(self, monkeypatch, name):
        from hvmgr.operations.exchange.export_steps import Exporter

        def fail(*_):
            raise errors.NoSpace("no space left")

        monkeypatch.setattr(Exporter, name, fail)
        acts = {kind: (fail if act.__name__ == name else act) for kind, act in Exporter._acts.items()}
        monkeypatch.setattr(Exporter, "_acts", acts)

    def test_finished_files_are_not_copied_again(self, bench, branched, monkeypatch):
        with monkeypatch.context() as patch:
            self.fail_in(patch, "_manifest")
            with pytest.raises(errors.NoSpace) as caught:
                bench.export(branched)
        place = bench.out / ".web.hvmgr-export"
        assert str(place) in caught.value.hint
        assert not (bench.out / "web").exists()
        inodes = {path.name: path.stat().st_ino for path in place.rglob("*.qcow2")}
        assert inodes
        folder = bench.export(branched)
        bench.check_export(folder)
        assert {path.name: path.stat().st_ino for path in folder.rglob("*.qcow2")} == inodes

    def test_other_wishes_leave_nothing_of_the_first(self, bench, branched, monkeypatch):
        with monkeypatch.context() as patch:
            self.fail_in(patch, "_manifest")
            with pytest.raises(errors.NoSpace):
                bench.export(branched)
        folder = bench.export(branched, snapshots=Extent.NONE)
        bench.check_export(folder)
        assert len(bench.told(folder).images) == 1

    def test_what_changed_since_is_copied_again(self, bench, branched, monkeypatch):
        with monkeypatch.context() as patch:
            self.fail_in(patch, "_manifest")
            with pytest.raises(errors.NoSpace):
                bench.export(branched)
        bench.write(branched, 0x55, 3 << 20)
        seen = bench.photo(branched)
        folder = bench.export(branched)
        bench.check_export(folder)
        assert bench.photo_of_export(folder) == seen

    def test_failure_before_the_first_file_leaves_nothing(self, bench, branched, monkeypatch):
        with monkeypatch.context() as patch:
            self.fail_in(patch, "_folders")
            with pytest.raises(errors.NoSpace):
                bench.export(branched)
        assert list(bench.out.iterdir()) == []


def named(told):
    return {one.image for holder in (told.present, *(s.disks for s in told.snapshots)) for one in holder}


def is_shared(told, file):
    return sum(image.parent == file for image in told.images) > 1


def hvmgr_path(text):
    from pathlib import Path

    return Path(text)
