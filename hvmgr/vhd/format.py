"""The structures of a VHD as values: footer, header, locators, geometry, time stamps. No I/O.

All integers are big-endian and a sector is always 512 bytes (Virtual Hard Disk Image Format Specification 1.0). Nothing
here judges: ``unpack`` takes any bytes of the right length, and ``pack`` gives them back with a right checksum.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum

SECTOR = 512
FOOTER_SIZE = 512
HEADER_SIZE = 1024
FOOTER_COOKIE = b"conectix"
HEADER_COOKIE = b"cxsparse"
BATMAP_COOKIE = b"tdbatmap"
MAX_SIZE = 0xFF000000 * SECTOR  # 2040 GiB: what Windows and QEMU accept
DEFAULT_BLOCK = 2 << 20
MIN_BLOCK, MAX_BLOCK = 512 << 10, 256 << 20  # what is written; smaller ones are read
ALIGNMENT = 4096  # where the data of a block begins, so that 4 KiB of the guest are 4 KiB of the file
UNUSED = 0xFFFFFFFF  # a block that the file does not hold
NOWHERE = 0xFFFFFFFFFFFFFFFF  # an offset that leads nowhere
VERSION = 0x00010000
RESERVED_FEATURE, TEMPORARY_FEATURE = 2, 1
CREATOR, CREATOR_VERSION, CREATOR_HOST = b"win ", 0x000A0000, b"Wi2k"  # of Windows 10: all believe its size
NO_ID = bytes(16)
EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
NAME_UNITS = 256  # UTF-16 units that the name of the parent may have
LOCATORS = 8

FOOTER_SUM_AT, HEADER_SUM_AT = 64, 36

_FOOTER = struct.Struct(">8sIIQI4sI4sQQHBBII16sBB426s")
_HEADER = struct.Struct(">8sQQIIII16sII512s192s256s")
_LOCATOR = struct.Struct(">4sIIIQ")


class Kind(StrEnum):
    """What a VHD holds: the whole disk, what was written, what differs from its parent."""

    FIXED = "fixed"
    DYNAMIC = "dynamic"
    DIFFERENCING = "differencing"

    @property
    def number(self) -> int:
        """The disk type in the footer."""
        return _NUMBERS[self]


_NUMBERS = {Kind.FIXED: 2, Kind.DYNAMIC: 3, Kind.DIFFERENCING: 4}
_KINDS = {number: kind for kind, number in _NUMBERS.items()}


@dataclass(frozen=True, slots=True)
class Geometry:
    """Cylinders, heads and sectors per track, as old programs see the disk."""

    cylinders: int
    heads: int
    sectors: int

    @property
    def size(self) -> int:
        """The bytes that it covers."""
        return self.cylinders * self.heads * self.sectors * SECTOR


MAX_GEOMETRY = Geometry(65535, 16, 255)


def geometry(size: int) -> Geometry:
    """The geometry of a disk of ``size`` bytes; it rounds down (specification, "CHS Calculation")."""
    total = min(size // SECTOR, MAX_GEOMETRY.size // SECTOR)
    if total >= 65535 * 16 * 63:
        heads, sectors = 16, 255
    else:
        tracks = total // 17
        heads, sectors = max(4, -(-tracks // 1024)), 17
        if heads > 16 or tracks >= 1024 * heads:
            heads, sectors = 16, 31
            if total // 31 >= 1024 * 16:
                sectors = 63
    return Geometry(total // sectors // heads, heads, sectors)


def checksum(data: bytes | memoryview, at: int) -> int:
    """One's complement of the sum of all bytes, those of the checksum itself (four at ``at``) left out."""
    return ~(sum(data) - sum(data[at : at + 4])) & 0xFFFFFFFF


def has_right_sum(data: bytes | memoryview, at: int) -> bool:
    """Whether the checksum at ``at`` is the one of these bytes."""
    return int.from_bytes(data[at : at + 4], "big") == checksum(data, at)


