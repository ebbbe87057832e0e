"""What libvirt has of a VM, compared with its home; and a libvirt that cannot be asked."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

import hvmgr
from hvmgr import errors
from hvmgr.host import confinement, pids
from hvmgr.model import configuration
from hvmgr.operations import start_hook
from hvmgr.operations.doctor import host_checks, surroundings
from hvmgr.storage import index

MIB = 1 << 20


def test_vm_that_libvirt_forgot_is_defined_again(bench, vm):
    before = bench.photo(vm)
    bench.domain(vm).undefine(keep_nvram=True, keep_tpm=True)
    assert bench.codes(vm) == {"domain-unknown"}
    assert bench.would(vm) == ["domain-unknown"]
    assert bench.repair(vm) == ["domain-unknown"]
    assert bench.photo(vm) == before
    bench.healthy(vm)


def test_name_that_another_vm_has_is_named(bench, vm):
    bench.domain(vm).undefine(keep_nvram=True, keep_tpm=True)
    stranger = vm.home.present().without_metadata()
    stranger.set_uuid("00000000-0000-4000-8000-000000000000")
    for disk in stranger.root.findall("devices/disk"):
        disk.getparent().remove(disk)
    bench.host.connection.define(stranger.to_xml())
    assert bench.codes(vm) == {"name-taken"}
    assert bench.repair(vm) == []


def test_edit_is_told_and_taken_over(bench, vm):
    bench.edit(vm, lambda edited: edited.set_memory(96 * MIB))
    assert bench.codes(vm) == set()
    bench.one("domain-edited", vm)
    assert bench.repair(vm) == ["domain-edited"]
    assert vm.home.present().memory == 96 * MIB
    bench.healthy(vm)


def test_overlay_that_continues_the_present_is_taken_in(bench, vm):
    before, working = bench.photo(vm), Path(vm.now().disks["hda"])
    overlay = vm.home.layout.images / "hda.backup"
    bench.run("qemu-img", "create", "-f", "qcow2", "-b", working, "-F", "qcow2", overlay)
    bench.edit(vm, lambda edited: edited.set_disk_source("hda", overlay, "qcow2"))
    assert "disks-changed" in bench.codes(vm)
    assert "disks-changed" in bench.repair(vm)
    assert vm.now().disks["hda"] == str(overlay)
    assert bench.photo(vm)["now hda"] == before["now hda"]
    assert bench.codes(vm) == set()


def test_disk_on_a_frozen_image_gets_a_fresh_child(bench, vm):
    before, frozen = bench.photo(vm), Path(vm.snapshot("a").disks["hda"])
    bench.edit(vm, lambda edited: edited.set_disk_source("hda", frozen, "qcow2"))
    assert {"image-frozen", "disks-changed"} <= bench.codes(vm)
    bench.repair(vm)
    assert bench.photo(vm)["now hda"] == before["a hda"]
    assert bench.photo(vm)["a hda"] == before["a hda"]
    assert not bench.codes(vm) & {"image-frozen", "disks-changed"}


def test_change_that_nobody_can_take_over_says_why(bench, vm):
    nowhere = bench.place / "nowhere.qcow2"
    bench.edit(vm, lambda edited: edited.set_disk_source("hda", nowhere, "qcow2"))
    (one,) = [one for one in bench.host.repair(str(vm.path)) if one.failure]
    assert str(nowhere) in one.failure
    assert bench.codes(vm) == {"disks-changed"}


def test_snapshot_that_the_vm_wrote_to_is_marked_and_the_rest_is_whole(bench, vm):
    before, frozen = bench.photo(vm), Path(vm.snapshot("b").disks["hda"])
    frozen.chmod(0o600)
    bench.write_image(frozen, 9, 3 * MIB)
    frozen.chmod(0o400)
    bench.edit(vm, lambda edited: edited.set_disk_source("hda", frozen, "qcow2"))
    bench.repair(vm)
    assert bench.codes(vm) == {"snapshot-written"}
    assert "snapshot delete 'web' 'b'" in bench.one("snapshot-written", vm).repair
    after = bench.photo(vm)
    assert {slot: after[f"a {slot}"] for slot in ("hda", "hdb")} == {
        slot: before[f"a {slot}"] for slot in ("hda", "hdb")
    }


def test_metadata_that_an_edit_removed_comes_back(bench, vm):
    bench.edit(vm, lambda edited: edited.without_metadata())
    assert bench.codes(vm) == {"domain-foreign"}
    assert bench.repair(vm) == ["domain-foreign"]
    bench.healthy(vm)


def test_domain_whose_home_is_gone_is_named(bench, vm):
    away = bench.place / "away"
    vm.path.rename(away)
    one = bench.one("home-missing")
    assert one.vm == "web"
    assert one.where == str(vm.path)
    assert bench.codes() == {"home-missing", "index-stale"}
    assert bench.repair() == []  # libvirt still knows it: the folder may come back
    away.rename(vm.path)
    bench.healthy(vm)


def test_copy_that_writes_into_another_home_is_named(bench, vm):
    copy = configuration.parse(bench.domain(vm).xml(live=False), source="virt-clone")
    copy.set_uuid("00000000-0000-4000-8000-000000000000")
    copy.set_name("copy")
    bench.host.connection.define(copy.to_xml())
    assert bench.codes() >= {"home-foreign"}
    assert {one.where for one in bench.find() if one.code == "home-foreign"} == set(vm.now().disks.values())
    for disk in copy.root.findall("devices/disk"):
        disk.getparent().remove(disk)
    bench.host.connection.define(copy.to_xml())
    assert bench.codes() == {"domain-foreign"}
    assert "virsh metadata 'copy'" in bench.one("domain-foreign").repair


def test_managed_save_of_another_moment_is_an_error(bench, vm):
    bench.start(vm)
    bench.domain(vm).managed_save()
    assert bench.codes(vm) == set()
    saved = configuration.parse(bench.domain(vm).managed_save_xml(), source="the managed save")
    saved.strip_backing_chains()
    saved.set_disk_source("hda", Path(vm.snapshot("b").disks["hda"]), "qcow2")
    bench.domain(vm).define_managed_save_xml(saved.to_xml())
    one = bench.one("save-stale", vm)
    assert vm.snapshot("b").disks["hda"] in one.sentence
    assert bench.repair(vm) == []
    bench.domain(vm).remove_managed_save()
    bench.healthy(vm)


def test_snapshots_of_libvirt_itself_are_told(bench, vm):
    bench.start(vm)
    handle = bench.domain(vm)._handle()
    disks = "".join(f"<disk name='{slot}' snapshot='no'/>" for slot in vm.now().disks)
    handle.snapshotCreateXML(
        f"<domainsnapshot><name>theirs</name><memory snapshot='external' file='{bench.place}/m'/>"
        f"<disks>{disks}</disks></domainsnapshot>",
        0,
    )
    assert "libvirt-snapshots" in bench.codes(vm)
    assert "1 snapshots" in bench.one("libvirt-snapshots", vm).sentence
    handle.snapshotLookupByName("theirs").delete(2)  # its metadata alone
    vm.stop(force=True)


def test_running_vm_is_healthy_and_left_alone(bench, vm):
    bench.start(vm)
    assert bench.codes(vm, thorough=True) == set()
    assert bench.repair(vm, thorough=True) == []
    vm.stop(force=True)
    bench.healthy(vm)


def test_missing_memory_of_a_snapshot_is_told(bench, vm):
    bench.start(vm)
    snapshot = vm.create_snapshot("memory")
    memory = vm.home.layout.memory(snapshot.id)
    assert bench.codes(vm) == set()
    memory.rename(bench.place / "memory")
    one = bench.one("memory-missing", vm)
    assert one.where == str(memory)
    assert "--without-state" in one.repair
    vm.stop(force=True)


def test_damaged_snapshot_is_made_again_from_its_memory(bench, vm):
    bench.start(vm)
    snapshot = vm.create_snapshot("memory", notes="kept")
    vm.stop(force=True)
    before = bench.photo(vm)
    file = vm.home.layout.snapshot(snapshot.id)
    text = file.read_bytes()
    for damaged, is_named in ((text.replace(b"</domain>", b""), True), (text[:400], False)):
        file.write_bytes(damaged)
        assert bench.codes(vm) == {"snapshot-damaged"}
        assert bench.repair(vm) == ["snapshot-damaged"]
        (again,) = [one for one in vm.snapshots() if one.id == snapshot.id]
        assert (again.parent, again.state, dict(again.disks)) == (snapshot.parent, snapshot.state, snapshot.disks)
        assert again.name == "memory" if is_named else again.name.startswith("recovered ")
        assert not is_named or again.notes == "kept"
    assert (vm.home.layout.private / "quarantine" / f"{file.name}.2").read_bytes() == text[:400]
    bench.run("virt-xml-validate", file, "domain")
    again.apply()
    assert bench.domain(vm).is_active()
    vm.stop(force=True)
    assert bench.photo(vm)["now hda"] == before["memory hda"]
    bench.healthy(vm)


# --- no libvirt -------------------------------------------------------------------------------------------------------


def test_homes_are_examined_without_libvirt(bench, vm, monkeypatch):
    frozen = Path(vm.snapshot("a").disks["hda"])
    frozen.chmod(0o444)

    def refuse(_self):
        raise errors.HostFailed("cannot connect to qemu:///system: no such socket", hint="systemctl start libvirtd")

    monkeypatch.setattr(hvmgr.Host, "connection", property(refuse))
    found = {str(one.code): one for one in bench.find(vm)}
    assert set(found) >= {"libvirt-unreachable", "mode-wrong"}
    assert found["libvirt-unreachable"].repair == "systemctl start libvirtd"
    assert "domain-unknown" not in found
    assert bench.repair(vm) == ["mode-wrong"]
    assert frozen.stat().st_mode & 0o777 == 0o400


# --- the host ---------------------------------------------------------------------------------------------------------


def host_codes(bench):
    return {str(one.code): one for one in host_checks.examine(surroundings.look(bench.host))}


def test_host_says_its_versions(bench):
    one = host_codes(bench)["versions"]
    assert one.sentence.startswith("libvirt ")


def test_old_versions_are_named(bench, monkeypatch):
    monkeypatch.setattr(host_checks, "OLDEST_LIBVIRT", (99, 0))
    assert "99.0" in host_codes(bench)["version-old"].sentence


def test_missing_program_is_named_with_its_package(bench, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(host_checks.process, "_SYSTEM_FOLDERS", ())
    monkeypatch.setattr(host_checks, "_reads_vhd", lambda: True)
    found = [one for one in host_checks.examine(surroundings.look(bench.host)) if one.code == "program-missing"]
    assert {one.where for one in found} == {"qemu-img", "qemu-storage-daemon"}
    assert "apt install qemu-utils" in found[0].repair


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A root of files that stands for the kernel's and libvirt's own: ``machine({path: text})``."""
    monkeypatch.setattr(confinement, "ROOT", tmp_path)

    def make(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    return make


def as_system(monkeypatch, bench):
    facts = bench.host.connection.capabilities()
    confining = dataclasses.replace(facts, security_models=frozenset({"apparmor", "selinux", "dac"}))
    monkeypatch.setattr(bench.host.connection, "driver", host_checks.Driver.SYSTEM)
    monkeypatch.setattr(bench.host.connection, "capabilities", lambda: confining)


APPARMOR = {"sys/module/apparmor/parameters/enabled": "Y\n", "etc/apparmor.d/libvirt/TEMPLATE.qemu": ""}


def test_apparmor_below_libvirt_12_1_is_told(bench, machine, monkeypatch):
    machine(APPARMOR)
    as_system(monkeypatch, bench)
    found = host_codes(bench)
    assert "12.1" in found["apparmor-commit"].sentence
    assert "hvmgr hook install" in found["hook-missing"].repair
    monkeypatch.setattr(host_checks, "_APPARMOR_COMMIT", (1, 0))
    assert "apparmor-commit" not in host_codes(bench)


def test_whose_hook_guards_the_starts(bench, monkeypatch, tmp_path):
    as_system(monkeypatch, bench)
    folder = tmp_path / "hooks"
    monkeypatch.setattr(start_hook, "FOLDER", folder)
    assert "no hook guards" in host_codes(bench)["hook-missing"].sentence
    start_hook.install(folder)
    assert "hook-missing" not in host_codes(bench)
    script = start_hook.path_in(folder)
    script.write_text(script.read_text().replace("python=", "python=/opt"))
    assert "another hvmgr" in host_codes(bench)["hook-missing"].sentence


def test_image_that_apparmor_hides_is_named_with_the_line_that_is_missing(bench, machine, monkeypatch):
    base = bench.image("base.bin", fill=(7,))
    vm = bench.make(bench.in_place(base))
    root = machine(APPARMOR)
    as_system(monkeypatch, bench)
    one = bench.one("apparmor-rule", vm)
    assert f"'{base} r,'" in one.repair
    local = root / "etc/apparmor.d/local/usr.lib.libvirt.virt-aa-helper"
    local.parent.mkdir()
    local.write_text(f"# ours\n{bench.place}/** r,\n")
    assert "apparmor-rule" not in bench.codes(vm)
    (local.parent.parent / local.name).write_text(f"  deny {bench.place}/** r,\n")
    one = bench.one("apparmor-rule", vm)
    assert f"its profile says 'deny {bench.place}/** r,', which no local rule can lift" in one.sentence
    assert "--home" in one.repair


def test_host_whose_libvirt_confines_nothing_has_no_findings_of_that(bench, machine, monkeypatch):
    vm = bench.make(bench.in_place(bench.image("base.bin", fill=(7,))))
    machine({**APPARMOR, "sys/fs/selinux/enforce": "1"})
    monkeypatch.setattr(bench.host.connection, "driver", host_checks.Driver.SYSTEM)
    monkeypatch.setattr(confinement, "is_labelled", lambda _path: False)
    assert not {"apparmor-rule", "apparmor-commit", "selinux-label"} & {str(one.code) for one in bench.find(vm)}
    assert "apparmor-commit" not in host_codes(bench)


def test_home_without_an_selinux_label_is_named(bench, vm, machine, monkeypatch):
    machine({"sys/fs/selinux/enforce": "1"})
    as_system(monkeypatch, bench)
    labels = {"label": b"system_u:object_r:default_t:s0\0"}
    monkeypatch.setattr(confinement.os, "getxattr", lambda *_: labels["label"])
    assert "restorecon" in bench.one("selinux-label", vm).repair
    labels["label"] = b"system_u:object_r:virt_image_t:s0\0"
    assert "selinux-label" not in bench.codes(vm)


def test_kvm_that_qemu_may_not_open_is_told(bench, machine):
    root = machine({"dev/kvm": ""})
    (root / "dev/kvm").chmod(0o600)
    monkey = host_codes(bench)
    if bench.host.connection.capabilities().has_kvm:
        assert "/dev/kvm" in monkey["kvm-closed"].where
    (root / "dev/kvm").chmod(0o666)
    assert "kvm-closed" not in host_codes(bench)


def test_abilities_that_are_missing_are_told(bench, machine, monkeypatch):
    machine({"proc/sys/vm/unprivileged_userfaultfd": "0\n"})
    monkeypatch.setattr(host_checks, "_reads_vhd", lambda: False)
    found = {one.where for one in host_checks.examine(surroundings.look(bench.host)) if one.code == "ability-missing"}
    assert {"kvm", "background-snapshot", "vhd"} <= found
    machine({"proc/sys/vm/unprivileged_userfaultfd": "1\n"})
    found = {one.where for one in host_checks.examine(surroundings.look(bench.host)) if one.code == "ability-missing"}
    assert "background-snapshot" not in found


def test_userfaultfd_is_allowed_after_it_was_asked_for(bench, machine):
    root = machine({"proc/sys/vm/unprivileged_userfaultfd": "0\n"})
    setting, drop_in = root / "proc/sys/vm/unprivileged_userfaultfd", root / "etc/sysctl.d/60-hvmgr.conf"
    (one,) = [one for one in host_checks.examine(surroundings.look(bench.host)) if one.where == "background-snapshot"]
    assert "sysctl -w vm.unprivileged_userfaultfd=1" in one.repair
    assert "/etc/sysctl.d/60-hvmgr.conf" in one.repair
    (root / "etc").mkdir()
    asked = []
    for answer in (None, asked.append):  # nobody there, and no
        assert bench.host.repair(change_host=answer) == []
    assert len(asked) == 1
    assert "userfaultfd" in asked[0]
    assert (setting.read_text(), drop_in.exists()) == ("0\n", False)
    (done,) = bench.host.repair(change_host=lambda _sentence: True)
    assert done.failure is None
    assert setting.read_text() == "1\n"
    assert drop_in.read_text().splitlines()[-1] == "vm.unprivileged_userfaultfd = 1"
    assert bench.host.repair(change_host=lambda _sentence: True) == []


@pytest.mark.parametrize(
    ("name", "code", "repair"),
    [("stuck-memory", "memory-stuck", "restart"), ("guest-at-rest", "guest-at-rest", "agent")],
)
def test_what_is_noted_of_a_running_qemu_is_told(bench, vm, name, code, repair):
    file = vm.home.layout.private / name
    file.write_text(f"{os.getpid()} {pids.start_time(os.getpid())}\n")
    assert repair in bench.one(code, vm).repair
    file.write_text(f"{os.getpid()} 1\n")  # another QEMU has that number now
    assert code not in bench.codes(vm)


# --- VMs that were adopted --------------------------------------------------------------------------------------------


def test_adopted_vm_with_external_snapshots_is_healthy(bench):
    base = bench.image("disk.qcow2", fill=(1,))
    first = bench.image("disk.first", backing=(base, "qcow2"), fill=(2,))
    text = f"""<domain type='qemu'><name>old</name><memory>65536</memory><os><type>hvm</type></os>
      <devices><disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{first}'/>
      <target dev='hda' bus='ide'/></disk></devices></domain>"""
    bench.host.connection.define(text)
    vm = bench.host.adopt("old")
    assert bench.codes() == set()
    before = bench.photo(vm)
    vm.create_snapshot("a")
    bench.write(vm, 9)
    assert bench.codes() == set()
    assert bench.repair() == []
    bench.domain(vm).undefine(keep_nvram=True, keep_tpm=True)
    index.forget(vm.id)
    bench.repair()
    assert bench.photo(vm)["a hda"] == before["now hda"]
    assert set(index.entries()[0].outside) == {str(base), str(first)}
    bench.healthy(vm)
