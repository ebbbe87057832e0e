"""Which reader reads which kind of file system."""

from __future__ import annotations

from hvmgr.storage.filesystems.reader import Reader
from hvmgr.storage.filesystems.signatures import Kind
from hvmgr.storage.partitions import Disk

READABLE = {Kind.EXT2, Kind.EXT3, Kind.EXT4, Kind.NTFS, Kind.FAT, Kind.EXFAT, Kind.ISO}


def open_reader(kind: Kind, disk: Disk) -> Reader | None:
    """A reader of the file system that lies on the disk; None where there is none for its kind."""
    if kind in {Kind.EXT2, Kind.EXT3, Kind.EXT4}:
        from hvmgr.storage.filesystems.ext import Ext

        return Ext(disk)
    if kind is Kind.NTFS:
        from hvmgr.storage.filesystems.ntfs import Ntfs

        return Ntfs(disk)
    if kind is Kind.FAT:
        from hvmgr.storage.filesystems.fat import Fat

        return Fat(disk)
    if kind is Kind.EXFAT:
        from hvmgr.storage.filesystems.exfat import ExFat

        return ExFat(disk)
    if kind is Kind.ISO:
        from hvmgr.storage.filesystems.iso import Iso

        return Iso(disk)
    return None
