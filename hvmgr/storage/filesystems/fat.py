"""FAT12, FAT16 and FAT32, read from bytes, with long names.

Source: "Microsoft Extensible Firmware Initiative FAT32 File System Specification" 1.03. FAT says no zone with its times:
they are taken as UTC.
"""

from __future__ import annotations

import calendar
import struct
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hvmgr import errors
from hvmgr.storage.filesystems import reader
from hvmgr.storage.filesystems.reader import Bytes, Content, Geometry, Node, Runs, Type, Watched, damaged
from hvmgr.storage.filesystems.window import Cached, Run
from hvmgr.storage.partitions import Disk

_ENTRY = struct.Struct("<11sBBBHHHHHHHI")
_READ_ONLY, _HIDDEN, _SYSTEM, _LABEL, _FOLDER, _ARCHIVE, _LONG = 1, 2, 4, 8, 16, 32, 15
_WORDS = {_READ_ONLY: "read-only", _HIDDEN: "hidden", _SYSTEM: "system", _ARCHIVE: "archive"}
_FOLDER_MAX = 2 << 20
_FREE, _END, _LOWER_NAME, _LOWER_SUFFIX = 0xE5, 0, 8, 16


@dataclass(frozen=True, slots=True)
class _File:
    """A folder's entry, and where it stands on the disk; the root has none."""

    raw: bytes
    place: int


