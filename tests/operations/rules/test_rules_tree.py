"""The tree behaves as Hyper-V's does: any snapshot goes on its own, and no disk of another one changes by a byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvmgr import errors
from hvmgr.model import tree
from hvmgr.model.specification import DiskSpecification, ImageFormat

MIB = 1 << 20
SAMPLES = Path(__file__).resolve().parents[4] / "shared" / "samples"
BASES = {
    "new": None,
    "qcow2": ("qcow2", None),
    "raw": ("raw", None),
    "fixed VHD": ("vpc", "subformat=fixed,force_size=on"),
    "dynamic VHD": ("vpc", "subformat=dynamic,force_size=on"),
}


def make(bench, base, *, count=1, place=False):
    """A VM whose disks are of one kind of base."""
    if BASES[base] is None:
        return bench.make(*[8] * count)
    fmt, options = BASES[base]
    found = [bench.image(f"base{n}.{fmt}", size=8, fmt=fmt, fill=(n + 1,) * 8, options=options) for n in range(count)]
    stated = ImageFormat.RAW if fmt == "raw" else None
    return bench.make(*(DiskSpecification(path=path, format=stated, in_place=place) for path in found))


def grow_tree(bench, vm, *, slots=("hda",)):
    """The tree of show 2: b, c and d below a, now below d."""
    made = {}
    for number, (name, back) in enumerate([("a", None), ("b", None), ("c", "a"), ("d", "a")], 2):
        if back is not None:
            made[back].apply()
        for slot in slots:
            bench.write(vm, number * 10, number * MIB, slot=slot)
            bench.write(vm, number * 10 + 1, 0, slot=slot)
        made[name] = vm.create_snapshot(name)
    for slot in slots:
        bench.write(vm, 99, 7 * MIB, slot=slot)
    return made


def test_show_2_deletes_a_snapshot_with_three_children(bench):
    vm = bench.make(1024, name="t1")
    a = vm.create_snapshot("a")
    bench.write(vm, 1, 1 * MIB)
    b = vm.create_snapshot("b")
    a.apply()
    bench.write(vm, 2, 2 * MIB)
    c = vm.create_snapshot("c")
    a.apply()
    bench.write(vm, 3, 1023 * MIB)
    d = vm.create_snapshot("d")
    bench.write(vm, 4, 4 * MIB)
    before = bench.photo(vm)
    a.delete()
    after = bench.photo(vm)
    assert after == {name: seen for name, seen in before.items() if not name.startswith("a ")}
    forest = vm.tree()
    assert {node.snapshot_id for node in forest.nodes.values() if node.parent is None} == {b.id, c.id, d.id}
    assert forest.present.parent == d.id
    bench.check(vm)
    b.delete()
    c.delete()
    bench.check(vm)
    assert bench.photo(vm) == {name: seen for name, seen in before.items() if name[0] in "dn"}
    forest = vm.tree()
    assert tree.unnamed(forest) == []
    assert tree.pending(forest) == []
    assert tree.detached(forest) == []
    assert len(forest.images) == 2
    d.delete()
    assert len(vm.tree().images) == 1
    assert bench.photo(vm) == {"now hda": before["now hda"]}
    bench.check(vm)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("order", ["abdc", "dcba"])
def test_deletes_over_every_kind_of_base_keep_every_byte(bench, base, order):
    vm = make(bench, base)
    made = grow_tree(bench, vm)
    seen = bench.photo(vm)
    for name in order:
        made[name].delete()
        seen = {key: value for key, value in seen.items() if not key.startswith(f"{name} ")}
        assert bench.photo(vm) == seen
        bench.check(vm)
    forest = vm.tree()
    assert tree.unnamed(forest) == [path for path in forest.images if forest.children().get(path)]
    assert len(forest.images) == (1 if BASES[base] is None or base == "qcow2" else 2)


@pytest.mark.parametrize("order", ["abcd", "dbca"])
def test_several_disks_stay_together(bench, order):
    vm = make(bench, "qcow2", count=3)
    slots = list(vm.now().disks)
    made = grow_tree(bench, vm, slots=slots)
    seen = bench.photo(vm)
    assert len(seen) == 15
    for name in order:
        made[name].delete()
        seen = {key: value for key, value in seen.items() if not key.startswith(f"{name} ")}
        assert bench.photo(vm) == seen
        bench.check(vm)


def test_disks_of_four_kinds_in_one_vm(bench):
    disks = [
        DiskSpecification(size=8 * MIB),
        DiskSpecification(path=bench.image("r.img", size=8, fmt="raw", fill=(1,)), format=ImageFormat.RAW),
        DiskSpecification(path=bench.image("f.vhd", size=8, fmt="vpc", options="subformat=fixed,force_size=on")),
        DiskSpecification(path=bench.image("d.vhd", size=8, fmt="vpc", options="subformat=dynamic,force_size=on")),
    ]
    vm = bench.make(*disks)
    made = grow_tree(bench, vm, slots=list(vm.now().disks))
    seen = bench.photo(vm)
    assert {size for size, _ in seen.values()} == {8 * MIB}
    made["a"].delete()
    made["b"].apply()
    bench.check(vm)
    after = bench.photo(vm)
    assert {key: after[key] for key in after if key[0] in "bcd"} == {key: seen[key] for key in seen if key[0] in "bcd"}
    assert {key[-3:]: value for key, value in after.items() if key.startswith("now")} == {
        key[-3:]: value for key, value in seen.items() if key.startswith("b ")
    }


def test_subtree_goes_at_once(bench):
    vm = bench.make(8)
    made = grow_tree(bench, vm)
    made["a"].apply()
    bench.write(vm, 5, 5 * MIB)
    seen = bench.photo(vm)
    assert set(made["a"].delete(subtree=True)) == {one.id for one in made.values()}
    assert bench.photo(vm) == {"now hda": seen["now hda"]}
    assert vm.snapshots() == []
    assert vm.now().parent is None
    bench.check(vm)


def test_bases_in_the_home_are_never_removed(bench):
    vm = make(bench, "raw")
    first = vm.create_snapshot("a")
    base = Path(first.disks["hda"])
    first.delete()
    assert base.exists()
    assert vm.tree().chain(vm.now().disks["hda"])[1].path == str(base)


# --- images that are refused ------------------------------------------------------------------------------------------


def refuse(bench, disk, sentence, error=errors.Unsupported):
    with pytest.raises(error, match=sentence) as caught:
        bench.make(disk)
    assert caught.value.hint
    assert bench.host.vms() == []
    assert not (bench.place / "root").exists()
    assert bench.host.connection.find_domain_by_name("web") is None


def foreign(path):
    """The VHD's creator is one whose size QEMU takes from the geometry."""
    data = bytearray(path.read_bytes())
    for start in (0, len(data) - 512):
        if data[start : start + 8] == b"conectix":
            footer = data[start : start + 512]
            footer[28:32] = b"vpc "
            footer[56:60] = bytes([0, 150, 4, 17])  # 5222400 bytes: as Virtual PC computes it, below the disk's size
            footer[64:68] = bytes(4)
            footer[64:68] = (~sum(footer) & 0xFFFFFFFF).to_bytes(4, "big")
            data[start : start + 512] = footer
    path.write_bytes(data)


