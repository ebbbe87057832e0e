"""Resize, compact, reparent, check, info: what is changed is exactly what was asked for, and a refusal changes nothing."""

from __future__ import annotations

import shutil
import struct
import subprocess
import uuid
import zlib

import pytest

from hvmgr import ImageOptions, errors, vhd
from hvmgr.storage import partitions

MIB = 1 << 20
ALL = ["vhd", "fixed.vhd", "qcow2", "raw"]


def mbr(size, *parts):
    """A disk with an MBR; parts are (first sector, sectors)."""
    data = bytearray(size)
    for number, (start, count) in enumerate(parts):
        struct.pack_into("<B3sB3sII", data, 446 + 16 * number, 0, b"", 0x83, b"", start, count)
        data[start * 512 : start * 512 + 3] = b"abc"
    data[510:512] = b"\x55\xaa"
    return bytes(data)


def gpt(size, *parts):
    """A disk with both copies of a GPT; parts are (first sector, last sector)."""
    data = bytearray(mbr(size))
    struct.pack_into("<B3sB3sII", data, 446, 0, b"", 0xEE, b"", 1, size // 512 - 1)
    linux = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4").bytes_le
    table = b"".join(struct.pack("<16s16sQQQ72s", linux, uuid.uuid4().bytes_le, *part, 0, b"") for part in parts)
    table, end, guid = table.ljust(128 * 128, b"\0"), size // 512 - 1, uuid.uuid4().bytes_le
    for own, other, start in ((1, end, 2), (end, 1, end - 32)):
        header = bytearray(
            struct.pack("<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, 0, 0, own, other, 34, end - 33, guid, start, 128,
                        128, zlib.crc32(table))
        )  # fmt: skip
        struct.pack_into("<I", header, 16, zlib.crc32(header))
        data[own * 512 : own * 512 + 92] = header
        data[start * 512 : start * 512 + len(table)] = table
    return bytes(data)


class Memory:
    """A disk for the reader of partition tables."""

    def __init__(self, data):
        self.data, self.size = data, len(data)

    def read_into(self, offset, buffer):
        buffer[:] = self.data[offset : offset + len(buffer)]


def put(folder, data, name):
    """An image of the kind that its name says, with these bytes as its disk."""
    (folder / "content.bin").write_bytes(data)
    source = ImageOptions(fixed="fixed" in name, source_format=None)
    if name.endswith("raw"):
        (folder / "content.bin").rename(folder / name)
    else:
        folder.images.convert(folder / "content.bin", folder / name, source)
        (folder / "content.bin").unlink()
    return folder / name


@pytest.mark.parametrize("suffix", ALL)
class TestResize:
    def test_what_a_disk_grows_by_is_zeros(self, folder, suffix):
        path = put(folder, mbr(4 * MIB, (64, 512)), f"disk.{suffix}")
        shown = folder.shown(path.name)
        assert folder.images.resize(path, 9 * MIB)
        assert folder.shown(path.name) == shown + bytes(5 * MIB)
        assert not folder.images.resize(path, 9 * MIB)
        assert folder.images.check(path).is_sound

    def test_partitions_say_how_small_a_disk_may_be(self, folder, suffix):
        data = mbr(8 * MIB, (64, 512), (2048, 6144))
        path = put(folder, data, f"disk.{suffix}")
        before = folder.bytes_of_files()
        with pytest.raises(errors.Conflict, match="last partition ends"):
            folder.images.resize(path, 4 * MIB - 512, shrink=True)
        with pytest.raises(errors.UsageError, match="less than"):
            folder.images.resize(path, 4 * MIB)
        assert folder.bytes_of_files() == before
        assert folder.images.resize(path, 4 * MIB, shrink=True)
        assert folder.shown(path.name) == data[: 4 * MIB]

    def test_second_copy_of_a_gpt_moves_to_the_new_end(self, folder, suffix):
        path = put(folder, gpt(8 * MIB, (64, 4095)), f"disk.{suffix}")
        folder.images.resize(path, 4 * MIB, shrink=True)
        table = partitions.read(Memory(folder.shown(path.name)))
        assert (table.fault, table.partitions[0].end) == (None, 2 * MIB)


def test_file_system_on_the_whole_disk_is_not_cut(folder):
    path = put(folder, b"no table" * (MIB // 2), "disk.raw")
    with pytest.raises(errors.Conflict, match="no partition table"):
        folder.images.resize(path, 2 * MIB, shrink=True)
    assert path.stat().st_size == 4 * MIB


@pytest.mark.parametrize("fmt", ["vhd", "qcow2"])
def test_image_with_children_keeps_its_size(folder, fmt):
    folder.chain(f"a.{fmt}", f"b.{fmt}")
    before = folder.bytes_of_files()
    with pytest.raises(errors.Conflict, match=rf"b\.{fmt}"):
        folder.images.resize(folder / f"a.{fmt}", 8 * MIB)
    assert folder.bytes_of_files() == before


@pytest.mark.parametrize(
    ("name", "size", "error"),
    [
        ("child.avhd", 8 * MIB, errors.Unsupported),
        ("a.vhd", 0, errors.UsageError),
        ("a.vhd", MIB + 1, errors.UsageError),
        ("a.vhd", 2041 << 30, errors.Unsupported),
        ("a.vhdx", 8 * MIB, errors.Unsupported),
    ],
)
def test_resize_that_cannot_be_is_refused(folder, name, size, error):
    folder.images.create(folder / "a.vhdx", 4 * MIB)
    folder.images.create(folder / "a.vhd", 4 * MIB)
    folder.images.create(folder / "child.avhd", options=ImageOptions(parent=folder / "a.vhd"))
    before = folder.bytes_of_files()
    with pytest.raises(error):
        folder.images.resize(folder / name, size)
    assert folder.bytes_of_files() == before


@pytest.mark.parametrize("suffix", ["vhd", "qcow2", "vhdx", "raw"])
def test_compact_gives_back_what_became_zeros(folder, suffix):
    size = 80 * MIB if suffix == "vhdx" else 8 * MIB
    path = put(folder, b"x" * size, f"disk.{suffix}")
    driver = {"vhd": "vpc"}.get(suffix, suffix)
    zeros = ["qemu-io", "-f", driver, "-c", f"write -P 0 0 {size // 2}", path]
    subprocess.run(zeros, check=True, capture_output=True, timeout=60)
    freed = folder.images.compact(path)
    assert freed >= size // 4
    assert folder.shown(path.name) == bytes(size // 2) + b"x" * (size // 2)
    assert folder.images.check(path).is_sound


def test_compact_of_a_child_keeps_the_zeros_that_hide_its_parent(folder):
    for fmt in ("vhd", "qcow2"):
        put(folder, b"x" * 4 * MIB, f"a.{fmt}")
        (folder / "new.raw").write_bytes(bytes(2 * MIB) + b"x" * 2 * MIB)
        folder.images.convert(folder / "new.raw", folder / f"b.{fmt}", ImageOptions(parent=folder / f"a.{fmt}"))
        folder.images.compact(folder / f"b.{fmt}")
        assert folder.shown(f"b.{fmt}") == (folder / "new.raw").read_bytes()


def test_fixed_vhd_is_not_compacted(folder):
    folder.images.create(folder / "a.vhd", 3 * MIB, ImageOptions(fixed=True))
    with pytest.raises(errors.Unsupported, match="fixed"):
        folder.images.compact(folder / "a.vhd")


class TestReparent:
    @pytest.mark.parametrize("fmt", ["vhd", "qcow2"])
    def test_same_bytes_prove_another_parent(self, folder, fmt):
        shown = folder.chain(f"a.{fmt}", f"b.{fmt}")
        folder.images.convert(folder / f"a.{fmt}", folder / f"other.{fmt}")
        assert folder.images.reparent(folder / f"b.{fmt}", folder / f"other.{fmt}") == "bytes"
        assert folder.images.info(folder / f"b.{fmt}").parent.path == folder / f"other.{fmt}"
        (folder / f"a.{fmt}").unlink()
        assert folder.shown(f"b.{fmt}") == shown[1]

    @pytest.mark.parametrize("fmt", ["vhd", "qcow2"])
    def test_other_bytes_are_a_conflict(self, folder, fmt):
        folder.chain(f"a.{fmt}", f"b.{fmt}")
        folder.images.create(folder / f"other.{fmt}", 4 * MIB)
        before = folder.bytes_of_files()
        with pytest.raises(errors.Conflict, match="other bytes"):
            folder.images.reparent(folder / f"b.{fmt}", folder / f"other.{fmt}")
        assert folder.bytes_of_files() == before
        assert folder.images.reparent(folder / f"b.{fmt}", folder / f"other.{fmt}", ignore_id=True) == "none"

    def test_id_decides_where_nothing_can_be_compared(self, folder):
        shown = folder.chain("a.vhd", "b.avhd")
        (folder / "moved").mkdir()
        (folder / "a.vhd").rename(folder / "moved" / "renamed.vhd")
        assert folder.images.reparent(folder / "b.avhd", folder / "moved" / "renamed.vhd") == "id"
        folder.images.convert(folder / "b.avhd", folder / "to.raw", ImageOptions(folders=(folder / "moved",)))
        assert (folder / "to.raw").read_bytes() == shown[1]
        (folder / "moved" / "renamed.vhd").unlink()
        folder.images.create(folder / "other.vhd", 4 * MIB)
        with pytest.raises(errors.Conflict, match="another id"):
            folder.images.reparent(folder / "b.avhd", folder / "other.vhd")

    @pytest.mark.parametrize(
        ("child", "parent", "error"),
        [
            ("b.avhd", "disk.raw", errors.Unsupported),
            ("b.avhd", "q.qcow2", errors.Unsupported),
            ("a.vhd", "b.avhd", errors.UsageError),
            ("b.avhd", "c.avhd", errors.Conflict),
            ("b.avhd", "small.vhd", errors.Conflict),
        ],
    )
    def test_impossible_parent_is_refused(self, folder, child, parent, error):
        folder.chain("a.vhd", "b.avhd", "c.avhd")
        folder.raw("disk.raw")
        folder.images.create(folder / "q.qcow2", 4 * MIB)
        folder.images.create(folder / "small.vhd", 3 * MIB)
        before = folder.bytes_of_files()
        with pytest.raises(error):
            folder.images.reparent(folder / child, folder / parent, ignore_id=True)
        assert folder.bytes_of_files() == before


class TestCheck:
    def test_faults_of_a_vhd_are_repaired_when_asked(self, folder):
        shown = folder.chain("a.vhd")[0]
        with (folder / "a.vhd").open("r+b") as file:
            file.seek(70)
            file.write(b"junk")
        found = folder.images.check(folder / "a.vhd")
        assert [(one.code, one.severity) for one in found.faults if one.severity != "warning"] == [("F5", "repairable")]
        assert not found.is_sound
        with pytest.raises(errors.Corrupt) as refused:
            folder.images.convert(folder / "a.vhd", folder / "to.raw")
        assert "image check --repair" in refused.value.hint
        mended = folder.images.check(folder / "a.vhd", repair=True)
        assert mended.is_sound
        assert [one.code for one in mended.repaired] == ["F5"]
        assert folder.shown("a.vhd") == shown

    def test_parents_are_checked_with_their_child(self, folder):
        folder.chain("a.vhd", "b.avhd")
        (folder / "a.vhd").unlink()
        assert folder.images.check(folder / "b.avhd").is_sound
        found = folder.images.check(folder / "b.avhd", chain=True)
        assert [one.code for one in found.faults if one.severity == "error"] == ["F42"]

    def test_damaged_qcow2_is_told(self, folder):
        folder.raw("a.raw")
        folder.images.convert(folder / "a.raw", folder / "a.qcow2")
        with (folder / "a.qcow2").open("r+b") as file:
            file.seek(65536)
            file.write(bytes(4096))
        assert not folder.images.check(folder / "a.qcow2").is_sound


class TestInfo:
    def test_chain_is_told_from_the_top(self, folder):
        folder.chain("a.vhd", "b.avhd", "c.avhd")
        told = folder.images.chain(folder / "c.avhd")
        assert [one.path.name for one in told] == ["c.avhd", "b.avhd", "a.vhd"]
        assert [user.name for user in told[2].used_by] == [str(folder / "b.avhd")]
        assert told[0].parent.id == told[1].id

    def test_missing_parent_is_part_of_the_answer(self, folder):
        folder.chain("a.vhd", "b.avhd")
        (folder / "a.vhd").unlink()
        (told,) = folder.images.chain(folder / "b.avhd")
        assert told.parent.path is None
        assert "a.vhd" in told.parent.problem
        assert ("name", "a.vhd") in told.parent.names

    def test_circle_is_corrupt(self, folder):
        folder.images.create(folder / "a.qcow2", MIB)
        folder.images.create(folder / "b.qcow2", options=ImageOptions(parent=folder / "a.qcow2"))
        rebase = ["qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "b.qcow2", "-F", "qcow2", folder / "a.qcow2"]
        subprocess.run(rebase, check=True, capture_output=True, timeout=60)
        with pytest.raises(errors.Corrupt, match="circle"):
            folder.images.chain(folder / "b.qcow2")

    def test_content_says_what_a_file_is(self, folder):
        folder.images.create(folder / "a.vhd", 3 * MIB)
        shutil.copy(folder / "a.vhd", folder / "a.qcow2")
        assert folder.images.info(folder / "a.qcow2").format == "vhd"

    def test_fixed_vhd_is_no_raw_disk(self, folder):
        folder.images.create(folder / "a.vhd", 3 * MIB, ImageOptions(fixed=True))
        told = folder.images.info(folder / "a.vhd")
        assert (told.format, told.type, told.size, told.file_size) == ("vhd", "fixed", 3 * MIB, 3 * MIB + 512)
        assert vhd.identify(folder / "a.vhd") is vhd.Kind.FIXED
