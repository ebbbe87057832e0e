"""The log of Btrfs over items made by hand: contents over contents, names that are gone, at a cost that is not their product."""

from __future__ import annotations

import random
import stat
import struct
import time

import pytest

from hvmgr import errors
from hvmgr.storage.filesystems import btrfs_log

INODE, REFERENCE, MORE, DIR_LOG, DIR_INDEX, EXTENT = 1, 12, 13, 72, 96, 108
SECTOR = 4096


def extent(place, length):
    return struct.pack("<QQBBHB", 1, length, 0, 0, 0, 1) + struct.pack("<QQQQ", place, length, 0, length)


def inode(size, mode=stat.S_IFREG):
    raw = bytearray(160)
    struct.pack_into("<QQQ", raw, 0, 1, 1, size)
    struct.pack_into("<I", raw, 52, mode)
    return bytes(raw)


def replayed(base, log):
    """``base``: by object and type; ``log``: a list of object, type, last number, data."""
    return btrfs_log.Replay(lambda number, kind: dict(base.get((number, kind), {})), log, SECTOR).changed


def bytes_of(items, size):
    """Where each sector of a file lies."""
    found = [None] * size
    for at, data in items.items():
        place, _, offset, length = struct.unpack_from("<QQQQ", data, 21)
        for number in range(length // SECTOR):
            assert found[at // SECTOR + number] is None
            found[at // SECTOR + number] = place + offset + number * SECTOR
    return found


def apart(chance, size, base):
    """Extents in order, none over another."""
    at, found = 0, {}
    while at < size:
        length = min(chance.randrange(1, 9), size - at)
        if chance.random() < 0.7:
            found[at * SECTOR] = extent(base + at * 3 * SECTOR, length * SECTOR)
        at += length
    return found


def test_logged_contents_lie_over_those_that_were_there():
    chance = random.Random(4)
    for _ in range(50):
        old, new = apart(chance, 60, 1 << 30), apart(chance, 60, 1 << 40)
        log = [(7, EXTENT, at, data) for at, data in new.items()]
        found = bytes_of(replayed({(7, EXTENT): old}, log)[7, EXTENT], 60)
        before, over = bytes_of(old, 60), bytes_of(new, 60)
        assert found == [b if b is not None else a for a, b in zip(before, over, strict=True)]


def test_contents_over_each_other_are_a_damage():
    with pytest.raises(errors.Corrupt):
        replayed({}, [(7, EXTENT, at, extent(0, 8 * SECTOR)) for at in (0, 4 * SECTOR)])


def test_many_contents_and_many_ranges_of_names_cost_no_product():
    count = 20000
    old = {at * 2 * SECTOR: extent(at << 20, SECTOR) for at in range(count)}
    names = {at: struct.pack("<QBQQHHB", 300 + at, INODE, 0, 0, 0, 6, 1) + b"%6d" % at for at in range(count)}
    log = [(7, EXTENT, (at * 2 + 1) * SECTOR, extent(1 << 50, SECTOR)) for at in range(count)]
    log += [(8, INODE, 0, inode(0, stat.S_IFDIR))]
    log += [(8, DIR_LOG, at, struct.pack("<Q", at)) for at in range(0, count, 2)]
    began = time.process_time()
    changed = replayed({(7, EXTENT): old, (8, DIR_INDEX): names}, log)
    assert time.process_time() - began < 10
    assert len(changed[7, EXTENT]) == 2 * count
    assert sorted(changed[8, DIR_INDEX]) == list(range(1, count, 2))


@pytest.mark.parametrize("is_logged", [True, False])
def test_a_log_about_a_file_with_very_many_names_is_given_up(is_logged):
    """Those that found no room stand in items of another type."""
    more = struct.pack("<QQH", 8, 4, 1) + b"c"
    base = {(7, INODE): {0: inode(0)}, (8, INODE): {0: inode(0, stat.S_IFDIR)}, (7, MORE): {99: more}}
    log = [(7, INODE, 0, inode(0)), (7, REFERENCE, 8, struct.pack("<QH", 2, 1) + b"a")]
    with pytest.raises(errors.Unsupported, match="names"):
        replayed({} if is_logged else base, [*log, (7, MORE, 99, more)] if is_logged else log)
