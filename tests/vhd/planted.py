"""Tiny VHDs made by hand, to be damaged byte by byte; it shares no code with what it tests."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

FIXED, DYNAMIC, DIFFERENCING = 2, 3, 4
BLOCK = 4096
SIZE = 16 * BLOCK - 512  # the last block lies partly behind the disk's end
UID = bytes(range(1, 17))
PARENT_UID = bytes(range(33, 49))
ALL = b"\xff" + bytes(511)  # the bitmap of a whole block of eight sectors
FREE = 0xFFFFFFFF
TIME = 0x28000000

HEADER, BAT = 512, 2560
W2RU, MACX = 1536, 2048  # where the texts of the locators stand


@dataclass
class Planted:
    """The bytes of one image, and where its parts are."""

    data: bytearray
    kind: int
    bat: int = BAT
    blocks: dict[int, int] = field(default_factory=dict)  # offset of the bitmap, by number

    @property
    def end(self) -> int:
        """Where the closing footer begins."""
        return len(self.data) - 512

    def put(self, offset: int, data: bytes) -> None:
        """Bytes as they are, without a new checksum."""
        self.data[offset : offset + len(data)] = data

    def footers(self, offset: int, data: bytes) -> None:
        """A field of both footers, with good checksums."""
        for start in (self.end,) if self.kind == FIXED else (0, self.end):
            self.put(start + offset, data)
            seal(self.data, start, 512, 64)

    def header(self, offset: int, data: bytes) -> None:
        """A field of the header, with a good checksum."""
        self.put(HEADER + offset, data)
        seal(self.data, HEADER, 1024, 36)

    def entry(self, number: int, sector: int) -> None:
        """An entry of the BAT."""
        self.put(self.bat + 4 * number, struct.pack(">I", sector))


def seal(data: bytearray, start: int, length: int, field_offset: int) -> None:
    """The checksum of a footer or header, made right."""
    data[start + field_offset : start + field_offset + 4] = bytes(4)
    total = sum(data[start : start + length])
    data[start + field_offset : start + field_offset + 4] = struct.pack(">I", ~total & 0xFFFFFFFF)


def geometry(size: int) -> tuple[int, int, int]:
    """Of small disks only: at most 1024 cylinders of four heads and 17 sectors."""
    return size // 512 // 17 // 4, 4, 17


def footer(kind: int, size: int = SIZE, uid: bytes = UID) -> bytes:
    """One that nobody finds fault with."""
    cylinders, heads, sectors = geometry(size)
    data = bytearray(512)
    place = (1 << 64) - 1 if kind == FIXED else HEADER
    struct.pack_into(
        ">8sIIQI4sI4sQQHBBI", data, 0, b"conectix", 2, 0x10000, place, TIME,
        b"win ", 0xA0000, b"Wi2k", size, size, cylinders, heads, sectors, kind,
    )  # fmt: skip
    data[68:84] = uid
    seal(data, 0, 512, 64)
    return bytes(data)


def header(entries: int, *, block: int = BLOCK, parent: str | None = None, bat: int = BAT) -> bytes:
    """With the two locators of a child where a parent is named."""
    data = bytearray(1024)
    struct.pack_into(">8sQQIII", data, 0, b"cxsparse", (1 << 64) - 1, bat, 0x10000, entries, block)
    if parent is not None:
        data[40:56] = PARENT_UID
        text = parent.encode("utf-16-be")
        data[64 : 64 + len(text)] = text
        struct.pack_into(">4sIIIQ", data, 576, b"W2ru", 512, len(relative(parent)), 0, W2RU)
        struct.pack_into(">4sIIIQ", data, 600, b"MacX", 512, len(url(parent)), 0, MACX)
    seal(data, 0, 1024, 36)
    return bytes(data)


def relative(parent: str) -> bytes:
    """The text of W2ru."""
    return f".\\{parent}".encode("utf-16-le")


def url(parent: str) -> bytes:
    """The text of MacX."""
    return f"file://./{parent}".encode()


def fixed(size: int = SIZE, fill: bytes = b"f") -> Planted:
    """A fixed disk."""
    return Planted(bytearray(fill * size + footer(FIXED, size)), FIXED)


def sparse(
    blocks: dict[int, tuple[bytes, bytes]] | None = None,
    *,
    size: int = SIZE,
    block: int = BLOCK,
    parent: str | None = None,
    uid: bytes = UID,
    order: list[int] | None = None,
) -> Planted:
    """A dynamic disk, or with ``parent`` a differencing one; ``blocks`` are bitmaps and data, in the file by ``order``."""
    if blocks is None:
        blocks = {number: (ALL, bytes([65 + number]) * block) for number in (1, 2, 15)}
    kind = DYNAMIC if parent is None else DIFFERENCING
    entries = -(-size // block)
    closing = footer(kind, size, uid)
    data = bytearray(closing + header(entries, block=block, parent=parent) + bytes(1024))
    if parent is not None:
        data[W2RU : W2RU + len(relative(parent))] = relative(parent)
        data[MACX : MACX + len(url(parent))] = url(parent)
    data += b"\xff" * (-(-entries * 4 // 512) * 512)
    made = Planted(data, kind)
    for number in order or sorted(blocks):
        made.blocks[number] = len(data)
        made.entry(number, len(data) // 512)
        bitmap, content = blocks[number]
        data += bitmap + content
    data += closing
    return made


def content(made: Planted, size: int = SIZE, block: int = BLOCK, below: bytes | None = None) -> bytes:
    """What the disk reads as, sector by sector, the slow way; ``below`` is the parent's content."""
    if made.kind == FIXED:
        return bytes(made.data[:size])
    disk = bytearray(below or bytes(size))
    for number, place in made.blocks.items():
        bitmap_length = -(-block // 4096 // 512) * 512
        for sector in range(block // 512):
            start = number * block + sector * 512
            if start < size and made.data[place + (sector >> 3)] & (0x80 >> (sector & 7)):
                at = place + bitmap_length + sector * 512
                disk[start : start + 512] = made.data[at : at + 512]
    return bytes(disk)
