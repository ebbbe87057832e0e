"""A whole Debian that boots natively out of VHDs, beside the same one on an ordinary partition: power-on to its own word.

Each case is a machine with an ext4 or NTFS volume, a BIOS or UEFI, and one VHD. Its system starts twice: it writes, goes down so that
the volume is clean, and finds what it wrote. Then what the layer holds is dropped, or merged into the VHD, which is the disk of a VM at
last. Whatever is not so ends the bench.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import hvmgr
from bench import boot, debian
from bench.harness import Result
from hvmgr import vhd
from hvmgr.faces import console, stage
from hvmgr.host import bare_machine, grub
from hvmgr.model.disk_layout import FileSystem, LayoutWish, TableKind
from hvmgr.model.image_format import ImageFormat
from hvmgr.model.specification import Acceleration, DiskSpecification, Specification
from hvmgr.model.wim_options import WimApplyOptions
from hvmgr.operations.boot import guest_system, machine
from hvmgr.storage import durable, ext
from tests.operations.boot import mini, physical

_START_S = 1800.0
_MEMORY = 1 << 30
_SERIAL = "68766D67724E5446"  # of an NTFS volume
_COUNT = "/var/lib/count/count"


@dataclass(frozen=True, slots=True)
class Case:
    """A machine: the kind of its VHD, its volume's file system, its firmware; what becomes of the layer at last."""

    kind: str
    volume: str
    firmware: str
    end: str = ""
    initramfs: str = "initramfs-tools"

    def __str__(self) -> str:
        return f"{self.kind} on {self.volume}, {self.firmware}, {self.initramfs}"


CASES = (
    Case("dynamic", "ext4", "BIOS", "merge"),
    Case("fixed", "NTFS", "UEFI"),
    Case("differencing", "ext4", "UEFI", "revert"),
    Case("dynamic", "NTFS", "BIOS"),
    Case("fixed", "ext4", "BIOS", initramfs="dracut"),
)


def measure(say: Callable[[str], None], cases: Iterable[Case] = CASES) -> list[Result]:
    """All results of this suite."""
    cases = list(cases)
    with tempfile.TemporaryDirectory(prefix="hvmgr-bench-") as name, boot.own_index(Path(name)):
        folder = Path(name)
        say("native: a Debian (made once, which takes minutes)")
        systems = {name: _system(folder, name) for name in sorted({case.initramfs for case in cases})}
        results, seconds = [], dict[tuple[str, str], float]()
        for case in cases:
            raw, like = systems[case.initramfs], (case.firmware, case.initramfs)
            if like not in seconds:
                say(f"native: on a plain partition, {', '.join(like)}")
                seconds[like], _ = _start(folder, _plain(folder, raw), case.firmware, "MINI boot=")
            say(f"native: {case}")
            results.append(Result(f"Debian, {case}", _case(folder / case.kind, case, raw), seconds[like], "plain"))
            shutil.rmtree(folder / case.kind)
        return results


def _system(folder: Path, initramfs: str) -> Path:
    """The disk: one partition with the root, from the archive."""
    raw = folder / f"{initramfs}.raw"
    with hvmgr.Host.open("test:///default", root=folder / "homes") as host:
        layout = LayoutWish(FileSystem.EXT4, TableKind.MBR, "root")
        host.wims.apply(debian.root(initramfs), raw, WimApplyOptions(rootfs=True, size=debian.SIZE, layout=layout))
    return raw


def _plain(folder: Path, raw: Path) -> Path:
    """The same disk with GRUB in front of its partition: a machine on which the system is installed as ever."""
    disk = folder / "plain.disk"
    disk.unlink(missing_ok=True)
    durable.copy_file(raw, disk)
    with vhd.RawSource(raw) as source:
        system = guest_system.find(source, "the system")
    menu = folder / "grub.cfg"
    words = f"root=LABEL=root ro {debian.ARGUMENTS}"
    menu.write_text(f"set timeout=0\nmenuentry plain {{\nlinux {system.kernel} {words}\ninitrd {system.initrd}\n}}\n")
    commands = f"mkdir /boot/grub\ncd /boot/grub\nwrite {menu} grub.cfg\n"
    where = f"{disk}?offset={machine.START}"
    subprocess.run(
        ["debugfs", "-w", "-f", "-", where],
        input=commands.encode(),
        check=True,
        capture_output=True,
        env=mini.WITH_SBIN,
    )
    _put_loader(disk, folder)
    return disk


def _put_loader(disk: Path, work: Path) -> None:
    code, core = grub.bios_loader("(hd0,msdos1)/boot/grub", work)
    with disk.open("r+b") as file:
        file.write(code)
        file.seek(512)
        file.write(core)


