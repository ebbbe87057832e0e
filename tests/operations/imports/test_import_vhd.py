"""Chains of differencing VHDs as sources: each file becomes one qcow2 image, and QEMU never sees the VHD."""

from __future__ import annotations

import random
import shutil

import pytest

import hvmgr
from hvmgr import errors, vhd
from hvmgr.vhd import creation

MIB = 1 << 20
SECTOR = 512
SIZE = 9 * MIB + 7 * SECTOR


@pytest.fixture
def foreign(bench):
    """A folder as Windows leaves it: base.vhd < one.avhd < two.avhd, written in single sectors; and what the disk shows."""
    folder = bench.place / "hyper-v"
    folder.mkdir(mode=0o711)
    chosen, model = random.Random(7), bytearray(SIZE)
    vhd.create(folder / "base.vhd", SIZE)
    vhd.create(folder / "one.avhd", parent=folder / "base.vhd")
    vhd.create(folder / "two.avhd", parent=folder / "one.avhd", windows_path="C:\\VMs\\one.avhd")
    for name in ("base.vhd", "one.avhd", "two.avhd"):
        with vhd.open_chain(folder / name, writable=True) as disk:
            for _ in range(15):
                count = chosen.choice((1, 1, 3, 8, 130)) * SECTOR
                offset = chosen.randrange(0, SIZE - count + 1, SECTOR)
                data = chosen.choice((bytes(count), chosen.randbytes(count), chosen.randbytes(count)))
                disk.write(offset, data)
                model[offset : offset + count] = data
    return folder, bytes(model)


def shows(bench, vm):
    """The bytes of the VM's disk."""
    raw = bench.place / "flat.raw"
    bench.run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", vm.now().disks["hda"], raw)
    return raw.read_bytes()


def domain(bench, disk, fmt="vpc"):
    """A domain's XML whose disk is there."""
    vm = bench.make(4, name="web")
    xml = bench.domain(vm).xml(live=False)
    (old,) = vm.now().disks.values()
    vm.delete(with_disks=True)
    file = bench.place / "xml" / "web.xml"
    file.parent.mkdir()
    text = xml.replace(old, str(disk)).replace("type='qcow2'", f"type='{fmt}'")
    start, end = text.index("<metadata>"), text.index("</metadata>") + len("</metadata>")
    file.write_text(text[:start] + text[end:])
    return file


class TestForeign:
    @pytest.mark.parametrize("fmt", ["vpc", "raw"])
    def test_chain_becomes_a_chain(self, bench, foreign, fmt):
        folder, model = foreign
        files = {path: bench.file_of(path) for path in folder.iterdir()}
        vm = bench.bring(domain(bench, folder / "two.avhd", fmt), paths={str(folder): str(folder)})
        assert shows(bench, vm) == model
        assert len(bench.files(vm)) == 3
        assert {path: bench.file_of(path) for path in folder.iterdir()} == files
        bench.check(vm)
        bench.start(vm)
        vm.stop(force=True)
        vm.create_snapshot("one")
        vm.merge()

    def test_disk_named_by_slot(self, bench, foreign):
        folder, model = foreign
        file = domain(bench, "/nowhere/x.qcow2", "qcow2")
        vm = bench.bring(file, disks={"hda": str(folder / "two.avhd")})
        assert shows(bench, vm) == model
        other = bench.bring(file, name="other", disks={"hda": str(folder / "base.vhd")})
        assert other.now().disks["hda"].endswith(".vhd")  # QEMU runs on it as it is
        bench.check(other)

    def test_comparison_says_it(self, bench, foreign):
        folder, _ = foreign
        file = domain(bench, folder / "two.avhd")
        found = bench.host.plan_import(file, hvmgr.ImportOptions(paths={str(folder): str(folder)})).check()
        assert [one.where for one in found if one.code == "vhd-converted"] == [
            str(folder / "one.avhd"), str(folder / "two.avhd")
        ]  # fmt: skip

    def test_linking_is_refused(self, bench, foreign):
        folder, _ = foreign
        file = domain(bench, folder / "two.avhd")
        for path in folder.iterdir():
            path.chmod(0o444)
        options = {"paths": {str(folder): str(folder)}, "mode": hvmgr.Mode.LINK}
        assert set(bench.codes(file, **options)) == {"vhd-differencing"}
        with pytest.raises(errors.Unsupported, match="is a differencing VHD") as caught:
            bench.bring(file, **options)
        assert "--mode copy" in caught.value.hint

    def test_creator_whose_size_qemu_does_not_believe(self, bench, foreign):
        folder, _ = foreign
        with vhd.open_image(folder / "base.vhd", writable=True) as image:
            image.change_footer(creator=b"vbox")
        with vhd.open_chain(folder / "base.vhd") as chain:
            model = bytearray(SIZE)
            chain.read_into(0, memoryview(model))
        file = domain(bench, folder / "base.vhd")
        vm = bench.bring(file, paths={str(folder): str(folder)})
        assert shows(bench, vm) == model

    def test_fixed_base(self, bench):
        folder = bench.place / "hyper-v"
        folder.mkdir(mode=0o711)
        vhd.create(folder / "fixed.vhd", 4 * MIB, kind=vhd.Kind.FIXED)
        vhd.create(folder / "x.avhd", parent=folder / "fixed.vhd")
        model = bytearray(4 * MIB)
        for name, offset, data in (("fixed.vhd", 0, b"a" * MIB), ("x.avhd", 512 << 10, bytes(MIB) + b"b" * SECTOR)):
            with vhd.open_chain(folder / name, writable=True) as disk:
                disk.write(offset, data)
            model[offset : offset + len(data)] = data
        vm = bench.bring(domain(bench, "/nowhere/x", "raw"), disks={"hda": str(folder / "x.avhd")})
        assert shows(bench, vm) == model


