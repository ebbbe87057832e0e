"""``file diff``, ``put`` and ``restore`` on what is encrypted with LUKS: the files that changed, and files that get there."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from hvmgr import errors, settings
from hvmgr.host import e2fsprogs
from hvmgr.storage.filesystems import luks
from tests.storage import encrypted, file_trees, moments, test_lvm

MIB = 1 << 20
KEY = b"a key of words"
SAID = b"nobody else may see this line, be it on a disk or not\n"
CHANGED = [["changed", "/data", "content, modified, changed"], ["added", "/new", "-"], ["removed", "/old", "-"]]
MACHINE = ("--memory", "64M", "--network", "none", "--accel", "tcg")


@pytest.fixture(scope="module")
def made(tmp_path_factory, require_program):
    """An ext4 at two moments."""
    for name in ("cryptsetup", "qemu-io", "mke2fs", "debugfs", "e2fsck"):
        require_program(name)
    folder = tmp_path_factory.mktemp("made")
    tree, new = folder / "tree", folder / "new.txt"
    tree.mkdir()
    (tree / "old").write_text("old\n")
    (tree / "data").write_bytes(b"data\n")
    (tree / "large").write_bytes(file_trees.pattern(3 * MIB))
    new.write_text("new\n")
    before = file_trees.ext(folder / "before", tree, "-t", "ext4", "-b", "4096", size="12M")
    after = folder / "after"
    shutil.copyfile(before, after)
    for command in (f"write {new} /new", "rm /data", f"write {new} /data", "rm /old"):
        file_trees.run("debugfs", "-w", "-R", command, after)
    return folder


@pytest.fixture
def able(require):
    require(os.access("/dev/fuse", os.R_OK | os.W_OK), "needs /dev/fuse")


def present(hvmgr):
    (image,) = hvmgr.ok("vm", "show", "web", "--json").json["now"]["disks"].values()
    return Path(image)


def of_clear_text(folder):
    """Files of a folder that hold what nobody else may see."""
    return [one for one in folder.rglob("*") if one.is_file() and SAID in one.read_bytes()]


def interrupted(_):
    raise errors.Cancelled("stopped")


def digests(*paths):
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def on_a_disk(volume, folder):
    """A disk with a partition that is the volume."""
    disk, content = folder / "disk", volume.read_bytes()
    disk.write_bytes(bytes(MIB) + content + bytes(MIB))
    file_trees.run("sfdisk", "-q", disk, input=f"label: gpt\nstart=2048,size={len(content) // 512}\n".encode())
    return disk


@pytest.fixture
def by_qemu(hvmgr, root, made, tmp_path):
    """A VM with a partition that QEMU has encrypted (LUKS 1); its key, and the disk."""
    key = encrypted.key_file(tmp_path, KEY)
    disk = on_a_disk(encrypted.luks1(tmp_path / "luks1", made / "before", key), tmp_path)
    hvmgr.ok("vm", "create", "web", *MACHINE, "--disk", disk)
    hvmgr.ok("snapshot", "create", "web", "a")
    return key, disk


class TestDiff:
    def test_tells_what_the_driver_of_another_program_wrote(self, hvmgr, by_qemu, made, monkeypatch):
        key, _ = by_qemu
        moments.write_difference(
            present(hvmgr), made / "before", made / "after", encrypted.by_qemu(present(hvmgr), key, MIB)
        )
        read = []
        real = luks.Decrypted.read_into
        monkeypatch.setattr(luks.Decrypted, "read_into", lambda *words: (read.append(len(words[2])), real(*words)))
        found = hvmgr.ok("file", "diff", "web", "a", "now", "--key-file", key).lines
        assert [line[:2] for line in found] == [line[:2] for line in CHANGED]
        assert sum(read) < 2 * MIB, "only what was written is looked at"
        assert hvmgr.ok("file", "diff", "web", "a", "--present", "--key-file", key).lines == found
        assert hvmgr.ok("file", "diff", "web", "a", "now", "/new", "--key-file", f"vda:1={key}").lines == [CHANGED[1]]
        answer = hvmgr("file", "diff", "web", "a", "now")
        assert (answer.code, answer.out) == (0, "")
        assert "was written to, and cannot be compared: it is encrypted (LUKS), and its key can be given" in answer.err

    @pytest.mark.usefixtures("able")
    def test_of_a_logical_volume(self, hvmgr, inside_luks, tmp_path):
        key = inside_luks
        (tmp_path / "new").write_bytes(SAID)
        hvmgr.ok("file", "put", "web", tmp_path / "new", "/", "--key-file", key, "--name", "a")
        found = hvmgr("file", "diff", "web", "a", "now", "--key-file", key, "--json").json
        assert [(one["path"], one["change"], one["logical"]) for one in found["differences"]] == [
            ("/new", "added", "group/whole")
        ]
        assert [one["encrypted"] for one in found["sources"]] == [True]

    def test_a_key_more_is_no_difference_and_another_volume_key_is_told(self, hvmgr, made, tmp_path):
        key, other = (encrypted.key_file(tmp_path, one) for one in (KEY, b"another"))
        one, same, anew = (tmp_path / name for name in ("one", "same", "anew"))
        for image in (one, anew):
            shutil.copyfile(made / "before", image)
            encrypted.luks2(image, key)
        shutil.copyfile(one, same)
        add = ["cryptsetup", "luksAddKey", "-q", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"]
        file_trees.run(*add, "--key-file", key, same, other)
        assert not hvmgr.ok("file", "diff", "--image", one, "--image", same, "--key-file", key).out
        answer = hvmgr("file", "diff", "--image", one, "--image", anew, "--key-file", key)
        assert (answer.code, answer.out) == (0, "")
        assert "is not encrypted with the same key at both moments, and was compared as a whole" in answer.err
        child = moments.next_moment(tmp_path / "child", one, "raw", one, anew)
        assert (
            "was compared as a whole" in hvmgr("file", "diff", "--image", one, "--image", child, "--key-file", key).err
        )
        # A key that opens one of the moments only.
        answer = hvmgr("file", "diff", "--image", one, "--image", same, "--key-file", other)
        assert (answer.code, f"of {one} is encrypted (LUKS), and the key" in answer.err) == (2, True), answer
        assert not hvmgr.ok("file", "diff", "--image", one, "--image", same, "--key-file", key, "--key-file", other).out

    def test_what_is_encrypted_at_one_of_the_moments_only(self, hvmgr, made, tmp_path):
        key, image = encrypted.key_file(tmp_path, KEY), tmp_path / "image"
        shutil.copyfile(made / "after", image)
        encrypted.luks2(image, key)
        words = ["--image", made / "before", "--image", image, "--format", "raw"]
        answer = hvmgr("file", "diff", *words, "--key-file", key)
        assert [line[:2] for line in answer.lines] == [line[:2] for line in CHANGED]
        assert "is not encrypted with the same key at both moments" in answer.err
        answer = hvmgr("file", "diff", *words)
        assert (answer.code, answer.out, "cannot be compared" in answer.err) == (0, "", True)


@pytest.fixture
def inside_luks(hvmgr, root, tmp_path):
    """A VM as Debian encrypts one: a partition with LUKS 2, and LVM in it. The key of the volume."""
    tree, key = tmp_path / "tree", encrypted.key_file(tmp_path, KEY)
    tree.mkdir()
    (tree / "file").write_text("deep inside")
    part = file_trees.ext(tmp_path / "part", tree, "-t", "ext2", "-b", "1024", size="2M")
    data = bytearray(test_lvm.physical(test_lvm.UUID, test_lvm.METADATA.encode()).data)
    data[2 * MIB : 4 * MIB] = part.read_bytes()
    (tmp_path / "clear").write_bytes(data)
    disk = on_a_disk(encrypted.luks2(tmp_path / "clear", key, "--sector-size", "4096"), tmp_path)
    hvmgr.ok("vm", "create", "web", *MACHINE, "--disk", disk)
    return key


@pytest.mark.usefixtures("able")
class TestPut:
    def test_what_another_program_reads_there(self, hvmgr, by_qemu, root, tmp_path):
        key, disk = by_qemu
        before = present(hvmgr)
        below = digests(disk, before)
        (tmp_path / "new").write_bytes(SAID * 10_000)
        told = hvmgr.ok("file", "put", "web", tmp_path / "new", "/", "--key-file", key, "--json").json
        assert (told["engine"], told["volume"], told["files"]) == ("debugfs (e2fsprogs)", "vda partition 1", 1)
        assert digests(disk, before) == below
        clear = tmp_path / "clear"
        file_trees.run("qemu-img", "convert", "-O", "raw", *encrypted.by_qemu(present(hvmgr), key, MIB), clear)
        assert file_trees.run("debugfs", "-R", "cat /new", clear) == SAID * 10_000
        assert file_trees.run("debugfs", "-R", "cat /large", clear) == file_trees.pattern(3 * MIB)
        assert (
            subprocess.run(["e2fsck", "-f", "-n", clear], capture_output=True, timeout=60, check=False).returncode == 0
        )
        assert not of_clear_text(root)
        self.is_refused_without_the_right_key(hvmgr, tmp_path)
        (tmp_path / "new").write_bytes(os.urandom(13 * MIB))
        answer = hvmgr("file", "put", "web", tmp_path / "new", "/full", "--key-file", key)
        assert (answer.code, "no space left" in answer.err) == (7, True), answer

    def is_refused_without_the_right_key(self, hvmgr, tmp_path):
        was = digests(present(hvmgr))
        wrong = encrypted.key_file(tmp_path, b"a wrong secret")
        for words, code, said in (
            ([], 5, "it is encrypted (LUKS), and its key can be given: --key-file FILE"),
            (["--key-file", wrong], 2, "the key that was given does not open it"),
        ):
            answer = hvmgr("file", "put", "web", tmp_path / "new", "/more", *words)
            assert (answer.code, said in answer.err) == (code, True), answer
        assert digests(present(hvmgr)) == was

    def test_in_a_logical_volume_and_back_out_of_a_snapshot(self, hvmgr, inside_luks, root, tmp_path, monkeypatch):
        key, new = inside_luks, tmp_path / "file"
        disk = tmp_path / "disk"
        below = digests(disk)
        new.write_bytes(SAID)
        words = ["--key-file", key, "--overwrite"]
        told = hvmgr.ok("file", "put", "web", new, "/file", *words, "--name", "before", "--json").json
        assert told["volume"] == "volume group/whole"
        assert hvmgr.ok("file", "cat", "web", "/file", "--key-file", key).out.encode() == SAID
        self.only_the_volume_changed(present(hvmgr), disk, tmp_path / "after", key)
        assert hvmgr("file", "restore", "web", "before", "/file", "--overwrite").code == 5
        change, seen = e2fsprogs.change, []

        def spied(volume, commands):
            seen.extend(os.readlink(one) for one in Path("/proc/self/fd").iterdir() if one.is_symlink())
            change(volume, commands)

        monkeypatch.setattr(e2fsprogs, "change", spied)
        told = hvmgr.ok("file", "restore", "web", "before", "/file", *words, "--json").json
        assert (told["files"], told["replaced"]) == (1, 1)
        copies = [one for one in seen if "/put-" in one or "-copies/" in one]
        assert copies
        assert not [one for one in copies if str(root) in one], "they are below /run"
        monkeypatch.setattr(e2fsprogs, "check", interrupted)
        was = digests(present(hvmgr))
        assert hvmgr("file", "put", "web", new, "/file", *words).code == 130
        assert digests(present(hvmgr)) == was
        assert not list(settings.own_runtime_folder().iterdir())
        assert hvmgr.ok("file", "cat", "web", "/file", "--key-file", f":1={key}").out == "deep inside"
        assert digests(disk) == below
        assert not of_clear_text(root)

    def only_the_volume_changed(self, image, disk, after, key):
        """And cryptsetup itself decrypts what is there now."""
        file_trees.run("qemu-img", "convert", "-O", "raw", image, after)
        whole, before = after.read_bytes(), disk.read_bytes()
        start = 17 * MIB + 2 * MIB  # the partition, the header of LUKS, and what lies in front of the volume
        differ = [at for at in range(0, len(before), 4096) if before[at : at + 4096] != whole[at : at + 4096]]
        assert differ
        assert start <= differ[0]
        assert differ[-1] < start + 2 * MIB
        after.write_bytes(whole[MIB:-MIB])
        clear = encrypted.decrypted(after, key).read_bytes()[2 * MIB : 4 * MIB]
        after.write_bytes(clear)
        assert file_trees.run("debugfs", "-R", "cat /file", after) == SAID
        assert (
            subprocess.run(["e2fsck", "-f", "-n", after], capture_output=True, timeout=60, check=False).returncode == 0
        )


@pytest.mark.guest
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("able", "own_kernel")
def test_exfat_is_read_written_and_compared(hvmgr, root, tmp_path, require_program):
    for name in ("cryptsetup", "qemu-img", "mkfs.exfat", "fsck.exfat", "sfdisk"):
        require_program(name)
    key, clear = encrypted.key_file(tmp_path, KEY), tmp_path / "clear"
    clear.write_bytes(bytes(8 * MIB))
    file_trees.run("mkfs.exfat", clear)
    disk = on_a_disk(encrypted.luks1(tmp_path / "luks1", clear, key), tmp_path)
    hvmgr.ok("vm", "create", "web", *MACHINE, "--disk", disk)
    hvmgr.ok("snapshot", "create", "web", "empty")
    tree, below = tmp_path / "tree", digests(disk)
    (tree / "with space").mkdir(parents=True)
    (tree / "with space" / "large").write_bytes(SAID * 30_000)
    (tree / "small").write_bytes(SAID)
    words = ["--key-file", key]
    answer = hvmgr("file", "put", "web", tree, "/", *words, "--json")
    assert answer.code == 0, answer
    assert answer.json["engine"].startswith("a small machine of its own (")
    (row,) = hvmgr.ok("file", "list", "web", *words).lines
    assert row[1:3] == ["1", "exfat (LUKS)"]
    assert hvmgr.ok("file", "list", "web", "/tree", *words).lines == [["small"], ["with space"]]
    hvmgr.ok("file", "get", "web", "/tree", *words, "--to", tmp_path / "out")
    assert (tmp_path / "out" / "tree" / "with space" / "large").read_bytes() == SAID * 30_000
    found = hvmgr.ok("file", "diff", "web", "empty", "now", *words).lines
    new = ["/tree", "/tree/small", "/tree/with space", "/tree/with space/large"]
    assert [line[:2] for line in found] == [["added", one] for one in new]
    file_trees.run("qemu-img", "convert", "-O", "raw", *encrypted.by_qemu(present(hvmgr), key, MIB), clear)
    file_trees.run("fsck.exfat", "-n", clear)
    assert SAID * 30_000 in clear.read_bytes()
    (tree / "small").write_bytes(b"other")
    answer = hvmgr("file", "put", "web", tree / "small", "/tree/small", "--overwrite", "--name", "full", *words)
    assert answer.code == 0, answer
    (line,) = hvmgr.ok("file", "diff", "web", "full", "now", *words).lines
    assert line[:2] == ["changed", "/tree/small"]
    assert digests(disk) == below
    assert not of_clear_text(root)
