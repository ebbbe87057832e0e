"""A differencing disk with all its parents, read and written as the one disk that it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Self

from hvmgr import errors
from hvmgr.vhd import parents, rules
from hvmgr.vhd.format import Kind
from hvmgr.vhd.image import ZEROS, Extent, Image, open_image, whole_sectors
from hvmgr.vhd.rules import Fault
from hvmgr.vhd.source import Place, Stretch, clear

_ZEROS = bytes(1 << 20)
MAX_DEPTH = 256  # files in a chain; each costs a file handle


class Piece(NamedTuple):
    """A range of the disk and where its bytes stand: in which image of the chain.

    ``level`` is None where nobody holds them: ``position`` then says whether the images below would be asked (``image.ABSENT``) or
    a shorter image hides them (``image.ZEROS``).
    """

    offset: int
    length: int
    level: int | None
    position: int


def open_chain(
    path: Path | str,
    *,
    writable: bool = False,
    folders: Sequence[Path] = (),
    windows_paths: Mapping[str, Path] | None = None,
    parent: Path | None = None,
    ignore_id: bool = False,
    any_size: bool = False,
    tolerant: bool = False,
) -> Chain:
    """A VHD with its parents, each found as ``find_parent`` says; only the first is writable.

    ``parent`` names the parent of the first file. A parent of another size is a Conflict unless ``any_size``: then the
    smaller one counts as filled up with zeros. NotFound, Conflict and Corrupt name the file that they are about.
    """
    images = [open_image(path, writable=writable, tolerant=tolerant)]
    faults: list[Fault] = list(images[0].structure.faults)
    seen = {images[0].file.identity()}
    try:
        while images[-1].kind is Kind.DIFFERENCING:
            child = images[-1]
            found = parents.find_parent(
                child, parent=parent, folders=folders, windows_paths=windows_paths, ignore_id=ignore_id
            )
            parent = None
            images.append(_open_parent(child, found, tolerant=tolerant))
            _require_new(images, seen)
            faults += [*images[-1].structure.faults, *_compare(child, images[-1], any_size=any_size)]
        return Chain(images, tuple(faults))
    except BaseException:
        for image in images:
            image.file.close()
        raise


def _open_parent(child: Image, path: Path, *, tolerant: bool) -> Image:
    try:
        return open_image(path, tolerant=tolerant)
    except errors.HvmgrError as error:
        raise rules.fault("F48", text=str(error), answer=type(error), path=child.path).error() from error


def _require_new(images: Sequence[Image], seen: set[tuple[int, int]]) -> None:
    top, last = images[0].path, images[-1]
    if last.file.identity() in seen:
        raise rules.fault("F47", path=top, what=f"comes back to {last.path}").error()
    if len(images) > MAX_DEPTH:
        raise rules.fault("F47", path=top, what=f"is longer than {MAX_DEPTH} files").error()
    seen.add(last.file.identity())


def _compare(child: Image, parent: Image, *, any_size: bool) -> Iterator[Fault]:
    """What a child and its parent do not agree about."""
    if child.size != parent.size and not any_size:
        raise rules.fault("F46", path=child.path, size=child.size, parent=parent.path, found=parent.size).error()
    assert child.header is not None
    if not parents.has_time(parent, child.header.parent_time):
        yield rules.fault(
            "F44", path=child.path, parent=parent.path, found=parent.footer.time, wanted=child.header.parent_time
        )


class Chain:
    """An open chain: ``images``, the top first. A ``Source`` of the whole disk."""

    def __init__(self, images: Sequence[Image], faults: tuple[Fault, ...] = ()) -> None:
        self.images = list(images)
        self.faults = faults  # of all files: those that reading goes on over

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def top(self) -> Image:
        """The file that the disk is named by."""
        return self.images[0]

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self.top.size

    def pieces(self, offset: int = 0, length: int | None = None, *, depth: int | None = None) -> Iterator[Piece]:
        """Where the bytes of a range stand, ascending and without gaps; ``depth``: in the first so many images only.

        The cost is that of the runs of data in the range, whatever the length of the chain.
        """
        limit = len(self.images) if depth is None else depth
        end = self.size if length is None else offset + length
        stack: list[tuple[int, Iterator[Extent]]] = [(0, self.images[0].extents(offset, end - offset))]
        while stack:
            level, extents = stack[-1]
            extent = next(extents, None)
            if extent is None:
                stack.pop()
            elif extent.is_held:
                yield Piece(extent.offset, extent.length, level, extent.position)
            elif level + 1 >= limit or extent.position == ZEROS:
                yield Piece(extent.offset, extent.length, None, extent.position)
            else:
                stack.append((level + 1, _bounded(self.images[level + 1], extent)))

    def stretches(self, offset: int = 0, length: int | None = None) -> Iterator[Stretch]:
        """Data and zeros of the whole disk."""
        pending: Stretch | None = None
        for piece in self.pieces(offset, length):
            has_data = piece.level is not None
            if pending is not None and pending.data == has_data:
                pending = Stretch(pending.offset, pending.length + piece.length, has_data)
            else:
                if pending is not None:
                    yield pending
                pending = Stretch(piece.offset, piece.length, has_data)
        if pending is not None:
            yield pending

    def places(self, offset: int = 0, length: int | None = None) -> Iterator[Place]:
        """In which of the files the bytes of the range are."""
        for piece in self.pieces(offset, length):
            file = None if piece.level is None else self.images[piece.level].file
            yield Place(piece.offset, piece.length, file, piece.position)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """The bytes of the disk."""
        for piece in self.pieces(offset, len(buffer)):
            part = buffer[piece.offset - offset :][: piece.length]
            if piece.level is None:
                clear(part)
            else:
                self.images[piece.level].file.read_into(piece.position, part)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Into the first image; lasting after ``flush``."""
        if self.top.kind is Kind.DIFFERENCING:
            offset, data = whole_sectors(self, offset, memoryview(data).cast("B"))
        self.top.write(offset, data)

    def write_zeros(self, offset: int, length: int) -> None:
        """The range reads as zeros; where it does so already, nothing is written and no space taken."""
        for stretch in list(self.stretches(offset, length)):
            for at in range(0, stretch.length if stretch.data else 0, len(_ZEROS)):
                self.write(stretch.offset + at, memoryview(_ZEROS)[: stretch.length - at])

    def flush(self) -> None:
        """All that was written is on the disk."""
        self.top.flush()

    def close(self) -> None:
        """All files are closed."""
        try:
            self.top.close()
        finally:
            for image in self.images[1:]:
                image.close()


def _bounded(image: Image, extent: Extent) -> Iterator[Extent]:
    """What a parent holds of a range; behind its own end it counts as zeros, whatever its own parents have there."""
    end = extent.offset + extent.length
    stop = max(extent.offset, min(end, image.size))
    yield from image.extents(extent.offset, stop - extent.offset)
    if stop < end:
        yield Extent(stop, end - stop, ZEROS)
