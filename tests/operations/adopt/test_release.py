"""The way out: a VM of hvmgr's becomes a plain domain of libvirt's, and can come back."""

from __future__ import annotations

import re
import shutil
import stat
from pathlib import Path

import pytest
from lxml import etree

import hvmgr
from hvmgr import errors

pytestmark = pytest.mark.libvirtd


def small(name):
    return hvmgr.Specification(
        name=name,
        template="generation1",
        accel="tcg",
        memory=64 << 20,
        networks=(),
        disks=(hvmgr.DiskSpecification(size=1 << 20),),
    )


@pytest.fixture
def vm(place):
    """one < two < (now), with a byte of its own at each."""
    vm = place.host.create_vm(small("web"))
    place.edit("web", lambda text: re.sub(r"<(graphics|video|channel|audio)\b.*?</\1>", "", text, flags=re.DOTALL))
    place.write("web", 1, slot="hda")
    vm.create_snapshot("one", notes="text of one")
    place.write("web", 2, 1, slot="hda")
    vm.create_snapshot("two")
    place.write("web", 3, 2, slot="hda")
    return vm


def present(place, name="web"):
    """What the guest would read of its first disk, by libvirt's word."""
    root = etree.fromstring(place.domain(name).xml(live=False))
    disk = root.find("devices/disk[@device='disk']")
    return place.bytes_of(disk.find("source").get("file"), disk.find("driver").get("type"))


def photo(place, vm):
    return {one.name: place.seen(one)["hda"] for one in vm.snapshots()} | {"now": place.now(vm)["hda"]}


def tree_of(vm):
    names = {one.id: one.name for one in vm.snapshots()} | {None: None}
    said = {one.name: (names[one.parent], one.notes, one.type, one.state) for one in vm.snapshots()}
    return said, names[vm.now().parent]


def is_plain(place, vm, name="web"):
    """Nothing of hvmgr's is left anywhere."""
    assert "hvmgr:vm" not in place.virsh("dumpxml", name)
    assert "hvmgr:vm" not in place.virsh("dumpxml", "--inactive", name)
    assert not (vm.path / ".hvmgr").exists()
    assert not list(vm.path.rglob("*.xml"))
    assert [one.name for one in place.host.vms()] == []
    for image in vm.path.rglob("*.qcow2"):
        assert stat.S_IMODE(image.stat().st_mode) == 0o600, image


def test_a_line_becomes_snapshots_of_libvirt_and_comes_back(place, vm):
    before, tree = photo(place, vm), tree_of(vm)
    made = vm.release()
    assert made.snapshots == (("one", "one"), ("two", "two"))
    assert (made.lost, made.left) == ((), ())
    is_plain(place, vm)
    assert [line.strip() for line in place.virsh("snapshot-list", "web", "--tree").splitlines() if line.strip()] == [
        "one",
        "|",
        "+- two",
    ]
    assert place.virsh("snapshot-current", "web", "--name").strip() == "two"
    assert "text of one" in place.virsh("snapshot-dumpxml", "web", "one")
    assert present(place) == before["now"]
    place.virsh("start", "web")
    place.virsh("destroy", "web")
    again = place.host.adopt("web", hvmgr.AdoptOptions(home=place.folder / "again"))
    assert photo(place, again) == before
    assert tree_of(again) == tree
    place.check(again)


def test_libvirt_deletes_the_leaf_and_goes_on(place, vm):
    before = photo(place, vm)
    vm.release()
    place.virsh("snapshot-delete", "web", "two")
    assert place.snapshots("web") == ["one"]
    assert present(place) == before["now"]
    place.virsh("start", "web")


def test_libvirt_deletes_an_inner_one(place, vm):
    before = photo(place, vm)
    vm.release()
    place.virsh("start", "web")
    place.virsh("snapshot-delete", "web", "one")
    assert place.snapshots("web") == ["two"]
    place.virsh("destroy", "web")
    assert present(place) == before["now"]
    again = place.host.adopt("web", hvmgr.AdoptOptions(home=place.folder / "again"))
    assert photo(place, again) == {"two": before["two"], "now": before["now"]}


def test_libvirt_takes_another_one_on_top(place, vm):
    before = photo(place, vm)
    vm.release()
    place.virsh("snapshot-create-as", "web", "three", "--disk-only")
    assert place.snapshots("web") == ["one", "two", "three"]
    again = place.host.adopt("web", hvmgr.AdoptOptions(home=place.folder / "again"))
    assert photo(place, again) == before | {"three": before["now"]}


