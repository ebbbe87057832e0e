"""``hvmgr wim``, ``image prepare`` and ``image generalize``: what is said, as which document, with which exit code."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("root")  # a libvirt that can be asked


@pytest.fixture
def place(tmp_path, require_program):
    """A folder with a tree of files, and a WIM of it."""
    for name in ("wimlib-imagex", "mkntfs", "sfdisk", "mke2fs", "debugfs"):
        require_program(name)
    (tmp_path / "tree" / "etc").mkdir(parents=True)
    (tmp_path / "tree" / "etc" / "machine-id").write_text("0123456789abcdef")
    (tmp_path / "data.raw").write_bytes(b"data".ljust(6 << 20, b"\0"))
    return tmp_path


@pytest.fixture
def wim(hvmgr, place):
    hvmgr.ok("wim", "capture", place / "tree", place / "a.wim", "--name", "One", "--description", "the first")
    return place / "a.wim"


def test_name_that_no_wim_can_hold_is_named(hvmgr, place):
    (place / "tree" / os.fsdecode(b"na\xefve")).touch()
    told = hvmgr("wim", "capture", place / "tree", place / "b.wim")
    assert (told.code, told.out) == (5, "")
    assert told.err.startswith(f"hvmgr: the name of {place}/tree/na")
    assert "wimlib" not in told.err
    assert not (place / "b.wim").exists()


def test_way_of_a_windows_disk(hvmgr, place, wim):
    disk = place / "os.vhd"
    hvmgr.ok("image", "create", disk, "--size", "16M")
    dry = hvmgr.ok("image", "prepare", disk, "--label", "Sys", "--dry-run").out
    assert "  1. write a partition table (GPT)\n  2. partition 1: ntfs 'Sys', 14 MiB\n" in dry
    assert hvmgr.ok("image", "prepare", disk, "--label", "Sys").out == f"prepared {disk} (ntfs 'Sys', 14 MiB)\n"
    dry = hvmgr.ok("wim", "apply", wim, disk, "--dry-run").out
    assert f"apply image 1 ('One') of {wim} to partition 1 (ntfs, 14 MiB)" in dry
    assert hvmgr.ok("wim", "apply", wim, disk).out == f"applied One to partition 1 of {disk}\n"
    told = hvmgr("wim", "apply", wim, disk, "--reformat")
    assert (told.code, "nobody is there to ask" in told.err) == (2, True)
    hvmgr.ok("wim", "apply", wim, disk, "--reformat", "--yes")
    told = hvmgr.ok("wim", "capture", disk, wim, "--append", "--name", "Two", "--partition", "1").out
    assert told.startswith(f"captured {disk} into {wim} (image 2, ")
    first, second = hvmgr.ok("wim", "list", wim).lines
    assert (first[0], first[1], first[3], first[6]) == ("1", "One", "1", "the first")
    assert second[:2] == ["2", "Two"]
    facts = dict(line for line in hvmgr.ok("wim", "info", wim, "--verify").lines if len(line) == 2)
    assert (facts["Images"], facts["Verified"]) == ("2", "every byte is what its hash says")


def test_way_of_a_linux_disk(hvmgr, place):
    disk = place / "root.qcow2"
    told = hvmgr.ok("wim", "apply", "--rootfs", place / "tree", disk, "--size", "16M", "--table", "mbr").out
    assert told == f"applied {place / 'tree'} to partition 1 of {disk}\n"
    assert "  1. empty /etc/machine-id (machine id)\n" in hvmgr.ok("image", "generalize", disk, "--dry-run").out
    assert hvmgr.ok("image", "generalize", disk).out == f"generalised {disk}: machine id\n"
    assert hvmgr.ok("image", "generalize", disk).out == f"{disk} is generalised already\n"
    assert hvmgr.ok("image", "generalize", disk, "--json").json["changed"] is False


def test_disk_of_a_vm_is_refused(hvmgr, place, wim):
    """Off as it is: its guest would find itself without its keys, or its data."""
    hvmgr.ok("wim", "apply", "--rootfs", place / "tree", place / "a.qcow2", "--size", "16M")
    hvmgr.ok("vm", "create", "user", "--disk", place / "a.qcow2", "--network", "none")
    (image,) = hvmgr.ok("vm", "show", "user", "--json").json["now"]["disks"].values()
    disk = Path(image)
    before = disk.read_bytes()
    for words in (
        ("image", "generalize", disk),
        ("image", "prepare", disk, "--force", "--yes"),
        ("wim", "apply", "--rootfs", place / "tree", disk, "--reformat", "--yes"),
    ):
        told = hvmgr(*words)
        assert (told.code, "is needed by the VM 'user'" in told.err) == (4, True), told
    assert disk.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "code", "what"),
    [
        (["image", "prepare", "FILES/none.vhd"], 3, "there is no"),
        (["image", "prepare", "FILES/a.wim", "--fixed"], 2, "for a new image"),
        (["image", "prepare", "FILES/data.raw"], 4, "holds data"),
        (["image", "prepare", "FILES/a.wim", "--force"], 2, "nobody is there to ask"),
        (["image", "prepare", "FILES/new.vhd", "--size", "1M"], 2, "too small"),
        (["image", "prepare", "FILES/new", "--size", "16M"], 2, "says no format"),
        (["image", "generalize", "FILES/tree"], 2, "is a folder"),
        (["wim", "info", "FILES/tree/etc/machine-id"], 6, "is no WIM file"),
        (["wim", "info", "FILES/none.wim"], 3, "there is no"),
        (["wim", "info", "FILES/tree"], 2, "is a folder"),
        (["wim", "capture", "FILES/none", "FILES/b.wim"], 3, "there is no"),
        (["wim", "capture", "FILES/tree", "FILES/a.wim"], 4, "exists already"),
        (["wim", "capture", "FILES/tree", "FILES/none/b.wim"], 3, "there is no folder"),
        (["wim", "capture", "FILES/tree", "FILES/none.wim", "--append"], 3, "there is no"),
        (["wim", "capture", "FILES/tree", "FILES/b.wim", "--partition", "1"], 2, "has no partitions"),
        (["wim", "capture", "FILES/a.wim", "FILES/b.wim"], 3, "no volume with ntfs"),
        (["wim", "apply", "FILES/a.wim", "FILES/none.vhd"], 3, "there is no"),
        (["wim", "apply", "FILES/a.wim", "FILES/tree"], 2, "is a folder"),
        (["wim", "apply", "FILES/a.wim", "FILES/b.vhd", "--esp", "100M"], 2, "for a new disk"),
        (["wim", "apply", "FILES/a.wim", "FILES/b.vhd", "--size", "16M", "--partition", "1"], 2, "no partitions yet"),
        (["wim", "apply", "FILES/a.wim", "FILES/b.vhd", "--size", "16M", "--image", "9"], 3, "no image '9'"),
        (["wim", "apply", "FILES/a.wim", "FILES/a.wim", "--rootfs"], 6, "no tar archive"),
    ],
)
def test_refusal_is_one_sentence_and_changes_nothing(hvmgr, place, wim, words, code, what):
    before = {str(one): one.read_bytes() for one in place.rglob("*") if one.is_file()}
    told = hvmgr(*(word.replace("FILES", str(place)) for word in words))
    assert (told.code, what in told.err) == (code, True), told
    assert told.err.count("hvmgr: ") == 1
    assert {str(one): one.read_bytes() for one in place.rglob("*") if one.is_file()} == before
    assert wim.exists()


def test_missing_program_is_named_with_its_package(hvmgr, place, monkeypatch):
    monkeypatch.setattr("hvmgr.host.process._SYSTEM_FOLDERS", ())
    monkeypatch.setenv("PATH", str(place))
    for words, package in (
        (("wim", "info", place / "a.wim"), "wimtools"),
        (("image", "prepare", place / "a.vhd", "--size", "16M"), "fdisk"),
    ):
        told = hvmgr(*words)
        assert (told.code, f"apt install {package}" in told.err) == (5, True), told
