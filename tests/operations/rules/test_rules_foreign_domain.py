"""What virsh does to the domain of a managed VM, off and running, below a libvirtd of our own: seen, said, nothing lost."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

import hvmgr
from hvmgr import errors
from hvmgr.host.domain import Domain, State
from hvmgr.model import plan
from hvmgr.model.metadata import SnapshotType
from hvmgr.operations.steps import domain_steps, execution

MIB = 1 << 20

pytestmark = pytest.mark.libvirtd


@pytest.fixture
def uri(daemon):
    """A daemon of our own, for all tests here."""
    return daemon.uri


@pytest.fixture
def vm(bench):
    """One disk; snapshots a, then b below it; now: 1 at 0, 2 at 1 MiB, 3 at 2 MiB."""
    return bench.kept(with_a_and_b)


def with_a_and_b(bench):
    vm = bench.make(4)
    bench.without_screen(vm)
    bench.write(vm, 1)
    vm.create_snapshot("a")
    bench.write(vm, 2, MIB)
    vm.create_snapshot("b")
    bench.write(vm, 3, 2 * MIB)
    return vm


@pytest.fixture(params=[False, True], ids=["off", "running"])
def running(request, vm, virsh):
    """Whether the VM runs (paused: it has no system that could run)."""
    if request.param:
        virsh("start", vm.name, "--paused")
    return request.param


def same_snapshots(bench, vm, before):
    after = bench.photo(vm)
    assert {name: after[name] for name in before if name[0] in "ab"} == {
        name: before[name] for name in before if name[0] in "ab"
    }
    return after


def disk_xml(path, slot="vdz", bus="virtio"):
    return (
        f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{path}'/>"
        f"<target dev='{slot}' bus='{bus}'/></disk>"
    )


def xml_file(bench, text):
    path = bench.place / f"{uuid.uuid4()}.xml"
    path.write_text(text)
    return path


# --- the daemon -------------------------------------------------------------------------------------------------------


def test_daemon_that_is_restarted_meanwhile_leaves_an_open_journal_and_no_failure(bench, vm, daemon, monkeypatch):
    """The connection is lost for this command; the next one has another, and goes on with it."""
    define = execution.DO[plan.Define]

    def and_restart(session, step):
        define(session, step)
        daemon.stop()
        daemon.start()

    with monkeypatch.context() as patched:
        patched.setitem(execution.DO, plan.Define, and_restart)
        with pytest.raises(errors.OutcomeUnknown, match="creation of") as lost:
            vm.create_snapshot("c")
    assert lost.value.hint is not None
    assert vm.home.layout.journal.exists()
    bench.said.clear()
    assert [one.name for one in vm.snapshots()] == ["a", "b", "c"]
    assert any("completed the interrupted creation" in said for said in bench.said)
    bench.check(vm)


# --- the domain itself ------------------------------------------------------------------------------------------------


def test_undefined_domain_is_defined_again(bench, vm, virsh, running):
    before = bench.photo(vm)
    virsh("undefine", vm.name)
    vm.create_snapshot("c", type=SnapshotType.DISK_ONLY)
    assert bench.domain(vm).is_persistent()
    assert [line for line in bench.said if "it was defined again from its home" in line]
    if running:
        virsh("destroy", vm.name)
    assert vm.state() is State.OFF
    assert same_snapshots(bench, vm, before)["c hda"] == before["now hda"]
    bench.check(vm)


def test_domain_that_was_undefined_while_it_ran_and_got_an_overlay(bench, vm, virsh):
    before = bench.photo(vm)
    virsh("start", vm.name, "--paused")
    virsh("undefine", vm.name)
    virsh("snapshot-create-as", vm.name, "theirs", "--disk-only")
    theirs = bench.disk(vm, live=True)
    c = vm.create_snapshot("c", type=SnapshotType.DISK_ONLY)
    assert c.disks["hda"] == theirs
    virsh("destroy", vm.name)
    assert bench.domain(vm).is_persistent()
    assert same_snapshots(bench, vm, before)["now hda"] == before["now hda"]
    bench.check(vm)


def test_other_domain_of_the_same_name_is_named_with_what_it_uses(bench, vm, virsh):
    before, working = bench.photo(vm), vm.now().disks["hda"]
    xml = re.sub(r"<metadata>.*</metadata>", "", bench.domain(vm).xml(live=False), flags=re.DOTALL)
    other = str(uuid.uuid4())
    virsh("undefine", vm.name)
    virsh("define", xml_file(bench, xml.replace(f"<uuid>{vm.id}", f"<uuid>{other}")))
    for act in (lambda: vm.create_snapshot("c"), vm.start, vm.snapshot("a").apply, vm.delete):
        with pytest.raises(errors.Conflict, match=f"another VM 'web' with the id {other} and uses {working}") as caught:
            act()
        assert "virsh domrename web NEW" in caught.value.hint
    virsh("domrename", vm.name, "stranger")
    with pytest.raises(errors.Conflict, match="is written by the VM 'stranger' as well"):
        vm.create_snapshot("c")
    virsh("undefine", "stranger")
    vm.create_snapshot("c")
    assert same_snapshots(bench, vm, before)["now hda"] == before["now hda"]
    bench.check(vm)


def test_domain_renamed_by_virsh_keeps_everything(bench, vm, virsh):
    before = bench.photo(vm)
    virsh("domrename", vm.name, "other")
    vm.create_snapshot("c")
    assert [one.name for one in bench.host.vms()] == ["other"]
    vm.snapshot("a").apply()
    assert vm.name == "other"
    assert same_snapshots(bench, vm, before)["c hda"] == before["now hda"]
    bench.check(vm)


def test_managed_save_made_by_virsh_is_part_of_the_present(bench, vm, virsh, daemon):
    before = bench.photo(vm)
    virsh("start", vm.name, "--paused")
    virsh("managedsave", vm.name)
    assert vm.state() is State.SAVED

    def command(*words):  # where libvirt's folders have their usual names
        line = [*daemon.enter, sys.executable, "-m", "hvmgr", "-c", "qemu:///system", "--root", bench.host.root, *words]
        done = subprocess.run(line, check=False, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr

    command("snapshot", "create", "web", "c")
    assert vm.snapshot("c").has_state
    working = vm.now().disks["hda"]
    virsh("start", vm.name)
    assert vm.state() is State.PAUSED
    assert bench.disk(vm, live=True) == working
    virsh("destroy", vm.name)
    command("snapshot", "apply", "web", "b", "--yes")
    assert same_snapshots(bench, vm, before)["now hda"] == before["b hda"]
    bench.check(vm)


# --- devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["--live", "--config", "--live --config"])
def test_disk_plugged_in_by_virsh(bench, vm, virsh, where):
    before = bench.photo(vm)
    extra = bench.image("extra.qcow2", fill=(8,))
    virsh("start", vm.name, "--paused")
    virsh("attach-device", vm.name, xml_file(bench, disk_xml(extra)), *where.split())
    if where == "--config":
        with pytest.raises(errors.Conflict, match="disk vdz is attached only after the next start"):
            vm.create_snapshot("c", type=SnapshotType.DISK_ONLY)
        virsh("destroy", vm.name)
        virsh("start", vm.name, "--paused")
    if where == "--live":
        with pytest.raises(errors.Conflict, match="vdz is attached only until the VM stops"):
            vm.create_snapshot("c")
    c = vm.create_snapshot("c", type=SnapshotType.DISK_ONLY)
    assert set(c.disks) == ({"hda"} if where == "--live" else {"hda", "vdz"})
    if where != "--live":
        assert c.disks["vdz"] == str(extra)
    bench.said.clear()
    vm.stop(force=True)
    vm.snapshot("a").apply()
    assert set(vm.now().disks) == {"hda"}
    c.apply()
    after = same_snapshots(bench, vm, before)
    if where != "--live":
        assert after["now vdz"] == bench.bytes_of(extra)
    bench.check(vm)


@pytest.mark.parametrize("where", ["--live", "--config", "--live --config"])
def test_disk_plugged_out_by_virsh_is_kept(bench, vm, virsh, where):
    extra = bench.image("extra.qcow2", fill=(8,))
    virsh("attach-device", vm.name, xml_file(bench, disk_xml(extra, "sda", "usb")), "--config")
    vm.create_snapshot("with it")
    before = bench.photo(vm)
    gone = vm.now().disks["sda"]
    virsh("start", vm.name, "--paused")
    bench.said.clear()
    virsh("detach-disk", vm.name, "sda", *where.split())
    if where == "--live":
        with pytest.raises(errors.Conflict, match="disk sda is attached only after the next start"):
            vm.create_snapshot("c")
        virsh("destroy", vm.name)
    elif where == "--config":
        with pytest.raises(errors.Conflict, match="disk sda is attached only until the VM stops"):
            vm.create_snapshot("c")
    c = vm.create_snapshot("c", type=SnapshotType.DISK_ONLY)
    if where != "--live":
        assert f"{gone} is no longer used by the VM; it is kept as a detached disk" in bench.said
        virsh("destroy", vm.name)
    assert set(c.disks) == ({"hda", "sda"} if where == "--live" else {"hda"})
    assert bench.bytes_of(gone) == before["now sda"]
    vm.snapshot("with it").apply()
    assert same_snapshots(bench, vm, before)["now sda"] == before["with it sda"]
    bench.check(vm)


@pytest.mark.parametrize("where", ["--live", "--config", "--live --config"])
def test_nic_plugged_in_by_virsh(bench, vm, virsh, where):
    virsh("start", vm.name, "--paused")
    nic = "<interface type='user'><mac address='52:54:00:aa:bb:cc'/><model type='virtio'/></interface>"
    virsh("attach-device", vm.name, xml_file(bench, nic), *where.split())
    c = vm.create_snapshot("c")
    in_home = [one.mac for one in vm.home.snapshot(c.id).nics()]
    assert in_home == ([] if where == "--live" else ["52:54:00:aa:bb:cc"])
    vm.stop(force=True)
    c.apply()
    assert vm.state() is State.PAUSED
    live = "52:54:00:aa:bb:cc" in bench.domain(vm).xml(live=True)
    assert live is (where != "--config")  # the memory of that moment knows what was plugged in then
    vm.stop(force=True)
    bench.check(vm)


def test_configuration_edited_while_the_vm_runs(bench, vm, virsh):
    before = bench.photo(vm)
    virsh("start", vm.name, "--paused")
    virsh("setmaxmem", vm.name, "96M", "--config")
    virsh("desc", vm.name, "edited by hand", "--config")
    c = vm.create_snapshot("c")
    assert "took over a change that was made to the VM outside hvmgr" in bench.said
    assert vm.home.snapshot(c.id).memory == 96 * MIB
    assert "edited by hand" in bench.domain(vm).xml(live=False)
    virsh("destroy", vm.name)
    vm.snapshot("a").apply()
    assert vm.home.present().memory == 64 * MIB
    same_snapshots(bench, vm, before)
    bench.check(vm)


def test_disk_edited_while_the_vm_runs_waits_for_its_stop(bench, vm, virsh):
    before, working = bench.photo(vm), vm.now().disks["hda"]
    other = bench.image("other.qcow2", fill=(9,))
    virsh("start", vm.name, "--paused")
    bench.edit(vm, lambda edited: edited.set_disk_source("hda", other, "qcow2"))
    with pytest.raises(errors.Conflict, match=f"disk hda: QEMU does not write to {other}"):
        vm.create_snapshot("c")
    with pytest.raises(
        errors.Conflict, match=f"the VM runs on {working}, its configuration has been edited to {other}"
    ):
        vm.snapshot("a").apply()
    vm.stop(force=True)
    c = vm.create_snapshot("c")
    assert c.disks["hda"] == str(other)
    assert bench.bytes_of(working) == before["now hda"]
    same_snapshots(bench, vm, before)
    bench.check(vm)


# --- libvirt's own snapshots and checkpoints --------------------------------------------------------------------------


def test_snapshot_that_virsh_made_and_deleted_again_between_two_commands(bench, vm, virsh):
    before = bench.photo(vm)
    virsh("start", vm.name, "--paused")
    virsh("snapshot-create-as", vm.name, "theirs", "--disk-only")
    virsh("snapshot-delete", vm.name, "theirs")
    c = vm.create_snapshot("c", type=SnapshotType.DISK_ONLY)
    vm.stop(force=True)
    assert same_snapshots(bench, vm, before)["c hda"] == before["now hda"]
    assert bench.mode_of(c.disks["hda"]) == 0o400
    bench.check(vm)


def test_snapshot_of_virsh_that_we_took_over_is_not_deleted_by_virsh(bench, vm, virsh):
    """It would be written down into an image that is frozen now."""
    working = vm.now().disks["hda"]
    virsh("start", vm.name, "--paused")
    virsh("snapshot-create-as", vm.name, "theirs", "--disk-only")
    vm.rename("x") if vm.state() is State.OFF else vm.snapshot("a").set_notes("seen")
    theirs = vm.now().disks["hda"]
    state = bench.file_of(working)
    virsh("snapshot-delete", vm.name, "theirs", refused="Permission denied")
    assert bench.file_of(working) == state
    Path(working).chmod(0o600)
    virsh("snapshot-delete", vm.name, "theirs")
    virsh("destroy", vm.name)
    assert not Path(theirs).exists()
    bench.said.clear()
    vm.start()
    vm.stop(force=True)
    assert f"disk hda is {working} now" in bench.said
    assert bench.mode_of(working) == 0o600
    c = vm.create_snapshot("c")
    assert c.disks["hda"] == working
    bench.check(vm)


def test_internal_snapshot_of_virsh_and_back_to_it(bench, vm, virsh):
    """It lies inside our working image, and a later one of ours freezes it there."""
    before = bench.photo(vm)
    virsh("snapshot-create-as", vm.name, "inside")
    bench.write(vm, 6, 3 * MIB)
    virsh("snapshot-revert", vm.name, "inside")
    c = vm.create_snapshot("c")
    assert same_snapshots(bench, vm, before)["c hda"] == before["now hda"]
    c.delete()
    assert [line for line in bench.said if "is not merged" in line]
    assert same_snapshots(bench, vm, before)["now hda"] == before["now hda"]
    bench.said.clear()
    virsh("snapshot-revert", vm.name, "inside")
    vm.create_snapshot("d")
    same_snapshots(bench, vm, before)
    bench.check(vm)


def test_revert_by_virsh_into_a_frozen_image_damages_its_snapshot_alone(bench, vm, virsh):
    before = bench.photo(vm)
    virsh("snapshot-create-as", vm.name, "inside")
    bench.write(vm, 6, 3 * MIB)
    c = vm.create_snapshot("c")
    virsh("snapshot-revert", vm.name, "inside")
    vm.create_snapshot("d")
    assert {one.name: one.damaged for one in vm.snapshots()} == {"a": (), "b": (), "c": ("hda",), "d": ()}
    with pytest.raises(errors.Corrupt, match="snapshot 'c' is damaged"):
        c.apply()
    assert same_snapshots(bench, vm, before)["now hda"] == before["now hda"]
    bench.check(vm)


def test_checkpoint_of_a_backup_tool_stays_usable_while_the_vm_runs(bench, vm, virsh):
    virsh("start", vm.name, "--paused")
    virsh("checkpoint-create-as", vm.name, "monday")
    c = vm.create_snapshot("c", type=SnapshotType.DISK_ONLY)
    assert bench.said == []
    backup = f"<domainbackup><incremental>monday</incremental><disks><disk name='hda' type='file'><target file='{bench.place}/inc.qcow2'/><driver type='qcow2'/></disk></disks></domainbackup>"
    virsh("backup-begin", vm.name, xml_file(bench, backup))
    assert Path(bench.place / "inc.qcow2").exists()
    virsh("destroy", vm.name)
    files = bench.files(vm)
    c.delete()
    assert [line for line in bench.said if "it is needed by libvirt's checkpoint 'monday'" in line]
    assert bench.files(vm) == files
    virsh("checkpoint-delete", vm.name, "monday", "--metadata")
    expected = bench.photo(vm)
    assert vm.merge()
    assert bench.photo(vm) == expected
    bench.check(vm)


def test_checkpoint_ends_with_a_snapshot_of_a_vm_that_is_off_and_with_an_apply(bench, vm, virsh):
    virsh("start", vm.name, "--paused")
    virsh("checkpoint-create-as", vm.name, "monday")
    virsh("destroy", vm.name)
    expected = bench.photo(vm)["now hda"]
    c = vm.create_snapshot("c")
    assert [line for line in bench.said if "libvirt's checkpoint 'monday' ends here" in line]
    bench.said.clear()
    c.apply()
    assert [line for line in bench.said if "libvirt's checkpoint 'monday' ends here" in line]
    virsh("start", vm.name, "--paused")
    backup = f"<domainbackup><incremental>monday</incremental><disks><disk name='hda' type='file'><target file='{bench.place}/inc.qcow2'/><driver type='qcow2'/></disk></disks></domainbackup>"
    virsh("backup-begin", vm.name, xml_file(bench, backup), refused="monday")  # never a wrong increment
    virsh("destroy", vm.name)
    assert bench.photo(vm)["now hda"] == expected
    bench.check(vm)


def test_bitmaps_go_with_a_merge_into_their_image(bench):
    """They would not tell a backup tool of what was merged."""
    vm = bench.make(4)
    bench.write(vm, 1)
    base = vm.now().disks["hda"]
    bench.run("qemu-img", "bitmap", "--add", "--disable", "-f", "qcow2", base, "old")
    first = vm.create_snapshot("a")
    bench.write(vm, 2, MIB)
    expected = bench.photo(vm)["now hda"]
    first.delete()
    assert f"{base}: the dirty bitmaps old of a backup tool are gone with the merge" in bench.said
    assert bench.photo(vm) == {"now hda": expected}
    assert "old" not in bench.run("qemu-img", "info", vm.now().disks["hda"])
    bench.check(vm)


# --- somebody else at the same time -----------------------------------------------------------------------------------


def test_edit_between_two_steps_is_not_lost(bench, vm, virsh, at_step):
    at_step(plan.FreezeImage, after=lambda: virsh("desc", vm.name, "theirs", "--config"))
    files = bench.files(vm)
    with pytest.raises(errors.Conflict, match="was changed outside hvmgr in the meantime"):
        vm.create_snapshot("c")
    assert bench.files(vm) == files
    vm.create_snapshot("c")
    assert "theirs" in bench.domain(vm).xml(live=False)
    bench.check(vm)


def test_edit_by_another_user_between_two_commands_and_between_two_steps(bench, vm, daemon, at_step):
    def as_nobody(*words):
        line = ["setpriv", "--reuid=65534", "--clear-groups", "virsh", "-q", "-c", daemon.uri, *words]
        environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
        done = subprocess.run(line, check=False, capture_output=True, text=True, timeout=60, env=environment)
        assert done.returncode == 0, done.stderr

    as_nobody("setmaxmem", vm.name, "96M", "--config")
    vm.create_snapshot("c")
    assert vm.home.present().memory == 96 * MIB
    at_step(plan.CreateImage, after=lambda: as_nobody("setmaxmem", vm.name, "128M", "--config"))
    with pytest.raises(errors.Conflict, match="was changed outside hvmgr in the meantime"):
        vm.snapshot("b").apply()
    vm.snapshot("c").set_notes("seen")
    assert vm.home.present().memory == 128 * MIB
    bench.check(vm)


def test_edit_after_the_switch_is_kept(bench, vm, virsh, at_step):
    virsh("start", vm.name, "--paused")
    at_step(plan.SwitchDisks, after=lambda: virsh("desc", vm.name, "theirs", "--config"))
    vm.create_snapshot("c")
    assert "kept a change that was made to the VM outside hvmgr in the meantime" in bench.said
    assert "theirs" in bench.domain(vm).xml(live=False)
    assert vm.now().parent == vm.snapshot("c").id
    vm.stop(force=True)
    bench.check(vm)


def test_edit_after_a_killed_command_is_kept_by_the_next(bench, vm, virsh, kill_at, run_and_die):
    virsh("start", vm.name, "--paused")
    kill_at(plan.Define)
    run_and_die(vm.create_snapshot, "c")
    virsh("desc", vm.name, "theirs", "--config")
    assert [one.name for one in vm.snapshots()] == ["a", "b", "c"]
    assert "theirs" in bench.domain(vm).xml(live=False)
    vm.stop(force=True)
    bench.check(vm)


def test_overlay_between_two_steps_is_not_lost(bench, vm, virsh, at_step):
    before = bench.photo(vm)
    virsh("start", vm.name, "--paused")
    at_step(plan.CreateImage, after=lambda: virsh("snapshot-create-as", vm.name, "theirs", "--disk-only"))
    with pytest.raises(errors.Conflict, match=r"was switched to .*theirs in the meantime"):
        vm.create_snapshot("c", type=SnapshotType.DISK_ONLY)
    theirs = bench.disk(vm, live=True)
    assert theirs.endswith(".theirs")
    c = vm.create_snapshot("c", type=SnapshotType.DISK_ONLY)
    assert c.disks["hda"] == theirs
    vm.stop(force=True)
    assert same_snapshots(bench, vm, before)["now hda"] == before["now hda"]
    bench.check(vm)


def test_overlay_in_the_very_moment_of_our_switch_is_not_lost(bench, vm, virsh, monkeypatch, guest):
    before, old = bench.photo(vm), vm.now().disks["hda"]
    virsh("start", vm.name, "--paused")
    real = Domain.switch_disks

    def switch(domain, *arguments, **wishes):
        virsh("snapshot-create-as", vm.name, "theirs", "--disk-only")
        guest(vm, 6, 3 * MIB)
        real(domain, *arguments, **wishes)

    with monkeypatch.context() as patched:
        patched.setattr(Domain, "switch_disks", switch)
        c = vm.create_snapshot("c", type=SnapshotType.DISK_ONLY)
    assert c.disks["hda"] == old
    assert [line for line in bench.said if "by somebody else at the same time; it goes on above that" in line], (
        bench.said
    )
    vm.stop(force=True)
    after = same_snapshots(bench, vm, before)
    assert after["c hda"] == before["now hda"]
    assert after["now hda"][1].items() > before["now hda"][1].items()
    vm.create_snapshot("d")
    vm.snapshot("a").apply()
    vm.snapshot("d").apply()
    assert bench.photo(vm)["now hda"] == after["now hda"]


def test_command_that_died_after_such_a_moment(bench, vm, virsh, monkeypatch, guest, kill_at, run_and_die):
    before = bench.photo(vm)
    virsh("start", vm.name, "--paused")
    real = Domain.switch_disks

    def switch(domain, *arguments, **wishes):
        virsh("snapshot-create-as", vm.name, "theirs", "--disk-only")
        guest(vm, 6, 3 * MIB)
        real(domain, *arguments, **wishes)

    kill_at(plan.Define)
    with monkeypatch.context() as patched:
        patched.setattr(Domain, "switch_disks", switch)
        patched.setattr(domain_steps, "name_true_parents", lambda *_: None)
        run_and_die(vm.create_snapshot, "c", type=SnapshotType.DISK_ONLY)
    assert [one.name for one in vm.snapshots()] == ["a", "b", "c"]
    vm.stop(force=True)
    after = same_snapshots(bench, vm, before)
    assert after["now hda"][1].items() > before["now hda"][1].items()
    bench.check(vm)


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGKILL], ids=str)
def test_daemon_that_is_gone_in_the_middle(bench, vm, virsh, daemon, at_step, name):
    before = bench.photo(vm)
    virsh("snapshot-create-as", vm.name, "theirs", "--disk-only")
    at_step(plan.Define, before=lambda: daemon.stop(signal_=name))
    with pytest.raises(errors.HvmgrError) as caught:
        vm.create_snapshot("c")
    assert caught.value.exit_code in {8, 9}
    daemon.start()
    with hvmgr.Host.open(daemon.uri, root=bench.host.root) as host:
        again = host.vm("web")
        again.create_snapshot("d")
        assert [one.name for one in again.snapshots()] == ["a", "b", "d"]
    after = same_snapshots(bench, vm, before)
    assert after["d hda"] == after["now hda"] == before["now hda"]
