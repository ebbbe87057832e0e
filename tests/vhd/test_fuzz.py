"""Damaged, cut and random bytes: only errors of ours, no endless work, no memory beyond what the bytes are worth."""

from __future__ import annotations

import base64
import io
import os
import tempfile
import tracemalloc
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hvmgr import errors
from hvmgr.vhd import checking, repairing
from hvmgr.vhd.chain import open_chain
from hvmgr.vhd.file import File
from hvmgr.vhd.image import open_image
from hvmgr.vhd.stream_reader import StreamReader
from tests.vhd import planted
from tests.vhd.planted import ALL, BLOCK, HEADER

EXAMPLES = int(os.environ.get("HVMGR_FUZZ", "120"))
MEMORY = 6 << 20  # one buffer, and what the test itself needs; a table of 16 million entries would be ten times that
SEEDS = [
    planted.sparse(),
    planted.sparse({1: (b"\xf1" + bytes(511), b"m" * BLOCK), 15: (ALL, b"p" * BLOCK)}, parent="disk.vhd"),
    planted.fixed(8 * 512),
]
INTERESTING = st.sampled_from(
    [
        bytes(4),
        b"\xff" * 4,
        b"\xff" * 8,
        bytes(8),
        b"\x7f" + b"\xff" * 3,
        b"\x00\x00\x00\x01",
        b"\x80" + bytes(7),
        b"\x00\x20",
    ]
)
FIELDS = st.sampled_from(
    [16, 24, 28, 40, 48, 56, 60, 84, *(HEADER + at for at in (0, 8, 16, 24, 28, 32, 40, 56, 64, *range(576, 624, 4)))]
)


class Bytes(bytes):
    """Said in few words, so that a failure can be read and tried again."""

    def __repr__(self) -> str:
        return f"packed({base64.b85encode(zlib.compress(self, 9))!r})"


def packed(text: bytes) -> bytes:
    """What ``Bytes`` said."""
    return zlib.decompress(base64.b85decode(text))


@st.composite
def damaged(draw) -> bytes:
    """An image with a few fields or bytes changed, checksums made right again more often than not, and maybe cut."""
    seed = draw(st.sampled_from(SEEDS))
    data = bytearray(seed.data)
    place = st.one_of(FIELDS, st.integers(0, len(data) - 1), st.integers(planted.BAT, planted.BAT + 64))
    for at, new in draw(
        st.lists(st.tuples(place, st.one_of(INTERESTING, st.binary(min_size=1, max_size=8))), max_size=4)
    ):
        if draw(st.booleans()) and at < 512:
            data[len(data) - 512 + at : len(data) - 512 + at + len(new)] = new
        data[at : at + len(new)] = new
        del data[len(seed.data) :]
    if draw(st.integers(0, 3)):
        starts = (len(data) - 512,) if seed.kind == planted.FIXED else (0, len(data) - 512)
        for start in starts:
            planted.seal(data, start, 512, 64)
        if seed.kind != planted.FIXED:
            planted.seal(data, HEADER, 1024, 36)
    if draw(st.integers(0, 4)) == 0:
        del data[draw(st.integers(0, len(data))) :]
    return Bytes(data + draw(st.sampled_from([b"", b"", b"", b"x", bytes(512)])))


ANY = st.one_of(damaged(), damaged(), st.binary(max_size=3000), st.binary(max_size=2000).map(lambda b: b"conectix" + b))
FUZZ = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))


class Bounded:
    """What happens in here takes little memory."""

    def __enter__(self) -> None:
        tracemalloc.start()

    def __exit__(self, kind, *_: object) -> None:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert kind is not None or peak < MEMORY


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


def put(folder: Path, data: bytes) -> Path:
    path = folder / "disk.vhd"  # a child that names it is its own parent
    path.write_bytes(data)
    return path


@FUZZ
@given(data=ANY)
def test_check(folder, data) -> None:
    path = put(folder, data)
    with Bounded():
        found = checking.check(path, chain=True)
    try:
        open_image(path).close()
    except errors.HvmgrError:
        assert found, "what is refused is also said by the check"
    else:
        assert {fault.severity for fault in found if fault.path == path and fault.code != "F33"} <= {
            "warning",
            *("error" for fault in found if fault.code in ("F42", "F45", "F46", "F47", "F48")),
        }


@FUZZ
@given(data=ANY)
def test_read(folder, data) -> None:
    path = put(folder, data)
    for tolerant in (False, True):
        with Bounded():
            try:
                with open_image(path, tolerant=tolerant) as image:
                    read_some(image)
                with open_chain(path, tolerant=tolerant) as chain:
                    read_some(chain)
            except errors.HvmgrError:
                pass


def read_some(disk) -> None:
    """The first stretches, and the disk's start and end."""
    for number, stretch in enumerate(disk.stretches()):
        assert stretch.length > 0
        assert stretch.offset + stretch.length <= disk.size
        if number == 100:
            break
    buffer = memoryview(bytearray(min(disk.size, 1 << 16)))
    disk.read_into(0, buffer)
    disk.read_into(disk.size - len(buffer), buffer)


@FUZZ
@given(data=ANY, framed=st.booleans(), spooled=st.booleans())
@example(data=b"", framed=True, spooled=True)
def test_stream(folder, data, framed, spooled) -> None:
    with Bounded():
        try:
            reader = StreamReader(
                io.BytesIO(data), length=len(data) if framed else None, spool=folder if spooled else None
            )
            for offset, piece in reader:
                assert 0 <= offset < offset + len(piece) <= reader.size
        except (errors.Corrupt, errors.Unsupported):
            pass


@pytest.fixture(scope="module")
def unsynced():
    """What reaches the disk is another test's affair."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(File, "sync", lambda _: None)
        yield


@FUZZ
@given(data=damaged())
def test_repair(folder, unsynced, data) -> None:
    path = put(folder, data)
    try:
        repaired = repairing.repair(path)
    except errors.HvmgrError:
        assert path.read_bytes() == data, "what is refused is left alone"
    else:
        assert [fault for fault in checking.check(path) if fault.severity != "warning"] == []
        assert repaired or path.read_bytes() == data
