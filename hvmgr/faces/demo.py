"""The story that ``hvmgr demo`` tells: the life of a snapshot tree with a real guest in it, twice.

Everything is done by hvmgr's own command line, in a libvirt, a root and an index that belong to the demo alone. After
each step the tree is shown, and the witness proves that nothing was lost.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from lxml import etree

from hvmgr import errors, settings, units
from hvmgr.faces import cli, guest, stage
from hvmgr.faces.cli import render
from hvmgr.faces.console import Console
from hvmgr.faces.guest import Guest
from hvmgr.faces.stage import Stage, Wishes
from hvmgr.faces.witness import TICK_S, Kind, Tell, Witness
from hvmgr.host import hypervisor, process
from hvmgr.host.domain import State
from hvmgr.operations import roles
from hvmgr.operations.host import Host
from hvmgr.operations.snapshot import Snapshot
from hvmgr.operations.vm import VM

_NAMES = ("web", "old")
_GUEST_NAMES = ("hvmgr-demo-web", "hvmgr-demo-old")  # among VMs of others

_BASE_SIZE = 8 * units.MIB
_PATTERN_AT, _PATTERN_SIZE = 2 * units.MIB, 2 * units.MIB  # bytes of no meaning, behind the guest's counter

_SPECIFICATION = """\
name: {name}
template: {template}
firmware: bios
memory: {memory}M
vcpus: 1
accel: tcg
networks: none
kernel: {kernel}
initrd: {initrd}
cmdline: {cmdline}
disks:
  - path: {base}
  - size: 8M
