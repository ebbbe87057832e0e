"""Snapshots with memory of a guest that rewrites its memory: how long it stands still, beside virsh's three ways.

The gap is the longest time between two ticks of the counting guest, which are a tenth of a second apart.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import harness
from bench.harness import Result
from bench.snapshots import Bench, prepared
from hvmgr import VM, errors, units
from hvmgr.faces import console, guest
from hvmgr.model.specification import Acceleration, DiskSpecification, Specification
from tests import private_libvirt

_BOOT_S = 180.0
_TICK_S = 60.0
_PAUSE = 0.05  # what a snapshot may add to the time between two ticks
_ALIVE = ("hvmgr", "virsh", "virsh --live")


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured; the tests take next to nothing. The load is the part of the memory that is rewritten."""

    memories: tuple[int, ...] = (512 * units.MIB, units.GIB, 2 * units.GIB)
    load: float = 0.5
    rounds: int = 3
    live_s: float = 15.0  # a --live that has not ended by then never does


@dataclass(frozen=True, slots=True)
class Taken:
    """What one way took: the longest gap and the whole time in seconds, the file in bytes; whether it came to an end."""

    gap: float
    total: float
    size: int
    is_done: bool = True


def measure(say: Callable[[str], None], scale: Scale | None = None) -> list[Result]:
    """All results of this suite."""
    scale = scale or Scale()
    results, gaps = list[Result](), dict[int, float]()
    with prepared(_allow) as bench:
        for memory in scale.memories:
            say(f"live: {units.format_size(memory)}")
            taken = _take(bench, memory, scale)
            for name, one in taken.items():
                end = "" if one.is_done else " (stopped)"
                say(f"  {name}: gap {one.gap:.2f} s, total {one.total:.2f} s, {units.format_size(one.size)}{end}")
            results += _results(units.format_size(memory), memory, taken)
            gaps[memory] = taken["hvmgr"].gap - taken["no snapshot"].gap
    least, most = min(gaps), max(gaps)
    if least != most:  # what a snapshot adds does not grow with the memory
        sizes = units.format_size(most), units.format_size(least)
        results.append(Result(f"added to the gap, {sizes[0]}", gaps[most], gaps[least], sizes[1], limit=_PAUSE))
    return results


def _results(name: str, memory: int, taken: dict[str, Taken]) -> list[Result]:
    ours, quiet = taken["hvmgr"], taken["no snapshot"].gap
    pause = [Result(f"longest gap, {name} under load", ours.gap, quiet, "no snapshot", limit=quiet + _PAUSE)]
    for other in ("virsh", "virsh --live", "virsh save"):
        end = "" if taken[other].is_done else ", stopped"
        pause.append(Result(f"longest gap, {name} under load", ours.gap, taken[other].gap, other + end))
    total = Result(f"whole time, {name} under load", ours.total, taken["virsh"].total, "virsh, paused", aim=3)
    size = Result(f"file, {name} under load", ours.size, memory, "the memory", aim=1.01, is_size=True)
    return [*pause, total, size]


def _allow(root: Path) -> None:
    """This libvirt's QEMU gets userfaultfd, whatever the host's setting is."""
    with (root / "etc" / "qemu.conf").open("a") as file:
        file.write(private_libvirt.WITH_RIGHTS)


def _take(bench: Bench, memory: int, scale: Scale) -> dict[str, Taken]:
    vm = _booted(bench, memory, int(memory * scale.load))
    try:
        place = bench.folder / f"state{memory}"
        rounds = [_take_once(bench, vm, place, f"{number}", scale) for number in range(scale.rounds)]
        taken = {name: _median([one[name] for one in rounds]) for name in rounds[0]}
        taken["virsh save"] = _saved(bench, vm, Path(f"{place}.saved"))
        return taken
    finally:
        vm.stop(force=True)


