"""``file index`` and ``file find --index`` of what is encrypted with LUKS: as if it were not, wherever a key was given."""

from __future__ import annotations

import os
import shutil
import sqlite3
from pathlib import Path

import pytest

from hvmgr.operations.inside import looking
from tests.storage import encrypted, file_trees, moments, test_lvm

MIB = 1 << 20
KEY, OTHER = b"a key of words", b"another key"
MACHINE = ("--memory", "64M", "--network", "none", "--accel", "tcg")
START = (MIB, 10 * MIB)
LOTS = 30


@pytest.fixture(scope="module")
def made(tmp_path_factory, require_program):
    """What is in clear: one file system for /boot, and one at three moments."""
    for name in ("cryptsetup", "qemu-io", "mke2fs", "debugfs", "sfdisk"):
        require_program(name)
    folder = tmp_path_factory.mktemp("made")
    boot, tree, new = folder / "boot.d", folder / "tree", folder / "new"
    (boot / "grub").mkdir(parents=True)
    (boot / "grub" / "grub.cfg").write_text("x")
    for number in range(LOTS):  # their inodes lie in several clusters
        (tree / f"lot {number:02}").mkdir(parents=True)
        for one in range(60):
            (tree / f"lot {number:02}" / f"{one}").write_text("x")
    (tree / "etc").mkdir()
    for name in ("passwd", "old", "data"):
        (tree / "etc" / name).write_text(name)
    new.write_text("new content\n")
    file_trees.ext(folder / "boot", boot, "-t", "ext2", "-b", "1024", size="8M")
    file_trees.ext(folder / "root0", tree, "-t", "ext4", "-b", "4096", size="16M")
    steps = [["rm /etc/old", f"write {new} /etc/new"], ["rm /etc/data", f"write {new} '/lot 03/more'"]]
    for number, commands in enumerate(steps, 1):
        after = folder / f"root{number}"
        shutil.copyfile(folder / f"root{number - 1}", after)
        for one in commands:
            file_trees.run("debugfs", "-w", "-R", one.replace("'", '"'), after)
    return folder


def present(hvmgr):
    (image,) = hvmgr.ok("vm", "show", "web", "--json").json["now"]["disks"].values()
    return Path(image)


def disk_of(file, *parts, starts=START):
    """A disk with a partition for each of these files."""
    lines = [f"start={at // 512},size={one.stat().st_size // 512}\n" for at, one in zip(starts, parts, strict=True)]
    with file.open("wb") as opened:
        opened.truncate(starts[-1] + parts[-1].stat().st_size + MIB)
        for at, one in zip(starts, parts, strict=True):
            opened.seek(at)
            opened.write(one.read_bytes())
    file_trees.run("sfdisk", "-q", file, input=("label: gpt\n" + "".join(lines)).encode())
    return file


def index(hvmgr, *keys, code=0):
    words = [word for key in keys for word in (["--key-file", key] if key != "--rebuild" else [key])]
    answer = hvmgr("--json", "file", "index", "web", *words)
    assert answer.code == code, answer
    return answer


def named(hvmgr, ids):
    names = {one["id"]: one["name"] for one in hvmgr.ok("snapshot", "list", "web", "--json").json["snapshots"]}
    return [names[one] for one in ids]


def completed(hvmgr, *keys):
    return named(hvmgr, index(hvmgr, *keys).json["completed"])


def locked(hvmgr, *words):
    """The snapshots of which the index says that something is not in it."""
    answer = hvmgr("--json", "file", "find", "web", "/etc", "--index", "--dry-run", *words)
    assert answer.code == 0, answer
    assert ("not in the index" in answer.err) is bool(answer.json["locked"])
    return named(hvmgr, answer.json["locked"])


