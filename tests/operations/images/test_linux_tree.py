"""Archives of Linux trees: what is wrong or hostile in one harms neither the volume nor this host."""

from __future__ import annotations

import io
import subprocess
import tarfile

import pytest

from hvmgr import errors
from hvmgr.host import e2fsprogs
from hvmgr.model.disk_layout import FileSystem, Role, Volume
from hvmgr.operations.images import linux_tree

MIB = 1 << 20
SIZE = 8 * MIB


@pytest.fixture(autouse=True)
def _programs(require_program):
    for name in ("mke2fs", "debugfs", "e2fsck"):
        require_program(name)


def member(name, kind=tarfile.REGTYPE, data=b"", **facts):
    """A member of an archive and its bytes."""
    one = tarfile.TarInfo(name)
    one.type, one.size = kind, len(data)
    for key, value in facts.items():
        setattr(one, key, value)
    return one, data


def packed(path, *members, mode="w"):
    """An archive of them."""
    with tarfile.open(path, mode, format=tarfile.PAX_FORMAT) as tar:
        for one, data in members:
            tar.addfile(one, io.BytesIO(data))
    return path


@pytest.fixture
def filled(tmp_path):
    """A way to fill a new volume with what is in an archive."""

    def fill(source):
        (tmp_path / "work").mkdir()
        file = tmp_path / "work" / "volume"
        with file.open("wb") as raw:
            raw.truncate(SIZE)
        linux_tree.opened(source).fill(file, Volume(0, Role.MAIN, 0, SIZE, FileSystem.EXT4), lambda _: None)
        return file

    return fill


def asked(volume, command):
    words = ["debugfs", "-R", command, volume]
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout


@pytest.mark.parametrize("end", ["\n", "\r", "\0", " "])
def test_name_of_an_attribute_is_no_command(tmp_path, filled, end):
    """debugfs writes files of this host: it takes nothing from an archive but values and plain names."""
    stolen = tmp_path / "stolen"
    key = f"SCHILY.xattr.user.a{end}dump /secret {stolen}"
    source = packed(tmp_path / "a.tar", member("secret", data=b"x", pax_headers={key: "value"}))
    with pytest.raises(errors.Unsupported, match=r"secret. has the extended attribute .user\.a"):
        filled(source)
    assert not stolen.exists()


@pytest.mark.parametrize("end", ["\n", "\r", "\0"])
def test_command_of_two_lines_is_refused_at_the_door(tmp_path, end):
    with pytest.raises(errors.Unsupported, match="line break"):
        e2fsprogs.change(tmp_path / "volume", [f"cd /{end}dump a b"])


def test_each_attribute_has_its_own_value(tmp_path, filled):
    headers = {"SCHILY.xattr.user.one": "first", "SCHILY.xattr.user.two": "second"}
    volume = filled(packed(tmp_path / "a.tar", member("file", data=b"x", pax_headers=headers)))
    assert [asked(volume, f"ea_get -V /file user.{one}").strip() for one in ("one", "two")] == ["first", "second"]
