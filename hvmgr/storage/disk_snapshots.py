"""Snapshots of one disk alone, outside the VM's tree: one record each in the home, which keeps a frozen image needed.

A record counts as a user of its image for as long as it is there: ``VmHome.tree`` names it among the strangers, so that
nothing merges or removes that image.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from hvmgr import errors, units
from hvmgr.model.layout import Layout
from hvmgr.storage import durable


@dataclass(frozen=True, slots=True)
class DiskSnapshot:
    """One of them. ``image`` is relative to the home where it lies in there; ``disk`` the disk's own id."""

    uuid: str
    disk: str
    slot: str
    image: str
    created: datetime
    label: str = ""

    def path(self, layout: Layout) -> Path:
        """Where the image is."""
        return layout.home / self.image


def read_all(layout: Layout) -> list[DiskSnapshot]:
    """All of this home, the oldest first; Corrupt for one that cannot be understood: its image must not go."""
    folder = layout.disk_snapshots
    found = [_read(file) for file in sorted(folder.glob("*.json"))] if folder.is_dir() else []
    return sorted(found, key=lambda one: (one.created, one.uuid))


def text_of(one: DiskSnapshot) -> str:
    """The record, as it stands in its file."""
    return json.dumps(
        {
            "uuid": one.uuid,
            "disk": one.disk,
            "slot": one.slot,
            "image": one.image,
            "created": units.to_rfc3339(one.created),
            "label": one.label,
        }
    )


def file_of(layout: Layout, uuid: str) -> Path:
    """Where the record of one is."""
    return layout.disk_snapshots / f"{uuid}.json"


def image_name(layout: Layout, path: str) -> str:
    """How a record names an image: so that a home can be moved."""
    return str(Path(path).relative_to(layout.home)) if Path(path).is_relative_to(layout.home) else path


def users(layout: Layout) -> dict[str, tuple[str, ...]]:
    """For each image that such snapshots need, how these are called."""
    found: dict[str, tuple[str, ...]] = {}
    for one in read_all(layout):
        path = str(one.path(layout))
        found[path] = (*found.get(path, ()), name_of(one))
    return found


def name_of(one: DiskSnapshot) -> str:
    """How one is called as the user of an image."""
    return f"the disk snapshot {one.uuid}"


def _read(file: Path) -> DiskSnapshot:
    with durable.explained(file):
        content = file.read_bytes()
    try:
        facts = json.loads(content)
        texts = {key: str(facts[key]) for key in ("uuid", "disk", "slot", "image", "label")}
        return DiskSnapshot(**texts, created=units.from_rfc3339(facts["created"]))
    except (KeyError, TypeError, ValueError) as error:
        raise errors.Corrupt(
            f"{file} is no record of a disk snapshot ({error})", hint="put it back from a backup", path=str(file)
        ) from error
