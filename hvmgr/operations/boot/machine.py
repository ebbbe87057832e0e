"""A machine to try boot entries on: a disk with GRUB and the volume that a folder shows, and a VM that boots from it."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import struct
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hvmgr import errors, units
from hvmgr.host import bare_machine, grub, process
from hvmgr.model import boot_map, boot_menu
from hvmgr.model.boot_entry import BootEntry, Volume
from hvmgr.operations.boot import guest_system, layers, making, requirements, supplement
from hvmgr.storage import allocation, durable, locks

START = 1 << 20  # where the volume begins; GRUB stands in front of it
_SECTOR = 512
_WORK = ".hvmgr-test-"
_PROGRAM_S = 3600.0
_PREFIX = "(hd0,msdos1)/boot/grub"
_SERIAL = "serial --unit=0 --speed=115200\nterminal_input serial\nterminal_output serial\n"
# As the menus of distributions begin and end, as far as hvmgr's entries need it.
MENU = (
    f"{_SERIAL}if [ -s $prefix/grubenv ]; then\n\tload_env\nfi\n"
    'if [ "$next_entry" ]; then\n\tset default="$next_entry"\n\tset next_entry=\n\tsave_env next_entry\n'
    "\tset boot_once=true\nfi\nset timeout=0\n"
    "if [ -f $prefix/custom.cfg ]; then\n\tsource $prefix/custom.cfg\nfi\n"
)


@dataclass(frozen=True, slots=True)
class Told:
    """What the machine said, and whether it said what was waited for or turned itself off."""

    lines: tuple[str, ...]
    found: bool
    ended: bool


def make_disk(path: Path, tree: Path, volume_id: str, *, free: int = 128 << 20) -> None:
    """A disk file that a BIOS boots: GRUB, and an ext4 volume with everything below ``tree``, which has ``boot/grub``."""
    size = START + sum(one.lstat().st_size for one in tree.rglob("*") if one.is_file()) * 17 // 16 + free
    size = -(-size // START) * START
    allocation.make_sized(path, size, filled=False)
    arguments: list[str | Path] = ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-U", volume_id, "-d", tree]
    process.require("mke2fs")
    process.run([*arguments, "-E", f"offset={START}", path, f"{(size - START) // 1024}k"], timeout_s=_PROGRAM_S)
    with tempfile.TemporaryDirectory(prefix="hvmgr-") as work, path.open("r+b") as disk:
        code, core = grub.bios_loader(_PREFIX, Path(work))
        if _SECTOR + len(core) > START:
            raise errors.Unsupported("this GRUB is too large to stand in front of the first partition")
        entry = struct.pack(
            "<B3sB3sII", 0x80, b"\xfe\xff\xff", 0x83, b"\xfe\xff\xff", START // _SECTOR, (size - START) // _SECTOR
        )
        disk.write(code.ljust(446, b"\0") + entry.ljust(64, b"\0") + b"\x55\xaa" + core)


def uefi_folder(folder: Path, volume_id: str) -> Path:
    """A folder that a UEFI firmware boots from when it is shown as a disk; GRUB in it takes the volume's menu."""
    place = folder / "EFI" / "BOOT"
    place.mkdir(parents=True)
    script = f"search --no-floppy --fs-uuid --set=root {volume_id}\nset prefix=($root)/boot/grub\nconfigfile $prefix/grub.cfg\n"
    (place / "BOOTX64.EFI").write_bytes(grub.uefi_loader(script, folder))
    return folder


def try_out(
    entry: BootEntry, *, uefi: bool, until: str, time_s: float, memory: int, on_line: Callable[[str], None] | None
) -> Told:
    """The entry is started on a machine of its own, with copies of the VHD and its layer."""
    layers.require_settled(entry)
    layers.require_unchanged(entry)
    with _workshop(entry) as work:
        played = dataclasses.replace(entry, volume=str(uuid.uuid4()), volume_type=Volume.EXT)
        tree = work / "tree"
        _furnish(played, tree)
        disk = work / "disk"
        make_disk(disk, tree, played.volume)
        loader = uefi_folder(work / "loader", played.volume) if uefi else None
        machine = bare_machine.Machine([(disk, "raw", True)], memory, uefi=uefi, loader_folder=loader)
        return listen(bare_machine.lines(machine, work, time_s=time_s), until, on_line)


def listen(lines: Iterator[str], until: str | None, on_line: Callable[[str], None] | None = None) -> Told:
    """Everything that is said, up to the line that holds ``until`` or to the machine's end."""
    said = []
    with contextlib.closing(lines):  # type: ignore[type-var]
        for line in lines:
            said.append(line)
            if on_line is not None:
                on_line(line)
            if until and until in line:
                return Told(tuple(said), found=True, ended=False)
    return Told(tuple(said), found=False, ended=True)


@contextlib.contextmanager
def _workshop(entry: BootEntry) -> Iterator[Path]:
    """A folder beside the VHD, where its files can have a second name instead of a copy."""
    folder = Path(entry.folder)
    for left in folder.glob(f"{_WORK}*"):  # of commands that were killed
        if not locks.is_held(left / ".lock"):
            durable.remove_folder(left)
    taken = sum(one.stat().st_blocks * 512 for one in _sources(entry).values())
    free = shutil.disk_usage(folder).free
    if free < taken + START:
        raise errors.NoSpace(
            f"a copy of the disk to try it on needs {units.format_size(taken)}, and {folder} has"
            f" {units.format_size(free)} free",
            hint="free space there",
        )
    work = folder / f"{_WORK}{uuid.uuid4().hex}"
    durable.make_folder(work, mode=0o700)
    try:
        with locks.held(work / ".lock", wait_s=0, what="the machine"):
            yield work
    finally:
        durable.remove_folder(work)


def _sources(entry: BootEntry) -> dict[str, Path]:
    """What the volume holds of the entry: paths on the volume and here."""
    root = requirements.place_again(entry)
    found = {file.path: root / file.path.lstrip("/") for file in entry.files}
    for name in ("kernel", "initrd", "layer"):
        path = Path(entry.folder) / name
        if path.exists():
            found[f"{entry.inside}/{name}"] = path
    return found


def _furnish(entry: BootEntry, tree: Path) -> None:
    for inside, path in _sources(entry).items():
        target = tree / inside.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        durable.link_or_copy(path, target)
    section, archive = _played(entry)
    (tree / entry.inside.lstrip("/") / "supplement").write_bytes(archive)
    menu = tree / "boot" / "grub"
    menu.mkdir(parents=True, exist_ok=True)
    (menu / "grub.cfg").write_text(MENU)
    text = boot_menu.with_default(section, entry.id)
    (menu / "custom.cfg").write_bytes(text.encode("utf-8", "surrogateescape"))


def _played(entry: BootEntry) -> tuple[str, bytes]:
    """The entry's part of the menu and its second initramfs, for the machine's own volume and with a serial console."""
    from hvmgr import vhd

    # The last console is the one that programs write to.
    spoken = dataclasses.replace(entry, arguments=f"{entry.arguments} console=tty0 console=ttyS0".strip())
    with vhd.open_chain(entry.image) as chain:
        system = guest_system.find(chain, entry.image, entry.kernel_version)
        table = boot_map.mapper_table(boot_map.joined(chain.pieces()))
        blocks = None if entry.copied else making.block_list(chain)
        return (
            boot_menu.section(spoken, partition=system.boot.grub_name, table=blocks),
            supplement.build(spoken, system, table),
        )
