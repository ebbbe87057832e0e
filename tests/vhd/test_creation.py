"""New disks: as Windows writes them, complete or not there, and never what a VHD cannot be."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from array import array
from datetime import UTC, datetime
from pathlib import Path

import pytest

from hvmgr import errors
from hvmgr.vhd import format
from hvmgr.vhd.chain import open_chain
from hvmgr.vhd.creation import create, describe_parent, write_image
from hvmgr.vhd.format import Kind
from hvmgr.vhd.image import open_image
from hvmgr.vhd.reshaping import compact, merge, resize
from hvmgr.vhd.source import RawSource, read
from hvmgr.vhd.table import Table
from tests.vhd.disks import KIB, MIB, Memory, content, make_chain, scribble

GIB = 1 << 30


@pytest.mark.parametrize("kind", [Kind.FIXED, Kind.DYNAMIC])
@pytest.mark.parametrize("size", [512, 1_000_000_000 // 512 * 512, 10 * GIB, 2040 * GIB])
def test_new_disk_says_what_it_is(tmp_path: Path, kind: Kind, size: int) -> None:
    path, moment = tmp_path / "disk.vhd", datetime(2026, 11, 29, tzinfo=UTC)
    create(path, size, kind=kind, uid=b"0123456789abcdef", time=moment)
    with open_image(path) as image:
        assert (image.size, image.kind, image.uid) == (size, kind, b"0123456789abcdef")
        assert image.structure.faults == ()
        footer = image.footer
    assert (footer.creator, footer.creator_version, footer.creator_host) == (b"win ", 0x000A0000, b"Wi2k")
    assert footer.features == 2
    assert footer.geometry == format.geometry(size)
    assert format.from_stamp(footer.time) == moment
    assert path.stat().st_blocks * 512 < 8 * MIB
    assert path.stat().st_mode & 0o777 == 0o600


def test_blocks_begin_at_multiples_of_4_kib(tmp_path: Path) -> None:
    paths, _ = make_chain(tmp_path, 2)
    for path in paths:
        with open_image(path) as image:
            places = [image.table[block] * 512 + 512 for block in image.table.allocated()]
            assert len(places) > 1
            assert [one % 4096 for one in places] == [0] * len(places)


def test_child_names_its_parent_in_every_way(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    create(tmp_path / "Größe.vhd", 2 * MIB, block_size=512 * KIB, uid=b"p" * 16)
    create(tmp_path / "sub" / "child.avhd", parent=tmp_path / "Größe.vhd")
    create(tmp_path / "other.avhd", parent=tmp_path / "Größe.vhd", windows_path="D:\\Größe.vhd")
    with open_image(tmp_path / "sub" / "child.avhd") as image:
        assert [(one.code, one.text) for one in image.structure.texts] == [
            ("W2ru", "..\\Größe.vhd"),
            ("W2ku", "..\\Größe.vhd"),
        ]
        assert image.header is not None
        assert (image.header.name, image.parent_uid, image.block_size) == ("Größe.vhd", b"p" * 16, 512 * KIB)
        changed = datetime.fromtimestamp(int((tmp_path / "Größe.vhd").stat().st_mtime), UTC)
        assert format.from_stamp(image.header.parent_time) == changed
    with open_image(tmp_path / "other.avhd") as image:
        assert [one.text for one in image.structure.texts] == [".\\Größe.vhd", "D:\\Größe.vhd"]


@pytest.mark.parametrize("size", [0, -512, 1, 513, 2 * MIB + 1, 2040 * GIB + 512])
@pytest.mark.parametrize("kind", [Kind.FIXED, Kind.DYNAMIC])
def test_size_that_cannot_be_is_refused(tmp_path: Path, size: int, kind: Kind) -> None:
    with pytest.raises(errors.UsageError, match=f"cannot have {size} bytes"):
        create(tmp_path / "disk.vhd", size, kind=kind)
    create(tmp_path / "good.vhd", MIB, kind=kind)
    with pytest.raises(errors.UsageError, match=f"cannot have {size} bytes"):
        resize(tmp_path / "good.vhd", size, allow_shrink=True)
    assert os.listdir(tmp_path) == ["good.vhd"]
    assert content(tmp_path / "good.vhd") == bytes(MIB)


@pytest.mark.parametrize("block_size", [512, 3 * MIB, 256 * KIB, 512 * MIB])
def test_block_size_that_others_do_not_read_is_refused(tmp_path: Path, block_size: int) -> None:
    with pytest.raises(errors.UsageError, match="512 KiB to 256 MiB"):
        create(tmp_path / "disk.vhd", MIB, block_size=block_size)
    assert os.listdir(tmp_path) == []


def test_what_exists_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk.vhd").write_bytes(b"precious")
    os.symlink("nowhere", tmp_path / "link.vhd")
    for name in ("disk.vhd", "link.vhd"):
        with pytest.raises(errors.Conflict, match="exists already"):
            create(tmp_path / name, MIB)
        with pytest.raises(errors.Conflict, match="exists already"):
            write_image(tmp_path / name, Memory(bytes(MIB)))
    assert (tmp_path / "disk.vhd").read_bytes() == b"precious"
    with pytest.raises(errors.NotFound):
        create(tmp_path / "no folder" / "disk.vhd", MIB)


def test_copy_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Memory):
        def read_into(self, offset, buffer):
            raise errors.HostFailed("the source is gone")

    for nameless in (True, False):
        if not nameless:  # as on file systems that know no files without a name
            monkeypatch.setattr("os.O_TMPFILE", os.O_DIRECTORY | os.O_WRONLY)
        with pytest.raises(errors.HostFailed, match="gone"):
            write_image(tmp_path / "disk.vhd", Broken(b"x" * MIB))
        assert os.listdir(tmp_path) == []
    create(tmp_path / "disk.vhd", MIB)
    assert os.listdir(tmp_path) == ["disk.vhd"]


@pytest.mark.parametrize("kind", [Kind.FIXED, Kind.DYNAMIC])
def test_copy_of_a_raw_disk_keeps_its_holes(tmp_path: Path, kind: Kind) -> None:
    raw, model = tmp_path / "raw", bytearray(48 * MIB)
    model[5 * MIB : 5 * MIB + 100] = b"x" * 100
    model[40 * MIB : 41 * MIB] = os.urandom(MIB)
    raw.write_bytes(model)
    done = []
    with RawSource(raw) as source:
        write_image(tmp_path / "disk.vhd", source, kind=kind, on_progress=lambda at, of: done.append((at, of)))
    assert content(tmp_path / "disk.vhd") == model
    assert (tmp_path / "disk.vhd").stat().st_blocks * 512 < 4 * MIB
    assert done == sorted(done)
    assert done[-1] == (48 * MIB, 48 * MIB)


def test_child_holds_exactly_what_its_source_says(tmp_path: Path) -> None:
    create(tmp_path / "parent.vhd", 2 * MIB)
    with open_chain(tmp_path / "parent.vhd", writable=True) as disk:
        disk.write(0, b"p" * 2 * MIB)
    create(tmp_path / "child.avhd", parent=tmp_path / "parent.vhd")
    with open_chain(tmp_path / "child.avhd", writable=True) as disk:
        disk.write(4096, bytes(8192))
    copy = tmp_path / "copy.avhd"
    with open_image(tmp_path / "child.avhd") as child:
        origin = describe_parent(copy, tmp_path / "parent.vhd")
        write_image(copy, child, kind=Kind.DIFFERENCING, parent=origin)
    with open_image(copy) as image:
        assert [one[:2] for one in image.extents() if one.is_held] == [(4096, 8192)]
    assert content(copy) == b"p" * 4096 + bytes(8192) + b"p" * (2 * MIB - 12288)


@pytest.mark.parametrize("block_size", [512 * KIB, 8 * MIB, 256 * MIB])
def test_block_sizes(tmp_path: Path, block_size: int) -> None:
    path, model = tmp_path / "disk.vhd", bytearray(3 * MIB)
    create(path, 600 * MIB, block_size=block_size)
    with open_chain(path, writable=True) as disk:
        scribble(disk, model, 1) if disk.size == len(model) else disk.write(299 * MIB, b"y" * 3 * MIB)
        disk.write(0, b"x" * 1000)
    with open_chain(path) as disk:
        assert read(disk, 0, 1001) == b"x" * 1000 + b"\0"
        assert read(disk, 299 * MIB - 1, 3 * MIB + 2) == b"\0" + b"y" * 3 * MIB + b"\0"
    write_image(tmp_path / "copy.vhd", open_chain(path), block_size=block_size)
    with open_chain(tmp_path / "copy.vhd") as disk:
        assert read(disk, 299 * MIB - 1, 3 * MIB + 2) == b"\0" + b"y" * 3 * MIB + b"\0"


def test_full_file_system_leaves_a_valid_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No space at any of the writes: what was flushed stays, and the file is without a fault."""
    from hvmgr.vhd.file import File

    path, write, left = tmp_path / "disk.vhd", File.write, [0]

    def full(self, offset, data):
        left[0] -= 1
        if left[0] < 0 and offset + len(data) > os.fstat(self.descriptor).st_size - 512:
            raise errors.NoSpace(f"no space left for {self.path}")
        write(self, offset, data)

    monkeypatch.setattr(File, "write", full)
    for number in range(12):
        left[0] = 100
        path.unlink(missing_ok=True)
        create(path, 4 * MIB, block_size=512 * KIB)
        with open_chain(path, writable=True) as disk:
            disk.write(0, b"old" * 512)
        left[0] = number
        disk = open_chain(path, writable=True)
        with contextlib.suppress(errors.NoSpace):
            for block in range(1, 8):
                disk.write(block * 512 * KIB, b"new" * 512)
        left[0] = 100
        disk.close()
        with open_chain(path) as disk:
            assert disk.faults == ()
            assert read(disk, 0, 1536) == b"old" * 512


