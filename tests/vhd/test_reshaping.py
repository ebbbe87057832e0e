"""Merge, resize, compact and another parent: what they refuse, and what they make of disks of unequal sizes."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvmgr import errors
from hvmgr.vhd import format, sizing
from hvmgr.vhd.chain import open_chain
from hvmgr.vhd.creation import create
from hvmgr.vhd.format import Kind
from hvmgr.vhd.image import open_image
from hvmgr.vhd.reshaping import compact, merge, reparent, resize
from hvmgr.vhd.source import read
from tests.vhd.disks import KIB, MIB, content, make_chain


def write(path: Path, at: int, data: bytes) -> None:
    with open_chain(path, writable=True, any_size=True) as disk:
        disk.write(at, data)


@pytest.fixture
def unequal(tmp_path: Path):
    """Three disks: 2 MiB of ``b``, below one of 1 MiB, below one of 2 MiB. What the middle one hides is zeros."""
    create(tmp_path / "base", 2 * MIB, block_size=512 * KIB)
    write(tmp_path / "base", 0, b"b" * 2 * MIB)
    create(tmp_path / "middle", MIB, parent=tmp_path / "base", block_size=512 * KIB)
    create(tmp_path / "top", 2 * MIB, parent=tmp_path / "middle", block_size=512 * KIB)
    write(tmp_path / "top", MIB + 4096, b"t" * 512)
    return tmp_path, b"b" * MIB + bytes(4096) + b"t" * 512 + bytes(MIB - 4096 - 512)


def test_shorter_image_hides_what_is_below_it(unequal) -> None:
    folder, shown = unequal
    assert content(folder / "top", any_size=True) == shown


@pytest.mark.parametrize("into", [1, 2])
def test_merge_does_not_bring_hidden_bytes_back(unequal, into: int) -> None:
    folder, shown = unequal
    with open_chain(folder / "top", any_size=True) as disk:
        merge(disk, into)
    target = folder / ("middle" if into == 1 else "base")
    assert content(target, any_size=True) == shown
    assert content(folder / "top", any_size=True) == shown


def test_merge_into_a_larger_one_gives_it_the_childs_size(tmp_path: Path) -> None:
    create(tmp_path / "base", 3 * MIB, kind=Kind.FIXED)
    write(tmp_path / "base", 0, b"b" * 3 * MIB)
    create(tmp_path / "top", MIB, parent=tmp_path / "base", block_size=512 * KIB)
    with open_chain(tmp_path / "top", any_size=True) as disk:
        merge(disk)
    assert content(tmp_path / "base") == b"b" * MIB
    assert (tmp_path / "base").stat().st_size == MIB + 512


def test_growing_a_child_does_not_bring_hidden_bytes_back(unequal) -> None:
    folder, _ = unequal
    resize(folder / "middle", 2 * MIB)
    assert content(folder / "middle") == b"b" * MIB + bytes(MIB)


def test_growing_a_child_needs_its_parents(unequal) -> None:
    folder, _ = unequal
    (folder / "base").rename(folder / "away")
    before = (folder / "middle").read_bytes()
    with pytest.raises(errors.NotFound, match="base"):
        resize(folder / "middle", 2 * MIB)
    assert (folder / "middle").read_bytes() == before


def test_old_bytes_behind_the_end_do_not_come_back(tmp_path: Path) -> None:
    for kind in (Kind.FIXED, Kind.DYNAMIC):
        path = tmp_path / kind
        create(path, 2 * MIB, kind=kind, block_size=512 * KIB)
        write(path, 0, b"x" * 2 * MIB)
        resize(path, 700 * 512, allow_shrink=True)
        resize(path, 3 * MIB)
        assert content(path) == b"x" * 700 * 512 + bytes(3 * MIB - 700 * 512)


@pytest.mark.parametrize("depth", [1, 2])
def test_table_that_outgrows_its_place_again_and_again(tmp_path: Path, depth: int) -> None:
    """It moves behind the blocks, and blocks come to lie behind it."""
    paths, shown = make_chain(tmp_path, depth, size=MIB)
    path, places = paths[-1], set()
    for number in range(6):
        size = (200 << number) * MIB
        resize(path, size)
        write(path, size - 512, bytes([number + 1]) * 512)
        with open_image(path) as image:
            assert [one.code for one in image.structure.faults if one.code != "F44"] == []
            assert image.header is not None
            places.add(image.header.table_offset)
    assert len(places) > 4
    with open_chain(path, any_size=True) as disk:
        assert read(disk, 0, MIB) == shown[-1]
        for number in range(6):
            assert (
                read(disk, (200 << number) * MIB - 1024, 1536 if number < 5 else 1024)
                == (bytes(512) + bytes([number + 1]) * 512 + bytes(512))[: 1536 if number < 5 else 1024]
            )


def test_everything_changes_while_a_disk_is_open(tmp_path: Path) -> None:
    paths, shown = make_chain(tmp_path, 2, size=MIB)
    with open_chain(paths[1], writable=True) as disk:
        for number in range(1, 6):
            disk.top.take_space(700)
            sizing.set_size(disk.top, (200 << number) * MIB)
            disk.write((200 << number) * MIB - 512, b"end" * 170 + b"..")
            disk.top.change_header(parent_time=number, parent_name=format.encode_name("disk0.vhd" + " " * number))
    with open_chain(paths[1], any_size=True) as disk:
        assert {one.code for one in disk.faults} == {"F40", "F44"}
        assert read(disk, 0, MIB) == shown[1]
        assert sum(one.length for one in disk.stretches(MIB) if one.data) == 5 * 512


def test_shrinking_has_to_be_allowed(tmp_path: Path) -> None:
    create(tmp_path / "disk", 2 * MIB)
    with pytest.raises(errors.Conflict, match="would be lost") as caught:
        resize(tmp_path / "disk", MIB)
    assert caught.value.hint
    assert content(tmp_path / "disk") == bytes(2 * MIB)


def test_resize_leaves_a_geometry_and_a_creator_that_mean_the_size(tmp_path: Path) -> None:
    create(tmp_path / "disk", 2 * MIB)
    with open_image(tmp_path / "disk", writable=True) as image:
        image.change_footer(creator=b"vpc ", creator_version=0x10000)
    resize(tmp_path / "disk", 64 * MIB)
    with open_image(tmp_path / "disk") as image:
        assert (image.footer.creator, image.footer.geometry) == (b"win ", format.geometry(64 * MIB))
        assert image.footer.original_size == 2 * MIB
        assert image.structure.faults == ()


@pytest.mark.parametrize("work", ["merge", "resize", "compact"])
def test_disk_of_a_saved_vm_is_left_alone(tmp_path: Path, work: str) -> None:
    paths, _ = make_chain(tmp_path, 2, size=MIB)
    with open_image(paths[1], writable=True) as image:
        image.change_footer(saved_state=1)
    before = [path.read_bytes() for path in paths]
    with pytest.raises(errors.Conflict, match="saved VM"), open_chain(paths[1]) as disk:
        if work == "merge":
            merge(disk)
        elif work == "resize":
            resize(paths[1], 2 * MIB)
        else:
            compact(paths[1])
    assert [path.read_bytes() for path in paths] == before


@pytest.mark.parametrize("into", [0, 2, -1])
def test_merge_into_what_is_no_ancestor(tmp_path: Path, into: int) -> None:
    paths, _ = make_chain(tmp_path, 2, size=MIB)
    with open_chain(paths[1]) as disk, pytest.raises(errors.UsageError, match="no ancestor"):
        merge(disk, into)


def test_merge_tells_how_far_it_is(tmp_path: Path) -> None:
    paths, _ = make_chain(tmp_path, 2, size=MIB)
    told = []
    with open_chain(paths[1]) as disk:
        merge(disk, on_progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert told[-1] == (MIB, MIB)


def test_compact_drops_blocks_of_zeros_and_keeps_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    create(path, 8 * MIB, block_size=512 * KIB)
    write(path, 0, b"x" * 8 * MIB)
    create(tmp_path / "child", parent=path)
    write(path, MIB, bytes(6 * MIB))
    path.chmod(0o440)
    (tmp_path / "link").symlink_to("disk")
    with open_image(path) as image:
        uid, time = image.uid, image.footer.time
    before, after = compact(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert before > 8 * MIB
    assert 2 * MIB < after < 3 * MIB
    assert path.stat().st_mode & 0o777 == 0o440
    assert content(tmp_path / "child") == b"x" * MIB + bytes(6 * MIB) + b"x" * MIB
    with open_image(path) as image:
        assert (image.uid, image.footer.time) == (uid, time)


def test_compact_keeps_what_a_child_says_of_its_parent(tmp_path: Path) -> None:
    paths, shown = make_chain(tmp_path, 2, size=MIB)
    write(paths[1], 0, bytes(MIB))
    with open_image(paths[1]) as image:
        texts, header = image.structure.texts, image.header
    compact(paths[1])
    with open_image(paths[1]) as image:
        assert image.structure.texts == texts
        assert image.header is not None
        assert header is not None
        assert (image.header.parent_uid, image.header.parent_time) == (header.parent_uid, header.parent_time)
    assert content(paths[1]) == bytes(MIB) != shown[0]


def test_fixed_disk_cannot_be_compacted(tmp_path: Path) -> None:
    create(tmp_path / "disk", MIB, kind=Kind.FIXED)
    with pytest.raises(errors.Unsupported, match="fixed"):
        compact(tmp_path / "disk")


def test_other_parent_has_to_be_the_same_disk(tmp_path: Path) -> None:
    paths, shown = make_chain(tmp_path, 2, size=MIB)
    before = paths[1].read_bytes()
    create(tmp_path / "larger", 2 * MIB)
    create(tmp_path / "other", MIB)
    write(tmp_path / "other", 0, shown[0][: MIB - 512] + b"not" * 170 + b"it")
    for parent, options, words in [
        ("other", {}, "has the id"),
        ("larger", {"ignore_id": True}, "2097152"),
        ("other", {"ignore_id": True, "prove": True}, "differ at byte"),
    ]:
        with pytest.raises(errors.Conflict, match=words):
            reparent(paths[1], tmp_path / parent, **options)
    with pytest.raises(errors.Conflict, match="only a differencing one"):
        reparent(paths[0], tmp_path / "other", ignore_id=True)
    assert paths[1].read_bytes() == before
    assert content(paths[1]) == shown[1]


def test_other_parent_with_the_same_bytes_is_proved_and_taken(tmp_path: Path) -> None:
    paths, shown = make_chain(tmp_path, 2, size=MIB)
    other = tmp_path / "fixed copy.vhd"
    create(other, MIB, kind=Kind.FIXED)
    write(other, 0, shown[0])
    reparent(paths[1], other, ignore_id=True, prove=True, windows_path="E:\\fixed copy.vhd")
    paths[0].unlink()
    assert content(paths[1]) == shown[1]
    with open_image(paths[1]) as image:
        assert image.structure.faults == ()
        assert [one.text for one in image.structure.texts] == [".\\fixed copy.vhd", "E:\\fixed copy.vhd"]
    other.rename(tmp_path / "renamed.vhd")
    with pytest.raises(errors.NotFound):
        reparent(paths[1], tmp_path / "renamed.vhd", ignore_id=True, prove=True)
    reparent(paths[1], tmp_path / "renamed.vhd")
    assert content(paths[1]) == shown[1]


def test_files_of_xenserver_with_a_batmap(tmp_path: Path) -> None:
    """A batmap lies behind the table; no block may lie over it, and the table may not grow into it."""
    path = tmp_path / "disk.vhd"
    create(path, 4 * MIB, block_size=512 * KIB)
    with open_image(path, writable=True) as image:
        image.change_footer(creator=b"tap\0", creator_version=0x00010003, creator_host=bytes(4))
        assert image.header is not None
        place = image.take_space(1024)
        assert place == image.header.table_offset + 512
        image.file.write(place, b"tdbatmap" + (place + 512).to_bytes(8, "big") + (1).to_bytes(4, "big") + bytes(492))
    write(path, 0, b"x" * 4 * MIB)
    with open_image(path) as image:
        assert [area.what for area in image.structure.areas][-2:] == ["batmap's header", "batmap"]
        assert image.structure.faults == ()
    resize(path, 300 * MIB)
    with open_image(path) as image:
        assert image.structure.faults == ()
        assert image.footer.creator == b"win "
    with open_chain(path) as disk:
        assert [one[:2] for one in disk.stretches() if one.data] == [(0, 4 * MIB)]
