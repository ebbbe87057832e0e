"""Somebody else works on the VM: virsh, virt-manager, a text editor. The next command sees it, says it, loses nothing."""

from __future__ import annotations

import re
from pathlib import Path

import libvirt
import pytest

from hvmgr import errors
from hvmgr.host.domain import State
from hvmgr.model import tree

MIB = 1 << 20


def handle(bench, vm):
    return bench.domain(vm)._handle()


def said(bench, text):
    lines = [line for line in bench.said if text in line]
    bench.said.clear()
    return lines


def with_disk(xml, slot, path, *, fmt="qcow2", index=1):
    """The XML with one more IDE disk."""
    disk = (
        f"<disk type='file' device='disk'><driver name='qemu' type='{fmt}'/><source file='{path}'/>"
        f"<target dev='{slot}' bus='ide'/></disk>"
    )
    return re.sub(r"(<devices>)", rf"\1{disk}", xml, count=1)


def without_disk(xml, slot):
    return re.sub(rf"<disk (?:(?!</disk>).)*<target dev='{slot}'.*?</disk>", "", xml, flags=re.DOTALL)


def define(bench, vm, change):
    bench.host.connection.define(change(bench.domain(vm).xml(live=False)))


@pytest.fixture
def vm(bench):
    """Two disks, two snapshots: a, then b below it."""
    return bench.kept(two_disks)


def two_disks(bench):
    vm = bench.make(4, 4)
    bench.write(vm, 1)
    bench.write(vm, 2, slot="hdb")
    vm.create_snapshot("a")
    bench.write(vm, 3, MIB)
    vm.create_snapshot("b")
    bench.write(vm, 4, 2 * MIB)
    bench.write(vm, 5, 2 * MIB, slot="hdb")
    return vm


def same_snapshots(bench, vm, before):
    after = bench.photo(vm)
    keep = {name for name in before if name[0] in "ab"}
    assert {name: after[name] for name in keep} == {name: before[name] for name in keep}


# --- disks come and go ------------------------------------------------------------------------------------------------


def test_removed_disk_is_kept_and_comes_back_with_its_snapshot(bench, vm):
    before = bench.photo(vm)
    gone = vm.now().disks["hdb"]
    define(bench, vm, lambda xml: without_disk(xml, "hdb"))
    c = vm.create_snapshot("c")
    assert said(bench, "kept as a detached disk")[0].startswith(gone)
    assert set(c.disks) == {"hda"}
    assert Path(gone).exists()
    assert tree.detached(vm.tree()) == [gone]
    assert bench.bytes_of(gone) == before["now hdb"]
    assert gone in [path for path, _ in vm.usage().orphans]
    same_snapshots(bench, vm, before)
    bench.check(vm)
    vm.snapshot("a").apply()
    assert set(vm.now().disks) == {"hda", "hdb"}
    assert bench.photo(vm)["now hdb"] == before["a hdb"]
    for name in "abc":
        vm.snapshot(name).delete()
    assert bench.bytes_of(gone) == before["now hdb"]
    bench.check(vm)


def test_detached_disk_survives_the_deletion_of_everything(bench, vm):
    before = bench.photo(vm)
    gone = vm.now().disks["hdb"]
    define(bench, vm, lambda xml: without_disk(xml, "hdb"))
    for name in "ab":
        vm.snapshot(name).delete()
    left = vm.delete()
    assert gone in left
    assert bench.bytes_of(gone) == before["now hdb"]
    assert len([path for path in left if "web-hda" in path]) == 1


def test_deletion_with_disks_takes_detached_disks_too(bench, vm):
    define(bench, vm, lambda xml: without_disk(xml, "hdb"))
    assert vm.delete(with_disks=True) == []
    assert not vm.path.exists()


def test_attached_disk_takes_part_and_its_base_is_never_removed(bench, vm):
    extra = bench.image("extra.qcow2", fill=(8, 9))
    before = bench.photo(vm)
    define(bench, vm, lambda xml: with_disk(xml, "hdd", extra))
    c = vm.create_snapshot("c")
    assert said(bench, f"disk hdd is {extra} now")
    assert c.disks["hdd"] == str(extra)
    assert bench.mode_of(extra) == 0o400
    bench.write(vm, 10, slot="hdd")
    bench.check(vm)
    vm.snapshot("a").apply()
    assert set(vm.now().disks) == {"hda", "hdb"}
    c.apply()
    assert bench.photo(vm)["now hdd"] == bench.photo(vm)["c hdd"] == bench.bytes_of(extra)
    same_snapshots(bench, vm, before)
    vm.delete(with_disks=True)
    assert bench.bytes_of(extra)[1].keys() == {0, MIB}


