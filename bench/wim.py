"""WIM files applied to disks and captured from them, beside wimlib's own programs on a raw partition.

Both sides end with everything on disk. Ours are whole commands, with the journal and the locks of an image that is there.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench import harness
from bench.harness import Result
from hvmgr import units


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured; the tests take next to nothing."""

    rounds: int = 5
    warm_up: int = 1
    files: int = 3000
    data: int = 90 * units.MIB
    disk: int = 2 * units.GIB


def measure(say: Callable[[str], None], scale: Scale | None = None) -> list[Result]:
    """All results of this suite."""
    scale = scale or Scale()
    with tempfile.TemporaryDirectory(prefix="hvmgr-bench-") as name:
        bench = _Bench(Path(name), scale)
        say("wim: apply")
        results = bench.applied()
        say("wim: capture")
        return results + bench.captured()


class _Bench:
    def __init__(self, folder: Path, scale: Scale) -> None:
        self._folder, self._scale = folder, scale
        self._wim = folder / "sample.wim"
        tree = folder / "tree"
        _grow(tree, scale)
        _run("wimlib-imagex", "capture", tree, self._wim, "sample", "--compress=LZX")
        shutil.rmtree(tree)
        self._prepared = folder / "prepared.vhd"
        self._hvmgr("image", "prepare", self._prepared, "--size", str(scale.disk), "--table", "mbr")
        self._what = f"{scale.files} files, {units.format_size(scale.data)}"

    def applied(self) -> list[Result]:
        """Onto a VHD that is there, and into a new one."""
        times = harness.in_turns(
            {
                "vhd": self._apply_to_vhd,
                "new": self._apply_to_new,
                "raw": lambda: self._apply_by_wimlib(convert=False),
                "converted": lambda: self._apply_by_wimlib(convert=True),
            },
            rounds=self._scale.rounds,
            warm_up=self._scale.warm_up,
        )
        return [
            Result(f"wim apply to a dynamic VHD, {self._what}", times["vhd"], times["raw"], "wimapply, raw partition"),
            Result(
                f"wim apply to a new VHD, {self._what}", times["new"], times["converted"], "wimapply, qemu-img convert"
            ),
        ]

    def captured(self) -> list[Result]:
        """Out of the VHD that was made last."""
        times = harness.in_turns(
            {"vhd": self._capture_from_vhd, "raw": self._capture_by_wimlib},
            rounds=self._scale.rounds,
            warm_up=self._scale.warm_up,
        )
        return [Result(f"wim capture, fast, {self._what}", times["vhd"], times["raw"], "wimcapture, raw partition")]

    def _apply_to_vhd(self) -> None:
        disk = self._folder / "disk.vhd"
        shutil.copy(self._prepared, disk)
        self._hvmgr("wim", "apply", self._wim, disk)

    def _apply_to_new(self) -> None:
        disk = self._fresh("new.vhd")
        self._hvmgr("wim", "apply", self._wim, disk, "--size", str(self._scale.disk), "--table", "mbr")

    def _apply_by_wimlib(self, *, convert: bool) -> None:
        volume = self._fresh("volume.raw")
        with volume.open("wb") as file:
            file.truncate(self._scale.disk)
        _run("mkntfs", "-q", "-F", "-Q", volume)
        _run("wimlib-imagex", "apply", self._wim, "1", volume)
        target = volume
        if convert:
            target = self._fresh("converted.vhd")
            _run("qemu-img", "convert", "-f", "raw", "-O", "vpc", "-o", "force_size=on", volume, target)
        _sync(target)

    def _capture_from_vhd(self) -> None:
        self._hvmgr("wim", "capture", self._folder / "disk.vhd", self._fresh("ours.wim"), "--compress", "fast")

    def _capture_by_wimlib(self) -> None:
        target = self._fresh("theirs.wim")
        _run("wimlib-imagex", "capture", self._folder / "volume.raw", target, "--compress=XPRESS", "--check")
        _sync(target)

    def _fresh(self, name: str) -> Path:
        path = self._folder / name
        path.unlink(missing_ok=True)
        return path

    def _hvmgr(self, *words: str | Path) -> None:
        environment = {
            **os.environ,
            "HVMGR_INDEX": str(self._folder / "index"),
            "HVMGR_ROOT": str(self._folder / "root"),
        }
        argv = [sys.executable, "-m", "hvmgr", "-c", "test:///default", *map(str, words)]
        harness.program(argv, environment=environment)


def _grow(tree: Path, scale: Scale) -> None:
    """Files of many sizes in folders of a hundred, half of their bytes compressible."""
    chosen, left = random.Random(1), scale.data
    for number in range(scale.files):
        folder = tree / f"folder {number // 100}"
        folder.mkdir(parents=True, exist_ok=True)
        size = min(left, 2 * chosen.randrange(1, scale.data // scale.files))
        (folder / f"file {number}").write_bytes(
            chosen.randbytes(size // 2) + bytes([number % 251]) * (size - size // 2)
        )
        left -= size


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _run(*words: str | Path) -> None:
    subprocess.run(list(map(str, words)), check=True, capture_output=True, stdin=subprocess.DEVNULL)
