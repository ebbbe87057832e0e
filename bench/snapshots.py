"""Snapshots: creating, listing and deleting them, beside virsh and qemu-img on the same private libvirtd."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import hvmgr
from bench import harness
from bench.harness import Result
from hvmgr import VM, units
from hvmgr.model.specification import Acceleration
from tests import private_libvirt

PROJECT = Path(__file__).resolve().parent.parent
CACHE = PROJECT / ".pytest_cache" / "d" / "libvirt-capabilities"  # the tests' own: 8 s to learn anew

MEMORY = 128 * units.MIB
_PIECES = 64
_CLUSTER = 64 * units.KIB


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured; the tests take next to nothing."""

    rounds: int = 9
    slow_rounds: int = 3
    warm_up: int = 1
    branches: int = 20
    branch_length: int = 50
    data: int = units.GIB
    disk: int = units.TIB


@dataclass(frozen=True, slots=True)
class Bench:
    """A libvirtd of our own, homes beside it, and the two command lines that talk to it."""

    host: hvmgr.Host
    folder: Path
    environment: Mapping[str, str]

    def hvmgr(self, *words: str) -> None:
        """A whole hvmgr command, interpreter and all."""
        self._run("hvmgr", "-c", self.host.uri, "--root", str(self.host.root), *words)

    def hvmgr_version(self) -> None:
        """The shortest of all hvmgr commands."""
        self._run("hvmgr", "--version")

    def python(self, *words: str) -> None:
        """The same interpreter without hvmgr."""
        self._run("python", *words)

    def virsh(self, *words: str) -> None:
        """A whole virsh command."""
        harness.program(["virsh", "-q", "-c", self.host.uri, *words])

    def new_vm(self, name: str, *, size: int = units.GIB) -> VM:
        """A VM with one empty disk and no network, off; it has a BIOS, because virsh would not keep an NVRAM."""
        spec = hvmgr.Specification(
            name,
            template="generation1",
            memory=MEMORY,
            disks=(hvmgr.DiskSpecification(size=size),),
            networks=(),
            accel=Acceleration.TCG,  # the same everywhere: what runs in it is nothing but its BIOS
        )
        return self.host.create_vm(spec)

    def _run(self, script: str, *words: str) -> None:
        argv = [str(Path(sys.executable).with_name(script)), *words]
        harness.program(argv, environment=self.environment)


def measure(say: Callable[[str], None], scale: Scale | None = None) -> list[Result]:
    """All results of this suite."""
    scale = scale or Scale()
    with prepared() as bench:
        results: list[Result] = []
        for part in (_start_up, _off, _running, _large_tree, _merges):
            say(f"snapshots: {part.__name__.strip('_').replace('_', ' ')}")
            results += part(bench, scale)
    return results


@contextlib.contextmanager
def prepared(before: Callable[[Path], object] = lambda _: None) -> Iterator[Bench]:
    """A libvirtd of our own; ``before`` sees its root before it starts."""
    if os.geteuid() != 0 or shutil.which("libvirtd") is None:
        raise SystemExit("bench: needs root and libvirtd")
    CACHE.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        root = stack.enter_context(private_libvirt.roots(CACHE))()
        before(root)
        daemon = stack.enter_context(private_libvirt.daemon(root))
        homes = daemon.root / "vms"
        homes.mkdir(mode=0o711)
        os.environ["HVMGR_INDEX"] = str(daemon.root / "index")
        with hvmgr.Host.open(daemon.uri, root=homes) as host:
            yield Bench(host, daemon.root, _environment(daemon.root))


