"""A crash at any write: the file stays a valid VHD, and each sector has its old bytes or its new ones."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from hvmgr.vhd.chain import open_chain
from hvmgr.vhd.creation import create
from hvmgr.vhd.format import Kind
from hvmgr.vhd.image import open_image
from hvmgr.vhd.reshaping import compact, merge, reparent, resize
from hvmgr.vhd.rules import Severity
from hvmgr.vhd.source import read
from tests.vhd.disks import KIB, MIB, content, make_chain, scribble
from tests.vhd.recording import recorded

MENDABLE = {"F3", "F4", "F5", "F7"}  # footers: one of the two is whole


def leave(path: Path, data: bytes) -> None:
    """The file as a crash left it: valid, or one of its footers is."""
    path.write_bytes(data)
    with open_image(path, tolerant=True) as image:
        grave = {one.code for one in image.structure.faults if one.severity is not Severity.WARNING}
        assert grave <= MENDABLE


def shown_after(path: Path, data: bytes) -> bytes:
    """What the disk shows when its file was left as ``data``."""
    leave(path, data)
    return content(path, tolerant=True, any_size=True)


def start_of(path: Path) -> tuple[int, bytes]:
    """The size of a disk and its bytes as far as there are any."""
    with open_chain(path, tolerant=True, any_size=True) as disk:
        end = max((one.offset + one.length for one in disk.stretches() if one.data), default=0)
        return disk.size, read(disk, 0, end).rstrip(b"\0")


def require_old_or_new(found: bytes, *allowed: bytes) -> None:
    """Each sector is that of one of these disks."""
    for at in range(0, len(found), 512):
        sector = found[at : at + 512]
        assert any(sector == one[at : at + 512] for one in allowed), f"the sector at byte {at}"


@pytest.mark.parametrize("kind", ["dynamic", "fixed", "differencing"])
def test_write_in_place(tmp_path: Path, kind: str) -> None:
    size, path = 2 * MIB + 512, tmp_path / "disk.vhd"
    model = bytearray(size)
    if kind == "differencing":
        create(tmp_path / "parent.vhd", size, block_size=512 * KIB)
        with open_chain(tmp_path / "parent.vhd", writable=True) as disk:
            scribble(disk, model, 1)
        create(path, parent=tmp_path / "parent.vhd")
    else:
        create(path, size, kind=Kind(kind), block_size=512 * KIB)
    with open_chain(path, writable=True) as disk:
        scribble(disk, model, 2, count=2)
    flushed = [(0, bytes(model))]  # after so many acts the disk shows this at least
    written = [(0, bytes(model))]
    with recorded(path) as recording, open_chain(path, writable=True) as disk:
        for seed in range(3, 6):
            for part in range(3):
                scribble(disk, model, 10 * seed + part, count=1, unit=512)
                written.append((len(recording.acts), bytes(model)))
            disk.flush()
            flushed.append((len(recording.acts), bytes(model)))
    for number, data in recording.states(random.Random(1)):
        lasting, base = max(one for one in flushed if one[0] <= number)
        later = [shown for at, shown in written if at > lasting]
        require_old_or_new(shown_after(path, data), base, *later)


@pytest.mark.parametrize("base", ["dynamic", "fixed"])
@pytest.mark.parametrize("into", [1, 2])
def test_merge(tmp_path: Path, base: str, into: int) -> None:
    """The disk shows the same bytes all the while, and merging again completes it."""
    paths, shown = make_chain(tmp_path, 2, size=MIB)
    if base == "fixed":
        create(tmp_path / "fixed.vhd", MIB, kind=Kind.FIXED)
        with open_chain(tmp_path / "fixed.vhd", writable=True) as disk:
            disk.write(0, shown[0])
        reparent(paths[1], tmp_path / "fixed.vhd", ignore_id=True)
        paths[0] = tmp_path / "fixed.vhd"
    top = tmp_path / "top.avhd"
    model = bytearray(shown[1])
    create(top, parent=paths[1], block_size=1 * MIB)
    with open_chain(top, writable=True) as disk:
        scribble(disk, model, 7)
    target = paths[-into]
    with recorded(target) as recording, open_chain(top) as disk:
        merge(disk, into)
    for number, data in recording.states(random.Random(2), lossy=1):
        assert shown_after(target, data) is not None
        assert content(top, tolerant=True) == model
        if number % 7 == 0:
            with open_chain(top) as disk:
                merge(disk, into)
            assert content(target) == model


@pytest.mark.parametrize(("old", "new"), [(2 * MIB + 512, 700 * MIB), (700 * KIB, 2 * MIB), (2 * MIB, 700 * KIB)])
@pytest.mark.parametrize("kind", ["dynamic", "differencing"])
def test_resize(tmp_path: Path, kind: str, old: int, new: int) -> None:
    path, model = tmp_path / "disk.vhd", bytearray(old)
    if kind == "differencing":
        create(tmp_path / "parent.vhd", 3 * MIB, block_size=512 * KIB)
        with open_chain(tmp_path / "parent.vhd", writable=True) as disk:
            disk.write(0, b"parent's" * (3 * MIB // 8))
        create(path, old, parent=tmp_path / "parent.vhd", block_size=512 * KIB)
        model[:] = (b"parent's" * (3 * MIB // 8))[:old]
    else:
        create(path, old, block_size=512 * KIB)
    with open_chain(path, writable=True, any_size=True) as disk:
        scribble(disk, model, 3)
    with recorded(path) as recording:
        resize(path, new, allow_shrink=True)
    states = [(old, bytes(model).rstrip(b"\0")), (new, bytes(model[:new]).rstrip(b"\0"))]
    assert start_of(path) == states[1]
    for _, data in recording.states(random.Random(3), lossy=1):
        leave(path, data)
        assert start_of(path) in states


def test_resize_of_a_fixed_disk_keeps_its_bytes(tmp_path: Path) -> None:
    path, model = tmp_path / "disk.vhd", bytearray(MIB)
    create(path, MIB, kind=Kind.FIXED)
    with open_chain(path, writable=True) as disk:
        scribble(disk, model, 3)
    with recorded(path) as recording:
        resize(path, 2 * MIB)
    for _, data in recording.states(random.Random(3)):
        assert shown_after(path, data)[:MIB] == model
    assert content(path) == model + bytes(MIB)


def test_another_parent(tmp_path: Path) -> None:
    paths, shown = make_chain(tmp_path, 2, size=MIB)
    other = tmp_path / ("a-much-longer-name" * 5 + ".vhd")
    other.write_bytes(paths[0].read_bytes())
    with recorded(paths[1]) as recording:
        reparent(paths[1], other, prove=True)
    with open_chain(paths[1]) as disk:
        assert disk.images[1].path == other
    for _, data in recording.states(random.Random(4)):
        assert shown_after(paths[1], data) == shown[1]


def test_compacting_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, _ = make_chain(tmp_path, 1, size=MIB)
    before = paths[0].read_bytes()
    monkeypatch.setattr("hvmgr.vhd.creation.Writer.finish", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compact(paths[0])
    assert paths[0].read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == [paths[0].name]
