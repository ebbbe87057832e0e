"""Disks under one uuid each: those of VMs and snapshots, snapshots of one disk alone, and free ones."""

from __future__ import annotations

import io
import os
import uuid
from pathlib import Path

import pytest

from hvmgr import errors, vhd
from hvmgr.faces.cli import render
from hvmgr.host import image_locks
from hvmgr.storage import free_disks
from tests.operations.rules.conftest import MIB, run, write
from tests.operations.transfer.conftest import RAW, VHD, by_codec, chain_of, qemu_check, raw_of


@pytest.fixture
def disks(bench):
    return bench.host.disks


def export(bench, wanted, name, **wishes):
    path = bench.place / name
    with bench.host.disks.export(wanted, **wishes) as stream, path.open("wb") as file:
        stream.send(file.fileno())
    return path


def take(bench, wanted, path, **wishes):
    with path.open("rb") as file:
        bench.host.disks.receive(wanted, file, length=path.stat().st_size, **wishes)


def image_of(bench, wanted):
    shelf = free_disks.shelf(bench.host.root)
    return shelf.path(shelf.find(wanted))


def images(bench):
    return sorted(path.name for path in (bench.host.root / ".disks").glob("*.qcow2"))


def check_shelf(bench):
    """No image too many, none too few, all of them sound."""
    shelf = free_disks.shelf(bench.host.root)
    needed = {path.name for one in shelf.all() for path in shelf.chain(one)}
    assert set(images(bench)) == needed
    for name in needed:
        qemu_check(shelf.folder / name)


def test_every_disk_has_a_uuid_that_stays(bench, disks) -> None:
    vm = bench.make(4, 4)
    vm.create_snapshot("one")
    free = disks.create(2 * MIB, name="backup")
    alone = disks.snapshot(vm.home.facts().disks[0].id)
    before = {(one.uuid, one.kind.value, one.slot, one.size) for one in disks.list()}
    kinds = sorted(one.kind.value for one in disks.list())
    assert kinds == ["disk-snapshot", "free", "slot", "slot", "snapshot", "snapshot"]
    vm.rename("other")
    vm.create_snapshot("two")
    after = {(one.uuid, one.kind.value, one.slot, one.size) for one in disks.list()}
    assert before < after
    for wanted in (free, alone):
        assert disks.get(wanted).uuid == wanted
    assert [one.name for one in vm.snapshots()] == ["one", "two"], "a disk's own snapshot is not in the tree"


def test_what_xen_does_word_for_word(bench, disks) -> None:
    """Snapshot, full export, change, delta export, create, import full, import delta: the same bytes."""
    vm = bench.make(8)
    bench.write(vm, 0x11)
    disk = vm.home.facts().disks[0].id
    first = disks.snapshot(disk)
    full = export(bench, first, "full.vhd", format=VHD)
    bench.write(vm, 0x22, 5 * MIB)
    second = disks.snapshot(disk)
    delta = export(bench, second, "delta.vhd", base=first, format=VHD)
    assert delta.stat().st_size < full.stat().st_size + 10_000
    new = disks.create(8 * MIB)
    take(bench, new, full, format=VHD)
    take(bench, new, delta, format=VHD)
    wanted = bench.disk_of(vm)
    assert raw_of(image_of(bench, new), "qcow2") == wanted
    assert export(bench, new, "new.raw", format=RAW).read_bytes() == wanted
    assert by_codec(chain_of(bench.place / "stored", full, delta)) == wanted
    assert len(images(bench)) == 1
    check_shelf(bench)
    disks.destroy(first)
    disks.destroy(second)
    assert len(vm.tree().chain(vm.now().disks["hda"])) == 1
    assert bench.disk_of(vm) == wanted
    bench.check(vm)


def test_snapshot_of_one_disk_keeps_its_image_through_everything(bench, disks) -> None:
    vm = bench.make(4, 4)
    bench.write(vm, 0x11)
    vm.create_snapshot("one")
    bench.write(vm, 0x22)
    first, other = (record.id for record in vm.home.facts().disks)
    alone = disks.snapshot(first)
    wanted = bench.disk_of(vm)
    bench.write(vm, 0x33)
    vm.create_snapshot("two")
    vm.snapshot("one").apply(keep_undo=False)
    vm.snapshot("two").delete()
    vm.snapshot("one").delete()
    vm.merge()
    assert export(bench, alone, "alone.raw", format=RAW).read_bytes() == wanted
    delta = export(bench, first, "back.vhd", base=alone, format=VHD)
    full = export(bench, alone, "full.vhd", format=VHD)
    assert by_codec(chain_of(bench.place / "stored", full, delta)) == bench.disk_of(vm)
    with pytest.raises(errors.Conflict, match=f"the disk snapshot {alone}"):
        vm.delete()
    with pytest.raises(errors.UsageError, match="another disk"):
        disks.export(other, base=alone, format=VHD)
    bench.check(vm)
    disks.destroy(alone)
    with pytest.raises(errors.NotFound):
        disks.get(alone)
    assert {Path(path).name for path in vm.tree().images} == bench.files(vm)
    bench.check(vm)


