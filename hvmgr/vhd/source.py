"""What a disk looks like to whoever copies it: its size, where its data is, and its bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol, Self, runtime_checkable

from hvmgr.vhd.file import File


class Stretch(NamedTuple):
    """A range of a disk; where ``data`` is False it reads as zeros."""

    offset: int
    length: int
    data: bool


class Source(Protocol):
    """A disk that can be read."""

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    def stretches(self, offset: int = 0, length: int | None = None) -> Iterator[Stretch]:
        """What the range holds: ascending, without gaps, neighbours not always joined."""
        ...

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills the whole buffer with the bytes from ``offset`` on; the range lies within the disk."""
        ...


class Place(NamedTuple):
    """A range of a disk and where its bytes stand in a file just as they are; without a file it reads as zeros."""

    offset: int
    length: int
    file: File | None
    position: int


@runtime_checkable
class Placed(Source, Protocol):
    """A disk whose bytes lie in files, so that the kernel can move them."""

    def places(self, offset: int = 0, length: int | None = None) -> Iterator[Place]:
        """Where the bytes of the range are: ascending, without gaps."""
        ...


class RawSource:
    """A raw file or block device as a disk; its holes are zeros."""

    def __init__(self, path: Path) -> None:
        self._file = File(path)
        self.size = self._file.length()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """The file is closed."""
        self._file.close()

    def stretches(self, offset: int = 0, length: int | None = None) -> Iterator[Stretch]:
        """Data and holes, as the file system knows them."""
        end = self.size if length is None else offset + length
        for start, stop in self._file.data_ranges(offset, end):
            if start > offset:
                yield Stretch(offset, start - offset, data=False)
            yield Stretch(start, stop - start, data=True)
            offset = stop
        if offset < end:
            yield Stretch(offset, end - offset, data=False)

    def places(self, offset: int = 0, length: int | None = None) -> Iterator[Place]:
        """Each byte of the disk is at its own offset."""
        for start, count, data in self.stretches(offset, length):
            yield Place(start, count, self._file if data else None, start)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Bytes of the file."""
        self._file.read_into(offset, buffer)


def read(source: Source, offset: int, length: int) -> bytes:
    """Bytes of a disk, for small pieces."""
    buffer = bytearray(length)
    source.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def clear(buffer: memoryview) -> None:
    """The whole buffer becomes zeros."""
    for at in range(0, len(buffer), len(_ZEROS)):
        piece = buffer[at : at + len(_ZEROS)]
        piece[:] = _ZEROS[: len(piece)]


def is_zero(piece: bytes | bytearray | memoryview) -> bool:
    """Whether there are only zeros."""
    length, step, view = len(piece), len(_ZEROS), memoryview(piece)
    if length and (view[0] or view[-1] or view[length // 2]):
        return False
    return all(view[at : at + step].tobytes() == _ZEROS[: min(step, length - at)] for at in range(0, length, step))


_ZEROS = bytes(64 << 10)
