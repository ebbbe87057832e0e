"""exFAT, read from bytes. Source: "exFAT file system specification", Microsoft, revision 1.00."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hvmgr import errors
from hvmgr.storage.filesystems import fat, reader
from hvmgr.storage.filesystems.fat import Allocation
from hvmgr.storage.filesystems.reader import Bytes, Content, Geometry, Node, Runs, Type, Watched, damaged
from hvmgr.storage.filesystems.window import Cached, Run
from hvmgr.storage.partitions import Disk

_LABEL, _FILE, _STREAM, _NAME = 0x83, 0x85, 0xC0, 0xC1
_LABEL_MAX = 11
_NO_CHAIN = 2
_FOLDER = 0x10
_WORDS = {0x1: "read-only", 0x2: "hidden", 0x4: "system", 0x20: "archive"}
_FOLDER_MAX = 256 << 20
_DIRTY = 2


@dataclass(frozen=True, slots=True)
class _Stream:
    """Where a content lies; ``about`` is the file's own entry, and ``place`` where it stands."""

    about: bytes
    place: int
    first: int
    size: int
    valid: int
    is_contiguous: bool


class ExFat(Watched):
    """A volume with exFAT."""

    ignores_case = True

    def __init__(self, disk: Disk) -> None:
        self.title = "hvmgr's own reader of exFAT"
        self.notes: list[str] = []
        self._disk, self._cached = disk, Cached(disk)
        with reader.parsing("its boot sector"):
            boot = self._cached.read(0, 512)
            table, _, heap, count, root = struct.unpack_from("<IIIII", boot, 80)
            flags, sector_shift, cluster_shift = struct.unpack_from("<HBB", boot, 106)
            if not 9 <= sector_shift <= 12 or cluster_shift > 25 - sector_shift:
                raise damaged("its boot sector makes no sense")
            self._cluster = 1 << sector_shift + cluster_shift
            self._heap = heap << sector_shift
            count = min(count, (disk.size - self._heap) // self._cluster)
            if not 2 <= root < count + 2:
                raise damaged("its boot sector makes no sense")
            self._table = Allocation(self._cached, table << sector_shift, count, 32)
            self._geometry = Geometry((table << sector_shift, self._heap, self._cluster, root))
            self._root = _Stream(b"", 0, root, _FOLDER_MAX, _FOLDER_MAX, is_contiguous=False)
            if flags & _DIRTY:
                self.notes.append("the exFAT volume was not unmounted cleanly")

    def label(self) -> str:
        """What the volume is called, as an entry in the first cluster of its topmost folder says, where a format puts it."""
        with reader.parsing("its topmost folder"):
            for _, raw in itertools.islice(self._entries(self._root), self._cluster // 32):
                if raw[0] == _LABEL:
                    return raw[2 : 2 + 2 * min(raw[1], _LABEL_MAX)].decode("utf-16-le", "replace")
                if raw[0] == 0:
                    break
            return ""

    def root(self) -> Node:
        return Node(id=0, ref=self._root, type=Type.FOLDER, size=0)

    def names(self, folder: Node) -> Iterator[tuple[bytes, Any]]:
        with reader.parsing("a folder"):
            entries = self._entries(folder.ref)
            for place, raw in entries:
                if raw[0] == 0:
                    return
                if raw[0] != _FILE:
                    continue
                more = [next(entries, (0, b""))[1] for _ in range(raw[1])]
                if len(more) < 2 or more[0][:1] != bytes([_STREAM]):
                    raise damaged("a folder has a file without content")
                name = b"".join(one[2:32] for one in more[1:] if one[:1] == bytes([_NAME]))
                text = name[: 2 * more[0][3]].decode("utf-16-le", "surrogatepass")
                valid, first, size = struct.unpack_from("<Q4xIQ", more[0], 8)
                found = _Stream(raw, place, first, size, valid, bool(more[0][1] & _NO_CHAIN))
                if text not in {"", ".", ".."}:
                    yield text.encode("utf-8", "surrogatepass"), found

    def _entries(self, folder: _Stream) -> Iterator[tuple[int, bytes]]:
        if folder.size > _FOLDER_MAX:
            raise damaged(f"a folder has {folder.size} bytes")
        for length, start in self._runs(folder, folder.size):
            for at in range(0, length or 0, self._cluster):
                assert start is not None
                raw = self._cached.read(start + at, self._cluster)
                for one in range(0, len(raw) - 31, 32):
                    yield start + at + one, raw[one : one + 32]

    def _runs(self, stream: _Stream, size: int) -> list[Run]:
        limit = min(-(-size // self._cluster), self._table.count)
        chain = [*([(stream.first, limit)] if stream.is_contiguous else self._table.chain(stream.first, limit))]
        if any(not 2 <= first <= first + count <= self._table.count + 2 for first, count in chain):
            raise damaged("a content lies outside of the volume")
        return [Run(count * self._cluster, self._heap + (first - 2) * self._cluster) for first, count in chain]

    def stat(self, ref: Any) -> Node:
        if not ref.about:
            return self.root()
        with reader.parsing("an entry of a folder"):
            raw = ref.about
            (attributes,) = struct.unpack_from("<H", raw, 4)
            born, modified, accessed = struct.unpack_from("<III", raw, 8)
            is_folder = bool(attributes & _FOLDER)
            return Node(
                id=ref.place,
                ref=ref,
                type=Type.FOLDER if is_folder else Type.FILE,
                size=0 if is_folder else ref.size,
                born=_time(born, raw[20], raw[22]),
                modified=_time(modified, raw[21], raw[23]),
                accessed=_time(accessed, 0, raw[24]),
                attributes=tuple(word for bit, word in _WORDS.items() if attributes & bit),
            )

    def content(self, node: Node, stream: str = "") -> Content:
        if stream:
            raise errors.NotFound(f"exFAT has no named streams, and so no '{stream}'")
        with reader.parsing("an entry of a folder"):
            if not node.size:
                return Bytes(b"")
            runs = self._runs(node.ref, node.size)
            if sum(one.length for one in runs) < min(node.size, node.ref.valid):
                raise damaged("a file ends before its size")
            return Runs(self._cached, runs, node.size, node.ref.valid)

    def geometry(self) -> Geometry:
        return self._geometry

    def extras(self, node: Node) -> Mapping[str, bytes]:  # noqa: ARG002 - it has none
        return {}


def _time(stamp: int, tens: int, zone: int) -> int | None:
    quarters = (zone & 0x7F) - (0x80 if zone & 0x40 else 0) if zone & 0x80 else 0
    return fat.to_unix(stamp >> 16, stamp & 0xFFFF, tens, zone=quarters * 900)
