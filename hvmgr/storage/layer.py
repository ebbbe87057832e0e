"""The layer of a natively booted VHD: what the system wrote instead of writing the VHD. Kept as device mapper's store.

The store is that of Linux' persistent dm-snapshot (drivers/md/dm-snap-persistent.c), in chunks of 4 KiB: a header, then areas of
256 pairs (chunk of the disk, chunk of the store), each followed by the chunks that it names, until a pair leads nowhere. A file
of zeros is an empty store.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

from hvmgr import errors
from hvmgr.storage import allocation, durable, holes
from hvmgr.vhd.file import File
from hvmgr.vhd.source import Stretch

CHUNK = 4096
_MAGIC = 0x70416E53
_HEADER = struct.Struct("<IIII")  # magic, valid, version, sectors of a chunk
_PAIR = struct.Struct("<QQ")
_SECTOR = 512
_LARGEST = 1 << 20  # bytes of a chunk


def size_for(disk: int) -> int:
    """The length of a store that can take a whole disk: it can never become full, which would make it useless."""
    chunks = -(-disk // CHUNK)
    return (chunks + -(-chunks // (CHUNK // _PAIR.size)) + 8) * CHUNK


def make(path: Path, disk: int) -> None:
    """An empty store for a disk, its space reserved where the file system can: a store that finds none is worthless."""
    with durable.explained(path), durable.replacing(path, 0o600, None) as descriptor:
        allocation.take(descriptor, size_for(disk))


def empty(path: Path, disk: int) -> None:
    """The store, which is there, is an empty one; without its header nothing in it counts, whenever that dies."""
    try:
        allocation.clear(path, size_for(disk), head=CHUNK)
    except errors.NoSpace as error:
        raise errors.NoSpace(
            f"{path} is empty now, but its volume has no room for the disk when it is fully written",
            hint="free space there, and run the command again",
            path=str(path),
        ) from error


def unfilled(path: Path, disk: int) -> int:
    """What a store may still take of its volume; 0 where all of it is reserved, or none is there."""
    return max(0, size_for(disk) - path.stat().st_blocks * 512) if path.exists() else 0


def data_in(path: Path) -> int:
    """The bytes of a store that no hole is, whatever is wrong with it."""
    with path.open("rb") as file:
        return sum(end - start for start, end in holes.data_ranges(file.fileno(), os.fstat(file.fileno()).st_size))


def is_used(path: Path) -> bool:
    """Whether there is a store that holds something, seen by its header and first pair; one that is damaged does."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER.size)
            if len(head) < _HEADER.size or head[:4] == bytes(4):
                return False
            magic, valid, version, sectors = _HEADER.unpack(head)
            if magic != _MAGIC or version != 1 or not valid:
                return True
            file.seek(sectors * _SECTOR)
            pair = file.read(_PAIR.size)
            return len(pair) < _PAIR.size or _PAIR.unpack(pair)[1] != 0
    except FileNotFoundError:
        return False


class Layer:
    """A store that can be read: a ``Source`` whose data is what was written, and nothing else."""

    def __init__(self, file: File, size: int) -> None:
        self._file, self.size = file, size
        self._chunk = CHUNK
        self._places = self._read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def places(self) -> Mapping[int, int]:
        """Chunks of the disk and where in the store they are."""
        return self._places

    @property
    def written(self) -> int:
        """Bytes that it holds."""
        return len(self._places) * self._chunk

    def stretches(self, offset: int = 0, length: int | None = None) -> Iterator[Stretch]:
        """What was written is data, everything else is not there."""
        end = self.size if length is None else offset + length
        position = offset
        for chunk in sorted(self._places):
            start, stop = max(chunk * self._chunk, offset), min((chunk + 1) * self._chunk, end)
            if start >= stop:
                continue
            if position < start:
                yield Stretch(position, start - position, data=False)
            yield Stretch(start, stop - start, data=True)
            position = stop
        if position < end:
            yield Stretch(position, end - position, data=False)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """What was written; zeros elsewhere."""
        while buffer:
            chunk, inside = divmod(offset, self._chunk)
            part = buffer[: self._chunk - inside]
            place = self._places.get(chunk)
            if place is None:
                part[:] = bytes(len(part))
            else:
                self._file.read_into(place * self._chunk + inside, part)
            buffer, offset = buffer[len(part) :], offset + len(part)

    def _read(self) -> dict[int, int]:
        head = self._file.read(0, _HEADER.size)
        if len(head) < _HEADER.size:
            raise self._damaged("it is too short")
        magic, valid, version, sectors = _HEADER.unpack(head)
        if magic == 0:
            return {}
        if magic != _MAGIC or version != 1:
            raise self._damaged("it is no store of device mapper's")
        if not valid:
            raise self._damaged("the system ran out of space for it, and what was written is incomplete")
        self._chunk = sectors * _SECTOR
        if not _SECTOR * 2 <= self._chunk <= _LARGEST or self._chunk & (self._chunk - 1):
            raise self._damaged(f"its chunks have {sectors} sectors")
        return self._pairs()

    def _pairs(self) -> dict[int, int]:
        found: dict[int, int] = {}
        per = self._chunk // _PAIR.size
        length, area = self._file.length(), 0
        while True:
            at = (1 + area * (per + 1)) * self._chunk
            if at + self._chunk > length:
                return found
            for old, new in _PAIR.iter_unpack(self._file.read(at, self._chunk)):
                if new == 0:
                    return found
                if old * self._chunk >= self.size or (new + 1) * self._chunk > length or old in found:
                    raise self._damaged(f"it leads from chunk {old} to {new}, which cannot be")
                found[old] = new
            area += 1

    def _damaged(self, why: str) -> errors.Corrupt:
        path = self._file.path
        return errors.Corrupt(
            f"the layer {path} cannot be used: {why}", hint="throw it away with 'hvmgr boot revert'", path=str(path)
        )


def opened(path: Path, disk: int) -> Layer:
    """The layer of a disk of that size; Corrupt when it is damaged or was found full."""
    file = File(path)
    try:
        return Layer(file, disk)
    except BaseException:
        file.close()
        raise
