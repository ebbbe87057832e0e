"""``vm release`` and ``snapshot merge --image``: what they say, ask and refuse."""

from __future__ import annotations

import subprocess

import pytest

from hvmgr.storage import images
from tests.faces.cli.conftest import files_of
from tests.faces.cli.test_terminal import QUESTION, Terminal

LOST = "snapshot 'two' is no snapshot any more: it is on another branch than the present"


@pytest.fixture
def far(branched, monkeypatch):
    """The VM, for commands that have to do without libvirt: this process holds the embedded driver."""
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", "qemu+unix:///system?socket=/nowhere")
    return branched


def test_release_says_what_libvirt_has_no_words_for_and_what_is_left(hvmgr, branched):
    answer = hvmgr("vm", "release", branched, "--json")
    assert answer.code == 0
    assert LOST in answer.err
    told = answer.json
    assert told["changed"] is True
    assert told["released"]["name"] == branched
    assert [one["name"] for one in told["snapshots"]] == ["one", "three"]
    assert LOST in told["lost"]
    assert {"image of snapshot 'two'", "image of the undo slot"} <= {one["what"] for one in told["left"]}
    assert hvmgr("vm", "show", branched).code == 3


def test_release_in_a_pipe_names_every_file_that_is_left(hvmgr, branched):
    answer = hvmgr("vm", "release", branched, "--flatten")
    assert answer.code == 0
    assert answer.out.startswith(f"released {branched}; left /")
    assert "(image of snapshot 'one')" in answer.out


def test_release_of_a_line_says_nothing_more(hvmgr, vm, root):
    hvmgr.ok("snapshot", "create", vm, "one")
    assert hvmgr.ok("vm", "release", vm).out == (
        f"released {vm}; libvirt has 1 snapshot of it; its files stay in {root / vm}, and to take it back: "
        f"hvmgr vm adopt {vm} --home FOLDER\n"
    )
    answer = hvmgr("vm", "adopt", vm)
    assert (answer.code, f"hvmgr vm adopt '{vm}' --home FOLDER" in answer.err) == (4, True)
    assert hvmgr("vm", "adopt", vm, "--home", root / "again").code == 0
    hvmgr.ok("vm", "release", vm)
    (root / vm / "Virtual Machines" / "NVRAM of a VM that was started").mkdir(parents=True, exist_ok=True)
    assert vm not in hvmgr("doctor").out


def test_dry_run_shows_the_plan_and_changes_nothing(hvmgr, branched, root):
    before = files_of(root)
    answer = hvmgr("vm", "release", branched, "--dry-run")
    assert answer.code == 0
    assert LOST in answer.err
    assert "give libvirt a note of the snapshot 'one'" in answer.out
    assert "define the configuration without hvmgr's part in libvirt" in answer.out
    assert files_of(root) == before


def test_release_is_asked_on_a_terminal(far, root):
    before = files_of(root)
    terminal = Terminal("vm", "release", far)
    terminal.until(QUESTION)
    assert LOST in terminal.said
    terminal.answer("n\n")
    assert terminal.end() == 130
    assert files_of(root) == before


def test_release_that_loses_nothing_asks_nothing(hvmgr, vm, monkeypatch):
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", "qemu+unix:///system?socket=/nowhere")
    terminal = Terminal("vm", "release", vm)
    assert terminal.end() == 8  # as far as libvirt, which is out of reach
    assert QUESTION not in terminal.said


def test_flatten_of_a_running_vm_is_refused_with_the_line(hvmgr, branched):
    hvmgr.ok("vm", "start", branched)
    answer = hvmgr("vm", "release", branched, "--flatten")
    assert answer.code == 4
    assert f"hvmgr vm stop {branched}" in answer.err
    assert hvmgr("vm", "show", branched).code == 0


@pytest.fixture
def inside(hvmgr, vm, root):
    """A VM of libvirt's own, released without a snapshot, with two inside its image: its name and the image."""
    image = next(root.rglob("Virtual Hard Disks/*.qcow2"))
    hvmgr.ok("vm", "release", vm)
    for name in ("one", "two"):
        subprocess.run(["qemu-img", "snapshot", "-c", name, image], check=True, timeout=60)
    return vm, image


def test_dropping_what_is_inside_needs_yes_where_nobody_can_be_asked(hvmgr, inside, root):
    vm, image = inside
    before = image.read_bytes()
    home = ("--home", root.parent / "again")
    answer = hvmgr("vm", "adopt", vm, "--drop-internal", *home)
    assert (answer.code, answer.out) == (2, "")
    assert "give --yes" in answer.err
    assert image.read_bytes() == before
    assert hvmgr("vm", "adopt", vm, "--drop-internal", *home, "--yes").code == 0
    assert [one.name for one in images.internal_snapshots(image)] == []
    assert hvmgr.ok("snapshot", "list", vm).out == ""


def test_converting_what_is_inside_makes_snapshots(hvmgr, inside, root):
    vm, image = inside
    home = ("--home", root.parent / "again")
    assert hvmgr("vm", "adopt", vm, "--convert-internal", "--drop-internal", *home).code == 2
    refused = hvmgr("vm", "adopt", vm, *home)
    assert refused.code == 5
    assert "--convert-internal" in refused.err
    assert hvmgr("vm", "adopt", vm, "--convert-internal", *home).code == 0
    assert [row[1] for row in hvmgr.ok("snapshot", "list", vm).lines] == ["one", "two"]
    assert images.internal_snapshots(image) == ()


def test_merge_by_name_refuses_in_one_sentence(hvmgr, branched, root, tmp_path):
    before = files_of(root)
    base = next(root.rglob("Virtual Hard Disks/*.qcow2"))
    ours = next(root.rglob("Snapshots/*/*.qcow2"))
    for path, code, words in (
        (tmp_path / "none.qcow2", 3, "is no image of this VM"),
        (base, 4, "is a base"),
        (ours, 2, "is hvmgr's own"),
    ):
        answer = hvmgr("snapshot", "merge", branched, "--image", path)
        assert (answer.code, answer.out) == (code, "")
        assert words in answer.err
    assert files_of(root) == before
