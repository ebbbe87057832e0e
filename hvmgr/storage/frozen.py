"""Frozen images: read-only, and remembered by size, header and time, so that a change by others is seen.

| condition | size   | header          | time      | what happened                                              |
|-----------|--------|-----------------|-----------|------------------------------------------------------------|
| UNKNOWN   |        |                 |           | there is no record: a home that was moved, an older one    |
| UNCHANGED | same   | same            | same      | nothing                                                    |
| TOUCHED   | same   | same or unknown | different | a file put back from a backup, or a write of data in place |
| CHANGED   | one of both is different |           | somebody wrote to it, or it is another file                |

A VM starts on a TOUCHED image, with a warning. What builds on an image (apply, undo, merge) wants it UNCHANGED or
UNKNOWN: nobody can tell the two causes of TOUCHED apart from the file alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from enum import StrEnum
from pathlib import Path
from typing import Any

from hvmgr import errors
from hvmgr.model.layout import Layout
from hvmgr.storage import durable, images, index

FROZEN_MODE = 0o400
WORKING_MODE = 0o600


class Condition(StrEnum):
    """What became of an image since it was frozen; the table is at the head of the module."""

    UNKNOWN = "unknown"
    UNCHANGED = "unchanged"
    TOUCHED = "touched"
    CHANGED = "changed"


def freeze(layout: Layout, path: Path, *, keep_readers: bool = False) -> None:
    """The image is read-only; the mode of one outside the home is remembered for ``thaw``, whichever VM does that.

    With ``keep_readers`` whoever may read one outside the home still may: QEMU's user is one of them.
    """
    if not path.is_file():
        return  # a block device has no mode worth changing
    mode = path.stat().st_mode & 0o7777
    frozen = FROZEN_MODE | (mode & 0o044) if keep_readers and not layout.owns(str(path)) else FROZEN_MODE
    if mode == frozen:
        return
    if not layout.owns(str(path)):
        own = (_read(layout, path) or {}).get("mode", mode)  # known already when a merge has made it writable meanwhile
        _write(layout, path, {"mode": own})
        index.keep_mode(path, own)
    durable.set_mode(path, frozen)


def make_writable(layout: Layout, path: Path) -> None:
    """A merge may write the image; ``freeze`` or ``thaw`` ends that. One outside the home keeps the rest of its mode."""
    if layout.owns(str(path)):
        durable.set_mode(path, WORKING_MODE)
    elif path.is_file():
        durable.set_mode(path, path.stat().st_mode & 0o7777 | 0o200)


def thaw(layout: Layout, path: Path) -> None:
    """The image is writable as it was before it was frozen, and its record is gone.

    One outside the home that nobody is known to have frozen keeps the mode that it has.
    """
    if path.is_file():
        if layout.owns(str(path)):
            durable.set_mode(path, WORKING_MODE)
        else:
            mode = (_read(layout, path) or {}).get("mode", index.kept_mode(path))
            if mode is not None:
                durable.set_mode(path, mode)
            index.forget_mode(path)
    forget(layout, path)


def record(layout: Layout, path: Path) -> None:
    """The present size, header and time are what a frozen image has from now on."""
    if not path.is_file():
        return
    facts = _read(layout, path) or {}
    state = path.stat()
    header = images.fingerprint(path)
    _write(layout, path, {**facts, "size": state.st_size, "mtime_ns": state.st_mtime_ns, "header": header})


def refresh(layout: Layout, path: Path) -> None:
    """An image whose header a step of a plan has written: its record, where there is one, is that of now."""
    if "size" in (_read(layout, path) or {}):
        record(layout, path)


def record_hash(layout: Layout, path: Path, sha256: str) -> None:
    """The bytes of a shared image are known by their SHA-256 too."""
    _write(layout, path, {**(_read(layout, path) or {}), "sha256": sha256})


def recorded_hash(layout: Layout, path: Path) -> str | None:
    """What ``record_hash`` noted; None when it is not known."""
    found = (_read(layout, path) or {}).get("sha256")
    return str(found) if found else None


def forget(layout: Layout, path: Path) -> None:
    """There is no record of the image."""
    durable.remove(_file(layout, path))


def is_recorded(layout: Layout, path: Path) -> bool:
    """Whether an image is known to be frozen in this home; without a record nobody knows."""
    return "size" in (_read(layout, path) or {})


def condition(layout: Layout, path: Path, *, file: Path | None = None) -> Condition:
    """What became of an image since it was frozen; UNKNOWN for one that is missing, which others say.

    ``file`` is looked at in its place: whether that one is the image, under another name.
    """
    facts, file = _read(layout, path), file or path
    if facts is None or "size" not in facts or not file.is_file():
        return Condition.UNKNOWN
    state = file.stat()
    if state.st_size != facts["size"] or ("header" in facts and images.fingerprint(file) != facts["header"]):
        return Condition.CHANGED
    return Condition.UNCHANGED if state.st_mtime_ns == facts.get("mtime_ns") else Condition.TOUCHED


def is_changed(layout: Layout, path: Path) -> bool:
    """Whether the record of a frozen image no longer fits it, were it by the time alone."""
    return condition(layout, path) in {Condition.TOUCHED, Condition.CHANGED}


def require_unchanged(layout: Layout, path: Path) -> None:
    """Raises Corrupt when somebody wrote to a frozen image."""
    if is_changed(layout, path):
        raise errors.Corrupt(
            f"{path} was changed after it was frozen; the snapshots that need it are damaged",
            hint="put the file back from a backup, or delete those snapshots",
            path=str(path),
        )


def _file(layout: Layout, path: Path) -> Path:
    if layout.owns(str(path)):
        return layout.frozen / path.name
    return layout.frozen / ("outside-" + hashlib.sha256(os.fsencode(path)).hexdigest()[:32])


def _read(layout: Layout, path: Path) -> dict[str, Any] | None:
    try:
        facts = json.loads(_file(layout, path).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return facts if isinstance(facts, dict) else None


def _write(layout: Layout, path: Path, facts: dict[str, Any]) -> None:
    durable.write_file(_file(layout, path), json.dumps(facts).encode())
