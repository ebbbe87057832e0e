"""``hvmgr file put`` and ``restore`` for a VM that is off: bytes, owners, modes and times, and every way to fail."""

from __future__ import annotations

import base64
import hashlib
import os
import signal
import struct
import subprocess
from pathlib import Path

import pytest

from hvmgr.storage import kernels
from tests.storage import file_trees, test_lvm

START = 1 << 20
# As Linux shows it: the owner may write, user 1000 and the group read.
_ENTRIES = ((1, 6, 0xFFFFFFFF), (2, 4, 1000), (4, 4, 0xFFFFFFFF), (16, 4, 0xFFFFFFFF), (32, 0, 0xFFFFFFFF))
ACL = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *one) for one in _ENTRIES)


def present(hvmgr, vm):
    (image,) = hvmgr.ok("vm", "show", vm, "--json").json["now"]["disks"].values()
    return image


def partition_of(hvmgr, vm, to):
    """The partition of the VM's present, in a file."""
    raw = to.with_suffix(".raw")
    file_trees.run("qemu-img", "convert", "-O", "raw", present(hvmgr, vm), raw)
    with raw.open("rb") as file:
        file.seek(START)
        to.write_bytes(file.read()[: -(1 << 20)])
    raw.unlink()
    return to


def is_sound(part):
    return subprocess.run(["e2fsck", "-f", "-n", part], capture_output=True, timeout=60, check=False).returncode == 0


@pytest.fixture(autouse=True)
def _able(require, require_program):
    require(os.access("/dev/fuse", os.R_OK | os.W_OK), "needs /dev/fuse")
    for name in ("debugfs", "e2fsck", "sfdisk"):
        require_program(name)


@pytest.fixture(scope="module")
def linux(tmp_path_factory):
    folder = tmp_path_factory.mktemp("linux")
    tree = folder / "tree"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc" / "passwd").write_text("root:x:0:0::/root:/bin/sh\nanna:x:1001:1002::/home/anna:/bin/sh\n")
    (tree / "etc" / "group").write_text("root:x:0:\nweb:x:77:anna\n")
    (tree / "etc" / "hosts").write_text("127.0.0.1 localhost\n")
    (tree / "etc" / "hosts").chmod(0o640)
    (tree / "srv").mkdir()
    (tree / "srv" / "link").symlink_to("../etc")
    os.link(tree / "etc" / "hosts", tree / "srv" / "same")
    part = folder / "part"
    file_trees.ext(part, tree, "-t", "ext4", size="16M")
    (folder / "acl").write_bytes(ACL)
    debug = f"ea_set -f {folder}/acl /etc/hosts system.posix_acl_access\n"
    debug += (
        'set_inode_field /etc/hosts uid 5\nea_set /etc/hosts user.note kept\nea_set /etc security.selinux "etc_t"\n'
    )
    subprocess.run(
        ["debugfs", "-w", "-f", "-", part], input=debug.encode(), check=True, capture_output=True, timeout=60
    )
    return file_trees.in_partition(folder / "disk", part)


@pytest.fixture
def web(hvmgr, root, linux):
    hvmgr.ok("vm", "create", "web", "--memory", "64M", "--disk", linux, "--network", "none", "--accel", "tcg")
    return "web"


def stat(hvmgr, path, *words):
    (found,) = hvmgr.ok("file", "stat", "web", path, "--json", *words).json["entries"]
    return found


def facts(found):
    return oct(found["mode"]) if isinstance(found["mode"], int) else found["mode"], found["uid"], found["gid"]


def extended(found):
    return {name: base64.b64decode(value) for name, value in found["extended"].items()}


