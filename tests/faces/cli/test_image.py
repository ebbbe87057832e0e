"""``hvmgr image``: what is said, as which document, and with which exit code."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvmgr.storage import index, journal
from hvmgr.vhd.rules import RULES

pytestmark = pytest.mark.usefixtures("root")  # a libvirt that can be asked

MIB = 1 << 20
PAGE = (Path(__file__).resolve().parents[3] / "docs" / "vhd.md").read_text("utf-8")


def test_page_has_every_rule_with_its_severity():
    rows = [line.split(" | ")[:2] for line in PAGE.splitlines() if line.startswith("| F")]
    assert rows == [[f"| {code}", rule.severity.value] for code, rule in RULES.items()]


@pytest.fixture
def place(tmp_path):
    """A folder for image files."""
    folder = tmp_path / "files"
    folder.mkdir()
    return folder


@pytest.fixture
def pair(hvmgr, place):
    """A VHD and a child of it."""
    hvmgr.ok("image", "create", place / "base.vhd", "--size", "4M")
    hvmgr.ok("image", "create", place / "child.vhd", "--parent", place / "base.vhd")
    return place / "base.vhd", place / "child.vhd"


def test_create_says_what_it_made(hvmgr, place):
    told = hvmgr.ok("image", "create", place / "new.qcow2", "--size", "1G").out
    assert told == f"created {place / 'new.qcow2'} (dynamic qcow2, 1.0 GiB)\n"
    made = hvmgr.ok("image", "create", place / "new.vhd", "--size", "4M", "--fixed", "--json").json
    assert (made["changed"], made["image"]["type"], made["image"]["file_size"]) == (True, "fixed", 4 * MIB + 512)


def test_chain_is_drawn(hvmgr, pair):
    base, child = pair
    lines = hvmgr.ok("image", "info", child, "--chain").out.splitlines()
    assert lines[0].startswith(f"{child} (differencing vhd, 4.0 MiB")
    assert lines[1].startswith(f"└── {base} (dynamic vhd")
    document = hvmgr.ok("image", "info", child, "--chain", "--json").json
    assert [one["path"] for one in document["chain"]] == [str(child), str(base)]


def test_facts_of_an_image_are_lines_of_a_pipe(hvmgr, pair):
    base, child = pair
    lines = dict(line.split("\t", 1) for line in hvmgr.ok("image", "info", child).out.splitlines())
    assert (lines["Parent"], lines["Format"]) == (str(base), "vhd, differencing")
    assert "which stands on it" in hvmgr.ok("image", "info", base).out


def test_missing_parent_ends_the_drawing(hvmgr, pair):
    base, child = pair
    base.unlink()
    assert "└── missing: " in hvmgr.ok("image", "info", child, "--chain").out


def test_whole_way_from_a_child_to_one_image(hvmgr, place, pair):
    base, child = pair
    assert hvmgr.ok("image", "check", child, "--chain").out == ""
    assert hvmgr.ok("image", "convert", child, place / "whole.qcow2").out.startswith(f"converted {child} to ")
    assert hvmgr.ok("image", "merge", child).out == f"merged {child} into {base}\n"
    assert hvmgr.ok("image", "resize", base, "8M").out == f"{base} has {8 * MIB} bytes\n"
    assert hvmgr.ok("image", "resize", base, "8M", "--json").json["changed"] is False
    assert hvmgr.ok("image", "compact", base).out == f"{base} has nothing to give back\n"
    assert hvmgr.ok("image", "compact", base, "--json").json["changed"] is False
    assert not child.exists()


def test_reparent_says_what_proved_it(hvmgr, place, pair):
    base, child = pair
    hvmgr.ok("image", "convert", base, place / "copy.vhd")
    assert hvmgr.ok("image", "reparent", child, place / "copy.vhd", "--json").json["proof"] == "bytes"


def test_damaged_image_ends_with_6_and_can_be_repaired(hvmgr, pair):
    base, _ = pair
    with base.open("r+b") as file:
        file.seek(64)
        file.write(b"junk")
    answer = hvmgr("image", "check", base)
    assert answer.code == 6
    assert answer.lines[0][:3] == ["repairable", "F5", str(base)]
    assert "image check" in answer.err
    assert hvmgr("image", "convert", base, base.with_name("to.raw")).code == 6
    dry = hvmgr("image", "check", base, "--repair", "--dry-run")
    assert (dry.code, f"repair {base}" in dry.out) == (0, True)
    document = hvmgr.ok("image", "check", base, "--repair", "--json").json
    assert (document["sound"], document["changed"], document["repaired"][0]["code"]) == (True, True, "F5")


@pytest.mark.parametrize(
    ("words", "code", "what"),
    [
        (["create", "FILES/base.vhd", "--size", "4M"], 4, "exists already"),
        (["create", "FILES/a.vhd", "--size", "0"], 2, "0 bytes"),
        (["create", "FILES/a.vhd", "--size", "1000001"], 2, "sectors"),
        (["create", "FILES/a.vhd", "--size", "2041G"], 5, "at most"),
        (["create", "FILES/a.vhd"], 2, "needs a size"),
        (["create", "FILES/a.vhd", "--size", "huge"], 2, "not a size"),
        (["info", "FILES/none.vhd"], 3, "there is no"),
        (["info", "FILES"], 2, "folder"),
        (["convert", "FILES/child.vhd", "FILES/base.vhd"], 4, "exists already"),
        (["merge", "FILES/base.vhd"], 2, "no differencing image"),
        (["resize", "FILES/base.vhd", "8M"], 4, "child.vhd"),
        (["resize", "FILES/child.vhd", "8M"], 5, "differencing VHD"),
        (["reparent", "FILES/child.vhd", "FILES/child.vhd"], 4, "circle"),
    ],
)
def test_refusal_is_one_sentence_and_changes_nothing(hvmgr, place, pair, words, code, what):
    before = {file.name: file.read_bytes() for file in place.iterdir()}
    answer = hvmgr("image", *(word.replace("FILES", str(place)) for word in words))
    assert (answer.code, answer.out) == (code, "")
    assert what in answer.err.splitlines()[0]
    assert {file.name: file.read_bytes() for file in place.iterdir()} == before


@pytest.mark.parametrize(
    "words",
    [
        ["create", "FILES/a.vhd", "--size", "4M"],
        ["convert", "FILES/child.vhd", "FILES/a.raw"],
        ["merge", "FILES/child.vhd"],
        ["compact", "FILES/base.vhd"],
        ["reparent", "FILES/child.vhd", "FILES/base.vhd"],
    ],
)
def test_dry_run_shows_the_plan_and_changes_nothing(hvmgr, place, pair, words):
    before = {file.name: file.read_bytes() for file in place.iterdir()}
    said = [word.replace("FILES", str(place)) for word in words]
    document = hvmgr("image", *said, "--dry-run", "--json")
    assert document.code == 0
    assert document.json["plan"]["finish"]
    assert hvmgr("image", *said, "--dry-run").out.splitlines()[1].startswith("  1. ")
    assert {file.name: file.read_bytes() for file in place.iterdir()} == before


def test_image_of_a_vm_is_left_to_its_commands(hvmgr, vm, root):
    (image,) = (root / vm / "Virtual Hard Disks").iterdir()
    answer = hvmgr("image", "resize", image, "16M")
    assert answer.code == 4
    assert f"'{vm}'" in answer.err
    used = hvmgr.ok("image", "info", image, "--json").json["image"]["used_by"]
    assert used == [{"use": "off", "name": f"the VM '{vm}'", "vm": vm}]


def test_doctor_names_what_was_cut_off(hvmgr, pair):
    """A journal as a dead command leaves it; the next command on the image does what it says."""
    from hvmgr.model import image_plan
    from hvmgr.operations.images import changes

    base, child = pair
    plan = changes.plan_of("image compact", f"compaction of {base}", [image_plan.CompactImage(str(base), "vhd")])
    index.note_change(journal.beside(base))
    journal.begin(journal.beside(base), plan)
    found = [one for one in hvmgr("doctor", "--json").json["findings"] if one["code"] == "image-change-open"]
    assert [one["where"] for one in found] == [str(journal.beside(base))]
    assert hvmgr("image", "compact", base, "--dry-run").code == 4
    answer = hvmgr("image", "convert", child, child.with_name("whole.raw"))
    assert (answer.code, "completed what was cut off" in answer.err) == (0, True)
    assert not journal.beside(base).exists()
    assert index.open_changes() == []
