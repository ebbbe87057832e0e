"""``hvmgr file``: files inside disks, by the command line; chains, exports and homes, hostile images, bad input."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from hvmgr import errors
from hvmgr.operations.inside.browsing import Browser
from tests.storage import file_trees


def raw_disk(folder, name, tree, *, table="gpt", label="root"):
    """A disk with one partition, and ext4 with the tree on it."""
    part = file_trees.ext(folder / f"{name}.part", tree, "-t", "ext4", "-L", label, size="20M")
    return file_trees.in_partition(folder / name, part, table=table)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Trees of three moments of a server, and a disk with each."""
    folder = tmp_path_factory.mktemp("made")
    for number in range(3):
        tree = folder / f"tree{number}"
        (tree / "etc").mkdir(parents=True)
        (tree / "etc" / "passwd").write_text(f"root of moment {number}\n")
        (tree / "etc" / f"only{number}.conf").write_text("x" * number)
        (tree / "var").mkdir()
        (tree / "var" / "etc").symlink_to("/etc")
        (tree / "loop").symlink_to("loop")
        raw_disk(folder, f"disk{number}", tree)
    return folder


@pytest.fixture
def web(hvmgr, root, made):
    """A VM with two snapshots: a chain of three links, each with another moment."""
    name = "web"
    words = ["--memory", "64M", "--disk", made / "disk0", "--network", "none", "--accel", "tcg"]
    hvmgr.ok("vm", "create", name, *words)
    for number, snapshot in ((1, "a"), (2, "b")):
        hvmgr.ok("snapshot", "create", name, snapshot)
        (image,) = hvmgr.ok("vm", "show", name, "--json").json["now"]["disks"].values()
        file_trees.run("qemu-img", "convert", "-n", "-f", "raw", "-O", "qcow2", made / f"disk{number}", image)
    return name


def images_of(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file() and path.name != "lock"}


def test_every_moment_of_a_chain_is_seen_and_nothing_written(hvmgr, web, root, made):
    before = images_of(root)
    for number, words in ((0, ["--snapshot", "a"]), (1, ["--snapshot", "b"]), (2, [])):
        assert hvmgr.ok("file", "cat", web, "/etc/passwd", *words).out == f"root of moment {number}\n"
        listed = hvmgr.ok("file", "list", web, "/etc", *words).lines
        assert listed == [[f"only{number}.conf"], ["passwd"]]
        hashes = hvmgr.ok("file", "hash", web, "/etc/*", *words).out
        expected = [made / f"tree{number}" / "etc" / one for (one,) in listed]
        assert hashes == "".join(
            f"{hashlib.sha256(one.read_bytes()).hexdigest()}  /etc/{one.name}\n" for one in expected
        )
    assert images_of(root) == before


def test_volumes_of_a_vm_and_a_snapshot_that_was_changed(hvmgr, web):
    (row,) = hvmgr.ok("file", "list", web).lines
    assert row == ["vda", "1", "ext4", "root", "20 MiB", "yes"]
    (image,) = hvmgr.ok("snapshot", "list", web, "--json").json["snapshots"][0]["disks"].values()
    with Path(image).open("r+b") as file:
        file.truncate(Path(image).stat().st_size + 512)
    answer = hvmgr("file", "cat", web, "/etc/passwd", "--snapshot", "a")
    assert (answer.code, answer.out) == (0, "root of moment 0\n")
    assert "was changed by others" in answer.err


def test_exports_and_homes_are_seen_wherever_they_lie(hvmgr, web, root, tmp_path):
    hvmgr.ok("export", web, tmp_path / "out", "--no-checksums")
    moved = tmp_path / "moved home"
    shutil.copytree(root / web, moved)
    for one in [moved, *moved.rglob("*")]:
        one.chmod(0o555 if one.is_dir() else 0o444)
    before = images_of(moved) | images_of(tmp_path / "out")
    for folder in (tmp_path / "out", moved):
        for number, words in ((0, ["--snapshot", "a"]), (1, ["--snapshot", "b"]), (2, [])):
            answer = hvmgr.ok("file", "cat", "--home", folder, "/etc/passwd", *words)
            assert answer.out == f"root of moment {number}\n"
    assert images_of(moved) | images_of(tmp_path / "out") == before
    assert hvmgr("file", "list", "--home", moved, "/", "--snapshot", "c").code == 3
    for one in [moved, *moved.rglob("*")]:
        one.chmod(0o755)


def test_a_chain_of_differencing_vhds(hvmgr, made, tmp_path):
    parent = None
    for number in range(3):
        child = tmp_path / f"link{number}.vhd"
        words = [] if parent is None else ["--parent", parent]
        hvmgr.ok("image", "convert", made / f"disk{number}", child, *words)
        parent = child
    for number in range(3):
        said = hvmgr.ok("file", "cat", "--image", tmp_path / f"link{number}.vhd", "/etc/passwd").out
        assert said == f"root of moment {number}\n"


