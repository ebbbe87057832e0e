"""The states and operations that ``crash.py`` kills: one VM, ``web``, in every shape in which images have users."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import crash
from crash import Shape, set_memory, specification, write_off, write_running
from lxml import etree

import hvmgr
from hvmgr import errors, settings
from hvmgr.host import background_snapshot, process
from hvmgr.operations import merge, working
from hvmgr.operations.exchange import converting
from hvmgr.operations.inside import writing
from hvmgr.operations.steps import execution
from hvmgr.storage import reserve
from tests.storage.test_partitions import Memory, put_gpt


def off(host, *sizes):
    """A VM with one byte pattern on each disk."""
    vm = host.create_vm(specification(*sizes))
    without_screen(host)
    write_off(host, 0x10)
    for number, slot in enumerate(sorted(vm.now().disks)[1:], 1):
        write_off(host, 0x10 + number, slot=slot)
    return vm


def without_screen(host):
    """The VM starts sooner, and asks the machine for no port."""
    root = etree.fromstring(host.connection.find_domain_by_name(NAME).xml(live=False))
    devices = root.find("devices")
    for device in [*devices.findall("graphics"), *devices.findall("video"), *devices.findall("channel")]:
        devices.remove(device)
    host.connection.define(etree.tostring(root, encoding="unicode"))
    host.vm(NAME).stop(force=True)


def take(host, name, pattern, offset="64k"):
    """A snapshot, and another pattern in the present afterwards."""
    host.vm(NAME).create_snapshot(name)
    write_off(host, pattern, offset)


NAME = crash.NAME
SLOT = "hda"  # of the only disk


def line(host, *, disks=1):
    """Three snapshots in a row and the present, each with bytes of its own."""
    off(host, *[crash.DISK] * disks)
    for number, name in enumerate(("one", "two", "three"), 2):
        take(host, name, 0x10 * number, f"{64 * number}k")


def forked_tree(host):
    """one < two < three, and one < left < (now): the undo slot is full."""
    line(host)
    host.vm(NAME).snapshot("one").apply()
    write_off(host, 0x66, "128k")
    take(host, "left", 0x77, "192k")


def partitioned(host):
    """A GPT with one partition in the first half of the disk, above a snapshot."""
    off(host)
    take(host, "one", 0x20, "128k")
    disk = Memory(crash.DISK)
    put_gpt(disk, [(128, 255, "data")])
    with tempfile.NamedTemporaryFile(prefix="hv", dir="/tmp") as table:
        for start, length in ((0, 34 * 512), (crash.DISK - 33 * 512, 33 * 512)):
            Path(table.name).write_bytes(disk.data[start : start + length])
            command = ["qemu-io", "-f", "qcow2", "-c", f"write -s {table.name} {start} {length}"]
            subprocess.run([*command, vm(host).now().disks["hda"]], check=True, capture_output=True, timeout=60)


def big(host, *, below, above):
    """Three snapshots, of which the second and the third hold this many MiB."""
    host.create_vm(specification(32 << 20))
    without_screen(host)
    write_off(host, 0x10)
    for name, size in (("one", below), ("two", above), ("three", 0)):
        vm(host).create_snapshot(name)
        if size:
            path = vm(host).now().disks["hda"]
            command = ["qemu-io", "-f", "qcow2", "-c", f"write -P {size} {size}M {size}M", path]
            subprocess.run(command, check=True, capture_output=True, timeout=60)


def with_undo(host):
    """two snapshots; the present was put away by an apply."""
    off(host)
    take(host, "one", 0x20)
    take(host, "two", 0x30, "128k")
    host.vm(NAME).snapshot("one").apply()
    write_off(host, 0x40, "192k")


def with_memory(host):
    """A snapshot with memory (0xA1) between two without, and an own present; the undo slot is full."""
    off(host)
    take(host, "one", 0x20)
    running(host)
    vm(host).create_snapshot("memory")
    write_running(host, 0x30, "192k")
    vm(host).stop(force=True)
    take(host, "two", 0x40, "256k")
    snapshot(host, "one").apply()
    write_off(host, 0x44, "320k")


def other_disks(host):
    """A snapshot of two disks, a present of one and a larger one."""
    off(host, crash.DISK, crash.DISK)
    take(host, "both", 0x20)
    domain = host.connection.find_domain_by_name(NAME)
    root = etree.fromstring(domain.xml(live=False))
    (gone,) = [disk for disk in root.findall("devices/disk") if disk.find("target").get("dev") == "hdb"]
    gone.getparent().remove(gone)
    host.connection.define(etree.tostring(root, encoding="unicode"))
    take(host, "single", 0x30, "128k")


def pending(host):
    """An unnamed image that waits: its snapshot was deleted while the VM ran."""
    line(host)
    vm(host).start()
    delete_alone("two")(host)
    delete_alone("three")(host)
    vm(host).stop(force=True)


def lay_over(host, name, pattern, offset):
    """What a backup tool does: an overlay of its own on the working image, in which the VM goes on."""
    path, below = host.root.parent / "outside" / name, vm(host).now().disks["hda"]
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", str(path)]
    subprocess.run(command, check=True, timeout=60)
    path.chmod(0o640)
    domain = host.connection.find_domain_by_name(NAME)
    host.connection.define(domain.xml(live=False).replace(below, str(path)))
    vm(host).stop(force=True)
    write_off(host, pattern, offset)


def of_others(host):
    """Two overlays of others that nothing names any more, and one that is the present."""
    off(host)
    take(host, "one", 0x20)
    lay_over(host, "first.qcow2", 0x30, "128k")
    take(host, "two", 0x40, "192k")
    lay_over(host, "second.qcow2", 0x50, "256k")
    lay_over(host, "third.qcow2", 0x60, "320k")
    snapshot(host, "two").delete()


def merge_by_name(host):
    outside = host.root.parent / "outside"
    vm(host).merge([outside / "first.qcow2", outside / "second.qcow2"])


def running(host):
    """The VM runs, with bytes of its own on the disk and in memory."""
    vm(host).start()
    write_running(host, 0x50, "384k")
    set_memory(host, 0xA1)


def running_late(host):
    """As ``running``, with other bytes."""
    vm(host).start()
    write_running(host, 0x60, "448k")
    set_memory(host, 0xB2)


def paused(host):
    running(host)
    host.connection.find_domain_by_name(NAME).suspend()


def saved(host):
    running_late(host)
    host.connection.find_domain_by_name(NAME).managed_save()


def source_image(host):
    """A golden image beside the homes."""
    path = host.root.parent / "outside" / "gold.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(crash.DISK)], check=True, timeout=60)
    subprocess.run(["qemu-io", "-c", "write -P 0x99 0 64k", str(path)], check=True, timeout=60, capture_output=True)
    path.chmod(0o600)


def create(host, **disk):
    if disk:
        disk["path"] = host.root.parent / "outside" / "gold.qcow2"
    chosen = (hvmgr.DiskSpecification(**disk),) if disk else (hvmgr.DiskSpecification(size=crash.DISK),)
    host.create_vm(specification(disks=chosen))


def in_place(host):
    """A VM on an image outside its home, with a snapshot."""
    source_image(host)
    create(host, in_place=True)
    without_screen(host)
    take(host, "one", 0x20)


def virsh(*words):
    subprocess.run(
        ["virsh", "-q", "-c", "qemu:///system", *map(str, words)], check=True, timeout=60, capture_output=True
    )


def write_plain(host, pattern, at):
    """What the guest of a VM that hvmgr does not know writes while it is off."""
    domain = host.connection.find_domain_by_name(NAME)
    path = etree.fromstring(domain.xml(live=False)).find("devices/disk/source").get("file")
    command = ["qemu-io", "-f", "qcow2", "-c", f"write -P {pattern} {64 * at}k 64k", path]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def not_ours(host):
    """A VM of libvirt's own with three snapshots, the second with memory; each present has bytes of its own."""
    folder = host.root.parent / "outside"
    image = folder / "a.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), str(crash.DISK)], check=True, timeout=60)
    (folder / "web.xml").write_text(
        f"<domain type='qemu'><name>{NAME}</name><memory unit='MiB'>16</memory><os><type machine='pc'>hvm</type></os>"
        f"<devices><disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{image}'/>"
        "<target dev='hda' bus='ide'/></disk><controller type='usb' model='none'/><memballoon model='none'/></devices>"
        "</domain>"
    )
    virsh("define", folder / "web.xml")
    write_plain(host, 0x10, 0)
    virsh("snapshot-create-as", NAME, "one", "text of one", "--disk-only")
    write_plain(host, 0x20, 1)
    virsh("start", NAME)
    virsh("snapshot-create-as", NAME, "two", "--memspec", folder / "two.memory")
    virsh("destroy", NAME)
    write_plain(host, 0x30, 2)
    virsh("snapshot-create-as", NAME, "three", "--disk-only")
    write_plain(host, 0x40, 3)


