"""The bytes of an image's disk, whatever its format: read through one shape, and written into a new image.

VHD is read by our own codec with its whole chain, raw as it is, everything else through a storage daemon of ours, which
is told the format. What is copied goes in large pieces, and blocks of zeros are never written.
"""

from __future__ import annotations

import contextlib
import heapq
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

from hvmgr.host import image_locks, nbd_client, qemu_img, storage_daemon
from hvmgr.host.nbd_client import Client
from hvmgr.model.image_format import ImageFormat
from hvmgr.model.progress import Progress
from hvmgr.operations.images import recognition
from hvmgr.operations.images.recognition import Recognised
from hvmgr.storage import allocation, durable
from hvmgr.vhd.source import RawSource, Source, Stretch

Report = Callable[[Progress], None]

_PIECE = 4 << 20
_CLUSTER = 64 << 10  # what is looked at for zeros or for differences: a qcow2 cluster
_PAGE = 4 << 10  # the least that differs in a VHD, as it is aligned there
_ZEROS = bytes(_PIECE)


class QemuSource:
    """A disk that a storage daemon serves; ``extents`` are (start, length, holds data), ascending and without gaps."""

    def __init__(self, client: Client, extents: list[tuple[int, int, bool]]) -> None:
        self._client = client
        self._extents = extents
        self.size = client.size

    def stretches(self, offset: int = 0, length: int | None = None) -> Iterator[Stretch]:
        """What the range holds."""
        end = self.size if length is None else offset + length
        for start, count, data in self._extents:
            first, last = max(start, offset), min(start + count, end)
            if first < last:
                yield Stretch(first, last - first, data)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """The bytes of the disk."""
        self._client.read_into(offset, buffer)


class Difference:
    """What differs between two disks, as the content of a differencing image: its data, be that zeros or not."""

    def __init__(self, source: Source, parent: Source, what: str, report: Report) -> None:
        self._source, self._parent = source, parent
        self._what, self._report = what, report
        self.size = source.size

    def stretches(self, offset: int = 0, length: int | None = None) -> Iterator[Stretch]:
        """The ranges that differ, in multiples of 4 KiB; nothing of the rest."""
        assert (offset, length) == (0, None), "a difference is asked for as a whole"
        found = differences(self._source, self._parent, what=self._what, report=self._report, unit=_PAGE)
        for start, piece in found:
            yield Stretch(start, len(piece), data=True)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """The bytes of the disk."""
        self._source.read_into(offset, buffer)


class Part:
    """A range of a disk, as a disk."""

    def __init__(self, disk: Source, offset: int, size: int) -> None:
        self._disk, self._offset, self.size = disk, offset, size

    def stretches(self, offset: int = 0, length: int | None = None) -> Iterator[Stretch]:
        """What the range holds, counted from its start."""
        count = self.size - offset if length is None else length
        for one in self._disk.stretches(self._offset + offset, count):
            yield Stretch(one.offset - self._offset, one.length, one.data)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """The bytes of the disk."""
        self._disk.read_into(self._offset + offset, buffer)


class Writable(Source, Protocol):
    """A disk that is written in place."""

    def write(self, offset: int, data: memoryview) -> None:
        """The bytes of the buffer stand there."""

    def write_zeros(self, offset: int, length: int) -> None:
        """The range reads as zeros."""

    def flush(self) -> None:
        """All that was written is on disk."""


class _WritableQemu(QemuSource):
    """A disk that a storage daemon serves for writing."""

    def write(self, offset: int, data: memoryview) -> None:
        """The bytes of the buffer stand there."""
        self._client.write(offset, data)

    def write_zeros(self, offset: int, length: int) -> None:
        """The range reads as zeros."""
        self._client.write_zeroes(offset, length)

    def flush(self) -> None:
        """All that was written is on disk."""
        self._client.flush()


