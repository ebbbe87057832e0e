"""VMs that really run: the counting guest in a VM home, on the embedded driver, booted once for each kind."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import re
import shutil
import subprocess
import tempfile
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from lxml import etree

import hvmgr
from hvmgr.faces import console, guest
from hvmgr.host import saved_state
from hvmgr.model import configuration
from hvmgr.model.specification import Acceleration, DiskSpecification, Firmware, Specification
from hvmgr.operations import background, working
from hvmgr.operations.steps import execution
from hvmgr.storage import locks, vm_home
from tests import told
from tests.operations import agent_guest

BOOT_S = 250  # a UEFI beside other tests
TICK_S = 60
DISK = 2 << 20

_numbers = itertools.count(1)


@dataclass
class Machine:
    """A VM with the counting guest, and the questions that tests ask it."""

    host: hvmgr.Host
    vm: hvmgr.VM
    said: list[str]  # what operations told the user

    @property
    def domain(self):
        return self.host.connection.find_domain(self.vm.id)

    @property
    def layout(self):
        return self.vm.home.layout

    @contextlib.contextmanager
    def screen(self):
        with console.Console(self.domain.serial_path()) as screen:
            yield screen

    def tick(self):
        """The next count that the guest says; it must run, and must never have found a disk of another moment."""
        with self.screen() as screen:
            tick = screen.next_tick(TICK_S)
        assert tick.ok, tick
        return tick

    def run_for(self, ticks):
        """The first count that is at least ``ticks`` later than the next one."""
        with self.screen() as screen:
            tick = screen.next_tick(TICK_S)
            wanted = tick.memory + ticks
            while tick.memory < wanted:
                tick = screen.next_tick(TICK_S)
        assert tick.ok, tick
        return tick

    def most(self, snapshot, since):
        """What it can have counted by now when it went back to a snapshot after ``since``: ten a second, however busy the host."""
        return self.count_of(snapshot) + 3 + 10 * (time.monotonic() - since)

    def first_tick(self):
        """Lets a paused guest run on; its very first count."""
        with self.screen() as screen:
            self.domain.resume()
            tick = screen.next_tick(TICK_S)
            assert screen.next_tick(TICK_S).ok
        return tick

    def boot(self):
        """Starts the VM cold; what each disk held."""
        self.domain.start(paused=True)
        with self.screen() as screen:
            self.domain.resume()
            return screen.next_boot(BOOT_S)

    def frozen(self, snapshot):
        """The counts on the frozen disks of a snapshot; the guest writes one after the other, so they may be one apart."""
        return {read_counter(Path(path)) for path in snapshot.disks.values()}

    def count_of(self, snapshot):
        counts = self.frozen(snapshot)
        assert max(counts) - min(counts) <= 1
        return min(counts)

    def count_of_base(self, snapshot, fmt):
        """The count of a snapshot whose one image is a base of another format."""
        (path,) = snapshot.disks.values()
        return read_counter(Path(path), fmt)

    def held(self):
        """The count on the disks of the present: a guest that is cut off has written one before the other as well."""
        return self.count_of(self.vm.now())

    def state(self):
        return str(self.vm.state())

    def check(self):
        """Home and libvirt are whole and agree, and nothing is left over."""
        layout = self.layout
        assert not layout.journal.exists()
        assert not layout.put_away.exists()
        assert not list(layout.trash.iterdir())
        assert layout.configuration.read_text() == self.domain.xml(live=False)
        tree = self.vm.tree()
        for leaf in (tree.present, *tree.nodes.values(), *([tree.undo] if tree.undo else [])):
            for path in leaf.disks.values():
                tree.chain(path)
        for snapshot in self.vm.snapshots():
            for path in snapshot.disks.values():
                assert Path(path).stat().st_mode & 0o777 == 0o400
        for path in tree.present.disks.values():
            assert Path(path).stat().st_mode & 0o777 == 0o600
        known = {str(one) for one in tree.images}
        assert {str(one) for one in layout.images.iterdir()} <= known
        if self.domain.is_active():
            writing = {str(path) for path in self.domain.writable_files()}
            assert set(tree.present.disks.values()) <= writing
            live = configuration.parse(self.domain.xml(live=True), source="libvirt")
            assert vm_home.disks_of(live) == dict(tree.present.disks)


def read_counter(image, fmt="qcow2"):
    """The guest's count on a disk, whatever has the image open."""
    where = f"read -v {guest.COUNTER_OFFSET} {guest.COUNTER_SIZE}"
    shown = subprocess.run(
        ["qemu-io", "-r", "-U", "-f", fmt, "-c", where, str(image)],
        check=True, capture_output=True, text=True, timeout=60,
    ).stdout  # fmt: skip
    lines = re.findall(r"^[0-9a-f]{8}:((?:  ?[0-9a-f]{2}){16})", shown, re.MULTILINE)
    return guest.read_counter(bytes.fromhex("".join(lines)))


