"""Images that others made: which have to be named, and why one that is named stays. The planner is in the properties."""

from __future__ import annotations

import dataclasses

import pytest

from hvmgr.errors import Conflict, NotFound, UsageError
from hvmgr.model import outside_images
from hvmgr.model.tree import Image, Keeper, Leaf, Node, Tree

OURS, BASE, THEIRS = Keeper.IMAGES, Keeper.BASES, Keeper.OUTSIDE


def line(*keepers, nodes=(), working=None):
    """Images 0, 1, 2, … each on the one before; the last one is the present."""
    images = {
        str(number): Image(str(number), str(number - 1) if number else None, "qcow2", 1, 1, keeper)
        for number, keeper in enumerate(keepers)
    }
    named = {f"s{one}": Node(f"s{one}", None, {"vda": str(one)}) for one in nodes}
    return Tree(images, named, Leaf(None, {"vda": working or str(len(keepers) - 1)}))


def test_between_two_of_ours_its_own_name_is_enough():
    assert outside_images.names_needed(line(BASE, THEIRS, OURS)) == {"1": ("1",)}


def test_the_present_need_not_be_named_beside_its_parent():
    assert outside_images.names_needed(line(BASE, THEIRS, THEIRS)) == {"1": ("1",)}


def test_what_a_snapshot_froze_has_to_be_named_beside_its_parent():
    assert outside_images.names_needed(line(BASE, THEIRS, THEIRS, OURS, nodes=[2])) == {"1": ("1", "2")}


def test_one_of_ours_below_theirs_waits_for_the_name_of_the_upper():
    assert outside_images.names_needed(line(BASE, OURS, THEIRS)) == {"1": ("2",)}


def test_a_base_of_others_is_never_asked_for():
    assert outside_images.names_needed(line(THEIRS, OURS)) == {}


@pytest.mark.parametrize(
    ("tree", "name", "error", "words"),
    [
        (line(BASE, THEIRS, OURS), "9", NotFound, "no image of this VM"),
        (line(BASE, OURS, OURS), "1", UsageError, "hvmgr's own"),
        (line(THEIRS, OURS), "0", Conflict, "is a base"),
        (line(BASE, THEIRS, THEIRS, OURS, nodes=[2]), "1", Conflict, "was made outside hvmgr as well"),
        (line(BASE, THEIRS, OURS, nodes=[0, 1]), "1", Conflict, "needed by snapshot s1"),
        (line(BASE, THEIRS, nodes=[0]), "1", Conflict, "needed by the present"),
        (dataclasses.replace(line(BASE, THEIRS, OURS), strangers={"1": ("db",)}), "1", Conflict, "needed by db"),
    ],
    ids=["unknown", "ours", "base", "child of others", "named", "present", "stranger"],
)
def test_reasons(tree, name, error, words):
    with pytest.raises(error, match=words):
        outside_images.require_named(tree, [name])


def test_with_two_children_it_is_told_how_many():
    tree = line(BASE, THEIRS, OURS)
    other = Image("x", "1", "qcow2", 1, 1, OURS)
    with pytest.raises(Conflict, match="2 images stand on 1"):
        outside_images.require_named(dataclasses.replace(tree, images={**tree.images, "x": other}), ["1"])
