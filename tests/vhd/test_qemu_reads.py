"""Where QEMU's driver is said to show the same disk it does, and where it would not, that is said too."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from hvmgr.vhd.checking import qemu_reads_alike
from hvmgr.vhd.format import Kind
from hvmgr.vhd.stream_writer import StreamWriter
from tests.vhd import planted
from tests.vhd.planted import ALL, BLOCK
from tests.vhd.test_streams import DISK, UNIT, Memory, written

HALF = b"\xf0" + bytes(511)


def by_qemu(path: Path) -> bytes:
    target = path.with_suffix(".raw")
    argv = ["qemu-img", "convert", "-f", "vpc", "-O", "raw", str(path), str(target)]
    subprocess.run(argv, check=True, timeout=60)
    return target.read_bytes()


@pytest.mark.parametrize("kind", [Kind.DYNAMIC, Kind.FIXED])
def test_what_is_written_here_is_read_there(tmp_path: Path, kind) -> None:
    path = tmp_path / "disk.vhd"
    path.write_bytes(written(StreamWriter(Memory(DISK), kind=kind, block_size=UNIT)))
    assert qemu_reads_alike(path)
    assert by_qemu(path) == DISK


def test_zeros_under_clear_bits_are_no_difference(tmp_path: Path) -> None:
    made = planted.sparse({1: (HALF, b"x" * 2048 + bytes(2048)), 3: (ALL, b"y" * BLOCK)})
    path = tmp_path / "disk.vhd"
    path.write_bytes(made.data)
    assert qemu_reads_alike(path)
    assert by_qemu(path) == planted.content(made)


def stale(made):
    made.put(made.blocks[2], HALF)


DIFFERENT = [
    pytest.param(lambda: planted.sparse(parent="parent.vhd"), lambda made: None, id="differencing"),
    pytest.param(planted.sparse, stale, id="data-under-clear-bits"),
    pytest.param(planted.sparse, lambda made: made.footers(28, b"vpc "), id="goes-by-its-geometry"),
    pytest.param(planted.sparse, lambda made: made.put(made.end + 300, b"x"), id="damaged"),
    pytest.param(lambda: planted.Planted(bytearray(5000), planted.FIXED), lambda made: None, id="no-vhd"),
]


@pytest.mark.parametrize(("make", "spoil"), DIFFERENT)
def test_what_would_be_read_in_another_way_is_said(tmp_path: Path, make, spoil) -> None:
    made = make()
    spoil(made)
    path = tmp_path / "disk.vhd"
    path.write_bytes(made.data)
    assert not qemu_reads_alike(path)


@pytest.mark.parametrize("creator", [b"vpc ", b"odd "])
def test_largest_geometry_says_go_by_the_size(tmp_path: Path, creator) -> None:
    made = planted.sparse({1: (ALL, b"x" * BLOCK)})
    made.footers(28, creator)
    made.footers(56, b"\xff\xff\x10\xff")
    path = tmp_path / "disk.vhd"
    path.write_bytes(made.data)
    assert qemu_reads_alike(path)
    assert by_qemu(path) == planted.content(made)
