"""Bitmaps of sectors: bit ``k`` is in byte ``k // 8``, the most significant first.

Work is done by whole strings and numbers, so that its cost is that of the runs and not of the bits.
"""

from __future__ import annotations

from collections.abc import Iterator


def runs(bitmap: bytes | bytearray, first: int, count: int) -> Iterator[tuple[int, int, bool]]:
    """``count`` bits from ``first`` on, as runs: start, end, whether they are set."""
    if count <= 0:
        return
    end = first + count
    piece = bitmap[first >> 3 : (end + 7) >> 3]
    number = int.from_bytes(piece, "big") >> (-end & 7)
    number &= (1 << count) - 1
    if number in (0, (1 << count) - 1):
        yield first, end, number != 0
        return
    text = format(number, f"0{count}b")
    at = 0
    while at < count:
        is_set = text[at] == "1"
        stop = text.find("0" if is_set else "1", at)
        if stop < 0:
            stop = count
        yield first + at, first + stop, is_set
        at = stop


def are_set(bitmap: bytes | bytearray, first: int, count: int) -> bool:
    """Whether all ``count`` bits from ``first`` on are set."""
    end = first + count
    number = int.from_bytes(bitmap[first >> 3 : (end + 7) >> 3], "big") >> (-end & 7)
    mask = (1 << count) - 1
    return number & mask == mask


def any_set(bitmap: bytes | bytearray, first: int, count: int) -> bool:
    """Whether one of ``count`` bits from ``first`` on is set."""
    end = first + count
    number = int.from_bytes(bitmap[first >> 3 : (end + 7) >> 3], "big") >> (-end & 7)
    return number & ((1 << count) - 1) != 0


def put(bitmap: bytearray, first: int, count: int, *, value: bool) -> None:
    """``count`` bits from ``first`` on become ``value``."""
    if count <= 0:
        return
    end = first + count
    low, high = first >> 3, (end + 7) >> 3
    mask = ((1 << count) - 1) << (-end & 7)
    number = int.from_bytes(bitmap[low:high], "big")
    number = number | mask if value else number & ~mask
    bitmap[low:high] = number.to_bytes(high - low, "big")


def count(bitmap: bytes | bytearray, limit: int) -> int:
    """How many of the first ``limit`` bits are set."""
    number = int.from_bytes(bitmap[: (limit + 7) >> 3], "big") >> (-limit & 7)
    return number.bit_count()
