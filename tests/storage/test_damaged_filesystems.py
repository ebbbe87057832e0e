"""Damage of one kind at a time, put into file systems that their own tools made: it is said, and nothing waits for ever."""

from __future__ import annotations

import dataclasses
import datetime as dt
import os
import struct
import zlib

import pytest

from hvmgr import errors
from hvmgr.storage.filesystems import btrfs, btrfs_data, fat, opening, signatures, window, xfs_attributes
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
    file_trees.run("cp", "--sparse=always", image, copy)
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

    def test_a_name_of_an_inode_of_no_type(self, image, tmp_path):
        with File(image) as disk:
            reader = opened(disk)
            number = dict(file_trees.walked(reader))[b"file"].id
            ((place, _),) = items(reader, number, 1)
        with File(patched(image, tmp_path, (place + 52, bytes(4)))) as disk:
            reader = opened(disk)
            with pytest.raises(errors.Corrupt, match=f"inode {number} is free"):
                reader.stat(dict(reader.names(reader.root()))[b"file"])

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
            list(btrfs_data.Extents(4096, [one], lambda _, length: raw, lambda *_: ()).pieces())

    def test_what_the_reader_of_a_content_raises_is_its_own(self):
        one = btrfs_data.Extent(0, 4096, 1, None, 8192, 4096, 0, 4096)
        raw = zlib.compress(b"x" * 4096)
        pieces = btrfs_data.Extents(4096, [one], lambda _, length: raw, lambda *_: ()).pieces()
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


BLOCK = 1024


def tree_of(folder, files):
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def block_of(reader, node):
    """The block in which a content begins."""
    return reader.content(node)._runs[0].start // reader._super.block