def test_links_patterns_and_conditions(hvmgr, made):
    image = ["--image", made / "disk2"]
    assert hvmgr.ok("file", "cat", *image, "/var/etc/passwd").out == "root of moment 2\n"
    assert hvmgr.ok("file", "cat", *image, "/var/../etc/./passwd").out == "root of moment 2\n"
    assert hvmgr.ok("file", "list", *image, "/**/pass*").lines == [["passwd"]]
    assert hvmgr.ok("file", "find", *image, "/", "--name", "*.conf").lines == [["/etc/only2.conf"]]
    assert hvmgr.ok("file", "find", *image, "/", "--type", "l").lines == [["/loop"], ["/var/etc"]]
    assert hvmgr.ok("file", "find", *image, "/etc", "--smaller", "3", "--type", "f").lines == [["/etc/only2.conf"]]
    assert hvmgr.ok("file", "find", *image, "/", "--older", "2001-01-01").out == ""
    assert hvmgr.ok("file", "find", *image, "/etc", "--type", "f", "--null").out == "/etc/only2.conf\0/etc/passwd\0"
    drawn = hvmgr.ok("file", "tree", *image, "/").out.splitlines()
    assert drawn == [
        "/",
        "├── etc/",
        "│   ├── only2.conf",
        "│   └── passwd",
        "├── loop -> loop",
        "├── lost+found/",
        "└── var/",
        "    └── etc -> /etc",
    ]
    (entry,) = hvmgr.ok("file", "stat", *image, "/var/etc", "--json").json["entries"]
    assert (entry["type"], entry["target"], entry["mode"]) == ("link", "/etc", "0777")


