"""Fast commits of ext4: what happened since the last whole transaction of the journal, in words of the file system.

Source: "Journal (jbd2)", "Fast commits", of the kernel documentation (filesystems/ext4), and what Linux makes of the same disk. They
lie at the end of the journal: tags, one after the other, up to the last tail whose checksum is right.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

_TAG = struct.Struct("<HH")
_ADD, _REMOVE, _CREATE, _LINK, _UNLINK, _INODE, _PAD, _TAIL, _HEAD = range(1, 10)
_BLOCKS, _BLOCKS_END = 40, 100  # where an inode says where its content lies
_FLAGS, _EXTENTS, _INLINE = 32, 0x80000, 0x10000000
_EXTENT_MAGIC, _UNWRITTEN = b"\x0a\xf3", 0x8000
_POLYNOMIAL = 0x82F63B78

Piece = tuple[int, int, int | None]  # from which block of a content on, how many, and where; None for zeros


@dataclass(slots=True)
class Changes:
    """By an inode's number: the inode, but for where its content lies; what lies elsewhere now; by a folder's, its names."""

    inodes: dict[int, bytes] = field(default_factory=dict)
    pieces: dict[int, list[Piece]] = field(default_factory=dict)
    names: dict[int, dict[bytes, int | None]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.inodes or self.pieces or self.names)

    def inode(self, number: int, raw: bytes) -> bytes:
        """The inode as it is now; ``raw`` is what the disk has."""
        new = self.inodes.get(number)
        if new is None:
            return raw
        blocks = raw[_BLOCKS:_BLOCKS_END]
        (flags,) = struct.unpack_from("<I", new, _FLAGS)
        if flags & _EXTENTS and blocks[:2] != _EXTENT_MAGIC:
            blocks = (_EXTENT_MAGIC + struct.pack("<HHHI", 0, 4, 0, 0)).ljust(len(blocks), b"\0")
        elif flags & _INLINE and not flags & _EXTENTS:
            blocks = new[_BLOCKS:_BLOCKS_END]
        return (new[:_BLOCKS] + blocks + new[_BLOCKS_END:] + raw[len(new) :])[: len(raw)]

    def content(self, number: int, pieces: Iterable[Piece]) -> Iterable[Piece]:
        """Where a content lies now."""
        for one in self.pieces.get(number, ()):
            pieces = list(_replaced(pieces, one))
        return pieces


def parsed(blocks: Iterable[bytes], sequence: int) -> Changes:
    """What the blocks of fast commits say that follow the transaction before ``sequence``."""
    found = Changes()
    for tag, data in _valid(blocks, sequence):
        if tag == _INODE:
            found.inodes[struct.unpack_from("<I", data)[0]] = data[4:]
        elif tag == _ADD:
            number, first, count, high, low = struct.unpack_from("<IIHHI", data)
            is_unwritten = count > _UNWRITTEN
            place = None if is_unwritten else low | high << 32
            found.pieces.setdefault(number, []).append((first, count - _UNWRITTEN if is_unwritten else count, place))
        elif tag == _REMOVE:
            number, first, count = struct.unpack_from("<III", data)
            found.pieces.setdefault(number, []).append((first, count, None))
        elif tag in {_CREATE, _LINK, _UNLINK}:
            folder, number = struct.unpack_from("<II", data)
            found.names.setdefault(folder, {})[data[8:]] = None if tag == _UNLINK else number
    return found


def _valid(blocks: Iterable[bytes], sequence: int) -> Iterator[tuple[int, bytes]]:
    """The tags up to the last right tail."""
    pending: list[tuple[int, bytes]] = []
    checksum, is_first = 0, True
    for block in blocks:
        at = 0
        while at + _TAG.size <= len(block):
            tag, length = _TAG.unpack_from(block, at)
            data = block[at + _TAG.size : at + _TAG.size + length]
            if len(data) < length or not _ADD <= tag <= _HEAD or (is_first and tag != _HEAD):
                return
            is_first = False
            if tag == _HEAD and struct.unpack_from("<I", data, 4)[0] != sequence & 0xFFFFFFFF:
                return
            if tag == _TAIL:
                own, stated = struct.unpack_from("<II", data)
                if own != sequence & 0xFFFFFFFF or _crc32c(block[at : at + _TAG.size + 4], checksum) != stated:
                    return
                yield from pending
                pending, checksum = [], 0
            else:
                checksum = _crc32c(block[at : at + _TAG.size + length], checksum)
                pending.append((tag, data))
            at += _TAG.size + length


def _replaced(pieces: Iterable[Piece], new: Piece) -> Iterator[Piece]:
    """The pieces in order, with another one over them."""
    start, end, is_done = new[0], new[0] + new[1], False
    for first, count, place in pieces:
        stop = first + count
        if first < start:
            yield first, min(stop, start) - first, place
        if stop > end or first >= end:
            if not is_done:
                yield new
                is_done = True
            skipped = max(0, end - first)
            yield first + skipped, count - skipped, None if place is None else place + skipped
    if not is_done:
        yield new


@functools.cache
def _table() -> list[int]:
    found = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)  # noqa: PLW2901
        found.append(value)
    return found


def _crc32c(data: bytes, value: int) -> int:
    table = _table()
    for byte in data:
        value = value >> 8 ^ table[(value ^ byte) & 0xFF]
    return value
