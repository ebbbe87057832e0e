"""What every reader of a file system gives: folders by their names as bytes, what stands in an inode, and contents.

A reader believes nothing: whatever leads out of its volume, round in a circle, or makes no sense is Corrupt. Its work is
bounded by what is on the disk, so that no damage makes it wait.
"""

from __future__ import annotations

import contextlib
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from hvmgr import errors
from hvmgr.storage.filesystems.window import Run
from hvmgr.storage.partitions import Disk

PIECE = 4 << 20


class Type(StrEnum):
    """What a name stands for."""

    FILE = "file"
    FOLDER = "folder"
    LINK = "link"
    BLOCK = "block-device"
    CHARACTER = "character-device"
    PIPE = "pipe"
    SOCKET = "socket"
    OTHER = "other"  # known to its own system only


@dataclass(frozen=True, slots=True)
class Node:
    """One file, folder or link. What its file system has no word for is None; times are nanoseconds since 1970, UTC.

    ``id`` is the same for all names of one file; ``ref`` is the reader's own. ``streams``: named streams and their sizes.
    """

    id: int
    ref: Any
    type: Type
    size: int
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    links: int = 1
    modified: int | None = None
    changed: int | None = None
    accessed: int | None = None
    born: int | None = None
    target: bytes | None = None
    device: tuple[int, int] | None = None
    streams: tuple[tuple[str, int], ...] = ()
    attributes: tuple[str, ...] = ()
    used: int | None = None  # bytes that it takes on its volume

    @property
    def is_folder(self) -> bool:
        """Whether there may be names in it."""
        return self.type is Type.FOLDER


class Content(Protocol):
    """The bytes of a file or stream."""

    size: int

    def pieces(self) -> Iterator[tuple[int, bytes | memoryview]]:
        """The data in order, each piece with its offset and valid until the next; what is left out reads as zeros."""

    def ranges(self) -> list[tuple[int, int]]:
        """Where all of the data is: (start, end) of each stretch; ``pieces`` gives nothing outside."""


class Reader(Protocol):
    """One file system. ``title`` says in a few words what reads it, ``notes`` what whoever reads should know."""

    title: str
    notes: list[str]
    ignores_case: bool

    def root(self) -> Node:
        """The topmost folder."""

    def names(self, folder: Node) -> Iterator[tuple[bytes, Any]]:
        """The names in a folder, each with what ``stat`` takes; without ``.`` and ``..``."""

    def stat(self, ref: Any) -> Node:
        """What the inode says."""

    def content(self, node: Node, stream: str = "") -> Content:
        """The bytes of a file, or of a named stream of it."""

    def extras(self, node: Node) -> Mapping[str, bytes]:
        """Extended attributes by their Linux names, with POSIX ACLs and NTFS security descriptors as Linux shows them."""


@dataclass(slots=True)
class Bytes:
    """A content that is at hand."""

    data: bytes
    size: int = field(init=False)

    def __post_init__(self) -> None:
        self.size = len(self.data)

    def pieces(self) -> Iterator[tuple[int, bytes | memoryview]]:
        """All of it."""
        if self.data:
            yield 0, self.data

    def ranges(self) -> list[tuple[int, int]]:
        """All of it."""
        return [(0, self.size)] if self.size else []


class Runs:
    """A content that lies on the disk in runs; bytes from ``valid`` on read as zeros."""

    def __init__(self, disk: Disk, runs: Sequence[Run], size: int, valid: int | None = None) -> None:
        self._disk, self._runs = disk, runs
        self.size = possible(size)
        self._end = size if valid is None else min(size, valid)

    def pieces(self) -> Iterator[tuple[int, bytes | memoryview]]:
        """The data; holes are left out."""
        buffer = memoryview(bytearray(min(PIECE, max(1, self._end))))
        at = 0
        for length, start in joined(self._runs):
            end = min(at + length, self._end)
            if start is not None:
                for offset in range(at, end, PIECE):
                    piece = buffer[: min(PIECE, end - offset)]
                    self._disk.read_into(start + offset - at, piece)
                    yield offset, piece
            at += length
            if at >= self._end:
                return

    def ranges(self) -> list[tuple[int, int]]:
        """The runs that are not holes."""
        found: list[tuple[int, int]] = []
        at = 0
        for length, start in joined(self._runs):
            end = min(at + length, self._end)
            if start is not None and at < end:
                before = found.pop()[0] if found and found[-1][1] == at else at
                found.append((before, end))
            at += length
            if at >= self._end:
                break
        return found


def joined(runs: Sequence[Run]) -> Iterator[Run]:
    """Neighbours that follow each other on the disk become one."""
    pending: Run | None = None
    for one in runs:
        if pending is not None and (
            (pending.start is None and one.start is None)
            or (pending.start is not None and one.start == pending.start + pending.length)
        ):
            pending = Run(pending.length + one.length, pending.start)
            continue
        if pending is not None:
            yield pending
        pending = one
    if pending is not None:
        yield pending


def whole(content: Content, limit: int) -> bytes:
    """A content that has to be small; Corrupt where it is not."""
    if content.size > limit:
        raise errors.Corrupt(f"the file system is damaged: {content.size} bytes where at most {limit} can be")
    data = bytearray(content.size)
    for offset, piece in content.pieces():
        data[offset : offset + len(piece)] = piece
    return bytes(data)


@contextlib.contextmanager
def parsing(what: str) -> Iterator[None]:
    """Bytes that cannot be understood are Corrupt, and never a defect."""
    try:
        yield
    except (struct.error, IndexError, ValueError, OverflowError, zlib.error) as error:
        raise damaged(what) from error


def nameable(found: Mapping[str, bytes]) -> dict[str, bytes]:
    """Extended attributes without those that no system can have: a name ends at its first zero."""
    return {name: value for name, value in found.items() if "\0" not in name}


def possible(size: int) -> int:
    """The size of a content; Corrupt where no system has files of that size."""
    if not 0 <= size < 1 << 63:
        raise damaged(f"a content of {size} bytes")
    return size


def damaged(what: str) -> errors.Corrupt:
    """The error for a structure that makes no sense."""
    return errors.Corrupt(
        f"the file system is damaged: {what}",
        hint="have it checked inside the guest, or look at an earlier snapshot: --snapshot SNAP",
    )
