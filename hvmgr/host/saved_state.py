"""libvirt's save files: memory and devices of a VM behind a header, a domain XML and a cookie.

    0   16  magic: LibvirtQemudSave, or LibvirtQemudPart while it is being written
    16   4  version: 2
    20   4  data_len: bytes between this header and the stream
    24   4  was_running
    28   4  format of the stream
    32   4  cookieOffset: where the cookie starts behind the header, 0 without one
    36  56  unused
    92      XML, NUL, zeros; cookie, NUL, zeros
    92 + data_len   QEMU's migration stream

Numbers are in the host's byte order. Source: libvirt, src/qemu/qemu_saveimage.h. The stream is never looked into
and never changed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from hvmgr import errors
from hvmgr.host import process

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_HEADER = struct.Struct("=16s5I56x")
_VERSION = 2
_COOKIE_FIELD = 32
_COMPLETE = b"LibvirtQemudSave"
_PARTIAL = b"LibvirtQemudPart"

# Far above any domain XML; a length beyond it is garbage.
_DATA_MAX = 64 << 20
# The stream starts on a page, and the XML may grow by as much as libvirt allows for.
_ALIGNMENT = 4096
_SLACK = 64 << 10

# How QEMU's streams begin, and more than the description at their end takes.
_STREAM = b"QEVM"
_TAIL_MAX = 4 << 20

_PIECE = 1 << 20
_ZSTD = ("zstd", "-q", "-T0", "-3", "-c")
_UNZSTD = ("zstd", "-q", "-d", "-c")

assert _HEADER.size == 92


class Compression(IntEnum):
    """How the stream is written; the numbers are libvirt's."""

    RAW = 0
    GZIP = 1
    BZIP2 = 2
    XZ = 3
    LZOP = 4
    ZSTD = 5
    SPARSE = 6


@dataclass(frozen=True, slots=True)
class SavedState:
    """What stands before the stream, which starts at ``data_offset``; ``cookie_offset`` counts from the XML's start."""

    complete: bool
    was_running: bool
    compression: Compression
    xml: str
    cookie: str | None
    data_offset: int
    cookie_offset: int = 0


def read(path: Path) -> SavedState:
    """The head of a save file. Raises NotFound, or Corrupt for anything that libvirt could not have written."""
    with _opened(path, os.O_RDONLY) as descriptor:
        return _read(descriptor, path)


def is_complete(path: Path) -> bool:
    """Whether there is a save file whose writing came to its end."""
    try:
        return read(path).complete
    except (errors.NotFound, errors.Corrupt):
        return False


def head(
    xml: str,
    *,
    complete: bool,
    was_running: bool,
    compression: Compression = Compression.RAW,
    cookie: str | None = None,
    slack: int = _SLACK,
) -> bytes:
    """All that stands before the stream, padded with at least ``slack`` bytes so that the stream starts on a page."""
    text = _terminated(xml)
    tail = b"" if cookie is None else _terminated(cookie)
    size = _HEADER.size + len(text) + len(tail) + slack
    size += -size % _ALIGNMENT
    magic = _COMPLETE if complete else _PARTIAL
    header = _HEADER.pack(
        magic, _VERSION, size - _HEADER.size, was_running, compression, 0 if cookie is None else len(text)
    )
    return (header + text + tail).ljust(size, b"\0")


def mark_complete(path: Path) -> None:
    """Say that the stream is whole: libvirt restores nothing else."""
    with _opened(path, os.O_RDWR) as descriptor:
        _read(descriptor, path)
        _write(descriptor, _COMPLETE, 0)


def replace_xml(path: Path, xml: str) -> None:
    """Put another XML into a save file, in place.

    Killed in between, the XML may be torn, which libvirt refuses to restore and which the same call heals: cookie,
    header and stream are whole at every moment. Raises Conflict when the file has no room for the XML: then
    ``rewritten`` makes a larger one.
    """
    text = _terminated(xml)
    with _opened(path, os.O_RDWR) as descriptor:
        state = _read(descriptor, path, torn=True)
        room = state.data_offset - _HEADER.size
        if state.cookie is not None:
            room = _room_before_cookie(descriptor, state, len(text))
        if len(text) > room:
            raise errors.Conflict(
                f"the configuration in '{path}' has room for {room} bytes, the new one needs {len(text)}",
                path=str(path),
                room=room,
                needed=len(text),
            )
        _write(descriptor, text.ljust(room, b"\0"), _HEADER.size)


