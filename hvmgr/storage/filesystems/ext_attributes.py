"""Extended attributes of ext2, ext3 and ext4: behind the inode, or in a block of their own; a large value has an inode."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

from hvmgr.storage.filesystems.reader import damaged

Large = Callable[[int, int], bytes]  # the value in an inode of this number, of this size

_ENTRY = struct.Struct("<BBHIII")
_MAGIC = 0xEA020000
_CORE = 128  # bytes of an inode, behind which it says how many more it has
_HEAD = 32  # of a block
_PREFIXES = {1: "user.", 4: "trusted.", 6: "security.", 7: "system.", 8: "system.richacl"}
_ACLS = {2: "system.posix_acl_access", 3: "system.posix_acl_default"}


def of_inode(raw: bytes, large: Large) -> dict[str, bytes]:
    """Those that lie behind the inode."""
    if len(raw) <= _CORE + 4:
        return {}
    start = _CORE + struct.unpack_from("<H", raw, _CORE)[0]
    if start + 4 > len(raw) or struct.unpack_from("<I", raw, start)[0] != _MAGIC:
        return {}
    return dict(_parsed(raw[start + 4 :], 0, large))


def of_block(block: bytes, large: Large) -> dict[str, bytes]:
    """Those that lie in a block."""
    if struct.unpack_from("<I", block)[0] != _MAGIC:
        raise damaged("extended attributes")
    return dict(_parsed(block, _HEAD, large))


def _parsed(area: bytes, at: int, large: Large) -> Iterator[tuple[str, bytes]]:
    while at + _ENTRY.size <= len(area) and area[at : at + 4] != bytes(4):
        name_length, kind, offset, inode, size, _ = _ENTRY.unpack_from(area, at)
        name = area[at + 16 : at + 16 + name_length].decode("utf-8", "surrogateescape")
        value = large(inode, size) if inode else area[offset : offset + size]
        if len(value) < size:
            raise damaged("an extended attribute lies behind its place")
        if kind in _ACLS:
            yield _ACLS[kind], _posix_acl(value)
        elif kind in _PREFIXES:
            yield _PREFIXES[kind] + name, value
        at += 16 + (name_length + 3) // 4 * 4


def _posix_acl(value: bytes) -> bytes:
    """An ACL as it is on the disk, in the shape of Linux' extended attributes."""
    found, at = [struct.pack("<I", 2)], 4
    while at + 4 <= len(value):
        tag, permissions = struct.unpack_from("<HH", value, at)
        at += 4
        who = 0xFFFFFFFF
        if tag in {2, 8}:  # a named user, a named group
            (who,) = struct.unpack_from("<I", value, at)
            at += 4
        found.append(struct.pack("<HHI", tag, permissions, who))
    return b"".join(found)