@dataclass(frozen=True)
class Kind:
    """What a guest boots on."""

    template: str = "generation2"
    firmware: Firmware | None = Firmware.BIOS
    disks: int = 1
    memory: int | None = None
    tpm: bool = False
    load: str = ""  # more words for the guest's kernel


@dataclass
class Factory:
    """Makes machines that run already: each kind is booted once, later ones go on from that saved memory.

    That is kept in ``games``, where other test processes find it as well.
    """

    guest: guest.Guest
    folder: Path
    games: Path
    hosts: list[hvmgr.Host] = field(default_factory=list)

    def open(self, uri):
        said = []
        root = Path(tempfile.mkdtemp(prefix="homes", dir=self.folder))
        root.chmod(0o711)
        host = hvmgr.Host.open(uri, root=root, wait_s=60, reporter=hvmgr.Reporter(notice=told.into(said)))
        self.hosts.append(host)
        return host, said

    def specification(self, kind, disks):
        return Specification(
            name=f"hv{next(_numbers)}",
            template=kind.template,
            firmware=kind.firmware,
            memory=kind.memory or self.guest.memory_size,
            vcpus=1,
            accel=Acceleration.TCG,
            disks=disks,
            networks=(),
            tpm=kind.tpm,
            kernel=self.guest.kernel,
            initrd=self.guest.initrd,
            cmdline=f"{self.guest.command_line} {kind.load}".strip(),
        )

    def make(self, uri, kind=None, *, disks=None, running=True):
        """A machine; with ``disks`` of its own it is booted, else it goes on from what this kind has booted before."""
        kind = kind or Kind()
        if disks is not None or not running:
            return self._new(uri, kind, disks, running=running)
        game = self.games / hashlib.sha256(repr(kind).encode()).hexdigest()[:12]
        with locks.held(self.games / f"{game.name}.lock", wait_s=BOOT_S, what="a guest that boots"):
            if not game.exists():
                return self._keep(self.first(uri, kind), game)
        machine = self._machine(uri, kind, tuple(DiskSpecification(path=path) for path in sorted(game.glob("disk*"))))
        self._go_on(machine, game)
        machine.said.clear()
        return machine

    def first(self, uri, kind):
        """The machine of a kind that boots, and that the others go on from."""
        return self._new(uri, kind, None)

    def _machine(self, uri, kind, disks):
        host, said = self.open(uri)
        machine = Machine(host, host.create_vm(self.specification(kind, disks)), said)
        without_screen(machine)
        return machine

    def _new(self, uri, kind, disks, *, running=True):
        machine = self._machine(uri, kind, disks or (DiskSpecification(size=DISK),) * kind.disks)
        if running:
            machine.boot()
            machine.run_for(2)
            machine.said.clear()
        return machine

    def _keep(self, machine, game):
        """The machine, which runs on; the name of the kept one is there when all of it is."""
        part = Path(tempfile.mkdtemp(dir=self.games))
        part.chmod(0o711)
        memory = part / "memory.save"
        machine.domain.save(memory)
        present = machine.vm.home.present()
        for number, path in enumerate(vm_home.disks_of(present).values()):
            shutil.copy(path, part / f"disk{number}.qcow2")
        if present.nvram is not None:
            shutil.copy(present.nvram, part / "nvram")
        machine.host.connection.restore(memory, saved_state.read(memory).xml, running=True)
        part.rename(game)
        return machine

    def _go_on(self, machine, game):
        present = machine.vm.home.present()
        saved = configuration.parse(saved_state.read(game / "memory.save").xml, source="the saved game")
        saved.strip_backing_chains()
        saved.set_name(present.name)
        saved.set_uuid(present.uuid)
        facts = present.metadata()
        saved.set_metadata(facts)
        for slot, path in vm_home.disks_of(present).items():
            saved.set_disk_source(slot, Path(path), "qcow2")
        if present.nvram is not None:
            shutil.copy(game / "nvram", present.nvram)
            saved.set_nvram(present.nvram)
        if present.genid is not None:
            saved.set_genid(present.genid)
        memory = self.folder / f"{uuid.uuid4()}.save"
        saved_state.rewritten(game / "memory.save", memory, saved.to_xml())
        machine.host.connection.restore(memory, saved.to_xml(), running=True)
        memory.unlink()


def without_screen(machine):
    """Nobody looks, and libvirts that know nothing of each other would quarrel about VNC ports."""
    present = configuration.parse(machine.domain.xml(live=False), source="libvirt")
    devices = present.root.find("devices")
    for device in [*devices.findall("graphics"), *devices.findall("video"), *devices.findall("audio")]:
        devices.remove(device)
    etree.SubElement(etree.SubElement(devices, "video"), "model", type="none")
    machine.host.connection.define(present.to_xml())
    with working.on(machine.vm):
        pass


