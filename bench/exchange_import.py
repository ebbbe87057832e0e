"""Imports: a linked one takes the same time whatever the size, a copy no longer than what copies disks alone."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import hvmgr
from bench import harness
from bench.harness import Result
from bench.snapshots import Bench, prepared
from hvmgr import VM, units

_PIECE = 16 * units.MIB


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured; the tests take next to nothing."""

    rounds: int = 3
    warm_up: int = 1
    small: int = units.GIB
    large: int = units.TIB
    disk: int = 4 * units.GIB
    data: int = 1600 * units.MIB


def measure(say: Callable[[str], None], scale: Scale | None = None) -> list[Result]:
    """All results of this suite."""
    scale = scale or Scale()
    with prepared() as bench:
        say("imports: link")
        results = _link(bench, scale)
        say("imports: copy")
        return [*results, *_copy(bench, scale)]


def _link(bench: Bench, scale: Scale) -> list[Result]:
    golds = {
        name: _away(bench, bench.new_vm(f"gold{name}", size=size))
        for name, size in (("small", scale.small), ("large", scale.large))
    }
    numbers = itertools.count()

    def link(name: str) -> None:
        bench.hvmgr("import", str(golds[name]), "--mode", "link", "--name", f"link{next(numbers)}")

    def in_process() -> None:
        options = hvmgr.ImportOptions(mode=hvmgr.Mode.LINK, name=f"link{next(numbers)}")
        bench.host.import_vm(golds["large"], options)

    acts = {"small": lambda: link("small"), "large": lambda: link("large"), "api": in_process}
    found = harness.in_turns(acts, rounds=scale.rounds, warm_up=scale.warm_up)
    what = f"import, linked, {units.format_size(scale.large)}"
    other = f"the same with {units.format_size(scale.small)}"
    return [Result(what, found["large"], found["small"], other, found["api"], aim=1.5)]


def _copy(bench: Bench, scale: Scale) -> list[Result]:
    vm = bench.new_vm("full", size=scale.disk)
    image = Path(vm.now().disks["hda"])
    _fill(image, scale)
    cloner = shutil.which("virt-clone")
    numbers = itertools.count()
    source = _away(bench, vm, keep=cloner is not None)

    made: list[str] = []

    def ours() -> None:
        made.append(f"copy{next(numbers)}")
        bench.hvmgr("import", str(source), "--name", made[-1])

    def cleared() -> None:
        bench.host.vm(made.pop()).delete(with_disks=True)

    def copied() -> None:
        target = bench.folder / f"copy{next(numbers)}.qcow2"
        harness.program(["cp", "--sparse=always", str(image if image.exists() else _base(source)), str(target)])
        harness.program(["sync", str(target)])
        target.unlink()

    def cloned() -> None:
        name = f"clone{next(numbers)}"
        target = bench.folder / f"{name}.qcow2"
        harness.program(["virt-clone", "--connect", bench.host.uri, "-q", "-o", "full", "-n", name, "-f", str(target)])
        harness.program(["sync", str(target)])  # hvmgr ends when the copy is on disk
        bench.virsh("undefine", name)
        target.unlink()

    acts: dict[str, Callable[[], object]] = {"ours": ours, "not counted": cleared, "cp": copied}
    acts |= {"clone": cloned} if cloner else {}
    found = harness.in_turns(acts, rounds=scale.rounds, warm_up=scale.warm_up)
    what = f"import, copied, {units.format_size(scale.data)} in {units.format_size(scale.disk)}"
    results = [Result(what, found["ours"], found["cp"], "cp --sparse=always and sync", aim=1.1)]
    if cloner:
        results.append(Result(what, found["ours"], found["clone"], "virt-clone and sync", aim=1.1))
    return results


def _fill(image: Path, scale: Scale) -> None:
    """Data that nothing can compress, through QEMU."""
    raw = image.with_suffix(".raw")
    with raw.open("wb") as file:
        for _ in range(max(1, scale.data // _PIECE)):
            file.write(os.urandom(min(_PIECE, scale.data)))
        file.truncate(scale.disk)
    harness.program(["qemu-img", "convert", "-n", "-f", "raw", "-O", "qcow2", str(raw), str(image)])
    raw.unlink()


def _away(bench: Bench, vm: VM, *, keep: bool = False) -> Path:
    """The VM's home as a read-only folder elsewhere."""
    target = bench.folder / "away" / vm.name
    target.parent.mkdir(mode=0o711, exist_ok=True)
    shutil.copytree(vm.path, target, ignore=shutil.ignore_patterns(".hvmgr"))
    for path in target.rglob("*.qcow2"):
        path.chmod(0o444)
    if not keep:
        vm.delete(with_disks=True)
    return target


def _base(source: Path) -> Path:
    return next((source / "Virtual Hard Disks").iterdir())
