"""The index of files against a simple model: whole snapshots as dictionaries."""

from __future__ import annotations

import sqlite3
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvmgr import errors
from hvmgr.model import patterns
from hvmgr.operations.inside import searching
from hvmgr.storage import file_index
from hvmgr.storage.file_index import Entry, Locked, Place
from hvmgr.storage.filesystems.reader import Geometry

NAMES = ["a", "b", "passwd", "pass\udcffwd"]


def entry(size):
    return Entry("file", size, 0o644, 0, 0, 1, 0, None)


def place(root, number=1, base=None):
    return Place(root, "vda", number, "", False, [("vda", 0, 100)], Geometry(("x",), (1, 2)), [(1, 2)], base, "seal")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("index") / "files.sqlite"


CHANGES = st.dictionaries(st.sampled_from(NAMES), st.one_of(st.none(), st.integers(0, 3)), max_size=4)
READ = st.sets(st.integers(0, 6), max_size=4)
# A file system, as what differs from that of another snapshot (0-14), or of none.
VOLUME = st.tuples(st.integers(0, 20), CHANGES, READ)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.lists(st.one_of(st.none(), VOLUME), min_size=2, max_size=2)),
        st.tuples(st.just("complete"), st.integers(0, 20), VOLUME),  # with its second file system, which was locked
        st.tuples(st.just("remove"), st.integers(0, 20)),
    ),
    max_size=12,
)


class Model:
    """Of each snapshot and file system: its names with sizes, and the blocks that its folder follows from."""

    def __init__(self, index):
        self.index = index
        self.files, self.blocks = {}, {}

    def root(self, number):
        return self.index.root(f"volume {number}")

    def take_in(self, point, number, volume):
        which, changes, blocks = volume
        root = self.root(number)
        having = [one for one in self.index.points() if (one.snapshot, number) in self.files]
        base = having[which % len(having)] if having and which < 15 else None
        self.index.put_place(point, place(root, number, None if base is None else base.id))
        self.index.put(root, point, entry(0))
        shown = {} if base is None else dict(self.files[base.snapshot, number])
        for name, size in changes.items():
            if size is not None or name in shown:
                raw = name.encode("utf-8", "surrogateescape")
                self.index.put(self.index.path(root, raw), point, None if size is None else entry(size))
                shown[name] = size
        key = point.snapshot, number
        self.files[key] = {name: size for name, size in shown.items() if size is not None}
        self.blocks[key] = set() if base is None else self.blocks[base.snapshot, number]
        if blocks:
            self.index.put_unit(root, root, point, [(one, one + 1) for one in blocks])
            self.blocks[key] = blocks

    def remove(self, point):
        self.index.remove_point(point)
        for number in range(2):
            self.files.pop((point.snapshot, number), None)


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_each_snapshot_shows_what_it_was_given_whatever_comes_and_goes(file, steps):
    with file_index.opened(file, "vm", wait_s=5, anew=True) as index, index.writing():
        model = Model(index)
        for number, (kind, *words) in enumerate(steps):
            points = index.points()
            chosen = points[words[0] % len(points)] if points and kind != "add" else None
            if kind == "add":
                point = index.add_point(f"s{number}")
                index.note(point, number, [Locked("title", None, number)])
                assert index.points()[-1].locked == (Locked("title", None, number),)
                for which, volume in enumerate(words[0]):
                    if volume is not None:
                        model.take_in(point, which, volume)
            elif chosen is not None and kind == "remove":
                model.remove(chosen)
            elif chosen is not None and (chosen.snapshot, 1) not in model.files:
                model.take_in(chosen, 1, words[1])
        check(index, model)


def check(index, model):
    for point in index.points():
        places = {one.root: one for one in index.places(point)}
        for number in range(2):
            key, root = (point.snapshot, number), model.root(number)
            assert (root in places) is (key in model.files)
            if key not in model.files:
                continue
            assert places[root] == place(root, number, places[root].base)
            line = index.line(point, root)
            shown = {
                name.decode("utf-8", "surrogateescape"): one.size
                for name, (_, one) in index.children(line, root).items()
            }
            assert shown == model.files[key]
            for block in range(7):
                assert bool(index.touched(line, root, [(block, block + 1)])) is (block in model.blocks[key])
    for number in range(2):
        there = any(each == number for _, each in model.files)
        wish = searching.Wish(paths=(b"/",), name=b"*ASS*", ignore_case=True, partition=str(number))
        hits = searching.search(index, wish) if there else []
        told = {(one.path.decode("utf-8", "surrogateescape")[1:], one.entry.size): set(one.snapshots) for one in hits}
        expected = {}
        for (snapshot, each), names in model.files.items():
            for name, size in names.items():
                if "ass" in name and each == number:
                    expected.setdefault((name, size), set()).add(snapshot)
        assert told == expected
    alive = [(number, name) for (_, number), names in model.files.items() for name in names]
    assert len(index.all_paths()) == len(set(alive))
    assert {name.decode("utf-8", "surrogateescape") for _, name in index.all_paths()} == {name for _, name in alive}


TEXT = st.text(st.sampled_from("abßKİﬁ*?[]!-.é\udcff"), max_size=8)


@settings(max_examples=200, deadline=None)
@given(TEXT, TEXT, st.booleans())
def test_no_name_that_fits_is_missed_by_the_words_of_a_pattern(name, pattern, ignoring):
    raw, wanted = (one.encode("utf-8", "surrogateescape") for one in (name, pattern))
    if patterns.fits(raw, wanted, ignoring_case=ignoring):
        assert all(one in file_index.as_text(raw) for one in patterns.literals(wanted))


