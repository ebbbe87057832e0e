"""Snapshots from the command line, on the embedded driver."""

from __future__ import annotations

import re
import subprocess

import pytest

from hvmgr.faces.cli import snapshot
from hvmgr.model.metadata import SnapshotType
from tests.faces.cli.conftest import files_of

SNAPSHOT = {"id", "name", "notes", "created", "parent", "type", "has_state", "automatic", "damaged", "disks"}


def test_list_in_a_pipe_is_plain_lines(hvmgr, branched):
    rows = hvmgr.ok("snapshot", "list", branched).lines
    assert [row[1:4] for row in rows] == [[name, "standard", "off"] for name in ("one", "two", "three")]
    assert rows[1][5] == rows[2][5] == rows[0][0]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}", rows[0][4])


def test_json_of_list_has_exactly_the_documented_shape(hvmgr, branched, root):
    told = hvmgr.ok("snapshot", "list", branched, "--json").json
    assert set(told) == {"schema", "vm", "now", "snapshots"}
    assert told["schema"] == 1
    assert set(told["vm"]) == {"id", "name", "state", "home"}
    assert (told["vm"]["name"], told["vm"]["state"], told["vm"]["home"]) == (branched, "off", str(root / branched))
    one, two, three = told["snapshots"]
    assert set(one) == SNAPSHOT
    assert (one["parent"], two["parent"], three["parent"]) == (None, one["id"], one["id"])
    assert (one["notes"], one["type"], one["has_state"]) == ("the first", "standard", False)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", one["created"])
    assert told["now"]["parent"] == three["id"]
    assert set(told["now"]["disks"]) == set(one["disks"]) == {"vda"}


def test_tree_and_list_give_the_same_json(hvmgr, branched):
    assert (
        hvmgr.ok("--json", "snapshot", "tree", branched).json == hvmgr.ok("snapshot", "list", branched, "--json").json
    )


def test_show_gives_the_same_json_with_one_snapshot(hvmgr, branched):
    every = hvmgr.ok("snapshot", "list", branched, "--json").json
    shown = hvmgr.ok("snapshot", "show", branched, "two", "--json").json
    assert shown == {**every, "snapshots": [every["snapshots"][1]]}


def test_tree_is_drawn_with_now_and_the_undo_slot(hvmgr, branched):
    lines = hvmgr.ok("snapshot", "tree", branched).out.splitlines()
    assert [re.split(r"  +(?=standard|\d)", line)[0] for line in lines] == [
        branched,
        "└── one",
        "    ├── two",
        "    │   └── (undo slot)",
        "    └── three",
        "        └── Now",
    ]
    assert all("standard" in line and line.endswith("off") for line in (lines[1], lines[2], lines[4]))


def test_tree_counts_what_lies_outside_the_home(hvmgr, root):
    base = root.parent / "base.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", base, "8M"], check=True)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write 0 1M", base], check=True, capture_output=True)
    hvmgr.ok(
        "vm", "create", "out", "--memory", "64M", "--disk", base, "--in-place", "--network", "none", "--accel", "tcg"
    )
    assert re.search(r"└── Now +1\.\d MiB", hvmgr.ok("snapshot", "tree", "out").out)
    hvmgr.ok("snapshot", "create", "out", "one")
    assert re.search(r"└── one .* 1\.\d MiB  off", hvmgr.ok("snapshot", "tree", "out").out)


def test_tree_says_which_images_wait_without_a_name(hvmgr, branched):
    hvmgr.ok("snapshot", "create", branched, "four")
    hvmgr.ok("snapshot", "create", branched, "five")
    hvmgr.ok("snapshot", "apply", branched, "four")
    hvmgr.ok("snapshot", "create", branched, "six")
    hvmgr.ok("snapshot", "delete", branched, "four")
    told = hvmgr.ok("snapshot", "tree", branched).out
    assert re.search(
        r"^unnamed image vda_\S+\.qcow2 \(\S+ KiB\): kept for the 2 images that stand on it$", told, re.MULTILINE
    )


def test_show_gives_the_chain_with_each_images_size(hvmgr, branched):
    told = hvmgr.ok("snapshot", "show", branched, "three").lines
    assert ["parent", "one"] in told
    chain = [row for row in told if row[0] == "vda"]
    assert [row[1] for row in chain] == ["0", "1"]
    assert chain[1][2].endswith("Virtual Hard Disks/vda.qcow2")
    assert all(re.fullmatch(r"[\d.]+ \w+", size) for row in chain for size in row[4:6])


@pytest.mark.parametrize("reference", [lambda one: one["id"], lambda one: one["id"][:8], lambda one: one["name"]])
def test_snapshot_is_named_by_name_id_or_prefix(hvmgr, branched, reference):
    two = hvmgr.ok("snapshot", "list", branched, "--json").json["snapshots"][1]
    assert hvmgr.ok("snapshot", "show", branched, reference(two), "--json").json["snapshots"] == [two]


def test_restore_is_apply(hvmgr, branched):
    told = hvmgr.ok("snapshot", "restore", branched, "one", "--json").json
    assert (told["changed"], told["snapshot"]["name"], told["first"]) == (True, "one", None)


def test_apply_with_a_snapshot_first_names_it(hvmgr, branched):
    told = hvmgr.ok("snapshot", "apply", branched, "one", "--snapshot-first", "--json").json
    assert told["first"]["id"] == hvmgr.ok("snapshot", "list", branched, "--json").json["snapshots"][-1]["id"]


