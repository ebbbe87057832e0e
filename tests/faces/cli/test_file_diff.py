"""``hvmgr file diff``, ``file index`` and ``file find --index``: chains, exports, images, several disks, bad input."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

import pytest

from hvmgr.operations.inside import index_walk
from tests.storage import file_trees, moments

LOTS = 24


def debugfs(raw, *commands):
    offset = f"{raw}?offset={1 << 20}"
    for one in commands:
        file_trees.run("debugfs", "-w", "-R", one, offset)


def written(source, path, generation):
    """A new file: as Linux does it, it has a generation of its own, even with the inode of one that went this second."""
    return [f"write {source} {path}", f"set_inode_field {path} generation {generation}"]


def raw_disk(image, tree):
    """A disk with one partition, and ext4 with the tree on it."""
    part = file_trees.ext(image.with_suffix(".part"), tree, "-t", "ext4", "-L", "root", size="20M")
    return file_trees.in_partition(image, part)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Four moments of a disk, each made of the one before by changing a few files."""
    folder = tmp_path_factory.mktemp("made")
    tree = folder / "tree"
    (tree / "etc" / "ssh").mkdir(parents=True)
    (tree / "srv" / "many").mkdir(parents=True)
    (tree / "etc" / "passwd").write_text("root\n")
    (tree / "etc" / "old.conf").write_text("old\n")
    (tree / "etc" / "ssh" / "Host Key").write_text("key\n")
    (tree / "srv" / "data").write_bytes(file_trees.pattern(3 << 20))
    for number in range(120):
        (tree / "srv" / "many" / f"file {number:03}").write_text(f"{number}\n")
    for number in range(LOTS):  # their inodes lie in several clusters
        (tree / "srv" / f"lot {number:02}").mkdir()
        for one in range(40):
            (tree / "srv" / f"lot {number:02}" / f"{one}").write_text("x")
    raws = [raw_disk(folder / "disk0", tree)]
    new = folder / "new"
    new.write_text("new content\n")
    steps = [
        ["rm /etc/old.conf", *written(new, "/etc/new.conf", 1), "set_inode_field /etc/passwd mode 0100600"],
        ["rm /etc/passwd", *written(new, "/etc/passwd", 2), "rm '/srv/many/file 007'"],
        [*written(new, "/etc/old.conf", 3), "mkdir /srv/more", *written(new, "/srv/more/inner", 4)],
    ]
    for number, commands in enumerate(steps, 1):
        raws.append(folder / f"disk{number}")
        file_trees.run("cp", "--sparse=always", raws[-2], raws[-1])
        debugfs(raws[-1], *[one.replace("'", '"') for one in commands])
    with raws[1].open("r+b") as file, raws[2].open("r+b") as other, raws[3].open("r+b") as last:
        at = raws[0].read_bytes().index(file_trees.pattern(3 << 20)[100_000:100_032])
        for one in (file, other, last):
            one.seek(at)
            one.write(b"changed in place")
    return folder


def take(hvmgr, name, made, number, snapshot):
    """The present shows the moment ``number``, and is frozen."""
    (image,) = hvmgr.ok("vm", "show", name, "--json").json["now"]["disks"].values()
    moments.write_difference(image, made / f"disk{number - 1}", made / f"disk{number}")
    hvmgr.ok("snapshot", "create", name, snapshot)


@pytest.fixture
def web(hvmgr, root, made):
    """A VM with a snapshot of each of the first three moments; the present is the fourth."""
    words = ["--memory", "64M", "--disk", made / "disk0", "--network", "none", "--accel", "tcg"]
    hvmgr.ok("vm", "create", "web", *words)
    hvmgr.ok("snapshot", "create", "web", "a")
    take(hvmgr, "web", made, 1, "b")
    take(hvmgr, "web", made, 2, "c")
    (image,) = hvmgr.ok("vm", "show", "web", "--json").json["now"]["disks"].values()
    moments.write_difference(image, made / "disk2", made / "disk3")
    return "web"


