"""A Linux of a few MiB that boots natively out of a VHD, made of the counting guest's kernel and a static busybox."""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path

from hvmgr import vhd
from hvmgr.faces.guest import Guest
from hvmgr.storage import initramfs

HERE = Path(__file__).parent
WITH_SBIN = {**os.environ, "PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"}
SIZE = 48 << 20
START = 1 << 20
LOOKALIKE = "6.1.0-1-amd64"
VOLUME = "6f1e2d3c-0000-4000-8000-00000000b007"
# As the counting guest boots, and with a panic that ends the machine.
ARGUMENTS = (
    "console=ttyS0 quiet panic=-1 mitigations=off nokaslr noreplace-smp cryptomgr.notests audit=0 no_timer_check"
)


def make_raw(path: Path, guest: Guest, work: Path) -> None:
    """The disk: one partition with the root, kernel and all."""
    tree = work / "root"
    for name in ("bin", "sbin", "dev", "proc", "sys", "run", "tmp", "etc/default", "boot", "lib"):
        (tree / name).mkdir(parents=True, exist_ok=True)
    modules = next(guest.modules.iterdir())
    version = modules.name
    subprocess.run(["cp", "-r", guest.modules, tree / "lib/modules"], check=True)
    (tree / "etc/default/grub").write_text(f'GRUB_CMDLINE_LINUX="{ARGUMENTS}"\n')
    _program(tree / "bin/busybox", initramfs.installed_busybox())
    for line in subprocess.run(
        [tree / "bin/busybox", "--list"], capture_output=True, text=True, check=True
    ).stdout.split():
        if line != "busybox":
            (tree / "bin" / line).symlink_to("busybox")
    _program(tree / "sbin/init", (HERE / "mini_init.sh").read_bytes())
    (tree / "count").write_text("0\n")
    (tree / "boot" / f"vmlinuz-{version}").write_bytes(guest.kernel.read_bytes())
    (tree / "boot" / f"initrd.img-{version}").write_bytes(initrd(guest))
    write_partitioned(path, tree, SIZE)


def make_lookalike(path: Path, tree: Path, size: int) -> None:
    """A disk that has all that a Linux needs to be booted natively, and would not start."""
    modules = tree / "lib" / "modules" / LOOKALIKE
    for one in (modules / "kernel", tree / "etc" / "default", tree / "boot"):
        one.mkdir(parents=True)
    names = ("loop", "dm_mod", "dm_snapshot", "dm_zero", "ext4")
    (modules / "modules.dep").write_text("".join(f"kernel/{name}.ko:\n" for name in names))
    for name in names:
        (modules / "kernel" / f"{name}.ko").write_bytes(b"module")
    (tree / "boot" / f"vmlinuz-{LOOKALIKE}").write_bytes(b"kernel")
    (tree / "boot" / f"initrd.img-{LOOKALIKE}").write_bytes(b"initrd")
    (tree / "etc" / "default" / "grub").write_text('GRUB_CMDLINE_LINUX="quiet"\n')
    (tree / "etc" / "machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    write_partitioned(path, tree, size)


def write_partitioned(path: Path, tree: Path, size: int) -> None:
    """A raw disk with one ext4 partition that holds a folder's tree."""
    with path.open("wb") as disk:
        disk.truncate(size)
        count = (size - START) // 512
        entry = struct.pack("<B3sB3sII", 0x80, b"\xfe\xff\xff", 0x83, b"\xfe\xff\xff", START // 512, count)
        disk.write(bytes(446) + entry.ljust(64, b"\0") + b"\x55\xaa")
    command = ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-d", tree, "-E", f"offset={START},root_owner=0:0"]
    subprocess.run([*command, path, f"{(size - START) // 1024}k"], check=True, capture_output=True, env=WITH_SBIN)


def initrd(guest: Guest) -> bytes:
    """Its initramfs."""
    modules = next(guest.modules.iterdir())
    lines = dict(line.split(":", 1) for line in (modules / "modules.dep").read_text().splitlines())
    order: dict[str, None] = {}
    for name in [one for one in ("virtio_pci.ko", "virtio_blk.ko", "ext4.ko") if one in lines]:
        order |= dict.fromkeys([*reversed(lines[name].split()), name])
    entries = [(name, 0o040755, b"") for name in ("bin", "conf", "conf/conf.d", "dev", "modules", "scripts")]
    entries.append(("dev/console", 0o020600, b""))
    entries.append(("bin/busybox", 0o100755, initramfs.installed_busybox()))
    entries.append(("init", 0o100755, (HERE / "mini_initramfs.sh").read_bytes()))
    entries.append(("modules/ORDER", 0o100644, "".join(f"{name}\n" for name in order).encode()))
    entries += [(f"modules/{name}", 0o100644, (modules / name).read_bytes()) for name in order]
    return initramfs.pack(entries)


def netboot_modules(guest: Guest, work: Path) -> Path:
    """Of the guest's modules those that a machine needs which starts over the network: fewer are faster."""
    modules = next(guest.modules.iterdir())
    folder = work / "modules" / modules.name
    folder.mkdir(parents=True, exist_ok=True)
    lines = (modules / "modules.dep").read_text().splitlines(keepends=True)
    wanted: set[str] = set()
    for line in lines:
        name, _, needs = line.partition(":")
        if name in {"virtio_pci.ko", "virtio_blk.ko", "virtio_net.ko", "ext4.ko"}:
            wanted |= {name, *needs.split()}
    (folder / "modules.dep").write_text("".join(line for line in lines if line.partition(":")[0] in wanted))
    for name in wanted:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(modules / name)
    return folder


def make_vhd(path: Path, raw: Path, kind: vhd.Kind) -> None:
    """The same disk as a VHD."""
    with vhd.RawSource(raw) as source:
        vhd.write_image(path, source, kind=kind)


def _program(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    path.chmod(0o755)
