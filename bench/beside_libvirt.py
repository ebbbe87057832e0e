"""Living beside libvirt: adopting a VM with many external snapshots, beside what virsh alone needs to hand them over."""

from __future__ import annotations

import itertools
import statistics
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from bench import harness
from bench.harness import Result
from bench.snapshots import Bench, prepared


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured; the tests take next to nothing."""

    rounds: int = 3
    snapshots: int = 50


def measure(say: Callable[[str], None], scale: Scale | None = None) -> list[Result]:
    """All results of this suite."""
    scale = scale or Scale()
    with prepared() as bench:
        say("beside libvirt: adopt")
        return _adopt(bench, scale)


def _adopt(bench: Bench, scale: Scale) -> list[Result]:
    """By hand one would at least have to read every snapshot, look at every image, and make libvirt forget it."""
    times: dict[str, list[float]] = {name: [] for name in ("hvmgr", "api", "virsh", "bare")}
    numbers = itertools.count()
    for _ in range(scale.rounds):
        names = {kind: _define(bench, f"{kind}{next(numbers)}") for kind in times}
        for kind in ("hvmgr", "api", "virsh"):
            for number in range(scale.snapshots):
                bench.virsh("snapshot-create-as", names[kind], f"s{number}", "--disk-only")
        acts: dict[str, Callable[[], object]] = {
            "hvmgr": lambda name=names["hvmgr"]: bench.hvmgr("vm", "adopt", name),  # type: ignore[misc]
            "api": lambda name=names["api"]: bench.host.adopt(name),  # type: ignore[misc]
            "virsh": lambda name=names["virsh"]: _by_hand(bench, name, scale.snapshots),  # type: ignore[misc]
            "bare": lambda name=names["bare"]: bench.hvmgr("vm", "adopt", name),  # type: ignore[misc]
        }
        for kind, seconds in harness.in_turns(acts, rounds=1, warm_up=0).items():
            times[kind].append(seconds)
    found = {kind: statistics.median(values) for kind, values in times.items()}
    what = f"adopt, {scale.snapshots} external snapshots"
    return [
        Result(what, found["hvmgr"], found["virsh"], "virsh and qemu-img, one by one", found["api"], aim=1),
        Result(what, found["hvmgr"], found["bare"], "adopt without snapshots", found["api"]),
    ]


def _define(bench: Bench, name: str) -> str:
    image, file = bench.folder / f"{name}.qcow2", bench.folder / f"{name}.xml"
    harness.program(["qemu-img", "create", "-q", "-f", "qcow2", str(image), "1G"])
    file.write_text(
        f"<domain type='qemu'><name>{name}</name><uuid>{uuid.uuid4()}</uuid><memory unit='MiB'>64</memory>"
        "<os><type arch='x86_64' machine='pc'>hvm</type></os><devices>"
        f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{image}'/>"
        "<target dev='vda' bus='virtio'/></disk></devices></domain>"
    )
    bench.virsh("define", str(file))
    return name


def _by_hand(bench: Bench, name: str, count: int) -> None:
    for number in reversed(range(count)):
        bench.virsh("snapshot-dumpxml", name, f"s{number}")
        harness.program(["qemu-img", "info", "-U", str(bench.folder / f"{name}.s{number}")])
        bench.virsh("snapshot-delete", name, f"s{number}", "--metadata")
