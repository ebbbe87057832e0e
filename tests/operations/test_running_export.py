"""Exports of VMs that run or are saved: the guest goes on, and what was exported is of one moment."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import uuid
from pathlib import Path

import pytest
from lxml import etree

import hvmgr
from hvmgr import errors
from hvmgr.faces import console
from hvmgr.host import saved_state
from hvmgr.host.domain import Domain
from hvmgr.model import manifest
from hvmgr.model.image_format import ImageFormat
from hvmgr.model.manifest import Extent
from hvmgr.model.metadata import SavedState
from hvmgr.model.specification import Firmware
from hvmgr.operations.exchange.export_steps import Exporter
from hvmgr.storage import source_home
from tests.operations.conftest import TICK_S, read_counter

pytestmark = pytest.mark.guest


class Out:
    """A folder for exports, and VMs that go on from them."""

    def __init__(self, folder, connection):
        self.folder = folder
        self.connection = connection

    def export(self, machine, **options):
        folder = machine.vm.export(self.folder, hvmgr.ExportOptions(**options))
        assert machine.host.verify(folder) == []
        subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=folder, check=True, timeout=60)
        return folder

    def counts(self, folder):
        """The guest's counts on the disks of the export's present."""
        source = source_home.open_source(folder)
        return {read_counter(Path(path), source.images[path].format) for path in source.disks.values()}

    def count(self, folder):
        counts = self.counts(folder)
        assert max(counts) - min(counts) <= 1
        return min(counts)

    def first_tick(self, folder):
        """What the guest says first when it goes on from the saved memory, on children of the exported images."""
        source = source_home.open_source(folder)
        assert source.memory is not None
        saved = source.saved.copy()
        saved.set_name(f"copy{uuid.uuid4().hex[:6]}")
        saved.set_uuid(str(uuid.uuid4()))
        for slot, path in source.disks.items():
            child = self.folder / f"{uuid.uuid4()}.qcow2"
            command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", path, "-F", source.images[path].format, child]
            subprocess.run(command, check=True, timeout=60)
            child.chmod(0o666)
            saved.set_disk_source(slot, child, "qcow2")
        if source.nvram is not None:
            nvram = self.folder / f"{uuid.uuid4()}.fd"
            shutil.copyfile(source.nvram, nvram)
            nvram.chmod(0o666)
            saved.set_nvram(nvram)
        memory = self.folder / f"{uuid.uuid4()}.save"
        saved_state.rewritten(source.memory, memory, saved.to_xml())
        self.connection.restore(memory, saved.to_xml(), running=False)
        domain = self.connection.find_domain_by_name(saved.name)
        with console.Console(domain.serial_path()) as screen:
            domain.resume()
            tick = screen.next_tick(TICK_S)
        domain.destroy()
        assert tick.ok, tick
        return tick


@pytest.fixture
def out(factory, connection):
    folder = Path(tempfile.mkdtemp(prefix="out", dir=factory.folder))
    folder.chmod(0o711)
    yield Out(folder, connection)
    shutil.rmtree(folder)


def told(folder):
    return manifest.parse((folder / manifest.FILE).read_text(), source=manifest.FILE)


def unnamed(machine):
    tree = machine.vm.tree()
    return [path for path in tree.images if path not in tree.named()]


class TestRunning:
    def test_guest_runs_on_and_its_disks_are_of_one_moment(self, make_machine, two_disks, out):
        machine = make_machine(two_disks)
        before = machine.tick()
        folder = out.export(machine)
        after = machine.tick()
        assert before.memory - 1 <= out.count(folder) <= after.memory
        assert machine.state() == "running"
        machine.check()
        assert told(folder).state is SavedState.NONE

    def test_what_was_frozen_is_merged_by_the_running_vm(self, machine, out):
        machine.vm.create_snapshot("one")
        machine.run_for(2)
        folder = out.export(machine)
        assert unnamed(machine) == []
        assert len(machine.vm.tree().images) == 2
        assert not any("wait" in sentence for sentence in machine.said)
        late = machine.tick()
        assert out.count(folder) <= late.memory
        machine.check()
        machine.vm.stop(force=True)
        assert machine.held() >= late.disk

    def test_what_cannot_be_merged_now_is_no_failure_of_the_export(self, machine, out, monkeypatch):
        def refuse(*_, **__):
            raise errors.HostFailed("QEMU refused")

        machine.vm.create_snapshot("one")
        monkeypatch.setattr(Domain, "start_stream", refuse)
        out.export(machine)
        assert len(unnamed(machine)) == 1
        assert any("the export is complete" in one and "QEMU refused" in one for one in machine.said)
        monkeypatch.undo()
        machine.vm.stop(force=True)
        held = machine.held()
        assert machine.vm.merge()
        assert unnamed(machine) == []
        assert machine.held() == held
        machine.check()

    def test_export_has_no_trace_of_the_freezing(self, machine, out):
        machine.vm.create_snapshot("one")
        parent = machine.vm.now().parent
        source = source_home.open_source(out.export(machine))
        assert source.facts.parent == parent
        assert [one.record.name for one in source.snapshots] == ["one"]
        assert len(source.images) == 2
        assert machine.vm.now().parent == parent
        assert len(machine.vm.snapshots()) == 1

    def test_undo_slot_stays(self, machine, out):
        machine.vm.create_snapshot("one").apply(discard_state=True)
        machine.run_for(2)
        out.export(machine)
        assert machine.vm.can_undo()
        machine.vm.undo(discard_state=True)
        machine.check()

    def test_memory_goes_on_from_the_exported_disks(self, make_machine, two_disks, out):
        machine = make_machine(two_disks)
        folder = out.export(machine, with_state=True)
        assert machine.tick().memory >= out.count(folder)
        assert told(folder).state is SavedState.RUNNING
        assert out.first_tick(folder).follows(out.count(folder))
        machine.check()
        assert not machine.layout.export.exists()

    def test_paused_guest_stays_paused(self, machine, out):
        machine.domain.suspend()
        folder = out.export(machine, with_state=True)
        assert told(folder).state is SavedState.PAUSED
        assert machine.state() == "paused"
        assert out.first_tick(folder).follows(out.count(folder))
        assert machine.first_tick().follows(out.count(folder))

    def test_present_alone_is_flattened_while_it_runs(self, machine, out):
        machine.vm.create_snapshot("one")
        before = machine.run_for(2)
        folder = out.export(machine, snapshots=Extent.NONE, format=ImageFormat.RAW)
        assert [one.format for one in told(folder).images] == ["raw"]
        assert before.memory - 1 <= out.count(folder) <= machine.tick().memory

    def test_uefi_variables_come_along(self, make_machine, kinds, out):
        machine = make_machine(kinds(firmware=Firmware.EFI), running=False)
        machine.domain.start(paused=True)
        nvram = machine.vm.home.present().nvram
        source = source_home.open_source(out.export(machine, with_state=True))
        assert source.nvram.read_bytes() == nvram.read_bytes()
        assert source.saved.nvram == source.present.nvram
        machine.check()


class TestSnapshot:
    def test_snapshot_of_a_running_vm_becomes_a_vm_that_goes_on(self, make_machine, two_disks, out):
        machine = make_machine(two_disks)
        for name in ("one", "two", "three"):
            machine.vm.create_snapshot(name)
            machine.run_for(2)
        images = set(machine.vm.tree().images)
        before = machine.tick()
        folder = out.export(machine, snapshot="two")
        assert machine.tick().memory > before.memory
        assert set(machine.vm.tree().images) == images
        count = machine.count_of(machine.vm.snapshot("two"))
        assert out.count(folder) == count
        assert out.first_tick(folder).follows(count)
        source = source_home.open_source(folder)
        assert source.vm_id not in (machine.vm.id, source.saved.name)
        assert source.saved.uuid == source.present.uuid == source.vm_id
        assert [image.parent for image in source.images.values()] == [None, None]
        machine.check()

    def test_without_state_it_is_off(self, machine, out):
        machine.vm.create_snapshot("one")
        folder = out.export(machine, snapshot="one", without_state=True, format=ImageFormat.VHD)
        assert told(folder).state is SavedState.NONE
        assert source_home.open_source(folder).memory is None
        assert out.count(folder) == machine.count_of(machine.vm.snapshot("one"))

    def test_saved_states_of_a_tree_come_along_or_not(self, machine, out):
        machine.vm.create_snapshot("one")
        folder = out.export(machine)
        (one,) = source_home.open_source(folder).snapshots
        assert (one.record.state, one.memory is not None) == (SavedState.RUNNING, True)
        shutil.rmtree(folder)
        folder = out.export(machine, without_state=True)
        (one,) = source_home.open_source(folder).snapshots
        assert (one.record.state, one.memory) == (SavedState.NONE, None)


class TestSaved:
    def test_saved_vm_takes_its_memory_along_and_stays_saved(self, machine, out):
        machine.domain.managed_save()
        folder = out.export(machine)
        assert machine.state() == "saved"
        assert told(folder).state is SavedState.RUNNING
        assert out.first_tick(folder).follows(out.count(folder))
        machine.vm.start()
        assert machine.tick().memory > out.count(folder)
        machine.check()

    def test_without_state_it_has_its_disks_alone(self, machine, out):
        machine.domain.managed_save()
        folder = out.export(machine, without_state=True)
        assert source_home.open_source(folder).memory is None
        assert machine.state() == "saved"


class TestRefusals:
    def test_nobody_to_quiesce(self, machine, out):
        images = set(machine.vm.tree().images)
        with pytest.raises(errors.Conflict, match="no guest agent answers"):
            out.export(machine, quiesce=True)
        assert set(machine.vm.tree().images) == images
        machine.check()

    def test_running_disk_that_cannot_be_frozen(self, make_machine, two_disks, out):
        machine = make_machine(two_disks, running=False)
        slot = sorted(machine.vm.now().disks)[1]
        text = machine.domain.xml(live=False)
        root = etree.fromstring(text)
        for disk in root.findall("devices/disk"):
            if disk.find("target").get("dev") == slot:
                disk.set("snapshot", "no")
        machine.host.connection.define(etree.tostring(root, encoding="unicode"))
        machine.domain.start(paused=True)
        with pytest.raises(errors.Conflict, match=f"disk {slot} is written by the running VM"):
            out.export(machine)
        folder = out.export(machine, exclude=(slot,))
        assert slot not in source_home.open_source(folder).disks

    def test_excluded_disk_and_memory(self, make_machine, two_disks, out):
        machine = make_machine(two_disks)
        slot = sorted(machine.vm.now().disks)[1]
        with pytest.raises(errors.UsageError, match="only with all the disks"):
            out.export(machine, with_state=True, exclude=(slot,))

    def test_vhd_and_memory(self, machine, out):
        machine.vm.create_snapshot("one")
        with pytest.raises(errors.UsageError, match="saved memory on VHD"):
            out.export(machine, snapshot="one", format=ImageFormat.VHD)


class TestDeath:
    class Killed(BaseException):
        """The command died."""

    def test_next_command_finds_a_whole_vm_and_the_next_export_goes_on(self, machine, out, monkeypatch):
        machine.vm.create_snapshot("one")

        def die(*_):
            raise self.Killed

        with monkeypatch.context() as patch:
            patch.setattr(Exporter, "_acts", {})
            patch.setattr(Exporter, "_copy", die)
            patch.setattr("hvmgr.operations.exchange.export_.durable.remove_folder", lambda _: None)
            with pytest.raises((self.Killed, KeyError)):
                out.export(machine, with_state=True)
        machine.vm.merge()
        assert not machine.layout.export.exists()
        machine.check()
        folder = out.export(machine, with_state=True)
        assert out.first_tick(folder).follows(out.count(folder))
        machine.check()
