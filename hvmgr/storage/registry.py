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
_SUBKEYS_MAX = 1 << 20
_BIG = b"db"
_LISTS = b"ri"
_WIDTHS = {b"lf": 8, b"lh": 8, b"li": 4, _LISTS: 4}  # bytes for each key, or list, in a list


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
        return next((one for one in self._listed(listed) if self._is_named(one, name)), None)

    def _listed(self, at: int) -> list[int]:
        """The keys in a list, or in a list of lists; lists of those are not made."""
        kind, places = self._places(at)
        if kind != _LISTS:
            return places
        found: list[int] = []
        for one in places:
            kind, below = self._places(one)
            found += below
            if kind == _LISTS or len(found) > _SUBKEYS_MAX:
                raise _damaged()
        return found

    def _places(self, at: int) -> tuple[bytes, list[int]]:
        cell = self._cell(at)
        kind, count = bytes(cell[:2]), struct.unpack_from("<H", cell, 2)[0]
        width = _WIDTHS.get(kind)
        if width is None or 4 + count * width > len(cell):
            raise _damaged()
        return kind, [struct.unpack_from("<I", cell, 4 + width * one)[0] for one in range(count)]

    def _is_named(self, key: int, name: str) -> bool:
        node = self._cell(key, b"nk")
        flags, length = struct.unpack_from("<H", node, 2)[0], struct.unpack_from("<H", node, 72)[0]
        return _is_text(node[76 : 76 + length], name, ascii_only=bool(flags & _NK_ASCII))

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
            if _is_text(cell[20 : 20 + length], name, ascii_only=bool(flags & _VK_ASCII)):
                return _typed(kind, self._data(cell, size, data))
        return None

    def _data(self, cell: memoryview, size: int, place: int) -> bytes:
        if size & _RESIDENT:
            return bytes(cell[8 : 8 + min(4, size & ~_RESIDENT)])
        data = self._cell(place)
        if data[:2] == _BIG and size > len(data):
            raise errors.Unsupported("the value is kept in pieces")
        return bytes(data[:size])

    def _cell(self, at: int, kind: bytes | None = None) -> memoryview:
        start = _BASE + at
        if at == _NONE or start + 8 > len(self.raw):
            raise _damaged()
        size = -struct.unpack_from("<i", self.raw, start)[0]
        if size < 8 or start + size > len(self.raw):
            raise _damaged()
        cell = memoryview(self.raw)[start + 4 : start + size]  # no copy: a damaged hive may name a large one often
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


def _is_text(raw: memoryview, wanted: str, *, ascii_only: bool) -> bool:
    """Whether a name is the wanted one, in any case; most differ in their length already."""
    if len(raw) != len(wanted) * (1 if ascii_only else 2):
        return False
    return str(raw, "latin-1" if ascii_only else "utf-16-le", "replace").lower() == wanted.lower()


def _damaged() -> errors.Corrupt:
    return errors.Corrupt("the registry hive is damaged")
