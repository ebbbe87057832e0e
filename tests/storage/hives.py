"""Registry hives for tests, as small as they can be: keys in keys, with values of text and numbers.

Written from the published descriptions of the format (regf); hivexget reads them in ``test_registry``.
"""

from __future__ import annotations

import struct

_NONE = 0xFFFFFFFF
_PAGE = 4096


class _Cells:
    def __init__(self):
        self.raw = bytearray(struct.pack("<4sIIQQI", b"hbin", 0, _PAGE, 0, 0, 0))

    def put(self, data):
        """A cell that is in use; where it stands."""
        at, length = len(self.raw), -(-(len(data) + 4) // 8) * 8
        self.raw += struct.pack("<i", -length) + data.ljust(length - 4, b"\0")
        return at


def _value(cells, name, value):
    data = value.to_bytes(4, "little") if isinstance(value, int) else (value + "\0").encode("utf-16-le")
    kind = 4 if isinstance(value, int) else 1
    if len(data) <= 4:
        size, place = len(data) | 0x80000000, int.from_bytes(data.ljust(4, b"\0"), "little")
    else:
        size, place = len(data), cells.put(data)
    raw = name.encode("latin-1")
    return cells.put(struct.pack("<2sHIIIHH", b"vk", len(raw), size, place, kind, 1, 0) + raw)


def _key(cells, name, content, flags, security, kind):
    below = {key: one for key, one in content.items() if isinstance(one, dict)}
    values = {key: one for key, one in content.items() if not isinstance(one, dict)}
    places = [(key, _key(cells, key, below[key], 0x20, security, kind)) for key in sorted(below, key=str.upper)]
    listed = _NONE
    if places:
        hint = {b"lf": lambda key: key.encode()[:4].ljust(4, b"\0"), b"lh": _hash, b"li": lambda _: b""}[kind]
        listed = cells.put(
            kind + struct.pack("<H", len(places)) + b"".join(struct.pack("<I", at) + hint(key) for key, at in places)
        )
        if kind == b"li":
            listed = cells.put(struct.pack("<2sHI", b"ri", 1, listed))
    held = [_value(cells, key, one) for key, one in values.items()]
    of_values = cells.put(struct.pack(f"<{len(held)}I", *held)) if held else _NONE
    raw = name.encode("latin-1")
    head = struct.pack("<2sHQII", b"nk", flags, 0, 0, _NONE)
    counts = struct.pack("<IIIIIIII", len(places), 0, listed, _NONE, len(held), of_values, security, _NONE)
    return cells.put(head + counts + struct.pack("<IIIIIHH", 0, 0, 0, 0, 0, len(raw), 0) + raw)


def _hash(key):
    found = 0
    for letter in key.upper():
        found = found * 37 + ord(letter) & 0xFFFFFFFF
    return struct.pack("<I", found)


def hive(content, *, kind=b"lf"):
    """A hive with these keys (dictionaries) and values; ``kind`` is how keys are listed."""
    cells = _Cells()
    descriptor = struct.pack("<BBHIIII", 1, 0, 0x8000, 0, 0, 0, 0)
    at = len(cells.raw)
    security = cells.put(struct.pack("<2sHIIII", b"sk", 0, at, at, 1, len(descriptor)) + descriptor)
    root = _key(cells, "root", content, 0x2C, security, kind)
    length = -(-(len(cells.raw) + 8) // _PAGE) * _PAGE
    rest = length - len(cells.raw)
    cells.raw += struct.pack("<i", rest).ljust(rest, b"\0")
    struct.pack_into("<I", cells.raw, 8, length)
    head = bytearray(struct.pack("<4sIIQIIIIIII", b"regf", 1, 1, 0, 1, 5, 0, 1, root, length, 1).ljust(_PAGE, b"\0"))
    checksum = 0
    for (word,) in struct.iter_unpack("<I", head[:508]):
        checksum ^= word
    struct.pack_into("<I", head, 508, checksum)
    return bytes(head + cells.raw)


def software(state, product="Windows Server 2025 Standard", *, kind=b"lf"):
    """What ``Windows\\System32\\config\\SOFTWARE`` of a Windows holds, as far as it matters here."""
    setup = {"Setup": {"State": {"ImageState": state}} if state is not None else {}}
    others = {f"Vendor {number}": {"Version": number} for number in range(30)}
    return hive(
        {
            "Microsoft": {
                "Windows": {"CurrentVersion": setup},
                "Windows NT": {"CurrentVersion": {"ProductName": product}},
            }
        }
        | others,
        kind=kind,
    )
