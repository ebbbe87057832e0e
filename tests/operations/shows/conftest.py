"""Two hosts, A and B, with networks of different names, and a gold VM that was booted on A and exported once."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import hvmgr
from hvmgr.host import hypervisor
from hvmgr.model.specification import DiskSpecification
from tests import forking, private_libvirt
from tests.conftest import remove_domains
from tests.operations.conftest import DISK, Factory, Kind, Machine, without_screen

NETWORK = "<network><name>{name}</name><bridge name='br-{name}' stp='off'/></network>"


@dataclass
class Site:
    """A host with a libvirtd, a root, an index and a network of its own; people work on it with the command line."""

    name: str
    libvirtd: private_libvirt.Libvirtd
    folder: Path
    connection: hypervisor.Connection
    commands: forking.Forking  # inside the host's namespaces
    hosts: list[hvmgr.Host] = field(default_factory=list)

    @property
    def network(self):
        return f"lan-{self.name}"

    @property
    def root(self):
        return self.folder / "homes"

    def __post_init__(self):
        self.root.mkdir(mode=0o711)
        file = self.folder / "network.xml"
        file.write_text(NETWORK.format(name=self.network))
        command = [*self.libvirtd.enter, "virsh", "-q", "net-create", file]
        subprocess.run(command, check=True, capture_output=True, timeout=60)

    def open(self, said=None):
        """The public API, from this process."""
        reporter = hvmgr.Reporter(notice=([] if said is None else said).append)
        host = hvmgr.Host.open(self.libvirtd.uri, root=self.root, wait_s=30, reporter=reporter)
        self.hosts.append(host)
        return host

    def run(self, *words, code=0):
        """What the command says, as JSON; it runs inside the host's namespaces."""
        line = ("-c", "qemu:///system", "--root", self.root, "--json", *words)
        done = self.commands.run("hvmgr.__main__", *line, environment=self._environment(), timeout_s=200)
        assert done.returncode == code, done
        return json.loads(done.stdout)

    def _environment(self):
        return {**forking.own(), "HVMGR_INDEX": str(self.folder / "index")}

    def python(self, *words, code=0):
        """What a Python inside the host's namespaces prints."""
        environment = {**os.environ, **self._environment()}
        done = subprocess.run(
            [*self.libvirtd.enter, sys.executable, *map(str, words)],
            check=False, capture_output=True, text=True, timeout=200, env=environment,
        )  # fmt: skip
        assert done.returncode == code, done
        return done.stdout

    @contextlib.contextmanager
    def mounted_read_only(self, folder):
        """The same folder on a file system that takes no writes, as this host sees it."""
        place = self.folder / "read-only"
        place.mkdir(mode=0o711)
        for words in (["--bind", folder], ["-o", "remount,ro,bind"]):
            subprocess.run([*self.libvirtd.enter, "mount", *words, place], check=True, timeout=60)
        try:
            yield place
        finally:
            remove_domains(self.connection)
            subprocess.run([*self.libvirtd.enter, "umount", place], check=True, timeout=60)
            place.rmdir()

    def machine(self, name):
        """A VM of this host with the counting guest."""
        host = self.hosts[-1] if self.hosts else self.open()
        return Machine(host, host.vm(name), [])

    def clear(self):
        """No VM, and no file of one."""
        remove_domains(self.connection)
        for host in self.hosts:
            host.close()
        self.hosts.clear()
        for entry in (*self.root.iterdir(), *(self.folder / "index").glob("*")):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


@contextlib.contextmanager
def site(name, root):
    folder = Path(tempfile.mkdtemp(prefix="hv", dir="/tmp"))
    folder.chmod(0o711)
    with (
        private_libvirt.daemon(root, own_network=True) as libvirtd,
        hypervisor.opened(libvirtd.uri, wait_s=30) as connection,
        forking.opened(["hvmgr"], command=[*libvirtd.enter, sys.executable]) as commands,
    ):
        made = Site(name, libvirtd, folder, connection, commands)
        try:
            yield made
        finally:
            made.clear()
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def _sites(new_embed_root, require, require_program):
    require(os.geteuid() == 0, "namespaces need root")
    require_program("libvirtd")
    with site("a", new_embed_root()) as a, site("b", new_embed_root()) as b:
        yield a, b


@pytest.fixture
def a(_sites, monkeypatch):
    """The host on which the public API is used as well as the command line."""
    monkeypatch.setenv("HVMGR_INDEX", str(_sites[0].folder / "index"))
    yield _sites[0]
    _sites[0].clear()


@pytest.fixture
def b(_sites):
    yield _sites[1]
    _sites[1].clear()


@dataclass
class Gold:
    """The export ``folder`` of a VM ``gold``: the snapshot ``warm`` with memory, ``cold`` without, and the present.

    ``saved`` is the export of ``warm`` alone, as a VM that goes on from there.
    """

    folder: Path
    saved: Path
    config: Path  # the configurations alone
    home: Path  # where they say that the images are
    elsewhere: Path  # where these are
    warm: int  # what its disk holds
    now: int
    mac: str


def elsewhere(site, vm):
    """Copies of the images of a home: those of snapshots in one folder, the base in another."""
    folder = site.folder / "elsewhere"
    for name in ("images", "base"):
        (folder / name).mkdir(mode=0o711, parents=True)
    folder.chmod(0o711)
    shutil.copytree(vm.home.layout.snapshots, folder / "images" / "Snapshots")
    (base,) = vm.home.layout.bases.iterdir()
    shutil.copy(base, folder / "base")
    return folder


@pytest.fixture(scope="module")
def gold(_sites, counting_guest):
    """Booted and exported once."""
    a, _ = _sites
    folder = a.folder / "exports"
    folder.mkdir(mode=0o711)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HVMGR_INDEX", str(a.folder / "index"))
        host = a.open()
        plain = Factory(counting_guest, a.folder, a.folder).specification(Kind(), (DiskSpecification(size=DISK),))
        networks = (hvmgr.NetworkSpecification(kind="network", name=a.network),)
        vm = host.create_vm(dataclasses.replace(plain, name="gold", networks=networks))
        machine = Machine(host, vm, [])
        without_screen(machine)
        machine.boot()
        machine.run_for(2)
        warm = vm.create_snapshot("warm")
        machine.run_for(3)
        vm.stop(force=True)
        vm.create_snapshot("cold")
        made = Gold(
            folder=vm.export(folder),
            config=vm.export(folder / "config", hvmgr.ExportOptions(config_only=True)),
            home=vm.path,
            elsewhere=elsewhere(a, vm),
            saved=vm.export(folder / "saved", hvmgr.ExportOptions(snapshot="warm")),
            warm=machine.count_of(warm),
            now=machine.held(),
            mac=vm.home.present().nics()[0].mac,
        )
        a.clear()
    return made
