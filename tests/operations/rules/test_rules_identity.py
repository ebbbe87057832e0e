"""An image is what it is, whatever it is called: hard links, symbolic links, bind mounts; and who needs it, by name."""

from __future__ import annotations

import itertools
import os
import subprocess
from pathlib import Path

import pytest

from hvmgr import errors
from hvmgr.model import tree

MIB = 1 << 20


@pytest.fixture
def mounted():
    """``mounted(source, target)``: the folder is there a second time."""
    made = []

    def mount(source, target):
        target.mkdir(mode=0o711)
        done = subprocess.run(
            ["mount", "--bind", source, target], check=False, capture_output=True, text=True, timeout=60
        )
        if done.returncode != 0:
            pytest.skip(f"no bind mount to be had here: {done.stderr.strip()}")
        made.append(target)
        return target

    yield mount
    for target in made:
        subprocess.run(["umount", "-l", target], check=True, timeout=60)


WAYS = ("plain", "symbolic link", "hard link", "bind mount")


@pytest.fixture
def named(bench, mounted):
    """``named(path, way)``: another name of the same file."""

    def name(path, way):
        path = Path(path)
        beside = path.with_name("link.qcow2")  # parents are named relative to the folder
        if way == "symbolic link":
            beside.symlink_to(path)
        elif way == "hard link":
            os.link(path, beside)
        elif way == "bind mount":
            return mounted(bench.host.root, bench.place / "mounted") / path.relative_to(bench.host.root)
        return path if way == "plain" else beside

    return name


# --- a base that is another VM's frozen image -------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_frozen_image_of_another_vm_is_counted_by_every_name(bench, named, way):
    one = bench.make(4, name="one")
    bench.write(one, 1)
    first = one.create_snapshot("a")
    bench.write(one, 2, MIB)
    second = one.create_snapshot("b")
    bench.write(one, 3, 2 * MIB)
    two = bench.make(bench.in_place(named(second.disks["hda"], way)), name="two")
    assert "is the base of one: the new VM writes to a differencing image on it" in "".join(bench.said)
    bench.write(two, 4, 3 * MIB)
    lent = {path: bench.file_of(path) for path in (first.disks["hda"], second.disks["hda"])}
    seen = bench.photo(one)["now hda"], bench.photo(two)["now hda"]
    two.create_snapshot("x")
    two.snapshot("x").delete()
    bench.said.clear()
    first.delete()
    second.delete()
    waiting = [line for line in bench.said if "is not merged: it is needed by two" in line]
    assert len(waiting) == 2 + 1  # said by the second deletion for both
    assert not one.merge()
    for with_disks in (True, False):
        with pytest.raises(errors.Conflict, match="is needed by two") as caught:
            one.delete(with_disks=with_disks)
        assert caught.value.facts["users"] == ["two"]
    assert {path: bench.file_of(path) for path in lent} == lent
    assert (bench.photo(one)["now hda"], bench.photo(two)["now hda"]) == seen
    bench.check(one)
    two.delete(with_disks=True)
    assert one.merge()
    assert bench.photo(one) == {"now hda": seen[0]}
    bench.check(one)


@pytest.mark.parametrize("way", WAYS)
def test_image_that_another_vm_writes_is_refused_by_every_name(bench, named, way):
    one = bench.make(4, name="one")
    one.create_snapshot("a")
    with pytest.raises(errors.Conflict, match="is the disk of the VM 'one'"):
        bench.make(bench.in_place(named(one.now().disks["hda"], way)), name="two")
    assert [vm.name for vm in bench.host.vms()] == ["one"]


# --- one VM that names its own images otherwise -----------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS[1:])
def test_working_image_by_another_name_is_the_same_disk(bench, named, way):
    vm = bench.make(4)
    bench.write(vm, 1)
    first = vm.create_snapshot("a")
    bench.write(vm, 2, MIB)
    before, working = bench.photo(vm), vm.now().disks["hda"]
    ids = vm.home.facts().disks
    bench.edit(vm, lambda edited: edited.set_disk_source("hda", named(working, way), "qcow2"))
    second = vm.create_snapshot("b")
    assert second.disks["hda"] == working
    assert vm.home.facts().disks == ids
    assert tree.detached(vm.tree()) == []
    first.delete()
    second.delete()
    assert bench.photo(vm) == {"now hda": before["now hda"]}
    bench.check(vm)


