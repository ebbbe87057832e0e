"""Partition tables, made here byte by byte as the specifications say; the kernel reads some of them in test_attach."""

from __future__ import annotations

import dataclasses
import struct
import uuid
import zlib

import pytest

from hvmgr import errors
from hvmgr.storage import partitions
from hvmgr.storage.partitions import Scheme

MIB = 1 << 20
LINUX = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")


class Memory:
    """A disk in memory."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)

    @property
    def size(self) -> int:
        return len(self.data)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.data[offset : offset + len(buffer)]


def put_mbr(disk: Memory, entries: list[tuple[int, int, int]], *, at: int = 0, boot: int = 0) -> None:
    """Entries are (type, first sector, sectors)."""
    for number, (kind, start, count) in enumerate(entries):
        entry = struct.pack("<B3sB3sII", 0x80 if number + 1 == boot else 0, b"", kind, b"", start, count)
        disk.data[at + 446 + 16 * number : at + 462 + 16 * number] = entry
    disk.data[at + 510 : at + 512] = b"\x55\xaa"


def put_gpt(disk: Memory, entries: list[tuple[int, int, str]], *, sector: int = 512) -> None:
    """Entries are (first sector, last sector, name); both copies are written."""
    put_mbr(disk, [(0xEE, 1, min(disk.size // sector - 1, 0xFFFFFFFF))])
    table = b"".join(
        struct.pack("<16s16sQQQ72s", LINUX.bytes_le, uuid.uuid4().bytes_le, first, last, 0, name.encode("utf-16-le"))
        for first, last, name in entries
    ).ljust(128 * 128, b"\0")
    blocks, end, guid = len(table) // sector, disk.size // sector - 1, uuid.uuid4().bytes_le
    for own, other, start in ((1, end, 2), (end, 1, end - blocks)):
        fields = [b"EFI PART", 0x10000, 92, 0, 0, own, other, 2 + blocks, end - blocks - 1]
        fields += [guid, start, 128, 128, zlib.crc32(table)]
        header = bytearray(struct.pack("<8sIIIIQQQQ16sQIII", *fields))
        struct.pack_into("<I", header, 16, zlib.crc32(header))
        disk.data[own * sector : own * sector + 92] = header
        disk.data[start * sector : start * sector + len(table)] = table


def test_disk_without_table_has_none():
    assert partitions.read(Memory(MIB)) is None
    assert partitions.read(Memory(100)) is None
    assert partitions.least_size(Memory(MIB)) == 0


@pytest.mark.parametrize(("at", "mark"), [(3, b"NTFS    "), (54, b"FAT16   "), (82, b"FAT32   ")])
def test_file_system_on_whole_disk_is_no_table(at, mark):
    disk = Memory(MIB)
    put_mbr(disk, [(7, 63, 100)])
    disk.data[at : at + len(mark)] = mark
    assert partitions.read(disk) is None
    assert partitions.least_size(disk) == MIB


def test_mbr_with_logical_partitions():
    disk = Memory(8 * MIB)
    put_mbr(disk, [(0x83, 2048, 2048), (5, 6144, 8192)], boot=1)
    put_mbr(disk, [(7, 64, 1000), (5, 2048, 2048)], at=6144 * 512)
    put_mbr(disk, [(0x82, 64, 1000)], at=(6144 + 2048) * 512)
    table = partitions.read(disk)
    assert table.scheme is Scheme.MBR
    assert table.fault is None
    assert [(one.number, one.start // 512, one.size // 512, one.type, one.bootable) for one in table.partitions] == [
        (1, 2048, 2048, "83", True),
        (2, 6144, 8192, "05", False),
        (5, 6144 + 64, 1000, "07", False),
        (6, 6144 + 2048 + 64, 1000, "82", False),
    ]
    assert partitions.least_size(disk) == (6144 + 8192) * 512
    assert partitions.fitted(disk, partitions.least_size(disk)) == []


def test_logical_partitions_in_a_circle_end():
    disk = Memory(2 * MIB)
    put_mbr(disk, [(5, 1024, 2048)])
    put_mbr(disk, [(7, 8, 8), (5, 512, 100)], at=1024 * 512)
    put_mbr(disk, [(7, 8, 8), (5, 512, 100)], at=1536 * 512)
    assert len(partitions.read(disk).partitions) < 300


@pytest.mark.parametrize("sector", [512, 4096])
def test_gpt_names_types_and_places(sector):
    disk = Memory(8 * MIB)
    put_gpt(disk, [(256, 511, "root"), (512, 700, "Daten ä")], sector=sector)
    table = partitions.read(disk)
    assert (table.scheme, table.sector, table.fault) == (Scheme.GPT, sector, None)
    assert [(one.number, one.start, one.size, one.type, one.name) for one in table.partitions] == [
        (1, 256 * sector, 256 * sector, str(LINUX), "root"),
        (2, 512 * sector, 189 * sector, str(LINUX), "Daten ä"),
    ]
    assert partitions.least_size(disk) == 701 * sector + 16384 + sector


def test_gpt_with_one_damaged_copy_says_so_and_cannot_shrink():
    for broken in (512, 2 * MIB - 512):
        disk = Memory(2 * MIB)
        put_gpt(disk, [(256, 511, "root")])
        disk.data[broken + 40] ^= 1
        table = partitions.read(disk)
        assert len(table.partitions) == 1
        assert "copy" in table.fault
        assert partitions.least_size(disk) == disk.size
    disk.data[512:1024] = bytes(512)
    assert partitions.read(disk).fault == "neither copy of the table can be read"


def test_gpt_that_was_fitted_is_whole_at_every_write():
    disk = Memory(4 * MIB)
    put_gpt(disk, [(256, 511, "root")])
    before, size = partitions.read(disk), 1 * MIB
    for offset, data in partitions.fitted(disk, size):
        disk.data[offset : offset + len(data)] = data
        assert partitions.read(disk).fault is None
    del disk.data[size:]
    assert partitions.read(disk) == dataclasses.replace(before, made_for=size)
    with pytest.raises(errors.Conflict):
        partitions.fitted(disk, 512 * 512)


def test_gpt_on_a_disk_that_has_grown_is_whole():
    disk = Memory(2 * MIB)
    put_gpt(disk, [(256, 511, "root")])
    disk.data += bytes(MIB)
    assert partitions.read(disk).fault is None
    assert partitions.least_size(disk) == 512 * 512 + 16384 + 512


def test_empty_mbr_in_front_of_a_file_system_says_nothing_about_its_end():
    disk = Memory(4 * MIB)
    put_mbr(disk, [])
    assert partitions.least_size(disk) == 512
    disk.data[1024 + 56 : 1024 + 58] = b"\x53\xef"  # ext4: mkfs leaves the first sector as it was
    assert partitions.least_size(disk) == 4 * MIB
