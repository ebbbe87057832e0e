"""Images that more than one VM needs: never written, never removed, whoever goes first."""

from __future__ import annotations

import itertools
import os
import re
import stat
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from hvmgr import CloneOptions, errors
from hvmgr.model import plan, tree
from hvmgr.model.specification import ImageFormat
from hvmgr.operations.steps import execution

MIB = 1 << 20
NAMES = ("one", "two", "three")


@pytest.fixture
def base(bench):
    path = bench.image("base.qcow2", fill=(1, 2, 3, 4))
    path.chmod(0o644)
    return path


def on_base(bench, base, *names):
    """VMs on one base: the first froze it, the others begin on it."""
    vms = []
    for name in names:
        vms.append(bench.make(bench.in_place(base), name=name))
        if len(vms) == 1:
            vms[0].create_snapshot("before the others")
        bench.write(vms[-1], 10 * len(vms))
    return vms


# --- one VM -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["qcow2", "raw", "vpc"])
def test_base_in_place_is_written_until_the_first_snapshot_and_never_after_it(bench, fmt):
    base = bench.image("base.img", fmt=fmt, fill=(1, 2), options="force_size=on" if fmt == "vpc" else None)
    base.chmod(0o640)
    vm = bench.make(bench.in_place(base, format=ImageFormat.RAW if fmt == "raw" else None))
    assert vm.now().disks == {"hda": str(base)}
    bench.write(vm, 9, 3 * MIB)
    assert bench.mode_of(base) == 0o640
    made = [vm.create_snapshot("a")]
    frozen = bench.file_of(base)
    assert bench.mode_of(base) == 0o400
    for number in range(3):
        bench.write(vm, number, number * MIB)
        made.append(vm.create_snapshot(str(number)))
    made[0].apply()
    bench.write(vm, 77)
    seen = bench.photo(vm)
    for one in made:
        one.delete()
    bench.check(vm)
    assert bench.photo(vm) == {"now hda": seen["now hda"]}
    assert (bench.file_of(base), bench.mode_of(base)) == (frozen, 0o400)
    left = vm.delete()
    assert (bench.file_of(base), bench.mode_of(base)) == (frozen, 0o640)
    assert [bench.bytes_of(path) for path in left] == [seen["now hda"]]


def test_deletion_with_disks_leaves_a_base_in_place(bench, base):
    vm = bench.make(bench.in_place(base))
    vm.create_snapshot("a")
    frozen = bench.file_of(base)
    assert vm.delete(with_disks=True) == []
    assert (bench.file_of(base), bench.mode_of(base)) == (frozen, 0o644)
    assert not vm.path.exists()


def test_deletion_of_a_vm_that_writes_its_base_leaves_it(bench, base):
    vm = bench.make(bench.in_place(base))
    bench.write(vm, 7)
    seen = bench.file_of(base)
    assert vm.delete(with_disks=True) == []
    assert (bench.file_of(base), bench.mode_of(base)) == (seen, 0o644)


def test_chain_of_bases_in_place_stays_whole(bench, base):
    middle = bench.image("middle.qcow2", backing=(base, "qcow2"), fill=(5,))
    top = bench.image("top.qcow2", backing=(middle, "qcow2"), fill=(6, 7))
    vm = bench.make(bench.in_place(top))
    first = vm.create_snapshot("a")
    bench.write(vm, 8, 2 * MIB)
    states = [bench.file_of(path) for path in (base, middle, top)]
    seen = bench.photo(vm)
    first.delete()
    bench.check(vm)
    left = vm.delete()
    assert [bench.bytes_of(path) for path in left] == [seen["now hda"]]
    assert "backing file:" not in bench.run("qemu-img", "info", left[0])
    assert [bench.file_of(path) for path in (base, middle, top)] == states


# --- several VMs ------------------------------------------------------------------------------------------------------


def test_disk_that_another_vm_writes_is_refused(bench, base):
    bench.make(bench.in_place(base), name="one")
    (link := bench.place / "link").symlink_to(base)
    os.link(base, hard := bench.place / "hard")
    for path in (base, link, hard):
        with pytest.raises(errors.Conflict, match="is the disk of the VM 'one'"):
            bench.make(bench.in_place(path), name="two")
    assert [vm.name for vm in bench.host.vms()] == ["one"]