def not_ours_inside(host):
    """A VM of libvirt's own with two internal snapshots."""
    folder = host.root.parent / "outside"
    image = folder / "a.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), str(crash.DISK)], check=True, timeout=60)
    (folder / "web.xml").write_text(
        f"<domain type='qemu'><name>{NAME}</name><memory unit='MiB'>16</memory><os><type machine='pc'>hvm</type></os>"
        f"<devices><disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{image}'/>"
        "<target dev='hda' bus='ide'/></disk><controller type='usb' model='none'/><memballoon model='none'/></devices>"
        "</domain>"
    )
    virsh("define", folder / "web.xml")
    for number, name in enumerate(("one", "two"), 1):
        write_plain(host, 0x10 * number, number)
        virsh("snapshot-create-as", NAME, name)
    write_plain(host, 0x40, 3)


def not_ours_running(host):
    virsh("start", NAME)
    write_running(host, 0x50, "384k")


def adopt(host, **options):
    host.adopt(NAME, hvmgr.AdoptOptions(**options))


def adopt_elsewhere(host):
    adopt(host, home=host.root.parent / "outside" / "home")


def vm(host):
    return host.vm(NAME)


def snapshot(host, name):
    return host.vm(NAME).snapshot(name)


def apply(name, **how):
    return lambda host: snapshot(host, name).apply(**how)