def test_a_tree_lands_with_times_and_modes_and_the_snapshot_is_what_was(hvmgr, web, tmp_path):
    tree = tmp_path / "tree"
    (tree / "deep" / "er").mkdir(parents=True)
    content = os.urandom(300_000)
    with (tree / "deep" / "big").open("wb") as file:
        file.write(content)
        file.seek(3 << 20)
        file.write(content)
    (tree / "empty").touch()
    (tree / "deep" / "er" / "run").write_text("x")
    (tree / "deep" / "er" / "run").chmod(0o4751)
    (tree / "deep" / "link").symlink_to("../no such")
    os.mkfifo(tree / "pipe")
    for one in [*tree.rglob("*"), tree]:
        os.utime(one, ns=(5, 1_600_000_000_123_456_789), follow_symlinks=False)
    answer = hvmgr("file", "put", web, tree, "/srv/", "--json")
    assert answer.code == 0
    assert "1 left out: device nodes, pipes and sockets" in answer.err
    told = answer.json
    assert (told["changed"], told["files"], told["replaced"], told["engine"]) == (True, 7, 0, "debugfs (e2fsprogs)")
    assert told["to"] == {"path": "/srv"}
    assert hvmgr.ok("file", "hash", web, "/srv/tree/deep/big").out.split()[0] == sha(tree / "deep" / "big")
    big = stat(hvmgr, "/srv/tree/deep/big")
    hvmgr.ok("file", "get", web, "/srv/tree", "--to", tmp_path / "out")
    taken = (tmp_path / "out" / "tree" / "deep" / "big").stat()
    assert taken.st_mtime_ns == 1_600_000_000_123_456_789
    assert taken.st_blocks * 512 < 1 << 20  # holes stay holes
    assert big["modified"].startswith("2020-09-13T12:26:40.123456")
    assert stat(hvmgr, "/srv/tree")["modified"] == stat(hvmgr, "/srv/tree/deep")["modified"] == big["modified"]
    assert facts(stat(hvmgr, "/srv/tree/deep/er/run")) == (
        "0751",
        0,
        0,
    )  # a bit for another owner would be another one's
    assert stat(hvmgr, "/srv/tree/deep/link")["target"] == "../no such"
    assert is_sound(partition_of(hvmgr, web, tmp_path / "part"))

    (snapshot,) = hvmgr.ok("snapshot", "list", web, "--json").json["snapshots"]
    assert told["snapshot"] == {"id": snapshot["id"], "name": snapshot["name"]}
    assert snapshot["name"].startswith("web before file put (")
    assert hvmgr("file", "stat", web, "/srv/tree", "--snapshot", snapshot["id"]).code == 3
    hvmgr.ok("snapshot", "revert", web)
    assert hvmgr("file", "stat", web, "/srv/tree").code == 3
    hvmgr.ok("snapshot", "undo", web)
    assert stat(hvmgr, "/srv/tree/empty")["size"] == 0


def test_above_a_link_is_the_folder_above_where_it_leads(hvmgr, web, tmp_path):
    """As a kernel has it: ``/srv/link`` leads to ``/etc``."""
    (tmp_path / "new").write_text("new")
    assert hvmgr.ok("file", "put", web, tmp_path / "new", "/srv/link/../", "--json").json["to"] == {"path": "/"}
    assert hvmgr.ok("file", "cat", web, "/new").out == "new"
    assert hvmgr("file", "stat", web, "/srv/new").code == 3


