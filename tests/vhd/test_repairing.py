"""What is put right, what is refused, and that a death in the middle leaves something that can be put right."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from hvmgr import errors
from hvmgr.vhd import checking, repairing
from hvmgr.vhd.file import File
from hvmgr.vhd.repairing import Keep
from tests.vhd import planted
from tests.vhd.planted import ALL, BLOCK, SIZE, Planted

BLOCKS = {1: (ALL, b"1" * BLOCK), 2: (b"\xf0" + bytes(511), b"2" * 2048 + bytes(2048)), 4: (ALL, b"4" * BLOCK)}


def sound() -> Planted:
    return planted.sparse(BLOCKS)


def end_checksum(made):
    made.put(made.end + 300, b"x")


def both_checksums(made):
    for start in (0, made.end):
        made.put(start + 64, b"xxxx")


def end_overwritten(made):
    made.put(made.end, b"\xff" * 512)


def copy_checksum(made):
    made.put(64, b"xxxx")


def copy_overwritten(made):
    made.put(0, b"\xff" * 512)


def footer_missing(made):
    del made.data[made.end :]


def footer_cut(made):
    del made.data[-100:]


def trailing_bytes(made):
    made.data += b"appended by a transport"


def trailing_sectors(made):
    made.data += bytes(70_000)


def old_short_footer(made):
    del made.data[-1:]


def stale_data(made):
    made.put(made.blocks[2] + 512 + 3000, b"stale")


def large_geometry(made):
    made.footers(56, b"\x00\xf0\x04\x11")


DAMAGES = {
    end_checksum: {"F4"},
    both_checksums: {"F6"},
    end_overwritten: {"F3"},
    copy_checksum: {"F5"},
    copy_overwritten: {"F5"},
    footer_missing: {"F3"},
    footer_cut: {"F2", "F3"},
    trailing_bytes: {"F2", "F3"},
    trailing_sectors: {"F2", "F3"},
    old_short_footer: {"F2"},
    stale_data: {"F33"},
    large_geometry: {"F16"},
}


def written(tmp_path: Path, made: Planted) -> Path:
    path = tmp_path / "disk.vhd"
    path.write_bytes(made.data)
    return path


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_file_is_put_right(tmp_path: Path, damage) -> None:
    made = sound()
    whole = bytes(made.data)
    damage(made)
    path = written(tmp_path, made)
    repaired = repairing.repair(path)
    assert {fault.code for fault in repaired} == DAMAGES[damage]
    assert all(fault.path == path for fault in repaired)
    assert checking.check(path) == []
    if damage is end_overwritten:  # nobody knows what stood there: the footer comes behind it
        assert path.read_bytes() == whole[:-512] + b"\xff" * 512 + whole[-512:]
    else:
        assert path.read_bytes() == whole
    assert repairing.repair(path) == [], "a second time there is nothing to do"


@pytest.mark.parametrize("damage", [end_checksum, copy_checksum, footer_missing, trailing_bytes, stale_data])
def test_several_damages_at_once(tmp_path: Path, damage) -> None:
    made = sound()
    whole = bytes(made.data)
    stale_data(made)
    damage(made)
    path = written(tmp_path, made)
    repairing.repair(path)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda made: (end_checksum(made), made.entry(1, 1)), id="block-over-the-header"),
        pytest.param(lambda made: made.data.__delitem__(slice(-1000, None)), id="block-cut"),
        pytest.param(lambda made: (end_checksum(made), copy_checksum(made)), id="both-footers"),
        pytest.param(lambda made: (stale_data(made), made.put(513, b"X")), id="header"),
    ],
)
def test_what_needs_a_guess_is_left_alone(tmp_path: Path, damage) -> None:
    made = sound()
    damage(made)
    path = written(tmp_path, made)
    with pytest.raises(errors.Corrupt):
        repairing.repair(path)
    assert path.read_bytes() == made.data


def two_good_footers(made: Planted) -> None:
    made.put(68, b"the id at start!")
    planted.seal(made.data, 0, 512, 64)


def test_footers_that_differ_are_never_chosen_silently(tmp_path: Path) -> None:
    made = sound()
    two_good_footers(made)
    path = written(tmp_path, made)
    with pytest.raises(errors.Conflict) as caught:
        repairing.repair(path)
    assert "uid" in caught.value.message
    assert path.read_bytes() == made.data


@pytest.mark.parametrize(("keep", "uid"), [(Keep.START, b"the id at start!"), (Keep.END, planted.UID)])
def test_footer_that_the_caller_chose_is_kept(tmp_path: Path, keep, uid) -> None:
    made = sound()
    two_good_footers(made)
    path = written(tmp_path, made)
    assert [fault.code for fault in repairing.repair(path, keep=keep)] == ["F7"]
    data = path.read_bytes()
    assert data[:512] == data[-512:]
    assert data[68:84] == uid


@pytest.mark.parametrize(("creator", "geometry"), [(b"win ", None), (b"vpc ", b"\xff\xff\x10\xff")])
def test_geometry_becomes_that_of_the_size(tmp_path: Path, creator, geometry) -> None:
    """Where a program would go by it and not by the size, it becomes the one that says: do not."""
    made = sound()
    made.footers(28, creator)
    large_geometry(made)
    path = written(tmp_path, made)
    repairing.repair(path)
    cylinders, heads, sectors = planted.geometry(SIZE)
    assert path.read_bytes()[-512:][56:60] == geometry or bytes([0, cylinders, heads, sectors])
    assert checking.check(path) == []


def test_fixed_disk(tmp_path: Path) -> None:
    made = planted.fixed()
    made.footers(16, (0xFFFFFFFF).to_bytes(8, "big"))
    path = written(tmp_path, made)
    assert [fault.code for fault in repairing.repair(path)] == ["F11"]
    assert path.read_bytes() == planted.fixed().data


class Died(BaseException):
    """The process is gone."""


@pytest.mark.parametrize("damage", [*DAMAGES, two_good_footers], ids=lambda damage: damage.__name__)
def test_death_at_any_write_leaves_a_file_that_can_be_put_right(tmp_path: Path, monkeypatch, damage) -> None:
    made = sound()
    damage(made)
    for deaths in itertools.count():
        path = tmp_path / f"{deaths}.vhd"
        path.write_bytes(made.data)
        with monkeypatch.context() as patch:
            _die_at(patch, deaths)
            try:
                repairing.repair(path, keep=Keep.END)
            except Died:
                pass
            else:
                break
        repairing.repair(path, keep=Keep.END)
        assert checking.check(path) == []
        assert path.read_bytes()[: made.blocks[4] + 512 + BLOCK][512:] == (
            bytes(sound().data[512 : made.blocks[4] + 512 + BLOCK])
        )
    assert deaths > 0


def _die_at(patch, number: int) -> None:
    """In the middle of the write with this number, or at this change of the length."""
    acts = itertools.count()
    write, set_length = File.write, File.set_length

    def dying_write(file, offset, data):
        if next(acts) == number:
            write(file, offset, bytes(data)[: len(data) // 2])
            raise Died
        write(file, offset, data)

    def dying_set_length(file, length):
        if next(acts) == number:
            raise Died
        set_length(file, length)

    patch.setattr(File, "write", dying_write)
    patch.setattr(File, "set_length", dying_set_length)
