"""Extended attributes of XFS: in the inode, or in blocks of their own."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

from hvmgr.storage.filesystems.reader import damaged

Blocks = Callable[[int], bytes]

_LOCAL, _ROOT, _SECURE, _INCOMPLETE, _PARENT = 1, 2, 4, 0x80, 8
_LEAVES, _NODES = {0xFBEE: (12, 32), 0x3BEE: (56, 80)}, {0xFEBE: 16, 0x3EBE: 64}
_REMOTE_MAGIC, _REMOTE_HEADER = b"XARM", 56
_VALUE_MAX = 64 << 10
_BLOCKS_MAX = 4096
_ENTRIES_MAX, _TOTAL_MAX = 1 << 16, 256 << 20
_ACLS = {b"SGI_ACL_FILE": "system.posix_acl_access", b"SGI_ACL_DEFAULT": "system.posix_acl_default"}


def of_short(area: bytes) -> dict[str, bytes]:
    """Those that lie in the inode."""
    found: dict[str, bytes] = {}
    at = 4
    for _ in range(area[2]):
        name_length, length, flags = struct.unpack_from("BBB", area, at)
        name = area[at + 3 : at + 3 + name_length]
        _put(found, flags, name, area[at + 3 + name_length : at + 3 + name_length + length])
        at += 3 + name_length + length
    return found


def of_blocks(read: Blocks) -> dict[str, bytes]:
    """Those that lie in blocks; ``read`` gives one by its number."""
    found: dict[str, bytes] = {}
    number, entries, total = 0, 0, 0
    for _ in range(_BLOCKS_MAX):  # down to the first leaf
        raw = read(number)
        (magic,) = struct.unpack_from(">H", raw, 8)
        if magic in _LEAVES:
            break
        if magic not in _NODES:
            raise damaged("extended attributes")
        (number,) = struct.unpack_from(">I", raw, _NODES[magic] + 4)
    for _ in range(_BLOCKS_MAX):
        raw = read(number)
        (magic,) = struct.unpack_from(">H", raw, 8)
        if magic not in _LEAVES:
            raise damaged("extended attributes")
        for flags, name, value in _leaf(raw, *_LEAVES[magic], read):
            entries, total = entries + 1, total + len(value)
            if entries > _ENTRIES_MAX or total > _TOTAL_MAX:
                raise damaged("it has more extended attributes than any file can have")
            _put(found, flags, name, value)
        (number,) = struct.unpack_from(">I", raw)
        if not number:
            return found
    raise damaged("extended attributes")


def _leaf(raw: bytes, facts: int, header: int, read: Blocks) -> Iterator[tuple[int, bytes, bytes]]:
    """The flags, the name and the value of each in one block."""
    (count,) = struct.unpack_from(">H", raw, facts)
    for one in range(count):
        _, place, flags = struct.unpack_from(">IHB", raw, header + 8 * one)
        if flags & _INCOMPLETE:
            continue
        if flags & _LOCAL:
            length, name_length = struct.unpack_from(">HB", raw, place)
            name = raw[place + 3 : place + 3 + name_length]
            value = raw[place + 3 + name_length : place + 3 + name_length + length]
        else:
            block, length, name_length = struct.unpack_from(">IIB", raw, place)
            name = raw[place + 9 : place + 9 + name_length]
            value = _remote(read, block, length)
        yield flags, name, value


def _remote(read: Blocks, block: int, length: int) -> bytes:
    if length > _VALUE_MAX:
        raise damaged("an extended attribute is larger than any can be")
    value = b""
    while len(value) < length:
        raw = read(block)
        value += raw[_REMOTE_HEADER:] if raw[:4] == _REMOTE_MAGIC else raw
        block += 1
    return value[:length]


def _put(found: dict[str, bytes], flags: int, name: bytes, value: bytes) -> None:
    if flags & _PARENT:
        return  # where its folder is, for XFS itself
    if flags & _ROOT and name in _ACLS:
        found[_ACLS[name]] = _acl(value)
        return
    prefix = "trusted." if flags & _ROOT else "security." if flags & _SECURE else "user."
    found[prefix + name.decode("utf-8", "surrogateescape")] = value


def _acl(value: bytes) -> bytes:
    """A POSIX ACL in the shape of Linux' extended attributes."""
    (count,) = struct.unpack_from(">I", value)
    entries = [struct.pack("<I", 2)]
    for one in range(min(count, 8192)):
        tag, who, permissions = struct.unpack_from(">IIH", value, 4 + 12 * one)
        entries.append(struct.pack("<HHI", tag, permissions, who if tag in {2, 8} else 0xFFFFFFFF))
    return b"".join(entries)