def _with_sum(data: bytes, at: int) -> bytes:
    return data[:at] + checksum(data, at).to_bytes(4, "big") + data[at + 4 :]


def to_stamp(moment: datetime | None) -> int:
    """Seconds since 2000, as a VHD holds them; 0 for None (unknown) and for everything before."""
    if moment is None:
        return 0
    return min(max(0, int((moment - EPOCH).total_seconds())), 0xFFFFFFFF)


def from_stamp(stamp: int) -> datetime | None:
    """The moment in UTC; None for 0, which real writers mean as unknown."""
    return EPOCH + timedelta(seconds=stamp) if stamp else None


@dataclass(frozen=True, slots=True)
class Footer:
    """The 512 bytes at the end of each VHD, and at the start of all but the fixed ones."""

    size: int
    type: int
    uid: bytes
    time: int = 0
    data_offset: int = SECTOR
    geometry: Geometry = MAX_GEOMETRY
    original_size: int = 0
    creator: bytes = CREATOR
    creator_version: int = CREATOR_VERSION
    creator_host: bytes = CREATOR_HOST
    features: int = RESERVED_FEATURE
    version: int = VERSION
    saved_state: int = 0
    hidden: int = 0
    reserved: bytes = bytes(426)
    cookie: bytes = FOOTER_COOKIE

    @property
    def kind(self) -> Kind | None:
        """None for a type that this format does not have."""
        return _KINDS.get(self.type)

    def pack(self) -> bytes:
        """The 512 bytes, with their checksum."""
        geometry = self.geometry
        data = _FOOTER.pack(
            self.cookie,
            self.features,
            self.version,
            self.data_offset,
            self.time,
            self.creator,
            self.creator_version,
            self.creator_host,
            self.original_size,
            self.size,
            geometry.cylinders,
            geometry.heads,
            geometry.sectors,
            self.type,
            0,
            self.uid,
            self.saved_state,
            self.hidden,
            self.reserved,
        )
        return _with_sum(data, FOOTER_SUM_AT)

    @classmethod
    def unpack(cls, data: bytes | memoryview) -> Footer:
        """The fields of 512 bytes, right or wrong; 511 bytes, as very old programs wrote, count as followed by a zero."""
        if len(data) == FOOTER_SIZE - 1:
            data = bytes(data) + b"\0"
        (
            cookie,
            features,
            version,
            data_offset,
            time,
            creator,
            creator_version,
            creator_host,
            original_size,
            size,
            cylinders,
            heads,
            sectors,
            type_,
            _,
            uid,
            saved_state,
            hidden,
            reserved,
        ) = _FOOTER.unpack(data)
        return cls(
            size=size,
            type=type_,
            uid=uid,
            time=time,
            data_offset=data_offset,
            geometry=Geometry(cylinders, heads, sectors),
            original_size=original_size,
            creator=creator,
            creator_version=creator_version,
            creator_host=creator_host,
            features=features,
            version=version,
            saved_state=saved_state,
            hidden=hidden,
            reserved=reserved,
            cookie=cookie,
        )


class Code(StrEnum):
    """What a locator holds."""

    RELATIVE = "W2ru"
    ABSOLUTE = "W2ku"
    URL = "MacX"
    ALIAS = "Mac "
    OLD_RELATIVE = "Wi2r"
    OLD_ABSOLUTE = "Wi2k"


@dataclass(frozen=True, slots=True)
class Locator:
    """Where a text that leads to the parent stands in the file."""

    code: bytes = bytes(4)
    space: int = 0  # as written: sectors by the specification, bytes in real files
    length: int = 0
    offset: int = 0
    reserved: int = 0

    @property
    def is_unused(self) -> bool:
        """Whether the entry says nothing."""
        return self.code == bytes(4)

    @property
    def space_bytes(self) -> int:
        """The place that the text has; -1 when the number makes no sense in either unit."""
        if self.space < SECTOR:
            return self.space * SECTOR
        return self.space if self.space % SECTOR == 0 else -1

    def pack(self) -> bytes:
        """The 24 bytes."""
        return _LOCATOR.pack(self.code, self.space, self.length, self.reserved, self.offset)

    @classmethod
    def unpack(cls, data: bytes | memoryview) -> Locator:
        """The fields of 24 bytes."""
        code, space, length, reserved, offset = _LOCATOR.unpack(data)
        return cls(code, space, length, offset, reserved)


