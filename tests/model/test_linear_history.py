"""Which snapshots of a tree libvirt can have as its own, and under which names."""

from __future__ import annotations

from hvmgr.model import linear_history
from hvmgr.model.linear_history import Link
from hvmgr.model.tree import Image, Keeper, Leaf, Node, Tree


def tree(images, nodes, present, parent):
    """``images`` maps names to parents, ``nodes`` ids to (parent, disks)."""
    return Tree(
        images={one: Image(one, below, "qcow2", 1, 1, Keeper.IMAGES) for one, below in images.items()},
        nodes={one: Node(one, above, disks) for one, (above, disks) in nodes.items()},
        present=Leaf(parent, present),
    )


LINE = {"a": None, "b": "a", "c": "b", "d": "c"}


def test_a_line_is_given_oldest_first_with_what_each_went_on_in():
    found = linear_history.of(
        tree(LINE, {"one": (None, {"vda": "a"}), "two": ("one", {"vda": "b"})}, {"vda": "c"}, "two")
    )
    assert found.links == (Link("one", None, {"vda": "b"}), Link("two", "one", {"vda": "c"}))
    assert found.unfit == {}


def test_an_unnamed_image_in_between_is_what_the_snapshot_went_on_in():
    found = linear_history.of(tree(LINE, {"one": (None, {"vda": "a"})}, {"vda": "d"}, "one"))
    assert found.links == (Link("one", None, {"vda": "b"}),)


def test_other_branches_do_not_fit():
    nodes = {"one": (None, {"vda": "a"}), "left": ("one", {"vda": "x"}), "two": ("one", {"vda": "b"})}
    found = linear_history.of(tree(LINE | {"x": "a"}, nodes, {"vda": "c"}, "two"))
    assert [link.snapshot_id for link in found.links] == ["one", "two"]
    assert found.unfit == {"left": "it is on another branch than the present"}


def test_a_disk_that_the_present_does_not_have_drops_the_snapshot_and_joins_its_neighbours():
    nodes = {
        "one": (None, {"vda": "a"}),
        "two": ("one", {"vda": "b", "vdb": "x"}),
        "three": ("two", {"vda": "c"}),
    }
    found = linear_history.of(tree(LINE | {"x": None}, nodes, {"vda": "d"}, "three"))
    assert [(link.snapshot_id, link.parent) for link in found.links] == [("one", None), ("three", "one")]
    assert found.links[0].went_on == {"vda": "b"}
    assert found.unfit == {"two": "the present does not stand on its disk vdb"}


def test_a_disk_in_another_slot_does_not_fit():
    found = linear_history.of(tree(LINE, {"one": (None, {"vda": "a"})}, {"vdb": "b"}, "one"))
    assert found.unfit == {"one": "the present does not stand on its disk vda"}


def test_a_missing_image_drops_what_stands_on_it():
    found = linear_history.of(tree({"c": "b"}, {"one": (None, {"vda": "a"})}, {"vda": "c"}, "one"))
    assert found.links == ()
    assert "is missing" in found.unfit["one"]


def test_nothing_at_all():
    assert linear_history.of(tree({"a": None}, {}, {"vda": "a"}, None)) == linear_history.History((), {})


def test_names_are_made_to_fit_and_to_differ():
    names = [("1", "a/b"), ("2", "a-b"), ("3", "..hidden"), ("4", "..."), ("5", "ü" * 150), ("6", "taken")]
    found = linear_history.fitting_names(names, {"taken"})
    assert [found[one] for one in "12346"] == ["a-b", "a-b (2)", "hidden", "snapshot", "taken (2)"]
    assert len(found["5"].encode()) == linear_history.NAME_BYTES
