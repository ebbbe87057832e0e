"""Exports, beside the tools that copy or convert the same images; all of them until the data is on disk."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import hvmgr
from bench import harness
from bench.harness import Result
from bench.snapshots import MEMORY, Bench, prepared
from hvmgr import VM, units
from hvmgr.model.manifest import Extent
from hvmgr.model.specification import Acceleration


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured; the tests take next to nothing."""

    rounds: int = 3
    warm_up: int = 1
    disk: int = 4 * units.GIB
    data: int = 1600 * units.MIB
    tree: int = 10
    chain: int = 20
    image_data: int = 24 * units.MIB  # of each image of the tree and of the chain


# sha256sum itself may know nothing of SHA instructions.
_OPENSSL = shutil.which("openssl")
_DIGEST = ["openssl", "dgst", "-sha256"] if _OPENSSL else ["sha256sum"]
_HASHING = "openssl dgst -sha256" if _OPENSSL else "sha256sum"
_UNHASHED = hvmgr.ExportOptions(checksums=False)


def measure(say: Callable[[str], None], scale: Scale | None = None) -> list[Result]:
    """All results of this suite."""
    scale = scale or Scale()
    with prepared() as bench:
        results: list[Result] = []
        for part in (_disk, _tree, _flat, _shared):
            say(f"exchange: export, {part.__name__.strip('_')}")
            results += part(bench, scale)
    return results


def _disk(bench: Bench, scale: Scale) -> list[Result]:
    """One disk that is a third full."""
    vm = _make(bench, "full", scale, bench.folder)
    path = next(iter(vm.now().disks.values()))
    found = _in_turns(
        bench.folder,
        scale,
        {
            "export": vm.export,
            "unhashed": lambda to: vm.export(to, _UNHASHED),
            "cp": lambda to: _cp(to, path),
            "convert": lambda to: _convert(to, path, "raw"),
            "both": lambda to: _cp_and_hash(to, path),
        },
    )
    what = f"export, {units.format_size(scale.data)} in {units.format_size(scale.disk)}"
    best = min(found["cp"], found["convert"])
    name = "cp --sparse=always" if best == found["cp"] else "qemu-img convert -W -m 16"
    return [
        Result(what, found["export"], found["both"], f"cp and {_HASHING} at once", aim=1.1),
        Result(f"{what}, no checksums", found["unhashed"], best, name, aim=1.1),
    ]


def _tree(bench: Bench, scale: Scale) -> list[Result]:
    """A line of snapshots, each with data of its own."""
    vm = _with_snapshots(bench, "tree", scale, scale.tree)
    images = [image.path for image in vm.tree().images.values()]
    found = _in_turns(
        bench.folder,
        scale,
        {
            "export": vm.export,
            "unhashed": lambda to: vm.export(to, _UNHASHED),
            "cp": lambda to: _cp(to, *images),
            "both": lambda to: _cp_and_hash(to, *images),
        },
    )
    what = f"export of {scale.tree} snapshots"
    return [
        Result(what, found["export"], found["both"], f"cp and {_HASHING} at once", aim=1.1),
        Result(f"{what}, no checksums", found["unhashed"], found["cp"], "cp --sparse=always", aim=1.1),
    ]


def _flat(bench: Bench, scale: Scale) -> list[Result]:
    """The end of a long chain as one image."""
    vm = _with_snapshots(bench, "chain", scale, scale.chain)
    path = next(iter(vm.now().disks.values()))

    def convert(to: Path, *, hashed: bool) -> None:
        _convert(to, path, "qcow2")
        if hashed:  # not before: the image's tables change until the end
            harness.program([*_DIGEST, str(to / "disk")])

    flat = hvmgr.ExportOptions(snapshots=Extent.NONE)
    found = _in_turns(
        bench.folder,
        scale,
        {
            "export": lambda to: vm.export(to, flat),
            "unhashed": lambda to: vm.export(to, dataclasses.replace(flat, checksums=False)),
            "convert": lambda to: convert(to, hashed=False),
            "both": lambda to: convert(to, hashed=True),
        },
    )
    what = f"export of the end of {scale.chain}, flattened"
    other = "qemu-img convert -W -m 16"
    return [
        Result(what, found["export"], found["both"], f"{other}, then {_HASHING}", aim=1.1),
        Result(f"{what}, no checksums", found["unhashed"], found["convert"], other, aim=1.1),
    ]


