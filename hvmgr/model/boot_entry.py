"""An entry of a machine's boot menu that starts the system in a VHD: what is known of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Any

from hvmgr import errors

VERSION = 1


class Volume(StrEnum):
    """File systems of a volume from which a VHD can be booted."""

    EXT = "ext4"  # ext2 and ext3 too: one driver and one module of GRUB serve all three
    NTFS = "ntfs"


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A file of the disk as it was when the entry was made; ``path`` is that on its volume.

    ``mtime`` is in seconds, ``sha256`` that of its first ``head`` bytes, which hold a VHD's headers and table.
    """

    path: str
    length: int
    mtime: int
    head: int
    sha256: str


@dataclass(frozen=True, slots=True)
class BootEntry:
    """``image`` is the VHD's path here, ``files`` are its files by their paths on the volume, the VHD first.

    With ``layer`` what the system writes goes into a file beside the VHD, which stays as it is.
    """

    id: str
    title: str
    image: str
    kind: str
    size: int
    volume: str
    volume_type: Volume
    files: tuple[ImageFile, ...]
    layer: bool
    kernel: str
    pinned: bool  # somebody asked for this kernel: otherwise the newest one is taken whenever the entry is made anew
    root: str
    arguments: str
    extra: str  # those among them that the caller asked for
    copied: bool  # kernel and initramfs are copies beside the VHD, because GRUB cannot read them in it
    added: str

    @property
    def folder(self) -> str:
        """The folder beside the VHD with what the entry needs."""
        return f"{self.image}.boot"

    @property
    def inside(self) -> str:
        """The same folder's path on its volume."""
        return f"{self.files[0].path}.boot"

    @property
    def layer_file(self) -> str:
        """Where the layer is."""
        return f"{self.folder}/layer"

    @property
    def kernel_version(self) -> str:
        """The version of the kernel that it starts."""
        return self.kernel.rpartition("vmlinuz-")[2]

    @property
    def name(self) -> str:
        """The VHD's name."""
        return PurePosixPath(self.image).name

    def to_json(self) -> dict[str, Any]:
        """As the menu keeps it."""
        return {"version": VERSION, **asdict(self)}


def from_json(found: dict[str, Any]) -> BootEntry:
    """The entry that the menu keeps; Unsupported for one of a newer hvmgr, Corrupt for what is none."""
    try:
        facts = dict(found)
        version = facts.pop("version")
        if version != VERSION:
            raise errors.Unsupported(
                f"the boot menu has an entry of version {version}; this hvmgr knows version {VERSION}",
                hint="use the hvmgr that wrote it, or a newer one",
            )
        files = tuple(ImageFile(**one) for one in facts.pop("files"))
        return BootEntry(**{**facts, "files": files, "volume_type": Volume(facts["volume_type"])})
    except (KeyError, TypeError, ValueError) as error:
        raise errors.Corrupt("an entry of hvmgr's in the boot menu cannot be understood") from error


def named(entries: tuple[BootEntry, ...], name: str) -> BootEntry:
    """The entry with this title, id, or VHD; NotFound, or Conflict where several have it."""
    found = [one for one in entries if name in {one.title, one.id, one.image}]
    if not found:
        known = ", ".join(f"'{one.title}'" for one in entries)
        raise errors.NotFound(
            f"the boot menu has no entry '{name}' of hvmgr's", hint=f"there are: {known}" if known else None
        )
    if len(found) > 1:
        raise errors.Conflict(f"{len(found)} boot entries are called '{name}'", hint="name one by its id or its VHD")
    return found[0]