def rewritten(src: Path, dst: Path, xml: str) -> None:
    """A copy of a save file with another XML; holes stay holes. A half-made copy does not stay.

    Raises Conflict when ``dst`` exists, Unsupported for a sparse stream (its offsets count from the file's start),
    NoSpace.
    """
    with _opened(src, os.O_RDONLY) as source:
        state = _read(source, src, torn=True)
        if state.compression is Compression.SPARSE:
            raise errors.Unsupported(f"the sparse stream in '{src}' cannot be moved", path=str(src))
        start = head(
            xml,
            complete=False,
            was_running=state.was_running,
            compression=state.compression,
            cookie=state.cookie,
        )
        with _opened(dst, os.O_RDWR | os.O_CREAT | os.O_EXCL) as target:
            try:
                _write(target, start, 0)
                _copy(source, state.data_offset, target, len(start))
                if state.complete:
                    _write(target, _COMPLETE, 0)
            except BaseException:
                dst.unlink()
                raise


def transcoded(src: Path, target: int, to: Compression) -> None:
    """A complete copy of a complete save file in the empty file ``target``, its stream raw or compressed with zstd.

    HostFailed with the words of zstd when that fails.
    """
    with _opened(src, os.O_RDONLY) as source:
        state = _read(source, src)
        assert {state.compression, to} == {Compression.RAW, Compression.ZSTD}
        start = head(
            state.xml, complete=True, was_running=state.was_running, compression=to, cookie=state.cookie
        )  # fmt: skip
        _write(target, start, 0)
        os.lseek(target, len(start), os.SEEK_SET)
        with process.filtered(_ZSTD if to is Compression.ZSTD else _UNZSTD, to=target) as write:
            position = state.data_offset
            while piece := os.pread(source, _PIECE, position):
                write(memoryview(piece))
                position += len(piece)


def has_stream(path: Path) -> bool:
    """Whether what stands behind the head begins as QEMU's streams do; a compressed one may be anything."""
    with _opened(path, os.O_RDONLY) as descriptor:
        state = _read(descriptor, path)
        found = os.pread(descriptor, len(_STREAM), state.data_offset)
    return found == _STREAM or (bool(found) and state.compression is not Compression.RAW)


def holds_whole_stream(path: Path) -> bool:
    """Whether a raw stream has QEMU's beginning, and at its end the description of itself that QEMU writes last.

    A proof for a file whose writer nobody has watched. Source: QEMU, docs/devel/migration (sections); migration/savevm.c:
    the byte 6, a length of 32 bits (big-endian), and JSON.
    """
    with _opened(path, os.O_RDONLY) as descriptor:
        state = _read(descriptor, path)
        size = os.fstat(descriptor).st_size
        if os.pread(descriptor, len(_STREAM), state.data_offset) != _STREAM:
            return False
        tail = os.pread(descriptor, _TAIL_MAX, max(state.data_offset, size - _TAIL_MAX))
        at = tail.rfind(b'{"')
        while at > 0:
            if tail[at - 5 : at] == b"\x06" + (len(tail) - at).to_bytes(4, "big"):
                return True
            at = tail.rfind(b'{"', 0, at)
        return False


def has_begun(path: Path) -> bool:
    """Whether there is anything of a stream behind the head."""
    try:
        return read(path).data_offset < path.stat().st_size
    except (errors.NotFound, errors.Corrupt):
        return False