def _environment(folder: Path) -> dict[str, str]:
    """What measured programs see: this tree's hvmgr, with its byte code kept as an installation keeps it."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return environment | {"PYTHONPATH": str(PROJECT), "PYTHONPYCACHEPREFIX": str(folder / "pycache")}


def _start_up(bench: Bench, scale: Scale) -> list[Result]:
    vm = bench.new_vm("ten")
    for _ in range(10):
        vm.create_snapshot()
    bare = harness.in_turns(
        {"hvmgr": bench.hvmgr_version, "python": lambda: bench.python("-c", "pass")},
        rounds=3 * scale.rounds,
        warm_up=scale.warm_up,
    )
    lists = harness.in_turns(
        {
            "hvmgr": lambda: bench.hvmgr("snapshot", "list", "ten"),
            "api": vm.snapshots,
            "virsh": lambda: bench.virsh("list", "--all"),
        },
        rounds=scale.rounds,
        warm_up=scale.warm_up,
    )
    return [
        Result("hvmgr --version", bare["hvmgr"], bare["python"], "python -c pass", aim=2.5),
        Result("snapshot list of 10", lists["hvmgr"], lists["virsh"], "virsh list", lists["api"], aim=8),
    ]


def _off(bench: Bench, scale: Scale) -> list[Result]:
    ours, api, theirs = bench.new_vm("off"), bench.new_vm("off-api"), bench.new_vm("off-virsh")
    base = next(iter(theirs.now().disks.values()))
    number = itertools.count()

    def qemu_img() -> None:
        overlay = f"{bench.folder}/overlay{next(number)}"
        harness.program(["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", overlay])

    taken = harness.in_turns(
        {
            "hvmgr": lambda: bench.hvmgr("snapshot", "create", ours.name),
            "api": api.create_snapshot,
            "virsh": lambda: bench.virsh("snapshot-create-as", theirs.name, f"s{next(number)}", "--disk-only"),
            "qemu-img": qemu_img,
        },
        rounds=scale.rounds,
        warm_up=scale.warm_up,
    )
    what = "snapshot create, VM off"
    return [
        Result(what, taken["hvmgr"], taken["virsh"], "virsh snapshot-create-as --disk-only", taken["api"]),
        Result(what, taken["hvmgr"], taken["qemu-img"], "qemu-img create -b", taken["api"]),
    ]


def _running(bench: Bench, scale: Scale) -> list[Result]:
    ours, api, theirs = bench.new_vm("on"), bench.new_vm("on-api"), bench.new_vm("on-virsh")
    number, slot = itertools.count(), next(iter(theirs.now().disks))

    def virsh() -> None:
        place = f"{bench.folder}/state{next(number)}"
        memory, disk = f"file={place}.save,snapshot=external", f"{slot},snapshot=external,file={place}.qcow2"
        bench.virsh(
            "snapshot-create-as", theirs.name, Path(place).name, "--memspec", memory, "--diskspec", disk, "--atomic"
        )

    for vm in (ours, api, theirs):
        vm.start()
    taken = harness.in_turns(
        {"hvmgr": lambda: bench.hvmgr("snapshot", "create", ours.name), "api": api.create_snapshot, "virsh": virsh},
        rounds=scale.slow_rounds,
        warm_up=scale.warm_up,
    )
    for vm in (ours, api, theirs):
        vm.stop(force=True)
    other = "virsh snapshot-create-as --memspec"
    return [Result("snapshot create, VM runs", taken["hvmgr"], taken["virsh"], other, taken["api"])]


def _large_tree(bench: Bench, scale: Scale) -> list[Result]:
    """Branches side by side below one root; the small tree to compare with is one such branch."""
    large, small = bench.new_vm("large"), bench.new_vm("small")
    root = large.create_snapshot("root")
    for _ in range(scale.branches):
        root.apply(keep_undo=False)
        for _ in range(scale.branch_length):
            large.create_snapshot()
    small.create_snapshot()
    for _ in range(scale.branch_length):
        small.create_snapshot()
    count = len(large.snapshots())
    created = harness.in_turns(
        {
            "large": lambda: bench.hvmgr("snapshot", "create", "large"),
            "api": large.create_snapshot,
            "small": lambda: bench.hvmgr("snapshot", "create", "small"),
            "small api": small.create_snapshot,
        },
        rounds=scale.rounds,
        warm_up=scale.warm_up,
    )
    listed = harness.in_turns(
        {
            "large": lambda: bench.hvmgr("snapshot", "list", "large"),
            "api": large.snapshots,
            "small": lambda: bench.hvmgr("snapshot", "list", "small"),
        },
        rounds=scale.rounds,
        warm_up=scale.warm_up,
    )
    # From the middle of its branch: one above, one below, so that images are merged.
    middles = iter([one.id for one in large.snapshots()[scale.branch_length // 2 :: scale.branch_length]])
    deleted = harness.in_turns(
        {
            "large": lambda: bench.hvmgr("snapshot", "delete", "large", next(middles)),
            "api": lambda: large.snapshot(next(middles)).delete(),
        },
        rounds=min(scale.slow_rounds, scale.branches // 2 - scale.warm_up),
        warm_up=scale.warm_up,
    )
    small_tree = f"in a tree of {scale.branch_length}"
    return [
        Result(f"create in a tree of {count}", created["large"], created["small"], small_tree, created["api"], aim=1.2),
        Result("  the same in process", created["api"], created["small api"], small_tree, aim=1.2),
        Result(f"list of {count}", listed["large"], listed["small"], small_tree, listed["api"], limit=0.25),
        Result(f"delete in a tree of {count}", deleted["large"], in_process=deleted["api"], limit=0.5),
    ]


def _merges(bench: Bench, scale: Scale) -> list[Result]:
    """Both sides of the merge hold the data, or the smaller one a hundredth of it.

    It lies in pieces all over the disk, those of one side between those of the other: what one side hides of the other
    need not be moved, and a merge that moves nothing measures nothing.
    """
    times: dict[str, list[float]] = {"large disk": [], "small disk": [], "little data": []}
    for number in range(scale.slow_rounds):
        for name, size, smaller in (
            ("large disk", scale.disk, scale.data),
            ("small disk", 2 * scale.data, scale.data),
            ("little data", scale.disk, scale.data // 100),
        ):
            vm = bench.new_vm(f"{name.replace(' ', '-')}-{number}", size=size)
            vm.create_snapshot("above")
            _fill(vm, size, scale.data, shift=0)
            middle = vm.create_snapshot("middle")
            _fill(vm, size, smaller, shift=size // _PIECES // 2)
            os.sync()  # what was just written is not part of the merge
            times[name].append(harness.in_turns({"": middle.delete}, rounds=1, warm_up=0)[""])
            vm.delete(with_disks=True)
    large, small, little = (statistics.median(values) for values in times.values())
    data, disk = units.format_size(scale.data), units.format_size(scale.disk)
    small_disk = f"in a disk of {units.format_size(2 * scale.data)}"
    return [
        Result(f"delete, {data} in a disk of {disk}", large, small, small_disk, aim=1.3),
        Result("delete, a hundredth on one side", little, large, f"{data} on both sides", aim=0.3),
    ]


def _fill(vm: VM, size: int, amount: int, *, shift: int) -> None:
    """Data in the working image: pieces evenly spread over the disk, each ``shift`` bytes behind its place."""
    piece = max(amount // _PIECES // _CLUSTER, 1) * _CLUSTER
    starts = [(size // _PIECES * number + shift) // _CLUSTER * _CLUSTER for number in range(_PIECES)]
    words = [word for start in starts for word in ("-c", f"write -P 7 {start} {piece}")]
    harness.program(["qemu-io", "-f", "qcow2", *words, next(iter(vm.now().disks.values()))])
