"""What became of a frozen image: told by size, header and time."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from hvmgr import errors
from hvmgr.model.layout import Layout
from hvmgr.storage import frozen, images
from hvmgr.storage.frozen import Condition

VM = "11111111-2222-4333-8444-555555555555"
FORMATS = {
    "qcow2": ["-f", "qcow2"],
    "qcow2-v2": ["-f", "qcow2", "-o", "compat=0.10"],
    "vhd-dynamic": ["-f", "vpc"],
    "vhd-fixed": ["-f", "vpc", "-o", "subformat=fixed"],
    "raw": ["-f", "raw"],
}


def qemu_img(*words):
    subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True, timeout=60)


@pytest.fixture
def layout(tmp_path):
    layout = Layout(home=tmp_path / "home", vm_id=VM)
    for folder in layout.folders():
        folder.mkdir()
    return layout


@pytest.fixture(params=FORMATS)
def image(layout, request):
    path = layout.bases / "vda.img"
    qemu_img("create", *FORMATS[request.param], path, "4M")
    frozen.record(layout, path)
    return path


def put_back(path, change):
    """A change that leaves size and time as they were."""
    before = path.stat()
    change(path)
    os.truncate(path, before.st_size)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_image_as_it_was_is_unchanged(layout, image):
    assert frozen.condition(layout, image) is Condition.UNCHANGED
    frozen.require_unchanged(layout, image)


def test_another_time_alone_is_touched(layout, image):
    data = image.read_bytes()
    image.unlink()
    image.write_bytes(data)
    os.utime(image, ns=(0, 0))
    assert frozen.condition(layout, image) is Condition.TOUCHED
    with pytest.raises(errors.Corrupt):
        frozen.require_unchanged(layout, image)


def test_another_size_is_changed(layout, image):
    with image.open("ab") as file:
        file.write(bytes(512))
    assert frozen.condition(layout, image) is Condition.CHANGED


def test_image_of_another_size_under_its_name_is_changed(layout, image):
    fmt = images.probe(image)
    image.unlink()
    qemu_img("create", "-f", fmt, image, "8M")
    assert frozen.condition(layout, image) is Condition.CHANGED


def test_image_without_a_record_is_unknown(layout, image):
    frozen.forget(layout, image)
    assert frozen.condition(layout, image) is Condition.UNKNOWN
    assert not frozen.is_recorded(layout, image)


def test_missing_image_is_unknown(layout, image):
    image.unlink()
    assert frozen.condition(layout, image) is Condition.UNKNOWN
    assert frozen.is_recorded(layout, image)


def test_record_of_an_older_hvmgr_knows_no_header(layout, image):
    (record,) = layout.frozen.iterdir()
    facts = json.loads(record.read_bytes())
    del facts["header"]
    record.write_text(json.dumps(facts))
    assert frozen.condition(layout, image) is Condition.UNCHANGED
    os.utime(image)
    assert frozen.condition(layout, image) is Condition.TOUCHED
    os.truncate(image, 1)
    assert frozen.condition(layout, image) is Condition.CHANGED


@pytest.mark.parametrize("kind", ["qcow2", "qcow2-v2"])
def test_another_parent_is_seen_by_the_header(layout, kind):
    path, one, two = (layout.images / name for name in ("child.qcow2", "one.qcow2", "two.qcow2"))
    for below in (one, two):
        qemu_img("create", "-f", "qcow2", below, "4M")
    qemu_img("create", *FORMATS[kind], "-b", one, "-F", "qcow2", path)
    frozen.record(layout, path)
    put_back(path, lambda file: qemu_img("rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", two, file))
    assert frozen.condition(layout, path) is Condition.CHANGED
    put_back(path, lambda file: qemu_img("rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", one, file))
    assert frozen.condition(layout, path) is Condition.UNCHANGED


def test_internal_snapshot_is_seen_by_the_header(layout):
    path = layout.images / "one.qcow2"
    qemu_img("create", "-f", "qcow2", path, "4M")
    frozen.record(layout, path)
    put_back(path, lambda file: qemu_img("snapshot", "-c", "theirs", file))
    assert frozen.condition(layout, path) is Condition.CHANGED


def test_writing_data_changes_no_fingerprint(layout, image):
    before = images.fingerprint(image)
    fmt = images.probe(image)
    command = ["qemu-io", "-f", fmt, "-c", "write -P 7 0 64k", str(image)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    assert images.fingerprint(image) == before


@pytest.mark.parametrize(
    "data",
    [b"", b"QFI\xfb", b"QFI\xfb" + b"\xff" * 200, b"QFI\xfb\0\0\0\x03" + bytes(64), b"conectix", os.urandom(70_000)],
    ids=["empty", "magic", "garbage", "short", "cookie", "random"],
)
def test_fingerprint_of_damaged_files_is_a_value(tmp_path, data):
    path = tmp_path / "image"
    path.write_bytes(data)
    assert images.fingerprint(path) == images.fingerprint(Path(path))