A_TO_B = [  # what a folder's own time says is said by what is in it
    ["added", "/etc/new.conf", "-"],
    ["removed", "/etc/old.conf", "-"],
    ["metadata", "/etc/passwd", "mode"],
    ["changed", "/srv/data", "content"],
]


class TestDiff:
    def test_names_exactly_the_changed_files(self, hvmgr, web, made):
        assert hvmgr.ok("file", "diff", web, "a", "b").lines == A_TO_B
        answer = hvmgr.ok("file", "diff", web, "b", "c").lines
        assert [line[:2] for line in answer] == [["changed", "/etc/passwd"], ["removed", "/srv/many/file 007"]]
        answer = hvmgr.ok("file", "diff", web, "c", "now").lines
        assert [line[:2] for line in answer] == [
            ["added", "/etc/old.conf"],
            ["added", "/srv/more"],
            ["added", "/srv/more/inner"],
        ]
        for words in (["c", "--present"], ["c", "now", "--present"], ["c", "--present", "/"]):
            assert hvmgr.ok("file", "diff", web, *words).lines == answer
        turned = hvmgr.ok("file", "diff", web, "now", "c", "--present").lines
        assert [line[:2] for line in turned] == [["removed", line[1]] for line in answer]
        assert hvmgr.ok("file", "diff", web, "b", "b").out == ""
        turned = {line[1]: line[0] for line in hvmgr.ok("file", "diff", web, "b", "a").lines}
        assert turned == {one[1]: {"added": "removed", "removed": "added"}.get(one[0], one[0]) for one in A_TO_B}
        assert hvmgr.ok("file", "diff", web, "a", "b", "--null").out.split("\0")[:-1] == [one[1] for one in A_TO_B]

        self.below_paths_and_on_parts_of_the_disks_only(hvmgr, web)
        self.in_json(hvmgr, web)

    def below_paths_and_on_parts_of_the_disks_only(self, hvmgr, web):
        assert hvmgr.ok("file", "diff", web, "a", "b", "/srv").lines == A_TO_B[-1:]
        assert hvmgr.ok("file", "diff", web, "a", "b", "/etc/*.conf", "/etc/old.conf").lines == A_TO_B[:2]
        assert hvmgr.ok("file", "diff", web, "a", "b", "/etc/ssh").out == ""
        assert hvmgr.ok("file", "diff", web, "a", "b", "/", "/etc").lines == A_TO_B
        assert hvmgr.ok("file", "diff", web, "a", "b", "--disk", "vda", "--partition", "1").lines == A_TO_B
        for words, code, said in (
            (["a", "b", "/nowhere"], 3, "there is no file 'nowhere'"),
            (["a", "x"], 3, "x"),
            (["a", "b", "--partition", "7"], 3, "there is no partition 7"),
            (["a", "b", "--disk", "vdz"], 3, "vdz"),
            (["a"], 2, "two moments of it are to be named"),
            (["--present"], 2, "a VM and a snapshot of it are to be named"),
            (["a", "--present", "--home", "y"], 2, "--present is of a VM"),
            (["x", "--present"], 3, "x"),
            (["a", "b", "--format", "raw"], 2, "--format says"),
            (["a", "b", "--image", "x"], 2, "give --image twice"),
            (["a", "b", "--image", "x", "--image", "y", "--disk", "vda"], 2, "has no slots"),
            (["a", "b", "--image", "x", "--home", "y"], 2, "two different things"),
        ):
            answer = hvmgr("file", "diff", web, *words)
            assert (answer.code, answer.out) == (code, ""), answer
            assert said in answer.err, answer

    def in_json(self, hvmgr, web):
        document = hvmgr.ok("--json", "file", "diff", web, "a", "b").json
        assert document["not_compared"] == []
        assert [(one["disk"], one["of"]) for one in document["old"]] == [("vda", "disk vda of snapshot 'a' of web")]
        found = {one["path"]: one for one in document["differences"]}
        assert found["/etc/passwd"]["old"]["mode"] == "0644"
        assert found["/etc/passwd"]["new"]["mode"] == "0600"
        assert found["/etc/new.conf"]["old"] is None
        assert (found["/srv/data"]["what"], found["/srv/data"]["partition"]) == (["content"], 1)

    def test_of_images_exports_homes_and_vhd_chains(self, hvmgr, web, root, made, tmp_path):
        assert hvmgr.ok("file", "diff", "--image", made / "disk0", "--image", made / "disk1").lines == A_TO_B
        hvmgr.ok("export", web, tmp_path / "out", "--no-checksums")
        shutil.copytree(root / web, tmp_path / "moved")
        for folder in (tmp_path / "out", tmp_path / "moved"):
            assert hvmgr.ok("file", "diff", "--home", folder, "a", "b").lines == A_TO_B
            assert len(hvmgr.ok("file", "diff", "--home", folder, "c", "now", "/srv").lines) == 2
        parent, child = tmp_path / "parent.vhd", tmp_path / "child.vhd"
        hvmgr.ok("image", "convert", made / "disk0", parent)
        hvmgr.ok("image", "convert", made / "disk1", child, "--parent", parent)
        words = ["file", "diff", "--image", parent, "--image", child]
        assert hvmgr.ok(*words).lines == A_TO_B
        assert hvmgr.ok(*words, "/etc/ssh").out == ""
        mixed = hvmgr.ok("file", "diff", "--image", made / "disk0", "--image", child)
        assert mixed.lines == A_TO_B

    def test_what_cannot_be_read_is_named_when_it_changed(self, hvmgr, made, tmp_path):
        old, new = tmp_path / "old", tmp_path / "new"
        for one, content in ((old, b"old"), (new, b"new")):
            one.write_bytes(bytes(4086) + b"SWAPSPACE2" + bytes(8192) + content + bytes(65536))
        answer = hvmgr("file", "diff", "--image", old, "--image", new, "--format", "raw")
        assert (answer.code, answer.out) == (0, "")
        assert "was written to, and cannot be compared: it is swap space" in answer.err
        (one,) = hvmgr("--json", "file", "diff", "--image", old, "--image", new, "--format", "raw").json["not_compared"]
        assert one["holds"] == "swap"


