"""ISO 9660 with Rock Ridge or Joliet, read from bytes.

Sources: ECMA-119, "System Use Sharing Protocol" 1.12 and "Rock Ridge Interchange Protocol" 1.12. Rock Ridge is taken where
it is there, then Joliet, else the plain names without their version.
"""

from __future__ import annotations

import calendar
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hvmgr import errors
from hvmgr.storage.filesystems import reader
from hvmgr.storage.filesystems.ext import TYPES
from hvmgr.storage.filesystems.reader import Bytes, Content, Geometry, Node, Runs, Type, Watched, damaged
from hvmgr.storage.filesystems.window import Cached, Run
from hvmgr.storage.partitions import Disk

_SECTOR = 2048
_PRIMARY, _SUPPLEMENTARY, _END = 1, 2, 255
_JOLIET = {b"%/@", b"%/C", b"%/E"}
_FOLDER, _GOES_ON = 2, 128
_FOLDER_MAX = 256 << 20
_ZONE_MAX = 52  # quarters of an hour
_AREAS_MAX, _NAME_MAX, _LINK_MAX = 100, 255, 4096
_TIMES = ("born", "modified", "accessed", "changed")


@dataclass(slots=True)
class _Rock:
    """What Rock Ridge says of a name."""

    name: bytes = b""
    mode: int | None = None
    links: int = 1
    uid: int | None = None
    gid: int | None = None
    target: list[bytes] = field(default_factory=list)
    joins: bool = False
    times: dict[str, int | None] = field(default_factory=dict)
    device: tuple[int, int] | None = None
    is_moved: bool = False
    place: int | None = None
    is_compressed: bool = False
    size: int | None = None  # of what is compressed


@dataclass(frozen=True, slots=True)
class _File:
    parts: tuple[tuple[int, int], ...]  # where, and how many bytes
    raw: bytes
    rock: _Rock | None
    place: int

    @property
    def size(self) -> int:
        if self.rock is not None and self.rock.size is not None:
            return self.rock.size
        return sum(length for _, length in self.parts)


class Iso(Watched):
    """A volume with ISO 9660."""

    def __init__(self, disk: Disk) -> None:
        self.notes: list[str] = []
        self._disk, self._cached = disk, Cached(disk)
        self._joliet, self._skip = False, -1
        with reader.parsing("its descriptors"):
            primary, joliet = self._descriptors()
            (self._block,) = struct.unpack_from("<H", primary, 128)
            if self._block not in {512, 1024, 2048}:
                raise damaged("its descriptor makes no sense")
            self._root = self._record(primary[156:190], 0)
            first = self._cached.read(self._root.parts[0][0], 255)
            use = first[33 + first[32] : first[0]] if first else b""
            if len(use) >= 7 and use[:2] == b"SP" and use[4:6] == b"\xbe\xef":
                # Only the folder's own entry says what the root is; nothing is skipped in that one.
                self._root = _File(self._root.parts, first, self._rock(first[: first[0]], 0), 0)
                self._skip = use[6]
            elif joliet is not None:
                self._joliet = True
                self._root = self._record(joliet[156:190], 0)
        names = "Rock Ridge" if self._skip >= 0 else "Joliet" if self._joliet else "plain names"
        self.title = f"hvmgr's own reader of ISO 9660, {names}"
        self.ignores_case = self._skip < 0

    def _descriptors(self) -> tuple[bytes, bytes | None]:
        primary = joliet = None
        for number in range(16, 116):
            raw = self._cached.read(number * _SECTOR, _SECTOR)
            if raw[1:6] != b"CD001" or raw[0] == _END:
                break
            if raw[0] == _PRIMARY and primary is None:
                primary = raw
            if raw[0] == _SUPPLEMENTARY and raw[88:91] in _JOLIET:
                joliet = raw
        if primary is None:
            raise damaged("it has no primary descriptor")
        return primary, joliet

    # -- what a reader gives -------------------------------------------------------------------------------------

    def root(self) -> Node:
        return self.stat(self._root)

    def names(self, folder: Node) -> Iterator[tuple[bytes, Any]]:
        with reader.parsing("a folder"):
            pending: list[tuple[int, int]] = []
            for place, raw in self._records(folder.ref):
                found = self._record(raw, place)
                pending += found.parts
                if raw[25] & _GOES_ON:
                    continue
                name = self._name(raw, found.rock)
                whole, pending = tuple(pending), []
                if found.rock is not None and found.rock.is_moved:
                    continue
                if name not in {b"", b".", b".."}:
                    yield name, _File(whole, found.raw, found.rock, found.place)

    def _records(self, folder: _File) -> Iterator[tuple[int, bytes]]:
        start, size = folder.parts[0]
        if size > _FOLDER_MAX:
            raise damaged(f"a folder has {size} bytes")
        for sector in range(start, start + size, _SECTOR):
            raw = self._cached.read(sector, _SECTOR)
            at = 0
            while at < len(raw) and raw[at]:
                length = raw[at]
                if length < 34 or at + length > len(raw):
                    raise damaged("a folder has a record that makes no sense")
                record = raw[at : at + length]
                if record[33 : 33 + record[32]] not in {b"\0", b"\1"}:
                    yield sector + at, record
                at += length

    def _record(self, raw: bytes, place: int) -> _File:
        extent, size = struct.unpack_from("<I4xI", raw, 2)
        rock = self._rock(raw, self._skip) if self._skip >= 0 else None
        if rock is not None and rock.place is not None:  # a folder that was moved up, because it lay too deep
            start = rock.place * self._block
            first = self._cached.read(start, 34)
            return _File(((start, struct.unpack_from("<I", first, 10)[0]),), first, rock, start)
        return _File((((extent + raw[1]) * self._block, size),), raw, rock, place)

    def _name(self, raw: bytes, rock: _Rock | None) -> bytes:
        name = raw[33 : 33 + raw[32]]
        if rock is not None and rock.name:
            return rock.name
        if self._joliet:
            text = name.decode("utf-16-be", "surrogatepass")
            return _without_version(text).encode("utf-8", "surrogatepass")
        return _without_version(name.decode("latin-1")).lower().encode()

    def stat(self, ref: Any) -> Node:
        with reader.parsing("a record of a folder"):
            rock = ref.rock or _Rock()
            kind = Type.FOLDER if ref.raw[25] & _FOLDER else Type.FILE
            if rock.mode is not None and kind is Type.FILE:
                kind = TYPES.get(stat.S_IFMT(rock.mode), Type.OTHER)
            target = _joined(rock) if kind is Type.LINK else None
            written = _time(ref.raw[18:25])
            return Node(
                id=ref.place or ref.parts[0][0],
                ref=ref,
                type=kind,
                size=len(target) if target is not None else ref.size if kind is Type.FILE else 0,
                mode=None if rock.mode is None else rock.mode & 0o7777,
                uid=rock.uid,
                gid=rock.gid,
                links=rock.links,
                modified=rock.times.get("modified") or written,
                accessed=rock.times.get("accessed"),
                changed=rock.times.get("changed"),
                born=rock.times.get("born"),
                target=target,
                device=rock.device,
            )

    def content(self, node: Node, stream: str = "") -> Content:
        if stream:
            raise errors.NotFound(f"ISO 9660 has no named streams, and so no '{stream}'")
        if node.ref.rock is not None and node.ref.rock.is_compressed:
            raise errors.Unsupported("this file is compressed (zisofs), which no reader here knows")
        if not node.size:
            return Bytes(b"")
        if node.size > self._disk.size:
            raise damaged(f"a file of {node.size} bytes is larger than the disk")
        return Runs(self._cached, [Run(length, start) for start, length in node.ref.parts], node.size)

    def geometry(self) -> Geometry:
        return Geometry((self._block, self._root.parts, self._joliet, self._skip))

    def extras(self, node: Node) -> Mapping[str, bytes]:  # noqa: ARG002 - it has none
        return {}

    # -- Rock Ridge ----------------------------------------------------------------------------------------------

    def _rock(self, raw: bytes, skip: int) -> _Rock:
        found = _Rock()
        at = 33 + raw[32] + (1 - raw[32] % 2) + skip
        area: bytes | None = raw[at:]
        for _ in range(_AREAS_MAX):
            if area is None:
                break
            area = self._parse_area(area, found)
            if len(found.name) > _NAME_MAX or len(_joined(found)) > _LINK_MAX:
                raise damaged("a name, or the target of a link, is longer than any can be")
        return found

    def _parse_area(self, area: bytes, found: _Rock) -> bytes | None:
        """Takes in one area; the one that follows it, if there is one."""
        following, at = None, 0
        while at + 4 <= len(area):
            kind, length = area[at : at + 2], area[at + 2]
            if length < 4:
                break
            data = area[at + 4 : at + length]
            if kind == b"CE":
                block, offset, size = struct.unpack_from("<I4xI4xI", data)
                following = self._cached.read(block * self._block + offset, min(size, 64 << 10))
            elif kind == b"ST":
                break
            else:
                _take_in(kind, data, found)
            at += length
        return following