def test_failure_under_the_locks_of_shared_images_waits_for_none_of_them(bench, base, monkeypatch):
    """What is undone then takes no lock that the command itself holds: it would be Busy, and leave a half-made home."""
    (one,) = on_base(bench, base, "one")
    before = bench.file_of(base), bench.mode_of(base)
    homes = sorted(bench.host.root.iterdir())
    bench.said.clear()

    def refuse(*_):
        raise errors.HostFailed("libvirt says no")

    monkeypatch.setitem(execution.DO, plan.Define, refuse)
    for make in (
        lambda: bench.make(bench.in_place(base), name="two"),
        lambda: one.clone("three", CloneOptions(snapshot="before the others", linked=True)),
    ):
        with pytest.raises(errors.HostFailed, match=r"^libvirt says no$"):
            make()
    assert not [said for said in bench.said if "going back failed" in said]
    assert sorted(bench.host.root.iterdir()) == homes
    assert (bench.file_of(base), bench.mode_of(base)) == before


def test_disk_in_the_home_of_another_vm_is_refused_while_it_writes_it(bench):
    one = bench.make(4, name="one")
    with pytest.raises(errors.Conflict, match="is the disk of the VM 'one'"):
        bench.make(bench.in_place(one.now().disks["hda"]), name="two")
    one.create_snapshot("a")
    with pytest.raises(errors.Conflict, match="is the disk of the VM 'one'"):
        bench.make(bench.in_place(one.now().disks["hda"]), name="two")


def test_disk_of_a_vm_in_the_undo_slot_is_refused(bench):
    one = bench.make(4, name="one")
    first = one.create_snapshot("a")
    away = one.now().disks["hda"]
    first.apply()
    with pytest.raises(errors.Conflict, match="is the disk of the VM 'one'"):
        bench.make(bench.in_place(away), name="two")


def test_snapshot_of_another_branch_is_not_written_by_a_vm_that_uses_it_in_place(bench):
    one = bench.make(4, name="one")
    first = one.create_snapshot("a")
    bench.write(one, 5)
    second = one.create_snapshot("b")
    first.apply()
    seen = bench.photo(one)
    two = bench.make(bench.in_place(second.disks["hda"]), name="two")
    bench.write(two, 6)
    assert bench.photo(one) == seen
    with pytest.raises(errors.Conflict, match="needed by two"):
        one.delete()
    one.snapshot("b").delete()
    bench.check(two)
    assert bench.photo(two)["now hda"][1] != {}
    two.delete()
    one.delete()


def test_former_user_of_a_base_does_not_count(bench, base):
    """The index notes whatever a VM used; whether it still does is asked from its home."""
    one, two = on_base(bench, base, "one", "two")
    other = bench.image("other.qcow2")
    bench.edit(two, lambda edited: edited.set_disk_source("hda", other, "qcow2"))
    two.create_snapshot("elsewhere")
    for path in vm_detached(two):
        path.unlink()
    one.delete()
    assert bench.mode_of(base) == 0o644


def vm_detached(vm):
    return [Path(path) for path in tree.detached(vm.tree())]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_three_vms_on_one_base_go_in_every_order(bench, base, order):
    vms = on_base(bench, base, *NAMES)
    assert "is the base of one: the new VM writes to a differencing image" in "".join(bench.said)
    frozen = bench.file_of(base)
    seen = {vm.name: bench.photo(vm)["now hda"] for vm in vms}
    assert len({str(one) for one in seen.values()}) == 3
    for position, number in enumerate(order):
        vm, name = vms[number], vms[number].name
        vm.create_snapshot("x")
        vm.snapshot("x").delete()
        left = vm.delete(with_disks=position == 1)
        assert [bench.bytes_of(path) for path in left] == ([] if position == 1 else [seen.pop(name)])
        seen.pop(name, None)
        rest = [vms[other] for other in order[position + 1 :]]
        for other in rest:
            assert bench.photo(other)["now hda"] == seen[other.name]
            bench.check(other)
        assert bench.file_of(base) == frozen
        assert bench.mode_of(base) == (0o400 if rest else 0o644)


