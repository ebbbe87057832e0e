"""What damaged and hostile file systems do to list, find and get: a reader that says whatever is to be tried."""

from __future__ import annotations

import io
import os
import resource
import subprocess
import tarfile
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest

from hvmgr import errors
from hvmgr.operations.inside import browsing, getting
from hvmgr.storage.filesystems.reader import Bytes, Node, Type, damaged


@dataclass
class Torn:
    """A content that ends in an error, behind so many good pieces."""

    error: Exception
    good: int = 1
    size: int = 8192

    def pieces(self):
        for number in range(self.good):
            yield number * 4096, b"x" * 4096
        raise self.error

    def ranges(self):
        return [(0, self.size)]


@dataclass
class Reader:
    """``folders`` by their ids: names and what stat gives, or raises; ``contents`` by id and stream."""

    folders: dict = field(default_factory=dict)
    contents: dict = field(default_factory=dict)
    attributes: dict = field(default_factory=dict)
    title: str = "a fake"
    notes: tuple = ()
    ignores_case: bool = False

    def root(self):
        return Node(1, 1, Type.FOLDER, 0)

    def names(self, folder):
        return iter(self.folders.get(folder.id, {}).items())

    def stat(self, ref):
        if isinstance(ref, Exception):
            raise ref
        return ref

    def content(self, node, stream=""):
        found = self.contents.get((node.id, stream), b"content")
        if isinstance(found, Exception):
            raise found
        return Bytes(found) if isinstance(found, bytes) else found

    def extras(self, node):
        found = self.attributes.get(node.id, {})
        if isinstance(found, Exception):
            raise found
        return found


def file(number, **facts):
    return Node(number, number, Type.FILE, 7, **facts)


def folder(number):
    return Node(number, number, Type.FOLDER, 0)


def gathered(*readers, path=b"/"):
    volume = SimpleNamespace(title="a volume", disk=SimpleNamespace(name="a disk"))
    browsers = [browsing.Browser(volume, one) for one in readers]
    return getting.gather([(one, one.find(path)) for one in browsers])


def archived(found):
    written = io.BytesIO()
    outcome = getting.into_archive(found, written.write, lambda _: None)
    written.seek(0)
    with tarfile.open(fileobj=written) as archive:
        return outcome, archive.getmembers()


def taken(found, tmp_path, *, streams=False):
    return getting.into_folder(found, tmp_path / "to", lambda _: None, streams=streams, overwrite=False)


