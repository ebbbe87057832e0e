"""The counting guest of the demo and the tests: Debian's cloud kernel and a static busybox, packed by ourselves.

Ten times a second it counts in memory and on each of its disks, reads the disks back past every cache and says on
``ttyS0`` whether memory and disks still belong together; ``guest_init.sh`` shows the lines, ``console`` reads them.

- Memory starts from what the first disk held, which the guest says at boot: after a cold boot ``boot disk=`` is the
  counter that lies in the disk's bytes.
- Each tick finds on the disk what the tick before wrote: ``memory == disk + 1``. A memory that comes back over a disk
  of another moment, two ticks away or more, says MISMATCH in its first or second tick and from then on, until it
  boots anew.
- The disk is written after the tick is said. A snapshot whose disk holds D therefore goes on, when its memory is
  restored, with tick D + 1, or with D + 2 when it was taken between the word and the write.
- The power button (``vm stop``, ACPI) turns it off; a disk has to be longer than 1 MiB. It has a driver for virtio,
  virtio-scsi, IDE and NVMe disks; Debian's cloud kernel has none for AHCI (``bus='sata'``).
"""

from __future__ import annotations

import hashlib
import lzma
import platform
import re
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvmgr import errors, settings, units
from hvmgr.host import process
from hvmgr.storage import durable, locks
from hvmgr.storage.initramfs import BUSYBOX
from hvmgr.storage.initramfs import is_static as is_static  # noqa: PLC0414 - part of what this module gives
from hvmgr.storage.initramfs import pack as pack  # noqa: PLC0414

# Boots in two seconds under TCG, where the kernel's own tests, code patching and mitigations take another one.
# Serial output is left to the counter: nothing may break its lines.
COMMAND_LINE = (
    "console=ttyS0 quiet mitigations=off nokaslr noreplace-smp cryptomgr.notests lsm= audit=0"
    " no_timer_check tsc=reliable nowatchdog"
)
MEMORY_SIZE = 96 * units.MIB  # 80 MiB is the least with which it boots

COUNTER_OFFSET = 1 * units.MIB
COUNTER_SIZE = 1024  # two sectors that are written by turns
BLOCKS_OFFSET = COUNTER_OFFSET + 64 * units.KIB  # of hvmgr.check
BLOCK_SIZE = 64 * units.KIB
_SECTOR_SIZE = 512
_COUNTER = re.compile(rb"HVMGR-COUNT (\d{6})\n\0*")

KERNEL_PACKAGE = "linux-image-cloud-amd64"
_INIT = Path(__file__).with_name("guest_init.sh")
# What the init script loads as one; a module that the kernel has built in, or not at all, is left out.
_MODULES = {
    "virtio": ("virtio_pci", "virtio_blk"),
    "sd": ("sd_mod", "virtio_scsi", "ata_piix", "ahci"),
    "power": ("evdev", "button"),
    "port": ("virtio_console",),  # not loaded by the init script: for a guest that has an agent besides
}
# What is kept beside the guest besides, for guests that boot from a file on a volume (native boot of VHDs), machines that write
# file systems, and machines that start over the network.
_KEPT = ("virtio_pci", "virtio_blk", "virtio_net", "ext4", "loop", "dm_mod", "dm_snapshot", "dm_zero", "xfs", "btrfs", "exfat",
         "crc32c_generic", "xxhash_generic", "sha256_generic", "blake2b_generic")  # fmt: skip
_DOWNLOAD_S = 600.0
_PROGRAM_S = 120.0


@dataclass(frozen=True, slots=True)
class Guest:
    """What a domain boots directly; QEMU's user has to be able to read both files."""

    kernel: Path
    initrd: Path
    command_line: str = COMMAND_LINE
    memory_size: int = MEMORY_SIZE

    @property
    def modules(self) -> Path:
        """A folder as ``/lib/modules`` of such a kernel, with the modules of virtio, ext4, XFS, Btrfs, exFAT, loop and device mapper."""
        return self.kernel.parent / "modules"


