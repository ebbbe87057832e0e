"""Making, naming and deleting VMs loses no file and leaves none; damage is one clear sentence, and nothing is written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from hvmgr import errors
from hvmgr.model import specification
from hvmgr.model.specification import DiskSpecification, ImageFormat
from hvmgr.storage import index

MIB = 1 << 20


def tree_of(folder):
    """Every file with its content, every folder; what must not change when a command is refused."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if path.name != "lock"
    }


# --- create -----------------------------------------------------------------------------------------------------------


def test_name_that_libvirt_has_already_is_refused(bench):
    bench.make(4)
    before = tree_of(bench.place)
    with pytest.raises(errors.Conflict, match="libvirt has a VM 'web' already"):
        bench.make(4, home=bench.place / "elsewhere")
    assert tree_of(bench.place) == before


def test_id_that_libvirt_has_already_is_refused(bench):
    vm = bench.make(4)
    with pytest.raises(errors.Conflict, match=f"id {vm.id} already"):
        bench.make(4, name="other", uuid=vm.id)
    assert not (bench.place / "root" / "other").exists()


def test_folder_that_holds_something_is_refused_and_left_alone(bench):
    folder = bench.place / "root" / "web"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(errors.Conflict, match="exists already and is not empty") as caught:
        bench.make(4)
    assert "--home" in caught.value.hint
    assert tree_of(folder) == {"notes.txt": b"mine"}


def test_empty_folder_is_taken(bench):
    folder = bench.place / "root" / "web"
    folder.mkdir(parents=True)
    assert bench.make(4).path == folder


def test_way_that_qemu_cannot_pass_is_refused(bench):
    closed = bench.place / "closed"
    closed.mkdir(mode=0o700)
    with pytest.raises(errors.Conflict, match=f"may not pass through {closed}") as caught:
        bench.make(4, home=closed / "homes" / "web")
    assert f"chmod o+x '{closed}'" in caught.value.hint
    assert bench.host.connection.find_domain_by_name("web") is None


def test_copy_of_a_sparse_image_stays_sparse(bench):
    source = bench.image("big.img", fmt="raw", size=4096, fill=(1,))
    vm = bench.make(DiskSpecification(path=source, format=ImageFormat.RAW))
    copy = Path(vm.now().disks["hda"])
    assert copy.stat().st_size == 4096 * MIB
    assert copy.stat().st_blocks * 512 < 2 * MIB
    assert bench.bytes_of(copy, "raw") == bench.bytes_of(source, "raw")
    assert bench.mode_of(copy) == 0o600


def test_differencing_image_is_only_used_in_place(bench):
    base = bench.image("base.qcow2")
    top = bench.image("top.qcow2", backing=(base, "qcow2"), fill=(2,))
    with pytest.raises(errors.Unsupported, match="cannot be copied alone") as caught:
        bench.make(top)
    assert "--in-place" in caught.value.hint
    vm = bench.make(bench.in_place(top))
    assert vm.now().disks["hda"] == str(top)


def test_parent_of_unknown_format_is_refused(bench):
    base = bench.image("base.qcow2")
    top = bench.image("top.qcow2", backing=(base, "qcow2"), fill=(2,))
    data = top.read_bytes().replace(b"\xe2\x79\x2a\xca\x00\x00\x00\x05qcow2", b"\x11\x11\x11\x11\x00\x00\x00\x05qcow2")
    top.write_bytes(data)
    with pytest.raises(errors.Unsupported, match="does not state the format of its parent"):
        bench.make(bench.in_place(top))
    assert bench.host.vms() == []


def test_missing_image_is_not_found(bench):
    for disk in (DiskSpecification(path=bench.place / "none"), bench.in_place(bench.place / "none")):
        with pytest.raises(errors.NotFound, match="none"):
            bench.make(disk)
    top = bench.image("top.qcow2", backing=(bench.image("base.qcow2"), "qcow2"))
    (bench.place / "base.qcow2").unlink()
    with pytest.raises((errors.NotFound, errors.Corrupt), match=r"base\.qcow2"):
        bench.make(bench.in_place(top))
    assert bench.host.vms() == []


def test_vm_from_a_file_is_what_the_file_says(bench):
    bench.image("disk.qcow2", fill=(7,))
    text = """
name: app
template: generation1
accel: tcg
memory: 96M
networks: none
disks:
  - size: 8M
  - path: disk.qcow2
    in_place: yes
description: from a file
"""
    spec = specification.load(text, source="spec.yaml", folder=bench.place)
    vm = bench.host.create_vm(spec)
    assert vm.name == "app"
    assert vm.home.present().memory == 96 * MIB
    assert list(vm.now().disks.values())[1] == str(bench.place / "disk.qcow2")
    vm.create_snapshot("a")
    bench.check(vm)


