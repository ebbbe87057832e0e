"""The witness of the demo: remembers what snapshots were, and proves that they came back, from outside hvmgr.

Disks are read with qemu-img, which knows nothing of hvmgr, and compared by their bytes; memory is what the counting
guest says on its console, which holds its disks against its memory in every tick.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from hvmgr.faces import guest
from hvmgr.faces.console import Console, Tick
from hvmgr.host import process
from hvmgr.operations.snapshot import Snapshot
from hvmgr.operations.vm import VM

TICK_S = 60.0  # a tenth of a second, on a machine that has nothing else to do
BOOT_S = 120.0  # two seconds, likewise

_READ_S = 60.0


class Kind(StrEnum):
    """What a line of the demo is."""

    PART = "part"
    TITLE = "title"
    COMMAND = "command"
    FACT = "fact"
    TREE = "tree"
    PROOF = "proof"


Tell = Callable[[Kind, str], None]


@dataclass(frozen=True, slots=True)
class Content:
    """What one disk holds: all its bytes by their sha256, and the guest's counter among them."""

    sha256: str
    counter: int


@dataclass(slots=True)
class Witness:
    """Tells what it has proved; ``proofs`` are the sentences. ``folder`` takes copies of disks for a moment."""

    tell: Tell
    folder: Path
    proofs: list[str] = field(default_factory=list)
    _known: dict[str, dict[str, Content]] = field(default_factory=dict)  # by snapshot id, then by slot

    def prove(self, sentence: str, *, held: bool) -> None:
        """The sentence is true; raises AssertionError with it when it is not: that is a defect in hvmgr."""
        if not held:
            raise AssertionError(f"proof failed: {sentence}")
        self.proofs.append(sentence)
        self.tell(Kind.PROOF, sentence)

    # -- disks ---------------------------------------------------------------------------------------------------

    def read(self, vm: VM, disks: Mapping[str, str]) -> dict[str, Content]:
        """What the images hold, each through its whole chain; nothing may be writing to them."""
        known = vm.tree().images
        return {slot: self._read(Path(path), known[path].format) for slot, path in disks.items()}

    def remember(self, vm: VM, snapshot: Snapshot, *, expected: Mapping[str, Content] | None) -> None:
        """What the snapshot's disks hold now is what they have to hold for ever, and what was ``expected`` if known."""
        found = self._known[snapshot.id] = self.read(vm, snapshot.disks)
        if expected is not None and found != expected:
            raise AssertionError(
                f"proof failed: the disks of the snapshot '{snapshot.name}' are not what the VM's were before"
            )

    def counters(self, snapshot: Snapshot) -> str:
        """The counters on the disks of a snapshot, for people."""
        return counts(self._known[snapshot.id])

    def prove_snapshots(self, vm: VM) -> None:
        """Every snapshot's disks hold what they held when it was taken."""
        snapshots = vm.snapshots()
        same = [
            content == self._known[one.id][slot]
            for one in snapshots
            for slot, content in self.read(vm, one.disks).items()
        ]
        self.prove(
            f"the {len(same)} disks of {len(snapshots)} snapshots hold the bytes that they held when they were taken "
            f"({same.count(True)} of {len(same)} by sha256)",
            held=all(same),
        )

    def prove_present(self, vm: VM, snapshot: Snapshot) -> None:
        """The disks of a VM that is off are those of the snapshot, to the byte."""
        now = self.read(vm, vm.now().disks)
        self.prove(
            f"the VM's {len(now)} disks are those of '{snapshot.name}', to the byte (sha256, counters {counts(now)})",
            held=now == self._known[snapshot.id],
        )

    def _counter(self, snapshot: Snapshot) -> int:
        """That of the first disk, which the guest writes first."""
        return next(iter(self._known[snapshot.id].values())).counter

    def _read(self, path: Path, fmt: str) -> Content:
        copy = self.folder / "copy.raw"
        process.run(["qemu-img", "convert", "-f", fmt, "-O", "raw", path, copy], timeout_s=_READ_S)
        with copy.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(guest.COUNTER_OFFSET)
            return Content(digest, guest.read_counter(file.read(guest.COUNTER_SIZE)))

    # -- memory --------------------------------------------------------------------------------------------------

    def prove_boot(self, screen: Console, held: Mapping[str, Content]) -> None:
        """The guest that was just started finds on its disks what we read there before."""
        found = screen.next_boot(BOOT_S)
        self.prove(
            f"the guest boots and finds {_joined(found)} on its disks, as we did",
            held=list(found) == [content.counter for content in held.values()],
        )

    def prove_ran_on(self, screen: Console, snapshot: Snapshot) -> None:
        """The guest has counted without a gap since ``screen`` was read last, and meets its disks in every tick."""
        with Console(screen.path) as latest:
            last = latest.next_tick(TICK_S)
        first = tick = screen.next_tick(TICK_S)
        gapless = first.ok
        while gapless and tick.memory < last.memory:
            following = screen.next_tick(TICK_S)
            gapless, tick = following.ok and following.memory == tick.memory + 1, following
        self.prove(
            f"the guest ran on, from {first.memory} to {tick.memory} without a gap; the snapshot's disks hold "
            f"{self.counters(snapshot)}",
            held=gapless and first.memory - 1 <= self._counter(snapshot) <= tick.memory,
        )

    def prove_memory(self, screen: Console, snapshot: Snapshot) -> None:
        """The guest goes on from a snapshot's memory, over its disks; ``screen`` has its words from the first one on."""
        tick = screen.next_tick(TICK_S)
        counter = self._counter(snapshot)
        following = screen.next_tick(TICK_S)
        self.prove(
            f"the disks held {counter} at '{snapshot.name}'; memory goes on with {tick.memory}, finds {_joined(tick.disks)} "
            f"on the disks, then counts {following.memory}",
            held=tick.follows(counter) and following.ok and following.memory == tick.memory + 1,
        )

    def next_tick(self, screen: Console) -> Tick:
        """The guest's next count; raises AssertionError when memory and disks do not belong together."""
        tick = screen.next_tick(TICK_S)
        if not tick.ok:
            raise AssertionError(
                f"proof failed: the guest's memory says {tick.memory}, its disks say {_joined(tick.disks)}"
            )
        return tick

    def prove_power_off(self, screen: Console, vm: VM) -> None:
        """What the guest said last is what its disks hold."""
        said = screen.wait_for("poweroff disk=", TICK_S).rpartition("=")[2]
        now = self.read(vm, vm.now().disks)
        self.prove(
            f"the guest's last word was {_joined(int(word) for word in said.split(','))}, and so say the disks",
            held=[int(word) for word in said.split(",")] == [content.counter for content in now.values()],
        )


def counts(contents: Mapping[str, Content]) -> str:
    """The counters of some disks, for people."""
    return _joined(content.counter for content in contents.values())


def _joined(numbers: Iterable[int]) -> str:
    return " and ".join(str(number) for number in numbers)
