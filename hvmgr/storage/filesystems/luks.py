"""LUKS 1 and 2: what the header says of the encrypted part, and that part as a disk in clear.

Source: "LUKS1 On-Disk Format Specification" 1.2.3, "LUKS2 On-Disk Format Specification" 1.1.1. The slots for keys are
``host/cryptsetup``'s business; here the volume's own key is known.
"""

from __future__ import annotations

import hashlib
import json
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvmgr import errors
from hvmgr.host import cryptsetup, libcrypto
from hvmgr.storage.filesystems import reader, window
from hvmgr.storage.filesystems.reader import damaged
from hvmgr.storage.partitions import Disk

_MAGIC, _SECOND_MAGIC = b"LUKS\xba\xbe", b"SKUL\xba\xbe"
_ONE = struct.Struct(">6sH32s32s32sII")
_TWO = struct.Struct(">6sHQQ48s32s64s40s48sQ")
_CHECKSUM = slice(448, 512)
_SIZES = tuple(0x4000 << shift for shift in range(9))
_TEXT = 4096
_SECTORS = (512, 1024, 2048, 4096)
_HEADER_MAX = 192 << 20  # of both texts and all slots, which cryptsetup makes 128 MiB at most
_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Header:
    """Where the encrypted part is (``size`` None: up to the end), and how it is encrypted. ``tweak``: its first sector's number."""

    version: int
    cipher: str
    start: int
    size: int | None
    sector: int = 512
    tweak: int = 0


class Decrypted:
    """The encrypted part, in clear."""

    def __init__(self, disk: Disk, header: Header, key: bytes) -> None:
        self._disk, self._header = disk, header
        self._cipher = libcrypto.SectorCipher(header.cipher, key, header.sector)
        there = max(0, disk.size - header.start)
        self.size = min(there, there if header.size is None else header.size) // header.sector * header.sector

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """The bytes from ``offset`` on."""
        end, sector = offset + len(buffer), self._header.sector
        if offset < 0 or end > self.size:
            raise errors.Corrupt(f"the file system reaches to byte {end}, its encrypted volume ends at {self.size}")
        if not buffer:
            return
        first, last = offset // sector * sector, -(-end // sector) * sector
        if (first, last) == (offset, end):
            self._decrypt(first, buffer)
            return
        whole = memoryview(bytearray(last - first))
        self._decrypt(first, whole)
        buffer[:] = whole[offset - first : end - first]

    def _decrypt(self, offset: int, buffer: memoryview) -> None:
        self._disk.read_into(self._header.start + offset, buffer)
        self._cipher.decrypt(offset // 512 + self._header.tweak, buffer)


def read_header(disk: Disk) -> Header:
    """What a LUKS volume says of itself; Unsupported for what cannot be read although the key is known."""
    with reader.parsing("the header of LUKS"):
        head = window.read(disk, 0, _TWO.size)
        version = struct.unpack_from(">H", head, 6)[0]
        if head[:6] != _MAGIC or version not in {1, 2}:
            raise damaged("the header of LUKS")
        found = _read_1(head) if version == 1 else _read_2(disk)
    if not 0 < found.start < disk.size:
        raise errors.Unsupported("the LUKS header here has its volume on another device")
    libcrypto.require_known(found.cipher)
    return found


def volume_key(disk: Disk, header: Header, secret: bytes) -> bytes | None:
    """The key of the volume, found with a key of its user; None when none of its slots opens with it."""
    if header.start > _HEADER_MAX:
        raise damaged("the header of LUKS")
    with tempfile.NamedTemporaryFile(prefix="hvmgr-luks-") as copy:  # of what is public, or encrypted by keys
        for at in range(0, header.start, _PIECE):
            copy.write(window.read(disk, at, min(_PIECE, header.start - at)))
        copy.truncate(header.start + _PIECE)
        copy.flush()
        return cryptsetup.volume_key(Path(copy.name), secret)


def _read_1(head: bytes) -> Header:
    _, _, cipher, mode, _, payload, _ = _ONE.unpack_from(head)
    return Header(1, f"{_text(cipher)}-{_text(mode)}", payload * 512, None)


def _read_2(disk: Disk) -> Header:
    try:
        texts = [found for at in (0, *_SIZES) if (found := _copy_at(disk, at)) is not None]
        if not texts:
            raise damaged("both headers of LUKS")
        about = json.loads(max(texts)[1])
        requirements = about["config"].get("requirements", {}).get("mandatory", [])
        segments = list(about["segments"].values())
        if requirements or len(segments) != 1:
            raise errors.Unsupported(
                f"the LUKS volume needs what no reader here has: {', '.join(map(str, requirements)) or 'several segments'}",
                hint="finish what was begun inside the guest, such as: cryptsetup reencrypt",
            )
        return _segment(segments[0])
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged("the header of LUKS") from error


def _segment(segment: dict[str, Any]) -> Header:
    if segment["type"] != "crypt" or "integrity" in segment:
        raise errors.Unsupported("the LUKS volume has checksums of its own (integrity), which no reader here knows")
    size, sector = segment["size"], segment["sector_size"]
    if sector not in _SECTORS:
        raise damaged("the header of LUKS")
    return Header(
        version=2,
        cipher=str(segment["encryption"]),
        start=int(segment["offset"]),
        size=None if size == "dynamic" else int(size),
        sector=sector,
        tweak=int(segment["iv_tweak"]),
    )


def _copy_at(disk: Disk, at: int) -> tuple[int, bytes] | None:
    """One of the two copies of the header, where it is whole: its number in order, and its text."""
    head = window.read(disk, at, _TEXT)
    if len(head) < _TEXT or head[:6] != (_SECOND_MAGIC if at else _MAGIC):
        return None
    _, version, size, sequence, _, kind, _, _, _, place = _TWO.unpack_from(head)
    if version != 2 or size not in _SIZES or place != at or (at and size != at):
        return None
    raw = bytearray(window.read(disk, at, size))
    stated = bytes(raw[_CHECKSUM])
    raw[_CHECKSUM] = bytes(64)
    digest = hashlib.new(_text(kind), bytes(raw), usedforsecurity=False).digest()
    if not stated.startswith(digest):
        return None
    return sequence, bytes(raw[_TEXT:]).partition(b"\0")[0]


def _text(raw: bytes) -> str:
    return raw.partition(b"\0")[0].decode("ascii")
