"""Streams that become what a disk holds: whole and as deltas, and nothing of them when anything is wrong."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import threading

import pytest

from hvmgr import errors, vhd
from hvmgr.host import qemu_img
from hvmgr.operations.steps import execution
from hvmgr.operations.transfer.incoming import Incoming
from tests.operations.rules.conftest import MIB, PIECE, run
from tests.operations.transfer.conftest import QCOW2, RAW, VHD, Pipe

KINDS = ["qcow2", "raw", "vpc"]


@pytest.fixture
def source(bench):
    """one < two < three < now, of 6 MiB; the streams of all: a full one of the first, then deltas."""
    vm = bench.make(6, name="source")
    bench.write(vm, 0x11)
    bench.write(vm, 0x12, 3 * MIB)
    vm.create_snapshot("one")
    bench.write(vm, 0x22, MIB + 7 * 512, length=512)
    vm.create_snapshot("two")
    run("qemu-io", "-f", "qcow2", "-c", "write -z 3M 64k", vm.now().disks["hda"])
    vm.create_snapshot("three")
    bench.write(vm, 0x55, 5 * MIB)
    return vm


_MADE = []  # once for all tests here: bytes of streams and of disks


@pytest.fixture
def streams(bench, request):
    """Full, and the deltas up to now, each with the bytes that the disk has then."""
    if not _MADE:
        vm = request.getfixturevalue("source")
        for point, base in (("one", None), ("two", "one"), ("three", "two"), (None, "three")):
            path = bench.send(vm, "made.vhd", snapshot=point, base=base)
            _MADE.append((path.read_bytes(), bench.disk_of(vm, snapshot=point)))
    paths = [bench.place / f"{number}.vhd" for number in range(len(_MADE))]
    for path, (data, _) in zip(paths, _MADE, strict=True):
        path.write_bytes(data)
    return [(path, held) for path, (_, held) in zip(paths, _MADE, strict=True)]


def target(bench, kind="qcow2", size=6, name="target"):
    """A VM whose disk is full of old data."""
    options = "force_size=on" if kind == "vpc" else None
    image = bench.image(f"{name}.{kind}", size=size, fmt=kind, fill=[0xEE] * size, options=options)
    return bench.make(bench.in_place(image, format=VHD if kind == "vpc" else None), name=name)


def state_of(bench, vm):
    """Everything of a disk that an import could change."""
    layout = vm.home.layout
    return bench.photo(vm), bench.files(vm), layout.configuration.read_bytes(), dict(vm.now().disks)


@pytest.mark.parametrize("kind", KINDS)
def test_full_and_deltas_in_order_restore_every_byte(bench, streams, kind) -> None:
    vm = target(bench, kind)
    vm.create_snapshot("before")
    old = bench.disk_of(vm, snapshot="before")
    for path, wanted in streams:
        bench.take(vm, path)
        assert bench.disk_of(vm) == wanted
        bench.check(vm)
    assert bench.disk_of(vm, snapshot="before") == old
    assert len(vm.tree().chain(vm.now().disks["hda"])) == 2, "what was overwritten is merged away"


@pytest.mark.parametrize("fmt", [VHD, RAW, QCOW2])
@pytest.mark.parametrize("size", [6, 7])
def test_full_image_leaves_no_stale_data(bench, source, fmt, size) -> None:
    wanted = bench.disk_of(source)
    path = bench.send(source, f"full.{fmt}", format=fmt)
    vm = target(bench, size=size)
    if fmt is RAW and size == 7:
        with pytest.raises(errors.Conflict, match="a part of it may be missing"):
            bench.take(vm, path, fmt=fmt, length=path.stat().st_size)
    vm.import_disk("hda", Pipe(path.read_bytes()), format=fmt, length=path.stat().st_size, force=size == 7)
    assert bench.disk_of(vm) == wanted + bytes((size - 6) * MIB)
    bench.check(vm)


def test_delta_has_to_start_from_what_the_disk_holds(bench, streams) -> None:
    vm = target(bench)
    before = state_of(bench, vm)
    with pytest.raises(errors.Conflict, match="nobody can tell what it holds now"):
        bench.take(vm, streams[1][0])
    assert state_of(bench, vm) == before
    bench.take(vm, streams[0][0])
    with pytest.raises(errors.Conflict, match="is a delta on") as refusal:
        bench.take(vm, streams[2][0])
    assert "--force" in refusal.value.hint
    bench.take(vm, streams[1][0])
    vm.create_snapshot("kept")  # stands on the same data
    bench.take(vm, streams[2][0])
    bench.write(vm, 0x99, 2 * MIB)
    with pytest.raises(errors.Conflict, match="nobody can tell what it holds now"):
        bench.take(vm, streams[3][0])
    bench.take(vm, streams[3][0], force=True)
    changed = bytearray(streams[3][1])
    changed[2 * MIB : 2 * MIB + PIECE] = b"\x99" * PIECE
    assert bench.disk_of(vm) == bytes(changed)
    assert bench.disk_of(vm, snapshot="kept") == streams[1][1]
    bench.check(vm)


def test_disk_that_was_put_back_to_a_snapshot_holds_that(bench, source) -> None:
    """Its own older state takes its own delta: apply, then roll forward."""
    second = bench.send(source, "second.vhd", snapshot="three", base="two")
    last = bench.send(source, "last.vhd", base="three")
    wanted = bench.disk_of(source)
    source.snapshot("three").apply()
    with pytest.raises(errors.Conflict, match="is a delta on"):
        bench.take(source, second)
    bench.take(source, last)
    assert bench.disk_of(source) == wanted
    bench.check(source)


def test_half_of_a_disk_is_never_taken_for_what_a_guest_wrote(bench, streams, monkeypatch) -> None:
    """Killed when a part of it has reached the image: what is left is undone by whoever looks next."""
    vm = target(bench)
    before = state_of(bench, vm)

    def half(_stream, client, *_):
        client.write(0, b"half" * (PIECE // 4))
        client.flush()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Incoming, "write", half)
        patched.setattr(execution, "_go_back", lambda *_: None)  # as after a kill
        with pytest.raises(KeyboardInterrupt):
            bench.take(vm, streams[0][0])
    assert vm.home.layout.journal.exists()
    assert len(bench.files(vm)) == 1, "the image that was begun"
    vm.snapshots()
    assert state_of(bench, vm) == before
    assert any("undid the interrupted import" in one for one in bench.said)
    bench.check(vm)


def test_what_a_disk_holds_is_known_through_snapshots_and_merges(bench, streams) -> None:
    vm = target(bench)
    vm.create_snapshot("ground")
    bench.take(vm, streams[0][0])
    vm.create_snapshot("short")
    vm.snapshot("short").delete()
    alone = bench.host.disks.snapshot(vm.home.facts().disks[0].id)
    bench.host.disks.destroy(alone)
    bench.take(vm, streams[1][0])
    assert bench.disk_of(vm) == streams[1][1]
    bench.start(vm)
    vm.stop(force=True)
    bench.check(vm)


def test_fixed_vhd_and_disks_of_other_sizes(bench, source) -> None:
    fixed = bench.place / "fixed.vhd"
    run("qemu-img", "convert", "-f", "qcow2", "-O", "vpc", "-o", "subformat=fixed,force_size=on",
        source.now().disks["hda"], fixed)  # fmt: skip
    wanted = bench.disk_of(source)
    vm = target(bench)
    bench.take(vm, fixed, length=fixed.stat().st_size)
    assert bench.disk_of(vm) == wanted
    small = target(bench, size=5, name="small")
    before = state_of(bench, small)
    for fmt in (VHD, QCOW2, RAW):
        path = bench.send(source, f"full.{fmt}", format=fmt)
        with pytest.raises(errors.Conflict, match="hda of small has 5242880"):
            bench.take(small, path, fmt=fmt, length=path.stat().st_size)
    assert state_of(bench, small) == before
    bench.check(small)


def test_stream_that_is_cut_off_changes_nothing(bench, streams) -> None:
    """At every 64 KiB, and just before its end; all the way through for the delta."""
    vm = target(bench)
    bench.take(vm, streams[0][0])
    before = state_of(bench, vm)
    full, delta = (streams[number][0].read_bytes() for number in (0, 1))
    raw = streams[0][1]
    qcow2 = bench.send(vm, "full.qcow2", format=QCOW2).read_bytes()
    for data, fmt, step in ((full, VHD, 1), (delta, VHD, 1), (raw, RAW, 1), (qcow2, QCOW2, 16)):
        for end in [*range(0, len(data), step * PIECE), len(data) - 1]:
            with pytest.raises(errors.Corrupt):
                read(bench, data[:end], fmt)
        for more in (b"x", bytes(512)) if fmt is not QCOW2 else ():
            with pytest.raises(errors.Corrupt):
                read(bench, data + more, fmt)
    for end in [*range(0, len(delta), 8 * PIECE), len(delta) - 1]:
        with pytest.raises(errors.Corrupt):
            vm.import_disk("hda", io.BytesIO(delta[:end]), format=VHD)
    with pytest.raises(errors.Corrupt):
        vm.import_disk("hda", io.BytesIO(raw[:-1]), format=RAW)
    assert state_of(bench, vm) == before
    bench.check(vm)
    bench.take(vm, streams[1][0])
    assert bench.disk_of(vm) == streams[1][1]


def read(bench, data, fmt):
    """All that an import reads."""
    with Incoming(io.BytesIO(data), fmt, spool=bench.place) as stream:
        stream.write(Nowhere(), 6 * MIB, [], lambda _: None)


class Nowhere:
    """A disk of which only its writing is of interest."""

    def write(self, offset, data):
        assert offset + len(data) <= 6 * MIB

    def write_zeroes(self, offset, length):
        assert offset + length <= 6 * MIB

    def flush(self):
        raise AssertionError("all has arrived")


@pytest.mark.parametrize("fmt", [VHD, QCOW2])
def test_garbage_is_refused(bench, fmt) -> None:
    vm = target(bench)
    before = state_of(bench, vm)
    for data in (b"", b"HTTP/1.1 500", os.urandom(70_000), b"conectix" + os.urandom(5000), b"QFI\xfb" + bytes(5000)):
        with pytest.raises(errors.Corrupt):
            vm.import_disk("hda", io.BytesIO(data), format=fmt)
    assert state_of(bench, vm) == before


def test_qcow2_that_is_no_whole_disk_is_refused(bench, monkeypatch) -> None:
    """Its parent would be a file of this host that the sender chose: QEMU is not even asked about it."""
    vm = target(bench)
    before = state_of(bench, vm)
    monkeypatch.setattr(qemu_img, "info", lambda *_: pytest.fail("QEMU has seen it"))
    child = bench.place / "child.qcow2"
    run("qemu-img", "create", "-f", "qcow2", "-b", "/etc/passwd", "-F", "raw", child, "6M")
    with child.open("rb") as file, pytest.raises(errors.Unsupported, match="stands on another image"):
        vm.import_disk("hda", file, format=QCOW2)
    outside = bench.place / "outside.qcow2"
    run("qemu-img", "create", "-f", "qcow2", "-o", f"data_file={bench.place}/data,data_file_raw=on", outside, "6M")
    by_nbd = child.read_bytes().replace(b"/etc/passwd", b"nbd:localho")
    for data in (outside.read_bytes(), by_nbd):
        with pytest.raises(errors.Unsupported, match="no whole disk"):
            vm.import_disk("hda", io.BytesIO(data), format=QCOW2)
    for length in (4, 71, 72, 103):
        with pytest.raises(errors.Corrupt, match="no sound qcow2 image"):
            vm.import_disk("hda", io.BytesIO(outside.read_bytes()[:length]), format=QCOW2)
    assert state_of(bench, vm) == before


@pytest.mark.parametrize("fmt", [VHD, QCOW2])
def test_image_is_not_taken_for_raw_bytes_by_mistake(bench, source, fmt) -> None:
    """Xen's words mean raw where nothing is stated."""
    path = bench.send(source, f"full.{fmt}", format=fmt)
    vm = target(bench)
    before = state_of(bench, vm)
    with pytest.raises(errors.UsageError, match=f"begins like a {fmt}"):
        bench.take(vm, path, fmt=RAW, length=path.stat().st_size)
    assert state_of(bench, vm) == before
    vm.import_disk("hda", io.BytesIO(path.read_bytes()), format=RAW, length=path.stat().st_size, force=True)
    assert bench.disk_of(vm) == path.read_bytes().ljust(6 * MIB, b"\0")


