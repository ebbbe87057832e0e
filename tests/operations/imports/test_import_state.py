"""Saved states come along: they restore under the new identity, in the new place."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

import hvmgr
from hvmgr.host import saved_state
from hvmgr.model import configuration
from hvmgr.storage import source_home


def monitor(bench, vm, line):
    return str(bench.domain(vm).monitor("human-monitor-command", command_line=line)).strip()


@pytest.fixture
def source(bench):
    """Two snapshots of a running VM, each with a byte of its own in the serial port's scratch register."""
    vm = bench.make(4, networks=(hvmgr.NetworkSpecification(kind="user"),))
    bench.start(vm)
    for number, name in enumerate(("first", "second"), 1):
        monitor(bench, vm, f"o /b 0x3ff {0xA0 + number:#x}")
        vm.create_snapshot(name)
    vm.stop(force=True)
    return bench.take_away(vm)


@pytest.mark.parametrize("mode", [hvmgr.Mode.COPY, hvmgr.Mode.LINK, hvmgr.Mode.REGISTER])
def test_saved_state_runs_under_the_new_identity(bench, source, mode):
    vm = bench.bring(source, mode=mode, new_id=True, name="other")
    for number, name in enumerate(("first", "second"), 1):
        vm.snapshot(name).apply(discard_state=True)
        assert str(vm.state()) == "running"
        assert monitor(bench, vm, "i /b 0x3ff").endswith(f"{0xA0 + number:#x}"), name
        live = configuration.parse(bench.domain(vm).xml(live=True), source="live")
        assert (live.uuid, live.name) == (vm.id, "other")
        assert live.nics()[0].mac == vm.home.present().nics()[0].mac
    vm.stop(force=True)
    bench.check(vm)


def test_every_trace_of_the_old_identity_is_gone(bench, source):
    """Only where the VM comes from is told."""
    old = next((source / "Virtual Machines").glob("*.xml")).stem
    told = f'<hvmgr:origin vm="{old}" mode="copy"'
    vm = bench.bring(source, name="other")
    for one in vm.snapshots():
        memory = vm.home.layout.memory(one.id)
        xml = saved_state.read(memory).xml
        assert old not in xml.replace(told, "")
        assert str(source) not in xml
        assert vm.id in xml
    assert not any(old in path.read_text().replace(told, "") for path in vm.path.rglob("*.xml"))


def test_stream_is_the_same_and_address_is_told(bench, source):
    vm = bench.bring(source, name="other")

    def streams(folder):
        found = set()
        for path in folder.rglob("memory.save"):
            found.add(hashlib.sha256(path.read_bytes()[saved_state.read(path).data_offset :]).hexdigest())
        return found

    assert streams(vm.path) == streams(source)
    found = bench.host.plan_import(source).check()
    assert "address-in-state" in [one.code for one in found]


def test_without_state(bench, source):
    vm = bench.bring(source, without_state=True)
    assert [str(one.state) for one in vm.snapshots()] == ["none", "none"]
    assert not list(vm.path.rglob("memory.save"))
    vm.snapshot("first").apply()
    assert str(vm.state()) == "off"
    bench.check(vm)


def test_home_is_registered_without_state(bench, source):
    """Also where one cannot be used."""
    first = min(source.rglob("memory.save"))
    first.chmod(0o600)
    first.write_bytes(b"no saved state")
    assert bench.codes(source, mode=hvmgr.Mode.REGISTER) == ["saved-state-damaged", "export-used-up"]
    vm = bench.bring(source, mode=hvmgr.Mode.REGISTER, without_state=True)
    assert [str(one.state) for one in vm.snapshots()] == ["none", "none"]
    assert not list(vm.path.rglob("memory.save"))
    bench.check(vm)


def test_network_of_a_saved_state_follows_the_map(bench, source):
    """A map reaches the configurations inside saved states too."""

    def plug(text):
        return re.sub("""<interface type=['"]user['"]>""", "<interface type='bridge'><source bridge='br9'/>", text)

    for path in source.rglob("*.xml"):
        path.chmod(0o600)
        path.write_text(plug(path.read_text()))
    for path in source.rglob("memory.save"):
        xml = saved_state.read(path).xml
        path.chmod(0o600)
        saved_state.replace_xml(path, plug(xml))
    assert bench.codes(source) == ["missing-bridge"]
    vm = bench.bring(source, networks={"br9": "bridge=lo"})
    texts = [path.read_text() for path in vm.path.rglob("*.xml")]
    texts += [saved_state.read(path).xml for path in vm.path.rglob("memory.save")]
    assert len(texts) == 5
    for text in texts:
        nic = configuration.parse(text, source="x").nics()[0]
        assert (nic.type, nic.source) == ("bridge", "lo")
    assert all(Path(path).is_relative_to(vm.path) for path in vm.now().disks.values())


def test_compressed_memory_becomes_what_every_libvirt_reads(bench):
    """The saved memory of a present is started from by libvirt itself, and not every libvirt knows zstd."""
    vm = bench.make(4)
    bench.start(vm)
    monitor(bench, vm, "o /b 0x3ff 0xa7")
    memory = vm.home.layout.memory(vm.create_snapshot("one", compress=True).id)
    vm.stop(force=True)
    assert saved_state.read(memory).compression is saved_state.Compression.ZSTD
    archive = bench.place / "one.tar"
    vm.export_archive(archive, hvmgr.ExportOptions(snapshot="one"))
    clone = vm.clone("clone", hvmgr.CloneOptions(snapshot="one"))
    packed = bench.bring(archive, name="packed")
    for one in (clone, packed):
        save = bench.host.connection.managed_save_path(one.name)
        assert saved_state.read(save).compression is saved_state.Compression.RAW
        assert not list((one.path / ".hvmgr").glob("*.save"))
    clone.start()
    assert monitor(bench, clone, "i /b 0x3ff").endswith("0xa7")


def test_snapshot_with_memory_lies_elsewhere(bench, source):
    """What is taken from a second folder is looked at like the source itself."""
    record = next(one.record for one in source_home.open_source(source).snapshots if one.record.name == "second")
    kept = bench.place / "kept"
    kept.mkdir()
    for path in (source / "Snapshots").glob(f"{record.id}*"):
        path.rename(kept / path.name)
    (bench.place / "link").symlink_to(kept)
    vm = bench.bring(source, name="other", snapshot_source=bench.place / "link")
    assert bench.tree(vm)[0]["second"] == ("first", "running")
    memory = kept / record.id / "memory.save"
    memory.rename(kept / "elsewhere")
    memory.symlink_to(kept / "elsewhere")
    assert "link" in bench.codes(source, name="third", snapshot_source=kept)
