"""Frozen images: read-only, and remembered by size and time, so that a change by others is seen.

No record (a home that was moved, an older one) means unknown, not damaged.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from hvmgr import errors
from hvmgr.model.layout import Layout
from hvmgr.storage import durable, index

FROZEN_MODE = 0o400
WORKING_MODE = 0o600


def freeze(layout: Layout, path: Path) -> None:
    """The image is read-only; the mode of one outside the home is remembered for ``thaw``, whichever VM does that."""
    if not path.is_file():
        return  # a block device has no mode worth changing
    mode = path.stat().st_mode & 0o7777
    if mode == FROZEN_MODE:
        return
    if not layout.owns(str(path)):
        _write(layout, path, {"mode": mode})
        index.keep_mode(path, mode)
    durable.set_mode(path, FROZEN_MODE)


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
    """The present size and time are what a frozen image has from now on."""
    if not path.is_file():
        return
    facts = _read(layout, path) or {}
    state = path.stat()
    _write(layout, path, {**facts, "size": state.st_size, "mtime_ns": state.st_mtime_ns})


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


def is_changed(layout: Layout, path: Path) -> bool:
    """Whether a frozen image provably is not what it was when it was frozen."""
    facts = _read(layout, path)
    if facts is None or "size" not in facts or not path.is_file():
        return False
    state = path.stat()
    return (state.st_size, state.st_mtime_ns) != (facts["size"], facts["mtime_ns"])


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
