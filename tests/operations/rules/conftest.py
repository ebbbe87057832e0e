"""VMs that are off, on the embedded driver, and everything that must hold of their files after every command."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import struct
import subprocess
import tempfile
from pathlib import Path

import pytest
from lxml import etree

import hvmgr
from hvmgr import errors
from hvmgr.host import qemu_img
from hvmgr.host.domain import State
from hvmgr.model import configuration
from hvmgr.model.specification import DiskSpecification, Specification
from hvmgr.model.tree import Keeper
from hvmgr.storage import durable, holes, vm_home
from tests import private_libvirt, shelf, told

MIB = 1 << 20
PIECE = 64 << 10
LARGE = 32 << 20


def run(*command):
    """A program that has to succeed."""
    done = subprocess.run([*map(str, command)], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def write(path, pattern, offset=0, length=PIECE, *, fmt="qcow2"):
    """Bytes of one value on a disk, as its guest would write them."""
    run("qemu-io", "-f", fmt, "-c", f"write -P {pattern} {offset} {length}", path)


_known = {}  # what QEMU said of files that held just these bytes


def bytes_of(path, fmt="qcow2"):
    """What a guest would see of an image: its size, and a hash of every piece that is not all zeros."""
    key = (fmt, *_chain(Path(path)))
    if key not in _known:
        _known[key] = _bytes_of(path, fmt)
    size, found = _known[key]
    return size, dict(found)


def _chain(path):
    """The bytes of an image and of what it is based on, each as a hash; what is not told here equals nothing."""
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode) or facts.st_size > LARGE:
        return [object()]
    data = path.read_bytes()
    found = [hashlib.sha256(data).digest()]
    if data[:4] == b"QFI\xfb":
        offset, length = struct.unpack_from(">QI", data, 8)
        if offset:
            base = path.parent / os.fsdecode(data[offset : offset + length])
            found += _chain(base) if base.exists() else [object()]
    return found


def _bytes_of(path, fmt):
    with tempfile.TemporaryDirectory(prefix="hv", dir="/tmp") as folder:
        raw = Path(folder) / "raw"
        run("qemu-img", "convert", "-U", "-f", fmt, "-O", "raw", path, raw)
        found, zeros = {}, bytes(PIECE)
        with raw.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            for start, end in holes.data_ranges(file.fileno(), size):
                for offset in range(start // PIECE * PIECE, end, PIECE):
                    piece = os.pread(file.fileno(), PIECE, offset)
                    if piece != zeros[: len(piece)]:
                        found[offset] = hashlib.sha256(piece).hexdigest()[:12]
    return size, found


def faults_of(path):
    """What ``qemu-img check`` counts in a qcow2: corruptions, errors and leaks."""
    key = ("faults", *_chain(path))
    if key not in _known:
        result = qemu_img.check(path, "qcow2")
        _known[key] = result.corruptions, result.check_errors, result.leaks
    return _known[key]


def mode_of(path):
    """The permission bits of a file."""
    return stat.S_IMODE(Path(path).stat().st_mode)


def file_of(path):
    """What tells that a file was written or replaced: content, size, inode, time; its mode and owner do not count."""
    facts = Path(path).stat()
    return hashlib.sha256(Path(path).read_bytes()).hexdigest(), facts.st_size, facts.st_ino, facts.st_mtime_ns


def in_place(path, **wishes):
    """A disk that is used where it is."""
    return DiskSpecification(path=path, in_place=True, **wishes)


class Bench:
    """One host, and how its VMs look."""

    run, write_image, bytes_of, mode_of, file_of, in_place = map(
        staticmethod, (run, write, bytes_of, mode_of, file_of, in_place)
    )

    def __init__(self, place, uri):
        self.place = place
        self.said = []
        self.hosts = []
        self.uri = uri
        self.host = self.open_host("root")

    def open_host(self, folder):
        reporter = hvmgr.Reporter(notice=told.into(self.said))
        host = hvmgr.Host.open(self.uri, root=self.place / folder, wait_s=1, reporter=reporter)
        self.hosts.append(host)
        return host

    def make(self, *disks, name="web", host=None, **wishes):
        """A VM; a disk is a size in MiB, a path (copied), or a specification."""
        spec = Specification(
            name=name,
            **{"template": "generation1", "accel": "tcg", "memory": 64 * MIB, "networks": ()} | wishes,
            disks=tuple(to_disk(disk) for disk in disks or (4,)),
        )
        return (host or self.host).create_vm(spec)

    def kept(self, make):
        """What ``make(bench)`` gives, a VM that is off: made by the first test that asks, and put back for the others."""
        if shelf.bring((make, self.uri), self.place, self.host.connection):
            (vm,) = self.host.vms()
            return vm
        vm = make(self)
        shelf.keep((make, self.uri), self.place, self.host.connection)
        self.said.clear()
        return vm

    def image(self, name, *, size=4, fmt="qcow2", fill=(1,), backing=None, options=None):
        """An image outside all homes with ``fill`` bytes, one MiB each."""
        path = self.place / name
        if backing is not None:
            run("qemu-img", "create", "-f", fmt, "-b", backing[0], "-F", backing[1], path)
            raw_fill(path, fill, fmt)
            return path
        raw = self.place / f"{name}.part"
        with raw.open("wb") as file:
            for number, value in enumerate(fill):
                file.seek(number * MIB)
                file.write(bytes([value]) * PIECE)
            file.truncate(size * MIB)
        run("qemu-img", "convert", "-f", "raw", "-O", fmt, *(("-o", options) if options else ()), raw, path)
        raw.unlink()
        return path

    def domain(self, vm):
        return self.host.connection.find_domain(vm.id)

    def edit(self, vm, change):
        """What ``virsh edit`` does: ``change(configuration)`` on libvirt's own XML."""
        edited = configuration.parse(self.domain(vm).xml(live=False), source="virsh edit")
        result = change(edited)
        self.host.connection.define((result or edited).to_xml())

    def without_screen(self, vm):
        """Nobody looks, and libvirts that know nothing of each other quarrel about VNC ports."""

        def change(edited):
            devices = edited.root.find("devices")
            for name in ("graphics", "video", "audio"):
                for device in devices.findall(name):
                    devices.remove(device)
            etree.SubElement(etree.SubElement(devices, "video"), "model", type="none")

        self.edit(vm, change)

    def start(self, vm):
        """Runs it."""
        if self.domain(vm).state() is State.OFF:
            self.without_screen(vm)
        vm.start()

    def disk(self, vm, slot="hda", *, live=False):
        """The image that libvirt shows for a disk."""
        shown = configuration.parse(self.domain(vm).xml(live=live), source="libvirt")
        return vm_home.disks_of(shown).get(slot)

    def write(self, vm, pattern, offset=0, *, slot="hda", length=PIECE):
        """What the guest writes while it runs; it is off again afterwards."""
        path = vm_home.disks_of(vm.home.present())[slot]
        write(path, pattern, offset, length, fmt=format_of(vm, path))

    def photo(self, vm):
        """What the guest would see of every disk of every snapshot and of now."""
        forest = vm.home.tree()
        seen = {}
        names = {one.record.id: one.record.name for one in vm.home.snapshots()}
        for node in forest.nodes.values():
            for slot, path in node.disks.items():
                seen[f"{names[node.snapshot_id]} {slot}"] = bytes_of(path, forest.images[path].format)
        for slot, path in forest.present.disks.items():
            seen[f"now {slot}"] = bytes_of(path, forest.images[path].format)
        return seen

    def photo_of(self, vm, name, slot="hda"):
        """What the guest would see of one disk of a snapshot."""
        path = vm.snapshot(name).disks[slot]
        return bytes_of(path, format_of(vm, path))

    def check(self, vm):
        """Everything that is true of a home between two commands."""
        forest, layout = vm.home.tree(), vm.home.layout
        names, below = forest.named(), forest.children()
        frozen = {path for node in forest.nodes.values() for path in node.disks.values()}
        frozen |= {*below, *forest.strangers}
        for path, image in forest.images.items():
            forest.chain(path)
            if image.format == "qcow2" and image.keeper is not Keeper.OUTSIDE:
                assert faults_of(Path(path)) == (0, 0, 0), path
            if image.keeper is not Keeper.OUTSIDE:
                expected = 0o400 if path in frozen else 0o600
                assert mode_of(path) == expected, f"{path} is {mode_of(path):o}, {names.get(path)}, {below.get(path)}"
        assert not layout.journal.exists()
        assert list(layout.trash.iterdir()) == []
        assert not list(vm.path.rglob(f"{durable.TEMPORARY}*"))
        assert self.domain(vm).xml(live=False).encode() == layout.configuration.read_bytes()
        records = {path.name for path in layout.frozen.iterdir() if not path.name.startswith("outside-")}
        assert records <= {Path(path).name for path in frozen}

    def files(self, vm):
        """Differencing images and bases in the home, by name."""
        layout = vm.home.layout
        return {path.name for folder in (layout.images, layout.bases) for path in folder.iterdir()}


