"""Snapshots inside qcow2 images: each becomes an image of its own, or goes; never without having been named."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import hvmgr
from hvmgr import errors
from hvmgr.host import internal_snapshots
from hvmgr.model.adoptee import Internal
from hvmgr.model.metadata import SavedState, SnapshotType
from hvmgr.storage import images

pytestmark = pytest.mark.libvirtd

CONVERT = hvmgr.AdoptOptions(internal=Internal.CONVERT)
DROP = hvmgr.AdoptOptions(internal=Internal.DROP)


def inside(path):
    return [one.name for one in images.internal_snapshots(Path(path))]


def parents(vm):
    names = {one.id: one.name for one in vm.snapshots()} | {None: None}
    return {one.name: names[one.parent] for one in vm.snapshots()}, names[vm.now().parent]


@pytest.fixture
def base(place):
    """A VM that is off with three internal snapshots of libvirt's, on one complete image."""
    path = place.image("a.qcow2", fill=1)
    place.define("web", ("vda", "qcow2", path))
    for number, name in enumerate(("one", "two", "three"), 1):
        place.virsh("snapshot-create-as", "web", name, f"text of {name}")
        place.write("web", number + 1, number)
        place.run("qemu-io", "-c", "write -z 0 64k" if name == "two" else "read 0 64k", path)
    return path


def test_each_becomes_an_image_of_its_own(place, base):
    assert place.host.internal_snapshots("web") == ["one", "two", "three"]
    vm = place.host.adopt("web", CONVERT)
    assert parents(vm) == ({"one": None, "two": "one", "three": "two"}, "three")
    assert {one.name: one.notes for one in vm.snapshots()}["two"] == "text of two"
    assert place.seen(vm.snapshot("one"))["vda"][:5] == [1, 0, 0, 0, 0]
    assert place.seen(vm.snapshot("two"))["vda"][:5] == [1, 2, 0, 0, 0]
    assert place.seen(vm.snapshot("three"))["vda"][:5] == [0, 2, 3, 0, 0]
    assert place.now(vm)["vda"][:5] == [0, 2, 3, 4, 0]
    assert vm.now().disks == {"vda": str(base)}
    assert (inside(base), place.snapshots("web")) == ([], [])
    place.run("qemu-img", "check", "-q", base)
    place.check(vm)
    vm.snapshot("one").apply()
    assert place.now(vm)["vda"][:5] == [1, 0, 0, 0, 0]
    vm.undo()
    place.virsh("start", "web")
    vm.stop(force=True)


def test_they_are_deleted_like_any_other_and_leave_no_data(place, base):
    vm = place.host.adopt("web", CONVERT)
    for name in ("two", "one", "three"):
        vm.snapshot(name).delete()
        assert place.now(vm)["vda"][:5] == [0, 2, 3, 4, 0]
    assert list(vm.home.layout.images.iterdir()) == []
    (blank,) = vm.home.layout.bases.iterdir()
    assert blank.stat().st_blocks * 512 < 1 << 20
    assert place.bytes_of(blank, "qcow2") == [0]


def test_memory_inside_is_said_by_name_and_the_disks_are_kept(place):
    path = place.image("a.qcow2", fill=1)
    place.define("web", ("vda", "qcow2", path), ("vdb", "qcow2", place.image("b.qcow2", fill=9)))
    place.virsh("start", "web")
    place.write("web", 2, 1)
    place.virsh("snapshot-create-as", "web", "with memory")
    place.write("web", 3, 2)
    place.virsh("destroy", "web")
    vm = place.host.adopt("web", CONVERT)
    assert any("'with memory' holds the memory of web" in line for line in place.said)
    (one,) = vm.snapshots()
    assert (one.state, one.type) == (SavedState.NONE, SnapshotType.DISK_ONLY)
    assert place.seen(one) == {"vda": [1, 2] + [0] * 14, "vdb": [9] + [0] * 15}
    assert place.now(vm)["vda"][:4] == [1, 2, 3, 0]
    assert inside(path) == []
    place.check(vm)


def test_on_a_parent_only_the_difference_is_copied(place):
    below = place.image("gold.qcow2", fill=7)
    place.fill(below, 8, 3)
    path = place.image("a.qcow2", below=below)
    place.define("web", ("vda", "qcow2", path))
    place.write("web", 1, 1)
    place.run("qemu-img", "snapshot", "-c", "by hand", path)
    place.write("web", 2, 3)
    vm = place.host.adopt("web", CONVERT)
    (one,) = vm.snapshots()
    assert place.seen(one)["vda"][:4] == [7, 1, 0, 8]
    assert vm.tree().images[one.disks["vda"]].parent == str(below)
    assert "0x10000" in place.run("qemu-img", "map", one.disks["vda"])
    assert vm.tree().images[one.disks["vda"]].data < 400 << 10
    assert place.now(vm)["vda"][:4] == [7, 1, 0, 2]
    assert vm.now().parent == one.id
    place.check(vm)


def test_external_on_internal_ones_come_along(place, base):
    place.virsh("snapshot-create-as", "web", "outside", "--disk-only")
    place.write("web", 9, 9)
    vm = place.host.adopt("web", CONVERT)
    assert parents(vm) == ({"one": None, "two": "one", "three": "two", "outside": "three"}, "outside")
    assert place.seen(vm.snapshot("outside"))["vda"][:5] == [0, 2, 3, 4, 0]
    assert place.now(vm)["vda"][9] == 9
    assert inside(base) == []
    assert place.snapshots("web") == []
    place.check(vm)


