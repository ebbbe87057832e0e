"""Fast commits of ext4: what happened since the last whole transaction of the journal, in words of the file system.

Source: "Journal (jbd2)", "Fast commits", of the kernel documentation (filesystems/ext4), and what Linux makes of the same disk. They
lie at the end of the journal: tags, one after the other, up to the last tail whose checksum is right.
"""

from __future__ import annotations

import heapq
import itertools
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from hvmgr.storage.filesystems import crc32c

_TAG = struct.Struct("<HH")
_ADD, _REMOVE, _CREATE, _LINK, _UNLINK, _INODE, _PAD, _TAIL, _HEAD = range(1, 10)
_BLOCKS, _BLOCKS_END = 40, 100  # where an inode says where its content lies
_FLAGS, _EXTENTS, _INLINE = 32, 0x80000, 0x10000000
_EXTENT_MAGIC, _UNWRITTEN = b"\x0a\xf3", 0x8000

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
        new = self.pieces.get(number)
        return pieces if new is None else _with(pieces, new)


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
    found.pieces = {number: list(_latest(pieces)) for number, pieces in found.pieces.items()}
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
                if own != sequence & 0xFFFFFFFF or crc32c.updated(checksum, block[at : at + _TAG.size + 4]) != stated:
                    return
                yield from pending
                pending, checksum = [], 0
            else:
                checksum = crc32c.updated(checksum, block[at : at + _TAG.size + length])
                pending.append((tag, data))
            at += _TAG.size + length


def _latest(pieces: list[Piece]) -> Iterator[Piece]:
    """The pieces in order of their places in the content, and where several overlap, of each part the last one."""
    waiting = sorted(((first, -number) for number, (first, _, _) in enumerate(pieces)), reverse=True)
    edges = sorted({edge for first, count, _ in pieces for edge in (first, first + count)})
    candidates: list[int] = []  # their numbers, negative, so that the last one is on top
    for start, end in itertools.pairwise(edges):
        while waiting and waiting[-1][0] <= start:
            heapq.heappush(candidates, waiting.pop()[1])
        while candidates and sum(pieces[-candidates[0]][:2]) <= start:
            heapq.heappop(candidates)
        if candidates:
            first, _, place = pieces[-candidates[0]]
            yield start, end - start, _moved(place, start - first)


def _with(pieces: Iterable[Piece], new: list[Piece]) -> Iterator[Piece]:
    """Pieces in order, with others in order over them."""
    waiting = iter(new)
    over = next(waiting, None)
    for first, count, place in pieces:
        at, stop = first, first + count
        while over is not None and over[0] < stop:
            if at < over[0]:
                yield at, over[0] - at, _moved(place, at - first)
            end = over[0] + over[1]
            at = max(at, min(end, stop))
            if end > stop:
                break  # it goes on over the next one
            yield over
            over = next(waiting, None)
        if at < stop:
            yield at, stop - at, _moved(place, at - first)
    if over is not None:
        yield over
    yield from waiting


def _moved(place: int | None, count: int) -> int | None:
    return None if place is None else place + count
