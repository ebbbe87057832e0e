"""The hook below a real libvirtd: who may start, who may not, and why; starts are made by virsh."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from lxml import etree

import hvmgr
from hvmgr.model import plan
from hvmgr.operations import start_hook
from tests import private_libvirt

pytestmark = pytest.mark.libvirtd

KILLED_AT_ITS_START = """
import os, signal, sys
import hvmgr
from hvmgr.host import hypervisor

hypervisor.Connection.restore = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
with hvmgr.Host.open(sys.argv[1], root=sys.argv[2]) as host:
    host.vm("web").snapshot("memory").apply()
"""


class Bench:
    """VMs without an operating system below a libvirtd with the hook; and virsh."""

    def __init__(self, daemon, root):
        self.daemon = daemon
        self.host = hvmgr.Host.open(daemon.uri, root=root, wait_s=60)

    def virsh(self, *words, check=False):
        command = ["virsh", "-c", self.daemon.uri, *words]
        return subprocess.run(command, check=check, capture_output=True, text=True, timeout=60)

    def start(self):
        """What virsh says to a start; '' when it went well."""
        return self.virsh("start", "web").stderr

    def make(self, *snapshots):
        disks = (hvmgr.DiskSpecification(size=1 << 20),)
        vm = self.host.create_vm(
            hvmgr.Specification(
                name="web", template="generation1", accel="tcg", memory=64 << 20, networks=(), disks=disks
            )
        )
        self.define(without_screen)
        vm.stop()  # what was edited is taken over
        for name in snapshots:
            vm.create_snapshot(name)
            self.write(vm.now().disks["hda"], len(name))
        return vm

    def define(self, change):
        root = etree.fromstring(self.virsh("dumpxml", "--inactive", "web", check=True).stdout)
        change(root)
        self.host.connection.define(etree.tostring(root, encoding="unicode"))

    @staticmethod
    def write(image, pattern, *, fmt="qcow2"):
        os.chmod(image, 0o600)
        command = ["qemu-io", "-f", fmt, "-c", f"write -P {pattern} 256k 128k", image]
        subprocess.run(command, check=True, capture_output=True, timeout=60)

    @property
    def is_running(self):
        return self.virsh("domstate", "web").stdout.strip() == "running"


def without_screen(root):
    devices = root.find("devices")
    for device in [*devices.findall("graphics"), *devices.findall("video"), *devices.findall("channel")]:
        devices.remove(device)


@pytest.fixture(scope="module")
def hooked(new_embed_root):
    """A libvirtd that found the hook when it started."""
    if os.geteuid() != 0 or shutil.which("libvirtd") is None:
        pytest.skip("needs root and libvirtd")
    root = new_embed_root()
    start_hook.install(root / "etc" / "hooks")
    with private_libvirt.daemon(root) as daemon:
        yield daemon


@pytest.fixture
def bench(hooked):
    folder = Path(tempfile.mkdtemp(prefix="hv", dir="/tmp"))
    folder.chmod(0o711)
    bench = Bench(hooked, folder / "homes")
    yield bench
    for domain in bench.host.connection.domains():
        domain.destroy()
        domain.remove_managed_save()
        if bench.host.connection.find_domain(domain.uuid) is not None:
            domain.undefine(keep_nvram=False, keep_tpm=False)
    bench.host.close()
    shutil.rmtree(folder)


def refused(bench, why, do="doctor --repair"):
    """The start is refused for this reason, with the command to run, in one line of ours; nothing runs."""
    said = bench.start()
    ours = said[said.index("hvmgr: web must not start: ") :].strip()
    assert why in ours, said
    assert f"hvmgr -c {shlex.quote(bench.daemon.uri)} --root {bench.host.root} {do} web" in ours, said
    assert "\n" not in ours
    assert not bench.is_running
    return ours


# --- what passes ------------------------------------------------------------------------------------------------------


def test_whole_vm_starts_by_virsh_and_by_hvmgr(bench):
    vm = bench.make("one", "two")
    assert bench.start() == ""
    vm.stop(force=True)
    assert vm.start()
    bench.virsh("managedsave", "web", check=True)
    assert bench.start() == ""  # phase restore, then prepare
    assert bench.is_running
    bench.virsh("suspend", "web", check=True)
    bench.virsh("resume", "web", check=True)


def test_vm_that_is_not_ours_starts(bench):
    bench.make()
    bench.define(lambda root: root.remove(root.find("metadata")))
    bench.host.vm("web").home.layout.journal.write_text("nonsense")
    assert bench.start() == ""


def test_vm_put_back_from_a_backup_starts(bench):
    vm = bench.make("one", "two")
    for snapshot in vm.snapshots():
        for path in snapshot.disks.values():
            os.utime(path)
    assert bench.start() == ""
    vm.stop(force=True)
    vm.start()


def test_overlay_by_virsh_starts(bench):
    vm = bench.make("one")
    bench.virsh("snapshot-create-as", "web", "theirs", "--disk-only", check=True)
    assert bench.start() == ""
    vm.stop(force=True)
    assert "theirs" in vm.now().disks["hda"]


def test_disk_by_virsh_edit_starts(bench, tmp_path):
    bench.make("one")
    other = bench.host.root / "other.raw"
    other.write_bytes(bytes(1 << 20))

    def swap(root):
        disk = root.find("devices/disk[@device='disk']")
        disk.find("source").set("file", str(other))
        disk.find("driver").set("type", "raw")

    bench.define(swap)
    assert bench.start() == ""


# --- what is refused --------------------------------------------------------------------------------------------------


def open_journal(bench, vm):
    vm.home.layout.journal.write_text(PLAN)
    return "the work on web was interrupted and is still open"


PLAN = (
    json.dumps(plan.Plan(plan_id="x", vm_id="y", operation="o", subject="work on web").to_json(), separators=(",", ":"))
    + "\n"
)


def damaged_journal(bench, vm):
    vm.home.layout.journal.write_bytes(b"\xff\xfenonsense\n")
    return "the journal"


def missing_image(bench, vm):
    path = vm.snapshots()[0].disks["hda"]
    os.rename(path, path + ".away")
    return f"the image {path} is missing"


def swapped_working_image(bench, vm):
    path = vm.now().disks["hda"]
    os.unlink(path)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "1M"], check=True, timeout=60)
    return f"{path} does not stand on {vm.snapshots()[-1].disks['hda']} (qcow2), which its snapshot froze"


def swapped_format(bench, vm):
    path = vm.now().disks["hda"]
    Path(path).write_bytes(bytes(1 << 20))
    return f"{path} is no qcow2 image"


def changed_frozen_image(bench, vm):
    path = vm.snapshots()[0].disks["hda"]
    with open(path, "ab") as file:
        file.truncate((1 << 20) + os.path.getsize(path))
    return f"{path} was changed after it was frozen"


def changed_header(bench, vm):
    """Another parent behind the same size and time."""
    path = vm.snapshots()[1].disks["hda"]
    before = os.stat(path)
    below = vm.snapshots()[0].disks["hda"]
    os.chmod(path, 0o600)
    shutil.copy(below, below + ".copy")
    command = ["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", below + ".copy", path]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    os.truncate(path, before.st_size)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return f"{path} was changed after it was frozen"


def frozen_image_as_disk(bench, vm):
    path = vm.snapshots()[0].disks["hda"]
    bench.define(lambda root: root.find("devices/disk[@device='disk']/source").set("file", path))
    return f"disk hda would write to {path}, which snapshots need unchanged"


def vm_gone_from_its_home(bench, vm):
    os.unlink(vm.home.layout.configuration)
    return f"its home {vm.path} holds no VM any more"


def half_deleted_home(bench, vm):
    os.unlink(vm.home.layout.configuration)
    return open_journal(bench, vm)


def home_of_a_newer_hvmgr(bench, vm):
    path = vm.home.layout.configuration
    path.write_text(path.read_text().replace('format="1"', 'format="2"').replace("format='1'", "format='2'"))
    return "was written by a newer hvmgr"


def frozen_image_without_records(bench, vm):
    why = frozen_image_as_disk(bench, vm)
    shutil.rmtree(vm.home.layout.frozen)
    return why


def circle(bench, vm):
    one, two = (snapshot.disks["hda"] for snapshot in vm.snapshots())
    os.chmod(one, 0o600)
    command = ["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", two, one]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    shutil.rmtree(vm.home.layout.frozen)  # or that it was changed is said first
    return "runs in a circle"


def parent_of_no_stated_format(bench, vm):
    path = vm.now().disks["hda"]
    below = vm.snapshots()[1].disks["hda"]
    command = ["qemu-img", "rebase", "-u", "-f", "qcow2", "-b", below, path]
    subprocess.run(command, check=False, capture_output=True, timeout=60)
    with open(path, "r+b") as file:  # newer QEMUs do not leave it out: the extension is made an unknown one
        head = file.read(4096)
        file.seek(head.index(b"\xe2\x79\x2a\xca"))
        file.write(b"\x12\x34\x56\x78")
    return "does not state its format"


def home_away(bench, vm):
    os.rename(vm.path, f"{vm.path}.away")
    return f"its home {vm.path} is not there"


def broken_home(bench, vm):
    vm.home.layout.configuration.write_text("<domain><name>web</name>")
    return "not XML"


@pytest.mark.parametrize(
    "damage",
    [
        open_journal, damaged_journal, half_deleted_home, vm_gone_from_its_home, home_of_a_newer_hvmgr, home_away,
        broken_home, missing_image, circle, parent_of_no_stated_format, swapped_format, swapped_working_image,
        changed_frozen_image, changed_header, frozen_image_as_disk, frozen_image_without_records,
    ],
    ids=lambda damage: damage.__name__,
)  # fmt: skip
def test_start_is_refused(bench, damage):
    vm = bench.make("one", "two")
    refused(bench, damage(bench, vm))


def test_operation_under_way(bench):
    vm = bench.make()
    vm.home.layout.journal.write_text(PLAN)
    with vm.home.locked(wait_s=0):
        said = bench.start()
    assert f"the work on web is under way (process {os.getpid()}); wait until that is done\n" in said
    vm.home.layout.journal.unlink()


def test_copy_by_virt_clone_that_would_write_the_same_image(bench):
    vm = bench.make("one")
    root = etree.fromstring(bench.virsh("dumpxml", "--inactive", "web", check=True).stdout)
    root.find("name").text = "copy"
    root.find("uuid").text = "11111111-2222-4333-8444-555555555555"
    bench.host.connection.define(etree.tostring(root, encoding="unicode"))
    assert f"belongs to the VM 'web' ({vm.id})" in bench.virsh("start", "copy").stderr
    own = bench.host.root / "copy.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", own, "1M"], check=True, timeout=60)
    root.find("devices/disk[@device='disk']/source").set("file", str(own))
    bench.host.connection.define(etree.tostring(root, encoding="unicode"))
    assert bench.virsh("start", "copy").stderr == ""


# --- once all the same ------------------------------------------------------------------------------------------------


def test_allowed_once_by_virsh(bench):
    vm = bench.make("one", "two")
    changed_frozen_image(bench, vm)
    refused(bench, "changed", "hook allow --once")
    assert start_hook.in_the_way(vm.home)
    start_hook.allow_once(vm.home, wait_s=0)
    assert bench.start() == ""
    assert not vm.home.layout.allowed_start.exists()
    bench.virsh("destroy", "web", check=True)
    refused(bench, "changed")


def test_allowed_once_by_hvmgr(bench):
    vm = bench.make("one", "two")
    changed_frozen_image(bench, vm)
    with pytest.raises(hvmgr.errors.Corrupt, match="was changed after it was frozen"):
        vm.start()
    start_hook.allow_once(vm.home, wait_s=0)
    assert vm.start()
    vm.stop(force=True)
    with pytest.raises(hvmgr.errors.Corrupt):
        vm.start()


# --- hvmgr's own operations -------------------------------------------------------------------------------------------


def with_memory(bench):
    vm = bench.make("one")
    vm.start()
    vm.create_snapshot("memory")
    return vm


def test_apply_starts_what_it_has_to(bench):
    vm = with_memory(bench)
    vm.snapshot("memory").apply()
    assert bench.is_running
    vm.snapshot("one").apply()
    assert not bench.is_running
    vm.snapshot("memory").apply()
    assert bench.is_running


def test_failed_apply_puts_the_running_present_back(bench, at_step):
    vm = with_memory(bench)
    at_step(plan.StartFrom, hvmgr.errors.HostFailed("no"))
    with pytest.raises(hvmgr.errors.HostFailed):
        vm.snapshot("memory").apply()
    assert bench.is_running


def test_recovery_puts_the_running_present_back(bench, kill_at, run_and_die):
    vm = with_memory(bench)
    kill_at(plan.StartFrom)
    run_and_die(vm.snapshot("memory").apply)
    refused(bench, "the return of web to snapshot 'memory' was interrupted")
    assert vm.snapshots()  # goes back
    assert bench.is_running


def test_start_named_by_a_killed_command_is_refused(bench):
    vm = with_memory(bench)
    arguments = [sys.executable, "-c", KILLED_AT_ITS_START, bench.daemon.uri, str(bench.host.root)]
    done = subprocess.run(arguments, check=False, capture_output=True, timeout=60, cwd=Path(__file__).parents[2])
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert b"\nstart {" in vm.home.layout.journal.read_bytes()
    refused(bench, "was interrupted and is still open")
    with vm.home.locked(wait_s=5):  # another command has the lock: the permission was not its own
        assert "is under way" in bench.start()
    assert vm.snapshots()
    assert bench.is_running


def test_other_start_than_the_named_one_is_refused(bench, at_step):
    """While an apply lets the VM go on from saved memory, a start of the old present finds no gap."""
    vm = with_memory(bench)
    restore, said = type(bench.host.connection).restore, []

    def late(connection, *arguments, **wishes):
        said.append(bench.start())
        return restore(connection, *arguments, **wishes)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(bench.host.connection), "restore", late)
        vm.snapshot("memory").apply()
    assert "the return of web to snapshot 'memory' is under way" in said[0]
    assert bench.is_running


def test_killed_merge_then_virsh_start_then_repair(bench, kill_at, run_and_die):
    vm = bench.make("one", "two", "three")
    before = content(vm)
    kill_at(plan.MergeUp)
    run_and_die(vm.snapshot("two").delete)
    refused(bench, "the deletion of snapshot 'two' of web was interrupted and is still open")
    assert [one.name for one in vm.snapshots()] == ["one", "three"]  # completes
    assert bench.start() == ""
    vm.stop(force=True)
    assert content(vm) == before


def content(vm):
    """What the guest reads from its disk."""
    target = vm.path / "content"
    command = ["qemu-img", "convert", "-O", "raw", vm.now().disks["hda"], target]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    data = target.read_bytes()
    target.unlink()
    return data


# --- the daemon -------------------------------------------------------------------------------------------------------


def test_autostart_after_a_crash_waits_for_hvmgr(bench, kill_at, run_and_die):
    vm = bench.make("one", "two", "three")
    bench.virsh("autostart", "web", check=True)
    kill_at(plan.MergeUp)
    run_and_die(vm.snapshot("two").delete)
    restart(bench)
    assert not bench.is_running
    vm.snapshots()
    restart(bench)
    deadline = time.monotonic() + 60
    while not bench.is_running:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def restart(bench):
    """As a boot of the host does."""
    bench.daemon.stop()
    for note in bench.daemon.root.glob("run/**/autostarted"):
        note.unlink()
    bench.daemon.start()
    bench.virsh("list", check=True)


def test_daemon_without_any_hook_has_to_be_restarted(bench):
    """What ``hook install`` says: libvirt looks for hooks at its start, and for scripts of qemu.d at each call."""
    folder = bench.daemon.root / "etc" / "hooks"
    vm = bench.make("one")
    vm.home.layout.journal.write_text(PLAN)
    done = start_hook.uninstall(folder)
    assert (done.changed, done.alone) == (True, True)
    assert not done.path.parent.exists()
    restart(bench)
    assert bench.start() == ""
    bench.virsh("destroy", "web", check=True)
    assert start_hook.install(folder).alone
    assert bench.start() == ""
    bench.virsh("destroy", "web", check=True)
    restart(bench)
    refused(bench, "was interrupted")
    start_hook.uninstall(folder)
    assert bench.start() == ""
    bench.virsh("destroy", "web", check=True)
    start_hook.install(folder)
    refused(bench, "was interrupted")