@dataclass(frozen=True, slots=True)
class Header:
    """The 1024 bytes of a dynamic or differencing VHD that say where its blocks are."""

    table_offset: int
    entries: int
    block_size: int = DEFAULT_BLOCK
    parent_uid: bytes = NO_ID
    parent_time: int = 0
    parent_name: bytes = bytes(2 * NAME_UNITS)
    locators: tuple[Locator, ...] = (Locator(),) * LOCATORS
    next_offset: int = NOWHERE
    version: int = VERSION
    reserved_word: int = 0
    reserved: bytes = bytes(256)
    cookie: bytes = HEADER_COOKIE

    @property
    def name(self) -> str:
        """The parent's name as people read it; what is no text in it is shown as such."""
        return decode_text(self.parent_name, "utf-16-be")

    def pack(self) -> bytes:
        """The 1024 bytes, with their checksum."""
        data = _HEADER.pack(
            self.cookie,
            self.next_offset,
            self.table_offset,
            self.version,
            self.entries,
            self.block_size,
            0,
            self.parent_uid,
            self.parent_time,
            self.reserved_word,
            self.parent_name,
            b"".join(locator.pack() for locator in self.locators),
            self.reserved,
        )
        return _with_sum(data, HEADER_SUM_AT)

    @classmethod
    def unpack(cls, data: bytes | memoryview) -> Header:
        """The fields of 1024 bytes, right or wrong."""
        (
            cookie,
            next_offset,
            table_offset,
            version,
            entries,
            block_size,
            _,
            parent_uid,
            parent_time,
            reserved_word,
            parent_name,
            locators,
            reserved,
        ) = _HEADER.unpack(data)
        return cls(
            table_offset=table_offset,
            entries=entries,
            block_size=block_size,
            parent_uid=parent_uid,
            parent_time=parent_time,
            parent_name=parent_name,
            locators=tuple(Locator.unpack(locators[at : at + 24]) for at in range(0, len(locators), 24)),
            next_offset=next_offset,
            version=version,
            reserved_word=reserved_word,
            reserved=reserved,
            cookie=cookie,
        )


def encode_name(name: str) -> bytes:
    """A name for the header's field: UTF-16BE, padded; what is too long is cut, for the locators have it whole."""
    data = name.encode("utf-16-be", "surrogatepass")[: 2 * NAME_UNITS]
    return data.ljust(2 * NAME_UNITS, b"\0")


def encode_text(code: Code, text: str) -> bytes:
    """A text for a locator of this code."""
    return text.encode("utf-8" if code is Code.URL else "utf-16-le", "surrogatepass")


def decode_text(data: bytes, encoding: str) -> str:
    """A text up to its terminator; bytes that are no text become U+FFFD, and never an error."""
    return data.decode(encoding, "replace").partition("\0")[0]


def locator_text(code: bytes, data: bytes) -> str | None:
    """What a locator says: None for codes whose content is no text, or no portable one."""
    if code in (b"W2ru", b"W2ku"):
        return decode_text(data, "utf-16-le")
    return decode_text(data, "utf-8") if code == b"MacX" else None


def round_up(number: int, unit: int) -> int:
    """The next multiple of ``unit``."""
    return -(-number // unit) * unit


def bitmap_size(block_size: int) -> int:
    """The bytes of the bitmap before each block's data: one bit for each sector, whole sectors."""
    return round_up(-(-block_size // SECTOR // 8), SECTOR)


def block_count(size: int, block_size: int) -> int:
    """How many blocks a disk has."""
    return -(-size // block_size)


def table_size(entries: int) -> int:
    """The bytes of a block allocation table, padded to whole sectors."""
    return round_up(4 * entries, SECTOR)