def _case(folder: Path, case: Case, raw: Path) -> float:
    """The seconds from power-on to the word of the first start."""
    tree = folder / "tree"
    path = boot.made_vhd(tree, raw, case.kind)
    menu = tree / "boot" / "grub"
    menu.mkdir(parents=True)
    (menu / "grub.cfg").write_text(machine.MENU)
    volume_id = _SERIAL if case.volume == "NTFS" else mini.VOLUME
    with hvmgr.Host.open("test:///default", root=folder / "homes") as host:
        entries = host.boot_menu(tree / "boot")
        wish = hvmgr.BootOptions(volume=tree, volume_id=volume_id, volume_type=case.volume.lower())
        entries.choose(entries.add(path, wish).id)
        disk = folder / "disk"
        if case.volume == "NTFS":
            _ntfs_disk(host, disk, tree, folder)
        else:
            machine.make_disk(disk, tree, volume_id)
        seconds, _ = _start(folder, disk, case.firmware, "MINI boot=1 root=/dev/mapper/hvmgr-disk1", volume_id)
        _require(_is_clean(disk, case, folder), f"{case}: the volume is not clean")
        _start(folder, disk, case.firmware, "MINI boot=2 root=/dev/mapper/hvmgr-disk1", volume_id)
        _require(_is_clean(disk, case, folder), f"{case}: the volume is not clean after the second start")
        if case.end:
            _take_back(disk, "/VHD/os.vhd.boot/layer", Path(f"{path}.boot/layer"))
            held = entries.revert(path) if case.end == "revert" else entries.merge(path)
            _require(held > 20_000_000, f"{case}: the layer holds {held} bytes")
            with vhd.open_chain(path) as chain:
                found = ext.FileSystem(chain, machine.START, "the system").read(_COUNT)
            _require(
                found == (b"0\n" if case.end == "revert" else b"2\n"), f"{case}: after {case.end} it counts {found!r}"
            )
    if case.end == "merge":
        _as_vm(path)
    return seconds


def _start(folder: Path, disk: Path, firmware: str, word: str, volume_id: str | None = None) -> tuple[float, str]:
    """The machine runs until it turns itself off: when it said the word, and all that it said."""
    loader = None
    if firmware == "UEFI":
        shutil.rmtree(folder / "loader", ignore_errors=True)
        loader = machine.uefi_folder(folder / "loader", volume_id or _plain_id(disk))
    own = bare_machine.Machine([(disk, "raw", True)], _MEMORY, uefi=loader is not None, loader_folder=loader)
    begin, seconds, said = time.monotonic(), None, []
    for line in bare_machine.lines(own, folder, time_s=_START_S):
        said.append(line)
        if word in line and seconds is None:
            seconds = time.monotonic() - begin
    _require(seconds is not None and not any("MINI lost" in line for line in said), f"the machine said {said[-20:]}")
    assert seconds is not None
    return seconds, "\n".join(said)


def _plain_id(disk: Path) -> str:
    told = subprocess.run(
        ["dumpe2fs", "-h", f"{disk}?offset={machine.START}"], check=True, capture_output=True, text=True, env=mini.WITH_SBIN
    ).stdout  # fmt: skip
    return next(line.split()[-1] for line in told.splitlines() if line.startswith("Filesystem UUID"))


def _ntfs_disk(host: hvmgr.Host, disk: Path, tree: Path, folder: Path) -> None:
    """A disk with an NTFS volume that holds the tree, as Windows would have put it there, and GRUB for a BIOS."""
    host.wims.capture(tree, folder / "tree.wim")
    size = sum(one.stat().st_size for one in tree.rglob("*") if one.is_file()) + (256 << 20)
    made = folder / "disk.raw"
    layout = LayoutWish(FileSystem.NTFS, TableKind.MBR)
    host.wims.apply(folder / "tree.wim", made, WimApplyOptions(size=-(-size >> 20) << 20, layout=layout))
    made.rename(disk)
    (folder / "tree.wim").unlink()
    with disk.open("r+b") as file:  # its serial number, in the boot sector and the copy of that behind the volume
        file.seek(machine.START + 40)
        (sectors,) = struct.unpack("<Q", file.read(8))
        for place in (machine.START, machine.START + sectors * 512):
            file.seek(place + 72)
            file.write(bytes.fromhex(_SERIAL)[::-1])
    _put_loader(disk, folder)


def _is_clean(disk: Path, case: Case, folder: Path) -> bool:
    if case.volume != "NTFS":
        return physical.is_clean(disk, machine.START)
    volume = folder / "volume"
    subprocess.run(
        ["dd", f"if={disk}", f"of={volume}", "bs=1M", "skip=1", "conv=sparse"], check=True, capture_output=True
    )
    told = subprocess.run(
        ["ntfsfix", "--no-action", volume], check=False, capture_output=True, text=True, env=mini.WITH_SBIN
    )
    volume.unlink()
    return told.returncode == 0 and "unclean" not in told.stdout + told.stderr


def _take_back(disk: Path, path: str, target: Path) -> None:
    command = ["debugfs", "-R", f'dump "{path}" {target}', f"{disk}?offset={machine.START}"]
    subprocess.run(command, check=True, capture_output=True, env=mini.WITH_SBIN)


def _as_vm(path: Path) -> None:
    """The VHD is the disk of a VM of hvmgr's; the system in it goes on counting."""
    with vhd.open_chain(path) as chain:
        system = guest_system.find(chain, str(path))
        kernel, initrd = system.kernel_files()
    with stage.opened() as place, hvmgr.Host.open() as host:
        (place.folder / "kernel").write_bytes(kernel)
        (place.folder / "initrd").write_bytes(initrd)
        own = place.folder / "os.vhd"
        durable.copy_file(path, own)
        spec = Specification(
            name="debian", template="generation1", memory=_MEMORY, accel=Acceleration.TCG, networks=(),
            disks=(DiskSpecification(path=own, in_place=True, format=ImageFormat.VHD),),
            kernel=place.folder / "kernel", initrd=place.folder / "initrd",
            cmdline=f"root=LABEL=root ro {debian.ARGUMENTS}",
        )  # fmt: skip
        vm = host.create_vm(spec)
        vm.start()
        domain = host.connection.find_domain(vm.id)
        with console.Console(domain.serial_path()) as screen:
            said = screen.wait_for("MINI boot=", _START_S)
        _require("MINI boot=3" in said, f"the VM said {said}")


def _require(is_so: object, sentence: str) -> None:
    if not is_so:
        raise SystemExit(f"bench: {sentence}")
