"""Logical volumes: made by LVM's own programs, and metadata written by hand for what those need a kernel for."""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import subprocess
from pathlib import Path

import pytest

from hvmgr import errors
from hvmgr.operations.inside import looking, views
from hvmgr.storage.filesystems import lvm, window
from tests.storage import file_trees

EXTENT = 4 << 20


class Bytes:
    """A disk in memory."""

    def __init__(self, data):
        self.data = data
        self.size = len(data)

    def read_into(self, offset, buffer):
        buffer[:] = self.data[offset : offset + len(buffer)]


def physical(uuid, text):
    """A physical volume with this metadata."""
    label = b"LABELONE" + struct.pack("<QII", 1, 0, 32) + b"LVM2 001"
    header = uuid.encode() + struct.pack("<Q", 64 << 20)
    header += struct.pack("<QQQQ", 1 << 20, 0, 0, 0) + struct.pack("<QQQQ", 4096, 1 << 19, 0, 0)
    area = struct.pack("<I", 0) + b" LVM2 x[5A%r0N*>" + struct.pack("<IQQ", 1, 4096, 1 << 19)
    area += struct.pack("<QQII", 512, len(text), 0, 0)
    data = bytearray(8 << 20)
    data[512 : 512 + len(label + header)] = label + header
    data[4096 : 4096 + len(area)] = area
    data[4608 : 4608 + len(text)] = text
    return Bytes(bytes(data))


METADATA = """
# a comment
group {
id = "x"
seqno = 3
extent_size = 2048
physical_volumes {
pv0 { id = "AAAAAA-AAAA-AAAA-AAAA-AAAA-AAAA-AAAAAA" pe_start = 2048 }
pv1 { id = "BBBBBB-BBBB-BBBB-BBBB-BBBB-BBBB-BBBBBB" pe_start = 2048 }
}
logical_volumes {
whole { id = "1" status = ["READ", "WRITE", "VISIBLE"] segment_count = 1
segment1 { start_extent = 0 extent_count = 2 type = "striped" stripe_count = 1 stripes = [ "pv0", 1 ] } }
torn { id = "2" status = ["READ", "VISIBLE"] segment_count = 1
segment1 { start_extent = 0 extent_count = 2 type = "striped" stripe_count = 1 stripes = ["pv1", 0] } }
thin { id = "3" status = ["READ", "VISIBLE"] segment_count = 1
segment1 { start_extent = 0 extent_count = 2 type = "thin" } }
hidden { id = "4" status = ["READ"] segment_count = 1 segment1 { start_extent = 0 extent_count = 1 type = "raid1" } }
}
}
"""
UUID = "A" * 32


def test_what_cannot_be_read_is_named():
    disk = physical(UUID, METADATA.encode())
    found = {one.name: one for one in lvm.volumes([disk])}
    assert list(found) == ["group/whole", "group/torn", "group/thin"]
    assert window.read(found["group/whole"].disk, 0, 10) == disk.data[2 << 20 : (2 << 20) + 10]
    assert "lies on another disk (pv1" in found["group/torn"].why
    assert "of the kind thin" in found["group/thin"].why


@pytest.mark.parametrize(
    "text",
    [
        METADATA.replace("extent_size = 2048", ""),
        METADATA.replace('"pv0", 1', '"pv7", 1'),
        METADATA.replace("stripe_count = 1", "stripe_count = 5"),
        METADATA.replace("group {", "group { = ="),
        "group {" * 100,
        '"open',
    ],
    ids=["no size", "no such volume", "stripes", "signs", "too deep", "open text"],
)
def test_damaged_metadata_is_an_error(text):
    with pytest.raises(errors.Corrupt):
        lvm.volumes([physical(UUID, text.encode())])


@contextlib.contextmanager
def loops(*images):
    devices = [file_trees.run("losetup", "-f", "--show", *options, image).decode().strip() for image, options in images]
    try:
        yield devices
    finally:
        subprocess.run(["losetup", "-d", *devices], check=False, timeout=60)


