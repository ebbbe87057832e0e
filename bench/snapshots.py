"""Snapshots: creating, listing and deleting them, beside virsh and qemu-img on the same private libvirtd."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import hvmgr
from bench import harness
from bench.harness import Result
from hvmgr import units
from tests import private_libvirt

PROJECT = Path(__file__).resolve().parent.parent
CACHE = PROJECT / ".pytest_cache" / "d" / "libvirt-capabilities"  # the tests' own: 8 s to learn anew

MEMORY = 128 * units.MIB


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured; the tests take next to nothing."""

    rounds: int = 9
    slow_rounds: int = 3
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

    def python(self, *words: str) -> None:
        """The same interpreter without hvmgr."""
        self._run("python", *words)

    def virsh(self, *words: str) -> None:
        """A whole virsh command."""
        harness.program(["virsh", "-q", "-c", self.host.uri, *words])

    def new_vm(self, name: str, *, size: int = units.GIB) -> hvmgr.VM:
        """A VM without network and with one empty disk, off."""
        disks = (hvmgr.DiskSpecification(size=size),)
        return self.host.create_vm(hvmgr.Specification(name, memory=MEMORY, disks=disks, networks=()))

    def _run(self, script: str, *words: str) -> None:
        argv = [str(Path(sys.executable).with_name(script)), *words]
        harness.program(argv, environment=self.environment)


def measure(say: Callable[[str], None], scale: Scale | None = None) -> list[Result]:
    """All results of this suite."""
    scale = scale or Scale()
    with _prepared() as bench:
        results: list[Result] = []
        for part in (_start_up, _off, _running, _large_tree, _merges):
            say(f"snapshots: {part.__name__.strip('_').replace('_', ' ')}")
            results += part(bench, scale)
    return results


@contextlib.contextmanager
def _prepared() -> Iterator[Bench]:
    if os.geteuid() != 0 or shutil.which("libvirtd") is None:
        raise SystemExit("bench: needs root and libvirtd")
    CACHE.mkdir(parents=True, exist_ok=True)
    with private_libvirt.roots(CACHE) as make, private_libvirt.daemon(make()) as daemon:
        homes = daemon.root / "vms"
        homes.mkdir(mode=0o711)
        own = {"HVMGR_INDEX": str(daemon.root / "index"), "PYTHONPATH": str(PROJECT)}
        os.environ.update(own)
        with hvmgr.Host.open(daemon.uri, root=homes) as host:
            yield Bench(host, daemon.root, os.environ | own)


def _start_up(bench: Bench, scale: Scale) -> list[Result]:
    vm = bench.new_vm("ten")
    for _ in range(10):
        vm.create_snapshot()
    bare = harness.in_turns(
        {"ours": lambda: bench.hvmgr_version(), "theirs": lambda: bench.python("-c", "pass")}, rounds=3 * scale.rounds
    )
    listed = harness.in_turns(
        {
            "ours": lambda: bench.hvmgr("snapshot", "list", "ten"),
            "api": vm.snapshots,
            "theirs": lambda: bench.virsh("list", "--all"),
        },
        rounds=scale.rounds,
    )
    return [
        Result("hvmgr --version", bare["ours"], bare["theirs"], "python -c pass", aim=2.5),
        Result("snapshot list, 10", listed["ours"], listed["theirs"], "virsh list", listed["api"], aim=8),
    ]
