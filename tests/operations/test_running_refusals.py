"""What a running VM cannot have in a snapshot, and what it can have instead; firmware and buses other than virtio."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from hvmgr import errors
from hvmgr.host import guest_agent
from hvmgr.model import configuration, plan
from hvmgr.model.metadata import SavedState, SnapshotType
from hvmgr.model.specification import DiskSpecification, ImageFormat
from hvmgr.operations import quiescing

pytestmark = pytest.mark.guest

DISK = 2 << 20


def test_memory_over_a_dynamic_vhd_once_it_is_converted(make_machine, tmp_path):
    vhd = tmp_path / "base.vhd"
    command = ["qemu-img", "create", "-q", "-f", "vpc", "-o", "subformat=dynamic,force_size=on", str(vhd), str(DISK)]
    subprocess.run(command, check=True, timeout=60)
    machine = make_machine(disks=(DiskSpecification(path=vhd, format=ImageFormat.VHD),))
    with pytest.raises(errors.Unsupported, match="stands on a VHD") as failure:
        machine.vm.create_snapshot("memory")
    (slot,) = machine.vm.now().disks
    assert f"hvmgr disk convert {machine.vm.name} {slot}" in failure.value.hint
    assert "--type disk-only" in failure.value.hint
    assert machine.vm.snapshots() == []
    machine.tick()
    machine.check()

    snapshot = machine.vm.create_snapshot("disks", type=SnapshotType.DISK_ONLY)
    machine.check()
    count = machine.count_of_base(snapshot, "vpc")
    late = machine.run_for(5)
    with pytest.raises(errors.Conflict, match="memory cannot be saved") as failure:
        snapshot.apply()
    assert "--discard-state" in failure.value.hint
    assert machine.tick().memory > late.memory
    machine.check()

    snapshot.apply(discard_state=True)
    assert machine.boot() == (count,)
    machine.check()
    snapshot.delete()  # a qcow2 child never goes into a VHD, and the VHD stays its base
    assert machine.tick().memory > count
    machine.check()

    base = machine.layout.bases / f"{slot}.vhd"
    content = hashlib.sha256(base.read_bytes()).digest()
    late = machine.tick()
    assert machine.vm.convert_disk(slot)
    assert machine.tick().memory > late.memory  # it went on meanwhile
    machine.check()
    memory = machine.vm.create_snapshot("memory")
    assert memory.state is SavedState.RUNNING
    machine.run_for(5)
    memory.apply()
    assert machine.tick().memory > machine.count_of(memory)  # and it would say when its disk were of another moment
    machine.check()
    assert hashlib.sha256(base.read_bytes()).digest() == content


def test_disk_that_was_plugged_in_until_the_vm_stops(make_machine, kinds, tmp_path):
    machine = make_machine(kinds(template="generation1", firmware=None))
    first = machine.vm.create_snapshot("IDE")
    extra = machine.layout.home / "extra.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(extra), "1M"], check=True, timeout=60)
    plug = (
        f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{extra}'/>"
        "<target dev='vdz' bus='virtio'/></disk>"
    )
    machine.domain._handle().attachDeviceFlags(plug, 1)
    with pytest.raises(errors.Conflict, match="vdz is attached only until the VM stops") as failure:
        machine.vm.create_snapshot("two")
    assert "--config" in failure.value.hint
    second = machine.vm.create_snapshot("two", type=SnapshotType.DISK_ONLY)
    assert set(second.disks) == set(first.disks)
    assert "disk vdz is attached only until the VM stops: it takes no part in the snapshot" in machine.said
    assert extra in machine.domain.writable_files()
    machine.tick()
    first.apply(discard_state=True)
    assert machine.tick().memory > machine.count_of(first)
    machine.check()


def test_writable_disk_that_is_left_out_forbids_memory(make_machine, two_disks):
    machine = make_machine(two_disks, running=False)
    present = configuration.parse(machine.domain.xml(live=False), source="libvirt")
    disk = present.root.findall("devices/disk[@device='disk']")[1]
    disk.set("snapshot", "no")
    machine.host.connection.define(present.to_xml())
    machine.boot()
    with pytest.raises(errors.Conflict, match="vdb is writable and takes no part") as failure:
        machine.vm.create_snapshot("memory")
    assert "--type disk-only" in failure.value.hint
    snapshot = machine.vm.create_snapshot("disks", type=SnapshotType.DISK_ONLY)
    assert set(snapshot.disks) == {"vda"}
    machine.tick()
    machine.check()


def test_qemu_that_writes_elsewhere_than_libvirt_believes(machine):
    """As after a libvirt that died between QEMU's switch and its own note of it."""
    snapshot = machine.vm.create_snapshot("one")
    (path,) = machine.vm.now().disks.values()
    side = machine.layout.home / "side.qcow2"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", path, "-F", "qcow2", "-u", str(side), str(DISK)]
    subprocess.run(command, check=True, timeout=60)
    top = next(
        node["node-name"]
        for node in machine.domain.monitor("query-named-block-nodes", flat=True)
        if node["drv"] == "qcow2" and not node["ro"]
    )
    side.chmod(0o666)
    overlay = {"driver": "qcow2", "file": {"driver": "file", "filename": str(side)}, "backing": None}
    machine.domain.monitor("blockdev-add", node_name="side", **overlay)
    machine.domain.monitor("blockdev-snapshot", node=top, overlay="side")
    for call in (lambda: machine.vm.create_snapshot("two"), snapshot.apply):
        with pytest.raises(errors.Conflict, match="QEMU does not write to"):
            call()
    machine.tick()
    snapshot.apply(discard_state=True)
    assert machine.tick().memory > machine.count_of(snapshot)
    machine.check()