@pytest.fixture(scope="session")
def _factory(counting_guest, shared):
    folder = Path(tempfile.mkdtemp(prefix="hv", dir="/tmp"))
    folder.chmod(0o711)
    yield Factory(counting_guest, folder, games_in(shared / "counting"))
    shutil.rmtree(folder)


@pytest.fixture
def factory(_factory):
    """Makes machines; their homes go after the test."""
    yield _factory
    for host in _factory.hosts:
        host.close()
        shutil.rmtree(host.root)
    _factory.hosts.clear()


def games_in(folder):
    folder.mkdir(mode=0o711, exist_ok=True)
    return folder


class AgentFactory(Factory):
    """The same with an agent."""

    def first(self, uri, kind):
        disk = agent_guest.make_disk(self.folder / "disk.qcow2")
        machine = self._new(uri, kind, (DiskSpecification(path=disk),))
        agent_guest.Agent(machine).await_answer()
        return machine


class Agents:
    """Machines with an agent: the first one boots, later ones go on from its memory, agent and all."""

    def __init__(self, factory):
        self.factory = factory

    def make(self, uri):
        machine = self.factory.make(uri)
        machine.agent = agent_guest.Agent(machine)
        machine.agent.await_answer()
        machine.said.clear()
        return machine


@pytest.fixture(scope="session")
def _agents(counting_guest, request, require_program, shared):
    for name in ("ldd", "mke2fs"):
        require_program(name)
    folder = Path(tempfile.mkdtemp(prefix="hv", dir="/tmp"))
    folder.chmod(0o711)
    made = agent_guest.build(counting_guest, request.config.cache.mkdir("guest-agent"))
    games = games_in(shared / "agents")
    initrd = games / "initrd"  # where QEMU's user gets at it
    with locks.held(games / "lock", wait_s=BOOT_S, what="the initrd"):
        if not initrd.exists():
            shutil.copyfile(made.initrd, initrd)
            initrd.chmod(0o644)
    yield Agents(AgentFactory(dataclasses.replace(made, initrd=initrd), folder, games))
    shutil.rmtree(folder)


@pytest.fixture
def agents(_agents):
    """``agents.make(uri)``: a running machine whose guest has Debian's own agent; their homes go after the test."""
    yield _agents
    for host in _agents.factory.hosts:
        host.close()
        shutil.rmtree(host.root)
    _agents.factory.hosts.clear()


@pytest.fixture
def make_machine(factory, connection):
    """``make_machine(kind, disks=…, running=…)``: a machine on the embedded driver."""
    return lambda *arguments, **wishes: factory.make(connection.uri, *arguments, **wishes)


@pytest.fixture
def machine(make_machine):
    """A machine of the cheapest kind, running: virtio, BIOS, one disk."""
    return make_machine()


def fail_once(monkeypatch, step_class, error=None, *, before=None, after=None):
    """The next step of this kind fails, or something happens just before or just after it."""
    real = execution.DO[step_class]

    def act(session, step):
        monkeypatch.setitem(execution.DO, step_class, real)
        if before is not None:
            before()
        if error is not None:
            raise error
        real(session, step)
        if after is not None:
            after()

    monkeypatch.setitem(execution.DO, step_class, act)


@pytest.fixture
def at_step(monkeypatch):
    """``at_step(PlanStep, error, before=…, after=…)``: what happens at the next step of this kind."""

    def set_up(step_class, error=None, **acts):
        fail_once(monkeypatch, step_class, error, **acts)

    return set_up


@pytest.fixture
def standing_still(monkeypatch):
    """Memory is saved while the guest stands still, whatever the host can do."""
    monkeypatch.setattr(background, "_size_to_reserve", lambda *_, **__: None)


@pytest.fixture
def two_disks():
    return dataclasses.replace(Kind(), disks=2)


@pytest.fixture
def kinds():
    return Kind


class Killed(BaseException):
    """The command died: nothing of it goes back or finishes."""


@pytest.fixture
def kill_at(at_step, monkeypatch):
    """``kill_at(PlanStep)``: the command dies before (or ``after=True``) the next step of this kind.

    As in a real death nothing is undone and the locks on the images go; the journal stays.
    """

    real = execution._go_back

    def set_up(step_class, *, after=False):
        def die():
            raise Killed

        monkeypatch.setattr(execution, "_go_back", lambda *_: monkeypatch.setattr(execution, "_go_back", real))
        at_step(step_class, **{"after" if after else "before": die})

    return set_up


def cut_off(call, *arguments, **wishes):
    with pytest.raises(Killed):
        call(*arguments, **wishes)


@pytest.fixture
def run_and_die():
    """``run_and_die(call, …)``: a call that is cut off as ``kill_at`` said."""
    return cut_off