def _take_once(bench: Bench, vm: VM, place: Path, number: str, scale: Scale) -> dict[str, Taken]:
    """Everything after which the guest goes on, one after the other."""
    taken = {"no snapshot": _watched(vm, lambda: time.sleep(3), lambda: 0)}
    taken["hvmgr"] = _watched(
        vm, lambda: bench.hvmgr("snapshot", "create", vm.name, number, "--no-fallback"), lambda: _ours(vm, number)
    )
    for name, more in (("virsh", ()), ("virsh --live", ("--live",))):
        file = Path(f"{place}{name[-4:]}.save")
        taken[name] = _watched(vm, lambda f=file, m=more: _virsh(bench, vm, f, m, scale), lambda f=file: _size(f))  # type: ignore[misc]
        file.unlink(missing_ok=True)
    return taken


def _median(rounds: list[Taken]) -> Taken:
    return Taken(
        statistics.median(one.gap for one in rounds),
        statistics.median(one.total for one in rounds),
        max(one.size for one in rounds),
        all(one.is_done for one in rounds),
    )


def _booted(bench: Bench, memory: int, load: int) -> VM:
    made = guest.build()
    vm = bench.host.create_vm(
        Specification(
            name=f"live{memory // units.MIB}",
            template="generation1",
            memory=memory,
            vcpus=2,
            disks=(DiskSpecification(size=2 * units.MIB),),
            networks=(),
            accel=Acceleration.TCG,  # the same everywhere
            kernel=made.kernel,
            initrd=made.initrd,
            cmdline=f"{made.command_line} hvmgr.load={load // units.MIB}",
        )
    )
    vm.start()
    with screen(vm) as said:
        said.next_tick(_BOOT_S)
        time.sleep(5)  # the first round fills the memory
        said.drain()
        said.next_tick(_BOOT_S)
    return vm


@contextlib.contextmanager
def screen(vm: VM) -> Iterator[console.Console]:
    """The console of a running guest."""
    domain = vm.host.connection.find_domain(vm.id)
    path = None if domain is None else domain.serial_path()
    if path is None:
        raise SystemExit(f"bench: {vm.name} has no console")
    with console.Console(path) as said:
        yield said


def _watched(vm: VM, act: Callable[[], object], size: Callable[[], int]) -> Taken:
    """An act while the guest's ticks are timed, from before it until a tick after it."""
    times: list[float] = []
    over = threading.Event()

    def watch() -> None:
        with screen(vm) as said, contextlib.suppress(errors.HostFailed):
            while True:
                said.next_tick(_TICK_S)
                times.append(time.monotonic())
                if over.is_set():
                    return

    thread = threading.Thread(target=watch)
    thread.start()
    while len(times) < 2:
        time.sleep(0.05)
    start = time.monotonic()
    is_done = act() is not False
    total = time.monotonic() - start
    over.set()
    thread.join()
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    return Taken(max(gaps), total, size(), is_done)


def _virsh(bench: Bench, vm: VM, file: Path, more: tuple[str, ...], scale: Scale) -> bool:
    """virsh's snapshot of memory alone; what does not end is stopped."""
    slot = next(iter(vm.now().disks))
    words = ["snapshot-create-as", vm.name, "--memspec", f"file={file},snapshot=external", "--no-metadata"]
    words += ["--diskspec", f"{slot},snapshot=no", *more]
    with subprocess.Popen(
        ["virsh", "-q", "-c", bench.host.uri, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            process.wait(scale.live_s if more else None)
        except subprocess.TimeoutExpired:
            bench.virsh("domjobabort", vm.name)
            process.wait()
            return False
    return process.returncode == 0


def _saved(bench: Bench, vm: VM, file: Path) -> Taken:
    """virsh save: the guest is gone for the whole of it."""
    seconds = harness.in_turns({"save": lambda: bench.virsh("save", vm.name, str(file))}, rounds=1, warm_up=0)["save"]
    return Taken(seconds, seconds, _size(file))


def _ours(vm: VM, name: str) -> int:
    return _size(vm.home.layout.memory(vm.snapshot(name).id))


def _size(file: Path) -> int:
    return file.stat().st_blocks * 512 if file.exists() else 0