def sha(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_what_is_replaced_keeps_what_is_its_own(hvmgr, web, tmp_path):
    new = tmp_path / "hosts"
    new.write_text("new\n")
    assert "--overwrite" in hvmgr("file", "put", web, new, "/etc").err
    answer = hvmgr("file", "put", web, new, "/srv/link/hosts", "--overwrite", "--name", "mine")
    assert answer.code == 0
    assert answer.err == "/etc/hosts has other names, under which it stays what it was\n"
    assert "what was before is the snapshot 'mine'" in answer.out
    found = stat(hvmgr, "/etc/hosts")
    assert (facts(found), extended(found)) == (("0640", 5, 0), {"user.note": b"kept", "system.posix_acl_access": ACL})
    assert hvmgr.ok("file", "cat", web, "/etc/hosts", "/srv/same").out == "new\n127.0.0.1 localhost\n"
    hvmgr.ok("file", "put", web, new, "/etc/other", "--owner", "anna:web", "--mode", "0600")
    found = stat(hvmgr, "/etc/other")
    assert (facts(found), extended(found)) == (("0600", 1001, 77), {"security.selinux": b"etc_t"})
    hvmgr.ok("file", "put", web, new, "/home/anna/x/", "--owner", "anna", "--parents", "--mode", "0640")
    assert facts(stat(hvmgr, "/home/anna/x/hosts")) == ("0640", 1001, 1002)
    assert is_sound(partition_of(hvmgr, web, tmp_path / "part"))
    for owner, code in (("bob", 3), ("anna:nobody", 3), ("", 2), ("4294967295", 2), ("1:", 2)):
        assert hvmgr("file", "put", web, new, "/etc/more", "--owner", owner).code == code


def test_restore_brings_back_what_a_snapshot_had(hvmgr, web, tmp_path):
    hvmgr.ok("snapshot", "create", web, "before")
    new = tmp_path / "hosts"
    new.write_text("new\n")
    assert hvmgr("file", "put", web, new, "/etc/hosts", "--overwrite").code == 0
    assert hvmgr("file", "restore", web, "before", "/etc/hosts").code == 4
    assert hvmgr.ok("file", "restore", web, "before", "/etc/h*", "--overwrite").out.startswith(
        "1 file (20 B) put into /"
    )
    found = stat(hvmgr, "/etc/hosts")
    assert (facts(found), extended(found)) == (("0640", 5, 0), {"user.note": b"kept", "system.posix_acl_access": ACL})
    assert found["modified"] == stat(hvmgr, "/etc/hosts", "--snapshot", "before")["modified"]
    hvmgr.ok("file", "restore", web, "before", "/etc", "/srv/link", "--into", "/srv/old/", "--parents")
    assert stat(hvmgr, "/srv/old/link")["target"] == "../etc"
    assert hvmgr.ok("file", "cat", web, "/srv/old/etc/hosts").out == "127.0.0.1 localhost\n"
    assert is_sound(partition_of(hvmgr, web, tmp_path / "part"))
    assert hvmgr("file", "restore", web, "before", "/etc/no").code == 3
    assert hvmgr("file", "restore", web, "before", "/").code == 2
    assert hvmgr("file", "restore", web, "before", "/etc", "--to", "running", "--parents").code == 2
    answer = hvmgr("file", "restore", web, "before", "/etc", "--to", "running")
    assert (answer.code, "is off: its guest takes no files" in answer.err) == (4, True)
    assert hvmgr.ok("file", "restore", web, "before", "/srv/link", "--into", "/srv/old", "--overwrite").code == 0


HOSTILE = [
    b"<8>", b"with space", b'quote"double', b"quote'single", b"-w", b"a;quit", b"\\back", b"\xff\xfe", b"#comment", b"$(x)`y`",
    b" leading", b"\t", b"x" * 255, b"?*[a]", b"\x1b[31m", b"~",
]  # fmt: skip


def test_names_are_names_and_never_commands(hvmgr, web, tmp_path):
    tree = os.fsencode(tmp_path / "tree")
    os.mkdir(tree)
    for name in HOSTILE:
        os.mkdir(tree + b"/" + name)
        Path(os.fsdecode(tree + b"/" + name + b"/" + name)).write_bytes(name)
        os.symlink(name, tree + b"/" + name + b"/link")
    hvmgr.ok("file", "put", web, os.fsdecode(tree), "/srv")
    listed = hvmgr.ok("file", "find", web, "/srv/tree", "--type", "f", "--json").json["entries"]
    assert len(listed) == len(HOSTILE)
    hvmgr.ok("file", "get", web, "/srv/tree", "--to", tmp_path / "out")
    for name in HOSTILE:
        folder = os.fsencode(tmp_path / "out" / "tree") + b"/" + name
        assert Path(os.fsdecode(folder + b"/" + name)).read_bytes() == name
        assert os.readlink(folder + b"/link") == name
    assert is_sound(partition_of(hvmgr, web, tmp_path / "part"))
    before = present(hvmgr, web)
    for name, words in ((b"new\nrm etc", "has a line break"), (b"a\rb", "has a line break")):
        odd = tmp_path / os.fsdecode(name)
        odd.write_text("x")
        answer = hvmgr("file", "put", web, odd, "/srv")
        assert (answer.code, words in answer.err) == (5, True)
    assert present(hvmgr, web) == before


def test_nothing_changes_when_it_does_not_go(hvmgr, web, tmp_path, monkeypatch):
    file, big = tmp_path / "file", tmp_path / "big"
    file.write_text("x")
    big.write_bytes(os.urandom(18 << 20))
    (tmp_path / "etc").mkdir()
    before, image = present(hvmgr, web), Path(present(hvmgr, web)).read_bytes()
    cases = [
        ((big, "/srv"), 7, "no space left"),
        ((file, tmp_path / "no", "/srv"), 3, "there is no"),
        ((file, "/no/where"), 3, "there is no file 'no' in /"),
        ((file, "/etc/hosts/x"), 4, "no folder"),
        ((file, "/etc/hosts/"), 4, "no folder"),
        ((file, "/no/../x"), 2, "leads back"),
        ((tmp_path / "etc", "/etc/hosts"), 4, "no folder"),
        ((tmp_path / "etc", file, "/etc/hosts"), 4, "no folder"),
        ((file, file, "/srv"), 2, "would both be"),
        ((file,), 2, "SRC... DEST"),
        ((file, ""), 2, "is empty"),
        (("/dev/null", "/srv"), 2, "nothing is left to put: device nodes"),
        ((file, "/srv", "--name", ""), 2, "a snapshot's name cannot be empty"),
        (("/", "/srv"), 2, "has no name"),
        ((file, "/srv", "--mode", "999"), 2, "no mode"),
        ((file, "/srv", "--partition", "2"), 3, "no partition"),
        ((file, "/srv", "--disk", "vdb"), 3, "vdb"),
    ]
    (tmp_path / "link").mkdir()
    cases.append(((tmp_path / "link", "/srv"), 4, "no folder"))
    for words, code, said in cases:
        answer = hvmgr("file", "put", web, *words)
        assert (answer.code, said in answer.err) == (code, True), (words, answer)
    plan = hvmgr.ok("file", "put", web, file, "/srv", "--dry-run").out
    assert "put 1 file into /srv of vda partition 1, in image" in plan
    document = hvmgr.ok("file", "put", web, file, "/srv", "--dry-run", "--json").json
    assert "PutFiles" in [one["step"] for one in document["plan"]["prepare"]]
    assert (present(hvmgr, web), Path(before).read_bytes()) == (before, image)
    assert len(list(Path(before).parent.parent.rglob("*.qcow2"))) == 0
    assert hvmgr.ok("file", "put", web, tmp_path / "etc", "/").out == "nothing to do\n"
    assert not list(Path(os.environ["HVMGR_RUN"]).glob("*/volume"))


def test_a_file_that_changes_and_a_volume_that_reads_otherwise_are_refused(hvmgr, web, tmp_path, monkeypatch):
    from hvmgr.host import e2fsprogs

    file = tmp_path / "file"
    file.write_text("x")
    before, change = present(hvmgr, web), e2fsprogs.change

    def late(volume, commands):
        change(volume, commands)
        file.write_text("another")

    monkeypatch.setattr(e2fsprogs, "change", late)
    answer = hvmgr("file", "put", web, file, "/srv")
    assert (answer.code, "was changed while it was read" in answer.err) == (4, True)

    def wrong(volume, commands):
        change(volume, [one.replace("uid 0", "uid 7") for one in commands])

    monkeypatch.setattr(e2fsprogs, "change", wrong)
    answer = hvmgr("file", "put", web, file, "/srv")
    assert (answer.code, "it belongs to 7:0; nothing was changed" in answer.err) == (8, True)

    def broken(volume, commands):
        change(volume, [*commands, "set_inode_field /srv links_count 9"])

    monkeypatch.setattr(e2fsprogs, "change", broken)
    answer = hvmgr("file", "put", web, file, "/srv")
    assert (answer.code, "the file system is damaged: Inode" in answer.err) == (6, True), answer

    def interrupted(volume, commands):
        os.kill(os.getpid(), signal.SIGINT)
        change(volume, commands)

    monkeypatch.setattr(e2fsprogs, "change", interrupted)
    answer = hvmgr("file", "put", web, file, "/srv")
    assert (answer.code, "nothing was changed" in answer.err) == (130, True)
    assert present(hvmgr, web) == before
    assert hvmgr.ok("snapshot", "list", web, "--json").json["snapshots"] == []


# --- NTFS, FAT, and what cannot be written ----------------------------------------------------------------------------


@pytest.fixture
def made_of(hvmgr, root, tmp_path, require_program):
    """A VM whose disk has one partition with a file system that a command makes in a file of this size."""

    def make(size, *command):
        part = tmp_path / "system"
        with part.open("wb") as file:
            file.truncate(size)
        if command:
            require_program(command[0])
            file_trees.run(*command, part)
        disk = file_trees.in_partition(tmp_path / "disk", part)
        hvmgr.ok("vm", "create", "web", "--memory", "64M", "--disk", disk, "--network", "none", "--accel", "tcg")
        return part

    return make


def test_ntfs_is_written_with_what_windows_would_give_it(hvmgr, made_of, tmp_path):
    part = made_of(8 << 20, "mkntfs", "-q", "-F", "-Q", "-p", "2048", "-H", "255", "-S", "63")
    tree = tmp_path / "Tree"
    (tree / "dir \u00fc\U0001f600").mkdir(parents=True)
    (tree / "dir \u00fc\U0001f600" / "big").write_bytes(bytes(range(256)) * 8000)
    (tree / "quote's $x `y`").write_text("small")
    (tree / "none").touch()
    for one in [*tree.rglob("*"), tree]:
        os.utime(one, ns=(5, 1_600_000_000_123_456_700))
    answer = hvmgr.ok("file", "put", "web", tree, "/", "--json")
    assert (answer.json["engine"], answer.json["files"]) == ("libntfs-3g", 5)
    hvmgr.ok("file", "get", "web", "/tree/*", "--to", tmp_path / "out")
    for one in tree.rglob("*"):
        other = tmp_path / "out" / one.relative_to(tree)
        assert other.stat().st_mtime_ns == one.stat().st_mtime_ns
        assert one.is_dir() or one.read_bytes() == other.read_bytes()
    (root,) = hvmgr.ok("file", "stat", "web", "/Tree", "--json").json["entries"]
    (small,) = hvmgr.ok("file", "stat", "web", "/Tree/quote's $x `y`", "--json").json["entries"]
    administrators = bytes.fromhex("01020000000000052000000020020000")
    assert administrators in extended(small)["system.ntfs_acl"]
    assert len(extended(root)["system.ntfs_acl"]) > 100

    hvmgr.ok("snapshot", "create", "web", "before")
    (tmp_path / "QUOTE'S $X `Y`").write_text("shorter" * 900)
    assert hvmgr("file", "put", "web", tmp_path / "QUOTE'S $X `Y`", "/tree").code == 4
    assert (
        hvmgr.ok("file", "put", "web", tmp_path / "QUOTE'S $X `Y`", "/tree", "--overwrite", "--json").json["replaced"]
        == 1
    )
    listed = [one["path"] for one in hvmgr.ok("file", "list", "web", "/Tree", "--json").json["entries"]]
    assert listed == ["/Tree/dir \u00fc\U0001f600", "/Tree/none", "/Tree/quote's $x `y`"]
    hvmgr.ok("file", "restore", "web", "before", "/Tree/quote's $x `y`", "--overwrite")
    assert hvmgr.ok("file", "cat", "web", "/Tree/quote's $x `y`").out == "small"
    (again,) = hvmgr.ok("file", "stat", "web", "/Tree/quote's $x `y`", "--json").json["entries"]
    assert extended(again)["system.ntfs_acl"] == extended(small)["system.ntfs_acl"]
    file_trees.run("ntfsfix", "-n", partition_of(hvmgr, "web", part))
    for name, said in (("a:b", "Windows could not"), ("nul.txt", "Windows could not"), ("x.", "Windows could not")):
        (tmp_path / name).write_text("x")
        answer = hvmgr("file", "put", "web", tmp_path / name, "/")
        assert (answer.code, said in answer.err) == (5, True)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "a").touch()
    (tmp_path / "two" / "A").touch()
    assert hvmgr("file", "put", "web", tmp_path / "two", "/").code == 2
    (tmp_path / "full").write_bytes(os.urandom(8 << 20))
    answer = hvmgr("file", "put", "web", tmp_path / "full", "/")
    assert (answer.code, "no space left" in answer.err) == (7, True)
    (tmp_path / "hiberfil.sys").write_bytes(b"hibr" + bytes(8192))
    hvmgr.ok("file", "put", "web", tmp_path / "hiberfil.sys", "/")
    answer = hvmgr("file", "put", "web", tmp_path / "x.", "/x")
    assert (answer.code, "sleeps (hiberfil.sys)" in answer.err) == (4, True)


