"""A running VM merges images: what is left of its guest's writing meanwhile.

The guest rewrites a part of its disk as fast as it goes; QEMU counts what it writes. The images that are merged hold data
that the guest does not touch: the merge and the guest meet at the disk and in QEMU alone.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from bench import harness
from bench.harness import Result
from bench.live import screen
from bench.snapshots import Bench, prepared
from hvmgr import VM, units
from hvmgr.faces import guest
from hvmgr.model.specification import Acceleration, DiskSpecification, Specification

_BOOT_S = 180.0
_TICK_S = 60.0
_LOAD = 32 * units.MIB


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is merged, and how long the quiet guest is watched; the tests take next to nothing."""

    data: int = 256 * units.MIB
    quiet_s: float = 8.0


@dataclass(frozen=True, slots=True)
class Seen:
    """What the guest wrote in some time, and the longest time between two of its ticks."""

    written: int
    seconds: float
    gap: float

    @property
    def per_mib(self) -> float:
        """Seconds for each MiB that it writes."""
        return self.seconds / max(self.written / units.MIB, 0.01)


def measure(say: Callable[[str], None], scale: Scale | None = None) -> list[Result]:
    """All results of this suite."""
    scale = scale or Scale()
    rate = f"{max(scale.data // units.MIB // 5, 1)}MiB"
    ways: dict[str, tuple[str, ...]] = {
        "between frozen images": ("two",),
        "into the guest's image": ("four",),
        f"at {rate} a second": ("three", "--bandwidth", rate),
        "into the base, and a pivot": ("one",),
    }
    results: list[Result] = []
    with prepared() as bench:
        vm = _running(bench, scale)
        quiet = _watched(vm, lambda: time.sleep(scale.quiet_s))
        say(f"live merge: the guest alone writes {quiet.written / quiet.seconds / units.MIB:.1f} MiB a second")
        for name, words in ways.items():
            seen = _watched(vm, lambda w=words: bench.hvmgr("snapshot", "delete", vm.name, *w))  # type: ignore[misc]
            say(f"  {name}: {seen.seconds:.1f} s, gap {seen.gap:.2f} s, {seen.written / units.MIB:.0f} MiB written")
            results.append(Result(f"guest writes 1 MiB, merge {name}", seen.per_mib, quiet.per_mib, "no merge", aim=2))
            results.append(Result(f"longest gap, merge {name}", seen.gap, quiet.gap, "no merge"))
        vm.stop(force=True)
    return results


def _running(bench: Bench, scale: Scale) -> VM:
    """A guest that writes all the time, above a base and four images with as much data each."""
    made = guest.build()
    vm = bench.host.create_vm(
        Specification(
            name="merging",
            template="generation1",
            memory=256 * units.MIB,
            vcpus=2,
            disks=(DiskSpecification(size=2 * _LOAD + 5 * scale.data),),
            networks=(),
            accel=Acceleration.TCG,  # the same everywhere
            kernel=made.kernel,
            initrd=made.initrd,
            cmdline=f"{made.command_line} hvmgr.write={_LOAD // units.MIB}",
        )
    )
    for number, name in enumerate(("one", "two", "three", "four")):
        (path,) = vm.now().disks.values()
        place = f"{2 * _LOAD + number * scale.data} {scale.data}"
        harness.program(["qemu-io", "-f", "qcow2", "-c", f"write -P {number + 1} {place}", path])
        vm.create_snapshot(name)
    vm.start()
    with screen(vm) as console:
        console.next_tick(_BOOT_S)
        time.sleep(5)  # the first round takes new clusters
    return vm


def _watched(vm: VM, act: Callable[[], object]) -> Seen:
    """An act while the guest's ticks are timed and its writes counted."""
    times: list[float] = []
    over = threading.Event()

    def watch() -> None:
        with screen(vm) as console:
            while not over.is_set():
                console.next_tick(_TICK_S)
                times.append(time.monotonic())

    thread = threading.Thread(target=watch)
    thread.start()
    while len(times) < 2:
        time.sleep(0.05)
    before, start = _written(vm), time.monotonic()
    act()
    seconds, written = time.monotonic() - start, _written(vm) - before
    over.set()
    thread.join()
    return Seen(written, seconds, max(later - earlier for earlier, later in itertools.pairwise(times)))


def _written(vm: VM) -> int:
    """What the guest has written to its disks; the merge's own writing is not counted there."""
    domain = vm.host.connection.find_domain(vm.id)
    if domain is None:
        raise SystemExit(f"bench: {vm.name} is gone")
    return sum(int(one["stats"]["wr_bytes"]) for one in domain.monitor("query-blockstats") if one.get("qdev"))
