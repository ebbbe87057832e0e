"""Streams: what is written is what is read, at the length that was promised; and no cut goes unnoticed."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import subprocess
import threading
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvmgr import errors
from hvmgr.vhd.chain import open_chain
from hvmgr.vhd.creation import create, write_image
from hvmgr.vhd.format import Kind
from hvmgr.vhd.layout import Parentage
from hvmgr.vhd.outlet import Outlet
from hvmgr.vhd.source import RawSource, Stretch
from hvmgr.vhd.stream_reader import StreamReader
from hvmgr.vhd.stream_writer import StreamWriter
from tests.vhd import planted
from tests.vhd.planted import ALL, BLOCK, SIZE

PARENT = Parentage(planted.PARENT_UID, "p ü.vhd", ".\\p ü.vhd", time=7)
UNIT = 512 << 10  # the smallest block that is written


class Memory:
    """A disk in memory; everything but zeros is data."""

    def __init__(self, data: bytes) -> None:
        self.data, self.size = data, len(data)

    def stretches(self, offset=0, length=None):
        end = self.size if length is None else offset + length
        for at in range(offset, end, 512):
            yield Stretch(at, 512, self.data[at : at + 512] != bytes(512))

    def read_into(self, offset, buffer):
        buffer[:] = self.data[offset : offset + len(buffer)]


class OneByOne(io.RawIOBase):
    """A transport that gives next to nothing at once, and has only ``read``."""

    def __init__(self, data: bytes, step: int = 700) -> None:
        self._file, self._step = io.BytesIO(data), step

    def read(self, size=-1):
        return self._file.read(min(size, self._step))

    readinto = None


def written(writer: StreamWriter) -> bytes:
    data = b"".join(bytes(chunk) for chunk in writer.chunks())
    assert len(data) == writer.length
    return data


def received(reader: StreamReader, below: bytes | None = None) -> bytes:
    disk = bytearray(below or bytes(reader.size))
    for offset, piece in reader:
        disk[offset : offset + len(piece)] = piece
    return bytes(disk)


def raw_file(tmp_path: Path, *places: tuple[int, bytes], size: int) -> Path:
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(size)
        for offset, data in places:
            file.seek(offset)
            file.write(data)
    return path


DISK = bytes(UNIT) + b"a" * UNIT + bytes(3 * UNIT) + b"b" * 512 + bytes(2 * UNIT) + b"c" * 1024


@pytest.mark.parametrize("kind", [Kind.DYNAMIC, Kind.FIXED])
@pytest.mark.parametrize("alignment", [512, 4096])
def test_what_was_written_is_read(kind, alignment) -> None:
    writer = StreamWriter(Memory(DISK), kind=kind, block_size=UNIT, alignment=alignment, uid=planted.UID)
    data = written(writer)
    reader = StreamReader(io.BytesIO(data), length=len(data))
    assert (reader.kind, reader.size) == (kind, len(DISK))
    assert received(reader) == DISK
    assert reader.footer == writer.footer
    assert reader.footer.uid == planted.UID


def test_empty_disk_is_a_stream() -> None:
    data = written(StreamWriter(Memory(bytes(SIZE)), block_size=UNIT))
    assert received(StreamReader(io.BytesIO(data))) == bytes(SIZE)


def test_delta_has_whole_blocks_of_the_child() -> None:
    below = b"p" * len(DISK)
    changed = [(UNIT + 512, 512), (2 * UNIT - 512, 1024), (5 * UNIT, 1)]
    writer = StreamWriter(Memory(DISK), parent=PARENT, changed=changed, block_size=UNIT)
    assert writer.allocated == 3
    reader = StreamReader(io.BytesIO(written(writer)))
    assert reader.kind is Kind.DIFFERENCING
    assert (reader.header.parent_uid, reader.header.name, reader.header.parent_time) == (PARENT.uid, PARENT.name, 7)
    wanted = bytearray(below)
    for block in (1, 2, 5):
        wanted[block * UNIT : (block + 1) * UNIT] = DISK[block * UNIT : (block + 1) * UNIT]
    assert received(reader, below) == bytes(wanted), "also blocks of zeros are there"


@pytest.mark.parametrize("alignment", [512, 4096])
def test_data_stands_where_it_should(alignment) -> None:
    data = written(StreamWriter(Memory(DISK), block_size=UNIT, alignment=alignment))
    for content, place in ((b"a" * UNIT, 0), (b"b" * 512, 0), (b"c" * 1024, 512)):
        assert (data.index(content) - place) % alignment == 0
    assert data[:512] == data[-512:]


def test_qemu_reads_the_same(tmp_path: Path) -> None:
    size = (5 << 20) + 512
    path = raw_file(tmp_path, (1 << 20, b"x" * 5000), ((4 << 20) + 77, b"y" * 70000), (size - 1, b"z"), size=size)
    target = tmp_path / "disk.vhd"
    with RawSource(path) as source:
        target.write_bytes(written(StreamWriter(source)))
    argv = [
        "qemu-img",
        "convert",
        "-f",
        "vpc",
        "-O",
        "raw",
        "-o",
        "preallocation=off",
        str(target),
        str(tmp_path / "back"),
    ]
    subprocess.run(argv, check=True)
    assert (tmp_path / "back").read_bytes()[:size] == path.read_bytes()


@settings(max_examples=20)
@given(
    size=st.integers(1, 5 * UNIT // 512).map(lambda sectors: sectors * 512),
    runs=st.lists(st.tuples(st.integers(0, 5 * UNIT), st.integers(1, UNIT), st.integers(1, 255)), max_size=5),
    delta=st.booleans(),
    alignment=st.sampled_from([512, 4096]),
    cut=st.floats(0, 1, exclude_max=True),
)
def test_any_disk_is_read_as_it_was_and_any_cut_refused(size, runs, delta, alignment, cut) -> None:
    disk = bytearray(size)
    for at, length, value in runs:
        end = min(size, at + length)
        disk[at:end] = bytes([value]) * max(0, end - at)
    changed = sorted((at, min(length, size - at)) for at, length, _ in runs if at < size) if delta else ()
    parent = PARENT if delta else None
    writer = StreamWriter(Memory(bytes(disk)), parent=parent, changed=changed, block_size=UNIT, alignment=alignment)
    data = written(writer)
    assert received(StreamReader(io.BytesIO(data))) == disk
    with pytest.raises(errors.Corrupt, match=f"at byte {int(cut * len(data))} of"):
        received(StreamReader(io.BytesIO(data[: int(cut * len(data))])))


# --- into descriptors -------------------------------------------------------------------------------------------------


def into_file(writer, tmp_path):
    with (tmp_path / "sent").open("w+b") as file:
        writer.send(file.fileno())
        file.seek(0)
        return file.read()


def into_pipe(writer, tmp_path):
    reading, writing = os.pipe()
    return _collect(writer, open(reading, "rb"), open(writing, "wb", buffering=0))


def into_patient_pipe(writer, tmp_path):
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    return _collect(writer, open(reading, "rb"), open(writing, "wb", buffering=0))


def into_socket(writer, tmp_path):
    one, other = socket.socketpair()
    with one, other:
        return _collect(writer, one.makefile("rb"), other)


def into_appended_file(writer, tmp_path):
    with (tmp_path / "sent").open("ab") as file:
        writer.send(file.fileno())
    return (tmp_path / "sent").read_bytes()


def _collect(writer, reading, writing) -> bytes:
    found: list[bytes] = []
    thread = threading.Thread(target=lambda: found.append(reading.read()))
    thread.start()
    with reading:
        writer.send(writing.fileno())
        writing.shutdown(socket.SHUT_WR) if isinstance(writing, socket.socket) else writing.close()
        thread.join()
    return found[0]


@pytest.mark.parametrize("kind", [Kind.DYNAMIC, Kind.FIXED])
@pytest.mark.parametrize("send", [into_file, into_pipe, into_patient_pipe, into_socket, into_appended_file])
def test_sent_bytes_are_the_chunks(tmp_path: Path, kind, send) -> None:
    path = raw_file(tmp_path, (100_000, os.urandom(300_000)), ((3 << 20) + 5, b"y" * 512), size=(7 << 19) + 512)
    with RawSource(path) as source:
        writer = StreamWriter(source, kind=kind, block_size=512 << 10, uid=planted.UID)
        done: list[tuple[int, int]] = []
        assert send(writer, tmp_path) == written(writer)
        with (tmp_path / "again").open("wb") as file:
            writer.send(file.fileno(), lambda *numbers: done.append(numbers))
        assert done[-1] == (writer.length, writer.length)


def test_file_that_became_shorter_is_said(tmp_path: Path) -> None:
    path = raw_file(tmp_path, (0, b"x" * 4096), size=4096)
    for target in ("wb", "ab"):
        with (
            path.open("rb") as source,
            (tmp_path / "sent").open(target) as file,
            pytest.raises(errors.Corrupt, match="ends at byte 4096"),
        ):
            Outlet(file.fileno(), 8192).send(source.fileno(), 0, 8192)


@pytest.mark.parametrize("pieces", [1, 20])
def test_disk_in_many_files_is_sent(tmp_path: Path, pieces) -> None:
    """A block in few pieces by the kernel, in many through memory."""
    below, above = tmp_path / "below.vhd", tmp_path / "above.vhd"
    write_image(below, Memory(DISK), block_size=UNIT)
    create(above, parent=below)
    with open_chain(above, writable=True) as chain:
        for at in range(pieces):
            chain.write(UNIT + at * 1024, b"!" * 512)
    with open_chain(above) as chain:
        writer = StreamWriter(chain, block_size=UNIT)
        assert into_pipe(writer, tmp_path) == written(writer)
        assert received(StreamReader(io.BytesIO(written(writer)))) == bytes(DISK[:UNIT]) + (
            b"".join(b"!" * 512 + b"a" * 512 for _ in range(pieces)).ljust(UNIT, b"a") + DISK[2 * UNIT :]
        )


def test_chain_is_sent_whole_and_as_a_delta(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.vhd" for number in range(3)]
    write_image(paths[0], Memory(DISK), block_size=UNIT)
    for path, below in zip(paths[1:], paths, strict=False):
        create(path, parent=below)
    for number, path in enumerate(paths[1:]):
        with open_chain(path, writable=True) as chain:
            chain.write((4 + 2 * number) * UNIT + 1024, bytes([number]) * 512)
    with open_chain(paths[2]) as chain:
        wanted = bytearray(chain.size)
        chain.read_into(0, memoryview(wanted))
        whole = StreamReader(io.BytesIO(written(StreamWriter.of_chain(chain))))
        assert (whole.kind, whole.footer.uid) == (Kind.DYNAMIC, chain.top.uid)
        assert received(whole) == wanted
        for base in (1, 2):
            writer = StreamWriter.of_chain(chain, base)
            assert writer.allocated == base, "only the blocks that were changed above the base"
            delta = StreamReader(io.BytesIO(written(writer)))
            assert (delta.footer.uid, delta.header.parent_uid) == (chain.top.uid, chain.images[base].uid)
            assert delta.header.name == f"{2 - base}.vhd"
            with open_chain(paths[2 - base]) as below:
                data = bytearray(below.size)
                below.read_into(0, memoryview(data))
            assert received(delta, bytes(data)) == wanted
        with pytest.raises(errors.UsageError):
            StreamWriter.of_chain(chain, 3)


@pytest.mark.parametrize(
    ("size", "error"), [(0, errors.UsageError), (1000, errors.UsageError), ((2040 << 30) + 512, errors.UsageError)]
)
def test_impossible_sizes_are_refused(size, error) -> None:
    class Sized(Memory):
        def __init__(self) -> None:
            self.size = size

    with pytest.raises(error):
        StreamWriter(Sized())


def test_large_full_disk_takes_little_memory() -> None:
    class Full:
        size = 510 << 30

        def stretches(self, offset=0, length=None):
            yield Stretch(0, self.size, data=True)

        def read_into(self, offset, buffer):
            raise AssertionError

    tracemalloc.start()
    writer = StreamWriter(Full())
    chunks = writer.chunks()
    front = len(next(chunks)) + len(next(chunks))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert writer.length == front + 261120 * ((2 << 20) + 512) + 512
    assert peak < 8 << 20


# --- reading ----------------------------------------------------------------------------------------------------------

MIXED = {
    1: (b"\xf1" + bytes(511), b"m" * BLOCK),
    3: (ALL, b"n" * BLOCK),
    9: (bytes(512), b"o" * BLOCK),
    15: (b"\x83" + bytes(511), b"p" * BLOCK),
}


def stream_of(made) -> StreamReader:
    return StreamReader(io.BytesIO(made.data))


@pytest.mark.parametrize("parent", [None, "parent.vhd"])
@pytest.mark.parametrize("order", [[1, 3, 9, 15], [15, 3, 1, 9]])
def test_bitmaps_are_honoured_in_any_order(parent, order) -> None:
    made = planted.sparse(MIXED, parent=parent, order=order)
    below = b"-" * SIZE if parent else None
    reader = stream_of(made)
    assert received(reader, below) == planted.content(made, below=below)


def test_transport_may_give_little_at_once() -> None:
    made = planted.sparse(MIXED)
    assert received(StreamReader(OneByOne(made.data))) == planted.content(made)


def test_padding_and_gaps_are_skipped() -> None:
    made = planted.sparse(MIXED)
    closing, place = made.data[made.end :], made.blocks[3]
    made.data[made.end :] = bytes(3584) + closing  # as Windows does
    del made.data[place:place]
    shifted = made.data[: made.blocks[15]] + b"gap!" * 128 + made.data[made.blocks[15] :]
    made.data = shifted
    made.blocks[15] += 512
    made.entry(15, made.blocks[15] // 512)
    assert received(stream_of(made)) == planted.content(made)


def test_stream_of_xapi() -> None:
    """Creator caml, an empty locator whose text is zeros, the table at 2048."""
    made = planted.sparse({1: (ALL, b"x" * BLOCK)}, parent="parent.vhd")
    made.footers(28, b"caml" + bytes(3) + b"\x01" + bytes(4))
    made.footers(24, bytes(4))
    made.put(planted.MACX, bytes(512))
    made.put(planted.W2RU, bytes(512))
    assert received(stream_of(made)) == planted.content(made)


@pytest.mark.parametrize("blocks", [{}, MIXED])
def test_stream_of_xenserver_with_a_batmap(blocks) -> None:
    made = planted.sparse(blocks)
    end_of_table = planted.BAT + 512
    batmap = b"tdbatmap" + (end_of_table + 512).to_bytes(8, "big") + (1).to_bytes(4, "big")
    made.data[end_of_table:end_of_table] = batmap.ljust(512, b"\0") + b"\xff" * 512
    for number in made.blocks:
        made.blocks[number] += 1024
        made.entry(number, made.blocks[number] // 512)
    made.footers(28, b"tap\0\x00\x01\x00\x03")
    assert received(stream_of(made)) == planted.content(made)


def test_stream_of_xenserver_without_a_batmap() -> None:
    for blocks in ({}, MIXED):
        made = planted.sparse(blocks)
        made.footers(28, b"tap\0\x00\x01\x00\x03")
        assert received(stream_of(made)) == planted.content(made)


def test_dynamic_file_of_qemu_is_a_stream(tmp_path: Path) -> None:
    path = raw_file(tmp_path, (1 << 20, os.urandom(5000)), (4 << 20, b"y" * 512), size=9 << 20)
    target = tmp_path / "disk.vhd"
    argv = ["qemu-img", "convert", "-f", "raw", "-O", "vpc", "-o", "force_size=on", str(path), str(target)]
    subprocess.run(argv, check=True)
    with target.open("rb", buffering=0) as file:
        assert received(StreamReader(file)) == path.read_bytes()


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: planted.sparse(MIXED, order=[15, 3, 1, 9]), id="dynamic"),
        pytest.param(lambda: planted.sparse(MIXED, parent="parent.vhd"), id="differencing"),
        pytest.param(planted.fixed, id="fixed"),
    ],
)
def test_every_cut_is_refused(make) -> None:
    made = make()
    length = len(made.data)
    for cut in [*range(0, 4096, 37), *range(4096, length, 509), *range(length - 520, length)]:
        with pytest.raises(errors.Corrupt) as caught:
            received(StreamReader(io.BytesIO(made.data[:cut]), length=length))
        assert f"at byte {cut} of" in caught.value.message
        assert caught.value.facts["fault"] == "F51"


def test_length_of_the_transport_may_be_false() -> None:
    made = planted.sparse(MIXED)
    for length in (1, 10**12):
        assert received(StreamReader(io.BytesIO(made.data), length=length)) == planted.content(made)


def test_fixed_disk_needs_the_length() -> None:
    made = planted.fixed()
    with pytest.raises(errors.Corrupt) as caught:
        stream_of(made)
    assert caught.value.hint


@pytest.mark.parametrize("wrong", [SIZE + 512 - 512, SIZE + 512 + 512, 512, 700])
def test_fixed_disk_of_another_length_is_refused(wrong) -> None:
    with pytest.raises(errors.Corrupt):
        received(StreamReader(io.BytesIO(planted.fixed().data), length=wrong))


@pytest.mark.parametrize("data", [b"", b"root:x:0:0\n" * 170, bytes(9 * 512)], ids=["empty", "text", "raw"])
@pytest.mark.parametrize("buffering", [0, -1])
def test_file_that_is_no_vhd_is_told_so_before_it_is_read(tmp_path: Path, data, buffering) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"front" + data)
    with path.open("rb", buffering=buffering) as file:
        assert file.read(5) == b"front"
        with pytest.raises(errors.Corrupt, match="the stream is no VHD: no footer") as caught:
            StreamReader(file, length=len(data))
    assert caught.value.hint == "state its format: raw or qcow2"


@pytest.mark.parametrize("buffering", [0, -1])
def test_fixed_file_behind_other_bytes(tmp_path: Path, buffering) -> None:
    made = planted.fixed()
    path = tmp_path / "file"
    path.write_bytes(b"front" + bytes(made.data) + b"behind")
    with path.open("rb", buffering=buffering) as file:
        assert file.read(5) == b"front"
        reader = StreamReader(file, length=len(made.data), to_end=False)
        assert received(reader) == planted.content(made)


def flipped(made, at):
    made.data[at] ^= 0x10
    return made


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda made: flipped(made, made.end), id="cookie"),
        pytest.param(lambda made: flipped(made, made.end + 300), id="reserved"),
        pytest.param(lambda made: flipped(made, made.end + 70), id="id"),
        pytest.param(lambda made: made.data.extend(b"x") or made, id="a-byte-behind"),
        pytest.param(lambda made: made.data.extend(bytes(512)) or made, id="a-sector-behind"),
        pytest.param(lambda made: made.data.extend(made.data[-512:]) or made, id="twice"),
    ],
)
def test_closing_footer_that_differs_is_refused(damage) -> None:
    with pytest.raises(errors.Corrupt) as caught:
        received(stream_of(damage(planted.sparse(MIXED))))
    assert caught.value.facts["fault"] == "F53"


def test_transport_that_does_not_block_is_waited_for() -> None:
    made = planted.sparse(MIXED)
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    with open(reading, "rb", buffering=0) as file, open(writing, "wb", buffering=0) as sender:
        threading.Timer(0.05, lambda: (sender.write(made.data), sender.close())).start()
        assert received(StreamReader(file)) == planted.content(made)


def test_open_transport_is_not_waited_for() -> None:
    made = planted.sparse(MIXED)
    reading, writing = os.pipe()
    with open(reading, "rb", buffering=0) as file, open(writing, "wb", buffering=0) as sender:
        thread = threading.Thread(target=sender.write, args=(made.data,))
        thread.start()
        assert received(StreamReader(file, to_end=False)) == planted.content(made)
        thread.join()


def before_its_table(made):
    """A block stands between header and table."""
    place, entries = made.blocks[3], bytes(made.data[made.bat : made.bat + 512])
    block = bytes(made.data[place : place + 512 + BLOCK])
    start = made.bat
    made.data[start : start + 512] = block
    made.bat = start + len(block)
    made.data[made.bat : made.bat] = entries
    shift = len(block)
    made.blocks = {number: at + shift for number, at in made.blocks.items()}
    made.blocks[3] = start
    for number, at in made.blocks.items():
        made.entry(number, at // 512)
    made.header(16, made.bat.to_bytes(8, "big"))
    return made


@pytest.mark.parametrize("parent", [None, "parent.vhd"])
def test_block_before_the_table_is_spooled(tmp_path: Path, parent) -> None:
    made = before_its_table(planted.sparse(MIXED, parent=parent))
    with pytest.raises(errors.Unsupported) as caught:
        stream_of(made)
    assert caught.value.facts["fault"] == "F52"
    reader = StreamReader(io.BytesIO(made.data), spool=tmp_path)
    assert received(reader) == planted.content(made)
    assert list(tmp_path.iterdir()) == []


def test_spooled_stream_is_as_strict(tmp_path: Path) -> None:
    made = before_its_table(planted.sparse(MIXED))
    for data in (made.data[:-1000], made.data + bytes(512), bytes(flipped(made, made.end + 300).data)):
        with pytest.raises(errors.Corrupt):
            received(StreamReader(io.BytesIO(data), spool=tmp_path))


@settings(max_examples=30)
@given(
    blocks=st.dictionaries(
        st.integers(0, 15),
        st.tuples(st.binary(min_size=1, max_size=1).map(lambda b: b + bytes(511)), st.binary(min_size=1, max_size=9)),
    ),
    shuffle=st.randoms(use_true_random=False),
)
def test_any_image_is_read_as_it_is(blocks, shuffle) -> None:
    full = {number: (bitmap, (data * BLOCK)[:BLOCK]) for number, (bitmap, data) in blocks.items()}
    order = sorted(full)
    shuffle.shuffle(order)
    made = planted.sparse(full, order=order)
    assert received(stream_of(made)) == planted.content(made)


@pytest.mark.parametrize("way", ["pipe", "tcp"])
def test_what_was_handed_over_is_what_the_file_held(tmp_path, way):
    """The kernel keeps no bytes of its own of what it moves: a file that changes behind the last byte changes it too."""
    path = tmp_path / "data"
    path.write_bytes(b"A" * (1 << 20))
    with contextlib.ExitStack() as stack:
        if way == "pipe":
            ends = os.pipe()
            reader = stack.enter_context(open(ends[0], "rb", buffering=0))
            writer = stack.enter_context(open(ends[1], "wb", buffering=0))
        else:
            server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            into = stack.enter_context(socket.create_connection(server.getsockname()))
            out = stack.enter_context(server.accept()[0])
            reader, writer = out.makefile("rb", buffering=0), into
        with path.open("r+b", buffering=0) as source:
            Outlet(writer.fileno(), 1 << 20).send(source.fileno(), 0, 1 << 20)
            os.pwrite(source.fileno(), b"B" * (1 << 20), 0)
        got = b""
        while len(got) < 1 << 20:
            got += reader.read((1 << 20) - len(got))
    assert got == b"A" * (1 << 20)
