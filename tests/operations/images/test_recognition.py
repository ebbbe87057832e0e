"""What an image is says its content: nothing that QEMU would read wrongly gets to it, whatever somebody states."""

from __future__ import annotations

import os
import struct
import subprocess
import uuid

import pytest

from hvmgr import ImageFormat, ImageOptions, errors
from hvmgr.model import configuration
from hvmgr.storage import images, vhdx, vm_home

MIB = 1 << 20
PARAMETERS = uuid.UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b").bytes_le
PARENT = uuid.UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c").bytes_le
METADATA = uuid.UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e").bytes_le


def differencing_vhdx(folder, name="child.avhdx"):
    """A VHDX as QEMU makes it, in whose metadata a parent is named as Windows does."""
    made = folder.images.create(folder / "plain.vhdx", 4 * MIB).path
    data = bytearray(made.read_bytes())
    made.unlink()
    region = data.index(METADATA, 192 << 10)
    (start,) = struct.unpack_from("<Q", data, region + 16)
    (count,) = struct.unpack_from("<H", data, start + 10)
    parameters = data.index(PARAMETERS, start)
    (offset,) = struct.unpack_from("<I", data, parameters + 16)
    struct.pack_into("<I", data, start + offset + 4, 2)
    pairs = [("parent_linkage", "{aa}"), ("relative_path", ".\\base.vhdx"), ("absolute_win32_path", "C:\\base.vhdx")]
    words = [word.encode("utf-16-le") for pair in pairs for word in pair]
    place, entries = 20 + 12 * len(pairs), b""
    for key, value in zip(words[::2], words[1::2], strict=True):
        entries += struct.pack("<IIHH", place, place + len(key), len(key), len(value))
        place += len(key) + len(value)
    item = bytes(16) + struct.pack("<HH", 0, len(pairs)) + entries + b"".join(words)
    at = 512 << 10
    struct.pack_into("<H", data, start + 10, count + 1)
    struct.pack_into("<16sIIII", data, start + 32 + 32 * count, PARENT, at, len(item), 4, 0)
    data[start + at : start + at + len(item)] = item
    (folder / name).write_bytes(data)
    return folder / name


@pytest.fixture
def child(folder):
    """A differencing VHD with the name of a raw disk."""
    folder.images.create(folder / "base.vhd", 4 * MIB)
    folder.images.create(folder / "child.vhd", options=ImageOptions(parent=folder / "base.vhd"))
    (folder / "child.vhd").rename(folder / "disk.img")
    return folder / "disk.img"


@pytest.mark.parametrize("stated", ["vpc", "raw", "vhdx"])
def test_differencing_vhd_is_refused_as_whatever_it_is_stated(child, stated):
    with pytest.raises(errors.Unsupported, match=r"differencing VHD of base\.vhd; QEMU would read zeros") as refused:
        images.read(child, stated)
    assert f"hvmgr image convert {child}" in refused.value.hint


@pytest.mark.parametrize("stated", ["raw", "vhdx"])
def test_differencing_vhdx_is_refused_with_its_parents_name(folder, stated):
    with pytest.raises(errors.Unsupported, match=r"differencing VHDX of \.\\base\.vhdx"):
        images.read(differencing_vhdx(folder), stated)


@pytest.mark.parametrize("drive", ["<readonly/>", "<shareable/>", ""], ids=["read-only", "shareable", "plain"])
@pytest.mark.parametrize("device", ["disk", "cdrom"])
def test_no_drive_may_hold_one(child, drive, device):
    xml = (
        "<domain type='qemu'><name>web</name><uuid>4dea22b3-1d52-d8f3-2516-782e98ab3fa0</uuid><devices>"
        f"<disk type='file' device='{device}'><driver name='qemu' type='vpc'/><source file='{child}'/>"
        f"<target dev='sda'/>{drive}</disk></devices></domain>"
    )
    with pytest.raises(errors.Unsupported, match="differencing VHD"):
        vm_home.require_usable_disks(configuration.parse(xml, source="a test"))


def test_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    images.require_usable(tmp_path / "pipe")


def test_vhdx_is_told_and_read(folder):
    folder.raw("disk.raw")
    made = folder.images.convert(folder / "disk.raw", folder / "disk.vhdx", ImageOptions(fixed=True))
    facts = vhdx.read(made.path)
    assert (facts.size, facts.is_fixed, facts.is_differencing) == (4 * MIB, True, False)
    assert (made.creator, made.id) == (facts.creator, facts.id)
    assert facts.creator.startswith("QEMU")


def test_differencing_vhdx_is_shown_but_never_read(folder):
    path = differencing_vhdx(folder)
    told = folder.images.info(path)
    assert (told.format, told.type) == ("vhdx", "differencing")
    assert ("relative_path", ".\\base.vhdx") in told.parent.names
    for act in (
        lambda: folder.images.convert(path, folder / "to.qcow2"),
        lambda: folder.images.compact(path),
        lambda: folder.images.check(path),
        lambda: folder.images.reparent(path, folder / "child.avhdx"),
    ):
        with pytest.raises(errors.Unsupported, match=r"base\.vhdx"):
            act()
    assert folder.names() == {"child.avhdx"}


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda data: data[: 200 << 10], id="cut"),
        pytest.param(lambda data: data.replace(METADATA, bytes(16)), id="no-metadata"),
        pytest.param(lambda data: data.replace(PARAMETERS, bytes(16)), id="no-parameters"),
        pytest.param(lambda data: data[:8] + bytes(len(data) - 8), id="zeros"),
    ],
)
def test_damaged_vhdx_is_corrupt(folder, spoil):
    made = folder.images.create(folder / "disk.vhdx", 4 * MIB).path
    made.write_bytes(spoil(made.read_bytes()))
    with pytest.raises(errors.Corrupt):
        folder.images.info(made)


def test_foreign_formats_are_named_and_read_only_when_they_are_trusted(folder):
    data = folder.raw("disk.raw")
    for fmt in ("vmdk", "vdi"):
        convert = ["qemu-img", "convert", "-f", "raw", "-O", fmt, folder / "disk.raw", folder / f"disk.{fmt}"]
        subprocess.run(convert, check=True, capture_output=True, timeout=60)
    with pytest.raises(errors.Unsupported, match="VMDK"):
        folder.images.convert(folder / "disk.vmdk", folder / "to.raw")
    stated = ImageOptions(source_format=ImageFormat.VMDK)
    folder.images.convert(folder / "disk.vmdk", folder / "to.raw", stated)
    assert (folder / "to.raw").read_bytes() == data


def test_parent_whose_format_nobody_states_is_not_guessed(folder):
    """As old QEMUs made them; the header's extension with the format becomes one that nobody knows."""
    folder.raw("base.raw")
    top = folder.images.create(folder / "top.qcow2", options=ImageOptions(parent=folder / "base.raw")).path
    header = top.read_bytes()
    assert header.count(b"\xe2\x79\x2a\xca") == 1
    top.write_bytes(header.replace(b"\xe2\x79\x2a\xca", b"hvmg"))
    with pytest.raises(errors.Unsupported, match="does not state the format"):
        folder.images.convert(top, folder / "to.raw")


def test_raw_disk_that_begins_like_a_vhd_stays_raw(folder):
    """A guest may write anything into its first sector."""
    (folder / "disk.raw").write_bytes(b"conectix" + bytes(MIB - 8))
    assert images.read(folder / "disk.raw", "raw").size == MIB