def _cut(path):
    path.write_bytes(path.read_bytes()[:-3000])


def _other_size(folder):
    with vhd.open_image(folder / "base.vhd") as image:
        uid = image.uid
    (folder / "base.vhd").unlink()
    creation.create(folder / "base.vhd", MIB, uid=uid)


class TestDamage:
    @pytest.mark.parametrize(
        ("damage", "code", "words"),
        [
            (lambda folder: (folder / "one.avhd").unlink(), "missing-disk", "parent 'one.avhd' was not found"),
            (lambda folder: (folder / "base.vhd").write_bytes(bytes(4096)), "missing-disk", "no VHD"),
            (lambda folder: _cut(folder / "one.avhd"), "damaged", "one.avhd"),
            (_other_size, "wrong-size", "has 1048576"),
        ],
        ids=["missing", "no-vhd", "cut", "size"],
    )
    def test_parent(self, bench, foreign, damage, code, words):
        folder, _ = foreign
        damage(folder)
        file = domain(bench, folder / "two.avhd")
        options = hvmgr.ImportOptions(paths={str(folder): str(folder)})
        found = [one for one in bench.host.plan_import(file, options).check() if one.severity == "error"]
        assert [one.code for one in found] == [code]
        assert words in found[0].sentence
        before = bench.states()
        with pytest.raises(errors.Corrupt):
            bench.host.import_vm(file, options)
        assert bench.states() == before

    def test_parent_elsewhere_needs_a_word(self, bench, foreign):
        folder, model = foreign
        shelf = bench.place / "shelf"
        shelf.mkdir(mode=0o711)
        shutil.move(folder / "base.vhd", shelf / "moved.vhd")
        file = domain(bench, "/nowhere/x", "qcow2")
        disks = {"hda": str(folder / "two.avhd")}
        assert bench.codes(file, disks=disks) == ["missing-disk"]
        vm = bench.bring(file, disks=disks, paths={str(shelf): str(shelf)})
        assert shows(bench, vm) == model

    def test_image_of_qemus_on_a_differencing_vhd(self, bench, foreign):
        folder, _ = foreign
        bench.run("qemu-img", "create", "-u", "-f", "qcow2", "-b", folder / "two.avhd", "-F", "vpc",
                  folder / "x.qcow2", SIZE)  # fmt: skip
        file = domain(bench, folder / "x.qcow2", "qcow2")
        assert bench.codes(file, paths={str(folder): str(folder)}) == ["vhd-differencing"]
