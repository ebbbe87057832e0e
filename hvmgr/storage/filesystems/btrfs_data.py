"""Contents of Btrfs: extents as they are, inline, never written, or compressed by zlib, LZO or zstd."""

from __future__ import annotations

import bisect
import ctypes
import ctypes.util
import functools
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from hvmgr import errors
from hvmgr.storage.filesystems.reader import PIECE, Segment, damaged, parsing, possible

_INLINE, _REGULAR, _PREALLOCATED = 0, 1, 2
_NONE, _ZLIB, _LZO, _ZSTD = 0, 1, 2, 3
_LARGEST_COMPRESSED = 1 << 20  # Btrfs itself compresses 128 KiB at once
_LZO_PAGE = 4096

Read = Callable[[int, int], bytes]
Place = Callable[[int, int], Sequence[tuple[int, int]]]  # (place, length) of each part of a logical range


@dataclass(frozen=True, slots=True)
class Extent:
    """A stretch of a content: ``length`` bytes from ``start`` on, found ``offset`` into an extent on the disk."""

    start: int
    length: int
    compression: int
    inline: bytes | None
    disk: int = 0
    disk_length: int = 0
    offset: int = 0
    whole: int = 0  # the extent's length when it is not compressed


def read_extent(start: int, data: bytes) -> Extent | None:
    """What an item says of a stretch; None for a hole."""
    _, whole, compression, encryption, encoding, kind = struct.unpack_from("<QQBBHB", data)
    if encryption or encoding:
        raise errors.Unsupported("the file is encoded in a way that no reader here knows")
    if kind == _INLINE:
        return Extent(start, whole, compression, data[21:], whole=whole)
    disk, disk_length, offset, length = struct.unpack_from("<QQQQ", data, 21)
    if kind == _PREALLOCATED or disk == 0:
        return None
    if compression and offset + length > whole:
        raise damaged("a file has more of a compressed extent than there is")
    return Extent(start, length, compression, None, disk, disk_length, offset, whole)


class Extents:
    """A content; ``read`` gives logical bytes, ``place`` says where they are."""

    def __init__(self, size: int, extents: Sequence[Extent], read: Read, place: Place) -> None:
        self.size = possible(size)
        self._extents, self._read, self._place = extents, read, place
        at = 0
        for one in extents:
            if one.start < at or one.length < 0:
                raise damaged("a file has overlapping extents")
            at = one.start + one.length

    def pieces(self, start: int = 0, end: int | None = None) -> Iterator[tuple[int, bytes | memoryview]]:
        """The data in order, whole extents of it."""
        last = self.size if end is None else min(end, self.size)
        first = bisect.bisect_right(self._extents, start, key=lambda one: one.start + one.length)
        for number in range(first, len(self._extents)):
            one = self._extents[number]
            end = min(one.start + one.length, self.size)
            if one.start >= last:
                return
            if end <= start:
                continue
            if one.compression or one.inline is not None:
                with parsing("a compressed extent makes no sense"):
                    data = self._expanded(one)[one.offset : one.offset + end - one.start]
                yield one.start, data.ljust(end - one.start, b"\0")
                continue
            stop = min(end, last)
            for at in range(max(one.start, start), stop, PIECE):
                yield at, self._read(one.disk + one.offset + at - one.start, min(PIECE, stop - at))

    def segments(self) -> list[Segment]:
        """The extents, those that are not compressed in as many parts as the device has of them."""
        found: list[Segment] = []
        for one in self._extents:
            at, end = one.start, min(one.start + one.length, self.size)
            if at >= end:
                continue
            if one.inline is not None:
                found.append(Segment(at, end, one.offset - at, (one.compression, one.inline)))
            elif one.compression:
                places = tuple((place, place + count) for place, count in self._place(one.disk, one.disk_length))
                found.append(Segment(at, end, one.offset - at, (one.compression, one.whole, places), places))
            else:
                for place, count in self._place(one.disk + one.offset, end - at):
                    found.append(Segment(at, at + count, place - at))
                    at += count
        return found

    def ranges(self) -> list[tuple[int, int]]:
        """The stretches that are no holes."""
        found = [(one.start, min(one.start + one.length, self.size)) for one in self._extents if one.start < self.size]
        joined: list[tuple[int, int]] = []
        for start, end in found:
            before = joined.pop()[0] if joined and joined[-1][1] == start else start
            joined.append((before, end))
        return joined

    def _expanded(self, one: Extent) -> bytes:
        if one.whole > _LARGEST_COMPRESSED or one.disk_length > _LARGEST_COMPRESSED:
            raise damaged("a compressed extent is larger than any can be")
        raw = one.inline if one.inline is not None else self._read(one.disk, one.disk_length)
        if one.compression == _NONE:
            return raw
        if one.compression == _ZLIB:
            return _zlib(raw, one.whole)
        if one.compression == _LZO:
            return _lzo(raw, one.whole)
        if one.compression == _ZSTD:
            return _zstd(raw, one.whole)
        raise errors.Unsupported("the file is compressed in a way that no reader here knows")