def require_equal(hvmgr, snapshots, partition, *keys):
    """The index says of these snapshots what a walk with the keys says, and of no others anything."""
    words = ["--partition", partition, "--long"]
    given = [word for key in keys for word in ("--key-file", key)]
    for one in snapshots:
        walked = hvmgr.ok("file", "find", "web", "/", "--snapshot", one, *words, *given).lines
        found = hvmgr("file", "find", "web", "/", "--snapshot", one, *words, "--index", "--dry-run").lines
        assert sorted(line[:-1] for line in found) == sorted(walked), one
        assert len(found) > 2
    every = hvmgr("--json", "file", "find", "web", "/", *words[:2], "--index", "--dry-run").json["entries"]
    assert {one["name"] for entry in every for one in entry["snapshots"]} == set(snapshots)


@pytest.fixture
def by_qemu(hvmgr, root, made, tmp_path):
    """A VM with /boot in clear and LUKS 1 behind it, written by QEMU; three snapshots. Its key."""
    key = encrypted.key_file(tmp_path, KEY)
    volume = encrypted.luks1(tmp_path / "luks1", made / "root0", key)
    hvmgr.ok("vm", "create", "web", *MACHINE, "--disk", disk_of(tmp_path / "disk", made / "boot", volume))
    hvmgr.ok("snapshot", "create", "web", "a")
    write(hvmgr, made, key, 1)
    hvmgr.ok("snapshot", "create", "web", "b")
    write(hvmgr, made, key, 2)
    hvmgr.ok("snapshot", "create", "web", "c")
    return key


def write(hvmgr, made, key, number, back=False):
    """The encrypted volume of the present gets what another moment has."""
    moments_ = [made / f"root{one}" for one in (number - 1, number)]
    image = present(hvmgr)
    moments.write_difference(image, *moments_[:: -1 if back else 1], encrypted.by_qemu(image, key, START[1]))


def rows(root):
    with sqlite3.connect(root / "web" / ".hvmgr" / "files.sqlite") as opened:
        found = [opened.execute(f"SELECT * FROM {one}").fetchall() for one in ("points", "volumes", "paths", "entries")]
    opened.close()
    return found


def change_key(image, old, new, folder):
    """The volume of an image opens with another key from here on, says cryptsetup."""
    before, after, part = folder / "before", folder / "after", folder / "part"
    file_trees.run("qemu-img", "convert", "-O", "raw", image, before)
    data = bytearray(before.read_bytes())
    part.write_bytes(data[START[1] : -MIB])
    words = ["cryptsetup", "luksChangeKey", "-q", "--pbkdf-force-iterations", "1000", "--key-file", old, part, new]
    file_trees.run(*words)
    data[START[1] : -MIB] = part.read_bytes()
    after.write_bytes(data)
    moments.write_difference(image, before, after)


def test_what_no_key_was_given_for_is_told_and_taken_in_later(hvmgr, root, by_qemu, tmp_path):
    key, wrong = by_qemu, encrypted.key_file(tmp_path, b"a wrong secret")
    database = root / "web" / ".hvmgr" / "files.sqlite"
    assert "does not open it" in index(hvmgr, wrong, code=2).json["error"]["message"]
    assert not database.exists(), "nothing changed"
    answer = index(hvmgr)
    assert list(answer.json["locked"].values()) == [["vda partition 2"]] * 3
    said = "vda partition 2 of 'a', 'b', 'c' is encrypted (LUKS), and not in the index: its key can be given"
    assert said in answer.err
    answer = hvmgr("file", "find", "web", "/", "--name", "grub.cfg", "--index")
    assert (answer.lines, answer.err.count(said)) == ([["/grub/grub.cfg", "a, b, c"]], 1)
    for words in ([], ["--partition", "2"], ["--disk", "vda"], ["--partition", "group/lv"]):
        assert locked(hvmgr, *words) == ["a", "b", "c"]
    assert (locked(hvmgr, "--snapshot", "b"), locked(hvmgr, "--partition", "1")) == (["b"], [])
    assert hvmgr("file", "find", "web", "/", "--index", "--partition", "7").code == 3
    before = rows(root)
    for value, code, what in (
        (wrong, 2, "does not open it"),
        (f"vda:2={wrong}", 2, "does not open it"),
        (f"vdb={key}", 3, "no 'vdb' that the key"),
    ):
        assert what in index(hvmgr, value, code=code).json["error"]["message"]
    answer = hvmgr("file", "find", "web", "/", "--index", "--key-file", wrong)
    assert (answer.code, answer.out) == (2, "")
    assert hvmgr("file", "index", "web", "--rebuild", "--key-file", wrong).code == 2
    assert rows(root) == before, "nothing changed"
    answer = hvmgr("file", "index", "web", "--dry-run", "--key-file", key)
    assert answer.out == "0 snapshots would be added, 3 completed, 0 removed\n"
    assert rows(root) == before
    told = index(hvmgr, f"vda:2={key}").json
    assert (named(hvmgr, told["completed"]), told["added"], told["locked"]) == (["a", "b", "c"], [], {})
    assert LOTS < told["folders"] < 2 * LOTS, "two of the three are read as what differs"
    require_equal(hvmgr, "abc", "2", key)
    require_equal(hvmgr, "abc", "1")
    assert hvmgr.ok("file", "find", "web", "/etc/new", "--index").lines == [["/etc/new", "b, c"]]
    assert not [one for one in database.parent.glob("files.sqlite*") if KEY in one.read_bytes()]
    database.chmod(0o644)
    index(hvmgr)
    assert [one.stat().st_mode & 0o777 for one in database.parent.glob("files.sqlite*")] == [0o600]


