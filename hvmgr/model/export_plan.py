"""The steps of an export, and which image of a home becomes which file of it. Pure; ``model/plan`` says what steps are.

An export is made in a folder of its own, so that each of its steps may be done again. The switch is the renaming that
gives it its name.
"""

from __future__ import annotations

import os.path
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath

from hvmgr import units
from hvmgr.model.layout import BASES, SNAPSHOTS
from hvmgr.model.plan import Plan, Step
from hvmgr.model.tree import Image, Keeper, Tree

_SUFFIXES = {"qcow2": ".qcow2", "vpc": ".vhd", "raw": ".img"}


def _name(path: str) -> str:
    return PurePath(path).name


# --- steps ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MakeExport(Step):
    """The folders of the export, in a place of its own; what an earlier attempt left and nobody needs goes."""

    folder: str
    folders: tuple[str, ...]
    files: tuple[str, ...]

    def describe(self) -> str:
        return f"make the folders of the export in {self.folder}"


@dataclass(frozen=True, slots=True)
class ExportFile(Step):
    """A file as it is: an image whose header stays true, saved memory, NVRAM."""

    source: str
    target: str
    size: int  # about how many bytes it takes

    def describe(self) -> str:
        return f"copy {self.source} ({units.format_size(self.size)})"


@dataclass(frozen=True, slots=True)
class ExportImage(Step):
    """A copy of an image, whose header names its parent in the export."""

    source: str
    target: str
    parent: str
    parent_format: str
    size: int

    def describe(self) -> str:
        return f"copy {self.source} ({units.format_size(self.size)}) and name {_name(self.parent)} as its parent"


@dataclass(frozen=True, slots=True)
class ExportMerged(Step):
    """A copy of an image that holds the data of the images below it too, down to its parent in the export.

    ``merged`` are those images, the highest first; ``below`` is the parent where it lies at the source.
    """

    source: str
    target: str
    merged: tuple[str, ...]
    below: str
    below_format: str
    parent: str
    size: int

    def describe(self) -> str:
        count = len(self.merged)
        return f"copy {self.source} and merge {count} image{'s' if count > 1 else ''} below it into the copy"


@dataclass(frozen=True, slots=True)
class ExportFlat(Step):
    """One complete image of a disk, from an image and everything below it."""

    source: str
    source_format: str
    chain: tuple[str, ...]
    target: str
    format: str
    size: int

    def describe(self) -> str:
        return f"write {self.source} with all that it stands on as one {self.format} image {_name(self.target)}"


@dataclass(frozen=True, slots=True)
class ExportVhd(Step):
    """A VHD of an image: a differencing one of what it holds itself, or of a whole disk.

    ``chain`` is the image with all that it stands on (path, format), the top first; the first ``own`` of them go into the
    VHD when it has a ``parent``, a VHD of the export. ``uid`` is its id as 32 digits.
    """

    source: str
    chain: tuple[tuple[str, str], ...]
    target: str
    parent: str | None
    own: int
    uid: str
    size: int

    def describe(self) -> str:
        how = f"a differencing VHD on {_name(self.parent)}" if self.parent else "a dynamic VHD"
        return f"write {self.source} as {_name(self.target)}, {how}"


@dataclass(frozen=True, slots=True)
class ExportFolder(Step):
    """A folder of state files (TPM)."""

    source: str
    target: str

    def describe(self) -> str:
        return f"copy folder {self.source}"


@dataclass(frozen=True, slots=True)
class ExportMemory(Step):
    """Saved memory with another configuration in it, so that it goes on from the images of the export."""

    source: str
    target: str
    xml: str
    size: int

    def describe(self) -> str:
        return f"copy the saved memory {self.source} ({units.format_size(self.size)})"


@dataclass(frozen=True, slots=True)
class HashSource(Step):
    """The hash of an image that stays where it is is noted in the manifest, as that of ``name``."""

    source: str
    name: str
    size: int

    def describe(self) -> str:
        return f"read {self.source} for its hash"


@dataclass(frozen=True, slots=True)
class WriteConfiguration(Step):
    """One configuration of the export."""

    target: str
    xml: str

    def describe(self) -> str:
        return f"write {_name(self.target)}"


@dataclass(frozen=True, slots=True)
class WriteManifest(Step):
    """What the export holds; lengths and hashes of images are added to ``text``."""

    target: str
    text: str

    def describe(self) -> str:
        return "write export.yaml"


@dataclass(frozen=True, slots=True)
class WriteSums(Step):
    """The hash of every other file, for ``sha256sum -c``."""

    target: str

    def describe(self) -> str:
        return "write SHA256SUMS"


