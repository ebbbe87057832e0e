"""Moved, cloned and localized VMs: the same bytes in every state, under other names."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import hvmgr
from hvmgr import errors
from hvmgr.storage import index

CloneOptions = hvmgr.CloneOptions


@pytest.fixture
def with_undo(bench, branched):
    branched.snapshot("three").apply()
    bench.write(branched, 0x99, 3 << 20)
    return branched


class TestMove:
    def test_everything_moves(self, bench, with_undo):
        old, before, tree = with_undo.path, bench.photo(with_undo), bench.tree(with_undo)
        (old / "Virtual Hard Disks" / "stray.img").write_bytes(b"x" * 512)
        moved = with_undo.move(bench.place / "else")
        assert (moved.id, moved.path) == (with_undo.id, bench.place / "else")
        assert not old.exists()
        assert bench.photo(moved) == before
        assert bench.tree(moved) == tree
        assert (moved.path / "Virtual Hard Disks" / "stray.img").exists()
        bench.check(moved)
        assert str(old) not in "".join(path.read_text() for path in moved.path.rglob("*.xml"))
        found = bench.host.vm("web")
        assert found.path == moved.path
        found.undo()
        found.snapshot("one").delete()
        bench.check(found)

    def test_into_a_folder_that_is_there(self, bench, branched):
        (bench.place / "shelf").mkdir(mode=0o711)
        (bench.place / "shelf" / "other").mkdir()
        assert branched.move(bench.place / "shelf").path == bench.place / "shelf" / "web"

    def test_base_outside_stays_where_it_is(self, bench):
        gold = bench.image("gold.qcow2", fill=(7,))
        vm = bench.make(bench.in_place(gold))
        vm.create_snapshot("one")
        before = bench.photo(vm)
        moved = vm.move(bench.place / "else")
        assert bench.photo(moved) == before
        (entry,) = [one for one in index.entries() if one.vm_id == vm.id]
        assert (entry.home, entry.outside) == (moved.path, (str(gold),))

    def test_refusals_change_nothing(self, bench, branched):
        bench.image("x.img", fmt="raw")
        before = bench.states()
        for target, kind in (
            (bench.place / "x.img", errors.Conflict),
            (bench.place / "no" / "where", errors.NotFound),
            (branched.path / "inner", errors.UsageError),
        ):
            with pytest.raises(kind):
                branched.move(target)
        assert bench.states() == before
        bench.start(branched)
        with pytest.raises(errors.Conflict):
            branched.move(bench.place / "else")
        branched.stop(force=True)

    def test_images_that_others_need(self, bench, branched):
        branched.clone("linked", CloneOptions(snapshot="one", linked=True))
        with pytest.raises(errors.Conflict) as caught:
            branched.move(bench.place / "else")
        assert "linked" in caught.value.message

    def test_saved_vm_goes_on(self, bench, branched):
        bench.start(branched)
        bench.domain(branched).managed_save()
        moved = branched.move(bench.place / "else")
        assert str(moved.state()) == "saved"
        moved.start()
        assert str(moved.state()) == "running"
        writing = {str(path) for path in bench.domain(moved).writable_files()}
        assert writing == set(moved.now().disks.values())
        moved.stop(force=True)


class TestClone:
    def test_whole_tree(self, bench, branched):
        before = bench.photo(branched)
        clone = branched.clone("two")
        assert bench.photo(clone) == before == bench.photo(branched)
        assert clone.id != branched.id
        bench.check(clone)
        bench.check(branched)

    def test_one_snapshot(self, bench, branched):
        before = bench.photo(branched)
        clone = branched.clone("two", CloneOptions(snapshot="three"))
        assert clone.snapshots() == []
        assert bench.photo(clone) == {"now hda": before["three hda"]}
        bench.check(clone)
        clone.merge()
        assert bench.photo(clone) == {"now hda": before["three hda"]}
        assert len(bench.files(clone)) == 1
        bench.check(clone)

    def test_linked(self, bench, branched):
        before = bench.photo(branched)
        clone = branched.clone("two", CloneOptions(snapshot="three", linked=True))
        assert bench.photo(clone) == {"now hda": before["three hda"]}
        assert len(bench.files(clone)) == 1
        bench.check(clone)
        branched.snapshot("three").delete()
        branched.snapshot("two").delete()
        assert bench.photo(clone) == {"now hda": before["three hda"]}
        with pytest.raises(errors.Conflict) as caught:
            branched.delete(with_disks=True)
        assert "two" in caught.value.message
        with pytest.raises(errors.UsageError):
            branched.clone("three", CloneOptions(linked=True))

    def test_running_vm_by_snapshot_alone(self, bench, branched):
        bench.start(branched)
        with pytest.raises(errors.Conflict) as caught:
            branched.clone("two")
        assert "--snapshot" in caught.value.hint
        branched.create_snapshot("live")
        clone = branched.clone("two", CloneOptions(snapshot="live", linked=True))
        assert str(clone.state()) == "saved"
        clone.start()
        assert str(clone.state()) == "running"
        for vm in (clone, branched):
            vm.stop(force=True)
        bench.check(clone)

    def test_without_state_it_is_off(self, bench, branched):
        bench.start(branched)
        branched.create_snapshot("live")
        clone = branched.clone("two", CloneOptions(snapshot="live", without_state=True))
        assert str(clone.state()) == "off"
        branched.stop(force=True)


class TestLocalize:
    @pytest.fixture
    def linked(self, bench, branched):
        """A linked VM with a snapshot of its own, and its gold."""
        gold = bench.take_away(branched)
        vm = bench.bring(gold, mode=hvmgr.Mode.LINK)
        vm.create_snapshot("mine")
        bench.write(vm, 0x55, 3 << 20)
        return vm, gold

    def test_gold_is_not_needed_any_more(self, bench, linked):
        vm, gold = linked
        before, tree = bench.photo(vm), bench.tree(vm)
        assert vm.localize("hda")
        assert not vm.localize("hda")
        bench.check(vm)
        shutil.rmtree(gold)
        assert bench.photo(vm) == before
        assert bench.tree(vm) == tree
        assert not (gold.parent / ".web.hvmgr-links" / f"{vm.id}.json").exists()
        vm.snapshot("three").apply()
        vm.snapshot("one").delete()
        bench.check(vm)

    def test_link_that_was_just_made(self, bench, branched):
        """Its working image itself stands on the gold: the header is changed while nobody may start the VM."""
        gold = bench.take_away(branched)
        vm = bench.bring(gold, mode=hvmgr.Mode.LINK)
        bench.write(vm, 0x55, 3 << 20)
        before = bench.photo(vm)
        assert vm.localize("hda")
        shutil.rmtree(gold)
        assert bench.photo(vm) == before
        bench.check(vm)

    def test_running(self, bench, linked):
        vm, gold = linked
        before = bench.photo(vm)
        bench.start(vm)
        assert vm.localize("hda")
        assert str(vm.state()) == "running"
        vm.stop(force=True)
        shutil.rmtree(gold)
        assert bench.photo(vm) == before
        bench.check(vm)

    def test_working_image_outside(self, bench):
        gold = bench.image("gold.raw", fmt="raw", fill=(7,))
        vm = bench.make(bench.in_place(gold))
        before = bench.photo(vm)
        assert vm.localize("hda")
        gold.unlink()
        assert bench.photo(vm) == before
        assert Path(vm.now().disks["hda"]).parent == vm.home.layout.bases
        bench.check(vm)

    def test_image_outside_of_another_disk_is_not_written(self, bench):
        """It stands on the same base, and goes on standing on that."""
        gold = bench.image("gold.raw", fmt="raw", fill=(7,))
        above = [bench.image(f"{number}.qcow2", fill=(number,), backing=(gold, "raw")) for number in (1, 2)]
        vm = bench.make(*map(bench.in_place, above))
        before, content = bench.photo(vm), bench.file_of(above[1])
        assert vm.localize("hda")
        assert bench.file_of(above[1]) == content
        assert vm.localize("hdb")
        assert bench.file_of(above[1]) == content
        assert bench.photo(vm) == before
        bench.check(vm)

    def test_unknown_disk(self, bench, branched):
        with pytest.raises(errors.NotFound):
            branched.localize("vdz")