@pytest.mark.parametrize("where", [True, False], ids=["in place", "copied"])
@pytest.mark.parametrize("kind", ["dynamic", "fixed"])
def test_vhd_that_qemu_would_cut_is_refused(bench, kind, where):
    path = bench.image("foreign.vhd", fmt="vpc", size=5, options=f"subformat={kind},force_size=on")
    foreign(path)
    refuse(bench, DiskSpecification(path=path, in_place=where), "would cut it from 5242880 to")


def test_differencing_vhd_is_refused(bench):
    sample = SAMPLES / "dfvfs-image-differential.vhd"
    if not sample.exists():
        pytest.skip(f"the sample {sample.name} is not on this machine")
    path = bench.place / "diff.vhd"
    path.write_bytes(sample.read_bytes())
    with pytest.raises((errors.Unsupported, errors.Corrupt), match=r"differencing VHD|wrong checksum"):
        bench.make(path)
    assert bench.host.vms() == []


def test_differencing_vhd_of_our_own_making_is_refused(bench):
    path = bench.image("diff.vhd", fmt="vpc", options="subformat=dynamic,force_size=on")
    data = bytearray(path.read_bytes())
    for start in (0, len(data) - 512):
        footer = data[start : start + 512]
        footer[60:64], footer[64:68] = (4).to_bytes(4, "big"), bytes(4)
        footer[64:68] = (~sum(footer) & 0xFFFFFFFF).to_bytes(4, "big")
        data[start : start + 512] = footer
    path.write_bytes(data)
    for disk in (DiskSpecification(path=path), bench.in_place(path)):
        refuse(bench, disk, "differencing VHD; QEMU would read zeros")


def test_vhd_with_a_wrong_checksum_is_corrupt(bench):
    path = bench.image("bad.vhd", fmt="vpc", options="subformat=fixed,force_size=on")
    data = bytearray(path.read_bytes())
    data[-512 + 100] ^= 1
    path.write_bytes(data)
    with pytest.raises(errors.Corrupt, match="checksum"):
        bench.make(path)
    assert not (bench.place / "root").exists()


