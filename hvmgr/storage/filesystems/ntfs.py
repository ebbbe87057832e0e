"""NTFS, read from bytes: files with their named streams, security descriptors, links, compressed and sparse contents.

Source: the NTFS documentation of the Linux-NTFS project, and what ``mkntfs`` and Windows write. Records are read by their
number, folders by the blocks that their bitmap says are in use. System files do not show.
"""

from __future__ import annotations

import bisect
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hvmgr import errors
from hvmgr.model.ranges import Ranges
from hvmgr.storage.filesystems import ntfs_data, reader
from hvmgr.storage.filesystems.ntfs_data import Attribute, Geometry
from hvmgr.storage.filesystems.reader import Bytes, Content, Node, Type, Watched, damaged
from hvmgr.storage.filesystems.window import Cached, Run
from hvmgr.storage.partitions import Disk

_MFT, _VOLUME, _ROOT, _SECURE, _FIRST_USER = 0, 3, 5, 9, 24
_STANDARD, _LIST, _NAME, _SECURITY, _VOLUME_NAME, _VOLUME_INFO = 0x10, 0x20, 0x30, 0x50, 0x60, 0x70
_DATA, _INDEX_ROOT, _INDEX, _BITMAP, _REPARSE = 0x80, 0x90, 0xA0, 0xB0, 0xC0
_IN_USE, _FOLDER = 1, 2
_ENTRY_LAST = 2
_DOS_NAME = 2
_VOLUME_DIRTY = 1
_FOLDER_INDEX = "$I30"
_REFERENCE, _SEQUENCE = (1 << 48) - 1, 48
_LIST_MAX, _INDEX_MAX = 16 << 20, 1 << 30
_LINK_SYMBOLIC, _LINK_MOUNT, _LINK_LINUX, _WOF, _DEDUP = 0xA000000C, 0xA0000003, 0xA000001D, 0x80000017, 0x80000013
_OUR_TARGET_MAX = 16 << 10
_INTERIX = b"IntxLNK\x01"
_SYSTEM = 0x4
_ATTRIBUTES = {
    0x1: "read-only", 0x2: "hidden", 0x4: "system", 0x20: "archive", 0x200: "sparse", 0x400: "reparse-point",
    0x800: "compressed", 0x1000: "offline", 0x2000: "not-indexed", 0x4000: "encrypted",
}  # fmt: skip
_DEFAULT_SECTOR = 512


@dataclass(slots=True)
class _Record:
    """A file: its base record with the attributes of all its records. Each use of a record has another ``sequence``."""

    number: int
    sequence: int
    flags: int
    links: int
    attributes: dict[tuple[int, str], list[Attribute]] = field(default_factory=dict)

    def find(self, kind: int, name: str = "") -> list[Attribute] | None:
        """The parts of one attribute, in order."""
        return self.attributes.get((kind, name))