# --- large disks ---


MEMORY = """
import resource, sys
from hvmgr.vhd.chain import open_chain
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with open_chain(sys.argv[1]) as disk:
    assert disk.faults == ()
    assert disk.top.table.count() == len(disk.top.table)
    assert sum(1 for _ in disk.pieces(1000 << 30, 64 << 20)) == 32
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_header_of_the_largest_disk_takes_little_memory(tmp_path: Path) -> None:
    """A million blocks, all of them there, in no order: 2040 GiB in a sparse file."""
    path = tmp_path / "disk.vhd"
    create(path, 2040 * GIB)
    with open_image(path, writable=True) as image:
        count, stride = len(image.table), (2 * MIB + 4096) // 512
        assert image.header is not None
        first = format.round_up(image.structure.data_end + 512, 4096) // 512 - 1
        entries = array("I", range(first, first + count * stride, stride))
        entries[0::2], entries[1::2] = entries[1::2], entries[0::2]
        image.file.write(image.header.table_offset, Table(entries).pack())
        image.file.write((first + count * stride) * 512, image.footer.pack())
    command = [sys.executable, "-c", MEMORY, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert int(done.stdout) < 50 * KIB  # it counts KiB


def test_large_chain_costs_what_its_data_costs(tmp_path: Path) -> None:
    create(tmp_path / "0", 2040 * GIB)
    for number in range(1, 4):
        create(tmp_path / str(number), parent=tmp_path / str(number - 1))
        with open_chain(tmp_path / str(number), writable=True) as disk:
            disk.write(number * 200 * GIB, b"data" * 1024)
    with open_chain(tmp_path / "3") as disk:
        assert sum(1 for one in disk.stretches() if one.data) == 3
        assert sum(1 for _ in disk.pieces()) < 100
        merge(disk, 3)
    assert compact(tmp_path / "0")[1] < 32 * MIB
    with open_chain(tmp_path / "0") as disk:
        assert read(disk, 600 * GIB, 4096) == b"data" * 1024
    resize(tmp_path / "0", GIB, allow_shrink=True)
    with open_chain(tmp_path / "0") as disk:
        assert disk.size == GIB