def test_others_count_snapshots_of_one_disk(bench, disks) -> None:
    """Commands on files, ``doctor`` and ``space`` know what such a snapshot needs."""
    vm = bench.make(4)
    vm.create_snapshot("one")
    alone = disks.snapshot(vm.home.facts().disks[0].id)
    free = disks.create(4 * MIB)
    kept = disks.snapshot(free)
    shelf = free_disks.shelf(bench.host.root)
    image = Path(vm.tree().chain(vm.now().disks["hda"])[1].path)
    for path in (image, shelf.path(shelf.find(kept))):
        for act in (bench.host.images.compact, lambda one: bench.host.images.resize(one, 8 * MIB)):
            with pytest.raises(errors.Conflict, match="needed"):
                act(path)
    assert {str(one.code) for one in bench.host.doctor("web")} & {
        "image-unnamed",
        "disk-detached",
        "merge-pending",
    } == set()
    assert vm.usage().pending == 0
    assert alone in render.draw_tree(vm)


def test_restored_disk_takes_the_next_delta_on_its_own_snapshot(bench, disks) -> None:
    """A replica: each day a delta, and its own snapshot of each day."""
    vm = bench.make(4)
    disk = vm.home.facts().disks[0].id
    replica = disks.create(4 * MIB)
    base, kept = None, []
    for day in range(1, 4):
        bench.write(vm, day, day * MIB)
        point = disks.snapshot(disk)
        take(bench, replica, export(bench, point, f"{day}.vhd", base=base, format=VHD), format=VHD)
        kept.append((disks.snapshot(replica, name=f"day {day}"), bench.disk_of(vm)))
        if base is not None:
            disks.destroy(base)
        base = point
    for wanted, held in kept:
        assert export(bench, wanted, f"{wanted}.raw").read_bytes() == held
    back = export(bench, kept[0][0], "back.vhd", base=kept[2][0], format=VHD)
    take(bench, replica, back, format=VHD)
    assert raw_of(image_of(bench, replica), "qcow2") == kept[0][1]
    check_shelf(bench)
    for wanted, _ in kept[:2]:
        disks.destroy(wanted)
    assert export(bench, kept[2][0], "last.raw").read_bytes() == kept[2][1]
    disks.destroy(replica)
    disks.destroy(kept[2][0])
    assert images(bench) == []


def test_free_disk_refuses_what_does_not_fit_and_stays(bench, disks) -> None:
    vm = bench.make(4)
    bench.write(vm, 0x11)
    disk = vm.home.facts().disks[0].id
    first = disks.snapshot(disk)
    full = export(bench, first, "full.vhd", format=VHD)
    bench.write(vm, 0x22)
    delta = export(bench, disk, "delta.vhd", base=first, format=VHD)
    free, small = disks.create(4 * MIB), disks.create(MIB)
    take(bench, free, full, format=VHD)
    held = raw_of(image_of(bench, free), "qcow2")
    data = delta.read_bytes()
    for end in range(0, len(data), 4 * (64 << 10)):
        with pytest.raises(errors.Corrupt):
            disks.receive(free, io.BytesIO(data[:end]), format=VHD)
    with pytest.raises(errors.Conflict, match="has 1048576"):
        take(bench, small, full, format=VHD)
    with pytest.raises(errors.Conflict, match="is a delta on"):
        take(bench, disks.create(4 * MIB), delta, format=VHD)
    assert raw_of(image_of(bench, free), "qcow2") == held
    write(image_of(bench, free), 0x99)
    with pytest.raises(errors.Conflict, match="nobody can tell"):
        take(bench, free, delta, format=VHD)
    take(bench, free, delta, format=VHD, force=True)
    check_shelf(bench)