class Ntfs(Watched):
    """A volume with NTFS. A file's ``ref`` is its record's number, and the sequence that the record has to have; 0: any."""

    ignores_case = True

    def __init__(self, disk: Disk) -> None:
        self.title = "hvmgr's own reader of NTFS"
        self.notes: list[str] = []
        self._disk, self._cached = disk, Cached(disk)
        with reader.parsing("its boot sector"):
            self._about = ntfs_data.read_geometry(self._cached.read(0, 512), disk.size)
        self._mft: list[Run] = [Run(1 << 20, self._about.mft)]
        self._mft_starts = [0]
        self._security: dict[int, tuple[int, int]] | None = None
        self._security_from = Ranges()  # where that was read
        with reader.parsing("its master file table"):
            self._use_mft(self._load(_MFT, whole=False))
            self._use_mft(self._load(_MFT))
            self._look_at_volume()

    def _use_mft(self, record: _Record) -> None:
        parts = record.find(_DATA)
        if parts is None:
            raise damaged("its master file table has no content")
        self._mft = ntfs_data.runs_of(parts, self._about)
        self._mft_starts, at = [], 0
        for one in self._mft:
            self._mft_starts.append(at)
            at += one.length

    def _look_at_volume(self) -> None:
        parts = self._load(_VOLUME).find(_VOLUME_INFO)
        if parts and struct.unpack_from("<H", parts[0].value, 10)[0] & _VOLUME_DIRTY:
            self.notes.append(
                "the NTFS volume was not unmounted cleanly, and its log is not replayed, as only Windows can do that: what was"
                " changed in the last seconds may be missing, or half there"
            )

    def label(self) -> str:
        """What the volume is called, as its file $Volume says."""
        with reader.parsing("its volume record"):
            parts = self._load(_VOLUME).find(_VOLUME_NAME)
            return parts[0].value.decode("utf-16-le", "replace") if parts and parts[0].is_resident else ""

    # -- what a reader gives -------------------------------------------------------------------------------------

    def root(self) -> Node:
        return self.stat((_ROOT, 0))

    def names(self, folder: Node) -> Iterator[tuple[bytes, Any]]:
        for space, name, number, sequence in self._names(folder):
            if space != _DOS_NAME:
                yield name, (number, sequence)

    def short_names(self, folder: Node) -> Iterator[tuple[bytes, bytes]]:
        short, long = dict[int, bytes](), dict[int, bytes]()
        for space, name, number, _ in self._names(folder):
            (short if space == _DOS_NAME else long)[number] = name
        yield from ((name, long.get(number, name)) for number, name in short.items())

    def _names(self, folder: Node) -> Iterator[tuple[int, bytes, int, int]]:
        with reader.parsing(f"folder {folder.id}"):
            record = self._load(*folder.ref)
            for key, reference in self._index(record, _FOLDER_INDEX):
                length, space = key[64], key[65]
                number = reference & _REFERENCE
                name = key[66 : 66 + 2 * length].decode("utf-16-le", "surrogatepass")
                if number >= _FIRST_USER and name not in {".", ".."}:
                    yield space, name.encode("utf-8", "surrogatepass"), number, reference >> _SEQUENCE

    def stat(self, ref: Any) -> Node:
        number, sequence = ref
        with reader.parsing(f"record {number}"):
            return self._node(self._load(number, sequence))

    def content(self, node: Node, stream: str = "") -> Content:
        with reader.parsing(f"record {node.id}"):
            record = self._load(*node.ref)
            parts = record.find(_DATA, stream)
            if parts is not None and not stream:
                self._require_readable(record)
        return self.stored(node, stream)

    def stored(self, node: Node, stream: str = "") -> Content:
        with reader.parsing(f"record {node.id}"):
            parts = self._load(*node.ref).find(_DATA, stream)
            if parts is None:
                if not stream:
                    return Bytes(b"")
                raise errors.NotFound(f"the file has no stream '{stream}'")
            return ntfs_data.content_of(self._cached, parts, self._about)

    def geometry(self) -> reader.Geometry:
        about, table = self._about, list[int]()
        for length, start in reader.joined(self._mft):
            first = -1 if start is None else start
            table += range(first, first + length, about.cluster) if start is not None else [-1]
        return reader.Geometry((about.cluster, about.record), tuple(table))

    def extras(self, node: Node) -> Mapping[str, bytes]:
        with reader.parsing(f"record {node.id}"):
            record = self._load(*node.ref)
            standard = self._standard(record)
            found = {"system.ntfs_attrib": struct.pack("<I", standard[4])}
            descriptor = self._descriptor(record, standard[5])
            if descriptor:
                found["system.ntfs_acl"] = descriptor
            return found

    # -- files ---------------------------------------------------------------------------------------------------

    def _node(self, record: _Record) -> Node:
        born, modified, changed, accessed, flags, _ = self._standard(record)
        main = record.find(_DATA)
        kind = Type.FOLDER if record.flags & _FOLDER else Type.FILE
        target: bytes | None = None
        reparse = record.find(_REPARSE)
        if reparse is not None:
            tag, target = _reparsed(
                reader.whole(ntfs_data.content_of(self._cached, reparse, self._about), _OUR_TARGET_MAX)
            )
            if target is not None:
                kind = Type.LINK
            elif tag not in {_WOF, _DEDUP}:
                kind = Type.OTHER if kind is Type.FILE and main is None else kind
        elif flags & _SYSTEM and kind is Type.FILE and main is not None and main[0].size <= _OUR_TARGET_MAX:
            target = self._interix(main)
            kind = Type.LINK if target is not None else kind
        streams = [
            (name, parts[0].size) for (which, name), parts in record.attributes.items() if which == _DATA and name
        ]
        return Node(
            id=record.number,
            ref=(record.number, record.sequence),
            type=kind,
            size=len(target) if target is not None else 0 if main is None or kind is Type.FOLDER else main[0].size,
            links=max(1, record.links - _short_names(record)),
            modified=modified,
            changed=changed,
            accessed=accessed,
            born=born,
            target=target,
            streams=tuple(sorted(streams)),
            attributes=tuple(word for bit, word in _ATTRIBUTES.items() if flags & bit),
            used=sum(parts[0].allocated for (which, _), parts in record.attributes.items() if which == _DATA),
            generation=record.sequence,
        )

    def _interix(self, main: list[Attribute]) -> bytes | None:
        """A link as ntfs-3g and Services for UNIX make it: a small system file."""
        data = reader.whole(ntfs_data.content_of(self._cached, main, self._about), _OUR_TARGET_MAX)
        if not data.startswith(_INTERIX):
            return None
        return data[len(_INTERIX) :].decode("utf-16-le", "surrogatepass").encode("utf-8", "surrogatepass")

    def _standard(self, record: _Record) -> tuple[int, int, int, int, int, int]:
        parts = record.find(_STANDARD)
        if parts is None or len(parts[0].value) < 36:
            raise damaged(f"record {record.number} has no times")
        value = parts[0].value
        born, modified, changed, accessed, flags = struct.unpack_from("<QQQQI", value)
        security = struct.unpack_from("<I", value, 52)[0] if len(value) >= 56 else 0
        return (
            ntfs_data.to_unix(born), ntfs_data.to_unix(modified), ntfs_data.to_unix(changed), ntfs_data.to_unix(accessed),
            flags, security,
        )  # fmt: skip

    def _require_readable(self, record: _Record) -> None:
        parts = record.find(_DATA)
        if parts and parts[0].is_encrypted:
            raise errors.Unsupported("this file is encrypted (EFS), and its key is only in the guest")
        reparse = record.find(_REPARSE)
        if reparse is None:
            return
        (tag,) = struct.unpack_from(
            "<I", reader.whole(ntfs_data.content_of(self._cached, reparse, self._about), 64 << 10)
        )
        if tag == _WOF:
            raise errors.Unsupported("this file is compressed by Windows' CompactOS, which no reader here knows")
        if tag == _DEDUP:
            raise errors.Unsupported("this file is deduplicated by Windows, which no reader here knows")

    # -- security descriptors ------------------------------------------------------------------------------------

    def _descriptor(self, record: _Record, number: int) -> bytes:
        own = record.find(_SECURITY)
        if own is not None:
            return reader.whole(ntfs_data.content_of(self._cached, own, self._about), 1 << 20)
        if not number:
            return b""
        secure = self._load(_SECURE)
        if self._security is None:
            self._security = {}
            with self._cached.watched() as asked:
                for key, data in self._view(secure, "$SII"):
                    place, size = struct.unpack_from("<QI", data, 8)
                    self._security[struct.unpack_from("<I", key)[0]] = (place, size)
            self._security_from = Ranges(asked)
        for start, end in self._security_from:
            self._cached.note(start, end - start)
        place, size = self._security.get(number, (0, 0))
        stream = secure.find(_DATA, "$SDS")
        if size <= 20 or size > 1 << 20 or stream is None:
            return b""
        runs = ntfs_data.runs_of(stream, self._about)
        return self._read_runs(runs, place, size)[20:]

    def _read_runs(self, runs: list[Run], offset: int, length: int) -> bytes:
        found, at = b"", 0
        for one in runs:
            first, last = max(at, offset), min(at + one.length, offset + length)
            if first < last:
                place = one.start
                found += bytes(last - first) if place is None else self._cached.read(place + first - at, last - first)
            at += one.length
        return found

    # -- records -------------------------------------------------------------------------------------------------

    def _load(self, number: int, sequence: int = 0, *, whole: bool = True) -> _Record:
        """A file by the number of its base record, and by the sequence that it has had since it was made; 0: any."""
        raw = self._raw(number, sequence)
        flags, links = struct.unpack_from("<H", raw, 22)[0], struct.unpack_from("<H", raw, 18)[0]
        (base,) = struct.unpack_from("<Q", raw, 32)
        if not flags & _IN_USE or base:
            raise damaged(f"record {number} is no file")
        record = _Record(number, _sequence(raw), flags, links)
        parts = list(ntfs_data.attributes_of(raw))
        listed = next((one for one in parts if one.kind == _LIST), None) if whole else None
        if listed is not None:
            parts += self._listed(record, listed)
        for one in parts:
            record.attributes.setdefault((one.kind, one.name), []).append(one)
        for same in record.attributes.values():
            same.sort(key=lambda one: one.first)
        return record

    def _listed(self, record: _Record, listed: Attribute) -> Iterator[Attribute]:
        """The attributes in other records than the base one."""
        data = reader.whole(ntfs_data.content_of(self._cached, [listed], self._about), _LIST_MAX)
        others, at = dict[int, None](), 0
        while at + 26 <= len(data):
            length, reference = struct.unpack_from("<H", data, at + 4)[0], struct.unpack_from("<Q", data, at + 16)[0]
            if length < 26:
                raise damaged(f"the list of attributes of record {record.number}")
            others[reference] = None
            at += length
        for other in others:
            number, sequence = other & _REFERENCE, other >> _SEQUENCE
            if number == record.number:
                continue
            raw = self._raw(number, sequence)
            (base,) = struct.unpack_from("<Q", raw, 32)
            if base & _REFERENCE != record.number or base >> _SEQUENCE not in {0, record.sequence}:
                raise damaged(f"record {number} does not belong to {record.number}")
            yield from ntfs_data.attributes_of(raw)

    def _raw(self, number: int, sequence: int = 0) -> bytes:
        size = self._about.record
        offset = number * size
        index = bisect.bisect_right(self._mft_starts, offset) - 1
        found = self._mft[index]
        inside = offset - self._mft_starts[index]
        if number < 0 or found.start is None or inside + size > found.length:
            raw = self._read_runs(self._mft, offset, size)
        else:
            raw = self._cached.read(found.start + inside, size)
        if len(raw) < size or raw[:4] != b"FILE":
            raise damaged(f"there is no record {number}")
        if sequence and _sequence(raw) != sequence:
            raise damaged(f"record {number} was used again: what leads to it means a file that is gone")
        return ntfs_data.fixed(raw)

    # -- indexes -------------------------------------------------------------------------------------------------

    def _index(self, record: _Record, name: str) -> Iterator[tuple[bytes, int]]:
        """The keys of an index with the references that they lead to."""
        for node in self._nodes(record, name):
            for entry in _entries(node):
                (reference,) = struct.unpack_from("<Q", entry)
                yield entry[16:], reference

    def _view(self, record: _Record, name: str) -> Iterator[tuple[bytes, bytes]]:
        """The keys of an index with the data that they have."""
        for node in self._nodes(record, name):
            for entry in _entries(node):
                offset, length = struct.unpack_from("<HH", entry)
                yield entry[16:], entry[offset : offset + length]

    def _nodes(self, record: _Record, name: str) -> Iterator[bytes]:
        """The parts of an index, each from its header on."""
        root = record.find(_INDEX_ROOT, name)
        if root is None:
            raise damaged(f"record {record.number} is no folder")
        value = root[0].value
        (size,) = struct.unpack_from("<I", value, 8)
        yield value[16:]
        more, bitmap = record.find(_INDEX, name), record.find(_BITMAP, name)
        if more is None or bitmap is None:
            return
        if not (_DEFAULT_SECTOR <= size <= 1 << 20) or size & (size - 1):
            raise damaged(f"the index of record {record.number}")
        used = reader.whole(ntfs_data.content_of(self._cached, bitmap, self._about), _LIST_MAX)
        runs = ntfs_data.runs_of(more, self._about)
        for number in _bits(used):
            if number >= more[0].size // size:
                return
            if len(runs) > 1:
                raw = self._read_runs(runs, number * size, size)
            else:
                raw = self._in_one(runs, number * size, size)
            if raw[:4] != b"INDX":
                raise damaged(f"the index of record {record.number}")
            yield ntfs_data.fixed(raw)[24:]

    def _in_one(self, runs: list[Run], offset: int, size: int) -> bytes:
        if not runs or runs[0].start is None or offset + size > runs[0].length:
            raise damaged("an index")
        return self._cached.read(runs[0].start + offset, size)


