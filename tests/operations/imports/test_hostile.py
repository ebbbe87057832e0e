"""Sources whose makers want something of the host: what is refused, and what the administrator is told before."""

from __future__ import annotations

import os
import re
import resource
import struct
import subprocess
from pathlib import Path

import pytest

import hvmgr
from hvmgr import errors
from hvmgr.host import saved_state
from hvmgr.model import plan
from hvmgr.model.plan import Plan
from hvmgr.operations.exchange import import_steps
from hvmgr.storage import archives, copy, images, journal, locks, source_home
from tests.operations.imports.test_compare import edit

STRANGER = 12345


@pytest.fixture
def victim(place):
    path = place / "victim"
    path.write_bytes(b"secret!\n" * 8192)
    path.chmod(0o600)
    return path


@pytest.fixture
def source(bench, branched):
    return bench.take_away(branched, export=False)


def qemu_img(*words):
    return subprocess.run(["qemu-img", *map(str, words)], check=True, timeout=60, capture_output=True, text=True).stdout


def base_of(source):
    one = source_home.open_source(source)
    (top,) = one.disks.values()
    chain = one.chain(top)
    return Path(chain[-2].path), Path(chain[-1].path)


class TestParents:
    @pytest.fixture
    def plain(self, bench, place):
        """A domain's XML beside its disk, a qcow2 image that says of its base that it is raw."""
        vm = bench.make(4, name="web")
        folder = place / "plain"
        folder.mkdir()
        (disk,) = vm.home.present().disks()
        xml = vm.home.present().without_metadata().to_xml().replace(disk.source, str(folder / "disk.qcow2"))
        (folder / "vm.xml").write_text(xml)
        vm.delete(with_disks=True)
        (folder / "base").write_bytes(bytes(1 << 20))
        qemu_img("create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base", folder / "disk.qcow2", "64K")
        return folder

    def state_twice(self, child, fmt):
        """A second statement of the parent's format in the place of the table of feature names."""
        data = bytearray(child.read_bytes())
        at = data.index(struct.pack(">I", 0x6803F857))
        new = struct.pack(">II8sII", 0xE2792ACA, len(fmt), fmt.encode(), 0, 0)
        data[at : at + len(new)] = new
        child.chmod(0o600)
        child.write_bytes(data)

    def test_two_formats_of_one_parent(self, bench, plain, victim):
        qemu_img("create", "-q", "-f", "qcow2", "-F", "raw", "-b", victim, plain / "base", "64K")
        assert bench.codes(plain / "vm.xml") == []  # the base is the guest's data
        self.state_twice(plain / "disk.qcow2", "qcow2")
        seen = bench.place / "seen"
        qemu_img("convert", "-f", "qcow2", "-O", "raw", plain / "disk.qcow2", seen)
        assert b"secret!" in seen.read_bytes()  # QEMU takes the last one, and reads what stands below the base
        assert "damaged" in bench.codes(plain / "vm.xml")
        with pytest.raises(errors.Corrupt, match="twice"):
            bench.bring(plain / "vm.xml")

    def test_zero_byte_in_a_name(self, bench, source, victim):
        child, _ = base_of(source)
        name = images.read(child, images.QCOW2).backing.encode()
        data = child.read_bytes()
        child.chmod(0o600)
        child.write_bytes(data.replace(name, str(victim).encode()[: len(name)].ljust(len(name), b"\0"), 1))
        assert "damaged" in bench.codes(source)


