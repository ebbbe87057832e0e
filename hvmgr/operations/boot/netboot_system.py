"""The system that a machine starts over the network: a kernel, and an initramfs that knows disks and network cards, and no more.

What it does is in ``share/netboot``. It holds a static busybox, programs of this host with their libraries, the drivers of the
kernel, and the boot loaders that it writes.
"""

from __future__ import annotations

import gzip
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from hvmgr import errors, settings, units
from hvmgr.host import formatting, grub, mtools
from hvmgr.model import boot_menu
from hvmgr.model.disk_layout import FileSystem, Role, Volume
from hvmgr.storage import allocation, initramfs, kernel_modules, kernels
from hvmgr.storage.kernels import Kernel

_PROGRAMS = ("sfdisk", "mke2fs", "blkdiscard")
# Which drivers it has, by their places in a distribution's tree; a folder without places holds what it should.
_DRIVERS = tuple(
    f"kernel/{one}"
    for one in [
        "drivers/net/ethernet/",
        "drivers/net/phy/",
        "drivers/net/mdio/",
        "drivers/net/usb/",
        "drivers/net/virtio_net",
        "drivers/net/vmxnet3/",
        "drivers/net/hyperv/",
        "drivers/net/xen-netfront",
        "drivers/ata/",
        "drivers/nvme/host/",
        "drivers/scsi/",
        "drivers/message/fusion/",
        "drivers/block/virtio_blk",
        "drivers/block/xen-blkfront",
        "drivers/virtio/",
        "drivers/hv/",
        "drivers/mmc/",
        "drivers/usb/host/",
        "drivers/usb/storage/",
        "drivers/hid/",
        "drivers/pci/controller/",
        "drivers/input/serio/",
        "fs/ext4/",
        "arch/x86/crypto/crc32",
        "crypto/crc32c",
    ]
)
_FIRMWARE = Path("/lib/firmware")
_CORE_SECTOR = 40  # as in share/netboot/layout, like the size of the EFI system partition
_ESP = 36 * units.MIB
_PREFIX = "(,gpt3)/boot/grub"
# A UEFI firmware says where the loader came from: the menu is on the same disk.
_SEARCH = (
    'regexp --set=1:hvmgr_disk "^\\(([^,]*)" "$cmdpath"\n'
    "set prefix=($hvmgr_disk,gpt3)/boot/grub\nset root=$hvmgr_disk,gpt3\nconfigfile $prefix/grub.cfg\n"
)
# What iPXE starts under UEFI where the disk comes first: of the loaders that disks hold the first that is there. It comes back
# where there is none. What hvmgr installs is the last of these: others may have put a mere fallback there.
_LOADERS = ("*/shimx64.efi", "*/grubx64.efi", "Microsoft/Boot/bootmgfw.efi", "BOOT/BOOTX64.EFI")
_START = (
    f"eval 'for one in {' '.join(f'(hd*,*)/EFI/{one}' for one in _LOADERS)}; do"
    ' if [ -f "$one" ]; then regexp --set=1:root "^\\(([^)]*)" "$one"; if chainloader "$one"; then boot; fi; fi; done\'\n'
    "exit\n"
)
_FOLDER, _PROGRAM, _FILE, _NODE = 0o040755, 0o100755, 0o100644, 0o020600


def kernel(file: Path | None, modules: Path | None) -> Kernel:
    """The kernel that was asked for, or the newest of this host that has its modules."""
    if file is not None and modules is not None:
        if not file.is_file():
            raise errors.NotFound(f"there is no kernel {file}")
        kernel_modules.of_folder(modules)  # NotFound where it is none
        return Kernel(file, modules)
    found = kernels.find(("ext4",))
    if found is None:
        raise errors.NotFound(
            "this host has no kernel in /boot with modules in /lib/modules, for machines to start",
            hint="name one with --kernel vmlinuz-V --modules lib/modules/V, or install one, on Debian: linux-image-amd64",
        )
    return found