class Allocation:
    """The table that leads from cluster to cluster, of FAT and exFAT; ``bits`` is 12, 16 or 32."""

    def __init__(self, cached: Cached, start: int, count: int, bits: int, *, mask: int = 0xFFFFFFFF) -> None:
        self._cached, self._start, self._bits, self._mask = cached, start, bits, mask
        self.count = count  # of clusters; the first one is number 2
        self._pieces: dict[int, array[int]] = {}

    def entry(self, cluster: int) -> int:
        """What follows a cluster."""
        if self._bits == 12:
            pair = struct.unpack("<H", self._cached.read(self._start + cluster * 3 // 2, 2))[0]
            return int(pair >> 4 if cluster & 1 else pair & 0xFFF)
        per_piece = 16384
        number, index = divmod(cluster, per_piece)
        self._cached.note(self._start + cluster * self._bits // 8, self._bits // 8)
        found = self._pieces.get(number)
        if found is None:
            width = self._bits // 8
            found = array("H" if width == 2 else "I")
            length = min(per_piece, self.count + 2 - number * per_piece) * width
            found.frombytes(self._cached.read(self._start + number * per_piece * width, length))
            self._pieces[number] = found
        following: int = found[index] & self._mask
        return following

    def chain(self, first: int, limit: int) -> Iterator[tuple[int, int]]:
        """The clusters from the first one on as (cluster, how many follow each other), at most ``limit`` of them.

        Corrupt where they go round: each is held against one before, which moves up at every power of two.
        """
        cluster, start, length, left = first, first, 0, limit
        before, until, steps = 0, 1, 0
        while left > 0 and 2 <= cluster < self.count + 2:
            if cluster == before:
                raise damaged(f"the clusters of a file go round at {cluster}")
            steps += 1
            if steps == until:
                before, until = cluster, 2 * until
            if cluster != start + length:
                yield start, length
                start, length = cluster, 0
            length, left = length + 1, left - 1
            cluster = self.entry(cluster)
        if length:
            yield start, length


class Fat(Watched):
    """A volume with FAT."""

    ignores_case = True

    def __init__(self, disk: Disk) -> None:
        self.title = "hvmgr's own reader of FAT"
        self.notes: list[str] = []
        self._disk, self._cached = disk, Cached(disk)
        with reader.parsing("its boot sector"):
            self._read_boot(self._cached.read(0, 512))

    def _read_boot(self, boot: bytes) -> None:
        sector, per_cluster, reserved, copies, roots, small = struct.unpack_from("<HBHBHH", boot, 11)
        length_16, large, length_32 = struct.unpack_from("<H8xII", boot, 22)
        if sector not in {512, 1024, 2048, 4096} or not per_cluster or per_cluster & (per_cluster - 1) or not copies:
            raise damaged("its boot sector makes no sense")
        self._cluster: int = sector * per_cluster
        length = length_16 or length_32
        self._root_start = (reserved + copies * length) * sector
        self._root_size = roots * 32
        self._data: int = self._root_start + -(-self._root_size // sector) * sector
        count = ((small or large) * sector - self._data) // self._cluster
        if count < 1 or not length:
            raise damaged("its boot sector makes no sense")
        bits = 12 if count < 4085 else 16 if count < 65525 else 32
        mask = 0x0FFFFFFF if bits == 32 else 0xFFFF
        self._table = Allocation(self._cached, reserved * sector, count, bits, mask=mask)
        self._root_cluster = struct.unpack_from("<I", boot, 44)[0] if bits == 32 else 0
        clean = {12: 0, 16: 0x8000, 32: 0x08000000}[bits]
        if clean and not self._table.entry(1) & clean:
            self.notes.append("the FAT volume was not unmounted cleanly")

    # -- what a reader gives -------------------------------------------------------------------------------------

    def root(self) -> Node:
        return Node(id=0, ref=None, type=Type.FOLDER, size=0)

    def names(self, folder: Node) -> Iterator[tuple[bytes, Any]]:
        for name, found in self._files(folder):
            yield name.encode("utf-8", "surrogatepass"), found

    def short_names(self, folder: Node) -> Iterator[tuple[bytes, bytes]]:
        for name, found in self._files(folder):
            short = _short_name(found.raw)
            if short != name:
                yield short.encode(), name.encode("utf-8", "surrogatepass")

    def _files(self, folder: Node) -> Iterator[tuple[str, _File]]:
        with reader.parsing("a folder"):
            long: dict[int, bytes] = {}
            for place, raw in self._entries(folder.ref):
                if raw[0] == _END:
                    return
                attributes = raw[11]
                if raw[0] == _FREE:
                    long.clear()
                elif attributes & 0x3F == _LONG:
                    if raw[0] & 0x40:
                        long.clear()
                    long[raw[0] & 0x3F] = raw
                elif attributes & _LABEL:
                    long.clear()
                else:
                    name = _long_name(long, raw) or _short_name(raw)
                    long.clear()
                    if name not in {".", ".."}:
                        yield name, _File(raw, place)

    def _entries(self, folder: _File | None) -> Iterator[tuple[int, bytes]]:
        for start, length in self._places(folder):
            raw = self._cached.read(start, length)
            for at in range(0, len(raw) - 31, 32):
                yield start + at, raw[at : at + 32]

    def _places(self, folder: _File | None) -> Iterator[tuple[int, int]]:
        first = self._root_cluster if folder is None else _first_cluster(folder.raw)
        if first == 0:  # the root, also as the parent of a folder in it
            yield self._root_start, self._root_size
            return
        for cluster, count in self._table.chain(first, _FOLDER_MAX // self._cluster + 1):
            for one in range(count):
                yield self._place(cluster + one), self._cluster

    def stat(self, ref: Any) -> Node:
        if ref is None:
            return self.root()
        with reader.parsing("an entry of a folder"):
            _, attributes, _, tenths, born, born_day, seen_day, _, time, day, _, size = _ENTRY.unpack(ref.raw)
            is_folder = bool(attributes & _FOLDER)
            return Node(
                id=ref.place,
                ref=ref,
                type=Type.FOLDER if is_folder else Type.FILE,
                size=0 if is_folder else size,
                modified=to_unix(day, time),
                accessed=to_unix(seen_day, 0),
                born=to_unix(born_day, born, tenths),
                attributes=tuple(word for bit, word in _WORDS.items() if attributes & bit),
            )

    def content(self, node: Node, stream: str = "") -> Content:
        if stream:
            raise errors.NotFound(f"FAT has no named streams, and so no '{stream}'")
        with reader.parsing("an entry of a folder"):
            if not node.size:
                return Bytes(b"")
            limit = -(-node.size // self._cluster)
            chain = self._table.chain(_first_cluster(node.ref.raw), limit)
            runs = [Run(count * self._cluster, self._place(cluster)) for cluster, count in chain]
            if sum(one.length for one in runs) < node.size:
                raise damaged("a file ends before its size")
            return Runs(self._cached, runs, node.size)

    def geometry(self) -> Geometry:
        return Geometry(
            (self._cluster, self._root_start, self._root_size, self._root_cluster, self._data, self._table.count)
        )

    def extras(self, node: Node) -> Mapping[str, bytes]:  # noqa: ARG002 - it has none
        return {}

    def _place(self, cluster: int) -> int:
        return self._data + (cluster - 2) * self._cluster


def _first_cluster(raw: bytes) -> int:
    high: int = struct.unpack_from("<H", raw, 20)[0]
    low: int = struct.unpack_from("<H", raw, 26)[0]
    return high << 16 | low


def _short_name(raw: bytes) -> str:
    first = b"\xe5" if raw[0] == 5 else raw[:1]
    name = (first + raw[1:8]).decode("cp437").rstrip()
    suffix = raw[8:11].decode("cp437").rstrip()
    name = name.lower() if raw[12] & _LOWER_NAME else name
    suffix = suffix.lower() if raw[12] & _LOWER_SUFFIX else suffix
    return f"{name}.{suffix}" if suffix else name


def _long_name(parts: Mapping[int, bytes], short: bytes) -> str | None:
    """The long name before a short one; None when there is none that belongs to it."""
    if not parts or sorted(parts) != list(range(1, len(parts) + 1)):
        return None
    total = 0
    for byte in short[:11]:
        total = ((total >> 1) + ((total & 1) << 7) + byte) & 0xFF
    if any(one[13] != total for one in parts.values()):
        return None
    raw = b"".join(parts[one][1:11] + parts[one][14:26] + parts[one][28:32] for one in sorted(parts))
    return raw.decode("utf-16-le", "surrogatepass").partition("\0")[0]


def to_unix(day: int, time: int, tenths: int = 0, *, zone: int = 0) -> int | None:
    """A day and a time of FAT's in nanoseconds since 1970; ``zone`` is seconds east of UTC."""
    year, month, date = 1980 + (day >> 9), day >> 5 & 15, day & 31
    if not (1 <= month <= 12 and 1 <= date <= 31):
        return None
    seconds = calendar.timegm((year, month, date, time >> 11, time >> 5 & 63, (time & 31) * 2)) - zone
    return seconds * 1_000_000_000 + tenths * 10_000_000
