"""Archives of Linux trees: what is wrong or hostile in one harms neither the volume nor this host."""

from __future__ import annotations

import io
import random
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


@pytest.mark.parametrize("mode", ["w:gz", "w:xz", "w:bz2"])
def test_damaged_compressed_archive_is_corrupt(tmp_path, filled, mode):
    """Its checksum stands behind all that tarfile reads."""
    source = packed(tmp_path / "a.tar", member("file", data=random.Random(1).randbytes(100_000)), mode=mode)
    raw = bytearray(source.read_bytes())
    at = len(raw) - 6 if mode == "w:gz" else len(raw) // 2
    raw[at] ^= 0xFF
    source.write_bytes(raw)
    with pytest.raises(errors.Corrupt, match=r"a\.tar is (damaged|no tar archive)"):
        filled(source)


@pytest.mark.parametrize(
    ("at", "bytes_there", "what"),
    [
        (1024, None, "breaks off"),  # behind the first file
        (1024 + 200, None, "breaks off"),  # in the header of the second
        (1024 + 20, b"xxxx", "damaged"),  # a header whose checksum is wrong
        (1024, bytes(512), "goes on behind its end"),
    ],
)
def test_archive_that_is_cut_or_damaged_is_corrupt(tmp_path, filled, at, bytes_there, what):
    """A part of a system is none."""
    source = packed(tmp_path / "a.tar", member("one", data=b"1"), member("two", data=b"2"))
    raw = bytearray(source.read_bytes())
    if bytes_there is None:
        del raw[at:]
    else:
        raw[at : at + len(bytes_there)] = bytes_there
    source.write_bytes(raw)
    with pytest.raises(errors.Corrupt, match=what):
        filled(source)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.DIRTYPE])
@pytest.mark.parametrize("time", ["nan", "inf", "1e300"])
def test_time_that_is_none_is_corrupt(tmp_path, filled, kind, time):
    source = packed(tmp_path / "a.tar", member("thing", kind, pax_headers={"mtime": time}))
    with pytest.raises(errors.Corrupt, match="'thing' has the time"):
        filled(source)


def test_later_member_takes_the_place_of_an_earlier_one(tmp_path, filled):
    """A link is replaced by a folder, never followed; what a name was before counts no more."""
    outside = tmp_path / "outside"
    outside.mkdir()
    source = packed(
        tmp_path / "a.tar",
        member("way", tarfile.SYMTYPE, linkname=str(outside)),
        member("way", tarfile.DIRTYPE, mode=0o750),
        member("way/file", data=b"inside"),
        member("was a link", tarfile.SYMTYPE, linkname="nowhere"),
        member("was a node", tarfile.CHRTYPE, devmajor=1, devminor=3),
        member("was a file", data=b"gone"),
        member("program", data=b"program", mode=0o755, uid=7),
        *(member(f"was a {one}", tarfile.LNKTYPE, linkname="program", mode=0) for one in ("link", "node")),
        member("was a file", tarfile.DIRTYPE, mode=0o700),
    )
    volume = filled(source)
    assert list(outside.iterdir()) == []
    subprocess.run(["e2fsck", "-f", "-n", volume], check=True, capture_output=True, timeout=60)
    assert {one.name: oct(one.mode) for one in e2fsprogs.entries(volume, "/") if one.name != "lost+found"} == {
        "way": "0o40750",
        "was a file": "0o40700",
        "was a link": "0o100755",
        "was a node": "0o100755",
        "program": "0o100755",
    }
    assert e2fsprogs.read(volume, "/was a node") == b"program"
    assert e2fsprogs.read(volume, "/way/file") == b"inside"


def test_file_in_a_file_is_corrupt(tmp_path, filled):
    with pytest.raises(errors.Corrupt, match="in what is no folder"):
        filled(packed(tmp_path / "a.tar", member("one", data=b"1"), member("one/two", data=b"2")))
