"""An image that was kept of a mount needs what it stands on until it is provably gone, or stands on others."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess

import pytest

from hvmgr.operations import mounting
from hvmgr.operations.doctor import host_checks
from hvmgr.storage import attachments, kept_images
from hvmgr.storage.attachments import Attachment, Mount


def make(path, backing=None, fmt="qcow2"):
    below = ("-b", backing, "-F", fmt) if backing is not None else ()
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *below, path, "1M"], check=True, timeout=60)
    return path


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The image that was kept, on a folder of its own; its record, and images that it stands on."""
    monkeypatch.setenv("HVMGR_INDEX", str(tmp_path / "index"))
    usb = tmp_path / "usb"
    usb.mkdir()
    base = make(tmp_path / "base.qcow2")
    parent = make(tmp_path / "parent.qcow2", base)
    file = make(usb / "kept.qcow2", parent)
    place = Mount("/mnt", "disk", "ext4", writable=True, kept=str(file), kept_in=kept_images.folder(file))
    images = (str(parent), str(base))
    attachments.write(Attachment("one", images[0], "qcow2", True, images, "/run/none", "boot", "2026", mount=place))
    return file


def is_held(kept):
    """Whether what it stands on has a user; and the same after what every mount and unmount does."""
    base = str(kept.parent.parent / "base.qcow2")
    found = bool(attachments.users([base]))
    mounting.forget_kept()
    assert bool(attachments.users([base])) == found
    assert bool(attachments.all_records()) == found, "what needs nothing is forgotten, and nothing else is"
    return found


def unseen():
    return [one.code for one in host_checks._kept()]


@contextlib.contextmanager
def elsewhere(folder):
    away = folder.with_name("away")
    folder.rename(away)
    yield away
    away.rename(folder)


def test_is_held_until_it_is_removed(kept):
    assert is_held(kept)
    assert unseen() == []
    kept.unlink()
    assert unseen() == []
    assert not is_held(kept)


def test_disk_that_is_away_comes_back(kept):
    with elsewhere(kept.parent):
        assert is_held(kept)
        assert unseen() == ["kept-unseen"]
        kept.parent.mkdir()  # an empty mount point
        assert is_held(kept)
        assert unseen() == ["kept-unseen"]
        kept.parent.rmdir()
    assert unseen() == []
    assert is_held(kept)
    kept.unlink()
    assert not is_held(kept)


def test_disk_that_got_another_number_is_known_again(kept):
    with elsewhere(kept.parent) as away:
        kept.parent.mkdir()
        (away / kept.name).rename(kept)
        assert is_held(kept)  # which writes down where it is now
        kept.unlink()
        assert not is_held(kept)
        kept.parent.rmdir()


def test_folder_out_of_reach_says_nothing(kept, monkeypatch):
    def fail(*_):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(kept_images, "_in_folder", fail)
    assert is_held(kept)


@pytest.mark.parametrize("other", [None, "other.qcow2"])
def test_image_with_another_parent_needs_nothing(kept, other):
    target = ["-b", ""] if other is None else ["-b", make(kept.parent / other), "-F", "qcow2"]
    subprocess.run(["qemu-img", "rebase", "-f", "qcow2", *target, kept], check=True, timeout=60)
    assert not is_held(kept)


def test_image_that_stands_on_them_by_another_one_needs_them(kept):
    between = make(kept.parent / "between.qcow2", kept.parent.parent / "parent.qcow2")
    subprocess.run(["qemu-img", "rebase", "-f", "qcow2", "-b", between, "-F", "qcow2", kept], check=True, timeout=60)
    assert is_held(kept)


def test_image_that_cannot_be_read_needs_them(kept):
    kept.write_bytes(b"garbage")
    assert is_held(kept)
    assert unseen() == ["kept-unseen"]


def test_record_without_a_folder_is_kept(kept):
    (one,) = attachments.all_records()
    attachments.write(dataclasses.replace(one, mount=dataclasses.replace(one.mount, kept_in=None)))
    kept.unlink()
    assert is_held(kept)