def test_fat_is_written_in_two_seconds_steps(hvmgr, made_of, tmp_path, require_program):
    require_program("mcopy")
    part = made_of(8 << 20, "mkfs.fat", "-h", "2048")
    tree = tmp_path / "EFI"
    (tree / "d\u00efr with space").mkdir(parents=True)
    (tree / "d\u00efr with space" / "long name+;.efi").write_bytes(bytes(range(256)) * 300)
    os.utime(tree / "d\u00efr with space" / "long name+;.efi", (5, 1_600_000_000))
    assert hvmgr.ok("file", "put", "web", tree, "/", "--json").json["engine"] == "mtools"
    (found,) = hvmgr.ok("file", "stat", "web", "/EFI/d\u00efr with space/long name+;.efi", "--json").json["entries"]
    assert found["modified"].startswith("2020-09-13T12:26:40")
    (tmp_path / "-o").write_text("new")
    hvmgr.ok("file", "put", "web", tmp_path / "-o", "/EFI/d\u00efr with space/long name+;.efi", "--overwrite")
    hvmgr.ok("file", "put", "web", tmp_path / "-o", "/")
    assert hvmgr.ok("file", "cat", "web", "/efi/d\u00efr with space/LONG NAME+;.efi", "/-o").out == "newnew"
    file_trees.run("fsck.fat", "-n", partition_of(hvmgr, "web", part))
    (tmp_path / "a[b]").touch()
    assert hvmgr("file", "put", "web", tmp_path / "a[b]", "/").code == 5
    (tmp_path / "full").write_bytes(bytes(9 << 20))
    assert hvmgr("file", "put", "web", tmp_path / "full", "/").code == 7