def test_a_running_vm_with_memory_runs_on(place, vm):
    vm.start()
    domain = place.domain("web")
    domain.monitor("human-monitor-command", command_line="o /b 0x3ff 0x5a")
    vm.create_snapshot("memory")
    domain.monitor("human-monitor-command", command_line="o /b 0x3ff 0x77")
    status, before, tree = domain.monitor("query-status"), photo(place, vm), tree_of(vm)
    made = vm.release()
    assert [name for name, _ in made.snapshots] == ["one", "two", "memory"]
    assert domain.monitor("query-status") == status
    is_plain(place, vm)
    assert place.virsh("snapshot-list", "web", "--external", "--active", "--name").split() == ["memory"]
    again = place.host.adopt("web", hvmgr.AdoptOptions(home=place.folder / "again"))
    assert tree_of(again) == tree
    assert photo(place, again) == before
    again.snapshot("memory").apply()
    assert "0x5a" in domain.monitor("human-monitor-command", command_line="i /b 0x3ff")
    place.check(again)


def test_a_saved_vm_goes_on_where_it_was(place, vm):
    vm.start()
    domain = place.domain("web")
    domain.monitor("human-monitor-command", command_line="o /b 0x3ff 0x5a")
    place.virsh("managedsave", "web")
    vm.release()
    assert "hvmgr:vm" not in domain.managed_save_xml()
    place.virsh("start", "web")
    assert "0x5a" in domain.monitor("human-monitor-command", command_line="i /b 0x3ff")
    is_plain(place, vm)


def test_branches_and_the_undo_slot_are_named_and_stay_as_files(place, vm):
    vm.snapshot("one").apply()
    place.write("web", 9, 5, slot="hda")
    before = photo(place, vm)
    branch, undo = vm.snapshot("two").disks["hda"], vm.tree().undo.disks["hda"]
    bytes_of_branch = place.bytes_of(branch, "qcow2")
    foreseen = vm.foresee_release()
    made = vm.release()
    assert made == foreseen
    assert made.snapshots == (("one", "one"),)
    assert made.lost == (
        "snapshot 'two' is no snapshot any more: it is on another branch than the present",
        "the undo slot: nothing can be undone any more, its images stay as files",
    )
    assert dict(made.left) == {branch: "image of snapshot 'two'", undo: "image of the undo slot"}
    is_plain(place, vm)
    assert present(place) == before["now"]
    assert place.bytes_of(branch, "qcow2") == bytes_of_branch
    again = place.host.adopt("web", hvmgr.AdoptOptions(home=place.folder / "again"))
    assert photo(place, again) == {"one": before["one"], "now": before["now"]}


def test_unnamed_images_stay_in_the_chain(place, vm):
    vm.start()
    vm.snapshot("one").delete()
    before = photo(place, vm)
    made = vm.release()
    assert (made.snapshots, made.lost, made.left) == ((("two", "two"),), (), ())
    place.virsh("destroy", "web")
    again = place.host.adopt("web", hvmgr.AdoptOptions(home=place.folder / "again"))
    assert photo(place, again) == before


def test_names_that_libvirt_does_not_take_are_changed_and_said(place, vm):
    place.write("web", 4, 3, slot="hda")
    vm.create_snapshot("a/b", notes="more")
    vm.create_snapshot(".two")
    vm.create_snapshot("two")
    vm.create_snapshot("ü" * 100)
    made = vm.release()
    names = [name for _, name in made.snapshots]
    assert names[:5] == ["one", "two", "a-b", "two (2)", "two (3)"]
    assert set(names[5]) == {"ü"}
    assert "snapshot 'a/b' is called 'a-b' in libvirt" in made.lost
    assert place.virsh("snapshot-list", "web", "--name", "--topological").splitlines() == names
    again = place.host.adopt("web", hvmgr.AdoptOptions(home=place.folder / "again"))
    assert {one.name: one.notes for one in again.snapshots()}["a-b"] == "a/b\nmore"


