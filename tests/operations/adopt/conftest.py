"""VMs that virsh made, in a real libvirtd, and everything that must hold of them before and after they are adopted."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import tempfile
import uuid
from pathlib import Path

import pytest

import hvmgr
from tests import private_libvirt, told

KIB64 = 64 << 10


def run(*command):
    """A program that has to succeed; its output."""
    done = subprocess.run([*map(str, command)], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def bytes_of(path, fmt):
    """What a guest would read of an image: the first byte of each 64 KiB."""
    with tempfile.TemporaryDirectory(prefix="hv", dir="/tmp") as folder:
        raw = Path(folder) / "raw"
        run("qemu-img", "convert", "-U", "-f", fmt, "-O", "raw", path, raw)
        data = raw.read_bytes()
    pieces = [data[start : start + KIB64] for start in range(0, len(data), KIB64)]
    assert all(len(set(piece)) == 1 for piece in pieces)
    return [piece[0] for piece in pieces]


class Place:
    """A folder with disks, a libvirt, and a host of hvmgr's over it."""

    run, bytes_of = map(staticmethod, (run, bytes_of))

    def __init__(self, folder, uri):
        self.folder = folder
        self.uri = uri
        self.said = []
        self.host = self.open_host("homes")

    def open_host(self, name):
        reporter = hvmgr.Reporter(notice=told.into(self.said))
        return hvmgr.Host.open(self.uri, root=self.folder / name, wait_s=2, reporter=reporter)

    def virsh(self, *words):
        return run("virsh", "-q", "-c", self.uri, *words)

    def refused(self, *words):
        """What virsh, which has to fail, says."""
        done = subprocess.run(
            ["virsh", "-q", "-c", self.uri, *map(str, words)], check=False, capture_output=True, text=True, timeout=60
        )
        assert done.returncode != 0
        return done.stderr

    # -- disks

    def image(self, name, fmt="qcow2", *, below=None, below_format="qcow2", size="1M", fill=None):
        path = self.folder / name
        command = ["qemu-img", "create", "-q", "-f", fmt]
        command += ["-b", below, "-F", below_format, path] if below else [path, size]
        run(*command)
        path.chmod(0o644)
        if fill is not None:
            self.fill(path, fill, fmt=fmt)
        return path

    def fill(self, path, value, at=0, *, fmt="qcow2"):
        run("qemu-io", "-f", fmt, "-c", f"write -P {value} {at * KIB64} 64k", path)

    # -- domains

    def xml(self, name, disks, *, devices="", os_more="", disk_more=None, top=""):
        """A 64 MiB domain; ``disks`` are (slot, format, path), or a whole element."""
        told = ""
        for disk in disks:
            if isinstance(disk, str):
                told += disk
                continue
            slot, fmt, path = disk
            kind = ("block", "dev") if stat.S_ISBLK(os.stat(path).st_mode) else ("file", "file")
            more = (disk_more or {}).get(slot, "")
            told += (
                f"<disk type='{kind[0]}' device='disk'><driver name='qemu' type='{fmt}'/>"
                f"<source {kind[1]}='{path}'/>{more}<target dev='{slot}' bus='virtio'/></disk>"
            )
        return (
            f"<domain type='qemu'><name>{name}</name><uuid>{uuid.uuid4()}</uuid><memory unit='MiB'>64</memory>"
            f"<os><type arch='x86_64' machine='pc'>hvm</type>{os_more}</os>{top}<devices>{told}"
            f"<controller type='usb' model='none'/><memballoon model='none'/>{devices}</devices></domain>"
        )

    def define(self, name, *disks, **more):
        """libvirt has the domain."""
        file = self.folder / f"{name}.xml"
        file.write_text(self.xml(name, disks, **more))
        self.virsh("define", file)
        return self.domain(name)

    def edit(self, name, change):
        """What virsh edit does with the text of the XML."""
        file = self.folder / "edited.xml"
        text = self.virsh("dumpxml", "--inactive", "--security-info", name)
        changed = change(text)
        assert changed != text
        file.write_text(changed)
        self.virsh("define", file)

    def domain(self, name):
        return self.host.connection.find_domain_by_name(name)

    def snapshots(self, name):
        """The names that libvirt knows."""
        return self.virsh("snapshot-list", name, "--name", "--topological").split()

    def write(self, name, value, at=0, *, slot="vda"):
        """What the guest writes: through QEMU when it runs, else into its working image."""
        domain = self.domain(name)
        if domain.is_active():
            number = ["vda", "vdb"].index(slot)
            device = domain.monitor("query-block")[number]["qdev"]
            for command in (f"write -P {value} {at * KIB64} 64k", "flush"):
                line = f'qemu-io -d {device} "{command}"'
                answer = domain.monitor("human-monitor-command", command_line=line)
                assert "rror" not in answer, answer
            return
        told = run("virsh", "-q", "-c", self.uri, "domblklist", "--inactive", name)
        path = next(line.split(maxsplit=1)[1] for line in told.splitlines() if line.split()[0] == slot)
        fmt = "raw" if path.endswith((".raw", ".img")) or path.startswith("/dev/") else "qcow2"
        self.fill(path, value, at, fmt=fmt)

    # -- what is true

    def state_of(self, *names):
        """Everything that a refused adoption may not change: libvirt's word and the disks' bytes, modes and times."""
        files = sorted(path for path in self.folder.iterdir() if path.is_file() and path.suffix != ".xml")
        return (
            [self.virsh("dumpxml", "--inactive", "--security-info", name) for name in names],
            [[one, self.virsh("snapshot-dumpxml", name, one)] for name in names for one in self.snapshots(name)],
            [(path.name, path.stat().st_mode, path.stat().st_mtime_ns, path.read_bytes()) for path in files],
        )

    def seen(self, snapshot):
        """What a guest would read of each disk of a snapshot."""
        forest = snapshot.vm.tree()
        return {slot: bytes_of(path, forest.images[path].format) for slot, path in snapshot.disks.items()}

    def now(self, vm):
        forest = vm.tree()
        return {slot: bytes_of(path, forest.images[path].format) for slot, path in forest.present.disks.items()}

    def check(self, vm):
        """What is true of a home between two commands."""
        layout, forest = vm.home.layout, vm.tree()
        for leaf in (forest.present, *forest.nodes.values()):
            for path in leaf.disks.values():
                forest.chain(path)
        assert not layout.journal.exists()
        assert list(layout.trash.iterdir()) == []
        assert self.domain(vm.name).xml(live=False).encode() == layout.configuration.read_bytes()
        for node in forest.nodes.values():
            for path in node.disks.values():
                assert not Path(path).is_file() or stat.S_IMODE(Path(path).stat().st_mode) == 0o400, path
            assert layout.snapshot(node.snapshot_id).exists()
            run("virt-xml-validate", layout.snapshot(node.snapshot_id), "domain")
        run("virt-xml-validate", layout.configuration, "domain")


@pytest.fixture(scope="module")
def daemon(new_embed_root):
    """A libvirtd for all tests of a file."""
    if os.geteuid() != 0 or shutil.which("libvirtd") is None:
        pytest.skip("needs root and libvirtd")
    with private_libvirt.daemon(new_embed_root()) as running:
        yield running


@pytest.fixture
def place(daemon):
    """A folder that QEMU's user can pass, and an empty libvirt."""
    folder = Path(tempfile.mkdtemp(prefix="hv", dir="/tmp"))
    folder.chmod(0o711)
    place = Place(folder, daemon.uri)
    yield place
    for domain in place.host.connection.domains():
        domain.destroy()
        if place.host.connection.find_domain(domain.uuid) is not None:
            domain.undefine(keep_nvram=False, keep_tpm=False)
    place.host.close()
    shutil.rmtree(folder)
