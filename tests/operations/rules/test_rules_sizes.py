"""Disks that grow and shrink between snapshots: no merge ever brings back what a shorter image hid."""

from __future__ import annotations

import itertools
import random

import pytest

import hvmgr
from hvmgr import errors
from hvmgr.model import plan, tree
from hvmgr.model.plan import MergeDown, MergeUp

MIB = 1 << 20

# Sizes in MiB: of the base, and of the present after each snapshot.
SEQUENCES = [
    (8, 4, 8, 8),
    (8, 4, 4, 8),
    (4, 8, 2, 8),
    (8, 6, 4, 8),
    (8, 2, 8, 4),
    (2, 4, 8, 6),
    (8, 8, 4, 8),
    (8, 3, 3, 3),
]
# Which snapshots go first, and the image that holds the most; chosen once and for all.
CASES = [
    (sizes, order, (None, 2, 3)[(number + second) % 3])
    for number, sizes in enumerate(SEQUENCES)
    for second, order in enumerate(random.Random(number).sample([*itertools.permutations(range(3))], 2))
]


def resize(path, size):
    return ["qemu-img", "resize", "--shrink", "-f", "qcow2", path, str(size * MIB)]


def grow_chain(bench, base, sizes, *, dense=None):
    """Three snapshots in a row; ``dense`` is the image that holds the most, so that merges take either direction."""
    vm = bench.make(base)
    made = []
    for level, size in enumerate(sizes):
        if level:
            bench.run(*resize(vm.now().disks["hda"], size))
            bench.write(vm, 100 + level, 0)
            bench.write(vm, 110 + level, size * MIB - (64 << 10))
            if level == dense:
                bench.write(vm, 120 + level, 0, length=size * MIB)
        if level < len(sizes) - 1:
            made.append(vm.create_snapshot(f"s{level}"))
    return vm, made


def full(bench, size, fmt="qcow2"):
    return bench.image("base.img", size=size, fmt=fmt, fill=(0xEE,) * size)


@pytest.mark.parametrize(("sizes", "order", "dense"), CASES, ids=str)
def test_deletes_in_any_order_keep_every_byte(bench, sizes, order, dense):
    vm, made = grow_chain(bench, full(bench, sizes[0]), sizes, dense=dense)
    seen = bench.photo(vm)
    for number in order:
        made[number].delete()
        seen = {name: value for name, value in seen.items() if not name.startswith(f"s{number} ")}
        assert bench.photo(vm) == seen
    bench.check(vm)
    left = vm.delete()
    assert {bench.mode_of(path) for path in left} == {0o600}
    assert bench.bytes_of(next(path for path in left if path.endswith("web-hda.qcow2"))) == seen["now hda"]


@pytest.mark.parametrize("fmt", ["raw", "vpc"])
def test_base_that_qcow2_cannot_be_merged_into(bench, fmt):
    base = bench.image(f"b.{fmt}", size=8, fmt=fmt, fill=(0xEE,) * 8, options="force_size=on" if fmt == "vpc" else None)
    vm, made = grow_chain(bench, base, (8, 4, 6, 8))
    seen = bench.photo(vm)
    for number in (1, 0, 2):
        made[number].delete()
    assert bench.photo(vm) == {"now hda": seen["now hda"]}
    bench.check(vm)


def test_several_at_once(bench):
    vm, made = grow_chain(bench, full(bench, 8), (8, 2, 6, 8))
    seen = bench.photo(vm)
    made[0].delete(subtree=True)
    assert bench.photo(vm) == {"now hda": seen["now hda"]}
    bench.check(vm)


def test_branches_of_different_sizes(bench):
    vm = bench.make(full(bench, 8))
    a = vm.create_snapshot("a")
    bench.run(*resize(vm.now().disks["hda"], 2))
    bench.write(vm, 1)
    b = vm.create_snapshot("b")
    bench.run(*resize(vm.now().disks["hda"], 8))
    c = vm.create_snapshot("c")
    bench.write(vm, 2, 7 * MIB)
    a.apply()
    bench.run(*resize(vm.now().disks["hda"], 4))
    d = vm.create_snapshot("d")
    bench.run(*resize(vm.now().disks["hda"], 16))
    bench.write(vm, 3, 15 * MIB)
    seen = bench.photo(vm)
    for one in (b, a, d):
        one.delete()
        seen = {name: value for name, value in seen.items() if not name.startswith(one.name + " ")}
        assert bench.photo(vm) == seen
        bench.check(vm)
    c.apply()
    assert bench.photo(vm)["now hda"] == seen["c hda"]
    assert seen["c hda"][1].keys() == {0, MIB}