def delete(name, **how):
    return lambda host: snapshot(host, name).delete(**how)


def delete_on_a_full_disk(name):
    """A deletion that gives the reserve up, and cannot make it again."""

    def act(host):
        original, reserve.is_needed = reserve.is_needed, lambda _: True
        try:
            snapshot(host, name).delete()
        finally:
            reserve.is_needed = original

    return act


def delete_alone(name):
    """A deletion that leaves what the running VM has open unmerged, as a kill right after it does."""

    def act(host):
        original, merge.merge_live = merge.merge_live, lambda *_: None
        try:
            snapshot(host, name).delete()
        finally:
            merge.merge_live = original

    return act


def live_merge(setup, name, live=None):
    return Shape(setup, delete(name), live=live or running, middle=delete_alone(name))


def branch(host):
    """A line with a branch: on the third snapshot's image stand a fourth's and the present's."""
    line(host)
    take(host, "four", 0x50, "320k")
    snapshot(host, "three").apply(keep_undo=False)
    write_off(host, 0x66, "128k")


def single(host, *, disks=1):
    """One snapshot, and an own present."""
    off(host, *[crash.DISK] * disks)
    take(host, "one", 0x20)


def new_without_memory(host, **how):
    """QEMU refuses at the very last moment, when the disks were switched already."""

    def refuse(_domain):
        raise errors.HostFailed("QEMU refused")

    original, background_snapshot.start = background_snapshot.start, refuse
    try:
        new(host, **how)
    finally:
        background_snapshot.start = original


def new(host, **how):
    return vm(host).create_snapshot("new", **how)


def unplug(host):
    """What was asked to be thrown away does not come back."""
    host.connection.find_domain_by_name(NAME).destroy()


def two_disks(host):
    off(host, crash.DISK, crash.DISK)


def with_overlay(host):
    """Somebody put an overlay on the working image."""
    line(host)
    working = Path(vm(host).now().disks[SLOT])
    overlay = working.with_suffix(".theirs")
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", working, "-F", "qcow2", overlay]
    subprocess.run(command, check=True, timeout=60)
    overlay.chmod(0o600)
    point(host, overlay)


def gone_on_in_frozen(host):
    """Somebody committed the working image into the frozen one below it, and the VM went on there."""
    line(host)
    point(host, Path(snapshot(host, "three").disks[SLOT]), write=True)