@pytest.mark.parametrize(
    ("fmt", "options", "sentence"),
    [
        ("vhdx", None, "is a VHDX image"),
        ("vmdk", None, "is a VMDK image"),
        ("vdi", None, "is a VDI image"),
        ("qed", None, "is a QED image"),
        ("qcow2", "encrypt.format=aes,encrypt.key-secret=s", "is encrypted"),
        ("qcow2", "data_file=FOLDER/data,data_file_raw=on", "keeps its data in another file"),
    ],
    ids=["vhdx", "vmdk", "vdi", "qed", "encrypted qcow2", "data file"],
)
def test_image_that_vms_cannot_stand_on_is_refused(bench, fmt, options, sentence):
    path = bench.place / f"image.{fmt}"
    wishes = [] if options is None else ["-o", options.replace("FOLDER", str(bench.place))]
    secret = ["--object", "secret,id=s,data=secret"] if options and "secret" in options else []
    bench.run("qemu-img", "create", *secret, "-f", fmt, *wishes, path, "4M")
    refuse(bench, DiskSpecification(path=path), sentence)
    refuse(bench, bench.in_place(path), sentence)


def test_luks_is_refused(bench):
    path = bench.place / "image.luks"
    path.write_bytes(b"LUKS\xba\xbe\x00\x01".ljust(MIB, b"\0"))  # making a real one measures the CPU for seconds
    refuse(bench, DiskSpecification(path=path), "is a LUKS image")
    refuse(bench, bench.in_place(path), "is a LUKS image")


def test_stated_format_that_is_not_true_is_refused(bench):
    path = bench.image("image.img", fmt="raw")
    with pytest.raises(errors.Corrupt, match="no qcow2 image"):
        bench.make(DiskSpecification(path=path, format=ImageFormat.QCOW2))


def test_internal_snapshots_are_refused(bench):
    path = bench.image("image.qcow2")
    bench.run("qemu-img", "snapshot", "-c", "one", path)
    refuse(bench, DiskSpecification(path=path), "has internal snapshots")
    refuse(bench, bench.in_place(path), "has internal snapshots")


def test_stranger_that_gets_internal_snapshots_later_is_not_merged_away(bench):
    vm = bench.make(8)
    first = vm.create_snapshot("a")
    bench.write(vm, 1)
    working = vm.now().disks["hda"]
    bench.run("qemu-img", "snapshot", "-c", "one", working)
    seen = bench.photo(vm)
    first.delete()
    assert {name: seen[name] for name in ("now hda",)} == bench.photo(vm)
    assert "one" in bench.run("qemu-img", "snapshot", "-l", vm.now().disks["hda"])


# --- depth ------------------------------------------------------------------------------------------------------------


def deep(bench, count):
    """An image outside on ``count`` − 1 others."""
    below = bench.image("d0.qcow2", size=1)
    for number in range(1, count):
        path = bench.place / f"d{number}.qcow2"
        path.write_bytes(thin(below.name, MIB))
        below = path
    return below


def thin(backing, size):
    """An empty differencing image: header, one empty table of each kind; made by hand because 190 are needed."""
    cluster = 1 << 16
    name = backing.encode()
    head = bytearray(cluster)
    fields = (b"QFI\xfb", 3, 512, len(name), 16, size, 0, 1, 3 * cluster, cluster, 1, 0, 0)
    import struct

    struct.pack_into(">4sIQIIQIIQQIIQ", head, 0, *fields)
    struct.pack_into(">QQQII", head, 72, 0, 0, 0, 4, 104)
    struct.pack_into(">II5s", head, 104, 0xE2792ACA, 5, b"qcow2")
    head[512 : 512 + len(name)] = name
    table = bytearray(cluster)
    struct.pack_into(">Q", table, 0, 2 * cluster)
    counts = bytearray(cluster)
    struct.pack_into(">4H", counts, 0, 1, 1, 1, 1)
    return bytes(head + table + counts + bytearray(cluster))


def test_chain_of_more_than_30_images_is_warned_of(bench):
    vm = bench.make(bench.in_place(deep(bench, 29)))
    vm.create_snapshot("30 images")
    assert not [line for line in bench.said if "slower" in line]
    vm.create_snapshot("31 images")
    assert [line for line in bench.said if "chains of up to 31 images" in line]


def test_chain_of_190_images_grows_no_further(bench):
    vm = bench.make(bench.in_place(deep(bench, 189)))
    first = vm.create_snapshot("190 images")
    files = bench.files(vm)
    for act in (lambda: vm.create_snapshot("191"), lambda: first.apply(snapshot_first=True)):
        with pytest.raises(errors.Conflict, match="already stands on 190 images") as caught:
            act()
        assert "delete snapshots" in caught.value.hint
        assert bench.files(vm) == files
    bench.check(vm)
    first.apply()
    first.delete()
    bench.check(vm)
