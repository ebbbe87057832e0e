"""Fast commits of ext4: pieces over pieces, in the order in which they were written, at a cost that is not their product."""

from __future__ import annotations

import random
import struct
import time

from hvmgr.storage.filesystems import ext_fast_commits


def crc32c(data):
    value = 0
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value


def committed(pieces):
    """The blocks of one fast commit that adds these to inode 7; a place of None takes them away."""
    raw = struct.pack("<HHII", 9, 8, 0, 1)
    for first, count, place in pieces:
        if place is None:
            raw += struct.pack("<HHIII", 2, 12, 7, first, count)
        else:
            raw += struct.pack("<HHIIHHI", 1, 16, 7, first, count, 0, place)
    raw += struct.pack("<HHI", 8, 8, 1)
    return [raw + struct.pack("<I", crc32c(raw))]


def blocks_of(pieces, size):
    found, before = [None] * size, 0
    for first, count, place in pieces:
        assert first >= before
        before = first + count
        for number in range(count):
            found[first + number] = None if place is None else place + number
    return found


def test_the_last_of_several_pieces_counts():
    chance = random.Random(5)
    for _ in range(60):
        pieces = [
            (chance.randrange(40), chance.randrange(1, 12), chance.choice([None, chance.randrange(1, 1 << 20)]))
            for _ in range(chance.randrange(1, 15))
        ]
        before = [(10 * at + chance.randrange(3), chance.randrange(1, 8), 1 << 30) for at in range(6)]
        wanted = blocks_of(before, 70)
        for first, count, place in pieces:
            for number in range(count):
                wanted[first + number] = None if place is None else place + number
        changes = ext_fast_commits.parsed(committed(pieces), 1)
        assert blocks_of(changes.content(7, iter(before)), 70) == wanted


def test_many_pieces_cost_no_product():
    count = 20000
    pieces = [(3 * at, 2, at + 1) for at in range(count)]
    blocks = committed(pieces)
    began = time.process_time()
    changes = ext_fast_commits.parsed(blocks, 1)
    found = list(changes.content(7, [(3 * at, 3, 1 << 30) for at in range(count)]))
    assert time.process_time() - began < 10
    assert len(found) == 2 * count