def test_wish_to_stop_is_heard_while_nothing_arrives(bench, streams) -> None:
    vm = target(bench)
    before = state_of(bench, vm)
    reader, writer = os.pipe()
    os.write(writer, streams[0][0].read_bytes()[:4096])
    stopping = threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT))
    stopping.start()
    with os.fdopen(reader, "rb", buffering=0) as pipe, pytest.raises((errors.Cancelled, KeyboardInterrupt)):
        vm.import_disk("hda", pipe, format=VHD)
    os.close(writer)
    assert state_of(bench, vm) == before
    bench.check(vm)


def test_vm_that_runs_or_is_saved_keeps_its_disk(bench, streams) -> None:
    vm = bench.make(6, name="target")
    bench.start(vm)
    with pytest.raises(errors.Conflict, match="target is running"):
        bench.take(vm, streams[0][0])
    bench.domain(vm).managed_save()
    with pytest.raises(errors.Conflict, match="is saved"):
        bench.take(vm, streams[0][0])


def test_from_a_pipe_that_somebody_fills(bench, streams) -> None:
    """What is pushed from another thread waits there until it is taken."""
    vm = target(bench)
    reader, writer = os.pipe()
    data = streams[0][0].read_bytes()

    def push():
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(data)

    pushing = threading.Thread(target=push)
    pushing.start()
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        vm.import_disk("hda", pipe, format=VHD)
    pushing.join()
    assert bench.disk_of(vm) == streams[0][1]


