"""The planner case by case; tests/model/test_tree_properties.py lets it live through random ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from hvmgr.errors import Conflict, Corrupt, NotFound
from hvmgr.model import tree as trees
from hvmgr.model.plan import CreateImage, FreezeImage, MergeDown, MergeUp, RemoveImage
from hvmgr.model.tree import Change, Image, Keeper, Leaf, Tree

GIB = 1 << 30
BASE = "/vm/Virtual Hard Disks/disk.qcow2"


def image(name: str, parent: str | None = None, **facts: Any) -> Image:
    given = {"format": "qcow2", "size": 4 * GIB, "data": GIB, "keeper": Keeper.IMAGES, **facts}
    return Image(path=name, parent=parent, **given)


def fresh(**facts: Any) -> Tree:
    """A VM with one disk on its own base, without snapshots."""
    base = image(BASE, keeper=Keeper.BASES, **facts)
    return Tree(images={BASE: base}, nodes={}, present=Leaf(None, {"vda": BASE}))


def grown(*acts: str, tree: Tree | None = None) -> Tree:
    """A tree after acts like ``create a``, ``apply a``, ``undo``; the images are /i/1, /i/2 ... in their order."""
    now = fresh() if tree is None else tree
    for number, act in enumerate(acts, start=1):
        verb, _, name = act.partition(" ")
        children = {"vda": f"/i/{number}"}
        if verb == "create":
            now = trees.plan_create(now, name, children).after
        elif verb == "apply":
            now = trees.plan_apply(now, name, children).after
        elif verb == "undo":
            now = trees.plan_undo(now).after
        else:
            now = trees.plan_delete(now, [name]).after
    return now


def changed(tree: Tree, path: str, **facts: Any) -> Tree:
    return dataclasses.replace(tree, images={**tree.images, path: dataclasses.replace(tree.images[path], **facts)})


def merged(change: Change) -> list[tuple[str, str]]:
    return [(step.parent, step.child) for step in change.finish if isinstance(step, MergeUp | MergeDown)]


def removed(change: Change) -> list[str]:
    return [step.path for step in change.finish if isinstance(step, RemoveImage)]


# --- create ---


def test_create_freezes_the_working_image_under_its_own_name() -> None:
    change = trees.plan_create(fresh(), "a", {"vda": "/i/1"})
    assert change.prepare == (CreateImage("/i/1", 4 * GIB, BASE, "qcow2"), FreezeImage(BASE))
    assert change.finish == ()
    assert change.after.nodes["a"].disks == {"vda": BASE}
    assert change.after.present == Leaf("a", {"vda": "/i/1"})


def test_create_on_a_vhd_makes_a_qcow2_child() -> None:
    change = trees.plan_create(fresh(format="vpc"), "a", {"vda": "/i/1"})
    assert change.prepare[0] == CreateImage("/i/1", 4 * GIB, BASE, "vpc")
    assert change.after.images["/i/1"].format == "qcow2"


def test_create_empties_the_undo_slot() -> None:
    tree = grown("create a", "apply a")
    change = trees.plan_create(tree, "b", {"vda": "/i/9"})
    assert change.after.undo is None
    assert removed(change) == ["/i/1"]


def test_create_for_other_slots_is_refused() -> None:
    with pytest.raises(Conflict, match="vdb"):
        trees.plan_create(fresh(), "a", {"vdb": "/i/1"})


def test_create_under_a_taken_id_is_refused() -> None:
    with pytest.raises(Conflict, match="id a already"):
        trees.plan_create(grown("create a"), "a", {"vda": "/i/9"})


def test_create_over_an_old_image_is_refused() -> None:
    with pytest.raises(Conflict, match="taken"):
        trees.plan_create(grown("create a"), "b", {"vda": BASE})


def test_apply_over_an_old_image_is_refused() -> None:
    with pytest.raises(Conflict, match="taken"):
        trees.plan_apply(grown("create a"), "a", {"vda": "/i/1"})


def test_one_new_image_for_two_disks_is_refused() -> None:
    tree = dataclasses.replace(fresh(), present=Leaf(None, {"vda": BASE, "vdb": "/other"}))
    with pytest.raises(Conflict, match="taken"):
        trees.plan_create(tree, "a", {"vda": "/i/1", "vdb": "/i/1"})


def test_create_without_disks_still_makes_a_snapshot() -> None:
    change = trees.plan_create(Tree(images={}, nodes={}, present=Leaf(None, {})), "a", {})
    assert (change.prepare, change.after.present.parent) == ((), "a")


# --- apply and undo ---


def test_apply_puts_the_present_into_the_undo_slot() -> None:
    change = trees.plan_apply(grown("create a"), "a", {"vda": "/i/2"})
    assert change.prepare == (CreateImage("/i/2", 4 * GIB, BASE, "qcow2"),)
    assert change.after.undo == Leaf("a", {"vda": "/i/1"})
    assert change.after.present == Leaf("a", {"vda": "/i/2"})
    assert change.finish == ()


def test_apply_twice_removes_what_the_undo_slot_held() -> None:
    change = trees.plan_apply(grown("create a", "apply a"), "a", {"vda": "/i/3"})
    assert removed(change) == ["/i/1"]
    assert change.after.undo == Leaf("a", {"vda": "/i/2"})


def test_apply_without_undo_removes_the_present() -> None:
    change = trees.plan_apply(grown("create a"), "a", {"vda": "/i/2"}, keep_undo=False)
    assert removed(change) == ["/i/1"]
    assert change.after.undo is None


def test_apply_takes_the_size_of_the_snapshot() -> None:
    tree = changed(grown("create a"), "/i/1", size=8 * GIB)
    change = trees.plan_apply(tree, "a", {"vda": "/i/2"})
    assert change.after.images["/i/2"].size == 4 * GIB


def test_apply_detaches_a_base_that_the_snapshot_does_not_know() -> None:
    tree = grown("create a")
    new = image("/vm/Virtual Hard Disks/new.qcow2", keeper=Keeper.BASES)
    tree = dataclasses.replace(
        tree,
        images={**tree.images, new.path: new},
        present=Leaf("a", {**tree.present.disks, "vdb": new.path}),
    )
    change = trees.plan_apply(tree, "a", {"vda": "/i/2"}, keep_undo=False)
    assert removed(change) == ["/i/1"]
    assert trees.detached(change.after) == [new.path]


def test_apply_of_an_unknown_snapshot_is_refused() -> None:
    with pytest.raises(NotFound):
        trees.plan_apply(fresh(), "a", {"vda": "/i/1"})


def test_apply_of_a_snapshot_with_a_missing_image_is_refused() -> None:
    tree = grown("create a")
    tree = dataclasses.replace(tree, images={"/i/1": tree.images["/i/1"]})
    with pytest.raises(Corrupt, match="missing"):
        trees.plan_apply(tree, "a", {"vda": "/i/2"})


def test_undo_changes_places_and_back() -> None:
    tree = grown("create a", "apply a")
    once = trees.plan_undo(tree)
    assert (once.prepare, once.finish) == ((), ())
    assert (once.after.present, once.after.undo) == (tree.undo, tree.present)
    assert trees.plan_undo(once.after).after == tree


@pytest.mark.parametrize("acts", [(), ("create a",), ("create a", "apply a", "create b"), ("create a", "delete a")])
def test_undo_with_an_empty_slot_is_refused(acts: tuple[str, ...]) -> None:
    with pytest.raises(NotFound, match="nothing to undo"):
        trees.plan_undo(grown(*acts))


# --- delete ---


def test_delete_of_a_leaf_removes_its_image() -> None:
    tree = grown("create a", "create b", "apply a", "create c")  # b is a leaf beside c and now
    change = trees.plan_delete(tree, ["b"])
    assert removed(change) == ["/i/1"]
    assert merged(change) == []
    assert set(change.after.nodes) == {"a", "c"}


def test_delete_with_one_child_merges_it() -> None:
    tree = changed(grown("create a", "create b"), "/i/1", data=GIB)
    change = trees.plan_delete(tree, ["b"])
    assert change.finish == (MergeDown(child="/i/2", parent="/i/1"),)  # the child is empty: down is cheaper
    assert change.after.present == Leaf("a", {"vda": "/i/2"})


def test_delete_with_one_child_that_holds_more_merges_up() -> None:
    tree = changed(grown("create a", "create b"), "/i/2", data=3 * GIB)
    change = trees.plan_delete(tree, ["b"])
    assert change.finish == (MergeUp("/i/2", "/i/1", BASE, "qcow2", hide=None), RemoveImage("/i/1"))


def test_delete_with_two_children_keeps_the_image() -> None:
    tree = grown("create a", "create b", "create c", "apply b", "create d")
    change = trees.plan_delete(tree, ["b"])
    assert change.finish == ()
    assert trees.unnamed(change.after) == ["/i/1"]
    assert change.after.nodes["c"].parent == change.after.nodes["d"].parent == "a"
    last = trees.plan_delete(change.after, ["c"])
    assert merged(last) == [("/i/1", "/i/4")]
    assert removed(last) == ["/i/2", "/i/1"]  # the branch that went, and what was merged up


def test_delete_of_the_root_gives_its_children_no_parent() -> None:
    change = trees.plan_delete(grown("create a", "create b"), ["a"])
    assert change.after.nodes["b"].parent is None
    assert change.after.present.parent == "b"


def test_delete_of_the_parent_of_now_moves_now_up() -> None:
    change = trees.plan_delete(grown("create a", "create b"), ["b"])
    assert change.after.present.parent == "a"


def test_delete_of_parent_and_grandparent_finds_the_heir() -> None:
    change = trees.plan_delete(grown("create a", "create b", "create c"), ["c", "b"])
    assert change.after.present.parent == "a"


def test_delete_of_a_subtree_removes_its_images() -> None:
    tree = grown("create a", "create b", "create c", "apply a", "create d")
    assert tree.subtree("b") == ["b", "c"]
    change = trees.plan_delete(tree, tree.subtree("b"))
    assert removed(change) == ["/i/2", "/i/1"]
    assert set(change.after.images) == {BASE, "/i/4", "/i/5"}


def test_delete_of_the_last_snapshot_merges_down_into_the_own_base() -> None:
    change = trees.plan_delete(grown("create a"), ["a"])
    assert change.finish == (MergeDown(child="/i/1", parent=BASE),)
    assert set(change.after.images) == {"/i/1"}
    assert change.after.images["/i/1"].parent is None


def test_delete_when_the_undo_slot_is_the_only_user_removes_the_image() -> None:
    tree = grown("create a", "create b", "apply a")  # /i/1 is b's, /i/2 on it is in the undo slot
    change = trees.plan_delete(tree, ["b"])
    assert change.after.undo is None
    assert removed(change) == ["/i/2", "/i/1"]


def test_delete_is_planned_in_the_same_order_whatever_the_request() -> None:
    names = [f"s{number}" for number in range(20)]
    tree = grown(*(f"create {name}" for name in names), "apply s0")
    plans = {trees.plan_delete(tree, order).finish for order in (names, names[::-1], frozenset(names))}
    assert len(plans) == 1


def test_delete_of_an_unknown_snapshot_is_refused() -> None:
    with pytest.raises(NotFound):
        trees.plan_delete(fresh(), ["a"])


# --- what is never written or removed ---


@pytest.mark.parametrize(
    "facts",
    [{"keeper": Keeper.OUTSIDE}, {"format": "vpc"}, {"format": "raw"}, {"size": 2 * GIB}],
    ids=["in place", "VHD", "raw", "smaller"],
)
def test_nothing_is_merged_into_a_base_that_does_not_fit(facts: dict[str, Any]) -> None:
    tree = changed(grown("create a"), BASE, **facts)
    change = trees.plan_delete(tree, ["a"])
    assert change.finish == ()
    assert set(change.after.images) == {BASE, "/i/1"}
    assert trees.pending(change.after) == []


def test_a_base_is_never_removed() -> None:
    tree = grown("create a")
    tree = dataclasses.replace(tree, present=Leaf("a", {}))
    tree = dataclasses.replace(tree, images={BASE: tree.images[BASE]})
    change = trees.plan_delete(tree, ["a"])
    assert change.finish == ()
    assert trees.detached(change.after) == [BASE]


def test_an_image_that_a_stranger_uses_stays() -> None:
    tree = grown("create a", "create b", "apply a", "create c")
    tree = dataclasses.replace(tree, strangers={"/i/1": ("another VM",)})
    change = trees.plan_delete(tree, ["b"])
    assert change.finish == ()
    assert "/i/1" in change.after.images


@pytest.mark.parametrize("lent", ["/i/1", "/i/2", "/i/3"], ids=["parent", "child", "grandchild"])
def test_what_a_stranger_reads_is_not_merged(lent: str) -> None:
    tree = grown("create a", "create b", "create c", "create d")
    tree = dataclasses.replace(tree, strangers={lent: ("another VM",)})
    change = trees.plan_delete(tree, ["b"])
    assert change.finish == ()
    free = dataclasses.replace(change.after, strangers={})
    assert merged(trees.plan_merge(free)) == [("/i/1", "/i/2")]


def test_strangers_above_do_not_hinder_what_they_do_not_read() -> None:
    tree = dataclasses.replace(grown("create a", "create b"), strangers={BASE: ("another VM",)})
    assert merged(trees.plan_delete(tree, ["b"])) == [("/i/1", "/i/2")]


def test_busy_images_wait_and_are_merged_later() -> None:
    tree = grown("create a", "create b")
    running = trees.plan_delete(tree, ["b"], busy=list(tree.images))
    assert running.finish == ()
    assert trees.unnamed(running.after) == ["/i/1"]
    assert trees.pending(running.after) == [("/i/1", "/i/2")]
    stopped = trees.plan_merge(running.after)
    assert merged(stopped) == [("/i/1", "/i/2")]
    assert trees.pending(stopped.after) == []


def test_a_busy_image_is_not_removed_even_if_nothing_names_it() -> None:
    tree = grown("create a", "apply a")
    change = trees.plan_delete(tree, ["a"], busy=["/i/1"])
    assert removed(change) == []
    assert trees.detached(change.after) == ["/i/1"]


def test_a_disk_that_an_edit_took_away_is_detached_and_stays() -> None:
    tree = dataclasses.replace(grown("create a", "create b"), present=Leaf("b", {}))
    assert trees.detached(tree) == ["/i/2"]
    change = trees.plan_create(tree, "c", {})
    assert change.finish == ()
    change = trees.plan_delete(change.after, ["a", "b", "c"])
    assert trees.detached(change.after) == ["/i/2"]
    assert "/i/2" not in removed(change)


def test_a_damaged_chain_is_left_alone() -> None:
    tree = grown("create a", "create b", "create c")
    images = {path: one for path, one in tree.images.items() if path != BASE}
    change = trees.plan_delete(dataclasses.replace(tree, images=images), ["b"])
    assert change.finish == ()


def test_a_chain_in_a_circle_is_left_alone_and_said() -> None:
    images = {"/i/1": image("/i/1", "/i/2"), "/i/2": image("/i/2", "/i/1")}
    tree = Tree(images=images, nodes={}, present=Leaf(None, {}))
    assert trees.plan_merge(tree).finish == ()
    with pytest.raises(Corrupt, match="circle"):
        tree.chain("/i/1")


# --- sizes ---


@pytest.mark.parametrize(
    ("below", "parent", "child", "hide"),
    [(4, 4, 4, None), (4, 2, 4, (2, 2)), (4, 2, 3, (2, 2)), (4, 2, 2, (2, 2)), (2, 4, 4, None), (2, 4, 8, None)],
    ids=["equal", "shrunk and grown", "grown less", "shrunk", "grown", "grown twice"],
)
def test_merging_up_hides_what_a_shorter_image_hid(
    below: int, parent: int, child: int, hide: tuple[int, int] | None
) -> None:
    tree = grown("create a", "create b")
    tree = changed(changed(tree, "/i/1", size=parent), "/i/2", size=child, data=3 * GIB)
    change = trees.plan_delete(changed(tree, BASE, size=below), ["b"])
    assert change.finish[0] == MergeUp("/i/2", "/i/1", BASE, "qcow2", hide=hide)


def test_images_of_different_sizes_are_not_merged_down() -> None:
    tree = changed(grown("create a", "create b"), "/i/2", size=8 * GIB)
    assert isinstance(trees.plan_delete(tree, ["b"]).finish[0], MergeUp)


# --- several at once, depth ---


def test_several_in_a_row_merge_from_the_disk_downwards() -> None:
    tree = grown("create a", "create b", "create c", "create d")
    tree = changed(tree, "/i/4", data=9 * GIB)
    change = trees.plan_delete(tree, ["b", "c", "d"])
    assert merged(change) == [("/i/3", "/i/4"), ("/i/2", "/i/4"), ("/i/1", "/i/4")]


def test_depth_counts_unnamed_images() -> None:
    tree = grown("create a", "create b")
    assert tree.depth() == 3
    waiting = trees.plan_delete(tree, ["b"], busy=list(tree.images)).after
    assert waiting.depth() == 3


def test_a_chain_that_libvirt_could_not_start_is_refused() -> None:
    tree = grown(*(f"create s{number}" for number in range(trees.MAX_DEPTH - 1)))
    assert tree.depth() == trees.MAX_DEPTH
    with pytest.raises(Conflict, match="190 images"):
        trees.plan_create(tree, "more", {"vda": "/i/more"})
    last = f"s{trees.MAX_DEPTH - 2}"
    assert trees.plan_apply(tree, last, {"vda": "/i/more"}).after.depth() == trees.MAX_DEPTH