def test_several_disks_one_of_which_came_later(hvmgr, root, made, tmp_path):
    words = ["--memory", "64M", "--network", "none", "--accel", "tcg"]
    hvmgr.ok("vm", "create", "two", *words, "--disk", made / "disk0", "--disk", made / "disk2")
    hvmgr.ok("snapshot", "create", "two", "a")
    disks = hvmgr.ok("vm", "show", "two", "--json").json["now"]["disks"]
    moments.write_difference(disks["vdb"], made / "disk2", made / "disk3")
    found = hvmgr.ok("file", "diff", "two", "a", "now").lines
    assert {line[1] for line in found} == {"/etc/old.conf", "/srv/more", "/srv/more/inner"}
    moments.write_difference(disks["vda"], made / "disk0", made / "disk1")
    found = hvmgr.ok("file", "diff", "two", "a", "now").lines
    assert [line[:3] for line in found if line[3] == "vda partition 1"] == A_TO_B
    assert len(found) == len(A_TO_B) + 3
    assert len(hvmgr.ok("file", "diff", "two", "a", "now", "--disk", "vdb").lines) == 3
    hvmgr.ok("snapshot", "create", "two", "b")
    found = hvmgr.ok("file", "find", "two", "/etc/old.conf", "--index").lines
    assert found == [["/etc/old.conf", "a", "vda 1"], ["/etc/old.conf", "b", "vdb 1"]]


@pytest.fixture
def database(root):
    return root / "web" / ".hvmgr" / "files.sqlite"