@pytest.mark.parametrize("way", WAYS[1:])
def test_frozen_image_by_another_name_gets_a_fresh_child(bench, named, way):
    vm = bench.make(4)
    bench.write(vm, 1)
    first = vm.create_snapshot("a")
    bench.write(vm, 2, MIB)
    second = vm.create_snapshot("b")
    bench.write(vm, 3, 2 * MIB)
    before = bench.photo(vm)
    bench.edit(vm, lambda edited: edited.set_disk_source("hda", named(second.disks["hda"], way), "qcow2"))
    vm.create_snapshot("c")
    bench.write(vm, 9)
    after = bench.photo(vm)
    assert after["c hda"] == after["b hda"] == before["b hda"]
    assert after["a hda"] == before["a hda"]
    first.delete()
    assert bench.photo(vm)["b hda"] == before["b hda"]
    bench.check(vm)


@pytest.mark.parametrize("way", WAYS[1:])
def test_parent_by_another_name_is_one_image_with_all_its_children(bench, named, way):
    """Somebody's rebase names the parent by another path: it must not be written for having one child only."""
    vm = bench.make(4)
    bench.write(vm, 1)
    vm.create_snapshot("root")
    bench.write(vm, 2, MIB)
    first = vm.create_snapshot("a")
    bench.write(vm, 3, 2 * MIB)
    second = vm.create_snapshot("b")
    first.apply()
    bench.write(vm, 4, 3 * MIB)
    before, working = bench.photo(vm), vm.now().disks["hda"]
    other = named(first.disks["hda"], way)
    bench.run("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", other, working)
    forest = vm.tree()
    assert sorted(forest.children()[first.disks["hda"]]) == sorted([second.disks["hda"], working])
    first.delete()  # two children: it stays
    assert Path(first.disks["hda"]).exists()
    assert bench.photo(vm) == {name: before[name] for name in ("root hda", "b hda", "now hda")}
    second.delete()
    assert bench.photo(vm) == {name: before[name] for name in ("root hda", "now hda")}
    bench.check(vm)


# --- three VMs on one base --------------------------------------------------------------------------------------------


def some_of(found):
    return list(itertools.islice(found, 0, None, 23))


@pytest.mark.parametrize("order", some_of(itertools.permutations(range(5))), ids=str)
def test_operations_of_three_vms_on_one_base_in_many_orders(bench, order):
    base = bench.image("base.qcow2", fill=(1, 2, 3, 4))
    vms = {}
    for number, name in enumerate(("one", "two", "three"), 1):
        vms[name] = bench.make(bench.in_place(base), name=name)
        if number == 1:
            vms[name].create_snapshot("a")
        bench.write(vms[name], 10 * number)
        vms[name].create_snapshot("b")
        bench.write(vms[name], 11 * number, MIB)
    frozen = bench.file_of(base)
    seen = {name: bench.photo(vm) for name, vm in vms.items()}

    def take():
        vms["one"].create_snapshot("c")
        seen["one"]["c hda"] = seen["one"]["now hda"]

    def go_back():
        vms["two"].snapshot("b").apply()
        seen["two"]["now hda"] = seen["two"]["b hda"]

    def forget():
        vms["three"].snapshot("b").delete()
        del seen["three"]["b hda"]

    def join():
        vms["four"] = bench.make(bench.in_place(base), name="four")
        bench.write(vms["four"], 77)
        seen["four"] = bench.photo(vms["four"])

    def leave():
        name = order.index(4) % 3
        gone = ("one", "two", "three")[name]
        if gone in left_to_do():
            gone = "three" if "three" not in left_to_do() else next(one for one in vms if one not in left_to_do())
        vms.pop(gone).delete(with_disks=True)
        del seen[gone]

    acts = (take, go_back, forget, join, leave)
    owners = ("one", "two", "three", None, None)
    done = []

    def left_to_do():
        return {owners[number] for number in order if number not in done} - {None}

    for number in order:
        if number == 4 and len(left_to_do()) == 3:
            done.append(number)
            continue  # nobody can leave yet: each still has something to do
        acts[number]()
        done.append(number)
        assert bench.file_of(base) == frozen
        assert bench.mode_of(base) == 0o400
    assert {name: bench.photo(vm) for name, vm in vms.items()} == seen
    for vm in vms.values():
        bench.check(vm)
        vm.delete(with_disks=True)
    assert bench.file_of(base) == frozen
    assert bench.mode_of(base) != 0o400