def _read(descriptor: int, path: Path, *, torn: bool = False) -> SavedState:
    """``torn``: the XML may be anything, its end included; it is then empty in the answer."""
    size = os.fstat(descriptor).st_size
    raw = os.pread(descriptor, _HEADER.size, 0)
    if len(raw) < _HEADER.size:
        raise _corrupt(path, f"it has {len(raw)} bytes, a header has {_HEADER.size}")
    magic, version, data_len, was_running, compression, cookie_offset = _HEADER.unpack(raw)
    if magic not in (_COMPLETE, _PARTIAL):
        raise _corrupt(path, "it is not a save file")
    if version != _VERSION:
        raise _corrupt(path, f"it has version {version}, not {_VERSION}")
    if data_len > _DATA_MAX or _HEADER.size + data_len > size:
        raise _corrupt(path, f"its configuration would have {data_len} bytes, the file has {size}")
    if compression not in set(Compression):
        raise _corrupt(path, f"its stream has the unknown format {compression}")
    if cookie_offset >= max(data_len, 1):
        raise _corrupt(path, f"its cookie would start at {cookie_offset} of {data_len} bytes")
    data = os.pread(descriptor, data_len, _HEADER.size)
    return SavedState(
        complete=magic == _COMPLETE,
        was_running=bool(was_running),
        compression=Compression(compression),
        xml="" if torn else _text(data[: cookie_offset or None], path, "configuration"),
        cookie=_text(data[cookie_offset:], path, "cookie") if cookie_offset else None,
        data_offset=_HEADER.size + data_len,
        cookie_offset=cookie_offset,
    )


def _text(raw: bytes, path: Path, what: str) -> str:
    text, end, _ = raw.partition(b"\0")
    if not end or not text:
        raise _corrupt(path, f"its {what} is empty or has no end")
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise _corrupt(path, f"its {what} is not UTF-8") from error


def _terminated(text: str) -> bytes:
    assert text, "libvirt has no empty configuration or cookie"
    assert "\0" not in text, "a NUL ends the text in the file"
    return text.encode() + b"\0"


def _room_before_cookie(descriptor: int, state: SavedState, needed: int) -> int:
    """How many bytes may stand before the cookie, which is moved to the end of the padding if that helps.

    libvirt takes everything before cookieOffset as the XML, padding too, so the cookie may stand anywhere behind
    it. The copy is complete before the header points to it, and never overlaps what it is a copy of.
    """
    assert state.cookie is not None
    cookie = _terminated(state.cookie)
    moved = state.data_offset - _HEADER.size - len(cookie)
    if needed <= state.cookie_offset or moved < state.cookie_offset + len(cookie):
        return state.cookie_offset
    _write(descriptor, cookie, _HEADER.size + moved)
    _write(descriptor, struct.pack("=I", moved), _COOKIE_FIELD)
    return moved


def _copy(source: int, start: int, target: int, at: int) -> None:
    """All bytes of ``source`` from ``start`` on, to ``at``; holes are skipped."""
    end = os.fstat(source).st_size
    position = start
    while position < end:
        try:
            position = os.lseek(source, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # ENXIO: nothing but a hole up to the end
                raise
            break
        hole = os.lseek(source, position, os.SEEK_HOLE)
        os.lseek(target, at + position - start, os.SEEK_SET)
        while position < hole:
            sent = os.sendfile(target, source, position, hole - position)
            if sent == 0:
                raise OSError(errno.EIO, "the save file became shorter while it was copied")
            position += sent
    os.ftruncate(target, at + end - start)


def _write(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    """A descriptor for the block, with the operating system's refusals in hvmgr's words."""
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
    except FileNotFoundError as error:
        raise errors.NotFound(f"'{path}' does not exist", path=str(path)) from error
    except FileExistsError as error:
        raise errors.Conflict(f"'{path}' exists already", path=str(path)) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise errors.NoSpace(f"no space left for '{path}'", path=str(path)) from error
        raise errors.HostFailed(f"cannot read or write '{path}': {error.strerror}", path=str(path)) from error


def _corrupt(path: Path, why: str) -> errors.Corrupt:
    return errors.Corrupt(f"'{path}' is damaged: {why}", path=str(path))
