"""Killed in the middle of a merge below a real libvirtd: virsh start is refused, doctor --repair, virsh start works."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from lxml import etree

import hvmgr
from hvmgr.operations import start_hook
from tests import private_libvirt

pytestmark = pytest.mark.libvirtd

KILLED_IN_A_MERGE = """
import os, signal, sys
import hvmgr
from hvmgr.host.storage_daemon import Daemon

def dying(real):
    def act(self, *arguments, **wishes):
        real(self, *arguments, **wishes)
        os.kill(os.getpid(), signal.SIGKILL)
    return act

for name in ("stream", "commit", "pull"):
    setattr(Daemon, name, dying(getattr(Daemon, name)))
with hvmgr.Host.open(sys.argv[1], root=sys.argv[2]) as host:
    host.vm("web").snapshot("two").delete()
"""


@pytest.fixture
def hooked(new_embed_root):
    """A libvirtd that found the hook when it started."""
    if os.geteuid() != 0 or shutil.which("libvirtd") is None:
        pytest.skip("needs root and libvirtd")
    root = new_embed_root()
    start_hook.install(root / "etc" / "hooks")
    with private_libvirt.daemon(root) as daemon:
        yield daemon


@pytest.fixture
def homes():
    folder = Path(tempfile.mkdtemp(prefix="hv", dir="/tmp"))
    folder.chmod(0o711)
    yield folder / "homes"
    shutil.rmtree(folder)


def virsh(daemon, *words):
    return subprocess.run(["virsh", "-c", daemon.uri, *words], check=False, capture_output=True, text=True, timeout=60)


def data(image):
    """What a guest would see of an image."""
    with tempfile.TemporaryDirectory(prefix="hv", dir="/tmp") as folder:
        raw = Path(folder) / "raw"
        subprocess.run(["qemu-img", "convert", "-U", "-O", "raw", image, raw], check=True, timeout=30)
        return raw.read_bytes()


def without_screen(xml):
    root = etree.fromstring(xml)
    devices = root.find("devices")
    for device in [*devices.findall("graphics"), *devices.findall("video"), *devices.findall("channel")]:
        devices.remove(device)
    return etree.tostring(root, encoding="unicode")


def test_killed_merge_keeps_virsh_from_starting_until_doctor_repaired_it(hooked, homes):
    with hvmgr.Host.open(hooked.uri, root=homes, wait_s=60) as host:
        disks = (hvmgr.DiskSpecification(size=1 << 20),)
        vm = host.create_vm(
            hvmgr.Specification(
                name="web", template="generation1", accel="tcg", memory=64 << 20, networks=(), disks=disks
            )
        )
        host.connection.define(without_screen(virsh(hooked, "dumpxml", "--inactive", "web").stdout))
        for number, name in enumerate(("one", "two", "three"), 1):
            vm.create_snapshot(name)
            write = f"write -P {number} {number * 64}k 64k"
            subprocess.run(["qemu-io", "-c", write, vm.now().disks["hda"]], check=True, capture_output=True, timeout=60)
        before = {name: data(vm.snapshot(name).disks["hda"]) for name in ("one", "three")}
        now = data(vm.now().disks["hda"])

        command = [sys.executable, "-c", KILLED_IN_A_MERGE, hooked.uri, str(homes)]
        killed = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
        assert killed.returncode == -signal.SIGKILL, killed.stderr

        refused = virsh(hooked, "start", "web")
        assert refused.returncode != 0
        told = re.search(r"hvmgr -c \S+ --root \S+ doctor --repair web", refused.stderr)
        assert told, refused.stderr

        words = [sys.executable, "-m", *shlex.split(told[0]), "--json"]
        repaired = subprocess.run(words, check=False, capture_output=True, text=True, timeout=60)
        assert repaired.returncode == 0, repaired.stdout + repaired.stderr
        document = json.loads(repaired.stdout)
        assert document["repaired"][0]["code"] == "operation-open"
        assert [one for one in document["findings"] if one["severity"] == "error"] == []
        assert "completed the interrupted" in repaired.stderr

        assert virsh(hooked, "start", "web").returncode == 0
        assert {name: data(vm.snapshot(name).disks["hda"]) for name in ("one", "three")} == before
        assert data(vm.now().disks["hda"]) == now
        assert [one.name for one in vm.snapshots()] == ["one", "three"]
        vm.stop(force=True)
        assert [one for one in host.doctor("web", thorough=True) if one.severity != "info"] == []