def test_an_update_without_a_key_keeps_what_is_there(hvmgr, root, by_qemu, made):
    key = by_qemu
    assert named(hvmgr, index(hvmgr, key).json["added"]) == ["a", "b", "c"]
    hvmgr.ok("snapshot", "create", "web", "same")
    write(hvmgr, made, key, 2, back=True)
    hvmgr.ok("snapshot", "create", "web", "d")
    answer = hvmgr("file", "find", "web", "/etc/data", "--index")
    assert [line[:2] for line in answer.lines] == [["/etc/data", "a, b"]]
    assert "vda partition 2 of 'd' is encrypted (LUKS), and not in the index" in answer.err
    assert locked(hvmgr) == ["d"], "of 'same' no byte is another one"
    assert locked(hvmgr, "--snapshot", "a") == []
    require_equal(hvmgr, ["a", "b", "c", "same"], "2", key)
    hvmgr.ok("file", "find", "web", "/", "--index", "--key-file", key)
    assert locked(hvmgr) == []
    require_equal(hvmgr, ["a", "b", "c", "same", "d"], "2", key)
    assert index(hvmgr, key).json["changed"] is False
    hvmgr.ok("snapshot", "delete", "web", "b")
    assert index(hvmgr).json["locked"] == {}
    require_equal(hvmgr, ["a", "c", "same", "d"], "2", key)
    hvmgr.ok("snapshot", "delete", "web", "a")
    index(hvmgr)
    require_equal(hvmgr, ["c", "same", "d"], "2", key)
    hvmgr("file", "index", "web", "--rebuild")
    assert locked(hvmgr) == ["c", "same", "d"], "all of it was forgotten"


def test_a_key_that_was_changed_in_between_opens_what_it_opens(hvmgr, root, by_qemu, made, tmp_path):
    """Snapshots come later than others that stand on them, in any order; the others show what they showed."""
    key, other = by_qemu, encrypted.key_file(tmp_path, OTHER)
    change_key(present(hvmgr), key, other, tmp_path)
    write(hvmgr, made, other, 2, back=True)
    hvmgr.ok("snapshot", "create", "web", "d")
    write(hvmgr, made, other, 1, back=True)
    change_key(present(hvmgr), other, key, tmp_path)
    hvmgr.ok("snapshot", "create", "web", "e")
    for first, second, those, these in ((key, other, "abce", "d"), (other, key, "d", "abce")):
        hvmgr("file", "index", "web", "--rebuild")
        answer = index(hvmgr, first)
        assert named(hvmgr, answer.json["completed"]) == list(those)
        assert "none of the keys that were given opens it" in answer.err
        assert locked(hvmgr) == list(these)
        require_equal(hvmgr, those, "2", first)
        assert completed(hvmgr, second) == list(these)
        require_equal(hvmgr, "abcde", "2", key, other)
    told = index(hvmgr, key, other, "--rebuild").json
    assert (len(told["added"]), told["locked"], told["folders"] < 3 * LOTS) == (5, {}, True)
    require_equal(hvmgr, "abcde", "2", key, other)


