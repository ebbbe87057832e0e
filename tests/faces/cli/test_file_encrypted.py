"""``hvmgr file`` and ``hvmgr mount`` on what is encrypted with LUKS: with its key, without one, and with a wrong one."""

from __future__ import annotations

import io
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from hvmgr.host import pids, process
from tests.operations.images import attaching as help_
from tests.operations.images import mounting
from tests.storage import encrypted, file_trees

MIB = 1 << 20


@pytest.fixture(scope="module")
def disk(tmp_path_factory, require_program):
    """A disk as Debian lays it out: /boot in clear, and all else encrypted on the second partition; its key."""
    for name in ("cryptsetup", "mke2fs", "sfdisk"):
        require_program(name)
    folder = tmp_path_factory.mktemp("encrypted")
    for name, file in (("boot", "vmlinuz"), ("root", "etc/passwd")):
        (folder / name / file).parent.mkdir(parents=True)
        (folder / name / file).write_text(f"{file}\n")
    boot = file_trees.ext(folder / "p1", folder / "boot", "-t", "ext2", size="2M")
    root = file_trees.ext(folder / "p2", folder / "root", "-t", "ext4", "-b", "4096", size="6M")
    key = encrypted.key_file(folder)
    encrypted.luks2(root, key)
    image = folder / "disk.raw"
    with image.open("wb") as file:
        file.truncate(30 * MIB)
        file.seek(MIB)
        file.write(boot.read_bytes())
        file.seek(4 * MIB)
        file.write(root.read_bytes())
    table = b"label: dos\nstart=2048,size=4096,type=83\nstart=8192,type=83\n"
    file_trees.run("sfdisk", "-q", image, input=table)
    return image, key


def test_without_a_key_it_is_named(hvmgr, disk):
    image, _ = disk
    rows = hvmgr.ok("file", "list", "--image", image).lines
    assert [row[1:3] for row in rows] == [["1", "ext2"], ["2", "luks"]]
    assert rows[1][-1] == "it is encrypted (LUKS), and its key can be given: --key-file FILE"
    volumes = hvmgr.ok("file", "list", "--image", image, "--json").json["volumes"]
    assert [(one["encrypted"], one["readable"]) for one in volumes] == [(False, True), (True, False)]
    answer = hvmgr("file", "cat", "/etc/passwd", "--image", image)
    assert (answer.code, "partition 2 cannot be read: it is encrypted (LUKS)" in answer.err) == (3, True), answer
    assert hvmgr("file", "cat", "/etc/passwd", "--image", image, "--partition", "2").code == 5
    assert hvmgr.ok("file", "cat", "/vmlinuz", "--image", image).out == "vmlinuz\n"


def test_with_its_key_it_is_read(hvmgr, disk, tmp_path, monkeypatch):
    image, key = disk
    lined = tmp_path / "with a newline"
    lined.write_bytes(encrypted.KEY + b"\n")
    for value in (key, lined, f":2={key}"):
        answer = hvmgr.ok("file", "cat", "/etc/passwd", "--image", image, "--key-file", value)
        assert answer.out == "etc/passwd\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(encrypted.KEY)))
    hvmgr.ok("file", "get", "/etc", "--image", image, "--key-file", "-", "--to", tmp_path / "to")
    assert (tmp_path / "to" / "etc" / "passwd").read_text() == "etc/passwd\n"
    (row,) = hvmgr.ok("file", "list", "--image", image, "--partition", "2", "--key-file", key).lines
    assert row[1:3] == ["2", "ext4 (LUKS)"]


def test_of_a_vm_and_its_snapshot(hvmgr, root, disk, require_program):
    image, key = disk
    hvmgr.ok("vm", "create", "web", "--memory", "64M", "--disk", image, "--network", "none", "--accel", "tcg")
    hvmgr.ok("snapshot", "create", "web", "a")
    for words in ([], ["--snapshot", "a"], ["--snapshot", "a", "--partition", "2"]):
        answer = hvmgr.ok("file", "cat", "web", "/etc/passwd", *words, "--key-file", f"vda:2={key}")
        assert answer.out == "etc/passwd\n"


def test_bad_keys(hvmgr, disk, tmp_path):
    image, key = disk
    wrong, empty = tmp_path / "wrong", tmp_path / "empty"
    wrong.write_bytes(b"a wrong secret")
    empty.touch()

    def refuse(code, sentence, *values):
        words = [word for value in values for word in ("--key-file", value)]
        answer = hvmgr("file", "stat", "/etc/passwd", "--image", image, *words, "--json", "-v")
        assert (answer.code, sentence in answer.json["error"]["message"]) == (code, True), answer
        assert "a wrong secret" not in answer.out + answer.err

    refuse(2, f"partition 2 of {image} is encrypted (LUKS), and the key that was given does not open it", wrong)
    refuse(2, "does not open it", f":2={wrong}")
    refuse(3, "there is no ':7' that the key could be for", f":7={key}")
    refuse(3, "there is no ", tmp_path / "nothing")
    refuse(2, "is empty", empty)
    refuse(2, "stdin can give one key only", "-", ":2=-")
    hvmgr.ok("file", "cat", "/etc/passwd", "--image", image, "--key-file", wrong, "--key-file", key)