@contextlib.contextmanager
def written(path: Path, fmt: str) -> Iterator[Writable]:
    """The disk of an image, to be written in place; no other program has the image open meanwhile.

    Of a differencing one the image itself is written, never its parents.
    """
    if fmt == ImageFormat.VHD.value:
        from hvmgr import vhd

        with image_locks.held(path), vhd.open_chain(path, writable=True) as chain:
            yield chain
        return
    found = recognition.look(path, ImageFormat(fmt))
    extents = [(0, found.size, True)]
    if found.format is ImageFormat.QCOW2:
        extents = _extents(found, found.size)
    elif found.format is ImageFormat.RAW:
        with RawSource(path) as raw:
            extents = [(one.offset, one.length, one.data) for one in raw.stretches()]
    with _served(path, found.driver, writable=True) as client:
        yield _WritableQemu(client, extents)


def write_part(disk: Writable, source: Source, offset: int, *, what: str, report: Report) -> None:
    """The range of a disk from ``offset`` on holds what ``source`` does; only what differs is written."""
    part = Part(disk, offset, source.size)
    for start, piece in differences(source, part, what=what, report=report):
        for first, last, is_zero in runs(piece):
            if is_zero:
                disk.write_zeros(offset + start + first, last - first)
            else:
                disk.write(offset + start + first, piece[first:last])
    disk.flush()


def copy_out(disk: Source, target: Path, *, what: str, report: Report) -> None:
    """A new file is as long as the disk and holds its bytes; zeros are holes."""
    allocation.make_sized(target, disk.size, filled=False)
    with durable.explained(target), target.open("r+b", buffering=0) as file:
        for offset, piece in pieces(disk, what, report):
            for start, end, is_zero in runs(piece):
                if not is_zero:
                    place, view = offset + start, piece[start:end]
                    while view:
                        count = os.pwrite(file.fileno(), view, place)
                        place, view = place + count, view[count:]


@contextlib.contextmanager
def opened(found: Recognised) -> Iterator[Source]:
    """The disk of an image with its whole chain, for reading."""
    if found.format is ImageFormat.VHD:
        from hvmgr import vhd

        with vhd.open_chain(found.path, folders=found.folders) as chain:
            yield chain
    elif found.format is ImageFormat.RAW:
        with RawSource(found.path) as raw:
            yield raw
    else:
        with _served(found.path, found.driver, writable=False) as client:
            yield QemuSource(client, _extents(found, client.size))


def _extents(found: Recognised, size: int) -> list[tuple[int, int, bool]]:
    if found.format is not ImageFormat.QCOW2:
        return [(0, size, True)]  # QEMU knows no holes of the others
    recognition.require_no_differencing_below(found.path)
    return [(one.start, one.length, one.data and not one.zero) for one in qemu_img.map(found.path, "qcow2")]


@contextlib.contextmanager
def _served(path: Path, driver: str, *, writable: bool) -> Iterator[Client]:
    with storage_daemon.started() as daemon:
        node = daemon.open(path, driver, writable=writable)
        with daemon.exported(node, writable=writable) as uri, nbd_client.connected(uri) as client:
            yield client


def write_qemu(path: Path, driver: str, source: Source, *, what: str, report: Report) -> None:
    """The disk's bytes go into an image that was just created, empty and with nothing below it."""
    with durable.explained(path), _served(path, driver, writable=True) as client:
        for offset, piece in pieces(source, what, report):
            for start, end, is_zero in runs(piece):
                if not is_zero:
                    client.write(offset + start, piece[start:end])
        client.flush()


def write_difference(path: Path, source: Source, parent: Source, *, what: str, report: Report) -> None:
    """What differs between two disks goes into an empty qcow2 child of the second one."""
    with durable.explained(path), _served(path, "qcow2", writable=True) as client:
        for offset, piece in differences(source, parent, what=what, report=report):
            if piece.nbytes == 0:
                continue
            for start, end, is_zero in runs(piece):
                if is_zero:
                    client.write_zeroes(offset + start, end - start)
                else:
                    client.write(offset + start, piece[start:end])
        client.flush()


