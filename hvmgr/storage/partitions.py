"""The partition table of a disk: MBR with logical partitions, and GPT. Read from bytes; nothing is mounted or run.

MBR: what Linux' ``block/partitions/msdos.c`` accepts. GPT: UEFI specification 2.10, chapter 5. All places and sizes are
bytes. A damaged GPT is told as such and its second copy used; what cannot be understood is no table, never a guess.
"""

from __future__ import annotations

import os
import struct
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol, Self

from hvmgr import errors

_SECTOR = 512
_SECTORS = (512, 4096)  # what a GPT may count in; nothing in the image says which

_MBR_TABLE = 446
_MBR_ENTRY = struct.Struct("<B3sB3sII")
_MBR_MARK = b"\x55\xaa"
_EXTENDED = {0x05, 0x0F, 0x85}
_PROTECTIVE = 0xEE
_LOGICAL_MAX = 256  # a chain of logical partitions that is longer runs in a circle

_GPT_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
_GPT_ENTRY = struct.Struct("<16s16sQQQ72s")
_GPT_COOKIE = b"EFI PART"
_GPT_LEGACY_BOOT = 1 << 2
_GPT_ENTRIES_MAX = 1024
_GPT_ENTRY_MAX = 4096

# Boot sectors of file systems on a whole disk end in the mark of an MBR, too.
_FILE_SYSTEMS = ((3, b"NTFS"), (3, b"EXFAT"), (54, b"FAT"), (82, b"FAT"), (3, b"-FVE-FS-"))


class Disk(Protocol):
    """What is needed of a disk: its size, and its bytes."""

    @property
    def size(self) -> int:
        """Bytes."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole buffer with the bytes from ``offset``."""


class File:
    """A raw image or a block device as such a disk."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        self.size = self._file.seek(0, os.SEEK_END)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Behind the end there are zeros."""
        while buffer:
            count = os.preadv(self._file.fileno(), [buffer], offset)
            if count == 0:
                buffer[:] = bytes(len(buffer))
            buffer, offset = buffer[count or len(buffer) :], offset + count


class Scheme(StrEnum):
    """The kind of a partition table."""

    MBR = "mbr"
    GPT = "gpt"


@dataclass(frozen=True, slots=True)
class Partition:
    """One partition; ``type`` is two hexadecimal digits (MBR) or an id (GPT), ``name`` only GPT has."""

    number: int
    start: int
    size: int
    type: str
    name: str = ""
    bootable: bool = False

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.start + self.size

    @property
    def is_extended(self) -> bool:
        """Whether it only holds logical partitions."""
        return self.type in {f"{kind:02x}" for kind in _EXTENDED}


@dataclass(frozen=True, slots=True)
class Table:
    """A disk's partitions by number. ``fault`` says what is wrong with the table itself, if anything is."""

    scheme: Scheme
    sector: int
    partitions: tuple[Partition, ...]
    fault: str | None = None
    entries_size: int = 0  # of GPT: bytes of its list of partitions, which lies twice on the disk
    made_for: int = 0  # of GPT: the size of disk at whose end its second copy lies, in bytes

    @property
    def end(self) -> int:
        """The first byte behind all partitions, and behind the extended partition that holds logical ones."""
        return max((one.end for one in self.partitions), default=0)


def read(disk: Disk) -> Table | None:
    """The partition table of a disk; None when there is none, or a file system covers the whole disk."""
    if disk.size < _SECTOR:
        return None
    first = _bytes(disk, 0, _SECTOR)
    if not _is_mbr(first):
        return None
    entries = [_MBR_ENTRY.unpack_from(first, _MBR_TABLE + 16 * one) for one in range(4)]
    if any(entry[2] == _PROTECTIVE for entry in entries):
        found = _read_gpt(disk)
        if found is not None or all(entry[2] in {0, _PROTECTIVE} for entry in entries):
            return found or Table(Scheme.GPT, _SECTOR, (), "neither copy of the table can be read")
    return Table(Scheme.MBR, _SECTOR, tuple(_mbr_partitions(disk, entries)))


def least_size(disk: Disk) -> int:
    """The bytes that a disk cannot do without: what lies behind belongs to no partition, and only zeros to nobody.

    It is the disk's whole size where nobody can tell: no table, or an empty MBR, but data (a file system on the whole
    disk), or a damaged table.
    """
    table = read(disk)
    if table is None or (table.scheme is Scheme.MBR and not table.partitions):
        start = 0 if table is None else _SECTOR  # mkfs leaves an empty MBR in front of a file system as it was
        return disk.size if any(_bytes(disk, start, max(0, min(disk.size, 1 << 20) - start))) else start
    if table.fault is not None:
        return disk.size
    behind = 0 if table.scheme is Scheme.MBR else table.entries_size + table.sector
    start = max(table.end, table.sector * 2 + table.entries_size if behind else _SECTOR)
    return min(disk.size, start + behind)


def fitted(disk: Disk, size: int) -> list[tuple[int, bytes]]:
    """What has to be written, in this order, before a disk is cut to ``size``: (offset, bytes).

    A GPT keeps its second copy at the disk's end. The copy at its new place comes first, then the header that names
    it, so that the table is whole at each moment. Other disks need nothing. ``size`` is ``least_size`` or more.
    """
    table = read(disk)
    if table is None or table.scheme is Scheme.MBR:
        return []
    sector = table.sector
    header = bytearray(_bytes(disk, sector, sector))
    fields = list(_GPT_HEADER.unpack_from(header))
    entries = _bytes(disk, fields[10] * sector, fields[11] * fields[12])
    entries = entries.ljust(table.entries_size, b"\0")
    last = size // sector - 1
    place = last - table.entries_size // sector
    if size < least_size(disk):
        raise errors.Conflict(f"a partition ends behind {size} bytes")
    fields[6], fields[8] = last, place - 1
    primary = _sealed(header, fields)
    fields[5], fields[6], fields[10] = last, 1, place
    return [(place * sector, entries), (last * sector, _sealed(header, fields)), (sector, primary)]