@pytest.fixture
def small(tmp_path):
    """A file system of 2 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if subprocess.run(words, capture_output=True, check=False, timeout=60).returncode != 0:
        pytest.skip("cannot mount a tmpfs here")
    yield place
    subprocess.run(["umount", place], check=True, timeout=60)


class TestSpace:
    def test_a_small_file_fits_where_little_is_free(self, small):
        found = gathered(Reader({1: CLEAR}))
        getting.into_folder(found, small, lambda _: None, streams=False, overwrite=False)
        assert (small / "clear").read_bytes() == b"content"
        (small / "filler").write_bytes(bytes(2036 << 10))
        (small / "clear").unlink()
        with pytest.raises(
            errors.NoSpace, match=r"8\.0 KiB are to be written, and .* free, of which 8\.0 KiB have to stay"
        ):
            getting.into_folder(found, small, lambda _: None, streams=False, overwrite=False)
        assert {one.name for one in small.iterdir()} == {"filler"}

    def test_what_can_never_fit_speaks_of_no_rest(self, small):
        found = gathered(Reader({1: {b"large": replace(file(2), size=14 << 20)}}))
        with pytest.raises(errors.NoSpace, match=r"14 MiB are to be written, and .* has 2\.0 MiB free$"):
            getting.into_folder(found, small, lambda _: None, streams=False, overwrite=False)

    def test_many_small_files_take_whole_blocks(self, small):
        names = {f"file{number}".encode(): file(2 + number) for number in range(400)}
        with pytest.raises(errors.NoSpace, match=r"1\.6 MiB are to be written"):
            getting.into_folder(gathered(Reader({1: names})), small, lambda _: None, streams=False, overwrite=False)
        assert not any(small.iterdir())


COMPRESSED = errors.Unsupported("it is compressed in a way that is not known")
CLEAR = {b"clear": file(9)}


class TestWhatCannotBeRead:
    @pytest.mark.parametrize(
        "content", [COMPRESSED, damaged("x"), Torn(COMPRESSED, 0), Torn(damaged("x"), 0)], ids=lambda one: str(one)[:30]
    )
    def test_at_its_beginning_is_left_out_of_an_archive(self, content):
        reader = Reader({1: {b"bad": file(2), **CLEAR}}, {(2, ""): content})
        outcome, members = archived(gathered(reader))
        assert [one.name for one in members] == ["clear"]
        assert (outcome.files, list(outcome.left_out.values())) == (1, [1])

    @pytest.mark.parametrize("error", [COMPRESSED, damaged("x")], ids=["unsupported", "corrupt"])
    def test_behind_its_header_is_no_archive(self, error):
        reader = Reader({1: {b"bad": file(2), **CLEAR}}, {(2, ""): Torn(error)})
        with pytest.raises(errors.HostFailed, match=r"bad: .*: the archive is not whole"):
            archived(gathered(reader))

    def test_that_is_shorter_than_it_said_is_no_archive(self):
        content = Torn(StopIteration())
        content.pieces = lambda: iter([(0, b"x" * 9000)])
        with pytest.raises(errors.HostFailed, match="the archive is not whole"):
            archived(gathered(Reader({1: {b"bad": file(2)}}, {(2, ""): content})))

    @pytest.mark.parametrize("error", [COMPRESSED, damaged("x")], ids=["unsupported", "corrupt"])
    def test_is_left_out_of_a_folder_and_does_not_stay(self, error, tmp_path):
        reader = Reader({1: {b"bad": file(2), **CLEAR}}, {(2, ""): Torn(error)})
        outcome = taken(gathered(reader), tmp_path)
        assert os.listdir(tmp_path / "to") == ["clear"]
        assert (outcome.files, list(outcome.left_out.values())) == (1, [1])

    def test_is_an_error_when_it_alone_was_asked_for(self, tmp_path):
        reader = Reader({1: {b"bad": file(2)}}, {(2, ""): Torn(damaged("x"))})
        with pytest.raises(errors.Corrupt):
            taken(gathered(reader, path=b"/bad"), tmp_path)
        assert os.listdir(tmp_path / "to") == []

    def test_of_streams_is_named_where_it_is_damaged(self, tmp_path):
        reader = Reader({1: {b"a": file(2, streams=(("s", 3),))}}, {(2, "s"): damaged("x")})
        for outcome in (taken(gathered(reader), tmp_path, streams=True), archived(gathered(reader))[0]):
            assert (outcome.files, outcome.damaged) == (1, [b"/a:s"])

    def test_of_streams_stops_nothing(self, tmp_path):
        reader = Reader(
            {1: {b"a": file(2, streams=(("s", 3), ("good", 3)))}}, {(2, "s"): COMPRESSED, (2, "good"): b"abc"}
        )
        outcome = taken(gathered(reader), tmp_path, streams=True)
        assert sorted(os.listdir(tmp_path / "to")) == ["a", "a:good"]
        assert list(outcome.left_out) == [COMPRESSED.message]
        outcome, members = archived(gathered(reader))
        assert [one.name for one in members] == ["a", "a:good"]
        assert list(outcome.left_out) == [COMPRESSED.message]

    def test_of_attributes_costs_these_alone(self, tmp_path):
        reader = Reader({1: CLEAR}, attributes={9: damaged("x")})
        for outcome in (taken(gathered(reader), tmp_path), archived(gathered(reader))[0]):
            assert (outcome.files, outcome.left_out) == (1, {"extended attributes that are damaged": 1})


class TestNames:
    @pytest.mark.parametrize("stream", ["x/../../../etc/cron.d/x", "a\0b"])
    def test_of_streams_never_lead_out(self, stream, tmp_path):
        reader = Reader({1: {b"a": file(2, streams=((stream, 3),))}})
        outcome, members = archived(gathered(reader))
        assert [one.name for one in members] == ["a"]
        assert outcome.left_out == {"names that cannot be names here": 1}
        outcome = taken(gathered(reader), tmp_path, streams=True)
        assert os.listdir(tmp_path / "to") == ["a"]

    def test_that_are_two_dots_are_in_no_archive(self):
        outcome, members = archived(gathered(Reader({1: {b"..": folder(2)}, 2: {b"x": file(3)}})))
        assert (members, outcome.left_out) == ([], {"names that cannot be names here": 2})

    def test_of_folders_that_are_too_long_cost_what_is_below_them(self, tmp_path):
        long = b"n" * 300
        reader = Reader({1: {long: folder(2), **CLEAR}, 2: {b"x": file(3), b"deep": folder(4)}, 4: {b"y": file(5)}})
        outcome = taken(gathered(reader), tmp_path)
        assert os.listdir(tmp_path / "to") == ["clear"]
        assert (outcome.files, outcome.left_out) == (1, {"names that cannot be names here": 4})
        assert len(archived(gathered(reader))[1]) == 5


def test_files_of_two_file_systems_with_one_number_are_no_hard_links(tmp_path):
    readers = [
        Reader({1: {name: folder(2)}, 2: {b"x": file(12, links=2), b"y": file(12, links=2)}}, {(12, ""): name})
        for name in (b"one", b"two")
    ]
    volume = SimpleNamespace(title="a volume", disk=SimpleNamespace(name="a disk"))
    browsers = [browsing.Browser(volume, one) for one in readers]
    found = getting.gather([(browsers[0], browsers[0].find(b"/one")), (browsers[1], browsers[1].find(b"/two"))])
    taken(found, tmp_path)
    for name in ("one", "two"):
        assert (tmp_path / "to" / name / "x").read_text() == (tmp_path / "to" / name / "y").read_text() == name
        assert (tmp_path / "to" / name / "x").stat().st_nlink == 2


class TestNumbersAndWords:
    @pytest.mark.parametrize("moment", [-4_999_999_999, -5_000_000_000, -1, 0, 4_999_999_999])
    def test_times_before_1970_keep_their_fraction(self, moment, tmp_path):
        found = gathered(Reader({1: {b"old": file(2, modified=moment)}}))
        with (tmp_path / "tar").open("wb") as archive:
            getting.into_archive(found, archive.write, lambda _: None)
        subprocess.run(["tar", "-xf", tmp_path / "tar", "-C", tmp_path], check=True, timeout=60)
        assert (tmp_path / "old").stat().st_mtime_ns == moment

    def test_sizes_that_no_file_can_have(self, tmp_path):
        reader = Reader(
            {1: {b"huge": file(2), **CLEAR}},
            {(2, ""): SimpleNamespace(size=1 << 63, ranges=list, pieces=lambda: iter(()))},
        )
        for outcome in (taken(gathered(reader), tmp_path), archived(gathered(reader))[0]):
            assert (outcome.files, outcome.left_out) == (1, {"files larger than a file can be": 1})

    def test_devices_that_tar_has_no_number_for(self):
        reader = Reader({1: {b"device": replace(file(2), type=Type.BLOCK, device=(1 << 21, 0)), **CLEAR}})
        outcome, members = archived(gathered(reader))
        assert [one.name for one in members] == ["clear"]
        assert list(outcome.left_out.values()) == [1]

    def test_attributes_with_impossible_names(self, tmp_path):
        bad = {"user.a\0b": b"1", "user.\udcff": b"2", "user.a=b": b"3", "user.a\nb": b"4", "user.good": b"\xff5"}
        reader = Reader({1: CLEAR}, attributes={9: bad})
        outcome, (member,) = archived(gathered(reader))
        assert {key for key in member.pax_headers if "xattr" in key} == {"SCHILY.xattr.user.good"}
        assert outcome.left_out == {"extended attributes whose names a tar archive cannot hold": 4}
        outcome = taken(gathered(reader), tmp_path)
        assert outcome.left_out["extended attributes that this file system does not take"] >= 1
        assert outcome.files == 1


def test_deep_folders_need_few_descriptors(tmp_path):
    found = gathered(Reader({number: {b"d": folder(number + 1)} for number in range(1, 400)}))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(one) for one in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 40, limits[1]))
    try:
        outcome = taken(found, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert outcome.files == 399


class TestFolders:
    def browser(self, reader):
        return browsing.Browser(SimpleNamespace(title="a volume", disk=SimpleNamespace(name="a disk")), reader)

    def names(self, found):
        return [one.path for one in found]

    def test_show_what_is_sound_beside_what_is_damaged(self, tmp_path):
        reader = Reader(
            {1: {b"a": folder(2), b"stale": damaged("x"), **CLEAR}, 2: {b"gone": damaged("x"), b"b": file(3)}}
        )
        browser = self.browser(reader)
        assert self.names(browser.children(browser.root())) == [b"/a", b"/clear"]
        for _ in range(2):  # what is damaged is counted once, however often it is come by
            assert self.names(one for _, one in browser.walk(browser.root())) == [b"/", b"/a", b"/a/b", b"/clear"]
        assert self.names(browser.expand(b"/*/*")) == [b"/a/b"]
        assert browser.left_out == {browsing.DAMAGED: 2}
        with pytest.raises(errors.Corrupt):
            browser.find(b"/stale")
        with pytest.raises(errors.Corrupt):
            browser.expand(b"/st*")
        for outcome in (taken(gathered(reader), tmp_path), archived(gathered(reader))[0]):
            assert (outcome.files, outcome.left_out) == (3, {browsing.DAMAGED: 2})

    def test_that_are_damaged_cost_themselves_alone(self):
        class Damaged(Reader):
            def names(self, folder):
                if folder.id == 2:
                    raise damaged("x")
                return super().names(folder)

        browser = self.browser(Damaged({1: {b"a": folder(2), b"c": folder(4), **CLEAR}, 4: {b"x": file(5)}}))
        assert self.names(one for _, one in browser.walk(browser.root())) == [b"/", b"/a", b"/c", b"/c/x", b"/clear"]
        assert self.names(browser.expand(b"/*/x")) == [b"/c/x"]
        assert browser.left_out == {browsing.DAMAGED: 1}
        with pytest.raises(errors.Corrupt):
            list(browser.walk(browser.find(b"/a")))

    def test_that_lie_too_deep_are_left_out(self):
        long = b"n" * 250
        browser = self.browser(Reader({number: {long: folder(number + 1)} for number in range(1, 400)}))
        paths = self.names(one for _, one in browser.walk(browser.root()))
        assert max(len(one) for one in paths) <= 65536
        assert browser.left_out == {browsing.DAMAGED: 1}

    def test_links_are_followed_forty_times_in_all(self):
        asked = []

        class Counting(Reader):
            def stat(self, ref):
                asked.append(ref)
                assert len(asked) < 5000
                return super().stat(ref)

        def link(number, target):
            return Node(number, number, Type.LINK, 0, target=target)

        links = {b"l%d" % number: link(number + 10, b"l%d/l%d" % (number + 1, number + 1)) for number in range(30)}
        browser = self.browser(Counting({1: {**links, b"l30": link(50, b"."), b"f": file(2)}}))
        assert browser.find(b"/l29/l29/f").node.id == 2
        with pytest.raises(errors.UsageError, match="more than 40 links"):
            browser.find(b"/l0")
