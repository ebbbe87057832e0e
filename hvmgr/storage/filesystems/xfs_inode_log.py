"""An inode as the log of XFS holds it, put over the inode on the disk: its core in the byte order of the machine, its forks."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from hvmgr.storage.filesystems.reader import damaged

_DATA, _EXTENTS, _ROOT, _DEVICE = 0x002, 0x004, 0x008, 0x010
_ATTRIBUTES, _ATTRIBUTE_EXTENTS, _ATTRIBUTE_ROOT = 0x040, 0x080, 0x100
_DATA_FORK, _ATTRIBUTE_FORK = _DATA | _EXTENTS | _ROOT, _ATTRIBUTES | _ATTRIBUTE_EXTENTS | _ATTRIBUTE_ROOT
_WIDE = 56  # one that 32-bit machines wrote is 4 bytes shorter
_BEFORE_TIMES, _AFTER_TIMES, _NEWEST = "HHBBHIIIHHQ", "QQIIHBBIHHII", "IQQQI12s"
_TIMES, _BORN, _OWN = slice(32, 56), slice(144, 152), "Q16s"
_BIG_TIMES = 1 << 3
_OLD_CORE, _CORE = 100, 176


@dataclass(frozen=True, slots=True)
class Logged:
    """Which inode, where it is on the disk, and what the log has of it."""

    fields: int
    sector: int
    sectors: int
    offset: int
    device: int
    core: bytes
    data: bytes
    attributes: bytes


def parsed(regions: Sequence[bytes]) -> Logged:
    """The regions of an item of the log."""
    about, core = regions[0], regions[1]
    _, _, fields = struct.unpack_from("<HHI", about)
    at = 24 if len(about) >= _WIDE else 20
    (device,) = struct.unpack_from("<I", about, at)
    sector, sectors, offset = struct.unpack_from("<qii", about, at + 16)
    forks = iter(regions[2:])
    data = next(forks, b"") if fields & _DATA_FORK else b""
    attributes = next(forks, b"") if fields & _ATTRIBUTE_FORK else b""
    return Logged(fields, sector, sectors, offset, device, core, data, attributes)


def applied(what: Logged, before: bytes, *, is_5: bool) -> bytes:
    """The inode of the disk, with what the log has of it."""
    core = _to_disk(what.core)
    raw = bytearray(before)
    raw[: len(core)] = core
    split = raw[82] * 8  # where the attributes begin
    end = len(raw) if not split else len(core) + split
    if end > len(raw):
        raise damaged("its log has an inode that makes no sense")
    if what.fields & _ROOT:
        _put(raw, len(core), end, _root(what.data, end - len(core), is_5=is_5))
    elif what.fields & _DATA_FORK:
        _put(raw, len(core), end, what.data)
    elif what.fields & _DEVICE:
        _put(raw, len(core), end, struct.pack(">I", what.device))
    if what.fields & _ATTRIBUTE_ROOT:
        _put(raw, end, len(raw), _root(what.attributes, len(raw) - end, is_5=is_5))
    elif what.fields & _ATTRIBUTE_FORK:
        _put(raw, end, len(raw), what.attributes)
    return bytes(raw)


def _put(raw: bytearray, start: int, end: int, fork: bytes) -> None:
    if len(fork) > end - start:
        raise damaged("its log has an inode that makes no sense")
    raw[start : start + len(fork)] = fork


def _to_disk(core: bytes) -> bytes:
    if len(core) < _OLD_CORE or core[:2] != b"NI":
        raise damaged("its log has an inode that makes no sense")
    is_new = core[4] >= 3 and len(core) >= _CORE
    is_big = is_new and bool(struct.unpack_from("<Q", core, 120)[0] & _BIG_TIMES)
    found = _swapped(_BEFORE_TIMES, core, 0) + _times(core[_TIMES], is_big=is_big) + _swapped(_AFTER_TIMES, core, 56)
    if is_new:
        found += _swapped(_NEWEST, core, _OLD_CORE) + _times(core[_BORN], is_big=is_big) + _swapped(_OWN, core, 152)
    return found


def _swapped(form: str, raw: bytes, at: int) -> bytes:
    return struct.pack(f">{form}", *struct.unpack_from(f"<{form}", raw, at))


def _times(raw: bytes, *, is_big: bool) -> bytes:
    """Nanoseconds in one number, or seconds and nanoseconds."""
    form = f"{len(raw) // 8}Q" if is_big else f"{len(raw) // 4}I"
    return struct.pack(f">{form}", *struct.unpack(f"<{form}", raw))


def _root(block: bytes, size: int, *, is_5: bool) -> bytes:
    """The root of a tree of extents, which in memory has the head of a block, as it stands in an inode."""
    head = 72 if is_5 else 24
    level, count = struct.unpack_from(">HH", block, 4)
    held, room = (len(block) - head) // 16, (size - 4) // 16
    if not count <= held or count > room:
        raise damaged("its log has a tree of extents that makes no sense")
    keys = block[head : head + 8 * count]
    pointers = block[head + 8 * held : head + 8 * (held + count)]
    return struct.pack(">HH", level, count) + keys.ljust(8 * room, b"\0") + pointers