def test_home_elsewhere_is_found_through_the_index(bench):
    elsewhere = bench.place / "other disk" / "web home"
    vm = bench.make(4, home=elsewhere)
    vm.create_snapshot("a")
    found = bench.open_host("root").vm("web")
    assert found.path == elsewhere
    assert [one.name for one in bench.host.vms()] == ["web"]
    assert [one.name for one in found.snapshots()] == ["a"]
    assert bench.open_host("another root").vm(vm.id).path == elsewhere
    found.delete(with_disks=True)
    assert bench.host.vms() == []
    assert index.entries() == []


def test_damaged_index_is_written_again(bench):
    vm = bench.make(4)
    for file in (Path(index.settings.index_folder()) / "homes").iterdir():
        file.write_text("{")
    assert [one.name for one in bench.host.vms()] == ["web"]
    vm.create_snapshot("a")
    assert [entry.name for entry in index.entries()] == ["web"]


# --- rename -----------------------------------------------------------------------------------------------------------


def test_rename_keeps_the_folder_and_the_tree(bench):
    vm = bench.make(4)
    vm.create_snapshot("a")
    path = vm.path
    vm.rename("better name")
    assert (vm.name, vm.path) == ("better name", path)
    assert bench.host.vm("better name").id == vm.id
    with pytest.raises(errors.NotFound):
        bench.host.vm("web")
    assert [entry.name for entry in index.entries()] == ["better name"]
    bench.check(vm)


def test_rename_to_a_name_that_is_taken_or_wrong_is_refused(bench):
    vm, other = bench.make(4), bench.make(4, name="other")
    before = tree_of(bench.place)
    with pytest.raises(errors.Conflict, match="libvirt has a VM 'other' already"):
        vm.rename("other")
    with pytest.raises(errors.Conflict, match="is called 'web' already"):
        vm.rename("web")
    for name in ("", "a/b", ".hidden", "two\nlines", "x" * 300):
        with pytest.raises(errors.UsageError):
            vm.rename(name)
    assert tree_of(bench.place) == before
    assert (vm.name, other.name) == ("web", "other")


# --- delete -----------------------------------------------------------------------------------------------------------


def test_deleted_vm_leaves_one_complete_image_per_disk(bench):
    vm = bench.make(4, 4)
    bench.write(vm, 1)
    a = vm.create_snapshot("a")
    bench.write(vm, 2, MIB)
    vm.create_snapshot("b")
    a.apply()
    bench.write(vm, 3, 2 * MIB)
    bench.write(vm, 4, slot="hdb")
    seen = bench.photo(vm)
    left = vm.delete()
    assert [Path(path).name for path in left] == ["web-hda.qcow2", "web-hdb.qcow2"]
    assert [bench.bytes_of(path) for path in left] == [seen["now hda"], seen["now hdb"]]
    assert {bench.mode_of(path) for path in left} == {0o600}
    assert [path.name for path in vm.path.iterdir()] == ["Virtual Hard Disks"]
    assert bench.host.connection.find_domain(vm.id) is None
    assert (bench.host.vms(), index.entries()) == ([], [])
    again = bench.make(*[bench.in_place(path) for path in left], name="again")
    assert list(bench.photo(again).values()) == [seen["now hda"], seen["now hdb"]]


def test_deletion_with_disks_leaves_nothing(bench):
    vm = bench.make(4, bench.image("copied.qcow2"))
    vm.create_snapshot("a").apply()
    assert vm.delete(with_disks=True) == []
    assert not vm.path.exists()
    assert (bench.place / "copied.qcow2").exists()


@pytest.mark.parametrize("with_disks", [True, False])
def test_running_vm_is_not_deleted(bench, with_disks):
    vm = bench.make(4)
    vm.create_snapshot("a")
    before = bench.photo(vm)
    bench.start(vm)
    with pytest.raises(errors.Conflict, match="web is running") as caught:
        vm.delete(with_disks=with_disks)
    assert "vm stop" in caught.value.hint
    vm.stop(force=True)
    assert bench.photo(vm) == before
    bench.check(vm)


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def vm(bench):
    return bench.kept(with_a_and_b)


def with_a_and_b(bench):
    vm = bench.make(4)
    bench.write(vm, 1)
    vm.create_snapshot("a")
    bench.write(vm, 2, MIB)
    vm.create_snapshot("b")
    return vm