def test_a_disk_that_is_full_or_a_file_that_is_none_is_one_sentence(tmp_path):
    said = pytest.raises(errors.HvmgrError, match="cannot be used")
    with said, file_index.opened(tmp_path / "x", "vm", wait_s=0) as index:
        index._database.execute("SELECT * FROM nothing")
    with pytest.raises(errors.NoSpace), file_index.opened(tmp_path / "x", "vm", wait_s=0):
        raise sqlite3.OperationalError("database or disk is full")
    with pytest.raises(errors.NotFound), file_index.opened(tmp_path / "no" / "x", "vm", wait_s=0):
        pass


def test_somebody_elses_database_is_replaced_and_a_link_is_never_followed(tmp_path):
    other, link = tmp_path / "other", tmp_path / "link"
    with sqlite3.connect(other) as database:
        database.execute("CREATE TABLE precious (about TEXT)")
    database.close()
    before = other.read_bytes()
    link.symlink_to(other)
    for target in (other, tmp_path / "not there yet"):
        link.unlink()
        link.symlink_to(target)
        with pytest.raises(errors.Conflict, match="no regular file"), file_index.opened(link, "vm", wait_s=0):
            pass
    assert (other.read_bytes(), (tmp_path / "not there yet").exists()) == (before, False)
    kept = tmp_path / "kept"
    kept.hardlink_to(other)
    with file_index.opened(other, "vm", wait_s=0) as index:
        assert index.points() == []
    assert kept.read_bytes() == before


@pytest.mark.parametrize("blob", [b"no zlib", zlib.compress(b"[" * 100_000), zlib.compress(b"{}"), zlib.compress(b"1")])
def test_what_makes_no_sense_is_removed_and_made_anew(tmp_path, blob):
    file = tmp_path / "x"
    with file_index.opened(file, "vm", wait_s=0) as index, index.writing():
        point = index.add_point("s")
        index.put_place(point, place(index.root("disk")))
        index._database.execute("UPDATE volumes SET facts = ?", (blob,))
    with pytest.raises(errors.HostFailed, match="was removed"), file_index.opened(file, "vm", wait_s=0) as index:
        index.places(index.points()[0])
    with file_index.opened(file, "vm", wait_s=0) as index:
        assert index.points() == []


def test_a_dry_run_makes_and_writes_nothing(tmp_path):
    file = tmp_path / "x"
    with pytest.raises(errors.NotFound), file_index.opened(file, "vm", wait_s=0, reading=True):
        pass
    assert not file.exists()
    with file_index.opened(file, "vm", wait_s=0) as index, index.writing():
        index.add_point("s")
    before = file.read_bytes()
    with file_index.opened(file, "vm", wait_s=0, reading=True) as index:
        assert [one.snapshot for one in index.points()] == ["s"]
    with pytest.raises(errors.NotFound, match="fits"), file_index.opened(file, "other", wait_s=0, reading=True):
        pass
    assert file.read_bytes() == before


def test_folders_go_with_the_last_name_in_them(tmp_path):
    with file_index.opened(tmp_path / "x", "vm", wait_s=0) as index, index.writing():
        point, root = index.add_point("s"), index.root("disk")
        index.put(root, point, entry(0))
        folder = index.path(root, b"folder")
        for path in (folder, index.path(folder, b"inner")):  # the folder is asked about first
            index.put(path, point, entry(0))
        index.remove_point(point)
        assert index._rows("SELECT * FROM paths") == []


def test_of_an_attempt_that_fails_nothing_is_kept(tmp_path):
    with file_index.opened(tmp_path / "x", "vm", wait_s=0) as index, index.writing():
        with pytest.raises(errors.Corrupt), index.attempt():
            index.add_point("lost")
            raise errors.Corrupt("x")
        with index.attempt():
            index.add_point("kept")
    with file_index.opened(tmp_path / "x", "vm", wait_s=0) as index:
        assert [one.snapshot for one in index.points()] == ["kept"]


def test_a_full_disk_leaves_what_was_there(tmp_path):
    with file_index.opened(tmp_path / "x", "vm", wait_s=0) as index, index.writing():
        index.add_point("kept")
    with (
        pytest.raises(errors.NoSpace, match="no space for the index"),
        file_index.opened(tmp_path / "x", "vm", wait_s=0) as index,
    ):
        index._database.execute("PRAGMA max_page_count = 60")
        with index.writing(), index.attempt():
            root = index.path(0, b"disk")
            for number in range(100_000):
                index.path(root, b"%d" % number * 20)
    with file_index.opened(tmp_path / "x", "vm", wait_s=0) as index:
        assert [one.snapshot for one in index.points()] == ["kept"]


def test_a_logical_volume_is_on_its_disks_and_case_is_that_of_each_moment(tmp_path):
    with file_index.opened(tmp_path / "x", "vm", wait_s=0) as index, index.writing():
        root = index.root("g/v")
        for snapshot, ignoring in (("linux", False), ("windows", True)):
            point = index.add_point(snapshot)
            parts = [("vda", 0, 50), ("", None, 10), ("vdb", 0, 40)]
            index.put_place(point, Place(root, None, None, "g/v", ignoring, parts, None, []))
            index.put(index.path(root, b"File"), point, entry(1))

        def found(path, **wish):
            hits = searching.search(index, searching.Wish(paths=(path,), **wish))
            return [(one.path, one.snapshots) for one in hits]

        both = [(b"/File", ("linux", "windows"))]
        for wish in ({}, {"disk": "vda"}, {"disk": "vdb"}, {"partition": "g/v"}):
            assert found(b"/File", **wish) == both
        assert found(b"/file") == [(b"/File", ("windows",))]
        for wish in ({"disk": "vdc"}, {"disk": ""}, {"partition": "None"}):
            with pytest.raises(errors.NotFound):
                found(b"/File", **wish)