def build(folder: Path | None = None) -> Guest:
    """The guest in ``folder`` (by default in the cache), made there if need be: 30 MB are then downloaded.

    What was made once is kept under the kernel's version and the recipe, and used without asking apt again; a
    folder of it is complete or not there. Raises Unsupported where apt cannot help, HostFailed when it does not.
    """
    folder, recipe = folder or _cache(), _recipe()
    if guest := _find(folder, recipe):
        return guest
    # QEMU runs as another user: each folder that we make on the way is open to it.
    for level in reversed([folder, *folder.parents]):
        durable.make_folder(level, mode=0o755)
    with locks.held(folder / ".lock", wait_s=_DOWNLOAD_S, what="the guest"):
        durable.sweep(folder)
        if guest := _find(folder, recipe):
            return guest
        return _build(folder, recipe)


def is_built() -> bool:
    """Whether ``build`` finds the guest in the cache, and downloads nothing."""
    return _find(_cache(), _recipe()) is not None


def read_counter(data: bytes) -> int:
    """The count in the ``COUNTER_SIZE`` bytes at ``COUNTER_OFFSET`` of a disk; 0 when they are blank.

    Raises Corrupt for anything else.
    """
    if len(data) != COUNTER_SIZE:
        raise errors.Corrupt(f"the guest's counter takes {COUNTER_SIZE} bytes, not {len(data)}")
    return max(_sector_counter(data[:_SECTOR_SIZE]), _sector_counter(data[_SECTOR_SIZE:]))


def _sector_counter(sector: bytes) -> int:
    if sector == bytes(_SECTOR_SIZE):
        return 0
    match = _COUNTER.fullmatch(sector)
    if match is None:
        raise errors.Corrupt("the disk does not hold the guest's counter", sector=sector[:32].hex())
    return int(match[1])


def block_rounds(data: bytes) -> list[int]:
    """In which round each of the blocks of ``hvmgr.check`` was written; 0 for one that is blank.

    ``data`` is what the disk holds from ``BLOCKS_OFFSET`` on. Raises Corrupt for a block that is not what its checksum
    says, and where the rounds are not those of one moment: blocks are written one after the other.
    """
    pieces = [data[start : start + BLOCK_SIZE] for start in range(0, len(data), BLOCK_SIZE)]
    rounds = [_round(place, piece) for place, piece in enumerate(pieces)]
    if rounds != sorted(rounds, reverse=True) or rounds[0] - rounds[-1] > 1:
        raise errors.Corrupt(f"the guest's blocks are not of one moment: they were written in the rounds {rounds}")
    return rounds


def _round(place: int, block: bytes) -> int:
    if block == bytes(BLOCK_SIZE):
        return 0
    text, digest = block[:-32], block[-32:]
    match = re.match(rb"HVMGR-BLOCK %d (\d{6})\n" % place, text)
    if match is None or hashlib.md5(text, usedforsecurity=False).hexdigest().encode() != digest:
        raise errors.Corrupt(f"block {place} of the guest's is not what its checksum says", block=block[:64].hex())
    return int(match[1])


def _cache() -> Path:
    return settings.cache_folder() / "guest"


def _recipe() -> str:
    return hashlib.sha256(repr((_MODULES, _KEPT)).encode() + _INIT.read_bytes()).hexdigest()[:12]


def _find(folder: Path, recipe: str) -> Guest | None:
    made = sorted(folder.glob(f"*-{recipe}"), key=lambda path: path.stat().st_mtime)
    return Guest(made[-1] / "vmlinuz", made[-1] / "initrd") if made else None


def _build(folder: Path, recipe: str) -> Guest:
    package, version = kernel_package()
    with tempfile.TemporaryDirectory(prefix="hvmgr-") as place:
        files = unpacked(package, Path(place) / "kernel")
        kernel = next(iter((files / "boot").glob("vmlinuz-*")), None)
        if kernel is None:
            raise errors.HostFailed(f"the package {package} holds no kernel")
        initrd = pack(_contents(files, _busybox(Path(place) / "busybox")))
        part = folder / f"{durable.TEMPORARY}{uuid.uuid4().hex}"
        durable.make_folder(part, mode=0o755)
        durable.copy_file(kernel, part / "vmlinuz", mode=0o644)
        durable.write_file(part / "initrd", initrd, mode=0o644)
        _keep_modules(files, part / "modules" / kernel.name.removeprefix("vmlinuz-"))
    target = folder / f"{version}-{recipe}"
    durable.rename(part, target)
    return Guest(target / "vmlinuz", target / "initrd")