def test_drop_removes_them_and_nothing_else(place, base):
    vm = place.host.adopt("web", DROP)
    assert vm.snapshots() == []
    assert (inside(base), place.snapshots("web")) == ([], [])
    assert place.now(vm)["vda"][:5] == [0, 2, 3, 4, 0]
    place.check(vm)


def test_without_either_they_are_refused_by_name(place, base):
    before = place.state_of("web")
    with pytest.raises(errors.Unsupported, match="one, two, three") as caught:
        place.host.adopt("web")
    assert "--convert-internal" in caught.value.hint
    assert place.state_of("web") == before


@pytest.mark.parametrize("options", [CONVERT, DROP], ids=["convert", "drop"])
@pytest.mark.parametrize("saved", [False, True], ids=["running", "saved"])
def test_the_vm_has_to_be_off(place, base, options, saved):
    place.virsh("start", "web")
    if saved:
        place.virsh("managedsave", "web")
    with pytest.raises(errors.Conflict, match="internal snapshots cannot be converted or dropped"):
        place.host.adopt("web", options)
    assert inside(base) == ["one", "two", "three"]
    assert place.snapshots("web") == ["one", "two", "three"]
    assert not (place.folder / "homes" / "web").exists()


def test_a_snapshot_of_one_disk_of_two_is_refused(place, base):
    place.edit(
        "web",
        lambda text: text.replace(
            "</disk>",
            f"</disk><disk type='file' device='disk'><driver name='qemu' type='qcow2'/>"
            f"<source file='{place.image('b.qcow2', fill=5)}'/><target dev='vdb' bus='virtio'/></disk>",
            1,
        ),
    )
    place.run("qemu-img", "snapshot", "-c", "half", base)
    before = place.state_of("web")
    with pytest.raises(errors.Unsupported, match="'half' of web does not hold disk vdb"):
        place.host.adopt("web", CONVERT)
    assert place.state_of("web") == before
    vm = place.host.adopt("web", hvmgr.AdoptOptions(internal=Internal.CONVERT, exclude_disks=("vdb",)))
    assert [one.name for one in vm.snapshots()] == ["one", "two", "three", "half"]


def test_another_size_then_is_refused(place):
    path = place.image("a.qcow2", fill=1)
    place.define("web", ("vda", "qcow2", path))
    place.run("qemu-img", "snapshot", "-c", "small", path)
    place.run("qemu-img", "resize", "-q", path, "2M")
    with pytest.raises(errors.Unsupported, match=r"disk vda had 1\.0 MiB then, it has 2\.0 MiB now"):
        place.host.adopt("web", CONVERT)
    assert inside(path) == ["small"]


def test_what_another_vm_stands_on_is_not_written(place, base):
    overlay = place.image("theirs.qcow2", below=base)
    place.virsh("snapshot-create-as", "web", "outside", "--disk-only")
    place.define("other", ("vda", "qcow2", overlay))
    before = place.state_of("web", "other")
    with pytest.raises(errors.Conflict, match="is needed by other"):
        place.host.adopt("web", CONVERT)
    assert place.state_of("web", "other") == before


def test_an_image_that_reads_otherwise_stops_everything(place, base, monkeypatch):
    before = place.state_of("web")
    monkeypatch.setattr(internal_snapshots, "is_same", lambda *_: False)
    with pytest.raises(errors.Corrupt, match="reads otherwise than the image that was made of it"):
        place.host.adopt("web", CONVERT)
    assert place.state_of("web") == before
    assert not (place.folder / "homes" / "web").exists()


def test_the_comparison_sees_a_single_byte(place, base):
    (one, *_) = images.internal_snapshots(base)
    target = place.image("other.qcow2", fill=1)
    assert internal_snapshots.is_same(base, one.id, target)
    place.run("qemu-io", "-c", "write -P 5 1048575 1", target)
    assert not internal_snapshots.is_same(base, one.id, target)


def test_no_room_is_refused_first(place, base, monkeypatch):
    monkeypatch.setattr(internal_snapshots, "required_space", lambda *_: 1 << 60)
    with pytest.raises(errors.NoSpace, match="images of the internal snapshots need"):
        place.host.adopt("web", CONVERT)
    assert inside(base) == ["one", "two", "three"]


def test_names_with_commas_and_spaces_are_read(place):
    path = place.image("a, b.qcow2", fill=1)
    place.run("qemu-img", "snapshot", "-c", "x,y = z", path)
    place.define("web", ("vda", "qcow2", path))
    vm = place.host.adopt("web", CONVERT)
    assert [one.name for one in vm.snapshots()] == ["x,y = z"]
    assert inside(path) == []


def test_a_vm_that_starts_meanwhile_keeps_what_is_inside(place, base, monkeypatch):
    """The switch has happened: what cannot be removed now is said, and nothing is lost."""
    holder = []

    def start_first(path, name, real=internal_snapshots.delete):
        if not holder:
            door = place.folder / "s"
            holder.append(subprocess.Popen(["qemu-nbd", "-k", str(door), "-t", str(base)]))
            while not door.exists():
                pass
            # It opens the image after its socket, and answers when it has it.
            subprocess.run(
                ["qemu-img", "info", f"nbd+unix:///?socket={door}"], check=True, capture_output=True, timeout=60
            )
        real(path, name)

    monkeypatch.setattr(internal_snapshots, "delete", start_first)
    try:
        vm = place.host.adopt("web", CONVERT)
    finally:
        holder[0].terminate()
        holder[0].wait()
    assert [one.name for one in vm.snapshots()] == ["one", "two", "three"]
    assert any(f"qemu-img snapshot -d 'one' '{base}'" in line for line in place.said)
    assert inside(base) == ["one", "two", "three"]
