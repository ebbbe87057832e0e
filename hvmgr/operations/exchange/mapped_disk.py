"""The disk of a chain that QEMU reads, as a ``Source`` of the codec: bytes are taken straight from the images' files.

``qemu-img map`` says where each range lies. What is compressed or encrypted in its file is not there as it is: then all
the disk's bytes come from an uncompressed copy, made beside the target and without a name that outlives us.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

from hvmgr.host import qemu_img
from hvmgr.host.qemu_img import Extent
from hvmgr.storage import durable, images
from hvmgr.vhd.file import File
from hvmgr.vhd.source import Place, Stretch

Reader = Callable[[int, memoryview], None]


class MappedDisk:
    """``own``: how many images, counted from the top, make up what it holds; None means the whole disk.

    Of the whole disk zeros are no data. Of a part everything counts that these images say, be it zeros: the rest is their
    parent's. Bytes are those of the whole disk in either case. What is not in a file as it is comes from ``plain``, a copy of
    the whole disk, or by ``reader``.
    """

    def __init__(
        self,
        chain: Sequence[Path],
        extents: Sequence[Extent],
        *,
        size: int,
        own: int | None = None,
        plain: Path | None = None,
        reader: Reader | None = None,
    ) -> None:
        self.size = size
        self._extents = list(extents)
        self._starts = [one.start for one in self._extents]
        self._own = own
        self._reader = reader
        self._files: list[File] = []
        for path in chain if plain is None else [plain]:
            self._files.append(File(path))
        self._lengths = [file.length() for file in self._files]
        self._is_plain = plain is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """The files are closed."""
        for file in self._files:
            file.close()

    @property
    def extents(self) -> list[Extent]:
        """Where everything lies."""
        return self._extents

    def stretches(self, offset: int = 0, length: int | None = None) -> Iterator[Stretch]:
        """What the range holds, neighbours of one kind joined."""
        end = self.size if length is None else offset + length
        pending = Stretch(offset, 0, data=False)
        for one in self._within(offset, end):
            start, stop = max(one.start, offset), min(one.start + one.length, end)
            has_data = self._holds(one)
            if pending.length and pending.data != has_data:
                yield pending
                pending = Stretch(start, 0, has_data)
            pending = Stretch(pending.offset, stop - pending.offset, has_data)
        if pending.length:
            yield pending

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Bytes of the disk."""
        end = offset + len(buffer)
        for one in self._within(offset, end):
            start, stop = max(one.start, offset), min(one.start + one.length, end)
            part = buffer[start - offset : stop - offset]
            if not one.data or one.zero:
                part[:] = bytes(len(part))
            elif self._is_plain:
                _read(self._files[0], start, part)
            elif one.offset is not None:
                _read(self._files[one.depth], one.offset + start - one.start, part)
            else:
                assert self._reader is not None
                self._reader(start, part)

    def places(self, offset: int = 0, length: int | None = None) -> Iterator[Place]:
        """Where the bytes of the range are; it ends before the first that is in no file as it is."""
        end = self.size if length is None else offset + length
        for one in self._within(offset, end):
            start, stop = max(one.start, offset), min(one.start + one.length, end)
            if not one.data or one.zero:
                yield Place(start, stop - start, None, 0)
                continue
            number = 0 if self._is_plain else one.depth
            position = start if self._is_plain else None if one.offset is None else one.offset + start - one.start
            if position is None or position + stop - start > self._lengths[number]:
                return
            yield Place(start, stop - start, self._files[number], position)

    def _holds(self, one: Extent) -> bool:
        if self._own is None:
            return one.data and not one.zero
        return one.present and one.depth < self._own

    def _within(self, offset: int, end: int) -> Iterator[Extent]:
        first = max(0, bisect.bisect_right(self._starts, offset) - 1)
        for number in range(first, len(self._extents)):
            one = self._extents[number]
            if one.start >= end:
                return
            if one.start + one.length > offset:
                yield one


@contextlib.contextmanager
def opened(
    chain: Sequence[tuple[Path, str]], *, own: int | None, beside: Path, force_share: bool = False
) -> Iterator[MappedDisk]:
    """The disk of ``chain`` (path and format, the top first) for reading; ``beside`` is where a plain copy may be made."""
    top, fmt = chain[0]
    size = images.read(top, fmt).size
    extents = qemu_img.map(top, fmt, force_share=force_share)
    plain = None
    if any(one.data and not one.zero and one.offset is None for one in extents):
        plain = beside.with_name(f"{durable.TEMPORARY}{beside.name}.raw")
        durable.remove(plain)
        qemu_img.flatten(top, fmt, plain, target_fmt=images.RAW, force_share=force_share)
    try:
        with MappedDisk([path for path, _ in chain], extents, size=size, own=own, plain=plain) as disk:
            if plain is not None:
                durable.remove(plain)  # as long as it is open it is there
            yield disk
    finally:
        if plain is not None:
            durable.remove(plain)


def _read(file: File, offset: int, part: memoryview) -> None:
    """The whole part; behind the end of a raw file, whose last sector need not be whole, are zeros."""
    inside = max(0, min(len(part), file.length() - offset))
    file.read_into(offset, part[:inside])
    part[inside:] = bytes(len(part) - inside)
