"""Registry hives: read as another program reads them, and refused when they are damaged."""

from __future__ import annotations

import contextlib
import struct
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvmgr import errors
from hvmgr.storage.registry import Hive
from tests.storage import hives

STATE = r"Microsoft\Windows\CurrentVersion\Setup\State"
CONTENT = {"One": {"Text": "some words", "Number": 70_000, "": "default", "T": "x"}, "two": {"Deep": {"V": "in it"}}}


@pytest.mark.parametrize("kind", [b"lf", b"lh", b"li"])
def test_values_are_found_in_any_case(kind):
    hive = Hive.of(hives.hive(CONTENT, kind=kind))
    assert hive.value("one", "TEXT") == "some words"
    assert hive.value("One", "Number") == 70_000
    assert hive.value("One", "T") == "x"
    assert hive.value(r"TWO\deep", "v") == "in it"
    assert hive.value(r"two\none", "v") is None
    assert hive.value("One", "none") is None
    assert Hive.of(hives.software("S", kind=kind)).value(STATE, "ImageState") == "S"


def test_another_program_reads_the_same(tmp_path, require_program):
    require_program("hivexget")
    file = tmp_path / "SOFTWARE"
    file.write_bytes(hives.software("IMAGE_STATE_COMPLETE"))
    words = ["hivexget", file, rf"\{STATE}", "ImageState"]
    told = subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout
    assert told.strip() == Hive.of(file.read_bytes()).value(STATE, "ImageState") == "IMAGE_STATE_COMPLETE"


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 8191), st.integers(0, 255)), max_size=12), st.integers(0, 9000))
def test_damage_is_corrupt_or_another_value_and_never_anything_else(spots, length):
    raw = bytearray(hives.hive(CONTENT))
    for at, byte in spots:
        raw[at] = byte
    with contextlib.suppress(errors.Corrupt, errors.Unsupported):
        Hive.of(bytes(raw[:length])).value(r"two\Deep", "V")


def with_list(raw, *places):
    """The hive with one more list of lists, which the root has its keys in from now on; and where that stands."""
    at = len(raw) - 4096
    own = [at if one is None else one for one in places]  # None: itself
    cell = struct.pack("<2sH", b"ri", len(own)) + struct.pack(f"<{len(own)}I", *own)
    length = -(-(len(cell) + 4) // 8) * 8
    changed = bytearray(raw) + struct.pack("<i", -length) + cell.ljust(length - 4, b"\0")
    struct.pack_into("<I", changed, root_of(raw) + 28, at)
    return bytes(changed), at


def root_of(raw):
    return struct.unpack_from("<I", raw, 36)[0] + 4096 + 4


def test_list_of_lists_is_followed_but_none_in_that():
    """A few in each other, each with the next one in it many times, would never end."""
    plain = hives.hive(CONTENT)
    raw, at = with_list(plain, struct.unpack_from("<I", plain, root_of(plain) + 28)[0])
    assert Hive.of(raw).value("One", "T") == "x"
    deep, place = with_list(plain)
    for _ in range(14):
        deep, place = with_list(deep, *[place] * 16)
    for bad in (with_list(raw, at)[0], with_list(plain, None)[0], deep):
        with pytest.raises(errors.Corrupt):
            Hive.of(bad).value("One", "T")
