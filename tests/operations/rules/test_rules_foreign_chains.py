"""What virsh does to the images of a managed VM, off and running, below a libvirtd of our own: seen, said, nothing lost."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hvmgr import errors
from hvmgr.model import tree
from hvmgr.model.metadata import SnapshotType
from hvmgr.operations import reconcile, working

MIB = 1 << 20

pytestmark = pytest.mark.libvirtd


@pytest.fixture
def uri(daemon):
    """A daemon of our own, for all tests here."""
    return daemon.uri


@pytest.fixture
def vm(bench):
    """One disk; snapshots a, then b below it; now: 1 at 0, 2 at 1 MiB, 3 at 2 MiB."""
    return bench.kept(with_a_and_b)


def with_a_and_b(bench):
    vm = bench.make(4)
    bench.without_screen(vm)
    bench.write(vm, 1)
    vm.create_snapshot("a")
    bench.write(vm, 2, MIB)
    vm.create_snapshot("b")
    bench.write(vm, 3, 2 * MIB)
    return vm


@pytest.fixture(params=[False, True], ids=["off", "running"])
def running(request):
    return request.param


def said(bench, text):
    lines = [line for line in bench.said if text in line]
    bench.said.clear()
    return lines


def test_overlay_of_virsh_and_a_snapshot_of_ours_are_both_in_the_forest(bench, vm, virsh, guest, running):
    """Show 3."""
    before, old = bench.photo(vm), vm.now().disks["hda"]
    if running:
        virsh("start", vm.name, "--paused")
    virsh("snapshot-create-as", vm.name, "theirs", "--disk-only")
    theirs = bench.disk(vm)
    assert theirs != old
    guest(vm, 4, 3 * MIB)
    c = vm.create_snapshot("c", type=SnapshotType.DISK_ONLY)
    assert said(bench, "made outside hvmgr; it is taken over") == [
        f"disk hda has a new image {theirs}, made outside hvmgr; it is taken over"
    ]
    assert c.disks["hda"] == theirs
    forest = vm.tree()
    assert [image.path for image in forest.chain(forest.present.disks["hda"])][1:3] == [theirs, old]
    assert tree.detached(forest) == []
    guest(vm, 5, 3 * MIB)
    if running:
        vm.stop(force=True)
    after = bench.photo(vm)
    assert {name: after[name] for name in ("a hda", "b hda")} == {name: before[name] for name in ("a hda", "b hda")}
    assert after["c hda"][1].items() > before["now hda"][1].items()
    assert after["now hda"][1][3 * MIB] != after["c hda"][1][3 * MIB]
    assert bench.mode_of(old) == bench.mode_of(theirs) == 0o400
    bench.check(vm)
    vm.snapshot("c").apply()
    assert bench.photo(vm)["now hda"] == after["c hda"]


def test_nothing_is_merged_while_libvirt_keeps_a_snapshot_of_it(bench, vm, virsh):
    virsh("snapshot-create-as", vm.name, "theirs", "--disk-only")
    vm.create_snapshot("c")
    files = bench.files(vm)
    expected = bench.photo(vm)
    for name in "ab":
        vm.snapshot(name).delete()
    lines = said(bench, "is not merged: it is needed by libvirt's snapshot 'theirs'")
    assert lines
    assert bench.files(vm) == files
    virsh("snapshot-delete", vm.name, "theirs", "--metadata")
    assert vm.merge()
    assert bench.photo(vm)["c hda"] == expected["c hda"]
    assert bench.photo(vm)["now hda"] == expected["now hda"]
    bench.check(vm)


# --- pulled, committed, copied, rebased -------------------------------------------------------------------------------


def test_pull_into_the_working_image_is_followed(bench, vm, virsh, guest):
    before, a, b = bench.photo(vm), vm.snapshot("a"), vm.snapshot("b")
    virsh("start", vm.name, "--paused")
    virsh("blockpull", vm.name, "hda", "--wait")
    guest(vm, 4, 3 * MIB)
    working = vm.now().disks["hda"]
    c = vm.create_snapshot("c", type=SnapshotType.DISK_ONLY)
    pulled = f"disk hda: the data of {b.disks['hda']} was pulled into {working} outside hvmgr"
    assert said(bench, "nothing is lost") == [f"{pulled}, which no longer stands on it; nothing is lost"]
    assert vm.tree().images[c.disks["hda"]].parent is None
    vm.stop(force=True)
    assert bench.said == []
    after = bench.photo(vm)
    assert after["now hda"][1].items() > before["now hda"][1].items()
    b.delete()
    a.delete()
    assert not Path(b.disks["hda"]).exists()
    assert {name: bench.photo(vm)[name] for name in ("c hda", "now hda")} == {
        name: after[name] for name in ("c hda", "now hda")
    }
    assert tree.detached(vm.tree()) == [a.disks["hda"]]  # a base is never removed


def test_pull_down_to_an_older_image_is_followed_and_said_once(bench, vm, virsh):
    before, a, b = bench.photo(vm), vm.snapshot("a"), vm.snapshot("b")
    virsh("start", vm.name, "--paused")
    virsh("blockpull", vm.name, "hda", "--base", a.disks["hda"], "--wait")
    virsh("destroy", vm.name)
    b.rename("B")
    assert len(said(bench, "nothing is lost")) == 1
    assert vm.tree().images[vm.now().disks["hda"]].parent == a.disks["hda"]
    vm.start()
    vm.stop(force=True)
    assert bench.said == []
    assert bench.photo(vm) == {name.replace("b hda", "B hda"): seen for name, seen in before.items()}
    b.delete()
    assert not Path(b.disks["hda"]).exists()
    assert bench.photo(vm) == {name: before[name] for name in ("a hda", "now hda")}
    vm.create_snapshot("c")
    a.delete()
    assert bench.said == []
    assert bench.photo(vm)["now hda"] == before["now hda"]
    bench.check(vm)


def test_commit_into_a_frozen_image_is_refused_by_its_mode(bench, vm, virsh):
    before = bench.photo(vm)
    files = {one.disks["hda"]: bench.file_of(one.disks["hda"]) for one in vm.snapshots()}
    virsh("start", vm.name, "--paused")
    a, b = (one.disks["hda"] for one in vm.snapshots())
    for options in (["--active", "--pivot"], ["--active", "--shallow", "--pivot"], ["--top", b, "--base", a]):
        virsh("blockcommit", vm.name, "hda", "--wait", *options, refused="Permission denied")
    assert {path: bench.file_of(path) for path in files} == files
    vm.stop(force=True)
    assert bench.said == []
    assert bench.photo(vm) == before
    bench.check(vm)


def test_commit_of_the_working_image_damages_the_snapshots_below_it_alone(bench, vm, virsh, guest, running):
    """virsh blockcommit on a host where nothing keeps QEMU from writing to frozen images."""
    a, b = vm.snapshot("a"), vm.snapshot("b")
    a.apply(keep_undo=False)
    bench.write(vm, 7, 3 * MIB)
    other = vm.create_snapshot("other branch")
    b.apply(keep_undo=False)
    bench.write(vm, 3, 2 * MIB)
    before = bench.photo(vm)
    old = vm.now().disks["hda"]
    virsh("start", vm.name, "--paused")
    Path(b.disks["hda"]).chmod(0o600)
    virsh("blockcommit", vm.name, "hda", "--active", "--shallow", "--pivot", "--wait")
    guest(vm, 9, 3 * MIB)
    if not running:
        virsh("destroy", vm.name)
    assert bench.disk(vm) == b.disks["hda"]
    c = vm.create_snapshot("c", type=SnapshotType.DISK_ONLY)
    assert {one.name: one.damaged for one in vm.snapshots()} == {
        "a": (),
        "b": ("hda",),
        "other branch": (),
        "c": (),
    }
    assert any(f"snapshot 'b' is damaged: {b.disks['hda']}" in line for line in bench.said)
    assert f"{old} is no longer used by the VM; it is kept as a detached disk" in bench.said
    guest(vm, 10, 3 * MIB)
    if running:
        assert bench.disk(vm, live=True) == vm.now().disks["hda"]
        vm.stop(force=True)
    after = bench.photo(vm)
    assert after["c hda"][1].items() > before["now hda"][1].items()
    assert after["now hda"][1][3 * MIB] != after["c hda"][1][3 * MIB]
    with pytest.raises(errors.Corrupt, match="snapshot 'b' is damaged") as caught:
        b.apply()
    assert caught.value.exit_code == 6
    for one in (other, a):
        one.apply()
        assert bench.photo(vm)["now hda"] == before[f"{one.name} hda"]
    c.apply()
    b.delete()
    assert Path(old).exists()
    assert bench.photo(vm)["now hda"] == after["c hda"]
    bench.check(vm)


@pytest.mark.parametrize("keep", [False, True], ids=["emptied", "kept"])
def test_commit_by_qemu_img_damages_what_it_wrote_to_alone(bench, vm, keep):
    a, b = vm.snapshot("a"), vm.snapshot("b")
    before, working = bench.photo(vm), vm.now().disks["hda"]
    bench.run("qemu-img", "commit", *(["-d"] if keep else []), "-f", "qcow2", working)
    vm.start()
    vm.stop(force=True)
    assert {one.name: one.damaged for one in vm.snapshots()} == {"a": (), "b": ("hda",)}
    assert any(f"{working} was committed into {b.disks['hda']} outside hvmgr" in line for line in bench.said)
    bench.said.clear()
    with pytest.raises(errors.Corrupt, match="snapshot 'b' is damaged"):
        b.apply()
    assert bench.photo(vm)["now hda"] == before["now hda"]
    a.apply()
    assert bench.photo(vm)["now hda"] == before["a hda"]
    vm.undo()
    b.delete()
    assert bench.said == []
    assert bench.photo(vm) == {name: before[name] for name in ("a hda", "now hda")}
    bench.check(vm)


def test_commit_of_an_inner_image_hurts_the_one_below_it_alone(bench, vm, virsh):
    before, a, b = bench.photo(vm), vm.snapshot("a"), vm.snapshot("b")
    virsh("start", vm.name, "--paused")
    Path(a.disks["hda"]).chmod(0o600)
    virsh("blockcommit", vm.name, "hda", "--top", b.disks["hda"], "--base", a.disks["hda"], "--wait")
    c = vm.create_snapshot("c", type=SnapshotType.DISK_ONLY)
    assert {one.name: one.damaged for one in vm.snapshots()} == {"a": ("hda",), "b": (), "c": ()}
    vm.stop(force=True)
    after = bench.photo(vm)
    assert after["now hda"] == after["c hda"] == before["now hda"]
    assert after["b hda"] == before["b hda"]
    b.apply()
    assert bench.photo(vm)["now hda"] == before["b hda"]
    with pytest.raises(errors.Corrupt, match="snapshot 'a' is damaged"):
        a.apply()
    c.apply()
    a.delete()
    b.delete()
    assert bench.photo(vm)["now hda"] == before["now hda"]
    bench.check(vm)


@pytest.mark.parametrize("options", [[], ["--shallow"]], ids=["whole", "shallow"])
def test_copied_disk_goes_on_in_its_copy(bench, vm, virsh, guest, options):
    before, old = bench.photo(vm), vm.now().disks["hda"]
    copy = bench.place / "copy.qcow2"
    ids = {disk.slot: disk.id for disk in vm.home.facts().disks}
    virsh("start", vm.name, "--paused")
    virsh("blockcopy", vm.name, "hda", copy, "--format", "qcow2", "--transient-job", "--pivot", "--wait", *options)
    guest(vm, 8, 3 * MIB)
    assert bench.disk(vm) == str(copy)
    c = vm.create_snapshot("c", type=SnapshotType.DISK_ONLY)
    assert f"disk hda is {copy} now" in bench.said
    assert f"{old} is no longer used by the VM; it is kept as a detached disk" in bench.said
    assert c.disks["hda"] == str(copy)
    assert ({disk.slot: disk.id for disk in vm.home.facts().disks} == ids) is bool(options)
    vm.stop(force=True)
    after = bench.photo(vm)
    assert after["c hda"][1].items() > before["now hda"][1].items()
    assert bench.bytes_of(old) == before["now hda"]
    for name in "abc":
        vm.snapshot(name).apply()
        assert bench.photo(vm)["now hda"] == after[f"{name} hda"]
    for name in "abc":
        vm.snapshot(name).delete()
    assert bench.bytes_of(old) == before["now hda"]
    assert copy.exists()
    bench.check(vm)


def test_rebased_image_is_a_conflict_and_every_snapshot_stays_usable(bench, vm):
    before, a, b = bench.photo(vm), vm.snapshot("a"), vm.snapshot("b")
    working = vm.now().disks["hda"]
    bench.run("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", a.disks["hda"], working)
    files = bench.files(vm)
    for act in (
        lambda: vm.create_snapshot("c"),
        vm.start,
        vm.merge,
        vm.undo,
        vm.delete,
        lambda: vm.rename("other"),
        b.delete,
        lambda: a.apply(snapshot_first=True),
    ):
        with pytest.raises(
            errors.Conflict, match=re.escape(f"{working} no longer stands on {b.disks['hda']}")
        ) as caught:
            act()
        assert "doctor --repair web" in caught.value.hint
        assert caught.value.facts["path"] == working
    assert bench.files(vm) == files
    b.apply()
    assert bench.photo(vm)["now hda"] == before["b hda"]
    assert files <= bench.files(vm)
    bench.run("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", b.disks["hda"], working)
    vm.undo()
    vm.start()
    vm.stop(force=True)
    assert bench.photo(vm) == before
    bench.check(vm)


def test_image_replaced_by_one_that_stands_alone_is_a_conflict(bench, vm):
    working = Path(vm.now().disks["hda"])
    kept = bench.place / "kept"
    working.rename(kept)
    bench.image("other.qcow2", fill=(9,)).rename(working)
    with pytest.raises(errors.Conflict, match=f"{working} no longer stands on"):
        vm.start()
    kept.rename(working)
    vm.start()
    vm.stop(force=True)
    bench.check(vm)


def test_missing_image_is_named_and_does_not_stop_an_apply(bench, vm):
    before, working = bench.photo(vm), Path(vm.now().disks["hda"])
    working.rename(kept := bench.place / "kept")
    for act in (lambda: vm.create_snapshot("c"), vm.start):
        with pytest.raises((errors.Corrupt, errors.NotFound), match=f"the image {working} is missing"):
            act()
    vm.snapshot("b").apply()
    assert bench.photo(vm)["now hda"] == before["b hda"]
    kept.rename(working)
    vm.undo()
    assert bench.photo(vm)["now hda"] == before["now hda"]
    bench.check(vm)


def test_renamed_image_goes_on_under_its_new_name(bench, vm):
    before, working = bench.photo(vm), Path(vm.now().disks["hda"])
    new = working.with_name("renamed.qcow2")
    working.rename(new)
    ids = {disk.slot: disk.id for disk in vm.home.facts().disks}
    bench.edit(vm, lambda edited: edited.set_disk_source("hda", new, "qcow2"))
    c = vm.create_snapshot("c")
    assert c.disks["hda"] == str(new)
    assert f"{working} is no longer used by the VM, and is not there any more" in bench.said
    assert {disk.slot: disk.id for disk in vm.home.facts().disks} == ids
    assert bench.photo(vm) == before | {"c hda": before["now hda"]}
    bench.check(vm)


def test_disk_pointed_to_nothing_is_a_conflict_and_every_snapshot_stays_usable(bench, vm):
    before = bench.photo(vm)
    gone = bench.place / "gone.qcow2"
    bench.edit(vm, lambda edited: edited.set_disk_source("hda", gone, "qcow2"))
    for act in (lambda: vm.create_snapshot("c"), vm.start):
        with pytest.raises(errors.Conflict, match=f"disk hda was pointed to {gone}, which is not there"):
            act()
    vm.snapshot("a").apply()
    assert bench.photo(vm)["now hda"] == before["a hda"]
    vm.undo()
    assert bench.photo(vm) == before
    bench.check(vm)


def test_rebased_image_that_somebody_looked_at_is_the_present_as_it_is(bench, vm):
    a, b = vm.snapshot("a"), vm.snapshot("b")
    image = vm.now().disks["hda"]
    bench.run("qemu-img", "rebase", "-f", "qcow2", "-F", "qcow2", "-b", a.disks["hda"], image)  # with its data
    bench.run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "", image)  # and without the rest of it
    seen = bench.bytes_of(image)
    with pytest.raises(errors.Conflict, match="no longer stands on"):
        vm.create_snapshot("c")
    with working.on(vm, needs_present=False) as session:
        assert reconcile.accept_present(session) == ["hda"]
    vm.create_snapshot("c")
    assert bench.photo(vm)["c hda"] == bench.photo(vm)["now hda"] == seen
    b.delete()
    assert bench.photo(vm)["now hda"] == seen
    bench.check(vm)
