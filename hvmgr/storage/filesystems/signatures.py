"""What a disk or partition holds, by its signature: the kind of file system, its label, its id. Nothing is believed further."""

from __future__ import annotations

import struct
import uuid
from dataclasses import dataclass, replace
from enum import StrEnum

from hvmgr import errors
from hvmgr.storage.filesystems import window
from hvmgr.storage.partitions import Disk

# The kernel's, uswsusp's, and those of older kernels and of TuxOnIce: in the place of SWAPSPACE2 until the system has gone on.
_ASLEEP = (b"S1SUSPEND", b"S2SUSPEND", b"ULSUSPEND", b"LINHIB0001", b"\xed\xc3\x02\xe9\x98\x56\xe5\x0c")


class Kind(StrEnum):
    """What may lie on a partition."""

    EXT2 = "ext2"
    EXT3 = "ext3"
    EXT4 = "ext4"
    XFS = "xfs"
    BTRFS = "btrfs"
    NTFS = "ntfs"
    FAT = "fat"
    EXFAT = "exfat"
    ISO = "iso9660"
    LVM = "lvm"
    LUKS = "luks"
    BITLOCKER = "bitlocker"
    SWAP = "swap"
    SWSUSPEND = "swsuspend"  # swap space with the memory of a Linux that sleeps
    RAID = "linux_raid_member"
    # What no reader of ours reads, in the words of blkid; of the second line the signatures are blkid's own affair.
    APFS, BCACHEFS, EROFS, F2FS, HFSPLUS = "apfs", "bcachefs", "erofs", "f2fs", "hfsplus"
    JFS, REFS, REISERFS, SQUASHFS, UDF, UFS = "jfs", "refs", "reiserfs", "squashfs", "udf", "ufs"
    CRAMFS, GFS2, HFS, MINIX, NILFS2, OCFS2 = "cramfs", "gfs2", "hfs", "minix", "nilfs2", "ocfs2"
    ROMFS, SYSV, VMFS, ZFS, OTHER = "romfs", "sysv", "vmfs", "zfs_member", "other"

    @property
    def is_encrypted(self) -> bool:
        """Whether a key is needed."""
        return self in {Kind.LUKS, Kind.BITLOCKER}

    @property
    def holds_files(self) -> bool:
        """Whether it is a file system."""
        return self not in {Kind.LVM, Kind.LUKS, Kind.BITLOCKER, Kind.SWAP, Kind.SWSUSPEND, Kind.RAID}


_LABELLED_INSIDE = {Kind.NTFS, Kind.EXFAT}


@dataclass(frozen=True, slots=True)
class Found:
    """A kind, and what it says of itself."""

    kind: Kind
    label: str = ""
    uuid: str = ""


def recognise(disk: Disk) -> Found | None:
    """What lies on the disk; None when nothing that is known does."""
    try:
        head = window.read(disk, 0, 72 << 10)
    except errors.Corrupt:
        return None
    for look in (_luks, _bitlocker, _raid, _ntfs, _exfat, _xfs, _ext, _lvm, _fat, _swap, _btrfs, _iso, _other):
        found = look(head)
        if found is not None:
            return found if found.kind not in _LABELLED_INSIDE else replace(found, label=_label(found.kind, disk))
    return None


def _label(kind: Kind, disk: Disk) -> str:
    from hvmgr.storage.filesystems import opening, reader

    try:
        opened = opening.open_reader(kind, disk)
        return opened.label() if isinstance(opened, reader.HasLabel) else ""
    except (errors.Corrupt, errors.Unsupported):
        return ""  # whoever wants a file of it is told what is wrong


def _text(raw: bytes, encoding: str = "utf-8") -> str:
    return raw.decode(encoding, "replace").partition("\0")[0].rstrip()


def _luks(head: bytes) -> Found | None:
    if head[:6] != b"LUKS\xba\xbe":
        return None
    label = _text(head[24:72]) if head[6:8] == b"\0\2" else ""
    return Found(Kind.LUKS, label, _text(head[168:208]))


def _bitlocker(head: bytes) -> Found | None:
    return Found(Kind.BITLOCKER) if head[3:11] == b"-FVE-FS-" else None


def _ntfs(head: bytes) -> Found | None:
    if head[3:11] != b"NTFS    ":
        return None
    return Found(Kind.NTFS, uuid=head[72:80][::-1].hex().upper())


def _exfat(head: bytes) -> Found | None:
    if head[3:11] != b"EXFAT   ":
        return None
    return Found(Kind.EXFAT, uuid=_serial(head[100:104]))