def pulled(host):
    """Somebody pulled everything below into the working image."""
    line(host)
    working = vm(host).now().disks[SLOT]
    below = snapshot(host, "three").disks[SLOT]
    command = ["qemu-img", "convert", "-f", "qcow2", "-O", "qcow2", working, f"{working}.new"]
    subprocess.run(command, check=True, timeout=60)
    Path(f"{working}.new").rename(working)
    Path(working).chmod(0o600)
    assert Path(below).exists()


def committed(host):
    """Somebody ran qemu-img commit on the working image."""
    line(host)
    subprocess.run(["qemu-img", "commit", "-q", "-f", "qcow2", vm(host).now().disks[SLOT]], check=True, timeout=60)


def point(host, path, *, write=False):
    """What virsh edit does to the disk's source."""
    if write:
        path.chmod(0o600)
        command = ["qemu-io", "-f", "qcow2", "-c", "write -P 0x99 256k 64k", str(path)]
        subprocess.run(command, check=True, timeout=60, capture_output=True)
    xml = host.connection.find_domain_by_name(NAME).xml(live=False)
    host.connection.define(xml.replace(vm(host).now().disks[SLOT], str(path)))


def look(host):
    """Home and libvirt are brought together, and nothing else."""
    with working.on(vm(host)):
        pass


def stream(host, name, **wishes):
    """A stream of the disk, beside the homes."""
    path = host.root.parent / "outside" / name
    with vm(host).export_disk(SLOT, **wishes) as sent:
        path.write_bytes(b"".join(map(bytes, sent.chunks())))


def with_streams(host):
    """Three snapshots; a full stream of the first, a delta from the second to the third, and a present on the second."""
    line(host)
    stream(host, "full.vhd", snapshot="one")
    stream(host, "delta.vhd", snapshot="three", base="two")
    snapshot(host, "two").apply()
    vm(host).create_snapshot("here")


def take_in(name):
    def act(host):
        with (host.root.parent / "outside" / name).open("rb") as file:
            vm(host).import_disk(SLOT, file, format=hvmgr.ImageFormat.VHD)

    return act


def with_disk_snapshot(host):
    """A snapshot of the disk alone, below the present and a snapshot."""
    line(host)
    snapshot_disk(host)
    write_off(host, 0x50, "320k")
    vm(host).create_snapshot("four")


def snapshot_disk(host):
    host.disks.snapshot(vm(host).home.facts().disks[0].id)


def destroy_disk_snapshot(host):
    (alone,) = [one.uuid for one in host.disks.list() if one.kind == "disk-snapshot"]
    host.disks.destroy(alone)


def with_files(host):
    """A disk that is an ext2, above a snapshot."""
    off(host)
    take(host, "one", 0x20, "128k")
    with tempfile.NamedTemporaryFile(prefix="hv", dir="/tmp") as part:
        Path(part.name).write_bytes(bytes(crash.DISK))
        fixed = ["-U", "7f1ec9e6-4ddf-4a9c-9f3c-1d2c3b4a5968", "-E", "hash_seed=7f1ec9e6-4ddf-4a9c-9f3c-1d2c3b4a5968"]
        subprocess.run(["mke2fs", "-q", "-F", *fixed, part.name], check=True, timeout=60)
        command = ["qemu-io", "-f", "qcow2", "-c", f"write -s {part.name} 0 {crash.DISK}"]
        subprocess.run([*command, vm(host).now().disks[SLOT]], check=True, capture_output=True, timeout=60)
    settings.own_runtime_folder().mkdir(mode=0o711, parents=True, exist_ok=True)  # which only the first one makes
    file = host.root.parent / "outside" / "file"
    file.write_text("put\n")
    os.utime(file, (5, 5))


def put_files(host):
    """At a moment that is always the same, for the disk has it in it."""
    clean, ours = process._environment, writing.time
    process._environment = lambda: {**clean(), "E2FSPROGS_FAKE_TIME": "1600000000"}
    writing.time = SimpleNamespace(time_ns=lambda: 1_600_000_000 * 10**9)
    try:
        vm(host).put_files([host.root.parent / "outside" / "file"], b"/", name="put")
    finally:
        process._environment, writing.time = clean, ours