def _short_names(record: _Record) -> int:
    """How many of its names are the second ones (8.3) of others, which the record counts as well."""
    return sum(len(one.value) > 65 and one.value[65] == _DOS_NAME for one in record.find(_NAME) or [])


def _sequence(raw: bytes) -> int:
    """How often a record has been used."""
    found: int = struct.unpack_from("<H", raw, 16)[0]
    return found


def _bits(bitmap: bytes) -> Iterator[int]:
    """The numbers of the bits that are set."""
    for index, byte in enumerate(bitmap):
        if byte:
            yield from (8 * index + bit for bit in range(8) if byte >> bit & 1)


def _entries(node: bytes) -> Iterator[bytes]:
    """The entries of one part of an index."""
    at, end = struct.unpack_from("<II", node)
    if end > len(node):
        raise damaged("an index")
    while at + 16 <= end:
        length, _, flags = struct.unpack_from("<HHH", node, at + 8)
        if flags & _ENTRY_LAST:
            return
        if length < 16 or at + length > end:
            raise damaged("an index")
        yield node[at : at + length]
        at += length


def _reparsed(data: bytes) -> tuple[int, bytes | None]:
    """What a reparse point says: its tag, and the target if it is a link."""
    (tag,) = struct.unpack_from("<I", data)
    if tag == _LINK_LINUX:
        return tag, data[12:]
    if tag not in {_LINK_SYMBOLIC, _LINK_MOUNT}:
        return tag, None
    offset, length, print_offset, print_length = struct.unpack_from("<HHHH", data, 8)
    names = data[20 if tag == _LINK_SYMBOLIC else 16 :]
    raw = names[print_offset : print_offset + print_length] or names[offset : offset + length]
    text = raw.decode("utf-16-le", "surrogatepass").removeprefix("\\??\\").replace("\\", "/")
    if len(text) > 1 and text[1] == ":":
        text = text[2:] or "/"  # the drive letter is Windows' affair
    return tag, text.encode("utf-8", "surrogatepass")


__all__ = ["Geometry", "Ntfs"]
