"""Bitmaps against a plain list of booleans."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from hvmgr.vhd import bits
from tests.vhd.disks import STEADY

BITS = st.lists(st.booleans(), min_size=8, max_size=200).map(lambda found: found[: len(found) // 8 * 8])


def packed(values: list[bool]) -> bytearray:
    return bytearray(sum(0x80 >> bit for bit in range(8) if values[at + bit]) for at in range(0, len(values), 8))


@STEADY
@given(BITS, st.data())
def test_runs_are_those_of_the_list(values: list[bool], data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(values)))
    count = data.draw(st.integers(0, len(values) - first))
    found = list(bits.runs(packed(values), first, count))
    assert [one for start, end, is_set in found for one in [is_set] * (end - start)] == values[first : first + count]
    assert all(one[1] == other[0] and one[2] != other[2] for one, other in itertools.pairwise(found))
    assert bits.are_set(packed(values), first, count) == all(values[first : first + count])
    assert bits.any_set(packed(values), first, count) == any(values[first : first + count])


@STEADY
@given(BITS, st.booleans(), st.data())
def test_put_changes_its_range_only(values: list[bool], value: bool, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(values)))
    count = data.draw(st.integers(0, len(values) - first))
    bitmap = packed(values)
    bits.put(bitmap, first, count, value=value)
    values[first : first + count] = [value] * count
    assert bitmap == packed(values)
    assert bits.count(bitmap, len(values)) == sum(values)
