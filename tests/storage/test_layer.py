"""The layer of a natively booted system: stores as Linux writes them, and ones that nobody must merge."""

from __future__ import annotations

import errno
import os
import struct
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvmgr import errors
from hvmgr.storage import allocation, layer
from hvmgr.vhd.source import read

CHUNK = layer.CHUNK
DISK = 700 * CHUNK - 1024  # the last chunk is cut


def store(pairs, *, valid=1, version=1, magic=0x70416E53, sectors=8, disk=DISK):
    """A store after drivers/md/dm-snap-persistent.c: areas of pairs, each in front of the chunks that it has place for."""
    data = bytearray(layer.size_for(disk))
    struct.pack_into("<IIII", data, 0, magic, valid, version, sectors)
    chunk = sectors * 512
    per = chunk // 16
    for number, (old, content) in enumerate(pairs):
        area, slot = divmod(number, per)
        at = (1 + area * (per + 1)) * chunk
        new = 1 + area * (per + 1) + 1 + slot
        struct.pack_into("<QQ", data, at + 16 * slot, old, new)
        data[new * chunk : (new + 1) * chunk] = content
    return bytes(data)


def opened(data, folder, disk=DISK):
    path = Path(folder) / "layer"
    path.write_bytes(data)
    return layer.opened(path, disk)


@settings(max_examples=12)
@given(st.lists(st.integers(0, 699), unique=True, max_size=600), st.integers(0, 255))
def test_reads_what_was_written(olds, seed):
    pairs = [(old, bytes([(old + seed) % 256]) * CHUNK) for old in olds]
    wanted = bytearray(700 * CHUNK)
    for old, content in pairs:
        wanted[old * CHUNK : (old + 1) * CHUNK] = content
    with tempfile.TemporaryDirectory() as folder, opened(store(pairs), folder) as found:
        assert read(found, 0, DISK) == wanted[:DISK]
        assert found.written == len(pairs) * CHUNK
        held = {one.offset // CHUNK for one in found.stretches() if one.data}
        assert held == set(olds)
        assert sum(one.length for one in found.stretches()) == DISK


def test_empty_store_holds_nothing(tmp_path):
    layer.make(tmp_path / "layer", DISK)
    with layer.opened(tmp_path / "layer", DISK) as found:
        assert (found.written, [one.data for one in found.stretches()]) == (0, [False])
    assert (tmp_path / "layer").stat().st_size == layer.size_for(DISK)


def test_space_of_a_store_is_reserved(tmp_path):
    """Whatever fills the volume later: a store that finds no space is worthless."""
    if not allocation.can_reserve(tmp_path):
        pytest.skip("this file system cannot reserve space")
    path = tmp_path / "layer"
    layer.make(path, DISK)
    assert path.stat().st_blocks * 512 >= layer.size_for(DISK)
    assert (layer.unfilled(path, DISK), path.read_bytes()) == (0, bytes(layer.size_for(DISK)))


@pytest.mark.parametrize("can", [True, False], ids=["reserved", "of-holes"])
def test_store_is_emptied_where_it_is(tmp_path, monkeypatch, can):
    if not can:
        monkeypatch.setattr(allocation, "_fallocate", not_supported)
    path = tmp_path / "layer"
    layer.make(path, DISK)
    path.write_bytes(store([(old, b"x" * CHUNK) for old in range(300)])[:-CHUNK])
    assert layer.is_used(path)
    number = path.stat().st_ino
    layer.empty(path, DISK)
    assert (layer.is_used(path), path.stat().st_ino) == (False, number)
    assert path.read_bytes() == bytes(layer.size_for(DISK))
    if not can:
        assert layer.unfilled(path, DISK) == layer.size_for(DISK) - path.stat().st_blocks * 512 > 0


def not_supported(*_args):
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


def test_store_takes_a_whole_disk():
    chunks = DISK // CHUNK + 1
    data = store([(old, b"x" * CHUNK) for old in range(chunks)])
    assert len(data) == layer.size_for(DISK)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        pytest.param(store([], valid=0), "ran out of space", id="invalid"),
        pytest.param(store([], magic=0x12345678), "no store", id="other-magic"),
        pytest.param(store([], version=2), "no store", id="other-version"),
        pytest.param(store([], sectors=8).replace(b"\x08\0\0\0", b"\x07\0\0\0", 1), "sectors", id="odd-chunks"),
        pytest.param(store([(700, b"x" * CHUNK)]), "cannot be", id="behind-the-disk"),
        pytest.param(store([(3, b"x" * CHUNK), (3, b"y" * CHUNK)]), "cannot be", id="twice"),
        pytest.param(store([(3, b"x" * CHUNK)])[: 2 * CHUNK], "cannot be", id="cut-off"),
        pytest.param(b"", "too short", id="nothing"),
    ],
)
def test_damaged_store_is_refused(data, words, tmp_path):
    with pytest.raises(errors.Corrupt, match=words):
        opened(data, tmp_path)