@pytest.mark.guest
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("own_kernel")
def test_a_machine_of_its_own_writes_what_no_program_does(hvmgr, made_of, tmp_path, require_program):
    """Here exFAT into a VM; XFS, Btrfs and a full volume are in tests/operations/inside/test_kernel_writing.py."""
    part = made_of(8 << 20, "mkfs.exfat")
    tree = tmp_path / "tree"
    names = ["with space", "quote's $x `y`"]
    for name in names:
        (tree / name).mkdir(parents=True)
        (tree / name / name).write_bytes(os.fsencode(name) * 3000)
        os.utime(tree / name / name, (5, 1_600_000_000))
    (tree / "empty").touch()
    os.utime(tree / "empty", (5, 5))
    told = hvmgr("file", "put", "web", tree, "/", "--json")
    assert told.code == 0, told
    assert told.json["engine"].startswith("a small machine of its own (")
    hvmgr.ok("file", "get", "web", "/tree", "--to", tmp_path / "out")
    for name in names:
        taken = tmp_path / "out" / "tree" / name / name
        assert taken.read_bytes() == os.fsencode(name) * 3000
        assert taken.stat().st_mtime == 1_600_000_000
    assert (tmp_path / "out" / "tree" / "empty").stat().st_mtime == 315_532_800  # 1980, the first that it can keep
    file_trees.run("fsck.exfat", "-n", partition_of(hvmgr, "web", part))


