"""Who stands on the images of a source: linked imports of this host, and the notes that others have left beside it.

A note is ``.<folder>.hvmgr-links/<vm id>.json`` beside the folder: id, name, home and host of a VM that shares its images.
A host that could not write there is not known to the others.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hvmgr.operations import strangers
from hvmgr.storage import index


@dataclass(frozen=True, slots=True)
class Note:
    """What a linked VM says of itself; ``name`` alone is known of one that cannot be read."""

    file: Path
    name: str
    home: Path | None = None
    host: str | None = None

    @property
    def is_of_this_host(self) -> bool:
        """Whether its home can be looked at."""
        return self.host == socket.gethostname()


def place_of(folder: Path) -> Path:
    """Where those who share the images of a folder leave their notes."""
    return folder.parent / f".{folder.name}.hvmgr-links"


def text_of(vm_id: str, name: str, home: Path) -> str:
    """A note's content."""
    return json.dumps({"vm": vm_id, "name": name, "home": str(home), "host": socket.gethostname()})


def notes_of(vm_id: str, images: Iterable[str]) -> set[Path]:
    """The notes of a VM beside the folders of these images, as far as this process may remove them."""
    folders = {parent for path in images for parent in Path(path).parents if parent != parent.parent}
    files = {place_of(folder) / f"{vm_id}.json" for folder in folders}
    return {file for file in files if file.exists() and os.access(file.parent, os.W_OK)}


def users(folder: Path, images: Iterable[str]) -> list[str]:
    """Words for every other VM that needs one of these images of a folder, as far as anybody knows."""
    homes = {one.home: one for one in index.entries() if one.home != folder}
    elsewhere: list[str] = []
    for note in _notes(folder):
        if note.home is None or not note.is_of_this_host:
            whose = note.name if note.host is None else f"{note.name} on {note.host}"
            elsewhere.append(f"{whose} (by {note.file})")
        elif note.home.is_dir():  # else it has been deleted since
            homes.setdefault(note.home, index.Entry(note.file.stem, note.name, note.home, "", tuple(images)))
    needing = strangers.needing(images, homes.values())
    here = [name for names in needing.values() for name in names]
    return list(dict.fromkeys((*here, *elsewhere)))


def _notes(folder: Path) -> list[Note]:
    place = place_of(folder)
    return [_read(file) for file in sorted(place.glob("*.json"))] if place.is_dir() else []


def _read(file: Path) -> Note:
    try:
        facts = json.loads(file.read_bytes())
        return Note(file, str(facts["name"]), Path(facts["home"]), str(facts["host"]))
    except (ValueError, KeyError, TypeError, OSError):
        return Note(file, file.stem)
