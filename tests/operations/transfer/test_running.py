"""Disks of a VM that runs: sent as they are at one moment, snapshotted alone, and never replaced."""

from __future__ import annotations

import pytest

from hvmgr import errors
from hvmgr.host.domain import Domain, State
from hvmgr.model import tree
from hvmgr.model.metadata import SnapshotType
from hvmgr.operations.snapshot import Snapshot
from hvmgr.operations.transfer import sending
from hvmgr.storage import event_log
from tests.operations.rules.conftest import MIB
from tests.operations.transfer.conftest import RAW, VHD, by_codec, by_libvhdi, chain_of, raw_of

KINDS = ["qcow2", "raw", "vpc"]


@pytest.fixture(params=KINDS)
def running(bench, request):
    """A VM that runs, whose disk has a base of each format; its guest is us."""
    options = "force_size=on" if request.param == "vpc" else None
    image = bench.image(f"base.{request.param}", size=6, fmt=request.param, fill=(1, 2, 3), options=options)
    vm = bench.make(bench.in_place(image, format=VHD if request.param == "vpc" else None))
    vm.create_snapshot("one")
    bench.start(vm)
    yield vm
    bench.domain(vm).destroy()


def guest_writes(bench, vm, pattern, offset):
    """What the guest of a running VM writes."""
    domain = bench.domain(vm)
    (device,) = [one["qdev"] for one in domain.monitor("query-block") if one.get("inserted")]
    line = f'qemu-io -d {device} "write -P {pattern} {offset} 64k"'
    told = domain.monitor("human-monitor-command", command_line=line)
    assert "rror" not in told, told


def wanted(data, *writes):
    changed = bytearray(data)
    for pattern, offset in writes:
        changed[offset : offset + (64 << 10)] = bytes([pattern]) * (64 << 10)
    return bytes(changed)


def test_running_disk_is_sent_as_it_is_at_one_moment(bench, running) -> None:
    vm, one = running, bench.disk_of(running, snapshot="one")
    before = dict(running.now().disks)
    for wishes in ({"base": "nine"}, {"base": "one", "format": RAW}):
        with pytest.raises(errors.HvmgrError):
            running.export_disk("hda", **wishes)
    assert dict(running.now().disks) == before
    full = bench.send(vm, "full.vhd", snapshot="one")
    assert raw_of(full, "vpc") == one
    guest_writes(bench, vm, 0x22, MIB)
    now = wanted(one, (0x22, MIB))
    with vm.export_disk("hda", base="one") as stream:
        guest_writes(bench, vm, 0x33, 2 * MIB)  # after the moment
        assert vm.state() is State.RUNNING
        delta = bench.place / "delta.vhd"
        delta.write_bytes(b"".join(map(bytes, stream.chunks())))
    assert by_codec(chain_of(bench.place / "stored", full, delta)) == now == by_libvhdi(full, delta)
    assert bench.send(vm, "now.raw", format=RAW).read_bytes() == wanted(now, (0x33, 2 * MIB))
    with pytest.raises(errors.Conflict, match="is running"):
        bench.take(vm, delta)
    disks = bench.host.disks
    alone = disks.snapshot(vm.home.facts().disks[0].id)
    guest_writes(bench, vm, 0x44, 2 * MIB)
    with disks.export(alone) as stream:
        assert b"".join(map(bytes, stream.chunks())) == wanted(now, (0x33, 2 * MIB))
    disks.destroy(alone)
    assert vm.state() is State.RUNNING
    assert [one.name for one in vm.snapshots()] == ["one"]
    vm.stop(force=True)
    vm.merge()
    assert len(vm.tree().chain(vm.now().disks["hda"])) == 2
    assert bench.disk_of(vm) == wanted(now, (0x44, 2 * MIB))
    bench.check(vm)


def told_to_wait():
    documents = event_log.Reader(from_start=True).documents()
    return [one["images"] for one in documents if one["event"] == "merge-pending"]


def test_only_images_that_still_wait_in_the_end_are_told(bench, monkeypatch) -> None:
    """The running VM merges what a deletion leaves, unless something else works on it."""
    vm, disks = bench.make(4), bench.host.disks
    bench.start(vm)
    try:
        for make, delete in (
            (lambda: disks.snapshot(vm.home.facts().disks[0].id), disks.destroy),
            (lambda: vm.create_snapshot("one", type=SnapshotType.DISK_ONLY), Snapshot.delete),
        ):
            before = len(told_to_wait())
            delete(make())
            assert len(vm.tree().images) == 1
            assert len(told_to_wait()) == before
            made = make()
            with monkeypatch.context() as patched:
                patched.setattr(Domain, "has_job", lambda *_, **__: True)
                delete(made)
            assert told_to_wait()[before:] == [sorted(parent for parent, _ in tree.pending(vm.tree()))]
            vm.merge()
            assert len(told_to_wait()) == before + 1
    finally:
        bench.domain(vm).destroy()


def test_exports_at_once_leave_room_on_the_chain(bench, running, monkeypatch) -> None:
    """Each one puts an image there, for as long as whoever reads it wants: that much whoever may only look can do."""
    monkeypatch.setattr(sending, "_MOST_WAITING", 2)
    before = running.tree().depth()
    with running.export_disk("hda"), running.export_disk("hda"):
        with pytest.raises(errors.Busy, match="2 images of disk hda"):
            running.export_disk("hda")
        assert running.tree().depth() == before + 2
    with running.export_disk("hda") as stream:
        assert stream.length
    assert running.tree().depth() == before
