"""Imports by copy: the whole tree comes along, each state with its bytes, and the source stays what it was."""

from __future__ import annotations

import shutil

import pytest

import hvmgr
from hvmgr import errors
from hvmgr.model import configuration
from hvmgr.storage import index


def hashes(folder):
    """Every file of a folder with what tells that it was written."""
    import hashlib

    return {
        path: (path.stat().st_mode, path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_tree_comes_along_with_every_byte_and_the_source_is_untouched(bench, branched):
    before, tree, vm_id = bench.photo(branched), bench.tree(branched), branched.id
    source = bench.take_away(branched)
    files = hashes(source)
    vm = bench.bring(source)
    assert bench.photo(vm) == before
    assert bench.tree(vm) == tree
    assert vm.id != vm_id
    bench.check(vm)
    assert hashes(source) == files
    vm.snapshot("three").apply()
    vm.snapshot("left").delete()
    bench.check(vm)


def test_export_is_imported_again_and_again(bench, branched):
    source = bench.take_away(branched)
    vms = [bench.bring(source, name=f"web{number}") for number in range(3)]
    ids = [{vm.id, *(one.id for one in vm.snapshots())} for vm in vms]
    assert len(set.union(*ids)) == 3 * 5
    genids = {vm.home.present().genid for vm in vms}
    assert len(genids) == 3
    assert len({bench.photo(vm)["now hda"][1][2 << 20] for vm in vms}) == 1


def test_kept_id_is_refused_where_it_is_taken(bench, branched):
    source = bench.copy(branched)
    before = bench.states()
    with pytest.raises(errors.Conflict) as caught:
        bench.bring(source, new_id=False, name="other")
    assert branched.id in caught.value.message
    assert bench.states() == before


def test_kept_id_keeps_every_id(bench, branched):
    ids, vm_id = [one.id for one in branched.snapshots()], branched.id
    source = bench.take_away(branched)
    vm = bench.bring(source, new_id=False)
    assert (vm.id, [one.id for one in vm.snapshots()]) == (vm_id, ids)
    bench.check(vm)


def test_addresses_are_new_and_serials_stay(bench):
    vm = bench.make(4, networks=(hvmgr.NetworkSpecification(kind="user"),))

    def serial(edited):
        disk = edited.root.find("devices/disk")
        configuration.etree.SubElement(disk, "serial").text = "S-1"

    bench.edit(vm, serial)
    vm.create_snapshot("one")
    old = vm.home.present().nics()[0].mac
    new = bench.bring(bench.take_away(vm))
    macs = {one.nics()[0].mac for one in (new.home.present(), new.home.snapshot(new.snapshots()[0].id))}
    assert len(macs) == 1
    assert macs != {old}
    assert new.home.present().disks()[0].serial == "S-1"
    kept = bench.bring(bench.place / "exports" / "web", name="kept", keep_macs=True)
    assert kept.home.present().nics()[0].mac == old


def test_snapshots_can_stay_away(bench, branched):
    source = bench.take_away(branched)
    vm = bench.bring(source, drop_snapshots=("one", "two"))
    assert bench.tree(vm) == ({"three": (None, "none"), "left": (None, "none")}, "left")
    bench.check(vm)
    alone = bench.bring(source, name="alone", without_snapshots=True)
    assert alone.snapshots() == []
    assert bench.photo(alone)["now hda"] == bench.photo(vm)["now hda"]
    bench.check(alone)


def test_base_outside_comes_into_the_home(bench):
    gold = bench.image("gold.qcow2", fill=(7,))
    vm = bench.make(bench.in_place(gold))
    vm.create_snapshot("one")
    before = bench.photo(vm)
    folder = bench.copy(vm)
    assert bench.codes(folder, name="new") == ["image-outside"]
    new = bench.bring(folder, name="new", paths={str(gold.parent): str(gold.parent)})
    gold.unlink()
    assert bench.photo(new) == before
    assert new.home.layout.bases.joinpath("hda.qcow2").exists()
    bench.check(new)


def test_moved_base_is_named_by_slot(bench):
    gold = bench.image("gold.qcow2", fill=(7,))
    vm = bench.make(bench.in_place(gold))
    vm.create_snapshot("one")
    before = bench.photo(vm)
    folder = bench.copy(vm)
    vm.delete(with_disks=True)
    moved = bench.place / "elsewhere.qcow2"
    gold.rename(moved)
    assert bench.codes(folder) == ["missing-disk"]
    assert bench.photo(bench.bring(folder, disks={"hda": str(moved)})) == before


def test_home_elsewhere_and_three_roots(bench, branched):
    before = bench.photo(branched)
    source = bench.take_away(branched)
    for name in ("a", "b", "c"):
        (bench.place / name).mkdir(mode=0o711)
    vm = bench.bring(source, vm_path=bench.place / "a", snapshot_path=bench.place / "b", disk_path=bench.place / "c")
    assert vm.path == bench.place / "a" / "web"
    assert (vm.path / "Snapshots").resolve() == bench.place / "b" / "web" / "Snapshots"
    assert bench.photo(vm) == before
    bench.check(vm)
    again = bench.host.vm("web")
    again.snapshot("two").apply()
    again.create_snapshot("new")
    again.snapshot("one").delete()
    bench.check(again)
    again.delete(with_disks=True)
    for name in ("a", "b", "c"):
        assert list((bench.place / name).rglob("*")) == []


def test_disk_target(bench, branched):
    before = bench.photo(branched)
    source = bench.take_away(branched)
    (bench.place / "fast").mkdir(mode=0o711)
    vm = bench.bring(source, disk_targets={"hda": str(bench.place / "fast" / "base.qcow2")})
    assert (bench.place / "fast" / "base.qcow2").exists()
    assert bench.photo(vm) == before
    (entry,) = [one for one in index.entries() if one.vm_id == vm.id]
    assert str(bench.place / "fast" / "base.qcow2") in entry.outside


def test_folder_for_disks_that_all_go_elsewhere(bench, branched):
    source = bench.take_away(branched)
    with pytest.raises(errors.UsageError, match="--disk-path would be ignored: --disk-target wins"):
        bench.bring(source, disk_targets={"hda": str(bench.place / "base.qcow2")}, disk_path=bench.place / "c")


def test_changed_byte_is_found_while_copying(bench, branched):
    source = bench.take_away(branched)
    base = next((source / "Virtual Hard Disks").iterdir())
    base.chmod(0o600)
    with base.open("r+b") as file:
        file.seek(base.stat().st_size - 1)
        last = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([last[0] ^ 1]))
    before = bench.states()
    with pytest.raises(errors.Corrupt) as caught:
        bench.bring(source)
    assert str(base) in caught.value.message
    assert bench.states() == before
    assert [one.code for one in bench.host.plan_import(source).check(thorough=True) if one.severity == "error"] == [
        "wrong-hash"
    ]


def test_owner_and_tags_are_kept_through_an_apply(bench, branched):
    vm = bench.bring(bench.take_away(branched), owner="anna", tags=("shop", "test"))
    assert (vm.home.facts().owner, vm.home.facts().tags) == ("anna", ("shop", "test"))
    vm.snapshot("two").apply()
    assert (vm.home.facts().owner, vm.home.facts().tags) == ("anna", ("shop", "test"))
    vm.undo()
    assert vm.home.facts().owner == "anna"


def test_running_source_is_refused(bench, branched):
    bench.start(branched)
    before = bench.photo(branched).keys()
    assert bench.codes(branched.path, name="new") == ["source-in-use"]
    assert bench.photo(branched).keys() == before
    branched.stop(force=True)


def test_source_may_be_the_parent_or_the_configuration(bench, branched):
    source = bench.take_away(branched)
    configuration_file = next((source / "Virtual Machines").glob("*.xml"))
    for number, where in enumerate((source, source.parent, configuration_file)):
        assert bench.bring(where, name=f"web{number}").snapshots()
    shutil.copytree(source, source.parent / "second")
    with pytest.raises(errors.UsageError) as caught:
        bench.bring(source.parent, name="x")
    assert "second" in caught.value.message
    assert bench.bring(source.parent, vm="second", name="x").name == "x"


def test_plain_domain_xml(bench):
    vm = bench.make(4, name="old")
    bench.write(vm, 0x42)
    folder = bench.place / "plain"
    folder.mkdir(mode=0o711)
    (path,) = vm.now().disks.values()
    shutil.copy(path, folder / "disk.qcow2")
    parsed = vm.home.present().without_metadata()
    parsed.set_disk_source("hda", folder / "disk.qcow2", "qcow2")
    (folder / "old.xml").write_text(parsed.to_xml())
    before = bench.photo(vm)
    vm.delete(with_disks=True)
    new = bench.bring(folder / "old.xml", name="new")
    assert bench.photo(new) == before
    bench.check(new)
