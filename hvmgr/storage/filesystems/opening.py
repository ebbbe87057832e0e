"""Which reader reads which kind of file system."""

from __future__ import annotations

import importlib
from typing import cast

from hvmgr.storage.filesystems.reader import Reader
from hvmgr.storage.filesystems.signatures import Kind
from hvmgr.storage.partitions import Disk

# Imported when the first volume of the kind is met.
_READERS = {
    Kind.EXT2: "ext:Ext",
    Kind.EXT3: "ext:Ext",
    Kind.EXT4: "ext:Ext",
    Kind.XFS: "xfs:Xfs",
    Kind.BTRFS: "btrfs:Btrfs",
    Kind.NTFS: "ntfs:Ntfs",
    Kind.FAT: "fat:Fat",
    Kind.EXFAT: "exfat:ExFat",
    Kind.ISO: "iso:Iso",
}
READABLE = frozenset(_READERS)


def open_reader(kind: Kind, disk: Disk) -> Reader | None:
    """A reader of the file system that lies on the disk; None where there is none for its kind."""
    if kind not in _READERS:
        return None
    module, _, name = _READERS[kind].partition(":")
    found = importlib.import_module(f"hvmgr.storage.filesystems.{module}")
    return cast("Reader", getattr(found, name)(disk))