def test_volumes_that_lvm_made(tmp_path, require, require_program):
    """Over two disks, one of them partitioned; nothing is activated, so no device mapper is needed."""
    require(os.geteuid() == 0 and Path("/dev/loop-control").exists(), "only root can make physical volumes")
    require_program("lvm")
    tree = tmp_path / "tree"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc" / "hostname").write_text("from a logical volume\n")
    (tree / "large").write_bytes(file_trees.pattern(30 << 20))
    root = file_trees.ext(tmp_path / "root", tree, "-t", "ext4", "-L", "rootfs", size="48M")
    first, second = tmp_path / "first.img", tmp_path / "second.img"
    for one in (first, second):
        one.write_bytes(b"")
        os.truncate(one, 100 << 20)
    file_trees.run("sfdisk", "-q", first, input=b"label: dos\nstart=2048,type=8e\n")
    os.makedirs(tmp_path / "etc")
    environment = {**os.environ, "LVM_SYSTEM_DIR": str(tmp_path / "etc")}
    settings = f'global {{ locking_dir="{tmp_path}" event_activation=0 }} activation {{ udev_sync=0 udev_rules=0 }} '
    settings += "backup { backup=0 archive=0 } devices { use_devicesfile=0 }"
    with loops((first, ["-o", "1048576"]), (second, [])) as devices:

        def run(program, *words):
            common = ["--driverloaded", "n", "--devices", ",".join(devices), "--config", settings]
            return file_trees.run("lvm", program, *common, *words, env=environment).decode()

        run("pvcreate", "-q", *devices)
        run("vgcreate", "-q", "vg-0", *devices)
        create = ["lvcreate", "-q", "-an", "-Zn", "-Wn"]
        run(*create, "-n", "root", "-L", "20M", "vg-0", devices[0])
        run(*create, "-n", "wide", "-L", "32M", "-i", "2", "-I", "64k", "vg-0")
        run("lvextend", "-q", "-L", "48M", "vg-0/root", devices[1])
        columns = "pv_name,pe_start,pvseg_start,pvseg_size,lv_name,seg_start_pe"
        rows = run("pvs", "-o", columns, "--units", "b", "--nosuffix", "--noheadings", "--separator", "|")
    data, wide = root.read_bytes(), {}
    for row in rows.splitlines():
        device, start, at, count, name, begins = (one.strip() for one in row.split("|"))
        image, offset = (first, 1 << 20) if device == devices[0] else (second, 0)
        place = offset + int(start) + int(at) * EXTENT
        if name == "root":
            with image.open("r+b") as file:
                file.seek(place)
                file.write(data[int(begins) * EXTENT : (int(begins) + int(count)) * EXTENT])
        if name == "wide":
            wide[image] = place
    with looking.opened([views.of_image(first), views.of_image(second)]) as inside:
        assert [one.title for one in inside.volumes if one.logical] == ["volume vg-0/root", "volume vg-0/wide"]
        browser = inside.choose(b"/etc/hostname")
        assert browser.volume.label == "rootfs"
        for path in (b"/etc/hostname", b"/large"):
            found = browser.find(path)
            expected = (tree / path.decode().lstrip("/")).read_bytes()
            assert file_trees.hash_of(browser.reader, found.node) == hashlib.sha256(expected).hexdigest()
        for number, (image, place) in enumerate(sorted(wide.items())):
            with image.open("r+b") as file:
                file.seek(place + (64 << 10))
                file.write(b"stripe of %d" % number)
    with looking.opened([views.of_image(first), views.of_image(second)], partition="vg-0/wide") as inside:
        striped = inside.bytes_of(inside.volumes[0])
        assert {window.read(striped, at << 16, 11) for at in (2, 3)} == {b"stripe of 0", b"stripe of 1"}
        assert window.read(striped, 0, 11) == bytes(11)


def test_damaged_metadata_costs_its_own_volumes_alone(tmp_path):
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "file").write_text("sound")
    part = file_trees.ext(tmp_path / "part", tree, "-t", "ext4", size="8M")
    sound = bytearray(physical(UUID, METADATA.encode()).data)
    sound[2 << 20 :] = bytes(8 << 20)
    good, bad, plain = (tmp_path / name for name in ("good", "bad", "plain"))
    good.write_bytes(sound)
    bad.write_bytes(physical("B" * 32, METADATA.replace("group {", "broken { = =").encode()).data)
    plain.write_bytes(part.read_bytes())
    with looking.opened([views.of_image(one) for one in (bad, good, plain)]) as inside:
        assert inside.choose(b"/file").volume.disk.name == str(plain)
        assert [one.logical for one in inside.volumes if one.logical] == ["group/whole", "group/torn", "group/thin"]
        assert "damaged" in looking.why_not(inside.volumes[0])
    with looking.opened([views.of_image(bad)]) as inside, pytest.raises(errors.Unsupported, match="damaged"):
        inside.choose(b"/file")