class TestAboveAFolder:
    """``..`` behind a link is the folder above the one that the link leads to; the host's kernel says which file that is."""

    PATHS = ("/bin/../lib/f", "/links/x", "/links/viadot", "/links/dirl/../hl/a", "/bin/../../lib/f", "/links/../lib/f")

    @pytest.fixture(scope="class")
    @classmethod
    def disk(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("above")
        tree = folder / "tree"
        for name in ("usr/bin", "usr/lib", "lib", "links", "odd", "hl"):
            (tree / name).mkdir(parents=True)
        for name, text in (("usr/lib/f", "usrlib"), ("lib/f", "rootlib"), ("hl/a", "A")):
            (tree / name).write_text(text)
        links = {"bin": "usr/bin", "links/dirl": "../odd", "links/viadot": "dirl/../hl/a", "links/x": "../bin/../lib/f"}
        for name, target in {**links, "links/out": "../bin/../../../..", "links/file": "../lib/f/.."}.items():
            (tree / name).symlink_to(target)
        return tree, file_trees.ext(folder / "disk", tree, "-t", "ext4", size="20M")

    def test_is_where_the_kernel_finds_it(self, hvmgr, disk):
        tree, image = disk
        for path in self.PATHS:
            assert hvmgr.ok("file", "cat", path, "--image", image).out == Path(f"{tree}{path}").read_text(), path
        hashed = hvmgr.ok("file", "hash", "/bin/../lib/f", "--image", image).out
        assert hashed == f"{hashlib.sha256(b'usrlib').hexdigest()}  /usr/lib/f\n"
        (entry,) = hvmgr.ok("file", "stat", "/bin/../lib/f", "--image", image, "--json").json["entries"]
        assert entry["path"] == "/usr/lib/f"
        assert hvmgr.ok("file", "find", "/bin/../lib", "--image", image).lines == [["/usr/lib"], ["/usr/lib/f"]]
        for pattern in ("/bin/../lib/*", "/b*/../lib/f", "/usr/*/../lib/f"):
            assert hvmgr.ok("file", "list", pattern, "/usr/lib/f", "--null", "--image", image).out == "/usr/lib/f\0" * 2

    def test_is_never_above_the_root(self, hvmgr, disk):
        _, image = disk
        root = hvmgr.ok("file", "list", "/", "--image", image).out
        for path in ("/..", "/bin/../../..", "/links/out"):
            assert hvmgr.ok("file", "list", path, "--image", image).out == root

    def test_is_not_above_a_file(self, hvmgr, disk):
        _, image = disk
        for path in ("/lib/f/../f", "/links/file", "/none/../lib/f"):
            assert hvmgr("file", "cat", path, "--image", image).code == 3, path

    def test_is_taken_by_its_own_name(self, hvmgr, disk, tmp_path):
        _, image = disk
        hvmgr.ok("file", "get", "/bin/../lib", "/links/out/hl", "--image", image, "--to", tmp_path / "to")
        assert sorted(os.listdir(tmp_path)) == ["to"]
        assert {one.name: sorted(os.listdir(one)) for one in (tmp_path / "to").iterdir()} == {"lib": ["f"], "hl": ["a"]}
        assert (tmp_path / "to" / "lib" / "f").read_text() == "usrlib"


class TestGet:
    @pytest.fixture(scope="class")
    @classmethod
    def full(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("full")
        tree = file_trees.make(folder / "tree")
        image = file_trees.ext(folder / "image", tree)
        for one in ("ea_set /deep/size60 user.word value", "mknod disk b 8 0", "mknod tty c 5 1"):
            subprocess.run(["debugfs", "-w", "-R", one, image], check=True, capture_output=True, timeout=60)
        return image, tree

    def test_keeps_everything(self, hvmgr, full, tmp_path):
        image, tree = full
        answer = hvmgr("file", "get", "--image", image, "/", "--to", tmp_path / "out")
        assert (answer.code, "2 left out: device nodes" in answer.err) == (0, True), answer
        out = tmp_path / "out"
        found = {path: what for path, what in file_trees.of_host(out).items() if path != b"lost+found"}
        assert found == file_trees.of_host(tree)
        for path in found:
            mine, theirs = (os.lstat(os.fsencode(one) + b"/" + path) for one in (out, tree))
            assert (path, mine.st_mode) == (path, theirs.st_mode)
            assert (path, mine.st_mtime_ns // 10**9) == (path, theirs.st_mtime_ns // 10**9)
        assert (out / "hard").stat().st_ino == (out / "deep" / "size4097").stat().st_ino
        assert (out / "sparse").stat().st_blocks * 512 < 1 << 20
        assert os.getxattr(out / "deep" / "size60", "user.word") == b"value"

    def test_links_and_pipes_keep_their_attributes(self, hvmgr, tmp_path, require):
        require(os.geteuid() == 0, "only root sees such attributes")
        tree, image, out = tmp_path / "tree", tmp_path / "image", tmp_path / "out"
        tree.mkdir()
        (tree / "link").symlink_to("nowhere")
        os.mkfifo(tree / "pipe")
        os.utime(tree / "link", ns=(5, 5), follow_symlinks=False)
        file_trees.ext(image, tree)
        for name in ("link", "pipe"):
            file_trees.run("debugfs", "-w", "-R", f"ea_set /{name} trusted.word value", image)
        hvmgr.ok("file", "get", "--image", image, "/link", "/pipe", "--to", out)
        for name in ("link", "pipe"):
            assert os.getxattr(out / name, "trusted.word", follow_symlinks=False) == b"value"
        assert ((out / "link").lstat().st_mtime, os.readlink(out / "link")) == (0, "nowhere")

    def test_hashes_are_those_of_sha256sum(self, hvmgr, full):
        image, tree = full
        names = sorted(one.name for one in (tree / "deep").iterdir() if one.is_file())
        said = file_trees.run("sha256sum", *(tree / "deep" / one for one in names), tree / "sparse").decode()
        expected = said.replace(str(tree), "")
        assert hvmgr.ok("file", "hash", "--image", image, "/deep/size*", "/sparse").out == expected

    def test_archive_holds_everything(self, hvmgr, full, tmp_path):
        image, tree = full
        hvmgr.ok("file", "get", "--image", image, "/", "--archive", "--to", tmp_path / "all.tar")
        assert (tmp_path / "all.tar").stat().st_size < 4 << 20  # holes take nothing
        (tmp_path / "out").mkdir()
        words = [
            "tar",
            "-x",
            "--xattrs",
            "--xattrs-include=*",
            "--exclude=disk",
            "--exclude=tty",
            "-f",
            tmp_path / "all.tar",
        ]
        file_trees.run(*words, "-C", tmp_path / "out")
        found = {path: what for path, what in file_trees.of_host(tmp_path / "out").items() if path != b"lost+found"}
        assert found == file_trees.of_host(tree)
        assert os.getxattr(tmp_path / "out" / "deep" / "size60", "user.word") == b"value"
        with tarfile.open(tmp_path / "all.tar") as archive:
            assert archive.getmember("disk").type == tarfile.BLKTYPE
            assert archive.getmember("mode4755").mode == 0o4755

    def test_nothing_is_replaced_unasked(self, hvmgr, made, tmp_path):
        words = ["file", "get", "--image", made / "disk0", "/etc/passwd", "--to", tmp_path]
        hvmgr.ok(*words)
        (tmp_path / "passwd").write_text("mine")
        answer = hvmgr(*words)
        assert (answer.code, "exists already" in answer.err, "--overwrite" in answer.err) == (4, True, True)
        assert "b'" not in answer.err
        assert (tmp_path / "passwd").read_text() == "mine"
        answer = hvmgr(*words[:-1], tmp_path / "passwd")
        assert (answer.code, "passwd is no folder" in answer.err) == (2, True)
        answer = hvmgr(*words[:-1], tmp_path / "no" / "all.tar", "--archive")
        assert (answer.code, answer.err) == (3, f"hvmgr: there is no {tmp_path / 'no'}\n")
        hvmgr.ok(*words, "--overwrite")
        assert (tmp_path / "passwd").read_text() == "root of moment 0\n"

    @pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
    def test_devices_pipes_and_sockets_are_not_replaced(self, hvmgr, made, tmp_path, require, overwrite):
        require(os.geteuid() == 0, "root makes device nodes")
        words = ["file", "get", "--image", made / "disk0", "/etc/passwd", *overwrite, "--to"]
        place = tmp_path / "passwd"
        kinds = {"block device": stat.S_IFBLK, "character device": stat.S_IFCHR, "named pipe": stat.S_IFIFO,
                 "socket": stat.S_IFSOCK}  # fmt: skip
        for what, kind in kinds.items():
            os.mknod(place, kind | 0o600, os.makedev(1, 3) if what == "character device" else os.makedev(0x7FF, 0))
            for given in ([tmp_path], [place, "--archive"]):
                if given[1:] and what in {"character device", "named pipe"}:
                    continue  # it is written into
                answer = hvmgr(*words, *given)
                assert (answer.code, f"is a {what}" in answer.err, "--overwrite" in answer.err) == (4, True, False)
                assert stat.S_IFMT(place.lstat().st_mode) == kind
            place.unlink()
        link = tmp_path / "link"
        with (tmp_path / "open").open("wb") as file:
            link.symlink_to(f"/proc/self/fd/{file.fileno()}")  # as /dev/stderr is
            answer = hvmgr(*words, link, "--archive")
        assert (answer.code, "is a link to an open file" in answer.err, link.is_symlink()) == (4, True, True)

    def test_an_archive_is_written_into_a_device_or_pipe(self, hvmgr, made, tmp_path, require):
        words = ["file", "get", "--image", made / "disk0", "/etc", "--archive", "--to"]
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        with subprocess.Popen(["timeout", "60", "tar", "-tf", pipe], stdout=subprocess.PIPE) as reading:
            answer = hvmgr(*words, pipe)
            assert reading.stdout.read() == b"etc/\netc/only0.conf\netc/passwd\n"
        assert (answer.code, stat.S_ISFIFO(pipe.lstat().st_mode)) == (0, True)
        require(os.geteuid() == 0, "root makes device nodes")
        null = tmp_path / "null"
        os.mknod(null, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        for overwrite in ([], ["--overwrite"]):
            hvmgr.ok(*words, null, *overwrite)
            assert stat.S_ISCHR(null.lstat().st_mode)

    @pytest.mark.parametrize("to", [None, "-", "/dev/stdout", "pipe"])
    def test_a_reader_that_goes_early_is_no_success(self, tmp_path, to):
        tree, image, pipe = tmp_path / "tree", tmp_path / "image", tmp_path / "pipe"
        tree.mkdir()
        (tree / "large").write_bytes(bytes(range(256)) * (4 << 10))
        file_trees.ext(image, tree, size="8M")
        os.mkfifo(pipe)
        words = ["cat", "/large"] if to is None else ["get", "/", "--archive", "--to", pipe if to == "pipe" else to]
        command = [sys.executable, "-m", "hvmgr", "file", *words, "--image", image]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
            if to == "pipe":
                assert len(file_trees.run("timeout", "60", "head", "-c", "100", pipe)) == 100
            else:
                assert len(running.stdout.read(100)) == 100
                running.stdout.close()
            assert (running.wait(60), running.stderr.read()) == (141, b"")

    def test_lines_may_be_read_in_part(self, made, tmp_path):
        command = [sys.executable, "-m", "hvmgr", "file", "hash", "/etc", "--image", made / "disk0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as running:
            running.stdout.close()
            assert running.wait(60) == 0

    def test_the_name_of_stdout_means_stdout(self, made, tmp_path):
        command = [sys.executable, "-m", "hvmgr", "file", "get", "--image", made / "disk0", "/etc", "--archive"]
        with (tmp_path / "all.tar").open("wb") as file:
            subprocess.run([*command, "--to", "/dev/stdout"], stdout=file, check=True, timeout=60)
        with tarfile.open(tmp_path / "all.tar") as archive:
            assert archive.getnames() == ["etc", "etc/only0.conf", "etc/passwd"]

    def test_what_is_in_the_way_is_named(self, hvmgr, made, tmp_path, require):
        words = ["file", "get", "--image", made / "disk0", "/etc", "--to"]
        answer = hvmgr(*words, tmp_path / "missing" / "new")
        assert (answer.code, answer.err) == (3, f"hvmgr: there is no {tmp_path / 'missing'}\n  make it first\n")
        fixed = tmp_path / "fixed"
        fixed.mkdir()
        changed = subprocess.run(["chattr", "+i", fixed], capture_output=True, check=False, timeout=60)
        require(changed.returncode == 0, "root and a file system that knows chattr +i")
        try:
            answers = [hvmgr(*words, fixed), hvmgr(*words, fixed / "all.tar", "--archive")]
        finally:
            subprocess.run(["chattr", "-i", fixed], check=True, timeout=60)
        for answer in answers:
            assert (answer.code, "not even root" in answer.err, "immutable" in answer.err) == (8, True, True), answer

    def test_as_an_ordinary_user(self, made, tmp_path, require):
        """A process of its own, without any right but to read the image: to stdout, and twice into a folder that it closes itself."""
        from tests import ordinary_user

        require(os.geteuid() == 0, "root makes a user of no rights")
        python = ordinary_user.find_python()
        require(python is not None, "no Python of this version that every user may run: install python3")
        place = Path("/tmp") / f"hvfile{os.getpid()}"
        place.mkdir()
        try:
            place.chmod(0o755)
            image = place / "top.qcow2"
            shutil.copyfile(made / "disk1", place / "base.raw")
            file_trees.run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base.raw", image)
            path = os.pathsep.join(
                [str(Path(__file__).parents[3]), *(one for one in sys.path if one.endswith("-packages"))]
            )
            words = [
                "setpriv",
                "--reuid=65534",
                "--regid=65534",
                "--clear-groups",
                "env",
                "-i",
                f"PATH={os.environ['PATH']}",
                f"PYTHONPATH={path}",
                "HOME=/tmp",
            ]
            words += [python, "-m", "hvmgr", "file", "get", "--image"]
            assert file_trees.run(*words, image, "/etc/passwd", "--to", "-", cwd="/") == b"root of moment 1\n"
            (tmp_path / "tree" / "closed" / "in").mkdir(parents=True)
            (tmp_path / "tree" / "closed" / "in" / "file").write_text("content")
            (tmp_path / "tree" / "closed").chmod(0)
            image, out = file_trees.ext(place / "closed.raw", tmp_path / "tree", size="4M"), place / "out"
            out.mkdir()
            os.chown(out, 65534, 65534)
            for _ in range(2):
                file_trees.run(*words, image, "/closed", "--to", out, "--overwrite", cwd="/")
                assert stat.S_IMODE((out / "closed").stat().st_mode) == 0
                assert (out / "closed" / "in" / "file").read_text() == "content"
        finally:
            shutil.rmtree(place)

    def test_a_hostile_image_never_leaves_the_folder(self, hvmgr, tmp_path):
        """Names with slashes, names that are links and folders at once, links to everywhere, devices."""
        tree = tmp_path / "tree"
        (tree / "linX").mkdir(parents=True)
        (tree / "linX" / "evil").write_text("evil")
        (tree / "link").symlink_to(tmp_path / "outside")
        (tree / "absolute").symlink_to("/etc")
        (tree / "AAAevilname").write_text("evil")
        (tree / "BBBBBB").write_text("evil")
        (tmp_path / "outside").mkdir()
        image = file_trees.ext(tmp_path / "image", tree, "-O", "^metadata_csum", size="4M")
        for node in ("mknod disk b 8 0", "mknod null c 1 3"):
            subprocess.run(["debugfs", "-w", "-R", node, image], check=True, capture_output=True, timeout=60)
        data = image.read_bytes()
        for old, new in ((b"linX", b"link"), (b"AAAevilname", b"../evilname"), (b"BBBBBB", b"/BBBBB")):
            assert data.count(old) == 1
            data = data.replace(old, new)
        image.write_bytes(data)
        before = sorted(os.listdir(tmp_path))
        answer = hvmgr("file", "get", "--image", image, "/", "--to", tmp_path / "out")
        assert (answer.code, "3 left out: names that cannot be names here" in answer.err) == (0, True), answer
        assert sorted(os.listdir(tmp_path)) == sorted([*before, "out"])
        assert os.listdir(tmp_path / "outside") == []
        assert not Path("/BBBBB").exists()
        for one in (tmp_path / "out").rglob("*"):
            assert one.is_symlink() or one.is_dir() or one.is_file(), one
        assert (tmp_path / "out" / "absolute").is_symlink()

    def test_a_folder_that_is_a_link_here_is_not_followed(self, hvmgr, made, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "outside").mkdir()
        (tmp_path / "out" / "etc").symlink_to(tmp_path / "outside")
        answer = hvmgr("file", "get", "--image", made / "disk0", "/etc", "--to", tmp_path / "out")
        assert answer.code == 4
        assert os.listdir(tmp_path / "outside") == []

    def test_streams_of_ntfs(self, hvmgr, tmp_path, require_program):
        require_program("ntfscp")
        image = tmp_path / "image"
        with image.open("wb") as file:
            file.truncate(8 << 20)
        (tmp_path / "main").write_text("main\n")
        (tmp_path / "beside").write_text("beside\n")
        file_trees.run("mkntfs", "-q", "-F", "-Q", "-L", "win", image)
        file_trees.run("ntfscp", "-q", image, tmp_path / "main", "Report.txt")
        file_trees.run("ntfscp", "-q", "-N", "Zone", image, tmp_path / "beside", "Report.txt")
        source = ["--image", image]
        assert hvmgr.ok("file", "cat", *source, "\\report.TXT:zone").out == "beside\n"
        assert hvmgr.ok("file", "cat", *source, "C:\\REPORT.txt").out == "main\n"
        answer = hvmgr("file", "get", *source, "/Report.txt", "--to", tmp_path / "plain")
        assert "named streams" in answer.err
        hvmgr.ok("file", "get", *source, "/Report.txt", "--to", tmp_path / "both", "--streams")
        assert {one.name: one.read_text() for one in (tmp_path / "both").iterdir()} == {
            "Report.txt": "main\n",
            "Report.txt:Zone": "beside\n",
        }
        hvmgr.ok("file", "get", *source, "/Report.txt", "--archive", "--to", tmp_path / "t.tar")
        with tarfile.open(tmp_path / "t.tar") as archive:
            assert archive.getnames() == ["Report.txt", "Report.txt:Zone"]
            assert "SCHILY.xattr.system.ntfs_acl" in archive.getmember("Report.txt").pax_headers


class TestBadInput:
    def test_each_is_a_sentence_and_a_code(self, hvmgr, made, tmp_path):
        image = ["--image", made / "disk0"]
        empty, locked = tmp_path / "empty.raw", tmp_path / "locked.raw"
        empty.write_bytes(bytes(1 << 20))
        locked.write_bytes(bytes(3) + b"-FVE-FS-" + bytes(1 << 20))
        cases = [
            (3, "did you mean 'passwd'", ["cat", *image, "/etc/paswd"]),
            (3, "that is no folder", ["cat", *image, "/etc/passwd/x"]),
            (3, "nothing in", ["list", *image, "/etc/*.nothing"]),
            (2, "round in a circle", ["cat", *image, "/loop"]),
            (2, "is a folder", ["cat", *image, "/etc"]),
            (2, "no path is given", ["cat", *image]),
            (2, "neither snapshots nor slots", ["list", *image, "/", "--snapshot", "a"]),
            (2, "two different things", ["list", *image, "--home", tmp_path, "/"]),
            (2, "no VM is named", ["list"]),
            (3, "there is no partition 7", ["list", *image, "/", "--partition", "7"]),
            (3, "there is no partition", ["list", *image, "/", "--partition", ""]),
            (3, "there is no", ["list", "--image", tmp_path / "nothing", "/"]),
            (5, "neither a partition table nor a file system", ["list", "--image", empty, "/"]),
            (5, "encrypted (BitLocker)", ["list", "--image", locked, "/"]),
            (3, "", ["list", "--home", tmp_path, "/"]),
            (2, "--newer never", ["find", *image, "/", "--newer", "never"]),
            (2, "as a tar archive", ["get", *image, "/etc", "--to", "-"]),
        ]
        for code, words, line in cases:
            answer = hvmgr("file", *line)
            assert (answer.code, answer.out) == (code, ""), (line, answer)
            assert words in answer.err, (line, answer)

    def test_of_several_file_systems_the_path_decides(self, hvmgr, made, tmp_path):
        """Two partitions, of which one has the path; where both have it the choice is shown."""
        tree = tmp_path / "boot"
        (tree / "grub").mkdir(parents=True)
        (tree / "grub" / "grub.cfg").write_text("menu")
        root, boot = (
            raw_disk(tmp_path, "root", made / "tree0"),
            file_trees.ext(tmp_path / "part", tree, "-t", "ext4", size="8M"),
        )
        image = tmp_path / "image"
        with image.open("wb") as file:
            file.truncate(34 << 20)
        table = b"label: dos\nstart=2048,size=40960,type=83\nstart=43008,type=5\nstart=45056,size=16384\n"
        file_trees.run("sfdisk", "-q", image, input=table)
        with image.open("r+b") as file:
            file.seek(1 << 20)
            file.write(root.read_bytes()[1 << 20 : 21 << 20])
            file.seek(45056 * 512)
            file.write(boot.read_bytes())
        source = ["--image", image]
        assert [row[1:3] for row in hvmgr.ok("file", "list", *source).lines] == [["1", "ext4"], ["5", "ext4"]]
        assert hvmgr.ok("file", "cat", *source, "/grub/grub.cfg").out == "menu"
        assert hvmgr.ok("file", "cat", *source, "/etc/passwd").out == "root of moment 0\n"
        answer = hvmgr("file", "list", *source, "/")
        assert (answer.code, "image partition 1 (ext4" in answer.err) == (2, True)
        assert hvmgr.ok("file", "list", *source, "/", "--partition", "5").lines == [["grub"], ["lost+found"]]


def test_json_says_who_read_it_and_gives_the_bytes_of_names(hvmgr, tmp_path):
    tree = tmp_path / "tree"
    tree.mkdir()
    file_trees.write(os.fsencode(tree) + b"/\xff\n", b"x")
    os.symlink(b"to/\xfe\xff", os.fsencode(tree) + b"/link")
    os.symlink(b"to", os.fsencode(tree) + b"/plain")
    image = file_trees.ext(tmp_path / "image", tree, size="4M")
    answer = hvmgr.ok("file", "list", "--image", image, "/", "--json")
    document = json.loads(answer.out)
    assert document["sources"][0]["reader"] == "hvmgr's own reader of ext2/3/4"
    (entry,) = (one for one in document["entries"] if "path_base64" in one)
    assert entry["path_base64"] == "L/8K"
    targets = {one["path"]: one.get("target_base64") for one in document["entries"] if one["target"] is not None}
    assert targets == {"/link": base64.b64encode(b"to/\xfe\xff").decode(), "/plain": None}
    (entry,) = hvmgr.ok("file", "stat", "--image", image, "/link", "--json").json["entries"]
    assert (entry["target"], base64.b64decode(entry["target_base64"])) == ("to/\ufffd\ufffd", b"to/\xfe\xff")
    assert "read by hvmgr's own reader of ext2/3/4" in hvmgr("-v", "file", "list", "--image", image, "/").err


def test_a_stale_entry_is_left_out_and_told(hvmgr, made, tmp_path):
    image = tmp_path / "disk"
    file_trees.ext(image, made / "tree0", "-t", "ext4", "-L", "root", size="20M")
    data = bytearray(image.read_bytes())
    entry = data.index(b"\x06\x01passwd")  # behind the lengths of the entry and its name stands the type
    data[entry - 6 : entry - 2] = b"\xff\xff\xff\x7f"  # no such inode
    image.write_bytes(data)
    where = ["--image", image]
    for words in (["list", "/etc"], ["find", "/", "--name", "only*"]):
        answer = hvmgr("file", *words, *where)
        assert (answer.code, "only0.conf" in answer.out, "passwd" in answer.out) == (0, True, False), answer
        assert "1 left out: what is damaged" in answer.err
    for words in (["list", "/etc"], ["tree", "/"], ["hash", "/"], ["get", "/etc", "--to", tmp_path / "to"]):
        assert list(hvmgr("file", *words, *where, "--json").json["left_out"].values()) == [1]
    assert os.listdir(tmp_path / "to" / "etc") == ["only0.conf"]
    assert hvmgr("file", "cat", "/etc/passwd", *where).code == 6


def test_the_exit_code_of_hashes(hvmgr, tmp_path, monkeypatch):
    """What is damaged counts more than what nobody here reads."""
    tree, image, real = tmp_path / "tree", tmp_path / "disk", Browser.content
    tree.mkdir()
    for name in ("efs", "good", "torn"):
        (tree / name).write_text(name)
    file_trees.ext(image, tree, "-t", "ext4", "-b", "4096", size="8M")

    def content(browser, one):
        if one.path == b"/efs":
            raise errors.Unsupported("/efs: it is encrypted (EFS)")
        if one.path == b"/torn":
            raise errors.Corrupt("/torn: the file system is damaged")
        return real(browser, one)

    monkeypatch.setattr(Browser, "content", content)
    for words, code in ((["/efs", "/good"], 5), (["/"], 6), (["/torn", "/good"], 6)):
        answer = hvmgr("file", "hash", *words, "--image", image)
        assert (answer.code, answer.out.split()[1]) == (code, "/good"), answer
    monkeypatch.setattr(Browser, "damaged", [b"/unread"])
    assert hvmgr("file", "hash", "/efs", "/good", "--image", image).code == 6


def test_what_has_no_bytes_has_no_hash(hvmgr, tmp_path):
    tree, image = tmp_path / "tree", tmp_path / "disk"
    (tree / "in").mkdir(parents=True)
    os.mkfifo(tree / "in" / "fifo")
    (tree / "in" / "plain").write_text("plain")
    file_trees.ext(image, tree, "-t", "ext4", "-b", "4096", size="8M")
    for words in (["/in/fifo"], ["/in/plain", "/in/fifo"]):
        answer = hvmgr("file", "hash", *words, "--image", image)
        assert (answer.code, answer.out, "/in/fifo is no plain file (pipe)" in answer.err) == (2, "", True), answer
    for word in ("/in", "/in/*"):
        assert hvmgr.ok("file", "hash", word, "--image", image).out.split()[1:] == ["/in/plain"]


def test_one_damaged_file_costs_no_other(hvmgr, tmp_path):
    """As sha256sum does: it is named, the others are hashed and taken, and the exit code says that something is wrong."""
    tree, image = tmp_path / "tree", tmp_path / "disk"
    (tree / "in").mkdir(parents=True)
    for number in range(3):
        (tree / "in" / f"file{number}").write_bytes(file_trees.pattern(5000 + number))
    file_trees.ext(image, tree, "-t", "ext4", "-b", "4096", size="8M")
    file_trees.run("debugfs", "-w", "-R", "set_inode_field /in/file1 block[0] 0x1234", image)
    expected = [(f"/in/file{one}", hashlib.sha256(file_trees.pattern(5000 + one)).hexdigest()) for one in (0, 2)]
    answer = hvmgr("file", "hash", "/in", "--image", image)
    assert (answer.code, answer.out) == (6, "".join(f"{value}  {path}\n" for path, value in expected))
    assert "/in/file1: the file system is damaged" in answer.err
    found = hvmgr("file", "hash", "/in/file1", "/in/file2", "--image", image, "--json")
    assert found.code == 6
    assert [one["path"] for one in found.json["files"]] == ["/in/file2"]
    assert found.json["failed"] == [{"path": "/in/file1"}]
    assert hvmgr("file", "hash", "/in/file1", "--image", image, "--json").json["error"]["code"] == "Corrupt"
    answer = hvmgr("file", "get", "/in", "--image", image, "--to", tmp_path / "to")
    assert (answer.code, sorted(os.listdir(tmp_path / "to" / "in"))) == (6, ["file0", "file2"])
    assert "/in/file1 is damaged and left out" in answer.err
    answer = hvmgr("file", "get", "/in", "--image", image, "--archive", "--to", tmp_path / "tar", "--json")
    assert (answer.code, answer.json["damaged"]) == (6, [{"path": "/in/file1"}])
    with tarfile.open(tmp_path / "tar") as archive:
        assert archive.getnames() == ["in", "in/file0", "in/file2"]


def test_names_of_free_inodes_are_damage(hvmgr, made, tmp_path):
    image = file_trees.ext(tmp_path / "disk", made / "tree0", "-t", "ext4", size="20M")
    file_trees.run("debugfs", "-w", "-R", "clri /etc", image)
    where = ["--image", image]
    for words, code in ((["list", "/"], 0), (["tree", "/"], 0), (["find", "/"], 0), (["hash", "/"], 6)):
        answer = hvmgr("file", *words, *where)
        assert (answer.code, "/etc is damaged and left out" in answer.err) == (code, True), answer
    for words in ([], ["--archive"]):
        answer = hvmgr("file", "get", "/", *where, *words, "--to", tmp_path / f"to{len(words)}")
        assert (answer.code, "/etc is damaged and left out" in answer.err) == (6, True), answer
    assert sorted(os.listdir(tmp_path / "to0")) == ["loop", "lost+found", "var"]
    for command in ("list", "stat", "get"):
        answer = hvmgr("file", command, "/etc", *where)
        assert (answer.code, "is free" in answer.err) == (6, True), answer


@pytest.mark.parametrize("damage", ["clri <2>", "set_inode_field <2> mode 0100644"], ids=["free", "a file"])
def test_a_root_that_is_no_folder_is_damage_and_not_empty(hvmgr, made, tmp_path, damage):
    image = file_trees.ext(tmp_path / "disk", made / "tree0", "-t", "ext4", size="20M")
    file_trees.run("debugfs", "-w", "-R", damage, image)
    for words in (["list"], ["tree"], ["find"], ["hash"], ["stat"], ["get", "--to", tmp_path / "to"]):
        answer = hvmgr("file", *words, "--image", image, "/")
        assert (answer.code, "is damaged" in answer.err, answer.out) == (6, True, ""), answer
    assert not (tmp_path / "to").exists()


def test_a_folder_in_itself_costs_no_other(hvmgr, tmp_path):
    tree = tmp_path / "tree"
    (tree / "top" / "sub" / "loopdir").mkdir(parents=True)
    (tree / "top" / "sub" / "loopdir" / "file").write_text("x")
    (tree / "zz").write_text("z")
    image = file_trees.ext(tmp_path / "disk", tree, "-t", "ext4", "-O", "^metadata_csum,^dir_index", size="20M")
    sound = tmp_path / "sound"
    shutil.copyfile(image, sound)
    file_trees.run("debugfs", "-w", "-R", "ln /top /top/sub/loopdir/again", image)
    said = "/top/sub/loopdir/again is damaged and left out"
    expected = ["/", "/lost+found", "/top", "/top/sub", "/top/sub/loopdir", "/top/sub/loopdir/file", "/zz"]
    for words, code in ((["find", "/"], 0), (["tree", "/"], 0), (["hash", "/"], 6)):
        answer = hvmgr("file", *words, "--image", image)
        assert (answer.code, said in answer.err, "zz" in answer.out) == (code, True, True), answer
    assert [one for (one,) in hvmgr("file", "find", "/", "--image", image).lines] == expected
    answer = hvmgr("file", "get", "/", "--image", image, "--to", tmp_path / "to")
    assert (answer.code, said in answer.err) == (6, True), answer
    assert sorted(f"/{one.relative_to(tmp_path / 'to')}" for one in (tmp_path / "to").rglob("*")) == expected[1:]
    answer = hvmgr("file", "get", "/top", "--image", image, "--archive", "--to", tmp_path / "tar")
    with tarfile.open(tmp_path / "tar") as archive:
        assert (answer.code, archive.getnames()) == (6, [one[1:] for one in expected[2:-1]])
    answer = hvmgr("file", "diff", "--image", sound, "--image", image)
    assert (answer.code, said in answer.err, "cannot be compared" in answer.err) == (0, True, False), answer


def test_ten_thousand_files(hvmgr, tmp_path):
    tree, image = tmp_path / "tree", tmp_path / "disk"
    for folder in range(10):
        (tree / f"folder{folder}").mkdir(parents=True)
        for number in range(1000):
            (tree / f"folder{folder}" / f"file number {number:04}").touch()
    file_trees.ext(image, tree, "-t", "ext4", "-N", "12000", size="32M")
    names = sorted(f"/folder{one}/file number {number:04}" for one in range(10) for number in range(1000))
    found = hvmgr.ok("file", "find", "/", "--type", "f", "--null", "--image", image).out
    assert sorted(found.rstrip("\0").split("\0")) == names
    listed = hvmgr.ok("file", "list", "/folder*", "--null", "--image", image).out
    assert listed.rstrip("\0").split("\0") == names
    some = hvmgr.ok("file", "list", "/**/*77", "--image", image).lines
    assert [line for (line,) in some] == [one for one in names if one.endswith("77")]


def test_the_present_is_that_of_a_vm(hvmgr, web, made):
    assert hvmgr.ok("file", "cat", web, "/etc/passwd", "--present").out == "root of moment 2\n"
    for words in (["--image", made / "disk0"], ["--home", made], [web, "--snapshot", "a"]):
        answer = hvmgr("file", "cat", *words, "/etc/passwd", "--present")
        assert (answer.code, "--present is of a VM" in answer.err) == (2, True), answer
