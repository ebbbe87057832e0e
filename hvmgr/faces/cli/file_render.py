"""How files inside disks are shown: lists, trees, facts, and their JSON documents."""

from __future__ import annotations

import base64
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from hvmgr import units
from hvmgr.faces.cli import render
from hvmgr.storage.filesystems.reader import Type

if TYPE_CHECKING:
    from hvmgr.operations.inside.browsing import Browser, Found
    from hvmgr.operations.inside.views import Volume
    from hvmgr.storage.file_index import Entry
    from hvmgr.storage.filesystems.reader import Node

_LETTERS = {
    Type.FILE: stat.S_IFREG, Type.FOLDER: stat.S_IFDIR, Type.LINK: stat.S_IFLNK, Type.BLOCK: stat.S_IFBLK,
    Type.CHARACTER: stat.S_IFCHR, Type.PIPE: stat.S_IFIFO, Type.SOCKET: stat.S_IFSOCK,
}  # fmt: skip
HEADERS = ("Mode", "Links", "Owner", "Group", "Size", "Changed", "Path")
_BRANCH, _LAST, _BAR, _GAP = "├── ", "└── ", "│   ", "    "


# --- documents ------------------------------------------------------------------------------------------------------


def name_of(path: bytes) -> dict[str, Any]:
    """A path in JSON; ``path_base64`` has its bytes where they are no UTF-8."""
    return _bytes("path", path)


def _bytes(key: str, value: bytes) -> dict[str, Any]:
    try:
        return {key: value.decode()}
    except UnicodeDecodeError:
        return {key: value.decode("utf-8", "replace"), f"{key}_base64": base64.b64encode(value).decode()}


def entry(browser: Browser, one: Found, *, extras: bool = False) -> dict[str, Any]:
    """A file."""
    node = one.node
    document = {
        **name_of(one.path),
        "type": node.type.value,
        "size": one.size,
        "mode": octal(node.mode),
        "uid": node.uid,
        "gid": node.gid,
        "links": node.links,
        "id": node.id,
        "modified": stored(node.modified),
        "changed": stored(node.changed),
        "accessed": stored(node.accessed),
        "born": stored(node.born),
        **({"target": None} if node.target is None else _bytes("target", node.target)),
        "device": None if node.device is None else list(node.device),
        "streams": [{"name": name, "size": size} for name, size in node.streams],
        "attributes": list(node.attributes),
        "disk": browser.volume.disk.slot,
        "partition": browser.volume.number,
    }
    if extras:
        found = browser.reader.extras(node)
        document["extended"] = {name: base64.b64encode(value).decode() for name, value in found.items()}
    return document


def source(browser: Browser) -> dict[str, Any]:
    """The file system that something was found in, who read it, and what is to be known."""
    return {
        **volume(browser.volume),
        "of": browser.volume.disk.name,
        "moment": browser.volume.disk.moment,
        "reader": browser.reader.title,
        "notes": list(browser.reader.notes),
    }


def volume(one: Volume) -> dict[str, Any]:
    """A place that may hold a file system."""
    from hvmgr.operations.inside import looking

    return {
        "disk": one.disk.slot,
        "partition": one.number,
        "logical": one.logical or None,
        "start": one.start,
        "size": one.size,
        "holds": None if one.kind is None else one.kind.value,
        "label": one.label,
        "uuid": one.uuid,
        "name": one.name,
        "type": one.type,
        "encrypted": one.encrypted or (one.kind is not None and one.kind.is_encrypted),
        "readable": looking.is_readable(one),
    }


def octal(mode: int | None) -> str | None:
    """A mode in JSON."""
    return None if mode is None else f"{mode:04o}"


def stored(moment: int | None) -> str | None:
    """A time in JSON."""
    found = _moment(moment)
    return None if found is None else units.to_rfc3339(found)


def _moment(nanoseconds: int | None) -> datetime | None:
    if nanoseconds is None:
        return None
    try:
        return datetime.fromtimestamp(nanoseconds // 1_000_000_000, UTC).replace(
            microsecond=nanoseconds % 1_000_000_000 // 1000
        )
    except (OverflowError, ValueError, OSError):
        return None


# --- for people -----------------------------------------------------------------------------------------------------


def volume_row(one: Volume) -> tuple[str, ...]:
    """A line of the table of file systems."""
    from hvmgr.operations.inside import looking

    readable = "yes" if looking.is_readable(one) else looking.why_not(one)
    number = one.logical or ("-" if one.number is None else str(one.number))
    holds = one.kind.value if one.kind is not None else "-"
    holds += " (LUKS)" if one.encrypted else ""
    return (one.disk.slot or "-", number, holds, one.label or one.name or "-", units.format_size(one.size), readable)


def counted(files: int, size: int) -> str:
    """So many files, in a sentence."""
    return f"{files} file{'' if files == 1 else 's'} ({units.format_size(size)})"


def show_null(paths: Iterable[bytes]) -> None:
    """Paths as they are, for programs."""
    sys.stdout.buffer.write(b"".join(one + b"\0" for one in paths))