def test_vms_of_two_roots_count_each_other(bench, base):
    second = bench.open_host("second")
    one, two = bench.make(bench.in_place(base), name="one"), None
    with pytest.raises(errors.Conflict, match="is the disk of the VM 'one'"):
        bench.make(bench.in_place(base), name="two", host=second)
    one.create_snapshot("a")
    two = bench.make(bench.in_place(base), name="two", host=second)
    bench.write(two, 44)
    frozen, seen = bench.file_of(base), bench.photo(two)
    one.snapshot("a").delete()
    one.delete(with_disks=True)
    assert (bench.file_of(base), bench.mode_of(base)) == (frozen, 0o400)
    assert bench.photo(two) == seen
    two.delete()
    assert (bench.file_of(base), bench.mode_of(base)) == (frozen, 0o644)


OTHER = """
import sys, hvmgr
from pathlib import Path
from hvmgr.model import tree
from hvmgr.model.specification import DiskSpecification, Specification
uri, root, act, *arguments = sys.argv[1:]
with hvmgr.Host.open(uri, root=root) as host:
    if act == "make":
        disk = DiskSpecification(path=Path(arguments[0]), in_place=True)
        vm = host.create_vm(Specification(name="far", template="generation1", accel="tcg", networks=(), disks=(disk,)))
        print(vm.now().disks["hda"])
    else:
        host.vm("far").delete(with_disks=True)
"""


def test_vms_of_two_connections_count_each_other(bench, base, new_embed_root):
    uri = f"qemu:///embed?root={new_embed_root()}"

    def far(act, *arguments):
        command = [sys.executable, "-c", OTHER, uri, str(bench.place / "far"), act, *map(str, arguments)]
        return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)

    one = bench.make(bench.in_place(base), name="one")
    refused = far("make", base)
    assert "Conflict" in refused.stderr
    assert "is the disk of the VM 'one'" in refused.stderr
    snapshot = one.create_snapshot("a")
    one.create_snapshot("b")
    bench.write(one, 5)
    made = far("make", snapshot.disks["hda"])
    assert made.returncode == 0, made.stderr
    child = Path(made.stdout.strip())
    bench.write_image(child, 66)
    frozen, seen = bench.file_of(base), bench.bytes_of(child)
    with pytest.raises(errors.Conflict, match="is the disk of the VM 'far'"):
        bench.make(bench.in_place(child), name="two")
    one.snapshot("a").delete()
    one.snapshot("b").delete()
    one.delete(with_disks=True)
    assert (bench.file_of(base), bench.mode_of(base), bench.bytes_of(child)) == (frozen, 0o400, seen)
    assert far("delete").returncode == 0
    assert (bench.file_of(base), bench.mode_of(base)) == (frozen, 0o644)


def test_vm_whose_image_another_one_needs_is_not_deleted(bench):
    one = bench.make(4, name="one")
    bench.write(one, 1)
    snapshot = one.create_snapshot("a")
    two = bench.make(bench.in_place(snapshot.disks["hda"]), name="two")
    seen = bench.photo(one), bench.photo(two)
    for with_disks in (True, False):
        with pytest.raises(errors.Conflict, match=r"hda\.qcow2 is needed by two") as caught:
            one.delete(with_disks=with_disks)
        assert caught.value.facts["users"] == ["two"]
    assert (bench.photo(one), bench.photo(two)) == seen
    bench.check(one)
    two.delete()
    one.delete()


def test_merge_waits_while_another_vm_reads_the_image(bench):
    one = bench.make(4, name="one")
    first = one.create_snapshot("a")
    bench.write(one, 1)
    second = one.create_snapshot("b")
    bench.write(one, 2, MIB)
    two = bench.make(bench.in_place(second.disks["hda"]), name="two")
    bench.write(two, 3, 2 * MIB)
    lent = {path: bench.file_of(path) for path in (first.disks["hda"], second.disks["hda"])}
    seen = bench.photo(one)["now hda"], bench.photo(two)["now hda"]
    first.delete()
    second.delete()
    assert {path: bench.file_of(path) for path in lent} == lent
    assert not one.merge()
    bench.check(one)
    bench.check(two)
    two.delete(with_disks=True)
    assert one.merge()
    assert bench.photo(one) == {"now hda": seen[0]}
    assert len(one.tree().images) == 1
    bench.check(one)