def _fat(head: bytes) -> Found | None:
    """FAT says nothing reliable of itself: its numbers have to make sense together."""
    if len(head) < 512 or head[510:512] != b"\x55\xaa":
        return None
    sector, per_cluster, reserved, copies = struct.unpack_from("<HBHB", head, 11)
    is_sane = (
        sector in {512, 1024, 2048, 4096}
        and per_cluster in {1, 2, 4, 8, 16, 32, 64, 128}
        and reserved > 0
        and copies in {1, 2}
        and (head[21] == 0xF0 or head[21] >= 0xF8)
        and head[0] in {0xEB, 0xE9}
    )
    if not is_sane:
        return None
    at = 71 if head[82:85] == b"FAT" else 43
    has_label = head[at - 5] == 0x29
    label = _text(head[at : at + 11], "cp437") if has_label else ""
    return Found(Kind.FAT, "" if label == "NO NAME" else label, _serial(head[at - 4 : at]) if has_label else "")


def _serial(raw: bytes) -> str:
    number = raw[::-1].hex().upper()
    return f"{number[:4]}-{number[4:]}"


def _xfs(head: bytes) -> Found | None:
    if head[:4] != b"XFSB":
        return None
    return Found(Kind.XFS, _text(head[108:120]), str(uuid.UUID(bytes=head[32:48])))


def _ext(head: bytes) -> Found | None:
    block = head[1024:2048]
    if len(block) < 1024 or block[56:58] != b"\x53\xef":
        return None
    compatible, incompatible, read_only = struct.unpack_from("<III", block, 92)
    is_4 = incompatible & ~0x16 or read_only & ~0x7
    kind = Kind.EXT4 if is_4 else Kind.EXT3 if compatible & 0x4 else Kind.EXT2
    return Found(kind, _text(block[120:136]), str(uuid.UUID(bytes=block[104:120])))


def _lvm(head: bytes) -> Found | None:
    for at in range(0, 2048, 512):
        if head[at : at + 8] == b"LABELONE" and head[at + 24 : at + 32] == b"LVM2 001":
            return Found(Kind.LVM, uuid=_text(head[at + 32 : at + 64], "ascii"))
    return None


def _swap(head: bytes) -> Found | None:
    for page in (4096, 8192, 16384, 65536):
        mark = head[page - 10 : page]
        if mark == b"SWAPSPACE2" or mark.startswith(_ASLEEP):
            kind = Kind.SWAP if mark == b"SWAPSPACE2" else Kind.SWSUSPEND
            return Found(kind, _text(head[1052:1068]), str(uuid.UUID(bytes=head[1036:1052])))
    return None


def _btrfs(head: bytes) -> Found | None:
    block = head[64 << 10 :]
    if block[64:72] != b"_BHRfS_M":
        return None
    return Found(Kind.BTRFS, _text(block[299:555]), str(uuid.UUID(bytes=block[32:48])))


def _raid(head: bytes) -> Found | None:
    """Where the metadata of an array (md) stands at the beginning, nothing else does; but in swap space anything may."""
    mark = b"\xfc\x4e\x2b\xa9\1\0\0\0"  # md_p.h: MD_SB_MAGIC and major_version 1
    return Found(Kind.RAID) if mark in (head[:8], head[4096:4104]) and _swap(head) is None else None


def _iso(head: bytes) -> Found | None:
    if head[32769:32774] != b"CD001":
        return None
    return Found(Kind.ISO, _text(head[32808:32840], "ascii"))


# Where each says its name: (offset, mark), as blkid has them (util-linux, libblkid/src/superblocks).
_OTHERS = {
    Kind.REFS: ((3, b"ReFS\0"),),
    Kind.APFS: ((32, b"NXSB"),),
    Kind.SQUASHFS: ((0, b"hsqs"),),
    Kind.EROFS: ((1024, b"\xe2\xe1\xf5\xe0"),),
    Kind.F2FS: ((1024, b"\x10\x20\xf5\xf2"),),
    Kind.HFSPLUS: ((1024, b"H+\0\x04"), (1024, b"HX\0\x05")),
    Kind.BCACHEFS: ((4120, bytes.fromhex("c68573f64e1a45ca8265f57f48ba6d81")),),
    Kind.JFS: ((32768, b"JFS1"),),
    Kind.UDF: ((34817, b"NSR02"), (34817, b"NSR03")),
    Kind.REISERFS: ((65588, b"ReIsErFs"), (65588, b"ReIsEr2Fs"), (65588, b"ReIsEr3Fs")),
    Kind.UFS: ((66908, b"\x19\x01\x54\x19"), (9564, b"\x54\x19\x01\0")),
}


def _other(head: bytes) -> Found | None:
    for kind, marks in _OTHERS.items():
        if any(head[at : at + len(mark)] == mark for at, mark in marks):
            return Found(kind)
    return None
