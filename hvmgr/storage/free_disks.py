"""Free disks: disks of no VM, below the root's ``.disks``, and their snapshots; one record each, all images in one folder.

    <root>/.disks/<uuid>.json             the record: name, size, the image that shows it, whose snapshot it is
    <root>/.disks/<image id>.qcow2        images; a child names its parent by its bare name
    <root>/.disks/contents/               what an import said of the images, as long as nobody writes them

A record is written as a whole and at once, so that a disk shows either its old image or its new one.
"""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from hvmgr import errors
from hvmgr.storage import durable, images, locks

FOLDER = ".disks"
_KEYS = ("uuid", "name", "size", "image", "created", "snapshot_of")


@dataclass(frozen=True, slots=True)
class FreeDisk:
    """One disk, or one snapshot of it; ``created`` as RFC 3339."""

    uuid: str
    name: str
    size: int
    image: str
    created: str
    snapshot_of: str | None = None

    @property
    def disk(self) -> str:
        """The disk that this is a point of."""
        return self.snapshot_of or self.uuid

    def pointing(self, image: str) -> FreeDisk:
        """The same with another image."""
        return replace(self, image=image)


@dataclass(frozen=True, slots=True)
class Shelf:
    """The folder of all free disks of one root."""

    folder: Path

    @property
    def contents(self) -> Path:
        """Where is noted what images hold."""
        return self.folder / "contents"

    def path(self, one: FreeDisk) -> Path:
        """The image that shows the disk."""
        return self.folder / one.image

    def lock(self, wanted: str) -> Path:
        """Held while a command changes one disk."""
        return self.folder / f"{wanted}.lock"

    def new_image(self) -> str:
        """A name that no image has."""
        return f"{uuid.uuid4()}{_SUFFIX}"

    def all(self) -> list[FreeDisk]:
        """Every record, the oldest first; Corrupt for one that cannot be understood."""
        files = sorted(self.folder.glob("*.json")) if self.folder.is_dir() else []
        return sorted((_read(file) for file in files), key=lambda one: (one.created, one.uuid))

    def find(self, wanted: str) -> FreeDisk | None:
        """The disk or snapshot with this uuid."""
        return next((one for one in self.all() if one.uuid == wanted), None)

    def write(self, one: FreeDisk) -> None:
        """The record says this."""
        durable.write_file(self.folder / f"{one.uuid}.json", json.dumps(asdict(one)).encode())

    def remove(self, one: FreeDisk) -> None:
        """There is no such disk any more; its images are another's matter."""
        durable.remove(self.folder / f"{one.uuid}.json")

    def chain(self, one: FreeDisk) -> list[Path]:
        """The image that shows the disk and all that it stands on."""
        found = [self.path(one)]
        while (parent := images.read(found[-1], images.QCOW2).parent) is not None:
            if parent in found or parent.parent != self.folder:
                raise errors.Corrupt(f"{found[-1]} stands on {parent}", path=str(found[-1]))
            found.append(parent)
        return found

    def parents(self) -> dict[Path, Path | None]:
        """What each image here stands on."""
        return {path: images.read(path, images.QCOW2).parent for path in self.folder.glob(f"*{_SUFFIX}")}

    @contextlib.contextmanager
    def locked(self, *, wait_s: float) -> Iterator[None]:
        """One command at a time changes free disks; what a dead one left half-made is gone."""
        durable.make_folder(self.folder.parent)
        durable.make_folder(self.folder)
        with locks.held(self.folder / "lock", wait_s=wait_s, what="free disks"):
            durable.sweep(self.folder)
            yield


_SUFFIX = ".qcow2"


def shelf(root: Path) -> Shelf:
    """The free disks of a root."""
    return Shelf(root / FOLDER)


def _read(file: Path) -> FreeDisk:
    with durable.explained(file):
        content = file.read_bytes()
    try:
        facts = json.loads(content)
        return FreeDisk(**{key: facts[key] for key in _KEYS})
    except (KeyError, TypeError, ValueError) as error:
        raise errors.Corrupt(
            f"{file} is no record of a disk ({error})", hint="put it back from a backup", path=str(file)
        ) from error
