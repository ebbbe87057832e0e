"""Damage of one kind at a time, put into file systems that their own tools made: it is said, and nothing waits for ever."""

from __future__ import annotations

import os
import shutil
import struct
import zlib

import pytest

from hvmgr import errors
from hvmgr.storage.filesystems import btrfs, btrfs_data, opening, signatures, window
from hvmgr.storage.filesystems.reader import Bytes, Runs
from hvmgr.storage.partitions import File
from tests.storage import file_trees

STREAMS = 12  # more than one record holds


def opened(disk):
    found = signatures.recognise(disk)
    return opening.open_reader(found.kind, disk)


def patched(image, folder, *changes):
    """A copy of an image with other bytes: (place, bytes)."""
    copy = folder / "patched"
    shutil.copyfile(image, copy)
    with copy.open("r+b") as file:
        for place, data in changes:
            file.seek(place)
            file.write(data)
    return copy


@pytest.fixture(scope="module")
def ntfs_image(tmp_path_factory, require_program):
    """Two files, and one whose streams fill several records."""
    for name in ("mkntfs", "wimapply", "ntfscp"):
        require_program(name)
    folder = tmp_path_factory.mktemp("ntfs")
    tree = folder / "tree"
    tree.mkdir()
    for name in ("one", "two", "streams"):
        (tree / name).write_bytes(name.encode())
    image = file_trees.ntfs(folder / "image", tree, size=8 << 20)
    for number in range(STREAMS):
        file_trees.run("ntfscp", "-q", "-N", f"{number:02}" + "n" * 60, image, tree / "one", "streams")
    return image


class TestNtfs:
    @pytest.fixture
    def image(self, ntfs_image):
        return ntfs_image

    def record(self, image, number):
        """Where a record is."""
        with image.open("rb") as file:
            file.seek(48)
            return int.from_bytes(file.read(8), "little") * 4096 + number * 1024

    def test_a_record_that_was_used_again_is_not_the_file_of_the_old_name(self, image, tmp_path):
        with File(image) as disk:
            number = dict(file_trees.walked(opened(disk)))[b"one"].id
        copy = patched(image, tmp_path, (self.record(image, number) + 16, b"\x63\0"))
        with File(copy) as disk:
            reader = opened(disk)
            refs = dict(reader.names(reader.root()))
            assert reader.stat(refs[b"two"]).size == 3
            with pytest.raises(errors.Corrupt, match=f"record {number} was used again"):
                reader.stat(refs[b"one"])

    @pytest.mark.parametrize("place", [16, 38], ids=["used again", "of another use of the file"])
    def test_more_records_of_a_file_have_to_be_of_its_time(self, image, tmp_path, place):
        with File(image) as disk:
            reader = opened(disk)
            node = dict(file_trees.walked(reader))[b"streams"]
            assert len(node.streams) == STREAMS
            more = next(one for one in range(24, 200) if self.base(image, one) == node.id)
        copy = patched(image, tmp_path, (self.record(image, more) + place, b"\x63\0"))
        with File(copy) as disk:
            reader = opened(disk)
            with pytest.raises(errors.Corrupt, match=f"record {more} "):
                reader.stat(dict(reader.names(reader.root()))[b"streams"])

    def base(self, image, number):
        with image.open("rb") as file:
            file.seek(self.record(image, number))
            raw = file.read(1024)
        return struct.unpack_from("<Q", raw, 32)[0] & (1 << 48) - 1 if raw[:4] == b"FILE" else None


@pytest.fixture(scope="module")
def btrfs_image(tmp_path_factory, require_program):
    """So many names that the trees have more than one floor."""
    require_program("mkfs.btrfs")
    folder = tmp_path_factory.mktemp("btrfs")
    (folder / "tree").mkdir()
    for number in range(120):
        (folder / "tree" / f"{number:03}{'n' * 80}").touch()
    (folder / "tree" / "file").write_bytes(os.urandom(8192))
    image = folder / "image"
    with image.open("wb") as file:
        file.truncate(128 << 20)
    options = ("-n", "4096", "-m", "single", "--rootdir", folder / "tree")
    file_trees.run("mkfs.btrfs", "-q", "-f", *options, image)
    return image


def items(reader, number, kind):
    """The items of an inode, each with where it is on the disk."""
    tree = reader._find_tree(5)
    for key, data in reader._items(5, number, kind):
        pending = [(tree.root, tree.level)]
        while pending:
            place, level = pending.pop()
            block = reader._load(place, level)
            if level:
                pending += [(one, level - 1) for one, _ in block.places]
            elif key in block.keys:
                offset, _ = block.places[block.keys.index(key)]
                yield reader._place(place, 1)[0][0] + 101 + offset, data