TRANSFERS = {
    "put-files": Shape(with_files, put_files),
    "import-disk": Shape(with_streams, take_in("full.vhd")),
    "import-delta": Shape(with_streams, take_in("delta.vhd")),
    "snapshot-disk": Shape(line, snapshot_disk),
    "snapshot-disk-running": Shape(line, snapshot_disk, live=running),
    "destroy-disk-snapshot": Shape(with_disk_snapshot, destroy_disk_snapshot),
}


def on_vhd(host):
    """A forked tree on a VHD in the home; the undo slot is full."""
    path = host.root.parent / "outside" / "base.vhd"
    command = ["qemu-img", "create", "-q", "-f", "vpc", "-o", "force_size=on", str(path), str(crash.DISK)]
    subprocess.run(command, check=True, timeout=60)
    command = ["qemu-io", "-f", "vpc", "-c", "write -P 0x99 0 64k", str(path)]
    subprocess.run(command, check=True, timeout=60, capture_output=True)
    host.create_vm(specification(disks=(hvmgr.DiskSpecification(path=path),)))
    without_screen(host)


def forked_on_vhd(host):
    on_vhd(host)
    take(host, "one", 0x20, "128k")
    take(host, "two", 0x30, "192k")
    snapshot(host, "one").apply()
    write_off(host, 0x44, "320k")


def convert(host):
    vm(host).convert_disk(SLOT)


def pull(host):
    """What a kill leaves that comes after the data was pulled and before anything else."""
    host.connection.find_domain_by_name(NAME).pull(SLOT)
    look(host)


def go_on(host):
    """The first part of a conversion while the VM writes to the VHD itself."""
    with working.on(vm(host)) as session:
        execution.run(session, converting.plan_go_on(session, SLOT))


FOREIGN = {
    "foreign-overlay": Shape(with_overlay, new, middle=look, foreign=True),
    "foreign-commit": Shape(gone_on_in_frozen, new, middle=look, foreign=True),
    "foreign-commit-paused": Shape(
        gone_on_in_frozen, lambda host: new(host, type="disk-only"), live=paused, middle=look, foreign=True
    ),
    "foreign-commit-below": Shape(committed, new, middle=look, foreign=True),
    "foreign-pull": Shape(pulled, new, middle=look, foreign=True),
}

CHANGES = {
    "create-off": Shape(off, lambda host: new(host, notes="noted")),
    "create-undo-full": Shape(with_undo, new),
    "create-two-disks": Shape(two_disks, new),
    "apply-off": Shape(line, apply("one")),
    "apply-undo-full": Shape(with_undo, apply("two")),
    "apply-no-undo": Shape(with_undo, apply("two", keep_undo=False)),
    "apply-snapshot-first": Shape(
        line, apply("one", snapshot_first=True), middle=lambda host: vm(host).create_snapshot()
    ),
    "apply-other-disks": Shape(other_disks, apply("both")),
    "undo": Shape(with_undo, lambda host: vm(host).undo()),
    "rename": Shape(line, lambda host: vm(host).rename("other")),
}

WHOLES = {
    "vm-create": Shape(lambda host: None, create, again=True),
    "vm-create-copy": Shape(source_image, lambda host: create(host, in_place=False), again=True),
    "vm-create-in-place": Shape(source_image, lambda host: create(host, in_place=True), again=True),
    "vm-adopt": Shape(not_ours, adopt, again=True),
    "vm-adopt-elsewhere": Shape(not_ours, adopt_elsewhere, again=True),
    "vm-adopt-convert": Shape(not_ours_inside, lambda host: adopt(host, internal="convert"), again=True),
    "vm-adopt-drop": Shape(not_ours_inside, lambda host: adopt(host, internal="drop"), again=True),
    "vm-release": Shape(forked_tree, lambda host: vm(host).release()),
    "vm-release-flatten": Shape(forked_tree, lambda host: vm(host).release(flatten=True)),
    "vm-release-in-place": Shape(in_place, lambda host: vm(host).release()),
    "vm-delete": Shape(forked_tree, lambda host: vm(host).delete()),
    "vm-delete-with-disks": Shape(forked_tree, lambda host: vm(host).delete(with_disks=True)),
    "vm-delete-saved": Shape(line, lambda host: vm(host).delete(), live=saved),
    "vm-delete-in-place": Shape(in_place, lambda host: vm(host).delete()),
}