def starter() -> bytes:
    """The program for UEFI that starts the machine's disk, and comes back if there is nothing to start."""
    with tempfile.TemporaryDirectory(prefix="hvmgr-") as name:
        return grub.uefi_loader(_START, Path(name), ("fat", "chain", "eval", "minicmd"))


def initrd(chosen: Kernel, notice: Callable[[str], None]) -> bytes:
    """The initramfs, compressed; what it lacks is said."""
    return gzip.compress(initramfs.pack(_contents(chosen, notice)), 6, mtime=0)


def _contents(chosen: Kernel, notice: Callable[[str], None]) -> Iterator[tuple[str, int, bytes]]:
    modules = f"lib/modules/{chosen.modules.name}"
    for folder in ("bin", "dev", "etc", "hvmgr", "hvmgr/bin", "hvmgr/lib", "lib", "lib/modules", modules):
        yield folder, _FOLDER, b""
    yield "dev/console", _NODE, b""
    yield "bin/busybox", _PROGRAM, initramfs.installed_busybox()
    shipped = settings.netboot_folder()
    yield "init", _PROGRAM, (shipped / "init").read_bytes()
    yield "hvmgr/dhcp", _PROGRAM, (shipped / "dhcp").read_bytes()
    for name in ("functions", "devices", "native", "expand", "layout", "grub.cfg"):
        yield f"hvmgr/{name}", _FILE, (shipped / name).read_bytes()
    yield "etc/mke2fs.conf", _FILE, (shipped / "mke2fs.conf").read_bytes()
    yield "hvmgr/grubenv", _FILE, boot_menu.environment(None, "next_entry", None)
    yield from initramfs.programs(_PROGRAMS, "hvmgr")
    yield from _loaders()
    yield from _drivers(chosen, modules, notice)


def _drivers(chosen: Kernel, folder: str, notice: Callable[[str], None]) -> Iterator[tuple[str, int, bytes]]:
    modules = kernel_modules.of_folder(chosen.modules)
    found = modules.chosen(lambda path: "/" not in path or path.startswith(_DRIVERS))
    for name, data in kernel_modules.packed(found, folder):
        yield name, _FILE, data
    known, missing = set(), []
    for file in sorted({one for module in found for one in module.firmware}):
        blob = _firmware(file)
        if blob is None:
            missing.append(file)
            continue
        for parent in reversed(Path("lib/firmware", file).parents[:-2]):
            if parent not in known:
                known.add(parent)
                yield str(parent), _FOLDER, b""
        yield f"lib/firmware/{file}", _FILE, blob
    if missing:
        some = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
        notice(
            f"{len(missing)} firmware files that drivers may ask for are not in {_FIRMWARE} ({some}): "
            "a network card or disk that needs one does not work"
        )


def _firmware(file: str) -> bytes | None:
    """A firmware file as a driver takes it, however the distribution keeps it."""
    for suffix in ("", ".zst", ".xz"):
        source = _FIRMWARE / (file + suffix)
        if source.is_file():
            return kernel_modules.plain(source.name if suffix else "", source.read_bytes())
    return None


def _loaders() -> Iterator[tuple[str, int, bytes]]:
    """GRUB for a BIOS in two parts, and an EFI system partition with GRUB."""
    with tempfile.TemporaryDirectory(prefix="hvmgr-") as name:
        work = Path(name)
        code, core = grub.at_sector(*grub.bios_loader(_PREFIX, work), _CORE_SECTOR)
        yield "hvmgr/boot", _FILE, code
        yield "hvmgr/core", _FILE, core
        esp = work / "esp"
        allocation.make_sized(esp, _ESP, filled=False)
        formatting.make(esp, Volume(2, Role.ESP, 1 * units.MIB, _ESP, FileSystem.FAT32))
        loader = work / "loader"
        loader.write_bytes(grub.uefi_loader(_SEARCH, work))
        for folder in ("/EFI", "/EFI/BOOT"):
            mtools.make_folder(esp, folder)
        mtools.write(esp, "/EFI/BOOT/BOOTX64.EFI", str(loader))
        yield "hvmgr/esp.gz", _FILE, gzip.compress(esp.read_bytes(), 6, mtime=0)
