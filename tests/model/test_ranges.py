"""Ranges, against sets of numbers."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from hvmgr.model.ranges import Ranges

RANGE = st.tuples(st.integers(0, 60), st.integers(0, 60))
SOME = st.lists(RANGE, max_size=8)


def numbers(ranges):
    return {one for start, end in ranges for one in range(start, end)}


@settings(deadline=None)
@given(SOME, SOME, RANGE)
def test_ranges_are_sets(first, second, asked):
    found = Ranges(first)
    assert numbers(found) == numbers(first)
    assert list(found) == sorted(found)
    assert all(one[1] < other[0] for one, other in zip(list(found), list(found)[1:], strict=False))
    assert found.size == len(numbers(first))
    assert numbers(found.joined(second)) == numbers(first) | numbers(second)
    assert found.touch(*asked) is bool(numbers(first) & numbers([asked]))
    assert found.touch_any(second) is bool(numbers(first) & numbers(second))
    assert numbers(found.within(*asked)) == numbers(first) & numbers([asked])
    assert numbers(found.moved(*asked, 100)) == {one - asked[0] + 100 for one in numbers(first) & numbers([asked])}
    assert numbers(found.blocks(7)) == {one // 7 for one in numbers(first)}
    assert bool(found) is bool(numbers(first))
    assert found.touch(*asked) <= Ranges.everything().touch(*asked)