MERGES = {
    "delete-leaf": Shape(forked_tree, delete("three")),
    "delete-with-the-reserve": Shape(forked_tree, delete_on_a_full_disk("three")),
    "delete-middle": Shape(line, delete("two")),
    "delete-two-children": Shape(forked_tree, delete("one")),
    "delete-root": Shape(line, delete("one")),
    "delete-above-now": Shape(line, delete("three")),
    "delete-subtree": Shape(forked_tree, delete("two", subtree=True)),
    "delete-everything": Shape(forked_tree, delete("one", subtree=True)),
    "delete-two-disks": Shape(lambda host: line(host, disks=2), delete("two")),
    "delete-in-place": Shape(in_place, delete("one")),
    "delete-state": Shape(with_memory, delete("memory", state_only=True)),
    "merge-by-name": Shape(of_others, merge_by_name),
    "merge-pending": Shape(pending, lambda host: vm(host).merge()),
}

# Cut off between the switch and the stream, a snapshot has its disks alone.
LIVE = {
    "live-create": Shape(
        with_undo,
        lambda host: new(host, fallback=False),
        live=running,
        middle=lambda host: new_without_memory(host, fallback=False),
    ),
    "live-create-compressed": Shape(
        two_disks,
        lambda host: new(host, fallback=False, compress=True),
        live=running,
        middle=lambda host: new_without_memory(host, fallback=False),
    ),
}

RUNNING = {
    "running-release": Shape(with_memory, lambda host: vm(host).release(), live=running_late),
    "saved-release": Shape(with_memory, lambda host: vm(host).release(), live=saved),
    "running-adopt": Shape(not_ours, adopt, live=not_ours_running, again=True),
    "running-create": Shape(with_undo, new, live=running, middle=new_without_memory),
    "running-create-disk-only": Shape(with_undo, lambda host: new(host, type="disk-only"), live=running),
    "running-create-two-disks": Shape(two_disks, new, live=running, middle=new_without_memory),
    "paused-create": Shape(off, new, live=paused),
    "saved-create": Shape(with_undo, new, live=saved),
    "saved-create-disk-only": Shape(off, lambda host: new(host, type="disk-only"), live=saved),
    "apply-memory": Shape(with_memory, apply("memory")),
    "apply-memory-without": Shape(with_memory, apply("memory", without_state=True)),
    "running-apply": Shape(with_memory, apply("two"), live=running_late),
    "running-apply-memory": Shape(with_memory, apply("memory"), live=running_late),
    "running-apply-discard": Shape(with_memory, apply("memory", discard_state=True), live=running_late, middle=unplug),
    "paused-apply-memory": Shape(with_memory, apply("memory"), live=paused),
    "saved-apply": Shape(with_memory, apply("two"), live=saved),
    "saved-apply-memory": Shape(with_memory, apply("memory"), live=saved),
    "running-undo": Shape(with_memory, lambda host: vm(host).undo(), live=running_late),
    "running-convert": Shape(forked_on_vhd, convert, live=running, middle=pull),
    "running-convert-working": Shape(on_vhd, go_on, live=running),
    "running-delete": live_merge(line, "two"),
    "running-delete-other-branch": Shape(forked_tree, delete("two"), live=running),
}


LIVE_MERGES = {
    "live-merge-above-now": live_merge(line, "three"),
    "live-merge-inner": live_merge(branch, "two"),
    "live-merge-root": live_merge(line, "one"),
    "live-merge-only": live_merge(single, "one"),
    "live-merge-together": live_merge(lambda host: single(host, disks=2), "one"),
    "live-merge-paused": live_merge(lambda host: line(host, disks=2), "two", live=paused),
}


def gone_away(host):
    """A forked tree as a folder outside, from a VM that is no more."""
    copied(host)
    vm(host).delete(with_disks=True)


def copied(host):
    """A forked tree, and its home as a folder outside that nobody writes."""
    forked_tree(host)
    target = source(host)
    subprocess.run(["cp", "-a", str(vm(host).path), str(target)], check=True, timeout=60)
    subprocess.run(["rm", "-r", str(target / ".hvmgr")], check=True, timeout=60)
    subprocess.run(["chmod", "-R", "a-w", str(target)], check=True, timeout=60)