class TestBtrfs:
    @pytest.fixture
    def image(self, btrfs_image):
        return btrfs_image

    def test_a_block_that_is_in_a_tree_twice_is_not_visited_twice(self, image, tmp_path):
        with File(image) as disk:
            reader = opened(disk)
            tree = reader._find_tree(5)
            assert tree.level
            ((place, _),) = reader._place(tree.root, 1)
            block = reader._load(tree.root, tree.level)
            first = struct.pack("<Q", block.places[0][0])
        changes = [(place + 101 + 33 * number + 17, first) for number in range(len(block.keys))]
        with File(patched(image, tmp_path, *changes)) as disk, pytest.raises(errors.Corrupt, match="in two places"):
            list(file_trees.walked(opened(disk)))

    def test_chunks_are_counted_while_they_are_read(self, image, monkeypatch):
        monkeypatch.setattr(btrfs, "_CHUNKS_MAX", 1)
        read = []
        items_of = btrfs.Btrfs._range

        def counted(self, *words):
            for one in items_of(self, *words):
                read.append(one)
                yield one

        monkeypatch.setattr(btrfs.Btrfs, "_range", counted)
        with File(image) as disk, pytest.raises(errors.Corrupt, match="too many chunks"):
            opened(disk)
        assert len(read) == 2

    def test_a_file_of_an_impossible_size(self, image, tmp_path):
        with File(image) as disk:
            reader = opened(disk)
            number = dict(file_trees.walked(reader))[b"file"].id
            ((place, _),) = items(reader, number, 1)
        with File(patched(image, tmp_path, (place + 16, b"\xff" * 8))) as disk:
            reader = opened(disk)
            node = reader.stat(dict(reader.names(reader.root()))[b"file"])
            assert node.size == (1 << 64) - 1
            with pytest.raises(errors.Corrupt, match="damaged: a content of 18446744073709551615 bytes"):
                reader.content(node)

    def test_a_content_behind_the_end_of_the_disk_is_not_short(self, image, tmp_path):
        with File(image) as disk:
            reader = opened(disk)
            node = dict(file_trees.walked(reader))[b"file"]
            ((place, data),) = items(reader, node.id, 108)
            assert data[20] == 1
            ranges = [(one.start + one.length, one.place) for one in reader._chunks]
        with File(patched(image, tmp_path)) as disk:
            reader = opened(disk)
            last = max(end - 4096 for end, _ in ranges)
            cut = reader._place(last, 1)[0][0] + 10
        copy = patched(image, tmp_path, (place + 21, struct.pack("<Q", last)), (place + 45, struct.pack("<Q", 4096)))
        os.truncate(copy, cut)
        with File(copy) as disk:
            reader = opened(disk)
            with pytest.raises(errors.Corrupt, match="behind the end of the disk"):
                list(reader.content(node).pieces())

    @pytest.mark.parametrize("kind", [1, 2, 3], ids=["zlib", "LZO", "zstd"])
    @pytest.mark.parametrize("raw", [b"", b"\xff" * 20, b"\x20\0\0\0\x10\0\0\0\x12a"], ids=["nothing", "ones", "cut"])
    def test_compressed_bytes_that_are_none(self, kind, raw):
        one = btrfs_data.Extent(0, 4096, kind, None, 8192, 4096, 0, 4096)
        with pytest.raises(errors.Corrupt, match="the file system is damaged"):
            list(btrfs_data.Extents(4096, [one], lambda _, length: raw).pieces())

    def test_what_the_reader_of_a_content_raises_is_its_own(self):
        one = btrfs_data.Extent(0, 4096, 1, None, 8192, 4096, 0, 4096)
        raw = zlib.compress(b"x" * 4096)
        pieces = btrfs_data.Extents(4096, [one], lambda _, length: raw).pieces()
        assert next(pieces) == (0, b"x" * 4096)
        with pytest.raises(ValueError, match="of another"):
            pieces.throw(ValueError("of another"))

    def test_no_more_of_a_compressed_extent_than_there_is(self):
        item = struct.pack("<QQBBHBQQQQ", 0, 4096, 1, 0, 0, 1, 8192, 4096, 4096, 1 << 60)
        with pytest.raises(errors.Corrupt, match="than there is"):
            btrfs_data.read_extent(0, item)


def test_no_content_has_a_size_that_no_system_knows():
    disk = window.Mapped([(None, 0, 4096)])
    with pytest.raises(errors.Corrupt, match="damaged"):
        Runs(disk, [], 1 << 63)
    assert Runs(disk, [], (1 << 63) - 1).size == (1 << 63) - 1
    assert Bytes(b"").size == 0