def test_disk_in_another_slot_is_the_same_disk(bench, vm):
    before = bench.photo(vm)
    ids = {disk.slot: disk.id for disk in vm.home.facts().disks}

    def move(xml):
        return xml.replace("dev='hdb'", "dev='hdd'").replace(
            "<address type='drive' controller='0' bus='0' target='0' unit='1'/>", ""
        )

    define(bench, vm, move)
    c = vm.create_snapshot("c")
    assert set(c.disks) == {"hda", "hdd"}
    assert {disk.slot: disk.id for disk in vm.home.facts().disks} == {"hda": ids["hda"], "hdd": ids["hdb"]}
    assert bench.photo(vm)["c hdd"] == before["now hdb"]
    assert tree.detached(vm.tree()) == []
    vm.snapshot("a").apply()
    assert {disk.slot: disk.id for disk in vm.home.facts().disks} == ids
    same_snapshots(bench, vm, before)
    bench.check(vm)


def test_two_disks_that_change_places_keep_their_ids(bench, vm):
    before, disks = bench.photo(vm), vm.now().disks
    ids = {disk.slot: disk.id for disk in vm.home.facts().disks}
    define(
        bench,
        vm,
        lambda xml: xml.replace(disks["hda"], "X").replace(disks["hdb"], disks["hda"]).replace("X", disks["hdb"]),
    )
    vm.create_snapshot("c")
    assert {disk.slot: disk.id for disk in vm.home.facts().disks} == {"hda": ids["hdb"], "hdb": ids["hda"]}
    after = bench.photo(vm)
    assert (after["c hda"], after["c hdb"]) == (before["now hdb"], before["now hda"])
    bench.check(vm)


def test_unrelated_image_in_a_slot_is_a_new_disk(bench, vm):
    before = bench.photo(vm)
    old, other = vm.now().disks["hda"], bench.image("other.qcow2", fill=(0x55,))
    define(bench, vm, lambda xml: xml.replace(old, str(other)))
    c = vm.create_snapshot("c")
    lines = bench.said
    assert f"disk hda is {other} now" in lines
    assert f"{old} is no longer used by the VM; it is kept as a detached disk" in lines
    assert c.disks["hda"] == str(other)
    assert bench.bytes_of(old) == before["now hda"]
    same_snapshots(bench, vm, before)
    bench.check(vm)
    for name in "abc":
        vm.snapshot(name).delete()
    assert bench.bytes_of(old) == before["now hda"]
    assert Path(other).exists()


# --- other edits ------------------------------------------------------------------------------------------------------


def test_memory_and_description_edited_are_taken_over_and_said(bench, vm):
    define(bench, vm, lambda xml: re.sub(r"<(memory|currentMemory) unit='KiB'>\d+", r"<\1 unit='KiB'>98304", xml))
    c = vm.create_snapshot("c")
    assert said(bench, "took over a change")
    assert vm.home.present().memory == 96 * MIB
    assert vm.home.snapshot(c.id).memory == 96 * MIB
    vm.snapshot("a").apply()
    assert vm.home.present().memory == 64 * MIB
    c.apply()
    assert vm.home.present().memory == 96 * MIB
    bench.check(vm)


def test_configuration_comes_back_with_apply(bench):
    vm = bench.make(4, networks=None)
    macs = [nic.mac for nic in vm.home.present().nics()]
    assert macs
    first = vm.create_snapshot("a")
    define(bench, vm, lambda xml: re.sub(r"<interface.*?</interface>", "", xml, flags=re.DOTALL))
    second = vm.create_snapshot("b")
    assert vm.home.present().nics() == ()
    first.apply()
    assert [nic.mac for nic in vm.home.present().nics()] == macs
    second.apply()
    assert vm.home.present().nics() == ()
    vm.undo()
    assert [nic.mac for nic in vm.home.present().nics()] == macs


def test_hvmgr_metadata_removed_is_put_back(bench, vm):
    before, parent = bench.photo(vm), vm.now().parent
    ids = {disk.slot: disk.id for disk in vm.home.facts().disks}
    define(bench, vm, lambda xml: re.sub(r"<metadata>.*</metadata>", "", xml, flags=re.DOTALL))
    c = vm.create_snapshot("c")
    assert c.parent == parent
    assert {disk.slot: disk.id for disk in vm.home.facts().disks} == ids
    same_snapshots(bench, vm, before)
    assert bench.photo(vm)["c hda"] == before["now hda"]
    bench.check(vm)


def test_undefined_vm_is_defined_again_from_its_home(bench, vm):
    before = bench.photo(vm)
    bench.domain(vm).undefine()
    vm.create_snapshot("c")
    assert said(bench, "it was defined again from its home")
    same_snapshots(bench, vm, before)
    bench.check(vm)


