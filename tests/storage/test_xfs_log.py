"""Logs of XFS made by hand: torn ends, holes, sums, and what would never end or fill the memory."""

from __future__ import annotations

import struct
import tracemalloc

import pytest

from hvmgr import errors
from hvmgr.storage.filesystems import xfs_log

SIZE, SECTOR = 8 << 20, 512
INODE, BLOCK, PER_GROUP = 512, 4096, 1 << 16
UNMOUNT, START, COMMIT = 0x20, 0x01, 0x02


def crc32c(data):
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


class Log:
    """A disk whose first bytes are a log that is written record by record."""

    def __init__(self):
        self.raw = bytearray(SIZE)
        self.size = 1 << 40
        self.at = 0

    def read_into(self, offset, buffer):
        piece = bytes(self.raw[offset : offset + len(buffer)])
        buffer[:] = piece.ljust(len(buffer), b"\0")

    def record(self, *operations, tail=0, sum_=None, size=32768):
        """A whole one at the end; which sector it begins in."""
        data = bytearray(b"".join(struct.pack(">IIBBH", 1, len(d), 0x69, flags, 0) + d for flags, d in operations))
        length = len(data)
        data = data.ljust(-(-length // SECTOR) * SECTOR, b"\0")
        head = bytearray(SECTOR)
        at = self.at
        struct.pack_into(">4sIIIQQ", head, 0, b"\xfe\xed\xba\xbe", 1, 2, length, 1 << 32 | at, 1 << 32 | tail)
        struct.pack_into(">I", head, 40, len(operations))
        struct.pack_into(">I", head, 300, 1)
        struct.pack_into(">I", head, 320, size)
        for number in range(len(data) // SECTOR):
            place = number * SECTOR
            head[44 + 4 * number : 48 + 4 * number] = data[place : place + 4]
            data[place : place + 4] = (1).to_bytes(4, "big")
        sum_ = crc32c(bytes(head[:328]) + bytes(data[:length])) if sum_ is None else sum_
        head[32:36] = sum_.to_bytes(4, "little")
        self.raw[at * SECTOR : at * SECTOR + SECTOR + len(data)] = head + data
        self.at += 1 + len(data) // SECTOR
        return at

    def buffer(self, sector, content, tail=0, **words):
        """A record with a transaction that writes ``content`` there."""
        about = struct.pack("<HHHHqII", 0x123C, 2, 0, 1, sector, 1, 1)
        return self.committed(about, content.ljust(128, b"\0"), tail=tail, **words)

    def committed(self, *regions, tail=0, **words):
        head = struct.pack("<4sIII", b"TRAN", 0, 1, len(regions))
        middle = [(0, one) for one in (head, *regions)]
        return self.record((START, b""), *middle, (COMMIT, b""), tail=tail, **words)

    def damage(self, at):
        self.raw[(at + 1) * SECTOR + 30] ^= 1

    def replayed(self, size=SIZE):
        place = xfs_log.Place(0, size, inode=INODE, block=BLOCK, per_group=PER_GROUP, cluster=4, is_5=True)
        return xfs_log.replayed(self, place)


def at(disk, sector):
    buffer = bytearray(5)
    disk.read_into(sector * SECTOR, memoryview(buffer))
    return bytes(buffer)


THERE = SIZE // SECTOR + 8


def test_records_are_replayed_in_order_up_to_the_last():
    log = Log()
    first = log.buffer(THERE, b"older")
    log.buffer(THERE, b"newer", tail=first)
    assert at(log.replayed().disk, THERE) == b"newer"


def test_a_torn_record_at_the_end_never_counted():
    log = Log()
    first = log.buffer(THERE, b"older")
    log.damage(log.buffer(THERE, b"newer", tail=first))
    log.buffer(THERE, b"third", tail=first)
    assert at(log.replayed().disk, THERE) == b"older"


def test_a_log_without_sums_is_replayed():
    log = Log()
    log.buffer(THERE, b"older", sum_=0)
    assert at(log.replayed().disk, THERE) == b"older"


def test_a_hole_far_from_the_end_is_a_damage_and_no_older_state():
    log = Log()
    first = log.buffer(THERE, b"older")
    damaged = log.buffer(THERE, b"newer", tail=first)
    for _ in range(200):
        log.record((0, bytes(14000)), tail=first, sum_=0)
    log.damage(damaged)
    with pytest.raises(errors.Corrupt, match="hole"):
        log.replayed()


def test_a_lost_tail_is_a_damage_and_no_older_state():
    log = Log()
    log.buffer(THERE, b"older")
    tail = log.buffer(THERE, b"newer")
    log.buffer(THERE, b"third", tail=tail)
    log.damage(tail)
    with pytest.raises(errors.Corrupt, match="tail"):
        log.replayed()


def test_records_that_lead_to_each_other_come_to_an_end():
    """From the tail of each a hole follows behind the other one, which lies among the heads of a third."""
    log = Log()
    log.record(size=4 * 32768)
    second = log.record()
    log.at = 4
    log.record(tail=second)
    assert log.replayed().disk is None


def new_inodes(count, block=64):
    blocks = count * INODE // BLOCK
    return struct.pack("<HH", 0x123F, 1) + struct.pack(">6I", 0, block, count, INODE, blocks, 0)


def test_new_inodes_are_there_unless_their_place_is_given_up_later():
    log = Log()
    kept, given_up = PER_GROUP // 2, PER_GROUP // 2 + 8
    log.committed(new_inodes(64, kept))
    log.committed(new_inodes(64, given_up), tail=0)
    for cluster in range(2):
        sector = (given_up + 4 * cluster) * BLOCK // SECTOR
        log.committed(struct.pack("<HHHHqII", 0x123C, 1, 2, 32, sector, 0, 0), tail=0)
    disk = log.replayed().disk
    assert at(disk, kept * BLOCK // SECTOR) == b"IN\0\0\3"
    assert at(disk, given_up * BLOCK // SECTOR) == bytes(5)


@pytest.mark.parametrize("is_many", [False, True], ids=["in one item", "in many"])
def test_new_inodes_beyond_reason_are_a_damage_and_fill_no_memory(is_many):
    log = Log()
    if is_many:
        for one in range(5):
            items = [new_inodes(64, 8 * (200 * one + place)) for place in range(200)]
            log.committed(*items, tail=0)
    else:
        log.committed(new_inodes(1 << 17))
    tracemalloc.start()
    try:
        with pytest.raises(errors.Corrupt, match="new inodes"):
            log.replayed()
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


def test_a_log_is_bounded_by_what_is_to_be_replayed_and_not_by_its_size(monkeypatch):
    log = Log()
    log.buffer(THERE, b"older")
    assert log.replayed(300 << 20).notes == ["the log was replayed in memory: the file system had not been unmounted"]
    monkeypatch.setattr(xfs_log, "_MOST", 100)
    found = log.replayed()
    assert found.disk is None
    assert found.notes == [
        "its log holds too much to be replayed in memory, and is not: the newest changes are missing"
    ]
    log.record((UNMOUNT, bytes(8)), tail=0)
    assert log.replayed().notes == []
