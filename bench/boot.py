"""Native boot, beside the same system on an ordinary partition: from power-on to its first word, BIOS and UEFI.

And what an entry for a large VHD takes to prepare. The machines are QEMU's, mostly without hardware acceleration: the ratios
are what counts.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import hvmgr
from bench import harness
from bench.harness import Result
from hvmgr import units, vhd
from hvmgr.faces import guest
from hvmgr.host import bare_machine
from hvmgr.model import boot_map
from hvmgr.operations.boot import machine, making
from tests.operations.boot import mini

_MARKER = "MINI boot="
_KINDS = ("fixed", "dynamic", "differencing")
_LARGE = 2040 * units.GIB


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured."""

    rounds: int = 3
    warm_up: int = 1
    firmwares: tuple[str, ...] = ("BIOS", "UEFI")


def measure(say: Callable[[str], None], scale: Scale | None = None) -> list[Result]:
    """All results of this suite."""
    scale = scale or Scale()
    with tempfile.TemporaryDirectory(prefix="hvmgr-bench-") as name, own_index(Path(name)):
        folder = Path(name)
        say("boot: the small system, and machines to boot it")
        disks = _machines(folder)
        results = []
        for firmware in scale.firmwares:
            say(f"boot: power-on to the first word, {firmware}")
            results += _starts(folder, disks, firmware, scale)
        say("boot: an entry for a large VHD")
        return [*results, _large(folder, scale)]


@contextlib.contextmanager
def own_index(folder: Path) -> Iterator[None]:
    """The host-wide index is one of the bench's own."""
    before = os.environ.get("HVMGR_INDEX")
    os.environ["HVMGR_INDEX"] = str(folder / "index")
    try:
        yield
    finally:
        if before is None:
            del os.environ["HVMGR_INDEX"]
        else:
            os.environ["HVMGR_INDEX"] = before


def _machines(folder: Path) -> dict[str, Path]:
    """A disk for each kind: the plain system, and one for each VHD with nothing else on it."""
    raw = folder / "raw"
    mini.make_raw(raw, guest.build(), folder)
    disks = {"plain": folder / "plain.disk"}
    _plain(folder / "root", disks["plain"])
    for kind in _KINDS:
        tree = folder / kind
        path = made_vhd(tree, raw, kind)
        menu = tree / "boot" / "grub"
        menu.mkdir(parents=True)
        (menu / "grub.cfg").write_text(machine.MENU)
        with hvmgr.Host.open(root=folder / "homes") as host:
            entries = host.boot_menu(tree / "boot")
            wish = hvmgr.BootOptions(volume=tree, volume_id=mini.VOLUME, volume_type="ext4")
            entries.choose(entries.add(path, wish).id)
        disks[kind] = folder / f"{kind}.disk"
        machine.make_disk(disks[kind], tree, mini.VOLUME)
    return disks


def _plain(root: Path, disk: Path) -> None:
    """The same system, installed on the volume itself."""
    version = next((root / "lib" / "modules").iterdir()).name
    menu = root / "boot" / "grub"
    menu.mkdir()
    lines = f"linux /boot/vmlinuz-{version} root=UUID={mini.VOLUME} ro {mini.ARGUMENTS}\ninitrd /boot/initrd.img-{version}\n"
    (menu / "grub.cfg").write_text(f"set timeout=0\nmenuentry plain {{\n{lines}}}\n")
    machine.make_disk(disk, root, mini.VOLUME)


def made_vhd(tree: Path, raw: Path, kind: str) -> Path:
    """``VHD/os.vhd`` below the tree shows the disk."""
    (tree / "VHD").mkdir(parents=True)
    path = tree / "VHD" / "os.vhd"
    if kind != "differencing":
        mini.make_vhd(path, raw, vhd.Kind(kind))
        return path
    mini.make_vhd(tree / "VHD" / "base.vhd", raw, vhd.Kind.DYNAMIC)
    vhd.create(path, parent=tree / "VHD" / "base.vhd")
    return path


def _starts(folder: Path, disks: dict[str, Path], firmware: str, scale: Scale) -> list[Result]:
    loader = None
    if firmware == "UEFI":
        loader = machine.uefi_folder(folder / "loader", mini.VOLUME)
    times = harness.in_turns(
        {name: partial(_start, folder, disk, loader) for name, disk in disks.items()},
        rounds=scale.rounds,
        warm_up=scale.warm_up,
    )
    return [Result(f"start, {kind}, {firmware}", times[kind], times["plain"], "plain partition") for kind in _KINDS]


def _start(folder: Path, disk: Path, loader: Path | None) -> None:
    # With UEFI the loader's disk comes first, as the removable one that it is.
    own = bare_machine.Machine([(disk, "raw", False)], 512 << 20, uefi=loader is not None, loader_folder=loader)
    told = machine.listen(bare_machine.lines(own, folder, time_s=600), _MARKER)
    if not told.found:
        raise SystemExit(f"bench: the machine did not start: {told.lines[-5:]}")


def _large(folder: Path, scale: Scale) -> Result:
    """Table and block list of a disk of 2040 GiB that holds one small system."""
    path = folder / "large.vhd"
    vhd.create(path, _LARGE)
    with vhd.RawSource(folder / "raw") as source, vhd.open_chain(path, writable=True) as disk:
        data = bytearray(source.size)
        source.read_into(0, memoryview(data))
        disk.write(0, data)
        disk.flush()
    times = harness.in_turns({"prepare": partial(_prepare, path)}, rounds=scale.rounds)
    return Result("prepare, 2040 GiB disk", times["prepare"], limit=1.0)


def _prepare(path: Path) -> None:
    with vhd.open_chain(path) as chain:
        boot_map.mapper_table(boot_map.joined(chain.pieces()))
        making.block_list(chain)