def refused(bench, vm, error, sentence, *acts):
    """Each of these acts says the sentence, and nothing changes."""
    before, xml = tree_of(vm.path), bench.domain(vm).xml(live=False)
    for act in acts:
        with pytest.raises(error, match=sentence) as caught:
            act()
        assert "\n" not in str(caught.value)
        assert type(caught.value) is not errors.HvmgrError
        assert tree_of(vm.path) == before
        assert bench.domain(vm).xml(live=False) == xml


@pytest.mark.parametrize("text", [b"", b"<domain>", b"\x00\x01", b"<domain/>", b"<html/>"], ids=repr)
def test_damaged_snapshot_xml(bench, vm, text):
    a, b = vm.snapshots()
    vm.home.layout.snapshot(a.id).write_bytes(text)
    refused(bench, vm, errors.Corrupt, re.escape(f"{a.id}.xml"), a.apply, a.delete, b.delete, b.apply, vm.delete)


@pytest.mark.parametrize("text", [b"", b"<domain>", b"<html/>"], ids=repr)
def test_damaged_present_xml(bench, vm, text):
    a = vm.snapshots()[0]
    vm.home.layout.configuration.write_bytes(text)
    refused(bench, vm, errors.Corrupt, re.escape(f"{vm.id}.xml"), a.apply, a.delete, vm.delete, vm.create_snapshot)


def test_damaged_undo_xml(bench, vm):
    a = vm.snapshots()[0]
    a.apply()
    vm.home.layout.undo.write_bytes(b"<domain")
    refused(bench, vm, errors.Corrupt, r"undo\.xml", vm.undo, a.apply, a.delete)


def test_newer_format_is_refused(bench, vm):
    a = vm.snapshots()[0]
    file = vm.home.layout.snapshot(a.id)
    file.write_text(file.read_text().replace('format="1"', 'format="2"'))
    refused(bench, vm, errors.Unsupported, "written by a newer hvmgr", a.apply, a.delete, vm.delete)


def test_missing_image_is_named(bench, vm):
    a, b = vm.snapshots()
    gone = Path(a.disks["hda"])
    gone.rename(bench.place / "kept")
    refused(
        bench,
        vm,
        (errors.Corrupt, errors.NotFound),
        re.escape(gone.name),
        a.apply,
        b.apply,
        vm.create_snapshot,
        vm.start,
    )
    (bench.place / "kept").rename(gone)
    b.apply()
    bench.check(vm)


def test_missing_working_image_is_named(bench, vm):
    working = Path(vm.now().disks["hda"])
    working.rename(bench.place / "kept")
    refused(bench, vm, (errors.Corrupt, errors.NotFound), re.escape(working.name), vm.create_snapshot, vm.start)
    before = bench.photo_of(vm, "b")
    vm.snapshot("b").apply()
    assert bench.photo_of(vm, "b") == bench.bytes_of(vm.now().disks["hda"]) == before
    with pytest.raises((errors.Corrupt, errors.NotFound), match=re.escape(working.name)):
        vm.undo()
    vm.create_snapshot("c")
    assert not vm.can_undo()
    bench.check(vm)


def test_vm_with_missing_images_is_deleted_with_its_disks(bench, vm):
    for path in (vm.snapshot("a").disks["hda"], vm.now().disks["hda"]):
        Path(path).unlink()
    refused(bench, vm, (errors.Corrupt, errors.NotFound), "missing", vm.delete)
    assert vm.delete(with_disks=True) == []
    assert not vm.path.exists()


def test_swapped_parent_image_is_corrupt(bench, vm):
    """Another file under the name of a frozen image: a restore from the wrong backup."""
    a, b = vm.snapshots()
    frozen = Path(a.disks["hda"])
    shutil.copy(bench.image("wrong.qcow2", fill=(9,)), frozen)
    refused(bench, vm, errors.Corrupt, "was changed after it was frozen", a.apply, b.apply)


@pytest.mark.parametrize("text", [b"", b"\x00\xff", b"[]", b"{}", b'{"format": 99}', b"nonsense\nswitch\n"], ids=repr)
def test_garbage_in_the_journal(bench, vm, text):
    vm.home.layout.journal.write_bytes(text)
    a = vm.snapshots
    refused(bench, vm, (errors.Corrupt, errors.Unsupported), "journal", vm.create_snapshot, vm.merge, vm.undo, a)


