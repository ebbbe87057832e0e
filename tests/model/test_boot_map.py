"""GRUB's block lists and device mapper's tables: what they lead to is the disk that our own reader shows."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from hvmgr import vhd
from hvmgr.model import boot_map
from hvmgr.model.boot_map import Run
from hvmgr.operations.boot import making
from hvmgr.vhd import format
from hvmgr.vhd.source import read

SECTOR = 512
BLOCK = 512 << 10


@st.composite
def disks(draw):
    """A size in sectors, and what is written where: into a base, and into a child of it."""
    size = draw(st.integers(1, 5000))
    pieces = st.lists(st.tuples(st.integers(0, size - 1), st.integers(1, 1500), st.integers(1, 255)), max_size=6)
    return size, draw(pieces), draw(st.none() | pieces)


def made(folder, size, base, child):
    """The path of such a disk: one dynamic VHD, or a chain of two."""
    path = folder / "base.vhd"
    vhd.create(path, size * SECTOR, block_size=BLOCK)
    fill(path, size, base)
    if child is None:
        return path
    vhd.create(folder / "child.vhd", parent=path)
    fill(folder / "child.vhd", size, child)
    return folder / "child.vhd"


def fill(path, size, pieces):
    with vhd.open_chain(path, writable=True) as disk:
        for start, count, value in pieces:
            disk.write(start * SECTOR, bytes([value]) * (min(count, size - start) * SECTOR))
        disk.flush()


def played(table, files, size):
    """The bytes that device mapper would show."""
    found = bytearray()
    for line in table.splitlines():
        start, count, kind, *where = line.split()
        assert int(start) * SECTOR == len(found)
        if kind == "zero":
            found += bytes(int(count) * SECTOR)
        else:
            data = files[int(where[0].removeprefix("@"))]
            part = data[int(where[1]) * SECTOR :][: int(count) * SECTOR]
            assert len(part) == int(count) * SECTOR
            found += part
    assert len(found) == size
    return bytes(found)


@settings(max_examples=15)
@given(disks())
def test_table_of_device_mapper_shows_the_disk(disk):
    size, base, child = disk
    with tempfile.TemporaryDirectory() as folder, vhd.open_chain(made(Path(folder), size, base, child)) as chain:
        table = boot_map.mapper_table(boot_map.joined(chain.pieces()))
        files = [image.path.read_bytes() for image in chain.images]
        assert played(table, files, chain.size) == read(chain, 0, chain.size)


@settings(max_examples=15)
@given(disks())
def test_block_list_of_grub_shows_all_that_the_disk_holds(disk):
    size, base, _ = disk
    with tempfile.TemporaryDirectory() as folder, vhd.open_chain(made(Path(folder), size, base, None)) as chain:
        words = making.block_list(chain)
        data, wanted = chain.top.path.read_bytes(), read(chain, 0, chain.size)
        held = [chain.top.table[number] != format.UNUSED for number in range(len(chain.top.table))]
    at = 0
    for word in words:
        place, count = (int(part) for part in word.split("+"))
        assert (place + count) * SECTOR <= len(data), "GRUB refuses what ends behind the file"
        if place:
            assert data[place * SECTOR :][: count * SECTOR] == wanted[at * SECTOR :][: count * SECTOR]
        else:
            assert not any(held[at * SECTOR // BLOCK : -(-(at + count) * SECTOR // BLOCK)])
        at += count
    assert at == size


def test_neighbours_are_one_run():
    pieces = [(0, 1024, 0, 4096), (1024, 512, 0, 5120), (1536, 512, None, -1), (2048, 512, None, -2), (2560, 512, 1, 0)]
    assert list(boot_map.joined(pieces)) == [Run(0, 3, 0, 8), Run(3, 2, None, 0), Run(5, 1, 1, 0)]


def test_hole_is_never_longer_than_the_file():
    assert boot_map.block_list([Run(0, 25, None, 0), Run(25, 8, 0, 3)], 10) == ["0+10", "0+10", "0+5", "3+8"]


def test_list_of_a_large_disk_is_as_long_as_what_it_holds():
    runs = boot_map.block_runs([(3, 100), (1 << 19, 5000)], block=4096, bitmap=1, size=1 << 32)
    assert list(runs) == [
        Run(0, 3 * 4096, None, 0),
        Run(3 * 4096, 4096, 0, 101),
        Run(4 * 4096, ((1 << 19) - 4) * 4096, None, 0),
        Run((1 << 19) * 4096, 4096, 0, 5001),
        Run(((1 << 19) + 1) * 4096, (1 << 32) - ((1 << 19) + 1) * 4096, None, 0),
    ]
