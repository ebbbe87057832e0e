"""What changed on a running VM since the last backup: hvmgr from its snapshots, virtnbdbackup from QEMU's dirty bitmaps.

Each has a VM of its own with the same disk and the same changes, which its QEMU writes as if its guest had. A backup is all
that a night needs: hvmgr makes the new snapshot, writes what differs from the last one, and removes that; virtnbdbackup
makes the next checkpoint and writes what its bitmap says.
"""

from __future__ import annotations

import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench import harness
from bench.harness import Result
from bench.snapshots import Bench, prepared
from hvmgr import units
from hvmgr.host.domain import Domain

_PIECES = 16  # all over the disk
_THEIRS = "theirs"


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured; the tests take next to nothing."""

    rounds: int = 3
    disk: int = 100 * units.GIB
    changed: int = 256 * units.MIB


def measure(say: Callable[[str], None], scale: Scale | None = None) -> list[Result]:
    """All results of this suite; none where virtnbdbackup is not installed."""
    if shutil.which("virtnbdbackup") is None:
        say("running backup: virtnbdbackup is not installed")
        return []
    scale = scale or Scale()
    with prepared() as bench, _folder() as folder:
        night = _Night(bench, folder, scale)
        times: dict[str, list[float]] = {"snapshot and export": [], "all": [], _THEIRS: []}
        for number in range(scale.rounds + 1):  # the first one is a warm-up
            say(f"running backup: night {number}")
            for name, seconds in night.spend(number).items():
                times[name] += [seconds] if number else []
        night.end()
    found = {name: median(values) for name, values in times.items()}
    what = f"{units.format_size(scale.changed)} changed in {units.format_size(scale.disk)}, running"
    return [
        Result(what, found["snapshot and export"], found[_THEIRS], "virtnbdbackup -l inc"),
        Result("the same, the old snapshot merged away", found["all"], found[_THEIRS], "virtnbdbackup -l inc"),
    ]


class _Night:
    """Two VMs that run, each with a first backup."""

    def __init__(self, bench: Bench, folder: Path, scale: Scale) -> None:
        self._bench, self._folder, self._scale = bench, folder, scale
        self._vm = bench.new_vm("ours", size=scale.disk)
        self._vm.start()
        self._slot = min(self._vm.now().disks)
        _define(bench, folder, scale.disk)
        for name in ("ours", _THEIRS):
            self._write(name, 1)
        self._vm.create_snapshot("night")
        self._backup("full")

    def spend(self, number: int) -> dict[str, float]:
        """The guests change their disks; the seconds of each backup, until it is on disk."""
        times = {}
        for name in ("ours", _THEIRS):
            self._write(name, number + 2)
        file, hvmgr = self._folder / f"{number}.vhd", self._bench.hvmgr
        start = time.perf_counter()
        hvmgr("snapshot", "create", "ours", f"night {number}", "--type", "disk-only")
        words = ("--snapshot", f"night {number}", "--base", "night")
        hvmgr("disk", "export", "ours", self._slot, str(file), *words)
        harness.program(["sync", str(file)])
        times["snapshot and export"] = time.perf_counter() - start
        hvmgr("snapshot", "delete", "ours", "night")
        times["all"] = time.perf_counter() - start
        hvmgr("snapshot", "rename", "ours", f"night {number}", "night")
        start = time.perf_counter()
        self._backup("inc")
        harness.program(["sync", "--file-system", str(self._folder)])
        times[_THEIRS] = time.perf_counter() - start
        file.unlink()
        return times

    def end(self) -> None:
        """Neither runs any more."""
        self._vm.stop(force=True)
        self._bench.virsh("destroy", _THEIRS)

    def _backup(self, level: str) -> None:
        """Where libvirtd has its usual place: of another address virtnbdbackup wants a password."""
        daemon = (self._bench.folder / "libvirtd.pid").read_text("ascii").strip()
        words = ["-U", "qemu:///system", "-d", _THEIRS, "-l", level, "-o", str(self._folder / "backup"), "--noprogress"]
        argv = ["nsenter", f"--target={daemon}", "--mount", "virtnbdbackup", *words, "-S", str(self._folder)]
        harness.program(argv)

    def _write(self, name: str, value: int) -> None:
        """Below the guest's own device: QEMU notes it as it notes what a guest writes."""
        domain = self._bench.host.connection.find_domain_by_name(name)
        assert isinstance(domain, Domain)
        (device,) = [one["qdev"] for one in domain.monitor("query-block") if one.get("qdev") and one.get("inserted")]
        piece = self._scale.changed // _PIECES
        for number in range(_PIECES):
            place = number * (self._scale.disk // _PIECES)
            line = f'qemu-io -d {device} "write -P {value} {place} {piece}"'
            domain.monitor("human-monitor-command", command_line=line)


def _define(bench: Bench, folder: Path, size: int) -> None:
    image, file = folder / "theirs.qcow2", folder / "theirs.xml"
    harness.program(["qemu-img", "create", "-q", "-f", "qcow2", str(image), str(size)])
    image.chmod(0o666)
    file.write_text(
        f"<domain type='qemu'><name>{_THEIRS}</name><uuid>{uuid.uuid4()}</uuid><memory unit='MiB'>64</memory>"
        "<os><type arch='x86_64' machine='pc'>hvm</type></os><devices>"
        f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{image}'/>"
        "<target dev='vda' bus='virtio'/></disk></devices></domain>"
    )
    bench.virsh("define", str(file))
    bench.virsh("start", _THEIRS)


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hvmgr-bench-", dir="/var/tmp") as name:
        Path(name).chmod(0o777)
        yield Path(name)
