"""``image prepare``: what other programs find on the disk, what is refused, and what a failure or a death leaves."""

from __future__ import annotations

import contextlib
import json
import struct
import subprocess

import pytest

import hvmgr
from hvmgr import errors
from hvmgr.host import formatting
from hvmgr.model.disk_layout import FileSystem, LayoutWish, TableKind
from hvmgr.storage import partitions as storage_partitions
from hvmgr.storage.filesystems import opening, signatures, window
from tests.operations.images.test_crash import killed

MIB = 1 << 20
ESP, BASIC = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B", "EBD0A0A2-B9E5-4433-87C0-68B6B72699C7"


@pytest.fixture(autouse=True)
def _programs(require_program):
    for name in ("sfdisk", "mkntfs", "ntfsls", "mkfs.fat", "fsck.fat", "mke2fs", "e2fsck"):
        require_program(name)


def run(*words):
    return subprocess.run(list(map(str, words)), check=True, capture_output=True, text=True, timeout=60).stdout


def partitions(folder, name):
    """What sfdisk finds on the disk, and each partition's bytes in a file of its own."""
    whole = folder.path / "whole"
    whole.write_bytes(folder.shown(name))
    table = json.loads(run("sfdisk", "-J", whole))["partitiontable"]
    data = whole.read_bytes()
    whole.unlink()
    files = []
    for number, one in enumerate(table.get("partitions", ()), 1):
        file = folder.path / f"volume{number}"
        file.write_bytes(data[one["start"] * 512 :][: one["size"] * 512])
        files.append(file)
    return table, files


@pytest.mark.parametrize(("name", "fixed"), [("a.vhd", False), ("a.vhd", True), ("a.vhdx", False)])
def test_windows_disk_is_what_other_programs_expect(folder, name, fixed):
    folder.images.create(folder / name, 64 * MIB, hvmgr.ImageOptions(fixed=fixed))
    wish = LayoutWish(FileSystem.NTFS, label="System", esp=34 * MIB, msr=True)
    layout = folder.images.prepare(folder / name, wish)
    table, (esp, _, main) = partitions(folder, name)
    assert table["label"] == "gpt"
    assert [one["type"] for one in table["partitions"]][::2] == [ESP, BASIC]
    assert [one["start"] * 512 for one in table["partitions"]] == [one.start for one in layout.volumes]
    run("fsck.fat", "-n", esp)
    assert run("ntfsls", "-f", main) == ""
    assert "System" in run("ntfslabel", "-f", main)
    sectors, heads, hidden = struct.unpack_from("<HHI", main.read_bytes(), 24)
    assert (sectors, heads, hidden * 512) == (63, 255, layout.main.start)  # what Windows' boot code reads
    assert folder.names() == {name, "volume1", "volume2", "volume3"}


@pytest.mark.parametrize("name", ["a.qcow2", "a.raw"])
def test_linux_disk_has_an_mbr_and_a_sound_volume(folder, name):
    folder.images.create(folder / name, 32 * MIB)
    folder.images.prepare(folder / name, LayoutWish(FileSystem.EXT4, TableKind.MBR, "root"))
    table, (main,) = partitions(folder, name)
    assert (table["label"], table["partitions"][0]["type"], table["partitions"][0]["bootable"]) == ("dos", "83", True)
    run("e2fsck", "-f", "-n", main)
    assert run("e2label", main) == "root\n"


@pytest.mark.parametrize(
    ("file_system", "size", "probe"),
    [
        pytest.param(FileSystem.XFS, 320, ("xfs_repair", "-n", "-f"), id="xfs"),
        pytest.param(FileSystem.BTRFS, 160, ("btrfs", "check", "--readonly"), id="btrfs"),
    ],
)
def test_volume_of_another_file_system_is_sound_and_readable(folder, require_program, file_system, size, probe):
    """As the file system's own check sees it, as sfdisk does, and as our reader does."""
    for program in (f"mkfs.{file_system.value}", probe[0]):
        require_program(program)
    folder.images.prepare(folder / "a.raw", LayoutWish(file_system, TableKind.NONE, "data-1"), size=size * MIB)
    run(*probe, folder / "a.raw")
    layout = folder.images.prepare(folder / "b.raw", LayoutWish(file_system, label="data-1"), size=size * MIB)
    (told,) = json.loads(run("sfdisk", "-J", folder / "b.raw"))["partitiontable"]["partitions"]
    assert (told["type"], told["start"] * 512) == ("0FC63DAF-8483-4772-8E79-3D69D8477DE4", layout.main.start)
    for name, start in (("a.raw", 0), ("b.raw", layout.main.start)):
        with storage_partitions.File(folder / name) as disk:
            volume = window.Window(disk, start, disk.size - start)
            seen = signatures.recognise(volume)
            assert (seen.kind.value, seen.label) == (file_system.value, "data-1")
            reader = opening.open_reader(seen.kind, volume)
            assert [one for one, _ in reader.names(reader.root()) if one not in {b".", b".."}] == []


@pytest.mark.parametrize(("file_system", "size"), [(FileSystem.XFS, 299), (FileSystem.BTRFS, 127)])
def test_disk_that_is_too_small_for_another_file_system_is_one_sentence(folder, file_system, size):
    with pytest.raises(errors.UsageError, match="too small"):
        folder.images.prepare(folder / "a.vhd", LayoutWish(file_system), size=size * MIB)
    with pytest.raises(errors.UsageError, match="too long"):
        folder.images.prepare(folder / "a.vhd", LayoutWish(file_system, label="l" * 256), size=400 * MIB)
    assert folder.names() == set()