def test_the_key_is_on_no_command_line(hvmgr, disk, monkeypatch):
    image, key = disk
    started, real = [], process._started

    def watched(argv, **more):
        started.append(b"\0".join(str(word).encode() for word in argv))
        assert not list(Path(tempfile.gettempdir()).glob("hvmgr-luks-*"))  # nothing that a kill would leave
        return real(argv, **more)

    monkeypatch.setattr(process, "_started", watched)
    hvmgr.ok("file", "cat", "/etc/passwd", "--image", image, "--key-file", key)
    assert any(b"cryptsetup" in one for one in started)
    assert not any(b"a key of bytes" in one for one in started)


class TestMount:
    @pytest.fixture
    def at(self, root, tmp_path, monkeypatch):
        help_.skip_where_impossible()
        at = tmp_path / "at"
        at.mkdir()
        with help_.taken_down(), mounting.space() as space:
            yield space, at

    def test_shows_what_is_encrypted_and_writes_nothing(self, at, disk, tmp_path):
        (space, at), (whole, key) = at, disk
        base, image = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
        shutil.copyfile(whole, base)
        file_trees.run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", image)
        before = base.read_bytes(), image.read_bytes()
        assert "its key can be given" in space.fails("mount", "--image", image, at, "--partition", "2", code=5)
        words = ["mount", "--image", image, at, "--partition", "2", "--key-file", key]
        one = space.hvmgr(*words)["mount"]
        assert (one["file_system"], one["encrypted"], one["partition"]) == ("ext4", True, 2)
        assert space.sh(f"cat {at}/etc/passwd") == "etc/passwd\n"
        records = [one for one in Path(os.environ["HVMGR_INDEX"]).rglob("*") if one.is_file()]
        assert records
        assert not [one for one in records if encrypted.KEY[:10] in one.read_bytes()]
        assert len(space.hvmgr("mounts")["mounts"]) == 1
        space.hvmgr("unmount", at)
        one = space.hvmgr(*words, "--writable")["mount"]
        assert "lies in clear below /run" in space.said
        space.sh(f"echo new >{at}/new; sync -f {at}; cat {at}/new")
        assert "no image can say what it stands on" in space.fails("unmount", at, "--keep", tmp_path / "kept", code=5)
        space.hvmgr("unmount", at)
        assert not Path(one["overlay"]).exists()
        assert (base.read_bytes(), image.read_bytes()) == before
        assert not pids.naming("storage-daemon", str(image))
        assert help_.is_clean()

    def test_shows_a_logical_volume(self, at, tmp_path):
        from tests.storage import test_lvm

        (space, at), tree, image = at, tmp_path / "tree", tmp_path / "disk.raw"
        tree.mkdir()
        (tree / "file").write_text("in a logical volume")
        part = file_trees.ext(tmp_path / "part", tree, "-t", "ext2", "-b", "1024", size="2M")
        data = bytearray(test_lvm.physical(test_lvm.UUID, test_lvm.METADATA.encode()).data)
        data[2 << 20 : 4 << 20] = part.read_bytes()
        image.write_bytes(data)
        one = space.hvmgr("mount", "--image", image, at, "--partition", "group/whole")["mount"]
        assert (one["logical"], one["encrypted"]) == ("group/whole", False)
        assert space.sh(f"cat {at}/file") == "in a logical volume"
        space.hvmgr("unmount", at)
        assert image.read_bytes() == data
        assert help_.is_clean()


def test_an_ordinary_user_needs_no_root(user, disk, require_program):
    for name in ("fuse2fs", "fusermount3"):
        require_program(name)
    help_.skip_where_impossible()
    folder = user.home / "encrypted"
    at = folder / "at"
    at.mkdir(parents=True)
    image, key = (shutil.copy(one, folder) for one in disk)
    user.owns(folder)
    with mounting.space() as space:
        space.user = user
        words = ["--image", image, "--partition", "2", "--key-file", key]
        assert [one["path"] for one in space.hvmgr("file", "hash", "/etc", *words)["files"]] == ["/etc/passwd"]
        space.sh(f"mknod {folder}/fuse c 10 229; chmod 0666 {folder}/fuse; mount --bind {folder}/fuse /dev/fuse")
        made = space.hvmgr("mount", at, *words)["mount"]
        assert (made["device"], made["encrypted"]) == (None, True)
        assert space.run(*user.command("cat", at / "etc" / "passwd")).stdout == "etc/passwd\n"
        space.hvmgr("unmount", at)
        assert not list((user.folder / "run" / "hvmgr").iterdir())