@pytest.mark.parametrize(
    ("size", "command", "said"),
    [
        (300 << 20, ("mkfs.xfs", "-q", "-f"), "finds no Linux kernel on this host that knows xfs"),
        (4 << 20, (), "nothing that is known lies on the 1 partitions"),
    ],
    ids=["xfs", "nothing"],
)
def test_what_cannot_be_written_says_why(hvmgr, made_of, tmp_path, monkeypatch, size, command, said):
    monkeypatch.setattr(kernels, "MODULES", tmp_path / "none")
    made_of(size, *command)
    answer = hvmgr("file", "put", "web", __file__, "/")
    assert (answer.code, said in answer.err) == (5, True), answer


def test_a_logical_volume_in_one_piece_is_written(hvmgr, root, tmp_path):
    disk = bytearray(test_lvm.physical(test_lvm.UUID, test_lvm.METADATA.encode()).data)
    (tmp_path / "tree").mkdir()
    volume = file_trees.ext(tmp_path / "volume", tmp_path / "tree", "-t", "ext2", size="2M")
    disk[2 << 20 : 4 << 20] = Path(volume).read_bytes()
    (tmp_path / "disk").write_bytes(disk)
    words = ["--memory", "64M", "--disk", tmp_path / "disk", "--network", "none", "--accel", "tcg"]
    hvmgr.ok("vm", "create", "web", *words)
    (tmp_path / "file").write_text("on a volume\n")
    told = hvmgr.ok("file", "put", "web", tmp_path / "file", "/", "--partition", "group/whole", "--json").json
    assert told["volume"] == "volume group/whole"
    file_trees.run("qemu-img", "convert", "-O", "raw", present(hvmgr, "web"), tmp_path / "after")
    after = (tmp_path / "after").read_bytes()
    assert after[: 2 << 20] + after[4 << 20 :] == disk[: 2 << 20] + disk[4 << 20 :]
    (tmp_path / "volume").write_bytes(after[2 << 20 : 4 << 20])
    assert is_sound(tmp_path / "volume")
    assert hvmgr.ok("file", "cat", "web", "/file").out == "on a volume\n"
    assert (
        hvmgr.ok("file", "restore", "web", told["snapshot"]["id"], "/lost+found", "--into", "/new", "--parents").code
        == 0
    )


