"""What a VHDX says of itself: its type, its size, and the parent of a differencing one. Read from its tables alone.

[MS-VHDX] 2.2 to 2.6. QEMU reads and writes the data of fixed and dynamic ones; it refuses a differencing one without a
word about its parent. All places and sizes are bytes, all numbers little-endian.
"""

from __future__ import annotations

import struct
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from hvmgr import errors

SIGNATURE = b"vhdxfile"

_CREATOR = slice(8, 520)
_REGION_TABLES = (192 << 10, 256 << 10)
_TABLE_SIZE = 64 << 10
_REGION = struct.Struct("<16sQII")
_ITEM = struct.Struct("<16sIIII")
_ENTRY = struct.Struct("<IIHH")
_ENTRIES_MAX = 2047
_METADATA_MAX = 64 << 20  # nobody has more than 1 MiB

_METADATA = uuid.UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e")
_PARAMETERS = uuid.UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b")
_SIZE = uuid.UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8")
_ID = uuid.UUID("beca12ab-b2e6-4523-93ef-c309e000c746")
_PARENT = uuid.UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c")

_FIXED, _HAS_PARENT = 1, 2


@dataclass(frozen=True, slots=True)
class Facts:
    """One VHDX; ``parents`` are the texts of its parent locator by key, as they are stored."""

    size: int
    block_size: int
    is_fixed: bool
    is_differencing: bool
    id: str | None
    creator: str
    parents: dict[str, str]

    @property
    def parent(self) -> str | None:
        """The name of the parent, in the order in which Windows tries the paths."""
        for key in ("relative_path", "volume_path", "absolute_win32_path"):
            if self.parents.get(key):
                return self.parents[key]
        return self.parents.get("parent_linkage")


def read(path: Path) -> Facts:
    """The facts of the file; Corrupt with the place where its tables cannot be understood."""
    try:
        with path.open("rb") as file:
            head = file.read(_CREATOR.stop)
            if not head.startswith(SIGNATURE):
                raise errors.Corrupt(f"{path} is no VHDX", path=str(path))
            start, length = _metadata_region(path, file)
            file.seek(start)
            region = file.read(length)
    except FileNotFoundError as error:
        raise errors.NotFound(f"the image {path} is missing", path=str(path)) from error
    except OSError as error:
        raise errors.HostFailed(f"{path} cannot be read: {error.strerror}", path=str(path)) from error
    items = _items(path, region)
    if len(items.get(_PARAMETERS, b"")) < 8 or len(items.get(_SIZE, b"")) < 8:
        raise errors.Corrupt(f"{path}: its metadata at {start} lack the size of the disk", path=str(path))
    block_size, flags = struct.unpack_from("<II", items[_PARAMETERS])
    (size,) = struct.unpack_from("<Q", items[_SIZE])
    found_id = items.get(_ID, b"")
    creator = head[_CREATOR].decode("utf-16-le", "replace").partition("\0")[0]
    is_differencing = bool(flags & _HAS_PARENT)
    return Facts(
        size=size,
        block_size=block_size,
        is_fixed=bool(flags & _FIXED),
        is_differencing=is_differencing,
        id=str(uuid.UUID(bytes_le=found_id[:16])) if len(found_id) >= 16 else None,
        creator=creator,
        parents=_locator(items.get(_PARENT, b"")) if is_differencing else {},
    )


def _metadata_region(path: Path, file: BinaryIO) -> tuple[int, int]:
    for place in _REGION_TABLES:
        file.seek(place)
        table = file.read(_TABLE_SIZE)
        if len(table) < 16 or table[:4] != b"regi":
            continue
        (count,) = struct.unpack_from("<I", table, 8)
        for number in range(min(count, _ENTRIES_MAX)):
            if 16 + (number + 1) * _REGION.size > len(table):
                break
            guid, offset, length, _ = _REGION.unpack_from(table, 16 + number * _REGION.size)
            if uuid.UUID(bytes_le=guid) == _METADATA and _TABLE_SIZE <= length <= _METADATA_MAX:
                return offset, length
    where = " and ".join(map(str, _REGION_TABLES))
    raise errors.Corrupt(f"{path}: neither region table (at {where}) names its metadata", path=str(path))


def _items(path: Path, region: bytes) -> dict[uuid.UUID, bytes]:
    if region[:8] != b"metadata" or len(region) < _TABLE_SIZE:
        raise errors.Corrupt(f"{path}: its metadata cannot be read", path=str(path))
    (count,) = struct.unpack_from("<H", region, 10)
    found = {}
    for number in range(min(count, _ENTRIES_MAX)):
        guid, offset, length, _, _ = _ITEM.unpack_from(region, 32 + number * _ITEM.size)
        if offset + length > len(region):
            raise errors.Corrupt(f"{path}: an item of its metadata lies outside them", path=str(path))
        found[uuid.UUID(bytes_le=guid)] = region[offset : offset + length]
    return found


def _locator(item: bytes) -> dict[str, str]:
    """The pairs of a parent locator; one that lies outside is left out."""
    if len(item) < 20:
        return {}
    (count,) = struct.unpack_from("<H", item, 18)
    found = {}
    for number in range(count):
        if 20 + (number + 1) * _ENTRY.size > len(item):
            break
        key, value, key_length, value_length = _ENTRY.unpack_from(item, 20 + number * _ENTRY.size)
        texts = [item[at : at + length] for at, length in ((key, key_length), (value, value_length))]
        name, text = (one.decode("utf-16-le", "replace").rstrip("\0") for one in texts)
        found[name] = text
    return found