@dataclass(frozen=True, slots=True)
class ProtectExport(Step):
    """Nobody writes to the export, and QEMU's group may read it."""

    folder: str

    def describe(self) -> str:
        return "make the export read-only"


@dataclass(frozen=True, slots=True)
class PublishExport(Step):
    """The export has its name; nothing was there before."""

    folder: str
    target: str

    def describe(self) -> str:
        return f"call it {self.target}"


@dataclass(frozen=True, slots=True)
class ClosePlace(Step):
    """The folder in which the export was made is gone."""

    folder: str

    def describe(self) -> str:
        return f"remove {self.folder}"


STEPS = {cls.__name__: cls for cls in Step.__subclasses__() if cls.__module__ == __name__}
Plan.STEPS.update(STEPS)


# --- images ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Exported:
    """One image of an export: ``name`` is relative to its folder, ``merged`` (highest first) goes into it.

    ``chain`` is everything that the source image stands on, where a whole disk becomes one image.
    """

    name: str
    source: Image
    format: str
    parent: Exported | None = None
    merged: tuple[Image, ...] = ()
    flat: bool = False
    chain: tuple[Image, ...] = ()

    @property
    def parent_name(self) -> str | None:
        """How the header has to name the parent."""
        if self.parent is None:
            return None
        return os.path.relpath(self.parent.name, PurePath(self.name).parent)


def as_tree(
    forest: Tree, tops: Mapping[str, str], vm_id: str, *, merge: bool, vhd: bool = False
) -> dict[str, Exported]:
    """The images below ``tops`` (path to slot), by path: parents first, each chain complete; with ``vhd`` as VHDs.

    With ``merge`` a differencing image that none of ``tops`` is and that has one child left goes into that child.
    """
    slots: dict[str, str] = {}
    for path, slot in tops.items():
        for image in forest.chain(path):
            slots.setdefault(image.path, slot)
    children: dict[str, list[str]] = {}
    for path in slots:
        parent = forest.images[path].parent
        if parent is not None:
            children.setdefault(parent, []).append(path)
    gone = {
        path
        for path in slots
        if merge and path not in tops and len(children[path]) == 1 and forest.images[path].parent is not None
    }
    made: dict[str, Exported] = {}
    names: set[str] = set()
    for path in sorted(slots, key=lambda one: (len(forest.chain(one)), one)):
        if path in gone:
            continue
        image, merged = forest.images[path], list[Image]()
        below = image.parent
        while below is not None and below in gone:
            merged.append(forest.images[below])
            below = forest.images[below].parent
        name = _name_of(image, slots[path], vm_id)
        if vhd:
            name = str(PurePath(name).with_suffix(".vhd" if below is None else ".avhd"))
        name = _free(name, names)
        names.add(name)
        parent_made = None if below is None else made[below]
        chain = tuple(forest.chain(path)) if vhd else ()
        fmt = "vpc" if vhd else image.format
        made[path] = Exported(name, image, fmt, parent_made, tuple(merged), chain=chain)
    return made


def as_disks(forest: Tree, disks: Mapping[str, str], fmt: str | None) -> dict[str, Exported]:
    """One complete image for each disk (slot to path), by path; one that stands alone already keeps its format."""
    made: dict[str, Exported] = {}
    for slot, path in disks.items():
        chain = forest.chain(path)
        image = chain[0]
        target = fmt or (image.format if len(chain) == 1 else "qcow2")
        flat = len(chain) > 1 or target != image.format
        name = f"{BASES}/{slot}{_SUFFIXES[target]}"
        made.setdefault(path, Exported(name, image, target, flat=flat, chain=tuple(chain)))
    return made


def _name_of(image: Image, slot: str, vm_id: str) -> str:
    """Ours keep their names; others are called after the slot."""
    if image.keeper is Keeper.IMAGES:
        return f"{SNAPSHOTS}/{vm_id}/{_name(image.path)}"
    if image.keeper is Keeper.BASES:
        return f"{BASES}/{_name(image.path)}"
    if image.parent is not None:
        return f"{SNAPSHOTS}/{vm_id}/{slot}_{uuid.uuid5(uuid.NAMESPACE_URL, image.path)}.qcow2"
    return f"{BASES}/{slot}{_SUFFIXES[image.format]}"


def _free(name: str, taken: set[str]) -> str:
    suffix = PurePath(name).suffix
    stem, number, free = name.removesuffix(suffix), 1, name
    while free in taken:
        number += 1
        free = f"{stem}-{number}{suffix}"
    return free
