"""A disk as a qcow2 image that is written front to back: its exact length is known before the first byte.

Header, refcount table, refcount blocks, L1 table, L2 tables, data; clusters of 64 KiB, no backing file, version 3. Source:
QEMU's docs/interop/qcow2.txt.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterator
from typing import cast

from hvmgr.vhd import carrier
from hvmgr.vhd.carrier import Carrier, OnProgress, Piece
from hvmgr.vhd.source import Placed, Source

CLUSTER = 64 << 10
_BITS = 16
_ENTRIES = CLUSTER // 8  # of an L1, L2 or refcount table, in one cluster
_COUNTS = CLUSTER // 2  # refcounts of 16 bits in one block
_COPIED = 1 << 63
_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
_RUN = 1024  # clusters that are looked up at once


class Qcow2Stream:
    """One disk, ready to be sent. It must not change as long as this is in use."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.size = source.size
        self._runs = list(_cluster_runs(source))
        self._data = sum(end - first for first, end in self._runs)
        tables = sorted({table for first, end in self._runs for table in _tables(first, end)})
        self._tables = {table: number for number, table in enumerate(tables)}
        self._l1_entries = max(1, _up(_up(self.size, CLUSTER), _ENTRIES))
        self._l1 = _up(self._l1_entries, _ENTRIES)
        self._place()
        self.length = self._clusters * CLUSTER

    def _place(self) -> None:
        """How many clusters everything takes; the refcounts count themselves too."""
        fixed = 1 + self._l1 + len(self._tables) + self._data
        blocks = table = 0
        while True:
            total = fixed + blocks + table
            wanted = _up(total, _COUNTS)
            room = _up(wanted, _ENTRIES)
            if (wanted, room) == (blocks, table):
                break
            blocks, table = wanted, room
        self._blocks, self._table, self._clusters = blocks, table, total
        self._l1_at = 1 + table + blocks
        self._l2_at = self._l1_at + self._l1
        self._data_at = self._l2_at + len(self._tables)

    def chunks(self) -> Iterator[bytes | memoryview]:
        """All bytes of the stream, in pieces of about 2 MiB; each is valid until the next one is asked for."""
        return cast("Iterator[bytes | memoryview]", self._pieces(None))

    def send(self, descriptor: int, on_progress: OnProgress | None = None) -> None:
        """All bytes of the stream into a pipe, a socket or a file."""
        placed = self._source if isinstance(self._source, Placed) else None
        carrier.deliver(self._pieces(placed), descriptor, self.length, on_progress)

    def _pieces(self, placed: Placed | None) -> Iterator[Piece]:
        yield self._header().ljust(CLUSTER, b"\0")
        yield _packed(array("Q", ((1 + self._table + one) * CLUSTER for one in range(self._blocks))), self._table)
        for block in range(self._blocks):
            counts = array("H", [1]) * min(_COUNTS, self._clusters - block * _COUNTS)
            yield _packed(counts, 1)
        yield self._l1_table()
        yield from self._l2_tables()
        carried = Carrier(self._source, placed, 0)
        for first, end in self._runs:
            for at in range(first, end, _RUN):
                start, wanted = at * CLUSTER, min(_RUN, end - at) * CLUSTER
                held = min(wanted, self.size - start)
                yield from carried.carry(start, held)
                yield from carrier.zeros(wanted - held)

    def _header(self) -> bytes:
        return _HEADER.pack(
            b"QFI\xfb", 3, 0, 0, _BITS, self.size, 0, self._l1_entries, self._l1_at * CLUSTER, CLUSTER,
            self._table, 0, 0, 0, 0, 0, 4, _HEADER.size,
        )  # fmt: skip

    def _l1_table(self) -> bytes:
        table = array("Q", [0]) * self._l1_entries
        for number, place in self._tables.items():
            table[number] = ((self._l2_at + place) * CLUSTER) | _COPIED
        return _packed(table, self._l1)

    def _l2_tables(self) -> Iterator[bytes]:
        """One table after the other; several runs may lie in one, and one run in several."""
        current, table, place = -1, array("Q"), self._data_at
        for first, end in self._runs:
            for number in _tables(first, end):
                if number != current:
                    if current >= 0:
                        yield _packed(table, 1)
                    current, table = number, array("Q", [0]) * _ENTRIES
                low, high = max(first, number * _ENTRIES), min(end, (number + 1) * _ENTRIES)
                start = place * CLUSTER | _COPIED
                entries = array("Q", range(start, start + (high - low) * CLUSTER, CLUSTER))
                table[low % _ENTRIES : low % _ENTRIES + high - low] = entries
                place += high - low
        if current >= 0:
            yield _packed(table, 1)


def _cluster_runs(source: Source) -> Iterator[tuple[int, int]]:
    """The clusters that hold data, as runs: first and end."""
    first = end = 0
    for offset, length, data in source.stretches():
        if not data or not length:
            continue
        low, high = offset // CLUSTER, _up(offset + length, CLUSTER)
        if low > end:
            if end > first:
                yield first, end
            first = low
        elif end == first:
            first = low
        end = max(end, high)
    if end > first:
        yield first, end


def _tables(first: int, end: int) -> range:
    return range(first // _ENTRIES, (end - 1) // _ENTRIES + 1)


def _packed(values: array[int], clusters: int) -> bytes:
    if sys.byteorder == "little":
        values.byteswap()
    return values.tobytes().ljust(clusters * CLUSTER, b"\0")


def _up(value: int, unit: int) -> int:
    return -(-value // unit)