def test_transport_that_stays_open_ends_with_its_disk(bench, streams) -> None:
    vm = target(bench)
    reader, writer = os.pipe()
    data = streams[1][0].read_bytes()
    bench.take(vm, streams[0][0])
    pushing = threading.Thread(target=lambda: os.write(writer, data) if len(data) < 1 << 20 else _push(writer, data))
    pushing.start()
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        vm.import_disk("hda", pipe, format=VHD, to_end=False, length=1 << 50)
    pushing.join()
    os.close(writer)
    assert bench.disk_of(vm) == streams[1][1]


def _push(descriptor, data):
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def test_no_space_changes_nothing(bench, streams) -> None:
    """In a file system that is too small for what arrives."""
    small = bench.place / "small"
    small.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6M,mode=711", "tmpfs", small], check=False)
    if done.returncode != 0:
        pytest.skip("needs to mount a tmpfs")
    try:
        host = bench.open_host("small/root")
        vm = bench.make(6, name="tight", host=host)
        vm.create_snapshot("one")
        before = state_of(bench, vm)
        (small / "filler").write_bytes(bytes(4 * MIB))
        data = vhd_of_noise(bench)
        with pytest.raises(errors.NoSpace):
            vm.import_disk("hda", io.BytesIO(data), format=VHD)
        assert state_of(bench, vm) == before
        bench.check(vm)
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def vhd_of_noise(bench):
    path = bench.place / "noise.vhd"
    raw = bench.place / "noise"
    raw.write_bytes(os.urandom(6 * MIB))
    with vhd.RawSource(raw) as disk:
        writer = vhd.StreamWriter(disk)
        path.write_bytes(b"".join(map(bytes, writer.chunks())))
    return path.read_bytes()
