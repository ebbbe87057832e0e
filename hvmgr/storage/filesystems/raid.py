"""Whether a place is one part of a RAID (Linux md) or of a dynamic disk (Windows), whose other parts have to follow when it is written.

Source: the kernel's ``include/uapi/linux/raid/md_p.h``. With metadata of the versions 0.90 and 1.0, which stand at the end, a leg of
a mirror looks like a plain file system.
"""

from __future__ import annotations

import struct

from hvmgr.storage.filesystems import window
from hvmgr.storage.partitions import Disk

_MAGIC = 0xA92B4EFC
_MARKS = (struct.pack("<I", _MAGIC), struct.pack(">I", _MAGIC))
_RESERVED, _SECTOR = 64 << 10, 512
_TYPES = {
    "fd",
    "a19d880f-05fc-4d3b-a006-743f0f84911e",  # Linux RAID
    "42",
    "5808c8aa-7e8f-42e0-85d2-e1e90434cfb3",  # metadata of dynamic disks
    "af9b60a0-1431-4f62-bc68-3311714a69ad",  # data of dynamic disks
}


def is_type(type: str) -> bool:
    """Whether a partition table says so."""
    return type.lower() in _TYPES


def is_member(disk: Disk) -> bool:
    """Whether there is metadata of md in one of its four places."""
    old = disk.size // _RESERVED * _RESERVED - _RESERVED
    new = (disk.size // _SECTOR - 16) // 8 * 8 * _SECTOR
    return any(at >= 0 and window.read(disk, at, 4) in _MARKS for at in (old, new, 0, 4096))
