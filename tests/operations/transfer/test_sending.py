"""Disks as streams: whole and as deltas between any two points, of VMs that are off."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from pathlib import Path

import pytest

from hvmgr import errors, vhd
from tests.operations.rules.conftest import MIB, run
from tests.operations.transfer.conftest import (
    QCOW2,
    RAW,
    VHD,
    by_codec,
    by_libvhdi,
    chain_of,
    qemu_check,
    raw_of,
    uuid_of,
)


@pytest.fixture
def tree(bench):
    """one < two < three, one < left < now; of 8 MiB each, with bytes of their own in blocks of 2 MiB and parts of them."""
    vm = bench.make(8)
    bench.write(vm, 0x11)
    bench.write(vm, 0x12, 5 * MIB)
    vm.create_snapshot("one")
    bench.write(vm, 0x22, 100 * 512, length=512)
    vm.create_snapshot("two")
    bench.write(vm, 0x33, 7 * MIB)
    run("qemu-io", "-f", "qcow2", "-c", "write -z 5M 64k", vm.now().disks["hda"])
    vm.create_snapshot("three")
    vm.snapshot("one").apply()
    bench.write(vm, 0x44, 3 * MIB)
    vm.create_snapshot("left")
    bench.write(vm, 0x55, 128 << 10)
    return vm


@pytest.mark.parametrize("base", ["raw", "qcow2", "vpc"])
def test_whole_disk_in_every_format(bench, base) -> None:
    options = "force_size=on" if base == "vpc" else None
    image = bench.image(f"base.{base}", size=9, fmt=base, fill=(1, 0, 3), options=options)
    vm = bench.make(bench.in_place(image, format=VHD if base == "vpc" else None))
    vm.create_snapshot("one")
    bench.write(vm, 0x22, 4 * MIB)
    wanted = {snapshot: bench.disk_of(vm, snapshot=snapshot) for snapshot in ("one", None)}
    for snapshot, disk in wanted.items():
        full = bench.send(vm, f"{snapshot}.vhd", snapshot=snapshot, format=VHD)
        assert [str(one) for one in vhd.check(full)] == []
        assert raw_of(full, "vpc") == by_codec(full) == by_libvhdi(full) == disk
        assert full.stat().st_size < 3 * 2 * MIB + MIB, "only blocks with data"
        assert bench.send(vm, f"{snapshot}.raw", snapshot=snapshot, format=RAW).read_bytes() == disk
        qcow2 = bench.send(vm, f"{snapshot}.qcow2", snapshot=snapshot, format=QCOW2)
        qemu_check(qcow2)
        assert raw_of(qcow2, "qcow2") == disk
        assert qcow2.stat().st_size < (80 if base == "vpc" else 12) * (64 << 10)
    bench.check(vm)


PAIRS = [
    ("two", "one", 1),
    ("three", "one", 3),
    ("three", "two", 2),
    (None, "left", 1),
    (None, "one", 2),
    ("left", "three", 4),  # siblings: what either of them changed
    (None, "two", 2),
    ("one", "three", 3),  # back in time
]


def test_delta_between_any_two_points(bench, tree) -> None:
    wanted = {name: bench.disk_of(tree, snapshot=name) for name in ("one", "two", "three", "left", None)}
    for number, (point, base, blocks) in enumerate(PAIRS):
        full = bench.send(tree, "full.vhd", snapshot=base)
        delta = bench.send(tree, "delta.vhd", snapshot=point, base=base)
        assert by_codec(chain_of(bench.place / f"stored{number}", full, delta)) == wanted[point]
        assert by_libvhdi(full, delta) == wanted[point]
        with vhd.open_image(delta) as image, vhd.open_image(full) as below:
            assert image.parent_uid == below.uid
        assert delta.stat().st_size == 3072 + 512 + blocks * (512 + 2 * MIB)


def test_streams_and_ids_are_always_the_same(bench, tree) -> None:
    first = bench.send(tree, "first", snapshot="two", base="one").read_bytes()
    tree.snapshot("three").delete()
    tree.rename("other")
    assert bench.send(tree, "second", snapshot="two", base="one").read_bytes() == first
    with vhd.open_image(bench.send(tree, "now")) as image:
        assert uuid_of(image) == tree.home.facts().disks[0].id


def test_delta_over_sizes_that_changed(bench) -> None:
    """What a shorter image hides does not come back, and what the end of a larger one holds is told."""
    vm = bench.make(8)
    bench.write(vm, 0x11, 7 * MIB)
    vm.create_snapshot("large")
    vm.resize_disk("hda", 12 * MIB)
    bench.write(vm, 0x22, 11 * MIB)
    vm.create_snapshot("larger")
    for point, base in (("larger", "large"), ("large", "larger")):
        full = bench.send(vm, "full.vhd", snapshot=base)
        delta = bench.send(vm, "delta.vhd", snapshot=point, base=base)
        folder = bench.place / f"{point}-{base}"
        folder.mkdir()
        for path in (full, delta):
            with vhd.open_image(path) as image:
                (folder / f"{uuid_of(image)}.vhd").write_bytes(path.read_bytes())
                top = folder / f"{uuid_of(image)}.vhd"
        with vhd.open_chain(top, any_size=True) as chain:
            buffer = bytearray(chain.size)
            chain.read_into(0, memoryview(buffer))
        assert bytes(buffer) == bench.disk_of(vm, snapshot=point)


def test_points_without_a_common_image_are_compared(bench, tree) -> None:
    """A disk whose images were all replaced is still one disk."""
    wanted = bench.disk_of(tree, snapshot="two")
    full = bench.send(tree, "full.vhd", snapshot="one")
    old = tree.now().disks["hda"]
    whole = bench.place / "whole.qcow2"
    run("qemu-img", "convert", "-f", "qcow2", "-O", "qcow2", tree.snapshot("two").disks["hda"], whole)
    from hvmgr.operations.transfer import outgoing, points

    point = points.of_snapshot(tree.home, tree.snapshot("two").id, "hda")
    apart = points.Point(point.uuid, point.disk, "apart", ((whole, "qcow2"),), point.size, is_frozen=True)
    base = points.of_snapshot(tree.home, tree.snapshot("one").id, "hda")
    delta = bench.place / "delta.vhd"
    with outgoing.opened(apart, base, VHD, report=lambda _: None) as stream:
        delta.write_bytes(b"".join(map(bytes, stream.chunks())))
    assert by_codec(chain_of(bench.place / "stored", full, delta)) == wanted
    assert delta.stat().st_size == 3072 + 512 + 512 + 2 * MIB
    assert tree.now().disks["hda"] == old


def test_compressed_clusters_are_read_by_qemu(bench) -> None:
    image = bench.image("small.qcow2", size=6, fill=(7, 8, 9))
    packed = bench.place / "packed.qcow2"
    run("qemu-img", "convert", "-c", "-f", "qcow2", "-O", "qcow2", image, packed)
    vm = bench.make(bench.in_place(packed))
    bench.write(vm, 0x22, 1 * MIB + 4096, length=4096)
    for fmt in (VHD, RAW, QCOW2):
        path = bench.send(vm, f"sent.{fmt}", format=fmt)
        assert raw_of(path, "vpc" if fmt is VHD else fmt.value) == bench.disk_of(vm)


def test_raw_disk_that_ends_within_a_sector(bench) -> None:
    image = bench.place / "odd.raw"
    image.write_bytes(b"\x5a" * (MIB + 100))
    vm = bench.make(bench.in_place(image))
    for fmt in (VHD, RAW, QCOW2):
        path = bench.send(vm, f"sent.{fmt}", format=fmt)
        shown = raw_of(path, "vpc" if fmt is VHD else fmt.value)
        assert shown == (b"\x5a" * (MIB + 100)).ljust(MIB + 512, b"\0")


def test_ranges_of_raw(bench, tree) -> None:
    wanted = bench.disk_of(tree)
    with tree.export_disk("hda", format=RAW) as stream:
        assert stream.has_ranges
        for start, length in ((0, 1), (5 * MIB - 7, 100_001), (8 * MIB - 1, 1), (8 * MIB - 1, 500), (3 * MIB, 5 * MIB)):
            assert b"".join(map(bytes, stream.chunks(start, length))) == wanted[start : start + length]
            reader, writer = os.pipe()
            sent = threading.Thread(
                target=lambda w=writer, s=start, n=length: (stream.send(w, start=s, length=n), os.close(w))
            )
            sent.start()
            with os.fdopen(reader, "rb") as pipe:
                assert pipe.read() == wanted[start : start + length]
            sent.join()
    with tree.export_disk("hda") as stream, pytest.raises(errors.UsageError, match="a range of a vhd stream"):
        stream.chunks(1, 2)


def test_what_cannot_be_sent_is_refused_before_a_byte(bench, tree) -> None:
    tree.create_snapshot("here")
    other = bench.make(8, 4, name="other")
    other.create_snapshot("one")
    refused = [
        (lambda: tree.export_disk("hdx"), errors.NotFound, "there is no disk 'hdx'"),
        (lambda: tree.export_disk("hda", snapshot="nine"), errors.NotFound, "there is no snapshot 'nine'"),
        (lambda: tree.export_disk("hda", base="nine"), errors.NotFound, "there is no snapshot 'nine'"),
        (lambda: tree.export_disk("hda", base="one", format=RAW), errors.UsageError, "not as raw"),
        (lambda: tree.export_disk("hda", base="one", format=QCOW2), errors.UsageError, "not as qcow2"),
        (lambda: tree.export_disk("hda", snapshot="one", base="one"), errors.UsageError, "is its own base"),
    ]
    for act, error, words in refused:
        with pytest.raises(error, match=words):
            act()
    with pytest.raises(errors.UsageError, match="another disk"):
        from hvmgr.operations.transfer import outgoing, points

        point, base = (points.of_snapshot(other.home, other.snapshot("one").id, slot) for slot in ("hda", "hdb"))
        outgoing.check(point, base, VHD)
    bench.check(tree)


def test_disk_larger_than_a_vhd_goes_as_qcow2(bench) -> None:
    vm = bench.make(4)
    vm.resize_disk("hda", (2040 << 30) + MIB)
    with pytest.raises(errors.UsageError, match="2040 GiB at most"):
        vm.export_disk("hda")
    bench.write(vm, 0x77, 2040 << 30)
    path = bench.send(vm, "large.qcow2", format=QCOW2)
    qemu_check(path)
    shown = run("qemu-io", "-r", "-f", "qcow2", "-c", f"read -P 0x77 {2040 << 30} 64k", path)
    assert "verification failed" not in shown


def test_one_disk_is_sent_several_times_at_once(bench, tree) -> None:
    wanted = {snapshot: bench.disk_of(tree, snapshot=snapshot) for snapshot in ("two", None)}
    with contextlib.ExitStack() as stack:
        streams = {
            (snapshot, number): stack.enter_context(tree.export_disk("hda", snapshot=snapshot, format=RAW)).chunks()
            for snapshot in wanted
            for number in range(3)
        }
        got = dict.fromkeys(streams, b"")
        for pieces in itertools.zip_longest(*streams.values(), fillvalue=b""):
            for key, piece in zip(streams, pieces, strict=True):
                got[key] += bytes(piece)
    for (snapshot, _), data in got.items():
        assert data == wanted[snapshot]


def test_nothing_that_is_sent_is_removed_merged_or_started_on(bench, tree) -> None:
    wanted = bench.disk_of(tree, snapshot="two")
    with tree.export_disk("hda", snapshot="two", format=RAW) as stream:
        tree.snapshot("three").delete()
        with pytest.raises(errors.Busy, match="is needed by the transfer of disk hda of snapshot 'two'"):
            tree.snapshot("two").delete()
        tree.snapshot("one").delete()
        tree.merge()
        assert b"".join(map(bytes, stream.chunks())) == wanted
    with tree.export_disk("hda", format=RAW):
        bench.without_screen(tree)
        with pytest.raises(errors.Busy, match="is needed by the transfer of disk hda of web by process"):
            tree.start()
        with pytest.raises(errors.Conflict, match="in use by"):
            tree.create_snapshot("busy")
    tree.snapshot("two").delete()
    assert bench.files(tree) == {Path(image).name for image in tree.tree().images}
    bench.check(tree)
    tree.create_snapshot("free")