def to_disk(disk):
    if isinstance(disk, DiskSpecification):
        return disk
    return DiskSpecification(size=disk * MIB) if isinstance(disk, int) else DiskSpecification(path=disk)


def raw_fill(path, fill, fmt):
    for number, value in enumerate(fill):
        write(path, value, number * MIB, fmt=fmt)


def format_of(vm, path):
    return vm.home.tree().images[path].format


@pytest.fixture
def place():
    """A folder that QEMU's user can pass."""
    with shelf.place("bench") as folder:
        yield folder


@pytest.fixture
def uri(connection):
    """The libvirt that the VMs live on; a module with a daemon of its own overrides it."""
    return connection.uri


@pytest.fixture
def bench(uri, place):
    """A host without VMs."""
    bench = Bench(place, uri)
    yield bench
    with contextlib.suppress(errors.HvmgrError):
        for domain in bench.host.connection.domains():
            domain.destroy()
            if bench.host.connection.find_domain(domain.uuid) is not None:
                domain.undefine(keep_nvram=False, keep_tpm=False)
    for host in bench.hosts:
        host.close()


@pytest.fixture(scope="module")
def daemon(new_embed_root, require_program):
    """One libvirtd for all tests here."""
    require_program("libvirtd")
    with private_libvirt.daemon(new_embed_root()) as running:
        yield running


@pytest.fixture
def virsh(daemon):
    """``virsh(…)``: what it says; it has to succeed unless ``refused`` names a part of its refusal."""

    def run(*arguments, refused=None):
        command = ["virsh", "-q", "-c", daemon.uri, *map(str, arguments)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
        if refused is None:
            assert done.returncode == 0, f"{command}: {done.stderr}"
        else:
            assert done.returncode != 0
            assert refused in done.stderr, done.stderr
        return done.stdout

    return run


@pytest.fixture
def guest(bench, virsh):
    """``guest(vm, …)``: what its guest writes, running or off; the guest itself has no system."""

    def write(vm, pattern, offset, slot="hda"):
        if vm.state() is State.OFF:
            bench.write(vm, pattern, offset, slot=slot)
            return
        device = bench.domain(vm).monitor("query-block")
        name = next(one["qdev"] for one in device if one.get("inserted") and slot[-1] in "ab")
        virsh("qemu-monitor-command", vm.name, "--hmp", f'qemu-io -d {name} "write -P {pattern} {offset} 64k"')

    return write