def _take_in(kind: bytes, data: bytes, found: _Rock) -> None:
    if kind == b"NM" and not data[0] & 6:
        found.name += data[1:]
    elif kind == b"PX":
        found.mode, found.links, found.uid, found.gid = struct.unpack_from("<I4xI4xI4xI", data)
    elif kind == b"SL":
        _take_in_target(data, found)
    elif kind == b"TF":
        _take_in_times(data, found)
    elif kind == b"PN":
        found.device = struct.unpack_from("<I4xI", data)
    elif kind == b"RE":
        found.is_moved = True
    elif kind == b"CL":
        (found.place,) = struct.unpack_from("<I", data)
    elif kind == b"ZF":
        found.is_compressed = True
        if data[:2] == b"pz":
            (found.size,) = struct.unpack_from("<I", data, 4)


def _take_in_target(data: bytes, found: _Rock) -> None:
    at = 1
    while at + 2 <= len(data):
        flags, length = data[at], data[at + 1]
        part = data[at + 2 : at + 2 + length]
        part = b"." if flags & 2 else b".." if flags & 4 else b"" if flags & 8 else part
        if found.joins and found.target:
            found.target[-1] += part
        else:
            found.target.append(part)
        found.joins = bool(flags & 1)
        at += 2 + length


def _take_in_times(data: bytes, found: _Rock) -> None:
    flags, at = data[0], 1
    size = 17 if flags & 0x80 else 7
    for bit, word in enumerate(_TIMES):
        if flags >> bit & 1:
            if size == 7:
                found.times[word] = _time(data[at : at + 7])
            at += size


def _joined(rock: _Rock) -> bytes:
    if rock.target == [b""]:
        return b"/"
    return b"/".join(rock.target)


def _without_version(name: str) -> str:
    head, mark, version = name.rpartition(";")
    name = head if mark and version.isdigit() else name
    return name.removesuffix(".")


def _time(raw: bytes) -> int | None:
    if len(raw) < 7 or not 1 <= raw[1] <= 12 or not 1 <= raw[2] <= 31:
        return None
    zone = raw[6] - 256 if raw[6] > 127 else raw[6]
    zone = zone if abs(zone) <= _ZONE_MAX else 0  # as Linux does: some programs write anything there
    return (calendar.timegm((1900 + raw[0], raw[1], raw[2], raw[3], raw[4], raw[5])) - zone * 900) * 1_000_000_000