def show_list(found: Sequence[Found], *, long: bool, null: bool, whole: bool) -> None:
    """Names or, with ``whole``, paths; ``null``: whole paths as they are, for programs."""
    if null:
        show_null(one.path for one in found)
        return
    if long:
        render.table(HEADERS, [_row(one, whole=whole) for one in found], right=("Links", "Size"))
        return
    for one in found:
        render.put(render.clean(_name(one, whole=whole)) + "\n")


def _name(one: Found, *, whole: bool) -> str:
    return os.fsdecode(one.path if whole else one.name or b"/")


def _row(one: Found, *, whole: bool) -> tuple[str, ...]:
    node = one.node
    name = _name(one, whole=whole)
    if node.target is not None:
        name += f" -> {os.fsdecode(node.target)}"
    size = f"{node.device[0]}, {node.device[1]}" if node.device is not None else units.format_size(one.size)
    return (mode_of(node), str(node.links), _or_dash(node.uid), _or_dash(node.gid), size, _local(node.modified), name)


def index_row(one: Entry) -> tuple[str, ...]:
    """What ``--long`` shows of a file in the index, without its path."""
    letter = _LETTERS.get(Type(one.type), 0)
    mode = stat.filemode(letter | (one.mode or 0)) if one.mode is not None else stat.filemode(letter)[0]
    size = units.format_size(one.size)
    return (mode, str(one.links), _or_dash(one.uid), _or_dash(one.gid), size, _local(one.modified))


def mode_of(node: Node) -> str:
    """As ``ls`` shows it; the attributes of file systems that have no modes."""
    if node.mode is None:
        kind = stat.filemode(_LETTERS.get(node.type, 0))[0]
        return (
            kind
            + ("r" if "read-only" in node.attributes else "-")
            + "".join(
                letter if word in node.attributes else "-"
                for letter, word in (("h", "hidden"), ("s", "system"), ("a", "archive"))
            )
        )
    return stat.filemode(_LETTERS.get(node.type, 0) | node.mode)


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)


def _local(moment: int | None) -> str:
    found = _moment(moment)
    return "-" if found is None else units.format_local(found)


def facts(browser: Browser, one: Found) -> Iterator[tuple[str, str]]:
    """All that is known of a file, as pairs."""
    node, place = one.node, browser.volume
    yield "path", os.fsdecode(one.path)
    yield "type", node.type.value
    if node.target is not None:
        yield "leads to", os.fsdecode(node.target)
    yield "size", f"{one.size} bytes"
    if node.used is not None:
        yield "takes", units.format_size(node.used)
    if node.mode is not None:
        yield "mode", f"{octal(node.mode)} ({mode_of(node)})"
        yield "owner", f"{node.uid}:{node.gid}"
    if node.device is not None:
        yield "device", f"{node.device[0]}:{node.device[1]}"
    yield "links", str(node.links)
    yield "number", str(node.id)
    for word, moment in (
        ("modified", node.modified),
        ("changed", node.changed),
        ("accessed", node.accessed),
        ("born", node.born),
    ):
        if moment is not None:
            yield word, _local(moment)
    if node.attributes:
        yield "attributes", ", ".join(node.attributes)
    for name, size in node.streams:
        yield "stream", f"{name} ({size} bytes)"
    for name, value in browser.reader.extras(node).items():
        yield "extended", f"{name} ({len(value)} bytes)"
    yield "in", f"{place.title} ({place.kind}) of {place.disk.name}"
    yield "read by", browser.reader.title


def draw_tree(walked: Iterable[tuple[int, Found]]) -> None:
    """A folder with all that is below it, as ``walk`` gives it."""
    found = list(walked)
    lasts, deeper = [False] * len(found), set[int]()
    for index in range(len(found) - 1, -1, -1):
        depth = found[index][0]
        lasts[index] = depth not in deeper  # no brother follows
        deeper = {one for one in deeper if one < depth} | {depth}
    bars: list[str] = []
    for (depth, one), is_last in zip(found, lasts, strict=True):
        del bars[max(0, depth - 1) :]
        name = os.fsdecode(one.name or one.path)
        name += "/" if one.node.is_folder and one.name else ""
        name += f" -> {os.fsdecode(one.node.target)}" if one.node.target is not None else ""
        place = "".join(bars) + (_LAST if is_last else _BRANCH) if depth else ""
        render.put(place + render.clean(os.fsdecode(one.path) if not depth else name) + "\n")
        bars += [_GAP if is_last else _BAR] if depth else []


def show_hash(value: str, one: Found) -> None:
    """A line as ``sha256sum`` writes it, with its escapes; on a terminal without what could speak to it."""
    name = one.whole_path
    if render.is_terminal():
        render.say(f"{value}  {os.fsdecode(name)}")
        return
    mark = b""
    if any(bad in name for bad in b"\\\n\r"):
        name = name.replace(b"\\", b"\\\\").replace(b"\n", b"\\n").replace(b"\r", b"\\r")
        mark = b"\\"
    sys.stdout.flush()
    sys.stdout.buffer.write(mark + value.encode() + b"  " + name + b"\n")
