"""Disks that stood on a VHD: the same bytes in every state, on qcow2; the VHD as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

import hvmgr
from hvmgr import errors
from hvmgr.model.metadata import SavedState
from hvmgr.operations import merge
from hvmgr.storage import images
from tests.operations.imports.conftest import branch

EXACT = "force_size=on"
FIXED = "subformat=fixed,force_size=on"


def make_vhd(bench, name="base.vhd", options=EXACT):
    return bench.image(name, fmt="vpc", options=options, fill=(1, 2, 3))


def on_vhds(vm):
    """The images of any state that stand on a VHD, or are one."""
    forest = vm.home.tree()
    return {path for path in forest.named() if any(one.format == images.VPC for one in forest.chain(path))}


@pytest.fixture(params=[EXACT, FIXED], ids=["dynamic", "fixed"])
def on_base(bench, request):
    """A forked tree on a VHD in the home, with a full undo slot; and the VHD."""
    vm = branch(bench, bench.make(make_vhd(bench, options=request.param)))
    vm.snapshot("two").apply()
    bench.write(vm, 0x99, 3 << 20)
    return vm, vm.home.layout.bases / "hda.vhd"


def test_every_state_stands_on_qcow2(bench, on_base):
    vm, vhd = on_base
    assert any("hvmgr disk convert web hda" in one for one in bench.said)
    before, tree, content = bench.photo(vm), bench.tree(vm), bench.file_of(vhd)
    assert on_vhds(vm)
    assert vm.convert_disk("hda")
    assert not vm.convert_disk("hda")
    assert on_vhds(vm) == set()
    assert (bench.photo(vm), bench.tree(vm)) == (before, tree)
    assert bench.file_of(vhd) == content
    bench.check(vm)
    (one,) = vm.snapshot("one").disks.values()
    assert one == str(vm.home.layout.bases / "hda.qcow2")
    vhd.unlink()  # nothing needs it
    vm.undo()
    vm.snapshot("three").apply()
    vm.snapshot("one").delete()
    bench.check(vm)
    assert bench.photo_of(vm, "left") == before["left hda"]


def test_vm_that_writes_to_the_vhd(bench):
    vm = bench.make(make_vhd(bench))
    before = bench.photo(vm)
    assert vm.convert_disk("hda")
    assert bench.disk(vm) == str(vm.home.layout.bases / "hda.qcow2")
    assert bench.photo(vm) == before
    bench.check(vm)
    assert str(vm.home.layout.bases / "hda.vhd") in bench.host.vm("web").home.tree().images  # kept, and known


def test_vhd_outside_that_another_vm_needs(bench):
    vhd = make_vhd(bench)
    vhd.chmod(0o600)
    content = bench.file_of(vhd)
    first = bench.make(bench.in_place(vhd))
    first.create_snapshot("one")
    second = bench.make(bench.in_place(vhd), name="other")
    photos = bench.photo(first), bench.photo(second)
    assert first.convert_disk("hda")
    assert on_vhds(first) == set()
    assert (bench.photo(first), bench.photo(second)) == photos
    assert bench.mode_of(vhd) == 0o400  # the other one's still
    assert second.convert_disk("hda")
    assert bench.photo(second) == photos[1]
    assert bench.file_of(vhd) == content
    assert bench.mode_of(vhd) == 0o600


def test_image_outside_on_the_vhd_is_not_written(bench):
    vhd = make_vhd(bench)
    above = bench.image("above.qcow2", fill=(4,), backing=(vhd, "vpc"))
    vm = bench.make(bench.in_place(above))
    before, content = bench.photo(vm), bench.file_of(above)
    with pytest.raises(errors.Conflict, match="outside") as failure:
        vm.convert_disk("hda")
    assert "disk localize web hda" in failure.value.hint
    assert bench.file_of(above) == content
    vm.localize("hda")
    assert vm.convert_disk("hda")
    assert bench.photo(vm) == before
    bench.check(vm)


def test_nothing_to_convert(bench):
    vm = bench.make(4)
    assert not vm.convert_disk("hda")
    with pytest.raises(errors.NotFound):
        vm.convert_disk("vdz")


def test_changed_base_is_refused(bench, on_base):
    vm, vhd = on_base
    vhd.chmod(0o600)
    bench.write_image(vhd, 0x44, fmt="vpc")
    before = bench.photo(vm)
    with pytest.raises(errors.Corrupt, match="changed"):
        vm.convert_disk("hda")
    assert bench.photo(vm) == before


def test_running_vm_goes_on(bench):
    """It writes to the VHD itself, and no memory of it can be saved, by any command."""
    vm = bench.make(make_vhd(bench))
    before = bench.photo(vm)["now hda"]
    bench.start(vm)
    with pytest.raises(errors.Unsupported, match="VHD") as failure:
        vm.create_snapshot("none")
    assert "hvmgr disk convert web hda" in failure.value.hint
    assert vm.snapshots() == []
    assert vm.convert_disk("hda")
    assert str(vm.state()) == "running"
    assert on_vhds(vm) == set()
    snapshot = vm.create_snapshot("memory")
    assert snapshot.state is SavedState.RUNNING
    snapshot.apply()
    assert str(vm.state()) == "running"
    vm.stop(force=True)
    bench.check(vm)
    assert bench.photo(vm)["now hda"] == before == bench.bytes_of(vm.home.layout.bases / "hda.vhd", "vpc")


def test_running_vm_above_other_states(bench, on_base):
    vm, vhd = on_base
    before, content = bench.photo(vm), bench.file_of(vhd)
    bench.start(vm)
    with pytest.raises(errors.Conflict, match="VHD") as failure:
        vm.snapshot("one").apply()
    assert "hvmgr disk convert web hda" in failure.value.hint
    assert vm.convert_disk("hda")
    assert on_vhds(vm) == set()
    vm.snapshot("one").apply()
    vm.stop(force=True)
    vm.undo()
    assert bench.photo(vm) == before
    assert bench.file_of(vhd) == content
    bench.check(vm)


def test_running_vm_leaves_no_image_that_nothing_needs(bench, on_base, monkeypatch):
    """One whose snapshot was deleted while the VM ran, and that waits to be merged: the working image has its data now."""
    monkeypatch.setattr(merge, "merge_live", lambda *_: None)  # as if somebody else's job kept it from that
    vm, vhd = on_base
    bench.write(vm, 0x21, 1 << 20)
    (between,) = vm.create_snapshot("between").disks.values()
    bench.write(vm, 0x31, 2 << 20)
    before = bench.photo(vm)
    bench.start(vm)
    vm.snapshot("between").delete()
    assert vm.convert_disk("hda")
    assert not Path(between).exists()
    vm.stop(force=True)
    bench.check(vm)
    del before["between hda"]
    assert bench.photo(vm) == before
    assert vhd.exists()


def test_two_disks_on_one_vhd(bench):
    """While the VM runs, the other disk's images are open, and are not written."""
    vhd = make_vhd(bench)
    bench.make(bench.in_place(vhd)).create_snapshot("one")
    vm = bench.make(bench.in_place(vhd), bench.in_place(vhd), name="other")
    before, disks = bench.photo(vm), dict(vm.now().disks)
    bench.start(vm)
    with pytest.raises(errors.Conflict, match="another disk") as failure:
        vm.convert_disk("hda")
    assert "vm stop other" in failure.value.hint
    assert str(vm.state()) == "running"
    vm.stop(force=True)
    assert (bench.photo(vm), vm.now().disks) == (before, disks)
    assert vm.convert_disk("hda")
    assert not vm.convert_disk("hdb")
    assert on_vhds(vm) == set()
    assert bench.photo(vm) == before
    bench.check(vm)


def test_import_says_that_a_vhd_stays_one(bench):
    folder = bench.take_away(bench.make(make_vhd(bench)))
    found = bench.host.plan_import(folder, hvmgr.ImportOptions()).check()
    (kept,) = [one for one in found if one.code == "vhd-kept"]
    assert (kept.severity, Path(kept.where).name) == ("info", "hda.vhd")