@pytest.mark.parametrize(("count", "extra"), [(0xFFFFFFFF, 0), (1, 0xFFFFFFFF)])
def test_snapshots_inside_that_take_all_memory(place, count, extra):
    path = place / "x.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    with path.open("r+b") as file:
        file.seek(60)
        file.write(struct.pack(">IQ", count, 1 << 20))
        file.seek(1 << 20)
        file.write(struct.pack(">QIHHIIQII", 0, 0, 0, 0, 0, 0, 0, 0, extra))
        file.truncate(6 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, (limits := resource.getrlimit(resource.RLIMIT_AS))[1]))
    try:
        with pytest.raises(errors.Corrupt):
            images.internal_snapshots(path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


class TestStateFolders:
    @pytest.fixture
    def secrets(self, place):
        folder = place / "other" / "tpm"
        folder.mkdir(parents=True)
        (folder / "tpm2-00.permall").write_bytes(b"the key of another VM")
        return folder

    def test_tpm_by_the_name_of_a_change(self, bench, source, secrets):
        one = source_home.open_source(source)
        (one.layout.vm_folder / "tpm_x").mkdir(parents=True)
        way = os.path.relpath(secrets, one.layout.vm_folder / "tpm_x")
        edit(source, lambda text: re.sub(r'change="[^"]*"', f'change="x/{way}"', text))
        assert source_home.open_source(source).facts.change == f"x/{way}"
        assert source_home.open_source(source).tpm is None
        assert "link" in bench.codes(source)

    def test_folder_of_a_snapshot_that_is_a_link(self, bench, source, secrets):
        one = source_home.open_source(source).snapshots[0]
        folder = one.file.with_suffix("")
        if folder.exists():
            folder.rmdir()
        folder.symlink_to(secrets.parent)
        assert next(each for each in source_home.open_source(source).snapshots if each.file == one.file).tpm is None
        assert "link" in bench.codes(source)


def test_id_that_is_a_way(bench, source, place):
    file = place / "vm.xml"
    text = next((source / "Virtual Machines").glob("*.xml")).read_text()
    file.write_text(re.sub("<uuid>.*?</uuid>", "<uuid>../../evil</uuid>", text))
    for options in ({}, {"new_id": False}):
        with pytest.raises(errors.Corrupt, match="no id"):
            bench.bring(file, **options)


def test_slot_that_is_a_way(bench, source):
    edit(
        source,
        lambda text: text.replace("<target dev='hda'", "<target dev='hd/../../hda'").replace('"hda"', '"hd/../../hda"'),
    )
    assert "damaged" in bench.codes(source)


class TestRegister:
    """The folder was somebody else's until now, and so was everything in it."""

    def begun(self, source, victim):
        """A journal whose completion writes a file of the host."""
        one = source_home.open_source(source)
        private = source / ".hvmgr"
        private.mkdir(exist_ok=True)
        steps = (
            plan.TakeHome(home=str(source), vm_id=one.vm_id, made=()),
            plan.ChangeFile(path=str(victim), before="", after="evil"),
        )
        made = Plan(plan_id="x", vm_id=one.vm_id, operation="import", subject="import", finish=steps)
        journal.begin(private / "journal", made)
        return private / "journal"

    def test_journal_that_came_along(self, bench, source, victim):
        before = victim.read_bytes()
        self.begun(source, victim)
        assert "source-in-use" in bench.codes(source, mode=hvmgr.Mode.REGISTER)
        with pytest.raises(errors.Conflict):
            bench.bring(source, mode=hvmgr.Mode.REGISTER)
        assert victim.read_bytes() == before

    def test_journal_of_another_user(self, bench, source, victim):
        """Also where the place is one in which a home is to be made."""
        before = victim.read_bytes()
        os.chown(self.begun(source, victim), STRANGER, STRANGER)
        with pytest.raises(errors.Conflict, match="not followed"):
            bench.make(4, name=source.name, home=source)
        assert victim.read_bytes() == before

    def test_doctor_does_not_follow_it(self, bench, source, victim):
        before = victim.read_bytes()
        edit(
            source,
            lambda text: re.sub("home='[^']*'", f"home='{source}'", text).replace('home="', f'home="{source}" was="'),
        )
        self.begun(source, victim)
        bench.host.repair(str(source))
        assert victim.read_bytes() == before

    def test_lock_that_is_a_link(self, bench, source, victim):
        before = victim.read_bytes()
        (source / ".hvmgr").mkdir()
        (source / ".hvmgr" / "lock").symlink_to(victim)
        with pytest.raises(errors.HvmgrError):
            bench.bring(source, mode=hvmgr.Mode.REGISTER)
        assert victim.read_bytes() == before

    @pytest.mark.parametrize(
        "name", [".hvmgr", ".hvmgr/trash", ".hvmgr/reserve", "Virtual Machines/ID", "Snapshots/ID"]
    )
    def test_link_in_the_folder(self, bench, place, name):
        """Its target would be emptied, written, or have another mode."""
        source = bench.take_away(bench.make(4, name="web"), export=False)
        target = place / "elsewhere"
        target.mkdir(mode=0o700)
        (target / "precious").write_bytes(b"x")
        path = source / name.replace("ID", source_home.open_source(source).vm_id)
        path.parent.mkdir(exist_ok=True)
        if path.is_dir():
            path.rmdir()
        path.symlink_to(target)
        with pytest.raises(errors.Corrupt):
            bench.bring(source, mode=hvmgr.Mode.REGISTER)
        assert (target.stat().st_mode & 0o777, list(target.iterdir())) == (0o700, [target / "precious"])

    def test_folder_of_another_user(self, bench, source):
        os.chown(source, STRANGER, STRANGER)
        assert bench.codes(source) == []
        assert bench.codes(source, mode=hvmgr.Mode.REGISTER) == ["source-of-others"]


def test_notes_beside_a_source_are_not_written_by_a_link(bench, place):
    source = bench.take_away(bench.make(4, name="web"))
    (place / "elsewhere").mkdir()
    (source.parent / ".web.hvmgr-links").symlink_to(place / "elsewhere")
    bench.bring(source, mode=hvmgr.Mode.LINK)
    assert list((place / "elsewhere").iterdir()) == []


def test_journal_is_our_own(place):
    path = place / "journal"
    journal.begin(path, Plan(plan_id="x", vm_id="y", operation="o", subject="s"))
    assert journal.read(path).plan.plan_id == "x"
    (place / "link").symlink_to(path)
    os.chown(path, STRANGER, STRANGER)
    for one in (path, place / "link"):
        with pytest.raises(errors.Conflict):
            journal.read(one)
    assert journal.read(path, obeyed=False).plan.plan_id == "x"  # as on a share that makes nobody of root


def test_lock_follows_no_link(place, victim):
    (place / "lock").symlink_to(victim)
    before = victim.read_bytes()
    with pytest.raises(errors.HvmgrError), locks.held(place / "lock", wait_s=0, what="it"):
        pass
    assert victim.read_bytes() == before


QEMU = "<qemu:commandline xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><qemu:arg value='-S'/></qemu:commandline>"


class TestHostAccess:
    """What a configuration would have of the host is said before the VM is there."""

    @pytest.mark.parametrize(
        "device",
        [
            "<interface type='user'><script path='evil'/></interface>",
            "<filesystem type='mount'><driver type='virtiofs'/><binary path='/tmp/evil'/><source dir='/'/><target dir='x'/></filesystem>",
            "<hostdev mode='subsystem' type='usb'><source><vendor id='0x1'/><product id='0x2'/></source></hostdev>",
            "<serial type='dev'><source path='/dev/sda'/></serial>",
            "<channel type='unix'><source mode='connect' path='/run/libvirt/libvirt-sock'/><target type='virtio'/></channel>",
            "<rng model='virtio'><backend model='random'>/dev/mem</backend></rng>",
            "<serial type='pty'><log file='/etc/cron.d/not-yet-there'/></serial>",
            "<disk type='network'><source protocol='nbd' name='x'/><target dev='vdz'/></disk>",
        ],
    )
    def test_devices(self, bench, source, device):
        edit(source, lambda text: text.replace("</devices>", device + "</devices>"))
        assert set(bench.codes(source)) - {"missing-file"} == {"host-access"}

    @pytest.mark.parametrize(
        "element",
        [QEMU, "<seclabel type='none'/>", "<seclabel type='static' model='dac'><label>+0:+0</label></seclabel>",
         "<sysinfo type='fwcfg'><entry name='opt/x' file='/etc/shadow'/></sysinfo>"],
    )  # fmt: skip
    def test_elements(self, bench, source, element):
        edit(source, lambda text: text.replace("</domain>", element + "</domain>"))
        assert bench.codes(source) == ["host-access"]

    def test_in_a_snapshot_alone(self, bench, source):
        file = source_home.open_source(source).snapshots[0].file
        edit(source, lambda text: text.replace("</domain>", QEMU + "</domain>"), file=file)
        assert bench.codes(source) == ["host-access"]

    def test_harmless_things(self, bench, source):
        harmless = (
            "<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>"
            "<channel type='unix'><source mode='bind' path='/run/libvirt/qemu/channel/target/domain-1-x/a'/><target type='virtio'/></channel>"
        )
        edit(source, lambda text: text.replace("</devices>", harmless + "</devices>"))
        assert bench.codes(source) == []

    def test_emulator_of_a_stranger(self, bench, source, place):
        evil = place / "evil"
        evil.write_text(f"#!/bin/sh\ntouch {place}/ran\n")
        evil.chmod(0o755)
        edit(source, lambda text: re.sub("<emulator>.*?</emulator>", f"<emulator>{evil}</emulator>", text))
        assert bench.codes(source) == ["host-access"]
        assert bench.bring(source).home.present().emulator != evil
        assert not (place / "ran").exists()

    def test_disk_of_a_saved_state_alone(self, bench, source, victim):
        one = source_home.open_source(source).snapshots[0]
        disk = f"<disk type='file' device='disk'><source file='{victim}'/><target dev='hdc' bus='ide'/></disk>"
        xml = one.configuration.to_xml().replace("</devices>", disk + "</devices>")
        edit(source, lambda text: text.replace('state="none"', 'state="running"'), file=one.file)
        folder = one.file.with_suffix("")
        folder.mkdir(exist_ok=True)
        head = saved_state.head(xml, complete=True, was_running=True)
        (folder / "memory.save").write_bytes(head + b"QEVM" + bytes(8 << 10))
        assert bench.codes(source) == ["saved-state-damaged"]


class TestBetweenLookAndCopy:
    """Whoever owns the folder may change it while it is read."""

    def changing(self, monkeypatch, change):
        real = copy.copy_files

        def copy_files(jobs, **options):
            change(jobs)
            return real(jobs, **options)

        monkeypatch.setattr(import_steps.copy, "copy_files", copy_files)

    def refused(self, bench, source):
        before = bench.states()
        with pytest.raises(errors.Conflict, match="while it was"):
            bench.bring(source)
        assert [name for name in bench.states()[0] if name not in before[0]] == []
        assert bench.states()[1] == before[1]

    def test_header_that_names_another_parent(self, bench, source, victim, monkeypatch):
        child, _ = base_of(source)
        self.changing(monkeypatch, lambda _: qemu_img("rebase", "-q", "-u", "-F", "raw", "-b", victim, child))
        self.refused(bench, source)

    def test_file_that_becomes_a_link(self, bench, source, victim, monkeypatch):
        _, base = base_of(source)

        def replace(_):
            base.unlink()
            base.symlink_to(victim)

        self.changing(monkeypatch, replace)
        self.refused(bench, source)

    def test_folder_that_becomes_a_link(self, place):
        (place / "real").mkdir()
        (place / "real" / "x").write_bytes(b"x")
        (place / "way").symlink_to("real")
        with pytest.raises(errors.Conflict, match="became a link"):
            copy.copy_files([copy.Job(place / "way" / "x", place / "target", plain=True)])
        assert not (place / "target").exists()
        copy.copy_files([copy.Job(place / "real" / "x", place / "target", plain=True)])


def test_archive_that_fills_the_disk(bench, source, place, monkeypatch):
    for number in range(4):
        (source / "Virtual Hard Disks" / f"{number}.vhd").write_bytes(b"x" * (1 << 20))
    archive = place / "a.tar"
    subprocess.run(["tar", "--format=pax", "-C", source.parent, "-cf", archive, source.name], check=True, timeout=60)
    monkeypatch.setattr(archives, "_SHOWN_MAX", 3 << 20)
    with pytest.raises(errors.Corrupt, match="more images than"):
        bench.codes(archive)
    assert not [one for one in (archives._place()).iterdir() if one.is_dir()]
