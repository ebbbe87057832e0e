"""Trees as differencing VHDs: the same bytes at every node, by our codec and by another one; and back."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
from pathlib import Path

import pytest

import hvmgr
from hvmgr import errors, vhd
from hvmgr.model.manifest import Extent
from hvmgr.storage import images
from hvmgr.vhd import checking
from tests.operations.exports.conftest import sums_agree

MIB = 1 << 20
KIB = 1 << 10
BLOCK = 2 * MIB
VHD = hvmgr.ImageFormat.VHD


def scribble(bench, vm, seed):
    """Some writes of a guest, 4 KiB aligned, and a range that it discards."""
    chosen = random.Random(seed)
    path = Path(*vm.now().disks.values())
    fmt = images.probe(path)
    size = images.read(path, fmt).size
    commands = []
    for number in range(12):
        length = chosen.choice((4, 8, 64, 200)) * KIB
        offset = chosen.randrange(0, size - length, 4 * KIB)
        commands += ["-c", f"write -P {1 + (seed * 12 + number) % 255} {offset} {length}"]
    commands += ["-c", f"write -z {chosen.randrange(0, size - 256 * KIB, 64 * KIB)} 256k"]
    bench.run("qemu-io", "-f", fmt, *commands, path)


def six(bench, size=11):
    """one < two < three < four, one < five, two < six; now above five."""
    vm = bench.make(size, name="web")
    for seed, (name, above) in enumerate(
        [("one", None), ("two", "one"), ("three", "two"), ("four", "three"), ("five", "one"), ("six", "two")]
    ):
        if above is not None and vm.now().parent != vm.snapshot(above).id:
            vm.snapshot(above).apply()
        scribble(bench, vm, seed)
        vm.create_snapshot(name)
    vm.snapshot("five").apply()
    scribble(bench, vm, 7)
    return vm


def hashes(size, read):
    """A hash of each block of a disk."""
    return [hashlib.sha256(read(at, min(BLOCK, size - at))).hexdigest() for at in range(0, size, BLOCK)]


def by_qemu(bench, path):
    raw, fmt = bench.place / "flat.raw", images.probe(Path(path))
    bench.run("qemu-img", "convert", "-U", "-f", fmt, "-O", "raw", path, raw)
    with raw.open("rb") as file:
        return hashes(raw.stat().st_size, lambda at, count: os.pread(file.fileno(), count, at))


def by_codec(path, folder):
    with vhd.open_chain(path, folders=[folder]) as chain:
        assert chain.faults == ()

        def read(at, count):
            buffer = bytearray(count)
            chain.read_into(at, memoryview(buffer))
            return bytes(buffer)

        return hashes(chain.size, read)


def by_libvhdi(chain):
    """What libvhdi shows of files that are given the top first, read block by block."""
    import pyvhdi

    with contextlib.ExitStack() as stack:
        below = None
        for path in reversed(chain):
            one = pyvhdi.file()
            one.open(str(path))
            stack.callback(one.close)
            if below is not None:
                one.set_parent(below)
            below = one
        size = below.get_media_size()
        return hashes(size, lambda at, count: below.read_buffer_at_offset(count, at))


def nodes(told):
    """Every snapshot and now: name, and the image."""
    yield "now", told.present[0].image
    for one in told.snapshots:
        yield one.name, one.disks[0].image


def test_six_snapshots_there_and_back(bench):
    pytest.importorskip("pyvhdi")
    vm = six(bench)
    seen = {one.name: by_qemu(bench, one.disks["hda"]) for one in vm.snapshots()}
    seen["now"] = by_qemu(bench, vm.now().disks["hda"])
    tree = [(one.name, one.parent) for one in vm.snapshots()]
    export = bench.export(vm, format=VHD)
    told = bench.told(export)
    for name, file in nodes(told):
        chain = [export / one.file for one in told.chain(file)]
        assert by_codec(chain[0], export) == seen[name], name
        assert by_libvhdi(chain) == seen[name], name
    for one in told.images:
        assert checking.check(export / one.file) == []
        assert (one.file.endswith(".avhd"), one.format) == (one.parent is not None, "vpc")
        if one.parent is not None:
            with vhd.open_image(export / one.file) as child, vhd.open_image(export / one.parent) as parent:
                assert child.parent_uid == parent.uid
                texts = {text.code: text.text for text in child.structure.texts}
                relative = os.path.relpath(export / one.parent, (export / one.file).parent).replace("/", "\\")
                assert texts == {"W2ru": texts["W2ru"], "W2ku": texts["W2ru"]}
                assert texts["W2ru"].removeprefix(".\\") == relative
    assert sums_agree(export)
    assert bench.host.verify(export) == []
    vm.delete(with_disks=True)
    back = bench.host.import_vm(export, hvmgr.ImportOptions(new_id=False))
    shown = {one.name: by_qemu(bench, one.disks["hda"]) for one in back.snapshots()}
    assert shown | {"now": by_qemu(bench, back.now().disks["hda"])} == seen
    assert [(one.name, one.parent) for one in back.snapshots()] == tree
    bench.check(back)
    assert {Path(path).suffix for path in bench.files(back)} == {".qcow2"}
    bench.start(back)
    back.stop(force=True)
    back.snapshot("four").apply()
    back.snapshot("two").delete()
    bench.check(back)
    assert bench.host.verify(export) == []


def test_exported_again_children_know_their_parents(bench):
    vm = six(bench, 4)
    first, second = bench.export(vm, format=VHD), bench.export(vm, bench.place / "again", format=VHD)
    ids = []
    for export in (first, second):
        found = {}
        for one in bench.told(export).images:
            with vhd.open_image(export / one.file) as image:
                found[one.file] = image.uid
        ids.append(found)
    changed = {file for file in ids[0] if ids[0][file] != ids[1][file]}
    assert changed == {bench.told(first).present[0].image}


def test_pruned_tree(bench, branched):
    photo = bench.photo(branched)
    export = bench.export(branched, keep=("three",), format=VHD)
    assert bench.host.verify(export) == []
    back = bench.host.import_vm(export, hvmgr.ImportOptions(name="back"))
    assert bench.photo(back) == {"now hda": photo["now hda"], "three hda": photo["three hda"]}
    bench.check(back)


@pytest.mark.parametrize("options", [{"snapshot": "two"}, {"snapshots": Extent.NONE}], ids=str)
def test_flat_disk_has_exactly_its_size(bench, options):
    size = 4 * MIB + 3 * 512
    raw = bench.place / "odd.raw"
    raw.write_bytes(os.urandom(size))
    vm = bench.make(raw)
    vm.create_snapshot("two")
    bench.write(vm, 0x33, 64 * KIB)
    export = bench.export(vm, format=VHD, **options)
    (told,) = bench.told(export).images
    path = export / told.file
    wanted = vm.snapshot("two").disks["hda"] if "snapshot" in options else vm.now().disks["hda"]
    assert (told.size, images.read(path, "vpc").size) == (size, size)
    assert by_codec(path, export) == by_qemu(bench, wanted) == by_qemu(bench, path)
    assert bench.host.verify(export) == []
    assert checking.check(path) == []


def test_compressed_images(bench):
    plain = bench.image("plain.qcow2", fill=(1, 2, 3))
    packed = bench.place / "packed.qcow2"
    bench.run("qemu-img", "convert", "-c", "-O", "qcow2", plain, packed)
    vm = bench.make(bench.in_place(packed))
    vm.create_snapshot("one")
    bench.write(vm, 0x44, MIB)
    photo = bench.photo(vm)
    export = bench.export(vm, format=VHD)
    back = bench.host.import_vm(export, hvmgr.ImportOptions(name="back"))
    assert bench.photo(back) == photo
    assert list(export.rglob(".*")) == []


def test_running_vm(bench, branched):
    bench.start(branched)
    export = bench.export(branched, format=VHD)
    assert bench.host.verify(export) == []
    branched.stop(force=True)
    bench.check(branched)


def test_archive(bench, branched):
    photo = bench.photo(branched)
    file = bench.place / "web.tar.zst"
    branched.export_archive(file, hvmgr.ExportOptions(format=VHD))
    assert bench.host.verify(file) == []
    back = bench.host.import_vm(file, hvmgr.ImportOptions(name="back"))
    assert bench.photo(back) == photo
    bench.check(back)
    assert list(back.path.glob(".hvmgr/unpacked")) == []


def test_refusals(bench, branched):
    with pytest.raises(errors.UsageError, match="a tree is exported as it is, or as VHDs"):
        bench.export(branched, format=hvmgr.ImageFormat.RAW)
    (path,) = branched.now().disks.values()
    bench.run("qemu-img", "resize", "-q", path, "8M")
    with pytest.raises(errors.Unsupported, match="was resized between snapshots"):
        bench.export(branched, format=VHD)
    assert not bench.out.exists()


def test_saved_memory_goes_on(bench, branched):
    bench.start(branched)
    branched.create_snapshot("running")
    branched.stop(force=True)
    export = bench.export(branched, format=VHD)
    branched.delete(with_disks=True)
    back = bench.host.import_vm(export, hvmgr.ImportOptions())
    back.snapshot("running").apply()
    assert str(back.state()) == "running"
    back.stop(force=True)
    bench.check(back)
