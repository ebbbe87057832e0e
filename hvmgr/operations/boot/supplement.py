"""The second initramfs of an entry: what the system's own one lacks to find its disk in a file. GRUB loads both.

So nothing is installed in the VHD, and its system needs no change and no root here: the kernel unpacks the two archives one over
the other. It knows initramfs-tools and dracut, whose archives have their hooks in different places. The programs are this host's with their libraries and loader in a folder of their own, the modules the kernel's.
"""

from __future__ import annotations

import gzip
import shlex
from collections.abc import Iterator
from pathlib import Path

from hvmgr import settings
from hvmgr.model.boot_entry import BootEntry, Volume
from hvmgr.operations.boot import guest_system
from hvmgr.operations.boot.guest_system import LinuxSystem
from hvmgr.storage import initramfs

_MODULES = {Volume.EXT: ("ext4",), Volume.NTFS: ("fuse",)}
_PROGRAMS = {Volume.EXT: ("dmsetup",), Volume.NTFS: ("dmsetup", "ntfs-3g")}
_SECTOR = 512
_FOLDER, _PROGRAM, _FILE, _LINK = 0o040755, 0o100755, 0o100644, 0o120777
# Where dracut looks; /lib may be a link in its archive, so that this one never names it. Others do not look there.
_DRACUT = {
    "usr/lib/dracut/hooks/initqueue/settled/90-hvmgr.sh": "dracut-start",
    "usr/lib/dracut/hooks/pre-pivot/90-hvmgr.sh": "dracut-mounted",
    "usr/lib/udev/rules.d/90-hvmgr.rules": "udev.rules",
}


def build(entry: BootEntry, system: LinuxSystem, table: str) -> bytes:
    """The archive, compressed; ``table`` is device mapper's of the disk."""
    return gzip.compress(initramfs.pack(_contents(entry, system, table)), 1, mtime=0)


def _contents(entry: BootEntry, system: LinuxSystem, table: str) -> Iterator[tuple[str, int, bytes]]:
    for folder in ("conf", "conf/conf.d", "hvmgr", "hvmgr/bin", "hvmgr/lib", "hvmgr/modules"):
        yield folder, _FOLDER, b""
    shipped = settings.native_boot_folder()
    yield "conf/conf.d/hvmgr", _FILE, (shipped / "conf").read_bytes()
    for name in ("local-top", "local-bottom", "shutdown"):
        yield f"hvmgr/{name}", _PROGRAM, (shipped / name).read_bytes()
    for folder in sorted({str(one) for name in _DRACUT for one in Path(name).parents[:-1]}):
        yield folder, _FOLDER, b""
    for name, source in _DRACUT.items():
        yield name, _FILE, (shipped / source).read_bytes()
    yield "hvmgr/boot.conf", _FILE, words(entry).encode()
    lines = (
        f"{one.length} {one.mtime if entry.layer else '-'} {one.head} {one.sha256} {one.path}\n" for one in entry.files
    )
    yield "hvmgr/images", _FILE, "".join(lines).encode("utf-8", "surrogateescape")
    yield "hvmgr/table", _FILE, table.encode()
    yield "hvmgr/bin/busybox", _PROGRAM, initramfs.installed_busybox()
    programs = _PROGRAMS[entry.volume_type]
    yield from initramfs.programs(programs, "hvmgr")
    if "ntfs-3g" in programs:
        yield "hvmgr/bin/@ntfs-3g", _LINK, b"../lib/loader"
    modules = guest_system.modules(system, _MODULES[entry.volume_type])
    yield "hvmgr/modules/ORDER", _FILE, "".join(f"{name}\n" for name, _ in modules).encode()
    for name, data in modules:
        yield f"hvmgr/modules/{name}", _FILE, data


def words(entry: BootEntry) -> str:
    """What the scripts want to know, as words of the shell."""
    facts = {
        "host": f"UUID={entry.volume}",
        "host_type": entry.volume_type.value,
        "image": entry.files[0].path,
        "layer": f"{entry.inside}/layer" if entry.layer else "",
        "sectors": str(entry.size // _SECTOR),
    }
    return "".join(f"{name}={shlex.quote(value)}\n" for name, value in facts.items())