def kernel_package() -> tuple[str, str]:
    """Name and version of the package with a kernel that Debian's ever newest one depends on; HostFailed where apt knows none."""
    if platform.machine() != "x86_64":
        raise errors.Unsupported(f"the guest is made for x86_64, not for {platform.machine()}")
    shown = process.run(
        ["apt-cache", "show", "--no-all-versions", KERNEL_PACKAGE], timeout_s=_PROGRAM_S, ok_codes=(0, 100)
    )
    match = re.search(rb"^Depends:.*?(linux-image-[^\s,]+) \(= ([^)/]+)\)", shown.stdout, re.MULTILINE)
    if match is None:
        raise errors.HostFailed(
            f"apt knows no package {KERNEL_PACKAGE}",
            hint="run 'apt-get update'; the guest is made of Debian's packages",
        )
    return match[1].decode(), match[2].decode()


def unpacked(package: str, folder: Path) -> Path:
    """The folder, in ``folder``, with the files of a Debian package, which is downloaded and not installed."""
    folder.mkdir()
    # As root apt would download as a user of its own, who may not write here, and complain about it.
    download = ["apt-get", "--quiet", "--option", "APT::Sandbox::User=root", "download", package]
    try:
        process.run(["env", f"--chdir={folder}", *download], timeout_s=_DOWNLOAD_S)
    except errors.HostFailed as error:
        raise errors.HostFailed(
            f"cannot download {package}: {error}", hint="check the network and run 'apt-get update'"
        ) from error
    archive = next(folder.glob("*.deb"))
    process.run(["dpkg-deb", "--extract", archive, folder / "files"], timeout_s=_PROGRAM_S)
    return folder / "files"


def _busybox(folder: Path) -> bytes:
    """A static busybox: the installed one, or that of Debian's package."""
    if BUSYBOX.is_file() and is_static(data := BUSYBOX.read_bytes()):
        return data
    return (unpacked("busybox-static", folder) / "bin/busybox").read_bytes()


def _contents(files: Path, busybox: bytes) -> Iterator[tuple[str, int, bytes]]:
    """What the initramfs holds: names, modes, bytes; folders before what is in them."""
    for folder in ("bin", "dev", "modules", "proc", "run", "sys"):
        yield folder, 0o040755, b""
    yield "dev/console", 0o020600, b""
    yield "bin/busybox", 0o100755, busybox
    yield "init", 0o100755, _INIT.read_bytes()
    paths = _module_paths(files)
    packed: dict[str, bytes] = {}
    for group, wanted in _MODULES.items():
        order = list(_ordered(wanted, paths, packed))
        yield f"modules/{group}", 0o100644, "".join(f"{name}\n" for name in order).encode()
    for name, data in packed.items():
        yield f"modules/{name}.ko", 0o100644, data


def _keep_modules(files: Path, folder: Path) -> None:
    """Modules and the list of what each needs, as depmod writes it."""
    paths = _module_paths(files)
    folder.mkdir(parents=True)
    known: dict[str, bytes] = {}
    list(_ordered(_KEPT, paths, known))
    lines = []
    for name, data in known.items():
        durable.write_file(folder / f"{name}.ko", data, mode=0o644)
        needed = list(_ordered([name], paths, {}))[:-1]
        lines.append(f"{name}.ko:" + "".join(f" {one}.ko" for one in reversed(needed)) + "\n")
    durable.write_file(folder / "modules.dep", "".join(lines).encode(), mode=0o644)
    built_in = next(files.rglob("modules.builtin"))
    durable.copy_file(built_in, folder / "modules.builtin", mode=0o644)
    folder.parent.chmod(0o755)
    folder.chmod(0o755)


def _module_paths(files: Path) -> dict[str, Path]:
    return {path.name.partition(".")[0].replace("-", "_"): path for path in files.rglob("*.ko*")}


def _ordered(wanted: Sequence[str], paths: dict[str, Path], packed: dict[str, bytes]) -> Iterator[str]:
    """The modules and before each those that it depends on; adds them to ``packed``, skips what is there."""
    for name in wanted:
        if name in packed or name not in paths:
            continue
        raw = paths[name].read_bytes()
        data = lzma.decompress(raw) if paths[name].suffix == ".xz" else raw
        # The loader's own words: modinfo(8) reads the same. Dependencies first, and they are what they are once.
        found = re.search(rb"\0depends=([^\0]*)\0", data)
        needed = found[1].decode().replace("-", "_").split(",") if found else []
        yield from _ordered(needed, paths, packed)
        packed[name] = data
        yield name
