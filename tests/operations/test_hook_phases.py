"""What libvirt makes of the hook when a saved VM goes on and when its daemon is restarted: bare VMs, a real libvirtd."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from lxml import etree

import hvmgr
from hvmgr.faces import hook
from hvmgr.operations import start_hook
from tests import private_libvirt

pytestmark = pytest.mark.libvirtd


# The two ends of a migration have the same name and number, and would have the same control group on one machine.
NO_CGROUPS = "cgroup_controllers = []\n"


@pytest.fixture(scope="module")
def place():
    """The homes, index and configuration of this module: the hook is installed with them."""
    folder = Path(tempfile.mkdtemp(prefix="hv", dir="/tmp"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def _settings(place, monkeypatch):
    monkeypatch.setenv("HVMGR_INDEX", str(place / "index"))
    monkeypatch.setenv("HVMGR_CONFIG", str(place / "config"))


@pytest.fixture(scope="module")
def daemon(new_embed_root, place):
    """A libvirtd with the hook, on a host with no network but what the test makes."""
    if os.geteuid() != 0 or shutil.which("libvirtd") is None:
        pytest.skip("needs root and libvirtd")
    root = new_embed_root()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HVMGR_INDEX", str(place / "index"))
        environment.setenv("HVMGR_CONFIG", str(place / "config"))
        start_hook.install(root / "etc" / "hooks")
    with private_libvirt.daemon(root, qemu_conf=NO_CGROUPS, own_network=True) as daemon:
        yield daemon


@pytest.fixture
def host(daemon, place):
    with hvmgr.Host.open(daemon.uri, root=place / "homes", wait_s=60) as host:
        yield host
        for domain in host.connection.domains():
            domain.destroy()
            domain.undefine(keep_nvram=False, keep_tpm=False)
    shutil.rmtree(place / "homes")
    shutil.rmtree(place / "config", ignore_errors=True)


@pytest.fixture
def virsh(daemon):
    def call(*words, check=True):
        command = ["virsh", "-c", daemon.uri, *map(str, words)]
        return subprocess.run(command, check=check, capture_output=True, text=True, timeout=60)

    return call


def make(host, card=""):
    disks = (hvmgr.DiskSpecification(size=1 << 20),)
    vm = host.create_vm(
        hvmgr.Specification(name="web", template="generation1", accel="tcg", memory=64 << 20, networks=(), disks=disks)
    )
    root = etree.fromstring(host.connection.find_domain(vm.id).xml(live=False))
    devices = root.find("devices")
    for device in [*devices.findall("graphics"), *devices.findall("video"), *devices.findall("channel")]:
        devices.remove(device)
    if card:
        devices.append(etree.fromstring(card))
    host.connection.define(etree.tostring(root, encoding="unicode"))
    vm.stop()  # what was edited is taken over
    return vm


def bridge(daemon, action, name):
    line = {"add": ["add", name, "up", "type", "bridge"], "delete": ["delete", name]}[action]
    subprocess.run([*daemon.enter, "ip", "link", *line], check=True, capture_output=True, timeout=60)


def without_hook(daemon):
    """libvirt looks for scripts at each call, and so they can go and come."""
    path = start_hook.path_in(daemon.root / "etc" / "hooks")
    text = path.read_text()
    path.write_text("#!/bin/sh\nexit 0\n")
    return lambda: path.write_text(text)


def test_saved_vm_goes_on_after_its_chain_was_merged_and_its_home_moved(host, daemon, virsh, place):
    """The save file names images and a home that are not there any more."""
    vm = make(host)
    vm.create_snapshot("one")
    vm.create_snapshot("two")
    vm.start()
    saved = place / "saved"
    virsh("save", "web", saved)
    vm.snapshot("two").delete()
    moved = host.vm("web").move(place / "homes" / "elsewhere")
    put_back = without_hook(daemon)
    try:
        assert virsh("restore", saved, check=False).returncode != 0
    finally:
        put_back()
    virsh("restore", saved)
    assert virsh("domstate", "web").stdout.strip() == "running"
    live = virsh("dumpxml", "web").stdout
    assert str(moved.path) in live
    assert str(vm.path) + "/" not in live.replace(str(moved.path), "")
    assert [one.name for one in moved.snapshots()] == ["one"]
    moved.stop(force=True)
    saved.unlink()


def test_saved_vm_gets_the_network_that_this_host_has(host, daemon, virsh, place):
    bridge(daemon, "add", "lan")
    make(host, "<interface type='bridge'><source bridge='lan'/></interface>").start()
    saved = place / "saved"
    virsh("save", "web", saved)
    bridge(daemon, "delete", "lan")
    bridge(daemon, "add", "dmz")
    assert virsh("restore", saved, check=False).returncode != 0
    (place / "config").mkdir()
    (place / "config" / "hvmgr.yaml").write_text("maps:\n- networks: [{old: lan, new: dmz}]\n")
    virsh("restore", saved)
    live = etree.fromstring(virsh("dumpxml", "web").stdout)
    assert live.find("devices/interface/source").get("bridge") == "dmz"
    saved.unlink()


def test_vm_that_migrates_in_gets_the_network_of_its_new_host(host, daemon, virsh, place, new_embed_root, monkeypatch):
    bridge(daemon, "add", "wan")
    make(host, "<interface type='bridge'><source bridge='wan'/></interface>").start()
    monkeypatch.setenv("HVMGR_CONFIG", str(place / "other-config"))
    monkeypatch.setenv("HVMGR_INDEX", str(place / "other-index"))
    (place / "other-config").mkdir()
    (place / "other-config" / "hvmgr.yaml").write_text("maps:\n- networks: [{old: wan, new: net7}]\n")
    sockets = place / "sockets"
    sockets.mkdir()
    sockets.chmod(0o777)
    root = new_embed_root()
    start_hook.install(root / "etc" / "hooks")
    with private_libvirt.daemon(root, qemu_conf=NO_CGROUPS, own_network=True, host_name="other") as other:
        bridge(other, "add", "net7")
        target = [other.uri, "--migrateuri", f"unix://{sockets}/migration"]
        virsh("migrate", "--live", "--unsafe", "--p2p", "web", *target)
        assert virsh("domstate", "web").stdout.strip() == "shut off"
        there = ["virsh", "-c", other.uri, "dumpxml", "web"]
        live = subprocess.run(there, check=True, capture_output=True, text=True, timeout=60).stdout
        assert etree.fromstring(live).find("devices/interface/source").get("bridge") == "net7"


@pytest.mark.parametrize("program", ["import time; time.sleep(600)", "raise SystemExit(1)"])
def test_hook_that_hangs_or_fails_kills_no_guest_at_reconnect(program, host, daemon, virsh, tmp_path):
    make(host).start()
    pid = (daemon.root / "run" / "qemu" / "web.pid").read_text()
    broken = tmp_path / "hook.py"
    broken.write_text(program)
    path = start_hook.path_in(daemon.root / "etc" / "hooks")
    text = path.read_text()
    path.write_text(text.replace(shlex.quote(hook.__file__), shlex.quote(str(broken))))
    assert str(broken) in path.read_text()
    try:
        daemon.stop()
        daemon.start()
        assert virsh("domstate", "web").stdout.strip() == "running"
    finally:
        path.write_text(text)
    assert (daemon.root / "run" / "qemu" / "web.pid").read_text() == pid
    assert private_libvirt.is_alive(int(pid))
