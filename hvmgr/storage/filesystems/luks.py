"""LUKS 1 and 2: what the header says of the encrypted part, and that part as a disk in clear.

Source: "LUKS1 On-Disk Format Specification" 1.2.3, "LUKS2 On-Disk Format Specification" 1.1.1. The slots for keys are
``host/cryptsetup``'s business; here the volume's own key is known.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import struct
from dataclasses import dataclass
from typing import Any

from hvmgr import errors, units
from hvmgr.host import cryptsetup, kept_secrets, libcrypto
from hvmgr.storage.filesystems import reader, window
from hvmgr.storage.filesystems.reader import damaged
from hvmgr.storage.filesystems.window import Mapped, Window
from hvmgr.storage.partitions import Disk

_MAGIC, _SECOND_MAGIC = b"LUKS\xba\xbe", b"SKUL\xba\xbe"
_ONE = struct.Struct(">6sH32s32s32sII")
_ONES_SLOT, _ONES_SLOTS, _ONES_COUNT, _ACTIVE = struct.Struct(">II32sII"), 208, 8, 0x00AC71F3
_TWO = struct.Struct(">6sHQQ48s32s64s40s48sQ")
_CHECKSUM = slice(448, 512)
_SIZES = tuple(0x4000 << shift for shift in range(9))
_TEXT = 4096
_SECTORS = (512, 1024, 2048, 4096)
_NUMBER = re.compile(r"[0-9]{1,18}")
_HEADER_MAX = 192 << 20  # of both texts and all slots, which cryptsetup makes 128 MiB at most
_PASSES_MAX = 1 << 40  # bytes that Argon2 goes over, some of them often: ten minutes of a usual host
_ITERATIONS_MAX = 1_000_000_000  # of PBKDF2: about as long
_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Slots:
    """Where the slots for keys end, and how much memory it takes at most to try a key on one of them."""

    end: int
    memory: int = 0


@dataclass(frozen=True, slots=True)
class Header:
    """Where the encrypted part is (``size`` None: up to the end), and how it is encrypted. ``tweak``: its first sector's number."""

    version: int
    cipher: str
    start: int
    size: int | None
    slots: Slots
    sector: int = 512
    tweak: int = 0