def test_new_image_is_made_whole(folder):
    layout = folder.images.prepare(folder / "new.vhd", size=32 * MIB)
    _, (main,) = partitions(folder, "new.vhd")
    assert layout.main.file_system is FileSystem.NTFS
    assert run("ntfsls", "-f", main) == ""
    with pytest.raises(errors.Conflict, match="exists already"):
        folder.images.prepare(folder / "new.vhd", size=32 * MIB)


def test_volume_without_a_table_covers_the_disk(folder):
    folder.images.prepare(folder / "a.raw", LayoutWish(FileSystem.EXT4, TableKind.NONE), size=16 * MIB)
    run("e2fsck", "-f", "-n", folder / "a.raw")


def test_data_is_kept_unless_it_is_given_up(folder):
    folder.raw("a.raw", size=16 * MIB)
    folder.images.convert(folder / "a.raw", folder / "a.vhd")
    before = folder.bytes_of_files()
    with pytest.raises(errors.Conflict, match="holds data"):
        folder.images.prepare(folder / "a.vhd")
    assert folder.bytes_of_files() == before
    folder.images.prepare(folder / "a.vhd", force=True)
    blank = folder / "blank.vhd"
    folder.images.prepare(blank, size=16 * MIB)
    old, new = folder.shown("a.vhd"), folder.shown("blank.vhd")
    changed = sum(old[at : at + 4096] != new[at : at + 4096] for at in range(0, len(old), 4096))
    assert changed < 20  # ids and times: nothing is left of what was there


@pytest.mark.parametrize(
    ("wish", "size", "error", "what"),
    [
        (LayoutWish(FileSystem.EXT4, label="seventeen letters"), 16, errors.UsageError, "too long"),
        (LayoutWish(FileSystem.NTFS, esp=MIB), 64, errors.UsageError, "too small for FAT32"),
        (LayoutWish(FileSystem.NTFS, esp=34 * MIB), 36, errors.UsageError, "too small for that"),
        (LayoutWish(FileSystem.NTFS, TableKind.MBR, msr=True), 64, errors.UsageError, "only a GPT"),
        (LayoutWish(FileSystem.NTFS, TableKind.NONE, esp=34 * MIB), 64, errors.UsageError, "no further partitions"),
        (LayoutWish(FileSystem.NTFS, TableKind.MBR), 3 << 20, errors.Unsupported, "an MBR reaches"),
    ],
)
def test_layout_that_does_not_fit_is_one_sentence(folder, wish, size, error, what):
    folder.images.create(folder / "a.qcow2", size * MIB)
    before = folder.bytes_of_files()
    with pytest.raises(error, match=what):
        folder.images.prepare(folder / "a.qcow2", wish)
    assert folder.bytes_of_files() == before


@pytest.mark.parametrize("names", [("a.vhd", "b.vhd"), ("a.qcow2", "b.qcow2")])
def test_image_with_a_child_and_the_child_are_refused(folder, names):
    base, child = names
    folder.images.create(folder / base, 16 * MIB)
    folder.images.create(folder / child, options=hvmgr.ImageOptions(parent=folder / base))
    before = folder.bytes_of_files()
    for name, what in ((base, f"needed by .*{child}"), (child, "differencing image")):
        for force in (False, True):
            with pytest.raises(errors.Conflict, match=what):
                folder.images.prepare(folder / name, force=force)
    assert folder.bytes_of_files() == before


def test_failure_in_the_middle_leaves_the_image_blank(folder, monkeypatch):
    folder.images.create(folder / "a.vhd", 32 * MIB)
    before = folder.bytes_of_files()

    def fail(file, volume):
        file.write_bytes(b"half of a file system")
        raise errors.HostFailed("the program failed")

    monkeypatch.setattr(formatting, "make", fail)
    with pytest.raises(errors.HostFailed):
        folder.images.prepare(folder / "a.vhd")
    assert folder.bytes_of_files() == before


def test_image_that_another_program_writes_meanwhile_is_left_to_it(folder, monkeypatch):
    folder.images.create(folder / "a.raw", 32 * MIB)
    real = formatting.make

    def interfere(file, volume):
        real(file, volume)
        with (folder / "a.raw").open("r+b") as other:
            other.write(b"theirs")

    monkeypatch.setattr(formatting, "make", interfere)
    with pytest.raises(errors.Conflict, match="changed by another program"):
        folder.images.prepare(folder / "a.raw")
    assert (folder / "a.raw").read_bytes() == b"theirs".ljust(32 * MIB, b"\0")
    assert folder.names() == {"a.raw"}


@pytest.mark.parametrize("name", ["a.vhd", "a.raw"])
def test_killed_anywhere_it_is_blank_or_completed(folder, name):
    """What the next command finds: a blank disk, or after that command the whole one, never a part."""
    size, blank, seen, number = 16 * MIB, bytes(16 * MIB), set(), 1
    goal = LayoutWish(FileSystem.EXT4, TableKind.MBR)
    while True:
        for one in folder.names():
            with contextlib.suppress(IsADirectoryError):
                (folder / one).unlink()
        folder.images.create(folder / name, size)
        came_through = not killed(lambda: folder.images.prepare(folder / name, goal), number)
        done = folder.images.compact if name == "a.raw" else folder.images.check
        done(folder / name, **({"repair": True} if name == "a.vhd" else {}))
        shown = folder.shown(name)
        if shown == blank:
            seen.add("blank")
            folder.images.prepare(folder / name, goal)  # what the dead one left is in nobody's way
            assert folder.names() == {name}
        else:
            seen.add("whole")
            _, (main,) = partitions(folder, name)
            run("e2fsck", "-f", "-n", main)
            main.unlink()
        if came_through:
            break
        number += 5
    assert seen == {"blank", "whole"}
    assert folder.names() == {name}
