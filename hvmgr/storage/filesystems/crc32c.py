"""CRC-32C, the checksum of file systems' own structures, at a speed that a whole log can be checked with.

Byte by byte Python does some 10 MB/s. Long data is therefore cut into lanes that are taken a byte further all at once, by
``bytes.translate`` and one large XOR, and put together at the end: a sum is linear in its bits.
"""

from __future__ import annotations

import functools

_POLYNOMIAL = 0x82F63B78
_LANE = 64  # bytes
_LANES_FROM = 16  # below so many the preparation costs more


def updated(value: int, data: bytes) -> int:
    """The state after ``data``: begin with all bits set, or with 0 where a format does; whoever wants them inverted does so."""
    lanes = len(data) // _LANE
    if lanes < _LANES_FROM:
        return _by_bytes(value, data)
    low, next_, third, high = _shifts()
    for own in _of_lanes(data, lanes):
        value = low[value & 255] ^ next_[value >> 8 & 255] ^ third[value >> 16 & 255] ^ high[value >> 24] ^ own
    return _by_bytes(value, data[lanes * _LANE :])


def _by_bytes(value: int, data: bytes) -> int:
    table = _table()
    for byte in data:
        value = value >> 8 ^ table[(value ^ byte) & 0xFF]
    return value


def _of_lanes(data: bytes, lanes: int) -> list[int]:
    """The state after each lane, begun with 0: here as four strings, of the states' first, second, third and last bytes."""
    tables = _byte_tables()
    first = second = third = last = 0
    for at in range(_LANE):
        column = int.from_bytes(data[at : lanes * _LANE : _LANE], "little") ^ first
        index = column.to_bytes(lanes, "little")
        one, two, three, four = (int.from_bytes(index.translate(table), "little") for table in tables)
        first, second, third, last = one ^ second, two ^ third, three ^ last, four
    parts = [one.to_bytes(lanes, "little") for one in (first, second, third, last)]
    return [a | b << 8 | c << 16 | d << 24 for a, b, c, d in zip(*parts, strict=True)]


@functools.cache
def _table() -> list[int]:
    found = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)  # noqa: PLW2901
        found.append(value)
    return found


@functools.cache
def _byte_tables() -> list[bytes]:
    return [bytes(one >> shift & 255 for one in _table()) for shift in (0, 8, 16, 24)]


@functools.cache
def _shifts() -> list[list[int]]:
    """What a lane of zeros makes of each byte of a state."""
    zeros = bytes(_LANE)
    return [[_by_bytes(value << shift, zeros) for value in range(256)] for shift in (0, 8, 16, 24)]
