"""Partition tables and file systems, written into ordinary files: sfdisk and the mkfs programs. No root, no device.

A file system knows nothing of the partition that it is going to lie in, but NTFS: Windows' boot code needs its place.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr.host import process
from hvmgr.model.disk_layout import FileSystem, TableKind

if TYPE_CHECKING:
    from hvmgr.model.disk_layout import Layout, Volume

_LIMIT_S = 600.0
_SECTOR = 512
# The geometry that every BIOS shows of a disk of today, and that Windows expects.
_GEOMETRY = ("-H", "255", "-S", "63")
_PROGRAMS = {
    FileSystem.NTFS: "mkntfs",
    FileSystem.EXT4: "mke2fs",
    FileSystem.FAT32: "mkfs.fat",
    FileSystem.XFS: "mkfs.xfs",
    FileSystem.BTRFS: "mkfs.btrfs",
}


def require(layout: Layout) -> None:
    """Unsupported, with the package, where a program that the layout needs is missing."""
    if layout.table is not TableKind.NONE:
        process.require("sfdisk")
    for one in layout.volumes:
        if one.file_system is not None:
            process.require(_PROGRAMS[one.file_system])


def write_table(disk: Path, layout: Layout) -> None:
    """The file of a whole disk, which is as long as the disk, has the layout's partition table."""
    words = ["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", "--wipe", "never", "--wipe-partitions", "never"]
    process.run([*words, disk], input=layout.script().encode(), timeout_s=_LIMIT_S)


def make(file: Path, volume: Volume, *, root: Path | None = None) -> None:
    """The file, which is as long as the volume and holds zeros, is formatted; ext4 with the tree ``root`` in it."""
    assert volume.file_system is not None
    label = volume.label
    argv: list[str | Path] = [_PROGRAMS[volume.file_system]]
    if volume.file_system is FileSystem.NTFS:
        argv += ["--quiet", "--force", "--quick", "-p", str(volume.start // _SECTOR), *_GEOMETRY, "-s", str(_SECTOR)]
        argv += ["-L", label] if label else []
    elif volume.file_system is FileSystem.FAT32:
        argv += ["-F", "32", "-h", str(volume.start // _SECTOR), "-S", str(_SECTOR)]
        argv += ["-n", label.upper()] if label else []
    elif volume.file_system is FileSystem.EXT4:
        # The work of later (lazy_*) is left to the guest's kernel: it writes what a blank disk holds already.
        argv += ["-q", "-F", "-t", "ext4"]
        argv += ["-d", root] if root is not None else []
        argv += ["-L", label] if label else []
    else:
        argv += ["-q", "-f"]
        argv += ["-L", label] if label else []
    process.run([*argv, file], timeout_s=_LIMIT_S)