def test_stranger_of_libvirt_alone_is_counted(bench):
    """A VM that hvmgr does not manage stands on a frozen image, two images above it."""
    one = bench.make(4, name="one")
    first = one.create_snapshot("a")
    bench.write(one, 1)
    second = one.create_snapshot("b")
    middle = bench.image("middle.qcow2", backing=(second.disks["hda"], "qcow2"), fill=(5,))
    top = bench.image("top.qcow2", backing=(middle, "qcow2"), fill=(6,))
    xml = re.sub(r"<metadata>.*</metadata>", "", bench.domain(one).xml(live=False), flags=re.DOTALL)
    xml = (
        xml.replace(one.now().disks["hda"], str(top))
        .replace(one.id, str(uuid.uuid4()))
        .replace("<name>one<", "<name>stranger<")
    )
    bench.host.connection.define(xml)
    lent = {path: bench.file_of(path) for path in (first.disks["hda"], second.disks["hda"])}
    seen = bench.bytes_of(top), bench.photo(one)["now hda"]
    first.delete()
    second.delete()
    assert {path: bench.file_of(path) for path in lent} == lent
    with pytest.raises(errors.Conflict, match="needed by stranger"):
        one.delete()
    assert (bench.bytes_of(top), bench.photo(one)["now hda"]) == seen
    with pytest.raises(errors.Conflict, match="is the disk of the VM 'stranger'"):
        bench.make(bench.in_place(top), name="two")


@pytest.mark.parametrize("writer", ["hvmgr", "libvirt"])
def test_snapshot_of_a_disk_that_another_vm_writes_is_refused(bench, base, writer):
    """Two VMs with one writable disk: freezing it would stop the other one."""
    one, two = bench.make(4, name="one"), bench.make(bench.in_place(base), name="two")
    bench.edit(one, lambda edited: edited.set_disk_source("hda", base, "qcow2"))
    if writer == "libvirt":
        bench.edit(two, lambda edited: edited.without_metadata())
    files = bench.files(one)
    with pytest.raises(errors.Conflict, match="two") as caught:
        one.create_snapshot("a")
    assert str(base) in str(caught.value)
    assert bench.mode_of(base) == 0o644
    assert bench.files(one) == files
    assert one.snapshots() == []


def test_base_that_became_shared_later_is_not_frozen_under_the_writer(bench, base):
    """The other VM got the disk by an edit; the one that has it from the start is asked for a snapshot."""
    one, two = bench.make(bench.in_place(base), name="one"), bench.make(4, name="two")
    bench.edit(two, lambda edited: edited.set_disk_source("hda", base, "qcow2"))
    with pytest.raises(errors.Conflict, match="two"):
        one.create_snapshot("a")
    assert bench.mode_of(base) == 0o644


# --- block devices ----------------------------------------------------------------------------------------------------


@pytest.fixture
def device(bench):
    raw = bench.image("device.img", fmt="raw", fill=(1, 2, 3, 4))
    done = subprocess.run(["losetup", "--find", "--show", raw], check=False, capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        pytest.skip(f"no loop device to be had here: {done.stderr.strip()}")
    device = Path(done.stdout.strip())
    yield device
    bench.run("losetup", "--detach", device)


def test_block_device_as_base_is_written_until_the_first_snapshot_and_never_after_it(bench, device):
    vm = bench.make(bench.in_place(device))
    disk = vm.home.present().disks()[0]
    assert (disk.type, disk.source, disk.format) == ("block", str(device), "raw")
    bench.write_image(device, 7, fmt="raw")
    mode = stat.S_IMODE(device.stat().st_mode)
    first = vm.create_snapshot("a")
    frozen = bench.run("sha256sum", device)
    bench.write(vm, 8, MIB)
    vm.create_snapshot("b")
    first.apply()
    bench.write(vm, 9, 2 * MIB)
    seen = bench.photo(vm)
    assert seen["now hda"][0] == 4 * MIB
    other = bench.make(bench.in_place(device), name="two")
    bench.write(other, 10)
    for one in vm.snapshots():
        one.delete()
    bench.check(vm)
    assert bench.photo(vm) == {"now hda": seen["now hda"]}
    left = vm.delete()
    assert [bench.bytes_of(path) for path in left] == [seen["now hda"]]
    other.delete(with_disks=True)
    assert bench.run("sha256sum", device) == frozen
    assert stat.S_IMODE(device.stat().st_mode) == mode


def test_block_device_is_copied_when_it_is_not_used_in_place(bench, device):
    vm = bench.make(device)
    assert bench.bytes_of(vm.now().disks["hda"], "raw") == bench.bytes_of(device, "raw")