def _shared(bench: Bench, scale: Scale) -> list[Result]:
    """On a file system that shares blocks; without one, nothing is measured."""
    if shutil.which("mkfs.xfs") is None:
        return []
    with _xfs(bench.folder / "xfs", 2 * scale.disk + 400 * units.MIB) as folder:
        vm = _make(bench, "shared", scale, folder)
        small = _make(bench, "little", dataclasses.replace(scale, data=scale.data // 16), folder)
        path = next(iter(vm.now().disks.values()))
        found = _in_turns(
            folder,
            scale,
            {
                "export": vm.export,
                "unhashed": lambda to: vm.export(to, _UNHASHED),
                "small": lambda to: small.export(to, _UNHASHED),
                "cp": lambda to: _cp(to, path, how="--reflink=always"),
                "both": lambda to: _cp_and_hash(to, path, how="--reflink=always"),
            },
        )
        for one in (vm, small):
            one.delete(with_disks=True)
    what, other = f"export on XFS, {units.format_size(scale.data)}", "cp --reflink=always"
    return [
        Result(what, found["export"], found["both"], f"{other} and {_HASHING} at once", aim=1.1),
        Result(f"{what}, no checksums", found["unhashed"], found["cp"], other),
        Result(f"{what}, no checksums", found["unhashed"], found["small"], "a sixteenth of the data", aim=1.5),
    ]


# --- what takes turns -------------------------------------------------------------------------------------------------


def _in_turns(folder: Path, scale: Scale, acts: dict[str, Callable[[Path], object]]) -> dict[str, float]:
    """Each act into a folder of its own, which goes before the next one; removing is not measured."""
    times: dict[str, list[float]] = {name: [] for name in acts}
    numbers = itertools.count()
    for number in range(scale.warm_up + scale.rounds):
        for name, act in acts.items():
            to = folder / f"to{next(numbers)}"
            to.mkdir()
            os.sync()
            (seconds,) = harness.in_turns({name: lambda act=act, to=to: act(to)}, rounds=1, warm_up=0).values()  # type: ignore[misc]
            shutil.rmtree(to)
            if number >= scale.warm_up:
                times[name].append(seconds)
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def _cp(to: Path, *paths: str, how: str = "--sparse=always") -> None:
    harness.program(["cp", how, *paths, str(to)])
    harness.program(["sync", *(str(path) for path in to.iterdir())])


def _cp_and_hash(to: Path, *paths: str, how: str = "--sparse=always") -> None:
    """The fastest that two usual programs can do together."""
    with subprocess.Popen([*_DIGEST, *paths], stdout=subprocess.DEVNULL) as hashing:
        _cp(to, *paths, how=how)
    if hashing.returncode != 0:
        raise SystemExit(f"bench: {_HASHING} failed")


def _convert(to: Path, path: str, fmt: str) -> None:
    harness.program(["qemu-img", "convert", "-W", "-m", "16", "-f", fmt, "-O", fmt, path, str(to / "disk")])
    harness.program(["sync", str(to / "disk")])


# --- what is exported -------------------------------------------------------------------------------------------------


def _make(bench: Bench, name: str, scale: Scale, folder: Path) -> VM:
    """A VM in ``folder`` on a raw disk with random data in sixteen places."""
    source = folder / f"{name}.raw"
    pieces, piece = 16, os.urandom(units.MIB)
    with source.open("wb") as file:
        file.truncate(scale.disk)
        for number in range(pieces):
            file.seek(number * (scale.disk // pieces))
            for _ in range(max(1, scale.data // pieces // units.MIB)):
                file.write(piece)
    vm = bench.host.create_vm(_specification(name, hvmgr.DiskSpecification(path=source), home=folder / f"home-{name}"))
    source.unlink()
    return vm


def _with_snapshots(bench: Bench, name: str, scale: Scale, count: int) -> VM:
    vm = bench.host.create_vm(_specification(name, hvmgr.DiskSpecification(size=scale.disk)))
    megabytes = scale.disk // units.MIB
    for number in range(count):
        path = next(iter(vm.now().disks.values()))
        places = [(number * 131 + 37 * index) % megabytes for index in range(scale.image_data // units.MIB)]
        words = [word for place in places for word in ("-c", f"write -q -P {number + 1} {place}M 1M")]
        harness.program(["qemu-io", "-f", "qcow2", *words, path])
        vm.create_snapshot()
    return vm


def _specification(name: str, disk: hvmgr.DiskSpecification, *, home: Path | None = None) -> hvmgr.Specification:
    return hvmgr.Specification(
        name,
        template="generation1",
        memory=MEMORY,
        disks=(disk,),
        networks=(),
        accel=Acceleration.TCG,
        home=home,
    )


@contextlib.contextmanager
def _xfs(folder: Path, size: int) -> Iterator[Path]:
    image = folder.with_suffix(".img")
    with image.open("wb") as file:
        file.truncate(max(size, 320 * units.MIB))
    folder.mkdir()
    harness.program(["mkfs.xfs", "-q", "-m", "reflink=1", str(image)])
    harness.program(["mount", "-o", "loop", str(image), str(folder)])
    folder.chmod(0o711)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
        image.unlink()