def test_a_disk_that_is_gone_leaves_its_snapshot_out(place, vm):
    extra = place.image("extra.qcow2", fill=7)
    disk = (
        f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{extra}'/>"
        "<target dev='hdb' bus='ide'/></disk>"
    )
    place.edit("web", lambda text: text.replace("</disk>", f"</disk>{disk}", 1))
    vm.create_snapshot("both")
    place.edit("web", lambda text: re.sub(r"<disk (?:(?!</disk>).)*'hdb'.*?</disk>", "", text, flags=re.DOTALL))
    vm.create_snapshot("after")
    before = photo(place, vm)
    made = vm.release()
    assert [name for name, _ in made.snapshots] == ["one", "two", "after"]
    assert made.lost[0] == "snapshot 'both' is no snapshot any more: the present does not stand on its disk hdb"
    assert stat.S_IMODE(extra.stat().st_mode) == 0o644
    before.pop("both")
    again = place.host.adopt("web", hvmgr.AdoptOptions(home=place.folder / "again"))
    assert photo(place, again) == before


def test_an_adopted_vm_gets_back_what_it_brought(place):
    place.define("db", ("vda", "qcow2", place.image("a.qcow2", fill=1)))
    for number, name in enumerate(("one", "two"), 1):
        place.virsh("snapshot-create-as", "db", name, f"text of {name}", "--disk-only")
        place.write("db", number + 1, number)
    place.virsh("start", "db")
    place.virsh("snapshot-create-as", "db", "three", "--memspec", place.folder / "three.memory")
    place.virsh("destroy", "db")
    inactive = place.virsh("dumpxml", "--inactive", "db")
    notes = {name: place.virsh("snapshot-dumpxml", "db", name) for name in place.snapshots("db")}
    modes = {path.name: path.stat().st_mode for path in place.folder.glob("a.*")}
    vm = place.host.adopt("db")
    vm.release()
    assert without_chains(place.virsh("dumpxml", "--inactive", "db")) == without_chains(inactive)
    assert {path.name: path.stat().st_mode for path in place.folder.glob("a.*")} == modes
    for name, before in notes.items():
        after = place.virsh("snapshot-dumpxml", "db", name)
        for part in ("name", "description", "creationTime", "state", "parent/name"):
            assert etree.fromstring(after).findtext(part) == etree.fromstring(before).findtext(part), part
        assert disks(after) == disks(before)
    place.virsh("start", "db")


def without_chains(xml):
    """virsh leaves in the configuration what stands below a disk; the images say it as well."""
    root = etree.fromstring(xml, etree.XMLParser(remove_blank_text=True))
    for chain in root.findall("devices/disk/backingStore"):
        chain.getparent().remove(chain)
    return etree.tostring(root)


def disks(xml):
    return [(one.get("name"), one.get("snapshot"), one.find("source").get("file")) for one in
            etree.fromstring(xml).findall("disks/disk")]  # fmt: skip


# --- flatten ----------------------------------------------------------------------------------------------------------


def test_flatten_makes_the_present_complete(place, vm):
    before, old = photo(place, vm), vm.now().disks["hda"]
    frozen = {one.name: one.disks["hda"] for one in vm.snapshots()}
    made = vm.release(flatten=True)
    is_plain(place, vm)
    assert made.snapshots == ()
    assert len(made.lost) == 2
    assert dict(made.left) == {path: f"image of snapshot '{name}'" for name, path in frozen.items()}
    complete = vm.path / "Virtual Hard Disks" / "web-hda.qcow2"
    assert str(complete) in place.virsh("dumpxml", "web")
    assert "backing file" not in place.run("qemu-img", "info", complete)
    assert present(place) == before["now"]
    assert not Path(old).exists()
    for name, path in frozen.items():
        assert place.bytes_of(path, "qcow2") == before[name]
    for path in frozen.values():
        Path(path).unlink()
    place.virsh("start", "web")
    assert place.snapshots("web") == []


def test_flatten_of_a_complete_disk_changes_no_image(place, vm):
    one = place.host.create_vm(small("plain"))
    path = Path(one.now().disks["hda"])
    before = path.stat().st_mtime_ns, path.stat().st_ino
    assert one.release(flatten=True) == hvmgr.Release((), (), ())
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before


@pytest.mark.parametrize("is_noted", [True, False], ids=["virsh", "qemu-img"])
def test_flatten_loses_no_snapshot_inside_the_working_image(place, vm, is_noted):
    working = vm.now().disks["hda"]
    if is_noted:
        place.virsh("snapshot-create-as", "web", "inside")
    else:
        place.run("qemu-img", "snapshot", "-c", "inside", working)
    with pytest.raises(errors.Conflict, match="internal snapshots, which a complete image would not hold: inside"):
        vm.release(flatten=True)
    assert "inside" in place.run("qemu-img", "snapshot", "-l", working)
    assert [one.name for one in place.host.vms()] == ["web"]
    vm.release()
    assert "inside" in place.run("qemu-img", "snapshot", "-l", working)