def test_journal_with_unknown_steps_is_not_guessed_at(bench, vm):
    document = {"format": 1, "plan_id": "x", "vm_id": vm.id, "operation": "o", "subject": "s"}
    document |= {"prepare": [{"step": "BurnDisk"}], "switch": None, "finish": [], "hold": []}
    vm.home.layout.journal.write_text(json.dumps(document) + "\n")
    refused(bench, vm, (errors.Corrupt, errors.Unsupported), "journal", vm.create_snapshot, vm.undo)


def test_garbage_in_a_record_of_a_frozen_image_is_unknown(bench, vm):
    for record in vm.home.layout.frozen.iterdir():
        record.write_bytes(b"\xff{")
    vm.snapshot("a").apply()
    vm.snapshot("b").delete()


def test_image_with_a_damaged_header_is_corrupt(bench, vm):
    a, b = vm.snapshots()
    path = Path(b.disks["hda"])
    data = bytearray(path.read_bytes())
    data[:4] = b"XXXX"
    path.chmod(0o600)
    path.write_bytes(data)
    refused(bench, vm, errors.Corrupt, "no qcow2 image", b.apply, a.apply, a.delete, vm.delete)


def test_chain_in_a_circle_is_corrupt(bench, vm):
    a, b = vm.snapshots()
    path = Path(a.disks["hda"])
    path.chmod(0o600)
    bench.run("qemu-img", "rebase", "-u", "-b", b.disks["hda"], "-F", "qcow2", path)
    refused(bench, vm, errors.Corrupt, "runs in a circle", a.apply, b.apply)


def test_vm_of_another_connection_is_not_defined_here(bench, vm):
    home = vm.home.layout.configuration
    text = home.read_text()
    bench.domain(vm).undefine()
    home.write_text(re.sub(r'uri="[^"]*"', 'uri="qemu:///elsewhere"', text))
    with pytest.raises(errors.Conflict, match="belongs to the connection qemu:///elsewhere") as caught:
        vm.create_snapshot()
    assert "-c 'qemu:///elsewhere'" in caught.value.hint
    assert bench.host.connection.find_domain(vm.id) is None


# --- space ------------------------------------------------------------------------------------------------------------


def allocated(folder):
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def test_usage_adds_up_to_what_the_images_take(bench, vm):
    vm.snapshot("a").apply()
    bench.write(vm, 5, length=2 * MIB)
    use = vm.usage()
    layout = vm.home.layout
    assert use.total == allocated(layout.images) + allocated(layout.bases)
    assert [one.name for one in use.snapshots] == ["a", "b"]
    assert use.undo > 0
    assert use.now >= 2 * MIB
    assert (use.unnamed, use.pending, use.orphans, use.outside) == (0, 0, (), 0)
    assert use.reclaimable == use.undo


def test_usage_tells_what_is_unnamed_pending_lost_and_outside(bench):
    base = bench.image("base.qcow2", fill=(1,) * 4)
    vm = bench.make(bench.in_place(base))
    a = vm.create_snapshot("a")
    bench.write(vm, 1, length=MIB)
    b = vm.create_snapshot("b")
    bench.write(vm, 2, length=2 * MIB)
    vm.create_snapshot("c")
    b.apply()
    d = vm.create_snapshot("d")
    b.delete()
    use = vm.usage()
    assert use.outside == base.stat().st_blocks * 512
    assert use.unnamed >= MIB
    assert use.pending == 0
    lost = vm.home.layout.images / "lost.img"
    lost.write_bytes(bytes([1]) * MIB)
    use = vm.usage()
    assert use.orphans == ((str(lost), lost.stat().st_blocks * 512),)
    assert use.reclaimable == lost.stat().st_blocks * 512
    assert use.total == allocated(vm.home.layout.images)
    a.delete()
    d.delete()
    bench.check(vm)
    assert vm.usage().total == allocated(vm.home.layout.images)


def test_pending_merge_is_counted_once(bench):
    one = bench.make(4, name="one")
    one.create_snapshot("a")
    bench.write(one, 1, length=MIB)
    b = one.create_snapshot("b")
    bench.write(one, 2, length=MIB)
    two = bench.make(bench.in_place(b.disks["hda"]), name="two")
    b.delete()
    two.delete(with_disks=True)
    use = one.usage()
    assert use.pending == use.unnamed >= MIB
    assert use.total == allocated(one.home.layout.images) + allocated(one.home.layout.bases)
    one.merge()
    assert one.usage().pending == 0


def test_home_that_came_without_hvmgrs_own_files_goes_on(bench):
    vm = bench.make(1)
    first = vm.create_snapshot("a")
    shutil.rmtree(vm.home.layout.private)
    vm.create_snapshot("b")
    first.apply()
    bench.check(vm)
