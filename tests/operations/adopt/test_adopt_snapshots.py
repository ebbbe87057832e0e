"""libvirt's external snapshots become hvmgr's: names, times, tree, memory, bytes."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from hvmgr import errors
from hvmgr.model import plan
from hvmgr.model.metadata import SavedState, SnapshotType

pytestmark = pytest.mark.libvirtd


def names_by_parent(vm):
    names = {one.id: one.name for one in vm.snapshots()} | {None: None}
    return {one.name: names[one.parent] for one in vm.snapshots()}, names[vm.now().parent]


def test_three_disk_only_snapshots_and_the_present(place):
    place.define("web", ("vda", "qcow2", place.image("a.qcow2", fill=1)))
    before = datetime.now(UTC).replace(microsecond=0)
    for number, name in enumerate(("one", "two", "three"), 1):
        place.virsh("snapshot-create-as", "web", name, f"description of {name}", "--disk-only")
        place.write("web", number + 1, number)
    vm = place.host.adopt("web")
    assert names_by_parent(vm) == ({"one": None, "two": "one", "three": "two"}, "three")
    for number, one in enumerate(vm.snapshots()):
        assert one.notes == f"description of {one.name}"
        assert before <= one.created <= datetime.now(UTC)
        assert (one.state, one.type) == (SavedState.NONE, SnapshotType.STANDARD)
        assert place.seen(one)["vda"][:5] == [1, *range(2, number + 2), *[0] * (4 - number)]
    assert place.now(vm)["vda"][:5] == [1, 2, 3, 4, 0]
    assert place.snapshots("web") == []
    assert vm.now().disks == {"vda": str(place.folder / "a.three")}
    place.check(vm)


def test_snapshots_are_applied_deleted_and_created_afterwards(place):
    place.define("web", ("vda", "qcow2", place.image("a.qcow2", fill=1)))
    for number, name in enumerate(("one", "two", "three"), 1):
        place.virsh("snapshot-create-as", "web", name, "--disk-only")
        place.write("web", number + 1, number)
    vm = place.host.adopt("web")
    vm.snapshot("one").apply()
    assert place.now(vm)["vda"][:4] == [1, 0, 0, 0]
    vm.undo()
    assert place.now(vm)["vda"][:4] == [1, 2, 3, 4]
    vm.undo()
    place.write("web", 9, 5)
    vm.create_snapshot("branch")
    vm.snapshot("two").delete()
    assert place.seen(vm.snapshot("three"))["vda"][:6] == [1, 2, 3, 0, 0, 0]
    assert place.seen(vm.snapshot("branch"))["vda"][:6] == [1, 0, 0, 0, 0, 9]
    assert {path.name for path in place.folder.glob("a.*")} == {"a.qcow2", "a.one", "a.two", "a.three"}
    vm.snapshot("three").apply()
    place.virsh("start", "web")
    assert place.now(vm)["vda"][:6] == [1, 2, 3, 0, 0, 0]
    place.check(vm)


def test_a_running_vm_with_memory_and_two_disks(place):
    place.define(
        "web",
        ("vda", "qcow2", place.image("a.qcow2", fill=1)),
        ("vdb", "raw", place.image("b.img", "raw", fill=0x11)),
        devices="<serial type='pty'/>",
    )
    place.virsh("start", "web")
    place.virsh("snapshot-create-as", "web", "disks", "--disk-only")
    place.write("web", 2, 1)
    place.write("web", 0x12, 1, slot="vdb")
    domain = place.domain("web")
    domain.monitor("human-monitor-command", command_line="o /b 0x3ff 0x5a")
    memory = place.folder / "memory.state"
    place.virsh("snapshot-create-as", "web", "memory", "--memspec", memory)
    identity = memory.stat().st_ino
    place.write("web", 3, 2)
    domain.monitor("human-monitor-command", command_line="o /b 0x3ff 0x77")
    pid = domain.monitor("query-status")
    vm = place.host.adopt("web")
    assert domain.monitor("query-status") == pid
    assert names_by_parent(vm) == ({"disks": None, "memory": "disks"}, "memory")
    disks, with_memory = vm.snapshots()
    assert (disks.state, disks.type) == (SavedState.NONE, SnapshotType.DISK_ONLY)
    assert (with_memory.state, with_memory.type) == (SavedState.RUNNING, SnapshotType.STANDARD)
    assert not memory.exists()
    assert vm.home.layout.memory(with_memory.id).stat().st_ino == identity  # not copied
    place.write("web", 4, 3)
    place.check(vm)
    later = vm.create_snapshot("ours")
    with_memory.apply()
    assert str(vm.state()) == "running"
    answer = domain.monitor("human-monitor-command", command_line="i /b 0x3ff")
    assert "0x5a" in answer
    assert place.now(vm) == {"vda": [1, 2] + [0] * 14, "vdb": [0x11, 0x12] + [0] * 14}
    later.apply()
    assert "0x77" in domain.monitor("human-monitor-command", command_line="i /b 0x3ff")
    assert place.now(vm)["vda"][:5] == [1, 2, 3, 4, 0]
    place.check(vm)


def test_a_branch_that_was_made_by_hand(place):
    """virsh define onto an older image, and a snapshot there, which libvirt hangs on the last one that it knew."""
    base = place.image("a.qcow2", fill=1)
    place.define("web", ("vda", "qcow2", base))
    for number, name in enumerate(("one", "two", "three"), 1):
        place.virsh("snapshot-create-as", "web", name, "--disk-only")
        place.write("web", number + 1, number)
    tip, branch = place.folder / "a.three", place.image("branch.qcow2", below=base)
    place.edit("web", lambda text: text.replace(str(tip), str(branch)))
    place.write("web", 0x44, 4)
    place.virsh("snapshot-create-as", "web", "left", "--disk-only")
    place.write("web", 0x55, 5)
    vm = place.host.adopt("web")
    assert names_by_parent(vm) == ({"one": None, "two": "one", "three": "two", "left": "one"}, "left")
    assert any("'left' below 'three'; by its images it is below 'one'" in one for one in place.said)
    assert any(str(tip) in one and "'three'" in one for one in place.said)
    assert place.seen(vm.snapshot("three"))["vda"][:6] == [1, 2, 3, 0, 0, 0]
    assert place.seen(vm.snapshot("left"))["vda"][:6] == [1, 0, 0, 0, 0x44, 0]
    assert place.now(vm)["vda"][:6] == [1, 0, 0, 0, 0x44, 0x55]
    vm.snapshot("three").apply()
    assert place.now(vm)["vda"][:6] == [1, 2, 3, 0, 0, 0]
    place.check(vm)


def test_memory_on_another_file_system_is_copied(place):
    memory = Path(f"/dev/shm/hvmgr-test-{os.getpid()}")
    place.define("web", ("vda", "qcow2", place.image("a.qcow2")))
    place.virsh("start", "web")
    try:
        place.virsh("snapshot-create-as", "web", "one", "--memspec", memory)
        saved = memory.read_bytes()
        vm = place.host.adopt("web")
        assert not memory.exists()
    finally:
        memory.unlink(missing_ok=True)
    (one,) = vm.snapshots()
    assert vm.home.layout.memory(one.id).read_bytes() == saved


def test_name_that_is_none_here_is_changed_and_kept_in_the_notes(place):
    place.define("web", ("vda", "qcow2", place.image("a.qcow2")))
    long = "x" * 150
    place.virsh("snapshot-create-as", "web", long, "text", "--disk-only")
    (one,) = place.host.adopt("web").snapshots()
    assert one.name == long[:100]
    assert one.notes == f"{long}\ntext"


def test_internal_snapshots_are_listed_and_refused(place):
    place.define("web", ("vda", "qcow2", place.image("a.qcow2", fill=1)))
    for name in ("first", "second"):
        place.virsh("snapshot-create-as", "web", name)
    before = place.state_of("web")
    with pytest.raises(errors.Unsupported, match="first, second") as failure:
        place.host.adopt("web")
    assert "--convert-internal" in failure.value.hint
    assert place.state_of("web") == before
    assert not (place.folder / "homes" / "web").exists()


def test_internal_snapshots_that_libvirt_does_not_know_are_refused(place):
    path = place.image("a.qcow2", fill=1)
    place.run("qemu-img", "snapshot", "-c", "old", path)
    place.define("web", ("vda", "qcow2", path))
    before = place.state_of("web")
    with pytest.raises(errors.Unsupported, match=r"a\.qcow2 has internal snapshots: old") as failure:
        place.host.adopt("web")
    assert "qemu-img snapshot -d" in failure.value.hint
    assert place.state_of("web") == before


def test_snapshot_that_leaves_a_disk_out_is_refused_or_left_out_for_good(place):
    disks = [(slot, "qcow2", place.image(f"{slot}.qcow2", fill=1)) for slot in ("vda", "vdb")]
    place.define("web", *disks)
    place.virsh("snapshot-create-as", "web", "half", "--disk-only", "--diskspec", "vdb,snapshot=no")
    with pytest.raises(errors.Unsupported, match="'half' of web does not hold disk vdb") as failure:
        place.host.adopt("web")
    assert "--exclude-disk vdb" in failure.value.hint
    from hvmgr import AdoptOptions

    vm = place.host.adopt("web", AdoptOptions(exclude_disks=("vdb",)))
    place.write("web", 5, 1, slot="vdb")
    vm.snapshot("half").apply()
    assert dict(vm.now().disks).keys() == {"vda"}
    assert place.bytes_of(disks[1][2], "qcow2")[:2] == [1, 5]
    place.check(vm)


def test_missing_image_of_a_snapshot_is_named(place):
    place.define("web", ("vda", "qcow2", place.image("a.qcow2", fill=1)))
    for name in ("one", "two"):
        place.virsh("snapshot-create-as", "web", name, "--disk-only")
    (place.folder / "a.one").rename(place.folder / "elsewhere")
    before = place.state_of("web")
    with pytest.raises(errors.Corrupt, match=r"a\.one is missing"):
        place.host.adopt("web")
    assert place.state_of("web") == before


def test_missing_memory_is_named(place):
    place.define("web", ("vda", "qcow2", place.image("a.qcow2")))
    place.virsh("start", "web")
    memory = place.folder / "memory.state"
    place.virsh("snapshot-create-as", "web", "one", "--memspec", memory)
    memory.unlink()
    with pytest.raises(errors.Corrupt, match=r"memory of libvirt's snapshot 'one' of web.*memory\.state") as failure:
        place.host.adopt("web")
    assert "virsh snapshot-delete web one --metadata" in failure.value.hint


def test_present_that_writes_to_a_frozen_image_is_refused(place):
    base = place.image("a.qcow2", fill=1)
    place.define("web", ("vda", "qcow2", base))
    place.virsh("snapshot-create-as", "web", "one", "--disk-only")
    place.edit("web", lambda text: text.replace(str(place.folder / "a.one"), str(base)))
    before = place.state_of("web")
    with pytest.raises(errors.Conflict, match="libvirt's snapshot 'one' needs unchanged") as failure:
        place.host.adopt("web")
    assert f"qemu-img create -f qcow2 -b '{base}'" in failure.value.hint
    assert place.state_of("web") == before


@pytest.mark.parametrize("running", [False, True])
def test_snapshot_that_somebody_takes_meanwhile_is_not_lost(place, at_step, running):
    """The configuration that was read before would put the VM back on an image that is frozen now."""
    place.define("web", ("vda", "qcow2", place.image("a.qcow2", fill=1)))
    place.virsh("snapshot-create-as", "web", "one", "--disk-only")
    if running:
        place.virsh("start", "web")
    at_step(plan.MakeSnapshotFolder, before=lambda: place.virsh("snapshot-create-as", "web", "two", "--disk-only"))
    with pytest.raises(errors.Conflict, match="changed by somebody else meanwhile"):
        place.host.adopt("web")
    assert place.snapshots("web") == ["one", "two"]
    assert not (place.folder / "homes" / "web").exists()
    vm = place.host.adopt("web")
    assert [one.name for one in vm.snapshots()] == ["one", "two"]
    place.check(vm)