def pieces(source: Source, what: str, report: Report) -> Iterator[tuple[int, memoryview]]:
    """The data of a disk in order; a piece is valid until the next one is asked for."""
    buffer = memoryview(bytearray(_PIECE))
    for stretch in source.stretches():
        report(Progress(stretch.offset, source.size, what))
        if not stretch.data:
            continue
        for offset in range(stretch.offset, stretch.offset + stretch.length, _PIECE):
            piece = buffer[: min(_PIECE, stretch.offset + stretch.length - offset)]
            source.read_into(offset, piece)
            yield offset, piece
            report(Progress(offset + len(piece), source.size, what))
    report(Progress(source.size, source.size, what))


def runs(piece: memoryview) -> Iterator[tuple[int, int, bool]]:
    """A piece as runs of zeros and of anything else (start, end, is zero), in clusters."""
    if piece.tobytes() == _ZEROS[: len(piece)]:
        yield 0, len(piece), True
        return
    start, before = 0, False
    for offset in range(0, len(piece), _CLUSTER):
        part = piece[offset : offset + _CLUSTER]
        is_zero = part.tobytes() == _ZEROS[: len(part)]
        if offset and is_zero != before:
            yield start, offset, before
            start = offset
        before = is_zero
    yield start, len(piece), before


def differences(
    source: Source, parent: Source, *, what: str, report: Report, unit: int = _CLUSTER
) -> Iterator[tuple[int, memoryview]]:
    """Where the first disk differs from the second, in order, in multiples of ``unit``: (offset, its bytes there).

    A parent that is shorter counts as zeros behind its end. What is a hole in both is not read.
    """
    mine, theirs = memoryview(bytearray(_PIECE)), memoryview(bytearray(_PIECE))
    for offset, length in _to_compare(source, parent):
        for start in range(offset, offset + length, _PIECE):
            count = min(_PIECE, offset + length - start)
            report(Progress(start, source.size, what))
            source.read_into(start, mine[:count])
            _read_padded(parent, start, theirs[:count])
            for first, last in _unequal(mine[:count], theirs[:count], unit):
                yield start + first, mine[first:last]
    report(Progress(source.size, source.size, what))


def is_same(source: Source, other: Source, *, what: str, report: Report) -> bool:
    """Whether two disks have one size and the same bytes."""
    return source.size == other.size and next(differences(source, other, what=what, report=report), None) is None


def _to_compare(source: Source, parent: Source) -> Iterator[tuple[int, int]]:
    """The ranges of the first disk in which either of the two holds data, in whole clusters."""
    edges = heapq.merge(_data_edges(source), _data_edges(parent))
    start = end = -1
    for data_start, data_end in edges:
        first, last = data_start // _CLUSTER * _CLUSTER, min(-(-data_end // _CLUSTER) * _CLUSTER, source.size)
        if first >= source.size:
            break
        if first > end:
            if end > start:
                yield start, end - start
            start, end = first, last
        end = max(end, last)
    if end > start:
        yield start, end - start


def _data_edges(disk: Source) -> Iterable[tuple[int, int]]:
    return ((one.offset, one.offset + one.length) for one in disk.stretches() if one.data)


def _read_padded(disk: Source, offset: int, buffer: memoryview) -> None:
    inside = max(0, min(len(buffer), disk.size - offset))
    if inside:
        disk.read_into(offset, buffer[:inside])
    if inside < len(buffer):
        buffer[inside:] = bytes(len(buffer) - inside)


def _unequal(mine: memoryview, theirs: memoryview, unit: int) -> Iterator[tuple[int, int]]:
    if mine.tobytes() == theirs.tobytes():
        return
    start: int | None = None
    for offset in range(0, len(mine), unit):
        if mine[offset : offset + unit].tobytes() != theirs[offset : offset + unit].tobytes():
            start = offset if start is None else start
        elif start is not None:
            yield start, offset
            start = None
    if start is not None:
        yield start, len(mine)