def rows(database):
    """All that the index says, whatever its numbers: for each snapshot its paths with what they are."""
    with sqlite3.connect(database) as opened:
        points = dict(opened.execute("SELECT id, snapshot FROM points"))
        bases = {(point, root): base for point, root, base in opened.execute("SELECT point, root, base FROM volumes")}
        names = {one: (folder, name) for one, folder, name in opened.execute("SELECT id, folder, name FROM paths")}
        roots = dict(opened.execute("SELECT id, root FROM paths"))
        entries = {}
        for path, point, *facts in opened.execute("SELECT * FROM entries"):
            entries[path, point] = facts
    opened.close()

    def whole(path):
        folder, name = names[path]
        return (whole(folder) if folder else b"") + b"/" + name

    found = {}
    for point, snapshot in points.items():
        for path in names:
            at = point
            while at is not None and (path, at) not in entries:
                at = bases[at, roots[path]]
            if at is not None and entries[path, at][0] is not None:
                found.setdefault(snapshot, {})[whole(path)] = entries[path, at]
    return found


class TestIndex:
    def test_holds_times_that_are_far_away_and_refuses_what_is_above_a_link(self, hvmgr, root, tmp_path):
        (tmp_path / "tree" / "folder").mkdir(parents=True)
        (tmp_path / "tree" / "late").touch()
        (tmp_path / "tree" / "link").symlink_to("folder")
        disk = raw_disk(tmp_path / "disk", tmp_path / "tree")
        # 3 << 32 seconds more: past what 64 bits of nanoseconds hold
        debugfs(disk, "set_inode_field /late mtime @1431655765", "set_inode_field /late mtime_extra 3")
        hvmgr.ok("vm", "create", "late", "--memory", "64M", "--disk", disk, "--network", "none", "--accel", "tcg")
        for snapshot in ("a", "b"):
            hvmgr.ok("snapshot", "create", "late", snapshot)
            (hit,) = hvmgr.ok("--json", "file", "find", "late", "/late", "--index").json["entries"]
            assert hit["modified"] == "2423-09-03T21:34:13.000000Z"
        assert [one["name"] for one in hit["snapshots"]] == ["a", "b"]
        (found,) = hvmgr.ok("--json", "file", "stat", "late", "/late").json["entries"]
        assert found["modified"] == hit["modified"]
        assert hvmgr.ok("file", "find", "late", "/", "--newer", "2400-01-01", "--index").lines[0][0] == "/late"
        assert hvmgr.ok("file", "find", "late", "/folder/../late", "--index").lines == [["/late", "a, b"]]
        for path in ("/link/../late", "/l*/../late"):
            answer = hvmgr("file", "find", "late", path, "--index")
            assert (answer.code, "behind a link" in answer.err) == (2, True), answer

    def test_says_which_snapshots_have_a_file(self, hvmgr, web, database, tmp_path, monkeypatch):
        def find(*words):
            return hvmgr.ok("file", "find", web, *words, "--index").lines

        assert find("/etc/old.conf") == [["/etc/old.conf", "a"]]
        assert find("/etc/new.conf") == [["/etc/new.conf", "b, c"]]
        assert find("/srv/many/file 007") == [["/srv/many/file 007", "a, b"]]
        assert find("/etc/passwd") == [["/etc/passwd", "a"], ["/etc/passwd", "b"], ["/etc/passwd", "c"]]
        assert find("/", "--name", "host key", "--ignore-case") == [["/etc/ssh/Host Key", "a, b, c"]]
        assert find("/", "--name", "host key") == []
        assert find("/etc", "--name", "*.conf") == [["/etc/new.conf", "b, c"], ["/etc/old.conf", "a"]]
        assert find("/*/ssh/*") == [["/etc/ssh/Host Key", "a, b, c"]]
        assert find("/**/ssh", "--type", "d") == [["/etc/ssh", "a, b, c"]]
        assert find("/srv", "--larger", "1M") == [["/srv/data", "a, b, c"]]
        assert find("/", "--depth", "1", "--type", "d", "--name", "s*") == [["/srv", "a, b, c"]]
        assert len(find("/srv/many", "--type", "f", "--name", "f?le [01]*")) == 120
        assert find("/etc/passwd", "--snapshot", "b") == [["/etc/passwd", "b"]]
        assert find("/etc/../etc/passwd", "--snapshot", "c", "--disk", "vda", "--partition", "1") == [
            ["/etc/passwd", "c"]
        ]
        assert find("/nowhere") == []
        for words, said in ((("--disk", "vdz"), "no disk 'vdz'"), (("--partition", "None"), "no partition None")):
            answer = hvmgr("file", "find", web, "/", *words, "--index")
            assert (answer.code, said in answer.err) == (3, True), answer
        assert hvmgr.ok("file", "find", web, "/etc/p*", "--index", "--null").out == "/etc/passwd\0"
        (mode, *_, where) = find("/etc/passwd", "--snapshot", "b", "--long")[0]
        assert (mode, where) == ("-rw-------", "b")
        document = hvmgr.ok("--json", "file", "find", web, "/etc/new.conf", "--index").json
        (entry,) = document["entries"]
        assert [one["name"] for one in entry["snapshots"]] == ["b", "c"]
        assert (entry["size"], entry["disk"], entry["partition"]) == (12, "vda", 1)
        self.is_made_anew_where_it_does_not_fit(hvmgr, web, database)
        self.is_readable_while_another_command_writes(hvmgr, web, database)
        self.knows_a_snapshot_by_its_id_whatever_others_are_called(hvmgr, web)
        self.lies_in_the_cache_of_a_user_who_may_not_write_the_home(hvmgr, web, database, tmp_path, monkeypatch)

    def test_a_new_snapshot_costs_what_changed_and_one_that_goes_takes_its_rows_along(
        self, hvmgr, web, database, root, monkeypatch
    ):
        first = hvmgr.ok("--json", "file", "index", web).json
        assert (first["changed"], len(first["added"]), first["removed"]) == (True, 3, [])
        assert first["file"] == str(database)
        assert LOTS < first["folders"] < 3 * LOTS, "two of the three are read as what differs"
        assert hvmgr.ok("--json", "file", "index", web).json["changed"] is False
        hvmgr.ok("snapshot", "create", web, "d")
        assert "4 snapshots would be" not in hvmgr.ok("file", "index", web, "--dry-run").out
        assert hvmgr.ok("file", "index", web, "--dry-run").out == "1 snapshots would be added, 0 removed\n"
        again = hvmgr.ok("--json", "file", "index", web).json
        assert (len(again["added"]), again["folders"] < LOTS) == (1, True)
        grown = rows(database)
        assert hvmgr.ok("--json", "file", "index", web, "--rebuild").json["added"] != []
        assert rows(database) == grown
        for gone in ("b", "a"):
            hvmgr.ok("snapshot", "delete", web, gone)
            hvmgr.ok("file", "index", web)
            grown.pop(next(one for one in grown if one not in self.ids(hvmgr, web)))
            assert rows(database) == grown
        with sqlite3.connect(database) as opened:
            (count,) = opened.execute(
                "SELECT count(*) FROM paths WHERE name = 'file 007' OR name = X'66696c6520303037'"
            ).fetchone()
        opened.close()
        assert count == 0, "a name that no snapshot has is forgotten"
        assert hvmgr.ok("file", "find", web, "/", "--name", "*le 007*", "--index").lines == []

        self.goes_on_where_a_command_was_killed(hvmgr, web, database, monkeypatch)
        assert json.loads(hvmgr.ok("doctor", web, "--json").out)["findings"] == []
        hvmgr.ok("vm", "delete", web, "--with-disks", "--yes")
        assert not (root / web).exists()

    def goes_on_where_a_command_was_killed(self, hvmgr, web, database, monkeypatch):
        class Killed(BaseException):
            pass

        expected = hvmgr.ok("file", "find", web, "/", "--index").out
        database.unlink()
        original, count = index_walk._Walk._one, []

        def killed(self, *words, **more):
            count.append(1)
            if len(count) > 4:
                raise Killed
            return original(self, *words, **more)

        with monkeypatch.context() as patch:
            patch.setattr(index_walk._Walk, "_one", killed)
            with pytest.raises(Killed):
                hvmgr("file", "index", web)
        assert hvmgr.ok("file", "find", web, "/", "--index").out == expected

    def ids(self, hvmgr, name):
        return {one["id"] for one in hvmgr.ok("snapshot", "list", name, "--json").json["snapshots"]}

    def test_is_equal_to_a_walk_of_each_snapshot(self, hvmgr, web, made):
        hvmgr.ok("snapshot", "apply", web, "b")
        take(hvmgr, web, made, 2, "branch")
        for one in ("b", "c", "branch"):
            walked = hvmgr.ok("file", "find", web, "/", "--snapshot", one, "--long").lines
            found = hvmgr.ok("file", "find", web, "/", "--snapshot", one, "--long", "--index").lines
            assert sorted(line[:-1] for line in found) == sorted(walked), one
            assert all(line[-1] == one for line in found)

    def is_made_anew_where_it_does_not_fit(self, hvmgr, web, database):
        expected = hvmgr.ok("file", "find", web, "/etc", "--index").out
        for spoil in (
            lambda: database.write_bytes(b"no database" * 1000),
            lambda: self.run(database, "PRAGMA user_version = 99"),
            lambda: self.run(database, "UPDATE about SET vm = 'another'"),
        ):
            for name in ("-wal", "-shm"):
                Path(f"{database}{name}").unlink(missing_ok=True)
            spoil()
            assert hvmgr.ok("file", "find", web, "/etc", "--index").out == expected
        assert database.stat().st_mode & 0o777 == 0o600

    def run(self, database, statement):
        with sqlite3.connect(database) as opened:
            opened.execute(statement)
        opened.close()

    def is_readable_while_another_command_writes(self, hvmgr, web, database):
        hvmgr.ok("file", "index", web)
        writer = sqlite3.connect(database, isolation_level=None)
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("DELETE FROM entries")
        assert hvmgr.ok("file", "find", web, "/etc/old.conf", "--index").lines == [["/etc/old.conf", "a"]]
        hvmgr.ok("snapshot", "create", web, "d")
        answer = hvmgr("file", "index", web, "--wait", "0")
        assert answer.code == 4, "and a second one has to wait"
        assert "another command writes the index of files" in answer.err
        answer = hvmgr("file", "find", web, "/etc/old.conf", "--index", "--wait", "0")
        assert (answer.code, answer.lines) == (0, [["/etc/old.conf", "a"]])
        assert "snapshots that are not in it: 'd'" in answer.err
        assert hvmgr.ok("file", "find", web, "/etc/old.conf", "--index", "--dry-run").lines == [["/etc/old.conf", "a"]]
        writer.rollback()
        writer.close()
        hvmgr.ok("file", "index", web)

    def knows_a_snapshot_by_its_id_whatever_others_are_called(self, hvmgr, web):
        numbers = {one["name"]: one["id"] for one in hvmgr.ok("snapshot", "list", web, "--json").json["snapshots"]}
        expected = hvmgr.ok("file", "find", web, "/etc/old.conf", "--index").lines
        hvmgr.ok("snapshot", "rename", web, "c", numbers["a"])
        hvmgr.ok("file", "index", web, "--rebuild")
        assert hvmgr.ok("file", "find", web, "/etc/old.conf", "--index").lines == expected

    def lies_in_the_cache_of_a_user_who_may_not_write_the_home(self, hvmgr, web, database, tmp_path, monkeypatch):
        database.unlink()
        monkeypatch.setattr("hvmgr.storage.access.is_writable", lambda _: False)
        monkeypatch.setattr("hvmgr.settings.cache_folder", lambda: tmp_path / "cache")
        assert hvmgr.ok("file", "find", web, "/etc/old.conf", "--index", "--null").out == "/etc/old.conf\0"
        (made,) = (tmp_path / "cache" / "files").glob("*.sqlite")
        assert made.parent.stat().st_mode & 0o777 == 0o700
        assert not database.exists()
        hvmgr.ok("vm", "delete", web, "--with-disks", "--yes")
        assert not made.exists(), "it goes with the VM"

    def test_needs_a_vm(self, hvmgr, made):
        answer = hvmgr("file", "find", "--image", made / "disk0", "/", "--index")
        assert (answer.code, "only VMs have an index" in answer.err) == (2, True)
        answer = hvmgr("file", "find", "web", "/", "--index", "--present")
        assert (answer.code, "the index holds snapshots" in answer.err) == (2, True)