def test_apply_brings_the_size_back(bench):
    vm = bench.make(8)
    bench.write(vm, 1, 7 * MIB)
    big = vm.create_snapshot("big")
    bench.run(*resize(vm.now().disks["hda"], 4))
    small = vm.create_snapshot("small")
    for one, size in ((big, 8), (small, 4), (big, 8)):
        one.apply()
        assert bench.photo(vm)["now hda"][0] == size * MIB
    vm.undo()
    assert bench.photo(vm)["now hda"][0] == 4 * MIB


# --- resized between the plan and its steps ---------------------------------------------------------------------------


def between(bench, act):
    """``act(plan)`` happens after the plan was made, as when a killed command is completed much later."""
    said = bench.said

    def approve(one):
        act(one)
        return True

    bench.host.reporter = hvmgr.Reporter(notice=said.append, approve=approve)


def resizing(bench, vm, size, kind, planned):
    def act(one):
        planned.extend(step for step in one.finish if isinstance(step, MergeUp | MergeDown))
        assert {type(step) for step in planned} == {kind}
        bench.run(*resize(vm.now().disks["hda"], size))

    return act


@pytest.mark.parametrize("size", [4, 12], ids=["shrunk", "grown"])
def test_merge_down_of_a_disk_resized_since_is_given_up(bench, size):
    vm = bench.make(full(bench, 8))
    first = vm.create_snapshot("a")
    bench.write(vm, 1)
    planned = []
    between(bench, resizing(bench, vm, size, MergeDown, planned))
    with pytest.raises(errors.Conflict, match=r"images wait to be merged .* has been resized"):
        first.delete()
    assert planned
    bench.host.reporter = hvmgr.Reporter(notice=bench.said.append)
    bench.check(vm)
    seen = bench.photo(vm)
    assert seen["now hda"][0] == size * MIB
    assert tree.unnamed(vm.tree())
    vm.merge()
    assert bench.photo(vm) == seen
    bench.check(vm)


@pytest.mark.parametrize("size", [2, 5, 16])
def test_merge_up_hides_as_far_as_the_disk_reaches_when_it_runs(bench, size):
    """The plan was made for 8 MiB; below the 4 MiB image lies one of 8 MiB full of old data."""
    vm, made = grow_chain(bench, full(bench, 8, "raw"), (8, 4, 8))
    made[0].delete()
    planned = []
    between(bench, resizing(bench, vm, size, MergeUp, planned))
    assert len(vm.tree().images) == 3
    expected = bench.photo(vm)["now hda"]
    made[1].delete()
    assert planned[0].hide == (4 * MIB, 4 * MIB)
    found = bench.photo(vm)["now hda"]
    assert found[0] == size * MIB
    assert found[1] == {offset: piece for offset, piece in expected[1].items() if offset < size * MIB}
    bench.check(vm)


def test_merges_that_depend_on_one_that_was_given_up_wait_as_well(bench):
    """Of three images in a row the lowest pair cannot be merged: what stands on it is not merged past it."""
    vm = bench.make(full(bench, 8))
    a = vm.create_snapshot("a")
    for name in "bc":
        vm.create_snapshot(name)
    bench.write(vm, 9, 7 * MIB)
    planned = []

    def act(one):
        planned.extend(step for step in one.finish if isinstance(step, MergeUp | MergeDown))
        bench.run(*resize(planned[0].child, 6))

    between(bench, act)
    with pytest.raises(errors.Conflict, match="images wait to be merged"):
        a.delete(subtree=True)
    assert len(planned) == 3
    bench.host.reporter = hvmgr.Reporter(notice=bench.said.append)
    bench.check(vm)
    seen = bench.photo(vm)
    for _ in range(3):
        vm.merge()
    assert bench.photo(vm) == seen
    assert len(vm.tree().images) <= 2
    bench.check(vm)


def test_hidden_range_of_a_plan_is_of_frozen_images_only():
    """What a plan of a hidden range says stays true whatever happens to the child."""
    image = tree.Image("/i/p", "/i/b", "qcow2", 4 * MIB, 0, tree.Keeper.IMAGES)
    below = tree.Image("/i/b", None, "raw", 8 * MIB, 0, tree.Keeper.OUTSIDE)
    for size in (2, 4, 8, 16):
        child = tree.Image("/i/c", "/i/p", "qcow2", size * MIB, 0, tree.Keeper.IMAGES)
        forest = tree.Tree({one.path: one for one in (image, below, child)}, {}, tree.Leaf(None, {"hda": "/i/c"}))
        (merge, remove) = tree.plan_merge(forest).finish
        assert merge == plan.MergeUp("/i/c", "/i/p", "/i/b", "raw", (4 * MIB, 4 * MIB))
        assert remove == plan.RemoveImage("/i/p")