"""


def run(tell: Tell, *, keep: bool = False, uri: str | None = None) -> list[str]:
    """The sentences that were proved; raises AssertionError at the first that is not true.

    Nothing is left behind; with ``keep`` the demo's folder is, and the last lines say how to go on with it. With ``uri``
    the VMs live on that connection, in place of a libvirt of the demo's own.
    """
    wishes = Wishes()
    if uri is not None:
        _require_free(uri)
    web, old = _NAMES if uri is None else _GUEST_NAMES
    with contextlib.closing(wishes), wishes.heard(), stage.opened(keep=keep, uri=uri) as place:
        if uri is None:
            tell(Kind.FACT, f"in {place.folder}, with a libvirt of its own; nothing of yours is touched")
        else:
            tell(Kind.FACT, f"in {place.folder}, and on {uri} as {web} and {old}; nothing else of yours is touched")
        counting = _build_guest(tell, learns=uri is None)
        witness = Witness(tell, place.folder)
        story = Story(place, counting, witness, wishes)
        tell(Kind.PART, "Part 1: a VM on a qcow2 image, most snapshots taken while it runs")
        story.tell_life(web, "generation2", "base.qcow2", running=True)
        tell(Kind.PART, "Part 2: a VM on a dynamic VHD, the same tree, each snapshot taken while it is off")
        story.tell_life(old, "generation1", "base.vhd", running=False)
        if keep:
            _tell_how_to_go_on(tell, place, web, old)
    return witness.proofs


def _require_free(uri: str) -> None:
    """The demo's names are nobody's yet on a connection that others use."""
    with hypervisor.opened(uri, wait_s=settings.LOCK_WAIT_S) as connection:
        roles.require_role(connection)
        for name in _GUEST_NAMES:
            if connection.find_domain_by_name(name) is not None:
                raise errors.Conflict(
                    f"{uri} has a VM '{name}' already: another demo runs, was kept, or was killed",
                    hint=f"if it is not needed: virsh -c {uri} destroy {name}; virsh -c {uri} undefine {name}",
                )


def _build_guest(tell: Tell, *, learns: bool) -> Guest:
    if learns and not stage.has_learnt():
        tell(Kind.FACT, "this is the first time: libvirt looks at this host's QEMU, which takes some seconds")
    if not guest.is_built():
        tell(Kind.FACT, "the guest is made of Debian's cloud kernel and busybox; 30 MB are downloaded")
    return guest.build()


def _tell_how_to_go_on(tell: Tell, place: Stage, web: str, old: str) -> None:
    tell(Kind.PART, f"The demo's VMs stay in {place.folder}, both off. To go on with them:")
    words = " ".join(f"{name}={shlex.quote(value)}" for name, value in place.environment().items())
    tell(Kind.COMMAND, f"export {words}")
    tell(Kind.COMMAND, f"hvmgr vm list; hvmgr snapshot tree {web}; hvmgr snapshot apply {web} right")
    if place.connection is None:
        tell(Kind.COMMAND, f"hvmgr vm stop {web}; rm -r {place.folder}   # the end")
    else:
        end = "; ".join(f"hvmgr vm delete {name} --with-disks --yes" for name in (web, old))
        tell(Kind.COMMAND, f"hvmgr vm stop {web}; {end}; rm -r {place.folder}   # the end")


@dataclass(slots=True)
class Story:
    """What happens to one VM after the other."""

    place: Stage
    counting: Guest
    witness: Witness
    wishes: Wishes
    step: int = 0

    def tell_life(self, name: str, template: str, base: str, *, running: bool) -> None:
        """Make a VM, grow a tree of four snapshots, go to each of them, and take it apart again.

        With ``running`` all snapshots but the first are taken while the guest counts.
        """
        with Host.open() as host:
            actor = self._create(host, name, template, base)
            installed = self._snapshot(actor, "installed")
            self._title("The guest counts, in its memory and on both disks")
            self._count(actor, 5)
            counting = self._snapshot(actor, "counting", running=running)
            self._count(actor, 4)
            left = self._snapshot(actor, "left", running=running)
            self._apply(actor, counting, "Back to 'counting': a second branch begins")
            self._count(actor, 8)
            right = self._snapshot(actor, "right", running=running)
            self._apply(actor, installed, "Back to the root")
            self._delete(actor, counting, "An inner snapshot with two children is deleted; what they need of it stays")
            self._apply(actor, left, "The left branch is whole")
            self._apply(actor, right, "The right branch is whole")
            self._power_off(actor)
            self._delete(actor, left, "With one branch left, the image without a name is merged")
            self._apply(actor, right, "What is left is what it was")
            self._count(actor, 1)
            self._power_off(actor)

    # -- steps ---------------------------------------------------------------------------------------------------

    def _create(self, host: Host, name: str, template: str, base: str) -> Actor:
        self._title(f"A VM on {base}, with a second disk that is new")
        self._make_base(base)
        text = _SPECIFICATION.format(
            name=name,
            template=template,
            memory=self.counting.memory_size // units.MIB,
            kernel=self.counting.kernel,
            initrd=self.counting.initrd,
            cmdline=self.counting.command_line,
            base=base,
        )
        file = self.place.folder / f"{name}.yaml"
        file.write_text(text)
        self._command("vm", "create", "-f", str(file))
        vm = host.vm(name)
        actor = Actor(vm, self.place.folder / f"{name}.log")
        _edit(actor)
        self.witness.tell(
            Kind.FACT, "an edit, as with virsh: no screen, and a file that gets every word of its console"
        )
        self._tree(vm)
        return actor

    def _make_base(self, name: str) -> None:
        """An image with some content: a disk that a snapshot might lose."""
        raw = self.place.folder / "base.raw"
        with raw.open("wb") as file:
            file.truncate(_BASE_SIZE)
            file.seek(_PATTERN_AT)
            file.write(os.urandom(_PATTERN_SIZE))
        options = ["-O", "qcow2"] if name.endswith(".qcow2") else ["-O", "vpc", "-o", "subformat=dynamic,force_size=on"]
        process.run(["qemu-img", "convert", "-f", "raw", *options, raw, raw.with_name(name)], timeout_s=TICK_S)

    def _snapshot(self, actor: Actor, name: str, *, running: bool = False) -> Snapshot:
        self._title(f"Snapshot '{name}', {'while the guest counts' if running else 'of the VM that is off'}")
        vm = actor.vm
        if not running:
            self._power_off(actor)
        before = None if running else self.witness.read(vm, vm.now().disks)
        with actor.screen() as screen:
            self._command("snapshot", "create", vm.name, name)
            snapshot = vm.snapshot(name)
            self.witness.remember(vm, snapshot, expected=before)
            self._tree(vm)
            if running:
                self.witness.prove_ran_on(screen, snapshot)
            else:
                self.witness.prove_present(vm, snapshot)
        return snapshot

    def _apply(self, actor: Actor, snapshot: Snapshot, title: str) -> None:
        self._title(title)
        vm = actor.vm
        self._command("snapshot", "apply", vm.name, snapshot.name)
        self._tree(vm)
        if snapshot.has_state:
            with actor.screen(from_start=True) as screen:
                self.witness.prove_memory(screen, snapshot)
        else:
            self.witness.prove_present(vm, snapshot)
        self.witness.prove_snapshots(vm)

    def _delete(self, actor: Actor, snapshot: Snapshot, title: str) -> None:
        self._title(title)
        vm = actor.vm
        before = self.witness.read(vm, vm.now().disks)
        self._command("snapshot", "delete", vm.name, snapshot.name)
        self._tree(vm)
        self.witness.prove_snapshots(vm)
        self.witness.prove("so do those of the present", held=self.witness.read(vm, vm.now().disks) == before)

    # -- the guest -----------------------------------------------------------------------------------------------

    def _count(self, actor: Actor, ticks: int) -> None:
        """The guest counts on; a VM that is off is started, and finds what its disks hold."""
        vm = actor.vm
        held = None
        if vm.state() is State.OFF:
            held = self.witness.read(vm, vm.now().disks)
            self._command("vm", "start", vm.name)
        with actor.screen(from_start=held is not None) as screen:
            if held is not None:
                self.witness.prove_boot(screen, held)
            for _ in range(ticks):
                tick = self.witness.next_tick(screen)
            disks = " and ".join(str(count) for count in tick.disks)
            self.witness.tell(Kind.FACT, f"the guest says: memory {tick.memory}, disks {disks}, ok")

    def _power_off(self, actor: Actor) -> None:
        if actor.vm.state() is State.OFF:
            return
        with actor.screen() as screen:
            self._command("vm", "stop", actor.vm.name)
            self.witness.prove_power_off(screen, actor.vm)

    # -- telling -------------------------------------------------------------------------------------------------

    def _title(self, text: str) -> None:
        self.wishes.check()
        self.step += 1
        self.witness.tell(Kind.TITLE, f"{self.step}. {text}")

    def _command(self, *words: str) -> None:
        """A command line, said and carried out; what it says is told, also when it fails."""
        self.witness.tell(Kind.COMMAND, shlex.join(["hvmgr", *words]))
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                cli.invoke(words)
        finally:
            for line in said.getvalue().splitlines():
                self.witness.tell(Kind.FACT, line)
        self.wishes.check()

    def _tree(self, vm: VM) -> None:
        self.witness.tell(Kind.TREE, render.draw_tree(vm))


@dataclass(frozen=True, slots=True)
class Actor:
    """A VM, and the file that gets every word of its guest, from the last start of its QEMU on."""

    vm: VM
    log: Path

    def screen(self, *, from_start: bool = False) -> Console:
        """What the guest says from now on, or since its QEMU was started."""
        return Console(self.log, from_start=from_start)


def _edit(actor: Actor) -> None:
    """The VM opens no port on this host, and its serial port is written to a file too.

    The file, because the first words after a restore come before anybody can read the pty; libvirt begins it anew with
    each QEMU. Done behind hvmgr's back, as ``virsh edit`` would: the next command takes it over.
    """
    actor.log.touch()
    connection = actor.vm.host.connection
    domain = connection.find_domain(actor.vm.id)
    assert domain is not None
    tree = etree.fromstring(domain.xml(live=False).encode())
    devices = tree.find("devices")
    assert devices is not None
    for screen in devices.findall("graphics"):
        devices.remove(screen)
    serial = devices.find("serial")
    assert serial is not None
    etree.SubElement(serial, "log", file=str(actor.log), append="off")
    connection.define(etree.tostring(tree, encoding="unicode"))
