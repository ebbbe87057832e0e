"""A stream that became a file, and one that did not."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from hvmgr import errors
from hvmgr.vhd import checking
from hvmgr.vhd.creation import write_raw
from hvmgr.vhd.format import Kind
from hvmgr.vhd.image import open_image
from hvmgr.vhd.layout import Parentage
from hvmgr.vhd.receiving import receive
from hvmgr.vhd.stream_reader import StreamReader
from hvmgr.vhd.stream_writer import StreamWriter
from tests.vhd import planted
from tests.vhd.test_streams import DISK, UNIT, Memory, written

PARENT = Parentage(planted.PARENT_UID, "base.vhd", r".\base.vhd", time=7)


def stream(**options) -> StreamReader:
    data = written(StreamWriter(Memory(DISK), block_size=UNIT, uid=planted.UID, **options))
    return StreamReader(io.BytesIO(data), length=len(data))


def content(path: Path) -> bytes:
    with open_image(path) as image:
        data = bytearray(image.size)
        image.read_into(0, memoryview(data))
    return bytes(data)


@pytest.mark.parametrize("kind", [Kind.DYNAMIC, Kind.FIXED])
def test_whole_disk_becomes_a_vhd_of_its_kind(tmp_path: Path, kind) -> None:
    path, done = tmp_path / "disk.vhd", []
    receive(stream(kind=kind), path, on_progress=lambda *numbers: done.append(numbers))
    assert checking.check(path) == []
    with open_image(path) as image:
        assert (image.kind, image.uid, image.size) == (kind, planted.UID, len(DISK))
    assert content(path) == DISK
    assert done[-1] == (len(DISK), len(DISK))


@pytest.mark.parametrize("kind", [Kind.DYNAMIC, Kind.FIXED])
def test_whole_disk_becomes_its_bytes(tmp_path: Path, kind) -> None:
    receive(stream(kind=kind), tmp_path / "disk.raw", raw=True)
    assert (tmp_path / "disk.raw").read_bytes() == DISK
    assert (tmp_path / "disk.raw").stat().st_blocks * 512 < len(DISK)


def test_delta_becomes_a_child(tmp_path: Path) -> None:
    path = tmp_path / "child.vhd"
    receive(stream(parent=PARENT, changed=[(0, 512), (UNIT, 512)]), path)
    assert checking.check(path) == []
    with open_image(path) as image:
        assert (image.uid, image.parent_uid, image.header.name) == (planted.UID, PARENT.uid, PARENT.name)
        held = [(one.offset, one.length) for one in image.stretches() if one.data]
        assert sum(length for _, length in held) == 2 * UNIT, "zeros of the child hide the parent's data"
    with pytest.raises(errors.UsageError):
        receive(stream(parent=PARENT), tmp_path / "raw", raw=True)


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data + b"x", lambda data: data[:-512]])
def test_damaged_stream_leaves_nothing(tmp_path: Path, raw, damage) -> None:
    data = damage(written(StreamWriter(Memory(DISK), block_size=UNIT)))
    with pytest.raises(errors.Corrupt):
        receive(StreamReader(io.BytesIO(data)), tmp_path / "disk", raw=raw)
    assert list(tmp_path.iterdir()) == []


def test_disk_is_written_as_its_bytes(tmp_path: Path) -> None:
    done = []
    write_raw(tmp_path / "disk", Memory(DISK), on_progress=lambda *numbers: done.append(numbers))
    assert (tmp_path / "disk").read_bytes() == DISK
    assert done[-1] == (len(DISK), len(DISK))
    with pytest.raises(errors.Conflict):
        write_raw(tmp_path / "disk", Memory(DISK))


def test_existing_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"mine")
    with pytest.raises(errors.Conflict):
        receive(stream(), tmp_path / "disk")
    assert (tmp_path / "disk").read_bytes() == b"mine"