def test_vm_renamed_by_virsh_has_its_new_name(bench, vm):
    handle(bench, vm).rename("other", 0)
    vm.create_snapshot("c")
    assert vm.name == "other"
    assert bench.host.vm("other").id == vm.id
    vm.snapshot("a").apply()
    assert vm.name == "other"
    bench.check(vm)


def test_snapshot_xml_defined_by_hand_is_put_on_a_fresh_child(bench, vm):
    """What virsh define Snapshots/ID.xml does: the present writes to the images of the snapshot, had it been let."""
    before = bench.photo(vm)
    xml = vm.home.snapshot(vm.snapshot("a").id).to_xml()
    bench.host.connection.define(xml)
    c = vm.create_snapshot("c")
    assert len([line for line in bench.said if "goes on in a fresh child of it" in line]) == 2
    assert vm.home.facts().snapshot is None
    same_snapshots(bench, vm, before)
    after = bench.photo(vm)
    assert (after["c hda"], after["c hdb"]) == (before["a hda"], before["a hdb"])
    assert c.disks["hda"] not in vm.snapshot("a").disks.values()
    bench.check(vm)


# --- images that others made or changed -------------------------------------------------------------------------------

OVERLAY = "<domainsnapshot><name>{name}</name></domainsnapshot>"


def take_overlay(bench, vm, name, *flags):
    number = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
    for flag in flags:
        number |= flag
    handle(bench, vm).snapshotCreateXML(OVERLAY.format(name=name), number)


@pytest.mark.parametrize("running", [False, True], ids=["off", "running"])
def test_overlay_made_by_libvirt_becomes_the_working_image(bench, vm, running):
    before, old = bench.photo(vm), vm.now().disks
    if running:
        bench.start(vm)
    take_overlay(bench, vm, "virsh")
    overlay = bench.domain(vm).xml(live=False)
    assert ".virsh'" in overlay
    if running:
        vm.stop(force=True)
    bench.write_image(old["hda"].replace(".qcow2", ".virsh"), 6, 3 * MIB)
    c = vm.create_snapshot("c")
    assert len(said(bench, "made outside hvmgr; it is taken over")) == 2
    assert c.disks["hda"].endswith(".virsh")
    forest = vm.tree()
    assert forest.images[c.disks["hda"]].parent == old["hda"]
    assert tree.detached(forest) == []
    after = bench.photo(vm)
    assert after["c hdb"] == before["now hdb"]
    assert after["c hda"][1].items() >= before["now hda"][1].items()
    assert 3 * MIB in after["c hda"][1]
    assert bench.mode_of(old["hda"]) == 0o400
    same_snapshots(bench, vm, before)
    for name in "ab":
        vm.snapshot(name).delete()
    assert bench.photo(vm)["c hda"] == after["c hda"]
    bench.check(vm)
    assert handle(bench, vm).snapshotNum(0) == 1
    c.delete()
    assert bench.photo(vm) == {"now hda": after["now hda"], "now hdb": after["now hdb"]}


def test_overlay_of_libvirt_is_kept_complete_by_the_deletion_of_the_vm(bench, vm):
    before = bench.photo(vm)
    take_overlay(bench, vm, "virsh")
    overlay = Path(re.search(r"source file='([^']*hda[^']*)'", bench.domain(vm).xml(live=False))[1])
    bench.write_image(overlay, 6, 3 * MIB)
    expected = bench.bytes_of(overlay)
    left = vm.delete()
    found = [path for path in left if bench.bytes_of(path) == expected]
    assert found
    assert expected[1].items() >= before["now hda"][1].items()


def test_present_pointed_to_a_frozen_image_goes_on_in_a_fresh_child(bench, vm):
    before = bench.photo(vm)
    frozen, working = vm.snapshot("a").disks["hda"], vm.now().disks["hda"]
    define(bench, vm, lambda xml: xml.replace(working, frozen))
    c = vm.create_snapshot("c")
    assert f"disk hda was pointed to the frozen image {frozen}; it goes on in a fresh child of it" in bench.said
    assert vm.tree().images[c.disks["hda"]].parent == frozen
    after = bench.photo(vm)
    assert after["c hda"] == before["a hda"]
    same_snapshots(bench, vm, before)
    assert bench.bytes_of(working) == before["now hda"]
    bench.check(vm)


