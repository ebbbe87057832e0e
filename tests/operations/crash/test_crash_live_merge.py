"""A running VM merges images, and somebody dies: hvmgr, QEMU or libvirt, before any act. No snapshot shows other bytes."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import hvmgr
from hvmgr import errors
from hvmgr.host import domain as domains
from hvmgr.host import hypervisor
from hvmgr.model import configuration, tree
from hvmgr.storage import durable, vm_home
from tests import private_libvirt
from tests.operations.crash.conftest import EVERY_ACT

pytestmark = [pytest.mark.crash, pytest.mark.libvirtd]


# The others only when every act is killed: what they do is a part of these.
MERGES = ["live-merge-above-now", "live-merge-inner", "live-merge-together"]
MERGES += ["live-merge-only", "live-merge-root", "live-merge-paused"] if EVERY_ACT else []

SIZE = 1 << 20
DOMAIN_ACTS = (
    "start_stream",
    "start_commit",
    "block_job",
    "end_block_job",
    "open_files",
    "flush_disks",
    "suspend",
    "resume",
)
DURABLE_ACTS = ("write_file", "sync_file", "rename", "set_mode", "remove")

# What is deleted of base - one - two - three - (now), and of which disk the images are then merged, how.
DELETIONS = {"stream": ["three"], "inner commit": ["two"], "commit of what the guest writes": ["one", "two", "three"]}


@pytest.mark.parametrize("shape", MERGES)
def test_killed_merge_is_completed(crash_run, shape, every):
    stride = every(6)
    crash_run(shape, stride, 1 + MERGES.index(shape) * stride // len(MERGES))


@dataclass
class Place:
    """A VM without an operating system, below a libvirt of its own."""

    daemon: private_libvirt.Libvirtd
    host: hvmgr.Host
    said: list[str] = field(default_factory=list)
    names: itertools.count = field(default_factory=itertools.count)

    def make(self):
        specification = hvmgr.Specification(
            name=f"merge{next(self.names)}",
            template="generation1",
            accel="tcg",
            memory=32 << 20,
            networks=(),
            disks=(hvmgr.DiskSpecification(size=SIZE),),
        )
        vm = self.host.create_vm(specification)
        present = configuration.parse(self.domain(vm).xml(live=False), source="libvirt")
        devices = present.root.find("devices")
        for device in [*devices.findall("graphics"), *devices.findall("video"), *devices.findall("channel")]:
            devices.remove(device)
        self.host.connection.define(present.to_xml())
        for number, name in enumerate(("one", "two", "three"), 1):
            write(vm, number)
            vm.create_snapshot(name)
        write(vm, 4)
        vm.start()
        return vm

    def domain(self, vm):
        return self.host.connection.find_domain(vm.id)

    def await_end(self, vm):
        """libvirt hears a little later that a QEMU is gone."""
        deadline = time.monotonic() + 60
        while self.domain(vm).is_active():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def qemu(self, vm):
        return int((self.daemon.root / "run" / "qemu" / f"{vm.name}.pid").read_text())


def write(vm, number):
    """Each state overwrites a part of the one before it."""
    (path,) = vm.now().disks.values()
    command = ["qemu-io", "-f", "qcow2", "-c", f"write -P {number} {number * 64}k 128k", path]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def place(new_embed_root):
    if os.geteuid() != 0 or shutil.which("libvirtd") is None:
        pytest.skip("needs root and libvirtd")
    root = Path(tempfile.mkdtemp(prefix="homes", dir="/tmp"))
    root.chmod(0o711)
    said = []
    reporter = hvmgr.Reporter(notice=said.append)
    with (
        private_libvirt.daemon(new_embed_root()) as daemon,
        hvmgr.Host.open(daemon.uri, root=root, wait_s=60, reporter=reporter) as host,
    ):
        yield Place(daemon, host, said)
    shutil.rmtree(root)


class Acts:
    """Counts the acts of a merge, and has something happen before the n-th."""

    def __init__(self, monkeypatch, at=None, happens=lambda: None):
        self.names, self.at, self.happens = [], at, happens
        for owner, names in (
            (domains.Domain, DOMAIN_ACTS),
            (durable, DURABLE_ACTS),
            (hypervisor.Connection, ["define"]),
        ):
            for name in names:
                monkeypatch.setattr(owner, name, self._counted(name, getattr(owner, name)))

    def _counted(self, name, original):
        def act(*arguments, **more):
            self.names.append(name)
            if len(self.names) == self.at:
                self.happens()
            return original(*arguments, **more)

        return act


def shown(path, scratch):
    target = scratch / "shown.raw"
    command = ["qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", path, target]
    subprocess.run(command, check=True, timeout=60)
    return hashlib.sha256(target.read_bytes()).hexdigest()


def contents(vm, scratch):
    found = {one.name: shown(one.disks["hda"], scratch) for one in vm.snapshots()}
    return found | {"now": shown(vm.now().disks["hda"], scratch)}


def delete(vm, names):
    for name in names:
        vm.snapshot(name).delete()


def require_whole(place, vm, wanted, scratch):
    """The merges come to an end, and then everything is as if nobody had died."""
    vm.merge()
    assert contents(vm, scratch) == wanted
    forest = vm.tree()
    assert not tree.pending(forest)
    assert len(forest.images) == len(wanted)
    layout = vm.home.layout
    assert not layout.journal.exists()
    assert not (layout.private / "stopped").exists()
    assert {str(one) for one in (*layout.images.iterdir(), *layout.bases.iterdir())} == set(forest.images)
    assert layout.configuration.read_text() == place.domain(vm).xml(live=False)
    if place.domain(vm).is_active():
        live = configuration.parse(place.domain(vm).xml(live=True), source="libvirt")
        assert vm_home.disks_of(live) == dict(forest.present.disks)
    vm.stop(force=True)
    for path in forest.images:
        working = path in forest.present.disks.values()
        done = subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", path], check=False, timeout=60)
        assert done.returncode in ((0, 3) if working else (0,))  # a QEMU that is killed leaks clusters where it writes
        assert Path(path).stat().st_mode & 0o777 == (0o600 if working else 0o400)
    assert contents(vm, scratch) == wanted


@pytest.fixture
def moments(place, tmp_path):
    """``moments(names, count)``: the expected contents, and at which acts somebody dies."""
    counted = {}

    def find(what, count):
        if what not in counted:
            vm = place.make()
            before = contents(vm, tmp_path)
            with pytest.MonkeyPatch.context() as patched:
                *first, last = DELETIONS[what]
                delete(vm, first)
                acts = Acts(patched)
                delete(vm, [last])
            wanted = {name: one for name, one in before.items() if name not in DELETIONS[what]}
            require_whole(place, vm, wanted, tmp_path)
            vm.delete(with_disks=True)
            counted[what] = acts.names, wanted
        names, wanted = counted[what]
        count = len(names) if EVERY_ACT else count
        return wanted, [1 + (2 * number + 1) * len(names) // (2 * count) for number in range(count)], names

    return find


@pytest.mark.parametrize("what", DELETIONS)
@pytest.mark.parametrize("who", ["QEMU", "libvirt"])
def test_somebody_else_dies(place, moments, tmp_path, what, who):
    wanted, numbers, names = moments(what, 2 if who == "QEMU" else 1)
    for number in numbers:
        place.said.clear()
        vm = place.make()
        pid, died = place.qemu(vm), []

        def die(pid=pid, died=died):
            died.append(who)
            if who == "QEMU":
                os.kill(pid, signal.SIGKILL)
                private_libvirt.wait_for_end(pid)
            else:
                place.daemon.stop(signal_=signal.SIGKILL)

        *first, last = DELETIONS[what]
        delete(vm, first)
        with pytest.MonkeyPatch.context() as patched:
            acts = Acts(patched, number, die)
            with contextlib.suppress(errors.HvmgrError):
                delete(vm, [last])
        assert len(acts.names) >= number - 2, names  # how often a job is looked at is a matter of luck
        if died == ["libvirt"]:
            place.daemon.start()
        elif died:
            place.await_end(vm)
        if last in {one.name for one in vm.snapshots()}:  # it had not begun
            delete(vm, [last])
        try:
            require_whole(place, vm, wanted, tmp_path)
        except AssertionError as error:
            raise AssertionError(f"{who} died before act {number}, {names[number - 1]}; said {place.said}") from error
        vm.delete(with_disks=True)


def test_what_another_vm_reads_waits_for_it(place, tmp_path):
    place.said.clear()
    vm = place.make()
    wanted = contents(vm, tmp_path)
    reader = vm.clone(f"{vm.name}-reader", hvmgr.CloneOptions(snapshot="three", linked=True))
    read = contents(reader, tmp_path)
    delete(vm, ["two"])
    assert any("is not merged: it is needed by" in one for one in place.said)
    assert not vm.merge()
    del wanted["two"]
    assert contents(vm, tmp_path) == wanted
    assert contents(reader, tmp_path) == read
    reader.delete(with_disks=True)
    require_whole(place, vm, wanted, tmp_path)
    vm.delete(with_disks=True)
