# -*- coding: utf-8 -*-
# Copyright: The hvmgr developers
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What needs no hvmgr: trees as text, names and ids, words of the command line.

The modules themselves are tested with a real hvmgr, libvirt and QEMU, in hvmgr's own tests.
"""

from __future__ import annotations

import pytest
from ansible_collections.hvmgr.hvmgr.plugins.module_utils import hvmgr as ours

ONE, TWO, THREE = "11111111-aaaa", "22222222-bbbb", "22222222-cccc"
TREE = [
    {"id": ONE, "name": "one", "parent": None, "notes": "first\nof all"},
    {"id": TWO, "name": "two", "parent": ONE, "notes": ""},
    {"id": THREE, "name": "two", "parent": TWO, "notes": ""},
]


class Refusing:
    """A runner that only fails."""

    def fail(self, failure):
        raise failure


def found(reference):
    return ours.find_snapshot(Refusing(), {"vm": {"name": "web"}, "snapshots": TREE}, reference)


def test_tree_is_a_line_for_each_node():
    assert ours.draw("web", TREE, TWO) == ("web\n  - one (first / of all)\n    - two\n      - two\n      - Now\n")
    assert ours.draw("web", [], None) == "web\n  - Now\n"


def test_parent_that_is_unknown_is_the_root():
    assert ours.draw("web", [dict(TREE[1], parent="gone")], "gone", now="here") == "web\n  - two\n  - here\n"


@pytest.mark.parametrize(
    ("reference", "id"), [("one", ONE), (ONE, ONE), ("11111111", ONE), (TWO, TWO), ("1111111", None), ("none", None)]
)
def test_snapshot_is_found_by_name_id_or_prefix(reference, id):
    one = found(reference)
    assert (one and one["id"]) == id


@pytest.mark.parametrize("reference", ["two", "22222222"])
def test_ambiguous_one_is_refused_with_its_ids(reference):
    with pytest.raises(ours.Failure) as caught:
        found(reference)
    assert caught.value.code == "UsageError"
    assert TWO in caught.value.hint
    assert THREE in caught.value.hint


def test_those_below_one_that_goes_move_up():
    left, heir = ours.without(TREE, [TWO])
    assert [(one["id"], one["parent"]) for one in left] == [(ONE, None), (THREE, ONE)]
    assert heir(TWO) == ONE
    assert ours.subtree(TREE, TWO) == [TWO, THREE]


@pytest.mark.parametrize(
    ("text", "size"),
    [("512M", 512 << 20), ("4GiB", 4 << 30), ("8kb", 8 << 10), ("77", 77), ("1.5G", None), (None, None)],
)
def test_sizes(text, size):
    assert ours.to_bytes(text) == size


def test_options_are_words():
    params = {"on": True, "off": False, "none": None, "disk_path": "/a b", "number": 3}
    assert ours.options(params, "on off none disk_path number") == ["--on", "--disk-path=/a b", "--number=3"]