def test_what_cannot_be_done_with_a_disk_is_said(bench, disks) -> None:
    vm = bench.make(4)
    made = vm.create_snapshot("one")
    disk = vm.home.facts().disks[0].id
    snapshot = next(one.uuid for one in disks.list() if one.kind.value == "snapshot")
    free = disks.create(MIB)
    nothing = str(uuid.uuid4())
    refused = [
        (lambda: disks.export(nothing), errors.NotFound, "there is no disk"),
        (lambda: disks.export("../../etc/passwd"), errors.UsageError, "is no uuid"),
        (lambda: disks.export(disk, base=nothing, format=VHD), errors.NotFound, "there is no disk"),
        (lambda: disks.export(disk, base=snapshot, format=RAW), errors.UsageError, "not as raw"),
        (lambda: disks.export(free, base=snapshot, format=VHD), errors.UsageError, "another disk"),
        (lambda: disks.export(snapshot, base=disk, format=VHD), errors.UsageError, "still changes"),
        (lambda: disks.receive(snapshot, io.BytesIO(b""), format=RAW), errors.Conflict, "never changes"),
        (lambda: disks.snapshot(snapshot), errors.Conflict, "never changes"),
        (lambda: disks.destroy(disk), errors.Conflict, f"is disk hda of {vm.name}"),
        (lambda: disks.destroy(snapshot), errors.Conflict, "goes with it"),
        (lambda: disks.destroy(nothing), errors.NotFound, "there is no disk"),
        (lambda: disks.create(100), errors.UsageError, "cannot have 100 bytes"),
        (lambda: disks.create(1 << 62), errors.UsageError, "cannot have"),
    ]
    before = {one.uuid for one in disks.list()}
    for act, error, words in refused:
        with pytest.raises(error, match=words):
            act()
    assert {one.uuid for one in disks.list()} == before
    assert made.disks["hda"] in vm.tree().images
    with image_locks.held(image_of(bench, free)):
        for act in (lambda: disks.destroy(free), lambda: disks.receive(free, io.BytesIO(b""), format=RAW)):
            with pytest.raises(errors.Conflict, match="in use"):
                act()


def test_free_disk_that_a_vm_uses_is_left_alone(bench, disks) -> None:
    free = disks.create(4 * MIB)
    vm = bench.make(bench.in_place(image_of(bench, free)))
    for act in (lambda: disks.destroy(free), lambda: disks.snapshot(free)):
        with pytest.raises(errors.Conflict, match=vm.name):
            act()


def test_overlay_of_others_keeps_a_free_disk(bench, disks) -> None:
    """A VM of libvirt's own stands on a snapshot by an overlay elsewhere."""
    free = disks.create(4 * MIB)
    kept = disks.snapshot(free)
    shelf = free_disks.shelf(bench.host.root)
    overlay = bench.place / "overlay.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", shelf.path(shelf.find(kept)), "-F", "qcow2", overlay)
    bench.host.connection.define(
        "<domain type='qemu'><name>theirs</name><memory>65536</memory><os><type>hvm</type></os><devices>"
        f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{overlay}'/>"
        "<target dev='vda' bus='virtio'/></disk></devices></domain>"
    )
    with pytest.raises(errors.Conflict, match="theirs"):
        disks.destroy(kept)
    disks.destroy(free)
    assert raw_of(overlay, "qcow2") == bytes(4 * MIB)


def test_what_a_dead_import_left_goes_with_the_next_command(bench, disks) -> None:
    free = disks.create(4 * MIB)
    take(bench, free, _noise(bench), format=VHD)
    held = raw_of(image_of(bench, free), "qcow2")
    pid = os.fork()
    if pid == 0:
        try:
            with bench.open_host("root") as host:
                host.disks.receive(free, _Dying(_noise(bench).read_bytes()[: 2 * MIB]), format=VHD)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 9
    assert len(images(bench)) == 2
    assert raw_of(image_of(bench, free), "qcow2") == held
    disks.create(MIB)
    check_shelf(bench)


class _Dying(io.BytesIO):
    """A stream at whose end the process is gone."""

    def read(self, size=-1):
        data = super().read(size)
        if not data:
            os.kill(os.getpid(), 9)
        return data

    readinto = None


def _noise(bench):
    raw, path = bench.place / "noise", bench.place / "noise.vhd"
    if not path.exists():
        raw.write_bytes(os.urandom(4 * MIB))
        with vhd.RawSource(raw) as disk:
            path.write_bytes(b"".join(map(bytes, vhd.StreamWriter(disk).chunks())))
    return path
