"""Structures between bytes and values: nothing is lost, sums are right, the geometry is Microsoft's."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvmgr.vhd import format
from hvmgr.vhd.format import Footer, Header, Locator
from tests.vhd.disks import STEADY

MIB, GIB = 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("size", "shape", "short"),
    [
        (4 * MIB, "120/4/17", 16_384),
        (64 * MIB, "963/8/17", 53_248),
        (136 * MIB, "561/16/31", 139_264),
        (250 * MIB, "507/16/63", 483_328),
        (10 * GIB, "20805/16/63", 40_960),
        (24 * GIB, "49932/16/63", 98_304),
        (33_822_351_360, "16191/16/255", 0),
        (127 * GIB, "65278/16/255", 2_080_768),
    ],
)
def test_geometry_is_that_of_the_specification(size: int, shape: str, short: int) -> None:
    found = format.geometry(size)
    assert f"{found.cylinders}/{found.heads}/{found.sectors}" == shape
    assert size - found.size == short


def test_geometry_of_large_disks_is_the_largest() -> None:
    assert format.geometry(2040 * GIB) == format.MAX_GEOMETRY
    assert format.MAX_GEOMETRY.size == 136_899_993_600


@STEADY
@given(st.integers(1, format.MAX_SIZE // 512))
def test_geometry_never_covers_more_than_the_disk(sectors: int) -> None:
    found = format.geometry(sectors * 512)
    assert found.size <= sectors * 512
    assert max(found.heads, 1) <= 16
    assert found.cylinders <= 65535


@STEADY
@given(st.binary(min_size=512, max_size=512))
def test_any_footer_comes_back_with_a_right_sum(data: bytes) -> None:
    packed = Footer.unpack(data).pack()
    assert packed[:64] == data[:64]
    assert packed[68:] == data[68:]
    assert format.has_right_sum(packed, format.FOOTER_SUM_AT)


@STEADY
@given(st.binary(min_size=1024, max_size=1024))
def test_any_header_comes_back_with_a_right_sum(data: bytes) -> None:
    packed = Header.unpack(data).pack()
    assert packed[:36] == data[:36]
    assert packed[40:] == data[40:]
    assert format.has_right_sum(packed, format.HEADER_SUM_AT)


def test_new_footer_is_that_of_windows_10() -> None:
    data = Footer(size=4 * MIB, type=3, uid=bytes(range(16)), geometry=format.geometry(4 * MIB)).pack()
    assert data[:16] == b"conectix\0\0\0\2\0\1\0\0"
    assert data[28:40] == b"win \0\x0a\0\0Wi2k"
    assert data[56:60] == bytes([0, 120, 4, 17])


def test_short_footer_of_old_programs_is_read() -> None:
    data = Footer(size=4 * MIB, type=3, uid=bytes(range(16))).pack()
    assert Footer.unpack(data[:511]) == Footer.unpack(data)


def test_time_stamps() -> None:
    moment = datetime(2026, 11, 29, 12, 0, 1, tzinfo=UTC)
    assert format.from_stamp(format.to_stamp(moment)) == moment
    assert format.to_stamp(datetime(1999, 1, 1, tzinfo=UTC)) == 0
    assert format.to_stamp(datetime(2200, 1, 1, tzinfo=UTC)) == 0xFFFFFFFF
    assert format.from_stamp(0) is None


@pytest.mark.parametrize(("space", "length"), [(1, 512), (8, 4096), (512, 512), (65536, 65536), (513, -1)])
def test_space_of_a_locator_in_both_units(space: int, length: int) -> None:
    assert Locator(b"W2ru", space).space_bytes == length


def test_texts_have_the_order_of_bytes_of_their_place() -> None:
    assert format.encode_name("ä").startswith(b"\0\xe4")
    assert format.encode_text(format.Code.RELATIVE, ".\\ä") == b".\0\\\0\xe4\0"
    assert format.encode_text(format.Code.URL, "file://./ä") == "file://./ä".encode()
    assert format.locator_text(b"W2ru", b".\0\\\0\xe4\0") == ".\\ä"
    assert len(format.encode_name("x" * 300)) == 512


@pytest.mark.parametrize(("block", "length"), [(512, 512), (512 << 10, 512), (2 << 20, 512), (256 << 20, 65536)])
def test_bitmap_takes_whole_sectors(block: int, length: int) -> None:
    assert format.bitmap_size(block) == length