def test_what_is_encrypted_anew_is_read_as_a_whole(hvmgr, root, made, tmp_path):
    """With LUKS 2, by cryptsetup; at the first of the moments it is in clear."""
    key, images = encrypted.key_file(tmp_path, KEY), [tmp_path / f"disk{number}" for number in range(4)]
    for number, image in enumerate(images):
        shutil.copyfile(made / f"root{max(0, number - 1)}", image)
        encrypted.luks2(image, key) if number else os.truncate(image, 32 * MIB)
    hvmgr.ok("vm", "create", "web", *MACHINE, "--disk", images[0])
    hvmgr.ok("snapshot", "create", "web", "a")
    for number, snapshot in enumerate("bcd", 1):
        moments.write_difference(present(hvmgr), images[number - 1], images[number])
        hvmgr.ok("snapshot", "create", "web", snapshot)
    index(hvmgr)
    assert locked(hvmgr) == ["b", "c", "d"]
    assert completed(hvmgr, key) == ["b", "c", "d"]
    for one in "abcd":
        words = ["file", "find", "web", "/", "--snapshot", one, "--long"]
        walked = hvmgr.ok(*words, "--key-file", key).lines
        found = hvmgr.ok(*words, "--index", "--dry-run").lines
        assert sorted(line[:-1] for line in found) == sorted(walked), one
    assert hvmgr.ok("file", "find", "web", "/etc/new", "--index", "--null").out == "/etc/new\0"


def test_of_two_volumes_each_comes_with_its_own_key(hvmgr, root, made, tmp_path, monkeypatch):
    """One has a logical volume in it."""
    keys = [encrypted.key_file(tmp_path, one) for one in (KEY, OTHER)]
    data = bytearray(test_lvm.physical(test_lvm.UUID, test_lvm.METADATA.encode()).data)
    tree = tmp_path / "tree"
    (tree / "deep").mkdir(parents=True)
    (tree / "deep" / "er").write_text("inside")
    data[2 * MIB : 4 * MIB] = file_trees.ext(tmp_path / "lv", tree, "-t", "ext2", "-b", "1024", size="2M").read_bytes()
    (tmp_path / "one").write_bytes(data)
    shutil.copyfile(made / "root0", tmp_path / "two")
    parts = [encrypted.luks2(tmp_path / name, key) for name, key in zip(("one", "two"), keys, strict=True)]
    disk = disk_of(tmp_path / "disk", *parts, starts=(MIB, 64 * MIB))
    hvmgr.ok("vm", "create", "web", *MACHINE, "--disk", disk)
    hvmgr.ok("snapshot", "create", "web", "a")
    hvmgr.ok("snapshot", "create", "web", "b")
    told = index(hvmgr, f":1={keys[0]}").json
    assert list(told["locked"].values()) == [["vda partition 2"], ["vda partition 2"]]
    find = ["file", "find", "web", "/", "--index"]
    paths = hvmgr(*find, "--null", "--name", "er").out
    assert paths == "/deep/er\0"
    assert hvmgr(*find, "--null", "--partition", "group/whole", "--type", "f").out == "/deep/er\0"
    opened, real = [], looking.opened
    monkeypatch.setattr(looking, "opened", lambda disks, **more: (opened.append(disks), real(disks, **more))[1])
    assert index(hvmgr, keys[0]).json["changed"] is False
    assert len(opened) == 2, "where the same is locked that no key opened once, it is not tried again"
    assert completed(hvmgr, f":2={keys[1]}") == ["a", "b"]
    assert index(hvmgr).json["locked"] == {}
    for words, expected in ((["--name", "er"], "/deep/er\0"), (["--name", "passwd"], "/etc/passwd\0")):
        assert hvmgr.ok(*find, "--null", *words).out == expected
