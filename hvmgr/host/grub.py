"""GRUB's own programs: a boot loader for a disk in a file, BIOS or UEFI, without installing anything on this host."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

from hvmgr import errors
from hvmgr.host import process

_FOLDER = Path("/usr/lib/grub")
_MODULES = [
    *(
        "normal",
        "configfile",
        "linux",
        "search",
        "search_fs_uuid",
        "part_msdos",
        "part_gpt",
        "ext2",
        "ntfs",
        "loopback",
    ),
    *("serial", "terminal", "echo", "test", "loadenv", "true", "regexp"),
]
_BIOS, _UEFI = "i386-pc", "x86_64-efi"
_PACKAGES = {_BIOS: "grub-pc-bin", _UEFI: "grub-efi-amd64-bin"}
_SECTOR = 512
_PROGRAM_S = 60.0


def bios_loader(prefix: str, work: Path) -> tuple[bytes, bytes]:
    """The code of a boot sector, and what stands behind it; ``prefix`` is the folder with ``grub.cfg`` as GRUB names it."""
    image = _image(_BIOS, ["biosdisk", *_MODULES], prefix, work)
    return (_FOLDER / _BIOS / "boot.img").read_bytes()[:440], image


def at_sector(code: bytes, core: bytes, sector: int) -> tuple[bytes, bytes]:
    """The two parts of ``bios_loader``, for a core that stands at a sector of the disk, not at the one behind the boot sector.

    Each says where the next sector is: boot.img at 0x5c, the first sector of the core in its last 12 bytes (GRUB's boot.S,
    diskboot.S).
    """
    placed, first = bytearray(code), bytearray(core)
    struct.pack_into("<Q", placed, 0x5C, sector)
    struct.pack_into("<Q", first, _SECTOR - 12, sector + 1)
    return bytes(placed), bytes(first)


def uefi_loader(script: str, work: Path, more: Sequence[str] = ()) -> bytes:
    """A program for UEFI that begins with this script, with ``more`` modules."""
    config = work / "early.cfg"
    config.write_text(script)
    return _image(_UEFI, [*_MODULES, *more], "/boot/grub", work, config)


def _image(target: str, modules: list[str], prefix: str, work: Path, config: Path | None = None) -> bytes:
    process.require("grub-mkimage")
    if not (_FOLDER / target / "moddep.lst").exists():
        raise errors.Unsupported(
            f"GRUB's parts for {target} are not installed",
            hint=f"install them, on Debian with: apt install {_PACKAGES[target]}",
        )
    made = work / f"grub-{target}"
    early: list[str | Path] = [] if config is None else ["-c", config]
    process.run(["grub-mkimage", "-O", target, "-p", prefix, "-o", made, *early, *modules], timeout_s=_PROGRAM_S)
    return made.read_bytes()
