"""What every reader of a file system gives: folders by their names as bytes, what stands in an inode, and contents.

A reader believes nothing: whatever leads out of its volume, round in a circle, or makes no sense is Corrupt. Its work is
bounded by what is on the disk, so that no damage makes it wait.
"""

from __future__ import annotations

import bisect
import contextlib
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple, Protocol, runtime_checkable

from hvmgr import errors
from hvmgr.model.ranges import Range
from hvmgr.storage.filesystems.window import Cached, Run
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
    ``generation`` is of one use of the ``id``: both together mean this file and never another one. None where that cannot be told.
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
    generation: int | None = None

    @property
    def is_folder(self) -> bool:
        """Whether there may be names in it."""
        return self.type is Type.FOLDER


class Segment(NamedTuple):
    """A stretch of a content and what its bytes come from: two that are equal, over the same bytes of a volume, are the same.

    Byte ``n`` lies at ``n + shift`` of the volume or, with ``how``, of what is made of ``places`` ((start, end) of the volume).
    """

    start: int
    end: int
    shift: int
    how: object = None
    places: tuple[Range, ...] = ()

    def cut(self, start: int, end: int) -> Segment:
        """A part of it."""
        return self._replace(start=start, end=end)

    def lies(self) -> tuple[Range, ...]:
        """The bytes of the volume that it comes from."""
        return self.places if self.how is not None else ((self.start + self.shift, self.end + self.shift),)


class Content(Protocol):
    """The bytes of a file or stream."""

    size: int

    def pieces(self, start: int = 0, end: int | None = None) -> Iterator[tuple[int, bytes | memoryview]]:
        """The data in order, each piece with its offset and valid until the next; what is left out reads as zeros.

        Of a range all that lies in it, and perhaps something beside it.
        """

    def segments(self) -> list[Segment]:
        """What each stretch of the data comes from, in order; the rest are zeros. Nothing of the data is read for that."""

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

    def stored(self, node: Node, stream: str = "") -> Content:
        """The same; where only the guest can make sense of them, as they lie there."""

    def watching(self) -> contextlib.AbstractContextManager[list[Range]]:
        """Which bytes of the volume whatever is asked inside the block follows from, besides ``geometry`` and the arguments."""

    def geometry(self) -> Geometry | None:
        """What the reader knows of the volume as a whole; None where that is too much to be kept, and ``departed`` alone tells."""

    def departed(self, other: Reader) -> Sequence[Range] | None:
        """The bytes that answers of another reader may follow from, of this volume at another moment, and answers of this one do not.

        None where an answer may be another one though no byte that it follows from is.
        """

    def replaced(self) -> Sequence[Range]:
        """The places whose bytes the reader takes from elsewhere, for a journal has newer ones."""

    def extras(self, node: Node) -> Mapping[str, bytes]:
        """Extended attributes by their Linux names, with POSIX ACLs and NTFS security descriptors as Linux shows them."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """What says where things lie on a volume; ``table`` grows with the volume, or with what is on it."""

    facts: tuple[object, ...]
    table: tuple[int, ...] = ()

    def goes_on(self, older: Geometry) -> bool:
        """Whether all that could be found by the older one is where it was."""
        return self.facts == older.facts and self.table[: len(older.table)] == older.table


class Watched(ABC):
    """What readers have in common that read through a ``Cached`` alone whatever their answers follow from."""

    _cached: Cached

    @abstractmethod
    def content(self, node: Node, stream: str = "") -> Content: ...

    def stored(self, node: Node, stream: str = "") -> Content:
        return self.content(node, stream)

    def watching(self) -> contextlib.AbstractContextManager[list[Range]]:
        return self._cached.watched()

    def geometry(self) -> Geometry | None:
        return None

    def departed(self, other: Reader) -> Sequence[Range] | None:
        one, another = self.geometry(), other.geometry()
        if not isinstance(other, type(self)) or one is None or another is None:
            return None
        return () if one.goes_on(another) or another.goes_on(one) else None

    def replaced(self) -> Sequence[Range]:
        return ()


@runtime_checkable
class HasShortNames(Protocol):
    """A reader of a file system that knows some files under a second name (8.3) as well."""

    def short_names(self, folder: Node) -> Iterator[tuple[bytes, bytes]]:
        """The short names in a folder, each with the name that ``names`` gives for the same file."""


@runtime_checkable
class HasLabel(Protocol):
    """A reader of a file system whose label is not in its first sectors."""

    def label(self) -> str:
        """What the volume is called; empty if nobody named it."""


@dataclass(slots=True)
class Bytes:
    """A content that is at hand."""

    data: bytes
    size: int = field(init=False)

    def __post_init__(self) -> None:
        self.size = len(self.data)

    def pieces(self, start: int = 0, end: int | None = None) -> Iterator[tuple[int, bytes | memoryview]]:  # noqa: ARG002
        """All of it."""
        if self.data:
            yield 0, self.data

    def segments(self) -> list[Segment]:
        """The bytes themselves."""
        return [Segment(0, self.size, 0, self.data)] if self.size else []

    def ranges(self) -> list[tuple[int, int]]:
        """All of it."""
        return [(0, self.size)] if self.size else []


class Runs:
    """A content that lies on the disk in runs; bytes from ``valid`` on read as zeros."""

    def __init__(self, disk: Disk, runs: Sequence[Run], size: int, valid: int | None = None) -> None:
        self._disk, self._runs = disk, runs
        self.size = possible(size)
        self._end = size if valid is None else min(size, valid)
        self._segments: list[Segment] | None = None

    def pieces(self, start: int = 0, end: int | None = None) -> Iterator[tuple[int, bytes | memoryview]]:
        """The data; holes are left out."""
        last = self._end if end is None else min(end, self._end)
        buffer = memoryview(bytearray(min(PIECE, max(1, last - start))))
        segments = self.segments()
        for number in range(bisect.bisect_right(segments, start, key=lambda one: one.end), len(segments)):
            first, stop, shift, *_ = segments[number]
            if first >= last:
                return
            for offset in range(max(first, start), min(stop, last), PIECE):
                piece = buffer[: min(PIECE, stop - offset, last - offset)]
                self._disk.read_into(offset + shift, piece)
                yield offset, piece

    def segments(self) -> list[Segment]:
        """The runs that are not holes."""
        if self._segments is None:
            self._segments = list(self._found())
        return self._segments

    def _found(self) -> Iterator[Segment]:
        at = 0
        for length, start in joined(self._runs):
            if at >= self._end:
                break
            if start is not None:
                yield Segment(at, min(at + length, self._end), start - at)
            at += length

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
