"""What export and import are for, from one end to the other: real guests, two hosts, the command line."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

import hvmgr
from hvmgr.faces import console
from hvmgr.model import configuration
from hvmgr.operations.steps import execution

pytestmark = [pytest.mark.guest, pytest.mark.libvirtd, pytest.mark.timeout(400)]

BOOT_S = 250  # ten guests beside other tests


def identity(machine):
    """What must be another in another VM: id, address, generation id, as QEMU has them."""
    live = configuration.parse(machine.domain.xml(live=True), source="live")
    return live.uuid, live.nics()[0].mac, live.genid


def sums_hold(folder):
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=folder, check=True, timeout=60)


TEN = """
import sys
from pathlib import Path
import hvmgr
root, source = sys.argv[1:]
with hvmgr.Host.open("qemu:///system", root=Path(root)) as host:
    for number in range(10):
        mode = (hvmgr.Mode.COPY, hvmgr.Mode.LINK)[number % 2]
        host.import_vm(source, hvmgr.ImportOptions(name=f"vm{number}", mode=mode))
"""


def test_ten_vms_of_one_read_only_gold_run_at_once(a, gold):
    """From saved memory, so that ten guests take no longer than one that boots."""
    subprocess.run(["chmod", "-R", "a-w", gold.saved], check=True, timeout=60)
    with a.mounted_read_only(gold.saved) as place, contextlib.ExitStack() as stack:
        a.python("-c", TEN, a.root, place)
        machines = [a.machine(f"vm{number}") for number in range(10)]
        screens = []
        for machine in machines:
            machine.domain.start(paused=True)
            screens.append(stack.enter_context(machine.screen()))
        for machine in machines:
            machine.domain.resume()
        assert [machine.state() for machine in machines] == ["running"] * 10
        for column in zip(*map(identity, machines), strict=True):
            assert len(set(column)) == 10
        for machine, screen in zip(machines, screens, strict=True):
            assert screen.next_tick(BOOT_S).follows(gold.warm)
            assert screen.next_tick(BOOT_S).ok
            machine.domain.destroy()  # the others may have the processor
    sums_hold(gold.saved)


def test_one_snapshot_of_a_running_vm_goes_on_as_a_vm_of_its_own(a, gold, monkeypatch):
    a.run("import", gold.folder, "--name", "source", "--drop-snapshot", "cold")
    source = a.machine("source")
    source.vm.snapshot("warm").apply()
    for number in range(2, 21):
        source.vm.create_snapshot(f"{number}", type="standard" if number == 5 else "disk-only")
        if number in (4, 5, 6):
            source.run_for(2)
    fifth = source.count_of(source.vm.snapshot("5"))
    before = source.tick()
    with monkeypatch.context() as patch:
        patch.setattr(execution, "run", None)  # nothing is asked of the VM
        folder = source.vm.export(a.folder / "five", hvmgr.ExportOptions(snapshot="5"))
    assert source.tick().memory > before.memory
    assert a.run("import", folder, "--name", "five")["vm"]["state"] == "saved"
    five = a.machine("five")
    five.domain.start(paused=True)
    assert five.first_tick().follows(fifth)
    five.check()
    source.tick()
    source.check()


def codes(report):
    return {one["code"] for one in report["findings"] if one["severity"] == "error"}


def apply_warm(site, vm, gold):
    """The VM goes on from its snapshot with memory; its live configuration."""
    site.run("snapshot", "apply", vm["id"], "warm")
    domain = site.connection.find_domain(vm["id"])
    with console.Console(domain.serial_path()) as screen:
        tick = screen.next_tick(BOOT_S)
    assert tick.ok
    assert tick.memory > gold.warm
    live = configuration.parse(domain.xml(live=True), source="live")
    domain.destroy()
    return live


@pytest.fixture
def other_disk(gold):
    """A folder on another file system."""
    folder = Path(tempfile.mkdtemp(prefix="hv", dir="/dev/shm"))
    folder.chmod(0o711)
    assert folder.stat().st_dev != gold.folder.stat().st_dev
    yield folder
    shutil.rmtree(folder)


def test_whole_tree_comes_up_on_a_host_with_other_networks(b, gold, other_disk):
    report = b.run("compare", gold.folder)
    assert (codes(report), report["ready"]) == ({"missing-network"}, False)
    (missing,) = [one for one in report["findings"] if one["code"] == "missing-network"]
    assert (missing["where"], missing["repair"].split(",")[0]) == ("lan-a", "--network lan-a=OTHER")
    assert b.run("import", gold.folder, code=4)["error"]["code"] == "Conflict"
    vm = b.run("import", gold.folder, "--network", "lan-a=lan-b", "--vm-path", other_disk)["vm"]
    assert Path(vm["home"]).parent == other_disk
    assert vm["id"] != next((gold.folder / "Virtual Machines").glob("*.xml")).stem
    names = [one["name"] for one in b.run("snapshot", "list", "gold")["snapshots"]]
    assert names == ["warm", "cold"]
    live = apply_warm(b, vm, gold)
    assert (live.uuid, live.nics()[0].source) == (vm["id"], "lan-b")


def test_configuration_alone_finds_its_disks_elsewhere(b, gold):
    (base,) = (gold.elsewhere / "base").iterdir()
    networks = ["--nic", f"{gold.mac}=bridge=br-lan-a"]
    paths = ["--path", f"{gold.home}={gold.elsewhere}/images"]
    assert codes(b.run("compare", gold.config)) == {"missing-network", "missing-disk"}
    assert codes(b.run("compare", gold.config, *networks, *paths)) == {"missing-bridge", "missing-disk"}
    networks = ["--nic", f"{gold.mac}=bridge=br-lan-b"]
    disks = [*paths, "--disk", f"vda={base}"]
    report = b.run("compare", gold.config, *networks, *disks, "--thorough")
    assert (codes(report), report["ready"]) == (set(), True)
    vm = b.run("import", gold.config, *networks, *disks)["vm"]
    domain = b.connection.find_domain(vm["id"])
    assert configuration.parse(domain.xml(live=False), source="it").nics()[0].source == "br-lan-b"
    domain.start(paused=True)
    with console.Console(domain.serial_path()) as screen:
        domain.resume()
        assert screen.next_boot(BOOT_S) == (gold.now,)


def test_plan_goes_round_and_reports_are_stable(b, gold, tmp_path):
    file = tmp_path / "gold.yaml"
    report = b.run("compare", gold.folder, "--plan-out", file)
    assert report == {**b.run("compare", gold.folder), "plan": str(file)}
    assert list(report) == ["schema", "source", "name", "mode", "home", "ready", "findings", "plan"]
    for one in report["findings"]:
        assert list(one) == ["code", "severity", "sentence", "where", "repair"]
    text = file.read_text()
    assert "# error missing-network: " in text
    assert codes(b.run("compare", "--plan", file)) == {"missing-network"}
    assert b.run("import", "--plan", file, code=4)["error"]["code"] == "Conflict"
    text = text.replace('name: "gold"\n', 'name: "planned"\n')
    file.write_text(text.replace("    network: ~\n", '    network: "lan-b"\n'))
    report = b.run("compare", "--plan", file)
    assert (report["name"], report["ready"], codes(report)) == ("planned", True, set())
    vm = b.run("import", "--plan", file)["vm"]
    assert vm["name"] == "planned"
    nics = configuration.parse(b.connection.find_domain(vm["id"]).xml(live=False), source="it").nics()
    assert [one.source for one in nics] == ["lan-b"]
    assert len(b.run("snapshot", "list", "planned")["snapshots"]) == 2
