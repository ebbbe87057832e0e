"""The block table against a plain list."""

from __future__ import annotations

import itertools
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvmgr.vhd import table
from hvmgr.vhd.format import UNUSED
from hvmgr.vhd.table import Table
from tests.vhd.disks import STEADY

ENTRIES = st.lists(st.one_of(st.just(UNUSED), st.integers(0, 2000), st.integers(0, UNUSED)), min_size=1, max_size=40)


@STEADY
@given(ENTRIES, st.sampled_from([1, 7, 1 << 19]))
def test_table_is_what_the_list_is(entries: list[int], part: int) -> None:
    found = Table(array("I", entries))
    used = [number for number, sector in enumerate(entries) if sector != UNUSED]
    assert list(found.allocated()) == used
    assert found.count() == len(used)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "_PART", part)
        assert list(found.places()) == sorted(entries[number] for number in used)
    assert Table.unpack(found.pack()).pack() == found.pack()
    assert found.pack() == b"".join(sector.to_bytes(4, "big") for sector in entries)


@STEADY
@given(ENTRIES, st.integers(1, 50), st.integers(0, 3000), st.integers(1, 3000))
def test_blocks_in_a_range_and_over_each_other(entries: list[int], stride: int, start: int, length: int) -> None:
    places = Table(array("I", entries)).places()
    end = start + length
    touched = [one for one in places if one * 512 < end * 512 and (one + stride) * 512 > start * 512]
    assert list(table.within(places, stride, start * 512, end * 512)) == touched[:16]
    close = [(one, other) for one, other in itertools.pairwise(places) if other - one < stride]
    assert table.overlaps(places, stride) == close[:16]
