"""Export and verify on the command line."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from hvmgr.operations.exchange import verification

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "commands.md").read_text("utf-8")


@pytest.fixture
def out(root):
    return root.parent / "out"


def test_export_says_where_it_is(hvmgr, branched, out):
    answer = hvmgr.ok("export", branched, out)
    assert answer.out == f"exported {branched} to {out / branched}\n"
    assert hvmgr.ok("verify", out).out == ""


def test_relative_destination_counts_from_where_the_user_is(hvmgr, vm, out, monkeypatch):
    out.mkdir()
    monkeypatch.chdir(out)
    assert hvmgr.ok("export", vm, "here", "--json").json["export"] == str(out / "here" / vm)


def test_dry_run_tells_the_steps_and_makes_nothing(hvmgr, branched, out):
    told = hvmgr.ok("export", branched, out, "--dry-run").out
    assert re.search(r"copy .*qcow2 ", told)
    assert "write SHA256SUMS" in told
    plan = hvmgr.ok("export", branched, out, "--dry-run", "--json").json["plan"]
    assert plan["switch"]["step"] == "PublishExport"
    assert not out.exists()


def test_second_export_is_a_conflict(hvmgr, vm, out):
    hvmgr.ok("export", vm, out)
    answer = hvmgr("export", vm, out)
    assert answer.code == 4
    assert "replaces nothing" in answer.err


@pytest.mark.parametrize(
    "options",
    [("--snapshot", "one"), ("--snapshots", "none", "--format", "raw"), ("--keep-snapshot", "two"), ("--config-only",)],
    ids=" ".join,
)
def test_options_reach_the_export(hvmgr, branched, out, options):
    hvmgr.ok("export", branched, out, *options)
    assert hvmgr("verify", out).code == 0


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--snapshot", "one", "--keep-snapshot", "two"), 2),
        (("--format", "qcow2"), 2),
        (("--format", "vmdk"), 2),
        (("--snapshot", "nobody"), 3),
        (("--exclude-disk", "vdz"), 3),
        (("--quiesce",), 4),
        (("--with-state",), 4),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(hvmgr, branched, out, options, code):
    answer = hvmgr("export", branched, out, *options)
    assert answer.code == code
    assert answer.err.count("\n") <= 2
    assert not out.exists()


def test_damage_is_named_and_ends_with_6(hvmgr, vm, out):
    folder = Path(hvmgr.ok("export", vm, out, "--json").json["export"])
    image = folder / "Virtual Hard Disks/hda.qcow2" if (folder / "Virtual Hard Disks/hda.qcow2").exists() else None
    image = image or next((folder / "Virtual Hard Disks").iterdir())
    os.chmod(image, 0o600)
    with image.open("r+b") as file:
        file.write(b"x")
    answer = hvmgr("verify", folder)
    assert answer.code == 6
    assert ["error", "wrong-hash", str(image)] in [line[:3] for line in answer.lines]
    document = hvmgr("verify", folder, "--json").json
    assert document["whole"] is False
    assert "wrong-hash" in {one["code"] for one in document["findings"]}


def test_verify_of_what_is_no_export(hvmgr, root):
    root.mkdir(exist_ok=True)
    assert hvmgr("verify", root).code == 3
    assert "is neither a folder nor an archive" in hvmgr("verify", __file__).err


def test_page_has_every_code_of_verify():
    section = re.search(r"^## verify.*?(?=^## )", PAGE, re.MULTILINE | re.DOTALL)[0]
    rows = re.findall(r"^\| `([a-z-]+)` \| (\w+) \| (.*) \|$", section, re.MULTILINE)
    assert rows == [(code, severity.value, meaning) for code, (severity, meaning) in verification.CODES.items()]


def test_archive_says_where_it_is(hvmgr, vm, root):
    file = root.parent / "web.tar.zst"
    assert hvmgr.ok("export", vm, "--archive", file, "--json").json["export"] == str(file)
    assert file.stat().st_size


@pytest.mark.parametrize(
    "words", [(), ("OUT", "--archive", "FILE"), ("--archive", "-", "--json"), ("--archive", "FILE", "--no-checksums")]
)
def test_either_a_folder_or_a_file(hvmgr, vm, out, words):
    named = {"OUT": str(out), "FILE": str(out) + ".tar.zst"}
    assert hvmgr("export", vm, *(named.get(word, word) for word in words)).code == 2
    assert not out.exists()
