"""Damage of one kind at a time, put into file systems that their own tools made: it is said, and nothing waits for ever."""

from __future__ import annotations

import shutil
import struct

import pytest

from hvmgr import errors
from hvmgr.storage.filesystems import opening, signatures
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