def test_a_system_that_sleeps_on_another_disk_is_left_alone(hvmgr, root, linux, tmp_path):
    """It would go on with the file system that it has in its memory, and spoil what is on the disk."""
    page = bytearray(1 << 20)
    page[4086:4096] = b"S1SUSPEND\0"
    (tmp_path / "swap").write_bytes(page)
    words = ["--memory", "64M", "--network", "none", "--accel", "tcg", "--disk", linux, "--disk", tmp_path / "swap"]
    hvmgr.ok("vm", "create", "web", *words)
    hvmgr.ok("snapshot", "create", "web", "before")
    before = hvmgr.ok("vm", "show", "web", "--json").json["now"]["disks"]
    for words in (["put", "web", __file__, "/srv"], ["restore", "web", "before", "/etc/hosts", "--overwrite"]):
        answer = hvmgr("file", *words)
        assert (answer.code, "the system of vdb sleeps" in answer.err) == (4, True), answer
    assert hvmgr.ok("vm", "show", "web", "--json").json["now"]["disks"] == before


@pytest.mark.parametrize("magic", [b"LUKS\xba\xbe\x00\x02", b"\xeb\x58\x90-FVE-FS-"], ids=["luks", "bitlocker"])
def test_an_encrypted_volume_without_a_key_is_named(hvmgr, made_of, tmp_path, magic):
    part = made_of(4 << 20)
    image = Path(present(hvmgr, "web"))
    with image.open("r+b") as file:
        file.seek(START)
        file.write(magic)
    answer = hvmgr("file", "put", "web", part, "/")
    assert (answer.code, "it is encrypted (" in answer.err) == (5, True), answer


def test_a_journal_is_replayed_first(hvmgr, web, tmp_path):
    image = Path(present(hvmgr, web))
    part = partition_of(hvmgr, web, tmp_path / "part")
    debug = b"jo\njw -b 9000 /dev/zero\njc\n"
    subprocess.run(["debugfs", "-w", "-f", "-", part], input=debug, check=True, capture_output=True, timeout=60)
    with image.open("r+b") as file:
        file.seek(START)
        file.write(part.read_bytes())
    answer = hvmgr("file", "put", web, __file__, "/srv")
    assert (answer.code, "the journal was replayed" in answer.err) == (0, True), answer
    assert is_sound(partition_of(hvmgr, web, tmp_path / "after"))
