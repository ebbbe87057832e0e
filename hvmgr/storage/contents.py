"""What a working image holds since an import, as long as nobody writes to it: the uuid of a point of some disk.

The image's size and time are remembered with it; any write ends what is known.
"""

from __future__ import annotations

import json
from pathlib import Path

from hvmgr.storage import durable


def note(folder: Path, image: Path, uuid: str) -> None:
    """From now on, until somebody writes it, the image is known to hold that."""
    durable.make_folder(folder)
    facts = image.stat()
    record = {"uuid": uuid, "size": facts.st_size, "mtime_ns": facts.st_mtime_ns}
    durable.write_file(_file(folder, image), json.dumps(record).encode())


def forget(folder: Path, image: Path) -> None:
    """Nothing is known of the image."""
    durable.remove(_file(folder, image))


def held(folder: Path, image: Path) -> str | None:
    """What the image is known to hold; None when nobody knows."""
    try:
        record = json.loads(_file(folder, image).read_bytes())
        facts = image.stat()
        is_same = (record["size"], record["mtime_ns"]) == (facts.st_size, facts.st_mtime_ns)
        return str(record["uuid"]) if is_same else None
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return None


def _file(folder: Path, image: Path) -> Path:
    return folder / f"{image.name}.json"