def test_start_by_somebody_in_the_middle_of_an_apply_is_refused(machine, at_step):
    refusals = []

    def start():
        with pytest.raises(errors.HvmgrError) as failure:
            machine.domain.start()
        refusals.append(str(failure.value))

    snapshot = machine.vm.create_snapshot("one")
    at_step(plan.StartFrom, before=start)
    try:
        snapshot.apply()
    except errors.HostFailed:  # libvirt may take the end of the refused QEMU for that of the next one
        machine.tick()
        machine.check()
        snapshot.apply()
    assert "lock" in refusals[0]
    assert machine.tick().memory > machine.count_of(snapshot)
    machine.check()


def test_firmware_and_tpm_state_belong_to_the_instant_of_a_snapshot(
    make_machine, kinds, require, monkeypatch, at_step, kill_at, run_and_die
):
    require(Path("/usr/share/OVMF/OVMF_CODE_4M.fd").exists(), "the package ovmf is missing")
    require(shutil.which("swtpm") is not None, "the package swtpm is missing")
    machine = make_machine(kinds(firmware=None, memory=256 << 20, tpm=True), disks=(DiskSpecification(size=DISK),))
    folder = machine.host.connection.tpm_folder(machine.vm.id)
    was = machine.vm.home.present().nvram
    order = []
    for owner, name in ((type(machine.domain), "suspend"), (type(machine.domain), "resume")):
        monkeypatch.setattr(owner, name, noting(order, getattr(owner, name)))

    def state(nvram, tpm):
        return nvram.read_bytes(), {one.name: one.read_bytes() for one in (tpm / "tpm2").iterdir()}

    def of(snapshot):
        return state(machine.layout.snapshot_nvram(snapshot.id), machine.layout.snapshot_tpm(snapshot.id))

    def change(count):
        """As a guest that writes both, once more between the first copy and the pause."""
        content = bytearray(was.read_bytes())
        content[-8:] = count.to_bytes(8, "big")
        was.write_bytes(content)
        (folder / "tpm2" / "counter").write_text(f"{count}")

    had, first = state(was, folder), machine.vm.create_snapshot("first", type=SnapshotType.DISK_ONLY)
    assert "tpm2-00.permall" in had[1]
    assert of(first) == had
    assert order == ["suspend", "resume"]
    order.clear()

    at_step(plan.Suspend, before=lambda: change(1))
    disks = machine.vm.create_snapshot("disks", type=SnapshotType.DISK_ONLY)
    assert of(disks) == state(was, folder)
    assert of(disks)[1]["counter"] == b"1"
    assert of(disks)[0][-1] == 1
    order.clear()

    # With its agent's help its file systems rest before it is paused. No agent is in this guest: see test_running_production.
    monkeypatch.setattr(quiescing, "find_obstacle", lambda *_: None)
    monkeypatch.setattr(guest_agent, "freeze", lambda _: order.append("freeze") or 1)
    monkeypatch.setattr(guest_agent, "thaw", lambda _, **__: order.append("thaw"))
    at_step(plan.Suspend, before=lambda: change(2))
    production = machine.vm.create_snapshot("production", type=SnapshotType.PRODUCTION)
    assert of(production) == state(was, folder)
    assert of(production)[1]["counter"] == b"2"
    assert order == ["freeze", "suspend", "resume", "thaw"]

    at_step(plan.Suspend, before=lambda: change(3))
    memory = machine.vm.create_snapshot("memory")
    assert (memory.state, machine.state()) == (SavedState.RUNNING, "running")
    assert of(memory) == state(was, folder)
    assert of(memory)[1]["counter"] == b"3"
    machine.check()

    kill_at(plan.Suspend, after=True)
    run_and_die(machine.vm.create_snapshot, "cut off", type=SnapshotType.DISK_ONLY)
    assert machine.state() == "paused"
    machine.vm.now()
    assert machine.state() == "running"
    machine.check()

    machine.domain.destroy()
    was.write_bytes(b"\xff" * was.stat().st_size)
    memory.apply()
    assert machine.tick().memory > machine.count_of(memory)
    now = machine.vm.home.present().nvram
    assert now != was
    assert now.read_bytes()[:-8] == of(memory)[0][:-8]  # QEMU writes the NVRAM that its memory holds, so not our change
    machine.check()
    for snapshot, how in ((disks, {}), (production, {}), (first, {}), (memory, {"without_state": True})):
        snapshot.apply(discard_state=True, keep_undo=False, **how)
        assert machine.state() == "off"
        assert state(machine.vm.home.present().nvram, folder) == of(snapshot)
    machine.check()


def noting(order, real):
    def noted(domain):
        order.append(real.__name__)
        real(domain)

    return noted
