"""Whether two contents are the same, and what is read for that: random layouts on random disks, against their bytes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from hvmgr.model.ranges import Ranges
from hvmgr.operations.inside import changed, contents
from hvmgr.storage.filesystems.reader import Bytes, Runs, Segment
from hvmgr.storage.filesystems.window import Run

SIZE = 64


class Disk:
    """Bytes that remember where they were read."""

    def __init__(self, data):
        self.data, self.size, self.read = bytes(data), len(data), []

    def read_into(self, offset, buffer):
        self.read.append((offset, offset + len(buffer)))
        buffer[:] = self.data[offset : offset + len(buffer)]


class Packed:
    """The same, but its bytes come from all of its runs at once, turned round."""

    def __init__(self, disk, runs, size):
        self.size, self._runs = size, Runs(disk, runs, size)

    def pieces(self, start=0, end=None):
        whole = bytearray(self.size)
        for offset, piece in self._runs.pieces():
            whole[offset : offset + len(piece)] = bytes(255 - one for one in piece)
        yield 0, bytes(whole)

    def segments(self):
        places = tuple(place for one in self._runs.segments() for place in one.lies())
        return [Segment(0, self.size, 0, ("turned", tuple(self._runs.ranges()), places), places)] if self.size else []


RUNS = st.lists(st.tuples(st.integers(1, 12), st.one_of(st.none(), st.integers(0, SIZE - 12))), max_size=6)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_contents_are_the_same_when_their_bytes_are_and_only_what_may_differ_is_read(data):
    before = data.draw(st.binary(min_size=SIZE, max_size=SIZE).map(lambda one: bytes(each % 3 for each in one)))
    spots = data.draw(st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(0, 2)), max_size=5))
    after = bytearray(before)
    for at, value in spots:
        after[at] = value
    touched = Ranges((at, at + 1) for at, _ in spots)
    old_disk, new_disk = Disk(before), Disk(after)
    old_runs = data.draw(RUNS)
    new_runs = data.draw(st.one_of(st.just(old_runs), RUNS))
    kinds = data.draw(st.sampled_from([(Runs, Runs), (Packed, Packed), (Runs, Packed)]))
    made = [
        kind(disk, [Run(*one) for one in runs], sum(length for length, _ in runs))
        for kind, disk, runs in zip(kinds, (old_disk, new_disk), (old_runs, new_runs), strict=True)
    ]
    whole = [whole_of(one) for one in made]
    old_disk.read.clear()
    assert contents.are_same(*made, touched) is (whole[0] == whole[1])
    if kinds == (Runs, Runs) and old_runs == new_runs:
        assert all(any(touched.touch(at, at + 1) for at in range(*one)) for one in old_disk.read)
    if contents.is_untouched(made[1], touched) and kinds[0] is kinds[1] and old_runs == new_runs:
        assert whole[0] == whole[1]


def whole_of(content):
    data = bytearray(content.size)
    for offset, piece in content.pieces():
        data[offset : offset + len(piece)] = piece
    return bytes(data)


def test_contents_in_inodes_are_compared_themselves():
    assert contents.are_same(Bytes(b"one"), Bytes(b"one"), Ranges())
    assert not contents.are_same(Bytes(b"one"), Bytes(b"two"), Ranges())
    assert contents.are_same(Bytes(bytes(3)), Runs(None, [Run(3, None)], 3), Ranges())


PARTS = st.lists(st.tuples(st.sampled_from(["vda", "vdb"]), st.integers(0, 40), st.integers(1, 12)), max_size=4)
CHANGED = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=4)


@settings(deadline=None)
@given(PARTS, st.one_of(st.none(), PARTS), CHANGED, CHANGED)
def test_volumes_differ_where_their_disks_do_or_where_they_lie_elsewhere(old, new, vda, vdb):
    new = old if new is None else new
    ranges = {"vda": Ranges(vda), "vdb": Ranges(vdb)}
    found = changed.of_volume(placed(old), placed(new), ranges)
    before, after = (
        [(name, start + at) for name, start, length in parts for at in range(length)] for parts in (old, new)
    )
    for at in range(max(len(before), len(after))):
        one, other = (each[at] if at < len(each) else None for each in (before, after))
        differs = one != other or ranges[one[0]].touch(one[1], one[1] + 1)
        assert found.touch(at, at + 1) is differs


def placed(parts):
    return [(name, (object(), start, length)) for name, start, length in parts]
