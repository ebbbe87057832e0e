"""The Linux in a disk: which partition holds its root, which its kernel, what the kernel needs to boot from a file."""

from __future__ import annotations

import posixpath
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field

from hvmgr import errors
from hvmgr.storage import ext, partitions
from hvmgr.storage.ext import Disk, FileSystem
from hvmgr.storage.kernel_modules import Modules

_KERNEL = re.compile(r"vmlinuz-(.+)")
_LINUX_TYPES_HINT = "native boot reads ext4, ext3 and ext2; a kernel elsewhere has to be on such a /boot partition"
_NEEDED = ("loop", "dm_mod", "dm_snapshot", "dm_zero")


@dataclass(frozen=True, slots=True)
class Place:
    """A file system of the disk; ``number`` is its partition's, None where it covers the whole disk."""

    number: int | None
    scheme: str
    files: FileSystem

    @property
    def grub_name(self) -> str:
        """GRUB's word for the partition."""
        return "" if self.number is None else f"{self.scheme}{self.number}"


@dataclass(frozen=True, slots=True)
class LinuxSystem:
    """The system, and the kernel of it that is to be booted: its version, and its path on its file system."""

    root: Place
    boot: Place
    version: str
    kernel: str
    arguments: str
    warnings: tuple[str, ...] = field(default=())

    @property
    def initrd(self) -> str:
        """The initramfs that belongs to the kernel."""
        return self.kernel.replace("vmlinuz-", "initrd.img-")

    def kernel_files(self) -> tuple[bytes, bytes]:
        """Kernel and initramfs."""
        return self._read(self.kernel), self._read(self.initrd)

    def _read(self, path: str) -> bytes:
        data = self.boot.files.read(path)
        if not data:
            raise errors.NotFound(f"{self.boot.files.what} has no {path}, or an empty one")
        return data


def find(disk: Disk, what: str, version: str | None = None) -> LinuxSystem:
    """The system in a disk, with its newest kernel or that of ``version``; ``what`` names the disk in sentences."""
    places = list(_places(disk, what))
    root = next((one for one in places if one.files.exists("/etc") and one.files.exists("/lib/modules")), None)
    if root is None:
        raise errors.Unsupported(
            f"{what} holds no Linux that can be booted natively: no partition has /etc and /lib/modules",
            hint=f"for Windows: hvmgr boot add --windows; {_LINUX_TYPES_HINT}",
        )
    modules = set(root.files.listing("/lib/modules"))
    kernels = [found for one in places for found in _kernels(one) if found[0] in modules]
    if version is not None:
        kernels = [one for one in kernels if one[0] == version]
    if not kernels:
        wanted = f"a kernel {version}" if version else "a kernel"
        raise errors.NotFound(
            f"the Linux in {what} has no {wanted} with an initramfs of Debian's kind and its modules",
            hint="each kernel needs vmlinuz-VERSION and initrd.img-VERSION in /boot, and /lib/modules/VERSION",
        )
    newest = max(kernels, key=lambda one: _ordered(one[0]))
    return LinuxSystem(root, newest[2], newest[0], newest[1], _arguments(root), tuple(_warnings(root, what)))


def _places(disk: Disk, what: str) -> Iterator[Place]:
    table = partitions.read(disk)
    if table is None:
        if ext.is_ext(disk):
            yield Place(None, "", FileSystem(disk, 0, f"the file system in {what}"))
        return
    scheme = "gpt" if table.scheme is partitions.Scheme.GPT else "msdos"
    for one in table.partitions:
        if not one.is_extended and ext.is_ext(disk, one.start):
            yield Place(one.number, scheme, FileSystem(disk, one.start, f"partition {one.number} of {what}"))


def _kernels(place: Place) -> Iterator[tuple[str, str, Place]]:
    for folder in ("/boot", "/"):
        names = place.files.listing(folder)
        for name in names:
            match = _KERNEL.fullmatch(name)
            if match and f"initrd.img-{match[1]}" in names:
                yield match[1], posixpath.join(folder, name), place


def _ordered(version: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.findall(r"\d+|[^\d]+", version)]


def _arguments(root: Place) -> str:
    """What the system's own menu gives its kernel."""
    text = (root.files.read("/etc/default/grub") or b"").decode("utf-8", "replace")
    found: dict[str, str] = {}
    for line in text.splitlines():
        match = re.fullmatch(r"\s*(GRUB_CMDLINE_LINUX(?:_DEFAULT)?)=(.*)", line)
        if match:
            try:
                found[match[1]] = " ".join(shlex.split(match[2], comments=True))
            except ValueError:
                continue
    words = f"{found.get('GRUB_CMDLINE_LINUX', '')} {found.get('GRUB_CMDLINE_LINUX_DEFAULT', '')}".split()
    return shlex.join(word for word in words if not word.startswith(("root=", "$")))


def _warnings(root: Place, what: str) -> Iterator[str]:
    files = root.files
    settings = (files.read("/etc/initramfs-tools/initramfs.conf") or b"").decode("utf-8", "replace")
    for name in files.listing("/etc/initramfs-tools/conf.d"):
        settings += (files.read(f"/etc/initramfs-tools/conf.d/{name}") or b"").decode("utf-8", "replace")
    kinds = re.findall(r"^\s*MODULES=(\w+)", settings, re.MULTILINE)
    if kinds and kinds[-1] != "most":
        yield f"the initramfs in {what} is made for one machine (MODULES={kinds[-1]}), and may lack drivers of another"
    if (files.read("/etc/machine-id") or b"").strip() not in {b"", b"uninitialized"}:
        yield f"the system in {what} was not generalised: it has a machine id, which no other machine must have"


def modules(system: LinuxSystem, extra: tuple[str, ...]) -> list[tuple[str, bytes]]:
    """The kernel's modules for the way to the disk, each after those that it needs: (name, bytes); built-in ones left out."""
    folder, files = f"/lib/modules/{system.version}", system.root.files
    found = Modules(f"{folder} in {files.what}", lambda path: files.read(f"{folder}/{path}"))
    wanted = (*_NEEDED, *extra)
    for name in wanted:
        if not found.has(name) and name not in found.built_in:
            raise errors.Unsupported(
                f"the kernel {system.version} in {files.what} has no module {name}",
                hint="a distribution's ordinary kernel has it; name another one with --kernel",
            )
    return [(f"{one.name}.ko", one.data) for one in found.in_order(wanted)]