class Decrypted(Window):
    """The encrypted part, in clear: byte for byte where it is on the disk, from the end of the header on.

    ``seal`` says what it is encrypted with, and tells nobody the key.
    """

    def __init__(self, disk: Disk, header: Header, key: bytes) -> None:
        there = max(0, disk.size - header.start)
        size = min(there, there if header.size is None else header.size) // header.sector * header.sector
        super().__init__(disk, header.start, size)
        self._cipher = libcrypto.SectorCipher(header.cipher, key, header.sector)
        self._tweak = header.tweak
        self.seal = hashlib.sha256(f"{header.cipher} {header.sector} {header.tweak} ".encode() + key).digest()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """The bytes from ``offset`` on."""
        first, last = self._sectors(offset, offset + len(buffer))
        if (first, last) == (offset, offset + len(buffer)):
            self._decrypt(first, buffer)
            return
        whole = memoryview(bytearray(last - first))
        self._decrypt(first, whole)
        buffer[:] = whole[offset - first : offset - first + len(buffer)]

    def moved(self, disk: Disk, start: int) -> Decrypted:
        """The same on another disk, where the encrypted part begins at ``start``."""
        other = copy.copy(self)
        other.disk, other.start = disk, start
        return other

    def encrypted(self, offset: int, data: memoryview) -> tuple[int, memoryview]:
        """The whole sectors that have to stand on the disk for these bytes to be at ``offset``, and where they have to."""
        first, last = self._sectors(offset, offset + len(data))
        whole = memoryview(bytearray(last - first))
        if (first, last) != (offset, offset + len(data)):
            self.read_into(first, whole)
        whole[offset - first : offset - first + len(data)] = data
        self._cipher.encrypt(first // 512 + self._tweak, whole)
        return self.start + first, whole

    def _sectors(self, offset: int, end: int) -> tuple[int, int]:
        """The whole sectors that a range touches; Corrupt for one that leads out."""
        if offset < 0 or end > self.size:
            raise errors.Corrupt(f"the file system reaches to byte {end}, its encrypted volume ends at {self.size}")
        sector = self._cipher.sector
        return offset // sector * sector, -(-end // sector) * sector

    def _decrypt(self, offset: int, buffer: memoryview) -> None:
        if buffer:
            super().read_into(offset, buffer)
            self._cipher.decrypt(offset // 512 + self._tweak, buffer)


def read_header(disk: Disk) -> Header:
    """What a LUKS volume says of itself; Unsupported for what cannot be read although the key is known."""
    with reader.parsing("the header of LUKS"):
        head = window.read(disk, 0, _ONES_SLOTS + _ONES_COUNT * _ONES_SLOT.size)
        version = struct.unpack_from(">H", head, 6)[0]
        if head[:6] != _MAGIC or version not in {1, 2}:
            raise damaged("the header of LUKS")
        found = _read_1(head) if version == 1 else _read_2(disk)
    if not 0 < found.start < disk.size:
        raise errors.Unsupported("the LUKS header here has its volume on another device")
    libcrypto.require_known(found.cipher)
    return found


def mark(disk: Disk) -> str:
    """What tells a header from another one, or from itself with other keys: its first part, which has to do with all of it."""
    return hashlib.sha256(window.read(disk, 0, _TEXT)).hexdigest()[:32]


def seals(disk: Disk) -> frozenset[bytes]:
    """What a volume's bytes are encrypted with, wherever they lie; the same at two moments unless it was encrypted anew."""
    found = {disk.seal} if isinstance(disk, Decrypted) else set()
    if isinstance(disk, Window | Mapped):
        found.update(seal for below, _, _ in disk.parts() if below is not None for seal in seals(below))
    return frozenset(found)


def volume_key(disk: Disk, header: Header, secret: bytes) -> bytes | None:
    """The key of the volume, found with a key of its user; None when none of its slots opens with it.

    That takes long, for it is made to. What was found holds as long as all that it follows from is the same to the byte: the
    headers, the slots, and the user's key.
    """
    end = min(header.slots.end, header.start)
    if end > _HEADER_MAX:
        raise errors.Unsupported(
            f"the slots for keys take {units.format_size(end)}, and no reader here takes more than {units.format_size(_HEADER_MAX)}"
        )
    copy = os.memfd_create("luks")  # what is public, or encrypted by keys; gone when we are
    try:
        digest = hashlib.sha256(b"%d %d %d " % (header.start, header.slots.memory, len(secret)) + secret)
        for at in range(0, end, _PIECE):
            piece = window.read(disk, at, min(_PIECE, end - at))
            digest.update(piece)
            os.pwrite(copy, piece, at)
        os.truncate(copy, header.start + _PIECE)
        kept, name = kept_secrets.page(), digest.digest()
        known = None if kept is None else kept.find(name)
        if known is not None:
            return known[0]
        found = cryptsetup.volume_key(copy, secret, memory=header.slots.memory)
        if kept is not None:
            kept.keep(name, found)
        return found
    finally:
        os.close(copy)


def _read_1(head: bytes) -> Header:
    _, _, cipher, mode, _, payload, size = _ONE.unpack_from(head)
    end = _TEXT
    for number in range(_ONES_COUNT):
        active, iterations, _, at, stripes = _ONES_SLOT.unpack_from(head, _ONES_SLOTS + number * _ONES_SLOT.size)
        if active == _ACTIVE:
            _require_bearable(iterations)
            end = max(end, at * 512 + size * stripes)
    return Header(1, f"{_text(cipher)}-{_text(mode)}", payload * 512, None, Slots(end))


def _read_2(disk: Disk) -> Header:
    try:
        texts = [found for at in (0, *_SIZES) if (found := _copy_at(disk, at)) is not None]
        if not texts:
            raise damaged("both headers of LUKS")
        _, text, size = max(texts)
        about = json.loads(text)
        requirements = about["config"].get("requirements", {}).get("mandatory", [])
        segments = list(about["segments"].values())
        if requirements or len(segments) != 1:
            raise errors.Unsupported(
                f"the LUKS volume needs what no reader here has: {', '.join(map(str, requirements)) or 'several segments'}",
                hint="finish what was begun inside the guest, such as: cryptsetup reencrypt",
            )
        for digest in about["digests"].values():
            _require_bearable(_whole(digest.get("iterations", 0)))
        memory = max((_memory(one["kdf"]) for one in about["keyslots"].values() if "kdf" in one), default=0)
        return _segment(segments[0], Slots(2 * size + _number(about["config"]["keyslots_size"]), memory))
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged("the header of LUKS") from error


def _memory(derivation: dict[str, Any]) -> int:
    """What it takes to try a key on a slot; Unsupported where it would also take longer than anybody waits."""
    if derivation["type"] == "pbkdf2":
        _require_bearable(_whole(derivation["iterations"]))
        return 0
    memory, passes = _whole(derivation["memory"]) * 1024, _whole(derivation["time"])
    if memory * passes > _PASSES_MAX:
        raise _unbearable(f"{passes} passes over {units.format_size(memory)}")
    return memory


def _require_bearable(iterations: int) -> None:
    if iterations > _ITERATIONS_MAX:
        raise _unbearable(f"{iterations} iterations")


def _unbearable(what: str) -> errors.Unsupported:
    return errors.Unsupported(f"each try of a key takes {what}, longer than anybody would wait")


def _whole(value: object) -> int:
    if type(value) is not int or value < 0:
        raise damaged("the header of LUKS")
    return value


def _number(value: object) -> int:
    """What LUKS 2 writes as text, for JSON has no numbers that are large enough."""
    if not isinstance(value, str) or _NUMBER.fullmatch(value) is None:
        raise damaged("the header of LUKS")
    return int(value)


def _segment(segment: dict[str, Any], slots: Slots) -> Header:
    if segment["type"] != "crypt" or "integrity" in segment:
        raise errors.Unsupported("the LUKS volume has checksums of its own (integrity), which no reader here knows")
    sector = _whole(segment["sector_size"])
    size = None if segment["size"] == "dynamic" else _number(segment["size"])
    if sector not in _SECTORS or (size is not None and (size == 0 or size % sector)):
        raise damaged("the header of LUKS")
    return Header(
        version=2,
        cipher=str(segment["encryption"]),
        start=_number(segment["offset"]),
        size=size,
        slots=slots,
        sector=sector,
        tweak=_number(segment["iv_tweak"]),
    )


def _copy_at(disk: Disk, at: int) -> tuple[int, bytes, int] | None:
    """One of the two copies of the header, where it is whole: its number in order, its text, and its size."""
    head = window.read(disk, at, _TEXT)
    if len(head) < _TEXT or head[:6] != (_SECOND_MAGIC if at else _MAGIC):
        return None
    _, version, size, sequence, _, kind, _, _, _, place = _TWO.unpack_from(head)
    if version != 2 or size not in _SIZES or place != at or (at and size != at):
        return None
    raw = bytearray(window.read(disk, at, size))
    stated = bytes(raw[_CHECKSUM])
    raw[_CHECKSUM] = bytes(64)
    try:
        digest = hashlib.new(_text(kind), bytes(raw), usedforsecurity=False).digest()
    except (ValueError, TypeError):  # a hash that nobody knows, or one that has no size of its own
        return None
    if not stated.startswith(digest):
        return None
    return sequence, bytes(raw[_TEXT:]).partition(b"\0")[0], size


def _text(raw: bytes) -> str:
    return raw.partition(b"\0")[0].decode("ascii")