class TestExt:
    LEAF = struct.pack("<HHHHI", 0xF30A, 0, 84, 0, 0)  # a block of extents without one

    def inode(self, reader, number):
        """Where the 60 bytes of an inode are that lead to its content."""
        group, index = divmod(number - 1, reader._super.inodes_per_group)
        return reader._table(group) * BLOCK + index * reader._super.inode_size + 40

    @pytest.mark.parametrize("wrong", ["a block in two places", "an extent of nothing"])
    def test_extents_that_have_no_end(self, tmp_path, wrong):
        tree = tree_of(tmp_path / "tree", {"file": bytes(50_000), "leaf": self.LEAF.ljust(BLOCK, b"\0")})
        image = file_trees.ext(tmp_path / "image", tree, "-t", "ext4", "-b", str(BLOCK), size="2M")
        with File(image) as disk:
            reader = opened(disk)
            nodes = dict(file_trees.walked(reader))
            place = self.inode(reader, nodes[b"file"].id)
            leaf = block_of(reader, nodes[b"leaf"])
        if wrong == "an extent of nothing":
            data = struct.pack("<HHHHI", 0xF30A, 4, 4, 0, 0) + struct.pack("<IHHI", 0, 0, 0, leaf) * 4
        else:
            data = struct.pack("<HHHHI", 0xF30A, 4, 4, 1, 0) + struct.pack("<IIHH", 0, leaf, 0, 0) * 4
        with File(patched(image, tmp_path, (place, data))) as disk:
            reader = opened(disk)
            node = reader.stat(nodes[b"file"].ref)
            with pytest.raises(errors.Corrupt, match="in two places" if "two" in wrong else wrong):
                reader.content(node)

    def test_a_block_of_block_numbers_is_in_one_place(self, tmp_path):
        tree = tree_of(tmp_path / "tree", {"file": b"", "nothing": b"n" * BLOCK, "twice": b"x" * BLOCK})
        with (tree / "file").open("wb") as file:
            file.truncate(5_000_000)
            file.write(b"begin")
        image = file_trees.ext(tmp_path / "image", tree, "-t", "ext2", "-b", str(BLOCK), size="2M")
        with File(image) as disk:
            reader = opened(disk)
            nodes = dict(file_trees.walked(reader))
            place = self.inode(reader, nodes[b"file"].id)
            nothing, twice = block_of(reader, nodes[b"nothing"]), block_of(reader, nodes[b"twice"])
        changes = [
            (place + 4 * 13, struct.pack("<I", twice)),
            (twice * BLOCK, struct.pack("<I", nothing) * (BLOCK // 4)),
            (nothing * BLOCK, bytes(BLOCK)),
        ]
        with File(patched(image, tmp_path, *changes)) as disk, pytest.raises(errors.Corrupt, match="in two places"):
            reader = opened(disk)
            reader.content(reader.stat(nodes[b"file"].ref))

    def test_holes_are_no_blocks(self, tmp_path):
        """A file may have more of them than its file system has blocks."""
        tree = tree_of(tmp_path / "tree", {})
        with (tree / "file").open("wb") as file:
            for one in range(40):
                file.seek(one * (BLOCK << 8) + 12 * BLOCK)
                file.write(b"%d" % one)
        image = file_trees.ext(tmp_path / "image", tree, "-t", "ext2", "-b", str(BLOCK), size="2M")
        with File(image) as disk:
            assert file_trees.of_reader(opened(disk))[b"file"] == file_trees.of_host(tree)[b"file"]

    def test_attributes_that_no_system_can_have_are_left_out(self, tmp_path):
        tree = tree_of(tmp_path / "tree", {"file": b""})
        image = file_trees.ext(tmp_path / "image", tree, "-t", "ext4", "-b", str(BLOCK), size="2M")
        for name in ("good", "bad-name"):
            file_trees.run("debugfs", "-w", "-R", f"ea_set /file user.{name} value", image)
        place = image.read_bytes().index(b"bad-name")
        with File(patched(image, tmp_path, (place + 3, b"\0"))) as disk:
            reader = opened(disk)
            node = reader.stat(dict(reader.names(reader.root()))[b"file"])
            assert reader.extras(node) == {"user.good": b"value"}


@pytest.fixture(scope="module")
def xfs_image(tmp_path_factory, require_program):
    require_program("mkfs.xfs")
    folder = tmp_path_factory.mktemp("xfs")
    leaf = struct.pack(">4sHHQQ", b"BMAP", 0, 1, 0, 0)  # of extents: one, of one block
    files = {
        "file": bytes(50_000),
        "leaf": (leaf + struct.pack(">QQ", 0, 100 << 21 | 1)).ljust(4096, b"\0"),
        "empty": leaf.replace(b"\0\1", b"\0\0").ljust(4096, b"\0"),
        "nothing": (leaf + struct.pack(">QQ", 0, 100 << 21)).ljust(4096, b"\0"),
    }
    return file_trees.xfs(folder / "image", tree_of(folder / "tree", files))


class TestXfs:
    @pytest.fixture
    def image(self, xfs_image):
        return xfs_image

    @pytest.mark.parametrize(
        ("leaves", "match"),
        [(("leaf",), None), (("leaf", "leaf"), "two places"), (("empty",), "no sense"), (("nothing",), "of nothing")],
        ids=["none", "a block in two places", "an empty block", "an extent of nothing"],
    )
    def test_extents_that_have_no_end(self, image, leaves, match):
        with File(image) as disk:
            reader = opened(disk)
            nodes = dict(file_trees.walked(reader))
            blocks = []
            for leaf in leaves:
                group, inside = divmod(block_of(reader, nodes[leaf.encode()]), reader._super.per_group)
                blocks.append(group << reader._super.group_log | inside)
            fork = struct.pack(">HH", 1, len(blocks)).ljust(4 + 16 * 8, b"\0") + struct.pack(
                f">{len(blocks)}Q", *blocks
            )
            fork = fork.ljust(4 + 16 * 16, b"\0")
            if match is None:
                assert list(reader._extents(3, fork, 0, 1)) == [(0, 1, 100 * 4096, False)]
                return
            with pytest.raises(errors.Corrupt, match=match):
                list(reader._extents(3, fork, 0, 1))

    def test_a_name_of_an_inode_of_no_type(self, image, tmp_path, require_program):
        copy = patched(image, tmp_path)
        with File(copy) as disk:
            reader = opened(disk)
            number = dict(reader.names(reader.root()))[b"file"]
        file_trees.run(require_program("xfs_db"), "-x", "-c", f"inode {number}", "-c", "write core.mode 0x3000", copy)
        with File(copy) as disk, pytest.raises(errors.Corrupt, match=f"inode {number} is free"):
            reader = opened(disk)
            reader.stat(dict(reader.names(reader.root()))[b"file"])

    @pytest.mark.parametrize("limit", ["_ENTRIES_MAX", "_TOTAL_MAX"])
    def test_extended_attributes_have_an_end(self, monkeypatch, limit):
        monkeypatch.setattr(xfs_attributes, limit, 1000)
        entry = struct.pack(">IHBB", 0, 3000, 1, 0)
        block = bytearray(struct.pack(">IIH", 1, 0, 0x3BEE).ljust(56, b"\0") + struct.pack(">H", 200)).ljust(80, b"\0")
        block = (block + entry * 200).ljust(3000, b"\0") + struct.pack(">HB", 8, 1) + b"n" + b"v" * 8
        read = []
        with pytest.raises(errors.Corrupt, match="more extended attributes than any"):
            xfs_attributes.of_blocks(lambda number: read.append(number) or bytes(block))
        assert len(read) < 10


class TestFat:
    @pytest.mark.parametrize("bits", [16, 32])
    def test_clusters_that_go_round(self, bits):
        entries = [0, 0, 3, 7, 0, 0, 0, 9, 0, 3, 0, 0]

        class Table:
            size = 4096

            def read(self, offset, length):
                form = "H" if bits == 16 else "I"
                return struct.pack(f"<{len(entries)}{form}", *entries)[offset : offset + length]

            def note(self, offset, length):
                pass

        found = fat.Allocation(Table(), 0, 10, bits)
        assert list(found.chain(2, 4)) == [(2, 2), (7, 1), (9, 1)]
        with pytest.raises(errors.Corrupt, match="go round"):
            list(found.chain(2, 1 << 20))

    def test_exfat_has_the_clusters_that_its_disk_has(self, tmp_path, require_program):
        require_program("mkfs.exfat")
        image = tmp_path / "image"
        with image.open("wb") as file:
            file.truncate(8 << 20)
        file_trees.run("mkfs.exfat", image)
        with File(patched(image, tmp_path, (92, b"\xf0\xff\xff\xff"))) as disk:
            reader = opened(disk)
            assert reader._table.count * reader._cluster <= 8 << 20
            root = reader.root()
            assert list(reader.names(root)) == []
            large = dataclasses.replace(root, ref=dataclasses.replace(root.ref, size=1 << 40, is_contiguous=True))
            with pytest.raises(errors.Corrupt, match=f"a folder has {1 << 40} bytes"):
                list(reader.names(large))


NAMES = b"".join(b"NM\xcd\1\1" + b"n" * 200 for _ in range(3))
TARGETS = b"".join(b"SL\xf8\1\1" + b"\0\xf1" + b"t" * 241 for _ in range(20))


@pytest.fixture(scope="module")
def iso_image(tmp_path_factory, require_program):
    require_program("genisoimage")
    folder = tmp_path_factory.mktemp("iso")
    tree = tree_of(folder / "tree", {"l" * 220: b"long", "names": NAMES, "targets": TARGETS, "few": b"PX"})
    file_trees.run("genisoimage", "-quiet", "-R", "-o", folder / "image", tree)
    return folder / "image"


class TestIso:
    @pytest.fixture
    def image(self, iso_image):
        return iso_image

    def continued(self, image, folder, name):
        """An image whose long name goes on in the content of a file."""
        with File(image) as disk:
            reader = opened(disk)
            refs = dict(reader.names(reader.root()))
            raw = refs[b"l" * 220].raw
            ((start, size),) = refs[name].parts
        place = image.read_bytes().index(raw) + raw.index(b"CE\x1c\1") + 4
        fields = b"".join(struct.pack("<I", one) + struct.pack(">I", one) for one in (start // 2048, 0, size))
        return patched(image, folder, (place, fields))

    @pytest.mark.parametrize("name", [b"names", b"targets"])
    def test_names_and_targets_have_an_end(self, image, tmp_path, name):
        with (
            File(self.continued(image, tmp_path, name)) as disk,
            pytest.raises(errors.Corrupt, match="longer than any"),
        ):
            reader = opened(disk)
            list(reader.names(reader.root()))

    def test_no_file_is_larger_than_its_disk(self, image, tmp_path):
        with File(image) as disk:
            reader = opened(disk)
            raw = dict(reader.names(reader.root()))[b"few"].raw
        place = image.read_bytes().index(raw) + 10
        with File(patched(image, tmp_path, (place, b"\xff" * 8))) as disk:
            reader = opened(disk)
            node = reader.stat(dict(reader.names(reader.root()))[b"few"])
            with pytest.raises(errors.Corrupt, match="larger than the disk"):
                reader.content(node)

    @pytest.mark.parametrize(("zone", "hours"), [(0, 0), (8, 2), (0xD0, -12), (53, 0), (0x80, 0)])
    def test_a_zone_that_cannot_be_is_none(self, image, tmp_path, zone, hours):
        file_trees.run("genisoimage", "-quiet", "-o", tmp_path / "image", image.parent / "tree")
        with File(tmp_path / "image") as disk:
            reader = opened(disk)
            raw = dict(reader.names(reader.root()))[b"few"].raw
        place = (tmp_path / "image").read_bytes().index(raw) + 24
        with File(patched(tmp_path / "image", tmp_path, (place, bytes([zone])))) as disk:
            reader = opened(disk)
            node = reader.stat(dict(reader.names(reader.root()))[b"few"])
        year, *rest = raw[18:24]
        local = dt.datetime(1900 + year, *rest, tzinfo=dt.UTC)
        assert node.modified == int((local - dt.timedelta(hours=hours)).timestamp()) * 10**9