def _zlib(raw: bytes, limit: int) -> bytes:
    stream = zlib.decompressobj()
    out = stream.decompress(raw, limit)
    if len(out) < limit and not stream.eof:
        raise damaged("a compressed extent ends early")
    return out


def _lzo(raw: bytes, limit: int) -> bytes:
    """Segments of a page each, whose lengths never cross the end of a page of the compressed bytes."""
    (total,) = struct.unpack_from("<I", raw)
    if total > len(raw):
        raise damaged("a compressed extent ends early")
    out, at = bytearray(), 4
    while at < total and len(out) < limit:
        if _LZO_PAGE - at % _LZO_PAGE < 4:
            at += _LZO_PAGE - at % _LZO_PAGE
        (length,) = struct.unpack_from("<I", raw, at)
        at += 4
        out += lzo1x(raw[at : at + length], _LZO_PAGE)
        at += length
    return bytes(out[:limit])


def lzo1x(raw: bytes, limit: int) -> bytes:
    """LZO1X, as the kernel's documentation of its stream format has it (staging/lzo)."""
    out, at, state = bytearray(), 0, 0
    if raw[0] > 17:
        count = raw[0] - 17
        out += raw[1 : 1 + count]
        at, state = 1 + count, min(count, 4)
    while True:
        code = raw[at]
        at += 1
        if code < 16 and state == 0:
            count, at = _long(raw, at, code, 15)
            out += raw[at : at + count + 3]
            at, state = at + count + 3, 4
            continue
        if code < 16:
            length, base = (2, 1) if state < 4 else (3, 2049)
            distance, state = (raw[at] << 2) + (code >> 2 & 3) + base, code & 3
            at += 1
        elif code < 64:
            bits = 7 if code < 32 else 31
            length, at = _long(raw, at, code & bits, bits)
            low = raw[at] | raw[at + 1] << 8
            at, state, length = at + 2, low & 3, length + 2
            distance = (low >> 2) + 1 if code >= 32 else 16384 + ((code & 8) << 11) + (low >> 2)
            if distance == 16384 and code < 32:
                return bytes(out)
        else:
            length = (3 + (code >> 5 & 1)) if code < 128 else 5 + (code >> 5 & 3)
            distance, state = (raw[at] << 3) + (code >> 2 & 7) + 1, code & 3
            at += 1
        if distance > len(out) or len(out) + length > limit:
            raise damaged("a compressed extent makes no sense")
        for _ in range(length):
            out.append(out[-distance])
        out += raw[at : at + state]
        at += state


def _long(raw: bytes, at: int, short: int, most: int) -> tuple[int, int]:
    """A length that may go on over bytes of zeros; and where the code goes on."""
    if short:
        return short, at
    length = most
    while raw[at] == 0:
        length, at = length + 255, at + 1
        if length > _LARGEST_COMPRESSED:
            raise damaged("a compressed extent makes no sense")
    return length + raw[at], at + 1


@functools.cache
def _library() -> ctypes.CDLL:
    """Python learns zstd only with 3.14; the library is on every Debian, for dpkg needs it."""
    try:
        found = ctypes.CDLL(ctypes.util.find_library("zstd") or "libzstd.so.1")
    except OSError as error:
        raise errors.Unsupported(
            "the file is compressed with zstd, and libzstd is missing", hint="install libzstd1"
        ) from error
    found.ZSTD_findFrameCompressedSize.restype = ctypes.c_size_t
    found.ZSTD_findFrameCompressedSize.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    found.ZSTD_decompress.restype = ctypes.c_size_t
    found.ZSTD_decompress.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t]
    found.ZSTD_isError.argtypes = [ctypes.c_size_t]
    return found


def _zstd(raw: bytes, limit: int) -> bytes:
    library = _library()
    length = library.ZSTD_findFrameCompressedSize(raw, len(raw))  # zeros fill the extent up behind it
    out = ctypes.create_string_buffer(limit)
    if library.ZSTD_isError(length):
        raise damaged("a compressed extent makes no sense")
    count = library.ZSTD_decompress(out, limit, raw, length)
    if library.ZSTD_isError(count):
        raise damaged("a compressed extent makes no sense")
    return out.raw[:count]