def test_frozen_image_that_was_written_by_hand_damages_its_snapshots_alone(bench, vm):
    """libvirt's word is that the VM went on in it: so it does, in a child; what needed the image as it was is damaged."""
    vm.snapshot("b").apply(keep_undo=False)
    vm.create_snapshot("c")
    frozen, working = vm.snapshot("a").disks["hda"], vm.now().disks["hda"]
    define(bench, vm, lambda xml: xml.replace(working, frozen))
    Path(frozen).chmod(0o600)
    bench.write_image(frozen, 99)
    state, files = bench.file_of(frozen), bench.files(vm)
    expected = bench.bytes_of(frozen)
    vm.create_snapshot("d")
    assert len(said(bench, f"is damaged: {frozen}")) == 3
    assert {one.name: one.damaged for one in vm.snapshots()} == {
        "a": ("hda",),
        "b": ("hda",),
        "c": ("hda",),
        "d": (),
    }
    for name in "abc":
        with pytest.raises(errors.Corrupt, match=f"snapshot '{name}' is damaged: an image of its disk hda") as caught:
            vm.snapshot(name).apply()
        assert caught.value.exit_code == 6
    assert bench.photo(vm)["now hda"] == expected
    assert bench.file_of(frozen) == state
    assert files <= bench.files(vm)
    bench.check(vm)
    for name in "abc":
        vm.snapshot(name).delete()
    assert bench.photo(vm)["now hda"] == bench.photo(vm)["d hda"] == expected
    vm.snapshot("d").apply()


def test_vm_is_not_started_on_a_frozen_image(bench, vm):
    """libvirt gives the file to QEMU's user and still cannot open it: 0400."""
    frozen, working = vm.snapshot("a").disks["hda"], vm.now().disks["hda"]
    define(bench, vm, lambda xml: xml.replace(working, frozen))
    before = bench.file_of(frozen)
    with pytest.raises(libvirt.libvirtError, match="Permission denied"):
        handle(bench, vm).create()
    assert bench.file_of(frozen) == before
    assert bench.domain(vm).state() is State.OFF
    bench.start(vm)
    assert bench.domain(vm).state() is State.RUNNING
    assert bench.domain(vm).writable_files().isdisjoint({Path(frozen)})
    vm.stop(force=True)
    assert bench.file_of(frozen) == before
    bench.check(vm)


def test_snapshot_whose_image_was_changed_is_not_applied(bench, vm):
    frozen = vm.snapshot("a").disks["hda"]
    Path(frozen).chmod(0o600)
    bench.write_image(frozen, 99)
    Path(frozen).chmod(0o400)
    files, xml = bench.files(vm), bench.domain(vm).xml(live=False)
    for name in "ab":
        with pytest.raises(errors.Corrupt, match=re.escape(f"{frozen} was changed")):
            vm.snapshot(name).apply()
    assert (bench.files(vm), bench.domain(vm).xml(live=False)) == (files, xml)


def test_changed_image_is_not_merged_and_its_snapshot_can_be_deleted(bench, vm):
    frozen = vm.snapshot("a").disks["hda"]
    Path(frozen).chmod(0o600)
    bench.write_image(frozen, 99)
    state = bench.file_of(frozen)
    vm.snapshot("a").delete()
    assert said(bench, "is not merged")
    assert bench.file_of(frozen) == state
    assert [one.name for one in vm.snapshots()] == ["b"]


def test_changed_image_on_another_branch_does_not_matter(bench, vm):
    a = vm.snapshot("a")
    a.apply()
    c = vm.create_snapshot("c")
    frozen = vm.snapshot("b").disks["hda"]
    Path(frozen).chmod(0o600)
    bench.write_image(frozen, 99)
    c.apply()
    vm.create_snapshot("d")
    with pytest.raises(errors.Corrupt):
        vm.snapshot("b").apply()


def test_home_without_records_is_unknown_and_goes_on(bench, vm):
    for record in vm.home.layout.frozen.iterdir():
        record.unlink()
    frozen = Path(vm.snapshot("a").disks["hda"])
    frozen.touch()
    before = bench.photo(vm)
    vm.snapshot("a").apply()
    assert bench.photo(vm)["now hda"] == before["a hda"]
    vm.snapshot("b").delete()
    bench.check(vm)


def test_image_that_lost_its_user_by_an_edit_is_never_merged_into(bench, vm):
    """The edit freed an inner image: it has one child left, which nobody of ours names any more."""
    working = vm.now().disks["hdb"]
    define(bench, vm, lambda xml: without_disk(xml, "hdb"))
    contents = bench.bytes_of(working)
    vm.snapshot("b").delete()
    vm.snapshot("a").delete()
    assert bench.bytes_of(working) == contents
    bench.check(vm)


def test_files_beside_ours_are_orphans_that_nobody_touches(bench, vm):
    stranger = vm.home.layout.images / "backup.qcow2"
    stranger.write_bytes(b"something")
    lost = vm.home.layout.bases / "notes.img"
    lost.write_bytes(bytes(1 << 20))
    vm.snapshot("a").delete()
    vm.snapshot("b").delete()
    assert {str(stranger), str(lost)} <= {path for path, _ in vm.usage().orphans}
    left = vm.delete(with_disks=True)
    assert str(stranger) in left
    assert stranger.read_bytes() == b"something"