@pytest.mark.parametrize("saved", [False, True], ids=["running", "saved"])
def test_flatten_waits_for_off(place, vm, saved):
    vm.start()
    if saved:
        place.virsh("managedsave", "web")
    files = {path: path.stat().st_mtime_ns for path in vm.path.rglob("*.qcow2")}
    with pytest.raises(errors.Conflict, match="cannot be made complete") as caught:
        vm.release(flatten=True)
    assert ("managedsave-remove web" if saved else "hvmgr vm stop web") in caught.value.hint
    assert {path: path.stat().st_mtime_ns for path in vm.path.rglob("*.qcow2")} == files
    assert [one.name for one in place.host.vms()] == ["web"]


# --- others -----------------------------------------------------------------------------------------------------------


def test_what_another_vm_needs_stays_read_only(place, vm):
    base = vm.snapshot("one").disks["hda"]
    other = place.host.create_vm(small("other"))
    overlay = place.image("theirs.qcow2", below=base)
    place.edit("other", lambda text: text.replace(other.now().disks["hda"], str(overlay)))
    before = place.bytes_of(overlay, "qcow2")
    made = vm.release()
    assert f"{base} is needed by other: it stays read-only" in made.lost
    assert stat.S_IMODE(Path(base).stat().st_mode) == 0o400
    assert place.bytes_of(overlay, "qcow2") == before
    place.virsh("start", "web")


def test_a_missing_image_of_the_present_is_refused(place, vm):
    gone = vm.snapshot("one").disks["hda"]
    shutil.move(gone, place.folder / "kept")
    with pytest.raises(errors.Corrupt, match="is missing"):
        vm.release()
    assert (vm.path / ".hvmgr").exists()
    assert place.snapshots("web") == []


def test_libvirt_that_does_not_take_a_snapshot_leaves_everything_as_it_was(place, vm, monkeypatch):
    from hvmgr.host import libvirt_snapshots

    real, before = libvirt_snapshots.redefine, photo(place, vm)

    def refuse_two(domain, xml, *, current=False):
        if "<name>two</name><" in xml:
            raise errors.HostFailed("no")
        real(domain, xml, current=current)

    monkeypatch.setattr(libvirt_snapshots, "redefine", refuse_two)
    with pytest.raises(errors.HostFailed):
        vm.release()
    assert place.snapshots("web") == []
    assert photo(place, vm) == before
    place.check(vm)


def test_the_whole_way_in_and_out(place):
    """virsh made it, hvmgr had it for a while, virsh has it again: the bytes are right at each step."""
    place.define("web", ("vda", "qcow2", place.image("a.qcow2", fill=1)))
    for number, name in enumerate(("one", "two", "three"), 1):
        place.virsh("snapshot-create-as", "web", name, "--disk-only")
        place.write("web", number + 1, number)
    vm = place.host.adopt("web")
    seen = {one.name: place.seen(one)["vda"] for one in vm.snapshots()}
    vm.snapshot("one").apply()
    place.write("web", 9, 9)
    vm.snapshot("two").delete()
    assert place.seen(vm.snapshot("three"))["vda"] == seen["three"]
    overlay, left = place.folder / "a.one", vm.snapshot("three").disks["vda"]
    with pytest.raises(errors.Conflict) as caught:
        vm.merge([overlay])
    assert caught.value.hint == f"name both: --image {overlay} --image {left}"
    assert vm.merge([overlay, left])
    assert not overlay.exists()
    assert place.seen(vm.snapshot("three"))["vda"] == seen["three"]
    made = vm.release()
    assert made.snapshots == (("one", "one"),)
    assert made.lost == ("snapshot 'three' is no snapshot any more: it is on another branch than the present",)
    assert place.bytes_of(left, "qcow2") == seen["three"]
    assert present(place) == [1, *[0] * 8, 9, *[0] * 6]
    place.virsh("start", "web")
    assert place.virsh("domstate", "web").strip() == "running"
    place.virsh("destroy", "web")
    assert present(place) == [1, *[0] * 8, 9, *[0] * 6]