# --- MBR ------------------------------------------------------------------------------------------------------------


def _is_mbr(first: bytes) -> bool:
    if first[510:512] != _MBR_MARK or any(first[at : at + len(mark)] == mark for at, mark in _FILE_SYSTEMS):
        return False
    return all(first[_MBR_TABLE + 16 * one] & 0x7F == 0 for one in range(4))


def _mbr_partitions(disk: Disk, entries: list[tuple[int, bytes, int, bytes, int, int]]) -> Iterator[Partition]:
    logical = 5
    for number, (status, _, kind, _, start, count) in enumerate(entries, 1):
        if kind == 0 or count == 0:
            continue
        yield Partition(number, start * _SECTOR, count * _SECTOR, f"{kind:02x}", bootable=status == 0x80)
        if kind in _EXTENDED:
            for one in _logical_partitions(disk, start, logical):
                yield one
                logical = one.number + 1


def _logical_partitions(disk: Disk, extended: int, number: int) -> Iterator[Partition]:
    """Each lies behind a table of its own, which names it and the next table."""
    at = extended
    for _ in range(_LOGICAL_MAX):
        if (at + 1) * _SECTOR > disk.size:
            return
        table = _bytes(disk, at * _SECTOR, _SECTOR)
        if table[510:512] != _MBR_MARK:
            return
        following = None
        for one in range(4):
            status, _, kind, _, start, count = _MBR_ENTRY.unpack_from(table, _MBR_TABLE + 16 * one)
            if count == 0 or kind == 0:
                continue
            if kind in _EXTENDED:
                following = extended + start if following is None else following
            else:
                yield Partition(number, (at + start) * _SECTOR, count * _SECTOR, f"{kind:02x}", bootable=status == 0x80)
                number += 1
        if following is None or following <= extended:
            return
        at = following


# --- GPT ------------------------------------------------------------------------------------------------------------


def _read_gpt(disk: Disk) -> Table | None:
    for sector in _SECTORS:
        first = _gpt_copy(disk, sector, 1)
        if first is not None:
            # A disk that has grown keeps the second copy where the first one says that it is.
            second = _gpt_copy(disk, sector, first[2])
            return _gpt_table(sector, first, None if second is not None else "its second copy is damaged or missing")
    for sector in _SECTORS:
        second = _gpt_copy(disk, sector, disk.size // sector - 1)
        if second is not None:
            return _gpt_table(sector, second, "its first copy is damaged; the second one was read")
    return None


def _gpt_copy(disk: Disk, sector: int, at: int) -> tuple[bytes, int, int, int, int] | None:
    """The list of partitions behind a whole header, one entry's size, the other copy's place, the list's size, our place."""
    if at < 1 or (at + 1) * sector > disk.size:
        return None
    header = _bytes(disk, at * sector, sector)
    cookie, _, length, checksum, _, own, other, _, _, _, start, count, size, entries_sum = _GPT_HEADER.unpack_from(
        header
    )
    is_header = (
        cookie == _GPT_COOKIE
        and own == at
        and _GPT_HEADER.size <= length <= sector
        and zlib.crc32(header[:16] + bytes(4) + header[20:length]) == checksum
    )
    is_sane = 0 < count <= _GPT_ENTRIES_MAX and _GPT_ENTRY.size <= size <= _GPT_ENTRY_MAX
    if not (is_header and is_sane) or start * sector + count * size > disk.size:
        return None
    entries = _bytes(disk, start * sector, count * size)
    if zlib.crc32(entries) != entries_sum:
        return None
    return entries, size, other, -(-count * size // sector) * sector, own


def _gpt_table(sector: int, copy: tuple[bytes, int, int, int, int], fault: str | None) -> Table:
    entries, size, _, entries_size, _ = copy
    found = []
    for number, offset in enumerate(range(0, len(entries), size), 1):
        kind, _, first, last, attributes, name = _GPT_ENTRY.unpack_from(entries, offset)
        if any(kind) and first <= last:
            found.append(
                Partition(
                    number,
                    first * sector,
                    (last - first + 1) * sector,
                    str(uuid.UUID(bytes_le=kind)),
                    name.decode("utf-16-le", "replace").partition("\0")[0],
                    bool(attributes & _GPT_LEGACY_BOOT),
                )
            )
    made_for = (max(copy[2], copy[4]) + 1) * sector
    return Table(Scheme.GPT, sector, tuple(found), fault, entries_size, made_for)


def _sealed(header: bytearray, fields: list[object]) -> bytes:
    """A header's sector with these fields and the checksum that fits."""
    fields = [*fields]
    fields[3] = 0
    sector = bytearray(header)
    _GPT_HEADER.pack_into(sector, 0, *fields)
    length = struct.unpack_from("<I", sector, 12)[0]
    struct.pack_into("<I", sector, 16, zlib.crc32(sector[:length]))
    return bytes(sector)


def _bytes(disk: Disk, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    disk.read_into(offset, memoryview(buffer))
    return bytes(buffer)