def packed(host):
    """A forked tree as an archive outside, from a VM that is no more."""
    forked_tree(host)
    vm(host).export_archive(source(host).with_suffix(".tar.zst"))
    vm(host).delete(with_disks=True)


def as_vhds(host):
    """A forked tree as an export of differencing VHDs, from a VM that is no more."""
    forked_tree(host)
    vm(host).export(source(host), hvmgr.ExportOptions(format=hvmgr.ImageFormat.VHD))
    vm(host).delete(with_disks=True)


def source(host):
    return host.root.parent / "outside" / "gold"


def bring(**options):
    return lambda host: host.import_vm(source(host), hvmgr.ImportOptions(**options))


def exported_saved(host):
    """A VM with a snapshot, and its export from when it was saved; the VM has gone on since, and is saved again."""
    off(host)
    take(host, "one", 0x20)
    saved(host)
    folder = vm(host).export(source(host).parent)
    folder.chmod(0o755)
    folder.rename(source(host))
    vm(host).start()
    vm(host).stop(force=True)
    write_off(host, 0x30, "192k")


def linked(host):
    """A linked VM with a snapshot of its own."""
    gone_away(host)
    bring(mode=hvmgr.Mode.LINK)(host)
    take(host, "mine", 0x21, "512k")


def clone(**how):
    return lambda host: vm(host).clone("two", hvmgr.CloneOptions(**how))


IMPORTS = {
    "import-copy": Shape(gone_away, bring(), again=True),
    "import-archive": Shape(packed, lambda host: host.import_vm(source(host).with_suffix(".tar.zst")), again=True),
    "import-vhd": Shape(as_vhds, lambda host: host.import_vm(source(host) / crash.NAME), again=True),
    "import-register": Shape(gone_away, bring(mode=hvmgr.Mode.REGISTER), again=True),
    "import-register-new-id": Shape(gone_away, bring(mode=hvmgr.Mode.REGISTER, new_id=True), again=True),
    "import-link": Shape(gone_away, bring(mode=hvmgr.Mode.LINK), again=True),
    "import-replace": Shape(copied, bring(new_id=False, replace=True)),
    "import-replace-memory": Shape(exported_saved, bring(new_id=False, replace=True), live=saved),
    "clone-snapshot": Shape(forked_tree, clone(snapshot="two"), again=True),
    "clone-linked": Shape(forked_tree, clone(snapshot="two", linked=True), again=True),
    "move": Shape(forked_tree, lambda host: vm(host).move(host.root / "else")),
    "resize": Shape(line, lambda host: vm(host).resize_disk("hda", 2 * crash.DISK)),
    "resize-smaller": Shape(partitioned, lambda host: vm(host).resize_disk("hda", crash.DISK // 2, shrink=True)),
    "localize-working": Shape(
        lambda host: (gone_away(host), bring(mode=hvmgr.Mode.LINK)(host)), lambda host: vm(host).localize("hda")
    ),
    "localize": Shape(linked, lambda host: vm(host).localize("hda")),
    "convert-working": Shape(on_vhd, convert),
    "convert": Shape(forked_on_vhd, convert),
    "import-memory": Shape(lambda host: (with_memory(host), away(host)), bring(new_id=True), again=True),
    "import-memory-register": Shape(
        lambda host: (with_memory(host), away(host)), bring(mode=hvmgr.Mode.REGISTER, new_id=True), again=True
    ),
}


def away(host):
    """The VM's home as a folder outside; the VM is no more."""
    target = source(host)
    subprocess.run(["cp", "-a", str(vm(host).path), str(target)], check=True, timeout=60)
    subprocess.run(["rm", "-r", str(target / ".hvmgr")], check=True, timeout=60)
    vm(host).delete(with_disks=True)


# For faults.py: merges that need room.
BIG = {
    "big-delete-up": Shape(lambda host: big(host, below=6, above=12), delete("two")),
    "big-delete-down": Shape(lambda host: big(host, below=12, above=6), delete("two")),
}

SHAPES = FOREIGN | CHANGES | WHOLES | MERGES | RUNNING | LIVE | LIVE_MERGES | IMPORTS | BIG | TRANSFERS
