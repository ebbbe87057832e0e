"""LVM2: the logical volumes of the physical ones that are there, read from their metadata; nothing is activated.

Source: the LVM2 on-disk format (lvm2, ``lib/format_text``) and its text grammar. Linear and striped volumes are shown; what
needs more than a table of places (thin, cache, RAID, snapshots) is named with the reason.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hvmgr.storage.filesystems import reader, window
from hvmgr.storage.filesystems.reader import damaged
from hvmgr.storage.filesystems.window import Mapped
from hvmgr.storage.partitions import Disk

_SECTOR, _LABELS = 512, 4
_LABEL, _TYPE, _MAGIC = b"LABELONE", b"LVM2 001", b" LVM2 x[5A%r0N*>"
_AREAS_MAX, _TEXT_MAX, _DEPTH_MAX = 16, 64 << 20, 16
_STRIPES_MAX = 1 << 20
_ORIGIN = {"origin", "external_origin"}  # of a snapshot, and of a thin one
_TOKEN = re.compile(rb'\s+|#[^\n]*|(?P<word>[A-Za-z0-9_.+-]+)|"(?P<text>(?:[^"\\]|\\.)*)"|(?P<sign>[{}\[\]=,])')


@dataclass(frozen=True, slots=True)
class Logical:
    """A logical volume by its name, ``group/volume``; without a disk ``why`` says why it cannot be read.

    ``physical`` are the physical volumes of its group, as far as they are here.
    """

    name: str
    size: int
    uuid: str
    disk: Disk | None
    physical: tuple[Disk, ...]
    why: str = ""
    copied: str = ""  # what stands on its being as it is: whoever writes it past LVM spoils that


@dataclass(frozen=True, slots=True)
class _Physical:
    disk: Disk
    uuid: str
    text: bytes


def volumes(disks: Sequence[Disk]) -> list[Logical]:
    """The logical volumes on these physical ones; Corrupt where their metadata makes no sense."""
    with reader.parsing("the metadata of LVM"):
        physical = [_read(disk) for disk in disks]
        groups: dict[str, dict[str, Any]] = {}
        for one in physical:
            for name, group in _parsed(one.text).items():
                if isinstance(group, dict) and "physical_volumes" in group:
                    known = groups.get(name)
                    if known is None or group.get("seqno", 0) > known.get("seqno", 0):
                        groups[name] = group
        places = {one.uuid: one.disk for one in physical}
        try:
            return [found for name, group in sorted(groups.items()) for found in _volumes(name, group, places)]
        except (KeyError, TypeError, AttributeError) as error:  # something is missing, or of another shape
            raise damaged("the metadata of LVM") from error


def _read(disk: Disk) -> _Physical:
    head = window.read(disk, 0, _LABELS * _SECTOR)
    for at in range(0, len(head), _SECTOR):
        if head[at : at + 8] == _LABEL and head[at + 24 : at + 32] == _TYPE:
            offset = at + struct.unpack_from("<I", head, at + 20)[0]
            uuid = head[offset : offset + 32].decode("ascii")
            return _Physical(disk, uuid, _text(disk, list(_areas(head, offset + 40))))
    raise damaged("the label of LVM")


def _areas(head: bytes, at: int) -> Iterator[tuple[int, int]]:
    """The metadata's areas: behind the list of the data's, which ends in zeros as this one does."""
    lists = 0
    for place in range(at, at + 32 * _AREAS_MAX, 16):
        offset, size = struct.unpack_from("<QQ", head, place)
        if not offset:
            lists += 1
            if lists == 2:
                return
        elif lists == 1:
            yield offset, size


def _text(disk: Disk, areas: Sequence[tuple[int, int]]) -> bytes:
    for offset, size in areas:
        header = window.read(disk, offset, _SECTOR)
        if header[4:20] != _MAGIC:
            continue
        place, length = struct.unpack_from("<QQ", header, 40)
        if not place or not length:
            continue
        if length > _TEXT_MAX or place >= size:
            raise damaged("the metadata of LVM")
        first = min(length, size - place)  # the area is a ring behind its header
        text = window.read(disk, offset + place, first)
        return (text + window.read(disk, offset + _SECTOR, length - first)).rstrip(b"\0")
    return b""


# --- the text -------------------------------------------------------------------------------------------------------


def _parsed(text: bytes) -> dict[str, Any]:
    tokens = _tokens(text)
    found: dict[str, Any] = {}
    _section(tokens, found, 0)
    return found


def _tokens(text: bytes) -> Iterator[tuple[str, str]]:
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise damaged("the metadata of LVM")
        at = match.end()
        if match.lastgroup is not None:
            yield match.lastgroup, match[match.lastgroup].decode("utf-8", "replace")


def _section(tokens: Iterator[tuple[str, str]], found: dict[str, Any], depth: int) -> None:
    if depth > _DEPTH_MAX:
        raise damaged("the metadata of LVM")
    for kind, name in tokens:
        if (kind, name) == ("sign", "}"):
            return
        following = next(tokens, ("", ""))
        if following == ("sign", "{"):
            inner: dict[str, Any] = {}
            _section(tokens, inner, depth + 1)
            found[name] = inner
        elif following == ("sign", "="):
            found[name] = _value(tokens)
        else:
            raise damaged("the metadata of LVM")


def _value(tokens: Iterator[tuple[str, str]]) -> Any:
    kind, word = next(tokens, ("", ""))
    if (kind, word) != ("sign", "["):
        return int(word) if kind == "word" and word.lstrip("-").isdigit() else word
    values: list[Any] = []
    for one, text in tokens:
        if (one, text) == ("sign", "]"):
            return values
        if (one, text) != ("sign", ","):
            values.append(int(text) if one == "word" and text.isdigit() else text)
    raise damaged("the metadata of LVM")


# --- volumes --------------------------------------------------------------------------------------------------------


def _volumes(name: str, group: Mapping[str, Any], places: Mapping[str, Disk]) -> Iterator[Logical]:
    extent = int(group["extent_size"]) * _SECTOR
    starts: dict[str, tuple[Disk | None, int]] = {}
    for key, one in group["physical_volumes"].items():
        starts[key] = (places.get(str(one["id"]).replace("-", "")), int(one["pe_start"]) * _SECTOR)
    here = tuple(disk for disk, _ in starts.values() if disk is not None)
    logical = group.get("logical_volumes", {})
    origins = {
        segment[word] for one in logical.values() for segment in _segments(one) for word in _ORIGIN & segment.keys()
    }
    for key, one in logical.items():
        if "VISIBLE" not in one.get("status", []):
            continue  # a part of another one
        segments = _segments(one)
        size = sum(int(segment["extent_count"]) for segment in segments) * extent
        title, uuid = f"{name}/{key}", str(one.get("id", ""))
        why = _why_not(segments, starts)
        if why:
            yield Logical(title, size, uuid, None, here, why)
            continue
        parts = [part for segment in segments for part in _parts(segment, extent, starts)]
        copied = "a snapshot of it (LVM) holds what is changed only" if key in origins else ""
        yield Logical(title, size, uuid, Mapped(parts), here, copied=copied)


def _segments(one: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [one[f"segment{number}"] for number in range(1, int(one["segment_count"]) + 1)]


def _why_not(segments: Sequence[Mapping[str, Any]], starts: Mapping[str, tuple[Disk | None, int]]) -> str:
    for segment in segments:
        if segment.get("type") != "striped":
            return f"it is of the kind {segment.get('type')}, which libguestfs may know: --reader libguestfs"
        for name in segment["stripes"][::2]:
            if starts[name][0] is None:
                return f"a part of it lies on another disk ({name} of its volume group)"
    return ""


def _parts(
    segment: Mapping[str, Any], extent: int, starts: Mapping[str, tuple[Disk | None, int]]
) -> Iterator[tuple[Disk | None, int, int]]:
    count, length = int(segment["stripe_count"]), int(segment["extent_count"]) * extent
    names, extents = segment["stripes"][::2], segment["stripes"][1::2]
    begins = [(starts[name][0], starts[name][1] + int(at) * extent) for name, at in zip(names, extents, strict=True)]
    if count != len(begins) or not count:
        raise damaged("the metadata of LVM")
    if count == 1:
        yield begins[0][0], begins[0][1], length
        return
    step = int(segment["stripe_size"]) * _SECTOR
    if not step or length // step > _STRIPES_MAX:
        raise damaged("the metadata of LVM")
    for number in range(length // step):
        disk, at = begins[number % count]
        yield disk, at + number // count * step, step


__all__ = ["Logical", "volumes"]