def test_revert_returns_to_the_parent_of_the_present(hvmgr, branched):
    assert hvmgr.ok("snapshot", "revert", branched, "--json").json["snapshot"]["name"] == "three"


def test_revert_with_a_snapshot_shows_the_apply_line(hvmgr, branched, root):
    before = files_of(root)
    answer = hvmgr("snapshot", "revert", branched, "before the update")
    assert answer.code == 2
    assert f"hvmgr snapshot apply {branched} 'before the update'" in answer.err
    assert files_of(root) == before


def test_revert_without_a_parent_is_not_found(hvmgr, vm):
    assert hvmgr("snapshot", "revert", vm).code == 3


def test_undo_changes_places(hvmgr, branched):
    before = hvmgr.ok("snapshot", "list", branched, "--json").json["now"]
    assert hvmgr.ok("snapshot", "undo", branched, "--json").json["now"] != before
    assert hvmgr.ok("snapshot", "undo", branched, "--json").json["now"] == before


def test_rename_and_notes(hvmgr, branched):
    assert hvmgr.ok("snapshot", "rename", branched, "two", "zwei", "--json").json["snapshot"]["name"] == "zwei"
    assert hvmgr.ok("snapshot", "rename", branched, "zwei", "zwei", "--json").json["changed"] is False
    assert (
        hvmgr.ok("snapshot", "notes", branched, "one", "two\nlines", "--json").json["snapshot"]["notes"] == "two\nlines"
    )
    assert hvmgr.ok("snapshot", "notes", branched, "one", "two\nlines", "--json").json["changed"] is False
    assert hvmgr.ok("snapshot", "notes", branched, "one").out == "two\nlines\n"


def test_delete_keeps_what_others_need(hvmgr, branched):
    one = hvmgr.ok("snapshot", "list", branched, "--json").json["snapshots"][0]["id"]
    told = hvmgr.ok("snapshot", "delete", branched, "one", "--json").json
    assert (told["changed"], told["deleted"]) == (True, [one])
    assert [row[1] for row in hvmgr.ok("snapshot", "list", branched).lines] == ["two", "three"]


def test_delete_of_a_subtree_needs_yes_without_a_terminal(hvmgr, branched, root):
    before = files_of(root)
    answer = hvmgr("snapshot", "delete", branched, "one", "--subtree")
    assert (answer.code, files_of(root)) == (2, before)
    assert "--yes" in answer.err
    assert len(hvmgr.ok("snapshot", "delete", branched, "one", "--subtree", "--yes", "--json").json["deleted"]) == 3


def test_delete_of_state_that_is_not_there_is_a_conflict(hvmgr, branched):
    assert hvmgr("snapshot", "delete", branched, "one", "--state-only").code == 4


def test_merge_with_nothing_to_do_changes_nothing(hvmgr, branched):
    assert hvmgr.ok("snapshot", "merge", branched, "--json").json == {"schema": 1, "changed": False}


@pytest.mark.parametrize("kind", ["production", "production-only"])
def test_vm_that_is_off_has_its_file_systems_at_rest(hvmgr, vm, kind):
    answer = hvmgr.ok("snapshot", "create", vm, "quiet", "--type", kind, "--json")
    assert (answer.json["snapshot"]["type"], answer.json["snapshot"]["has_state"]) == ("production", False)
    assert hvmgr.ok("snapshot", "list", vm).lines[0][2:4] == ["production", "off"]
    assert "production" in hvmgr.ok("snapshot", "show", vm, "quiet").out
    assert "production" in hvmgr.ok("snapshot", "tree", vm).out


def test_types_are_those_of_the_library():
    assert list(snapshot._TYPES) == list(SnapshotType)


def test_disk_only_is_shown_as_such(hvmgr, vm):
    hvmgr.ok("snapshot", "create", vm, "quick", "--type", "disk-only")
    assert hvmgr.ok("snapshot", "list", vm).lines[0][2:4] == ["disk-only", "disk-only"]


DRY = [
    ["snapshot", "create", "VM", "new"],
    ["snapshot", "rename", "VM", "one", "uno"],
    ["snapshot", "notes", "VM", "one", "other"],
    ["snapshot", "apply", "VM", "one"],
    ["snapshot", "apply", "VM", "one", "--snapshot-first"],
    ["snapshot", "revert", "VM"],
    ["snapshot", "undo", "VM"],
    ["snapshot", "delete", "VM", "one"],
    ["snapshot", "delete", "VM", "one", "--subtree"],
    ["snapshot", "merge", "VM"],
    ["vm", "start", "VM"],
    ["vm", "stop", "VM"],
    ["vm", "rename", "VM", "other"],
    ["vm", "delete", "VM"],
    ["vm", "delete", "VM", "--with-disks"],
    ["vm", "create", "other", "--disk", "8M", "--network", "none"],
]


def test_dry_run_changes_nothing(hvmgr, branched, root):
    before, listed = files_of(root), hvmgr.ok("vm", "list").out
    for words in DRY:
        arguments = [branched if word == "VM" else word for word in words]
        told = hvmgr.ok(*arguments, "--dry-run")
        assert told.out, words
        plan = hvmgr.ok("--dry-run", *arguments, "--json").json["plan"]
        if plan is None:
            assert told.out == "nothing to do\n"
        else:
            assert plan["subject"] in told.out, words
        assert files_of(root) == before, words
    assert hvmgr.ok("vm", "list").out == listed
    both = hvmgr.ok("snapshot", "apply", branched, "one", "--snapshot-first", "--dry-run", "--json").json
    assert (both["first"]["operation"], both["plan"]["operation"]) == ("snapshot create", "snapshot apply")
