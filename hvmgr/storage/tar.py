"""Writes a tar archive as a stream, with the holes of files as holes (POSIX pax, GNU sparse format 1.0).

GNU tar, bsdtar and Python's tarfile read it; nothing is held in memory and nothing is read twice.
"""

from __future__ import annotations

import itertools
import os
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from hvmgr import errors
from hvmgr.storage import copy, durable, holes

_BLOCK = 512
_END = bytes(2 * _BLOCK)
_SIZE_MAX = (1 << 63) - 1

Sink = Callable[[memoryview], None]


class Writer:
    """An archive under way; ``sink`` takes its bytes. Everything in it belongs to root."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._moment = int(time.time())

    def folder(self, name: str, *, mode: int) -> None:
        """An entry for a folder."""
        info = self._info(name, mode)
        info.type = tarfile.DIRTYPE
        self._put(info.tobuf(tarfile.PAX_FORMAT))

    def file(self, name: str, source: Path, *, mode: int, on_read: Callable[[int], None] | None = None) -> str:
        """A file with the bytes of ``source``, whose hash is the answer. Conflict when it changes meanwhile."""
        with durable.explained(source), source.open("rb", buffering=0) as reader:
            before, size = os.fstat(reader.fileno()), copy.length_of(reader.fileno())
            ranges = list(holes.data_ranges(reader.fileno(), size))
            data = sum(end - start for start, end in ranges)
            info = self._info(name, mode)
            table = b"" if data == size else _table(ranges, size)
            if table:
                _make_sparse(info, size)
            info.size = data + len(table)
            self._put(info.tobuf(tarfile.PAX_FORMAT) + table)
            digest, written = copy.Digest(), 0
            for start, piece in copy.pieces(reader.fileno(), size):
                if written + len(piece) > data:
                    break  # somebody fills its holes: said below
                digest.update(start, piece)
                self._sink(piece)
                written += len(piece)
                if on_read is not None:
                    on_read(len(piece))
            copy.require_same(source, before, os.fstat(reader.fileno()))
            if written != data:
                raise errors.Conflict(f"{source} was changed while it was read")
            self._put(bytes(-data % _BLOCK))
            return digest.finish(size)

    def content(
        self,
        info: tarfile.TarInfo,
        size: int,
        ranges: list[tuple[int, int]],
        pieces: Iterator[tuple[int, bytes | memoryview]],
    ) -> None:
        """A file described by ``info`` (with pax headers, if it likes): its data in ``ranges`` comes in ``pieces``.

        Whatever cannot be read is known before the header is written where that is possible, and then nothing is. Behind the
        header it is HostFailed: the archive has no end.
        """
        if size > _SIZE_MAX:
            raise errors.Unsupported("files larger than a file can be")
        name = info.name
        first = next(pieces, None)
        pieces = pieces if first is None else itertools.chain((first,), pieces)
        data = sum(end - start for start, end in ranges)
        table = b"" if data == size else _table(ranges, size)
        if table:
            own = info.pax_headers
            _make_sparse(info, size)
            info.pax_headers = {**own, **info.pax_headers}
        info.size = data + len(table)
        self.header(info)
        self._put(table)
        try:
            written = self._data(size, ranges, pieces)
        except (errors.Unsupported, errors.Corrupt) as error:
            raise _torn(name, error.message) from error
        if written != data:
            raise _torn(name, f"it has {written} bytes where {data} were expected")
        self._put(bytes(-info.size % _BLOCK))

    def _data(self, size: int, ranges: list[tuple[int, int]], pieces: Iterator[tuple[int, bytes | memoryview]]) -> int:
        """The bytes in the stretches, those that no piece has as zeros; how many these were."""
        bounds = [(start, end) for start, end in ranges if start < end]
        at = bounds[0][0] if bounds else 0
        written = 0
        for offset, piece in pieces:
            for start, end in _between(bounds, at, offset):
                self._zeros(end - start)
                written += end - start
            self._sink(memoryview(piece))
            written += len(piece)
            at = offset + len(piece)
        for start, end in _between(bounds, at, size):
            self._zeros(end - start)
            written += end - start
        return written

    def header(self, info: tarfile.TarInfo) -> None:
        """An entry that has no data of its own: a folder, a link, a device. Unsupported for what no header can say."""
        try:
            found = info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
        except ValueError as error:  # a number too large for its field, a word that is no text
            raise errors.Unsupported("what the header of a tar archive cannot say") from error
        self._put(found)

    def _zeros(self, count: int) -> None:
        for at in range(0, count, 1 << 20):
            self._put(bytes(min(1 << 20, count - at)))

    def end(self) -> None:
        """The archive is complete."""
        self._put(_END)

    def _info(self, name: str, mode: int) -> tarfile.TarInfo:
        info = tarfile.TarInfo(name)
        info.mode, info.mtime = mode, self._moment
        info.uname = info.gname = "root"
        return info

    def _put(self, data: bytes) -> None:
        if data:
            self._sink(memoryview(data))


def _torn(name: str, why: str) -> errors.HostFailed:
    return errors.HostFailed(
        f"{name}: {why}: the archive is not whole",
        hint="take the others without it, or into a folder, without --archive",
    )


def _between(bounds: list[tuple[int, int]], start: int, end: int) -> Iterator[tuple[int, int]]:
    """The parts of the stretches that lie between two places."""
    for first, last in bounds:
        if max(first, start) < min(last, end):
            yield max(first, start), min(last, end)


def _table(ranges: list[tuple[int, int]], size: int) -> bytes:
    """Where the data belongs: count, then offset and length of each run, and the end of the file."""
    rows = [(start, end - start) for start, end in ranges]
    if not rows or sum(rows[-1]) < size:
        rows.append((size, 0))
    text = "".join(f"{number}\n" for number in (len(rows), *(value for row in rows for value in row))).encode()
    return text + bytes(-len(text) % _BLOCK)


def _make_sparse(info: tarfile.TarInfo, size: int) -> None:
    folder, _, name = info.name.rpartition("/")
    real = info.name
    info.name = f"{folder}/GNUSparseFile.0/{name}" if folder else f"GNUSparseFile.0/{name}"
    info.pax_headers = {
        "path": info.name,  # in front of the true name: Python's tarfile takes the last of both
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": real,
        "GNU.sparse.realsize": str(size),
    }
