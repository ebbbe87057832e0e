"""Values out of a Windows registry hive (a regf file), read only.

Only what one lookup needs is touched, every offset is held against the file's length first, and a hive that was not
written out (its two sequence numbers differ) is read as it is: Windows keeps the rest in its logs.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from hvmgr import errors

_BASE = 4096  # cells are counted from behind the first page
_NONE = 0xFFFFFFFF
_ROOT_AT = 36
_NK_ASCII, _VK_ASCII = 0x20, 1
_TEXTS = {1, 2}  # REG_SZ, REG_EXPAND_SZ
_DWORD = 4
_RESIDENT = 0x80000000
_DEPTH_MAX = 16
_SUBKEYS_MAX = 1 << 20
_BIG = b"db"


@dataclass(frozen=True, slots=True)
class Hive:
    """The bytes of a hive."""

    raw: bytes

    @classmethod
    def of(cls, raw: bytes) -> Hive:
        """Corrupt when these bytes are no hive."""
        if len(raw) < _BASE or raw[:4] != b"regf":
            raise errors.Corrupt("this is no registry hive")
        return cls(raw)

    def value(self, path: str, name: str) -> str | int | bytes | None:
        """A value of the key at ``path`` (names joined by a backslash, in any case); None when there is none."""
        key = self._u32(_ROOT_AT)
        for word in path.split("\\"):
            found = self._subkey(key, word)
            if found is None:
                return None
            key = found
        return self._value(key, name)

    def has_key(self, path: str) -> bool:
        """Whether there is such a key."""
        key: int | None = self._u32(_ROOT_AT)
        for word in path.split("\\"):
            key = None if key is None else self._subkey(key, word)
        return key is not None

    def _subkey(self, key: int, name: str) -> int | None:
        node = self._cell(key, b"nk")
        listed = struct.unpack_from("<I", node, 28)[0]
        if listed == _NONE or struct.unpack_from("<I", node, 20)[0] == 0:
            return None
        return next((one for one in self._listed(listed, 0) if self._name_of(one).lower() == name.lower()), None)

    def _listed(self, at: int, depth: int) -> list[int]:
        """The keys in a list, or in a list of lists."""
        cell = self._cell(at)
        kind, count = cell[:2], struct.unpack_from("<H", cell, 2)[0]
        width = {b"lf": 8, b"lh": 8, b"li": 4, b"ri": 4}.get(kind)
        if width is None or depth > _DEPTH_MAX or 4 + count * width > len(cell):
            raise _damaged()
        places = [struct.unpack_from("<I", cell, 4 + width * one)[0] for one in range(count)]
        if kind != b"ri":
            return places
        found: list[int] = []
        for one in places:
            found += self._listed(one, depth + 1)
            if len(found) > _SUBKEYS_MAX:
                raise _damaged()
        return found

    def _name_of(self, key: int) -> str:
        node = self._cell(key, b"nk")
        flags, length = struct.unpack_from("<H", node, 2)[0], struct.unpack_from("<H", node, 72)[0]
        return _text(node[76 : 76 + length], ascii_only=bool(flags & _NK_ASCII))

    def _value(self, key: int, name: str) -> str | int | bytes | None:
        node = self._cell(key, b"nk")
        count, listed = struct.unpack_from("<II", node, 36)
        if count == 0 or listed == _NONE:
            return None
        places = self._cell(listed)
        if count * 4 > len(places):
            raise _damaged()
        for number in range(count):
            cell = self._cell(struct.unpack_from("<I", places, 4 * number)[0], b"vk")
            length, size, data, kind, flags = struct.unpack_from("<HIIIH", cell, 2)
            if _text(cell[20 : 20 + length], ascii_only=bool(flags & _VK_ASCII)).lower() == name.lower():
                return _typed(kind, self._data(cell, size, data))
        return None

    def _data(self, cell: bytes, size: int, place: int) -> bytes:
        if size & _RESIDENT:
            return cell[8 : 8 + min(4, size & ~_RESIDENT)]
        data = self._cell(place)
        if data[:2] == _BIG and size > len(data):
            raise errors.Unsupported("the value is kept in pieces")
        return data[:size]

    def _cell(self, at: int, kind: bytes | None = None) -> bytes:
        start = _BASE + at
        if at == _NONE or start + 8 > len(self.raw):
            raise _damaged()
        size = -struct.unpack_from("<i", self.raw, start)[0]
        if size < 8 or start + size > len(self.raw):
            raise _damaged()
        cell = self.raw[start + 4 : start + size]
        if kind is not None and (cell[:2] != kind or len(cell) < (76 if kind == b"nk" else 20)):
            raise _damaged()
        return cell

    def _u32(self, at: int) -> int:
        return int(struct.unpack_from("<I", self.raw, at)[0])


def _typed(kind: int, data: bytes) -> str | int | bytes:
    if kind in _TEXTS:
        return data.decode("utf-16-le", "replace").partition("\0")[0]
    if kind == _DWORD and len(data) == 4:
        return int.from_bytes(data, "little")
    return data


def _text(raw: bytes, *, ascii_only: bool) -> str:
    return raw.decode("latin-1") if ascii_only else raw.decode("utf-16-le", "replace")


def _damaged() -> errors.Corrupt:
    return errors.Corrupt("the registry hive is damaged")
