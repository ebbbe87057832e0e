"""What the commands on image files answer: an image, who uses it, and what a check found. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path

from hvmgr.model.image_format import ImageFormat


class ImageType(StrEnum):
    """How an image keeps its data: all of it, what was written, or what differs from a parent."""

    FIXED = "fixed"
    DYNAMIC = "dynamic"
    DIFFERENCING = "differencing"


class FaultSeverity(StrEnum):
    """How grave a fault is: readers go on, or refuse the image; what is repairable can be put right without guessing."""

    WARNING = "warning"
    REPAIRABLE = "repairable"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """How a new image is wanted; None leaves it to the format.

    ``format`` is that of the name without it. With ``parent`` the image is a differencing one. ``keep_id``: a VHD that is
    made of a VHD has the same id. ``source_format`` says what the source of a conversion is, where its content would be
    taken for something else; ``folders`` are where parents of a VHD are looked for besides its own folder.
    """

    format: ImageFormat | None = None
    fixed: bool = False
    parent: Path | None = None
    block_size: int | None = None
    keep_id: bool = False
    source_format: ImageFormat | None = None
    folders: tuple[Path, ...] = ()


class Use(StrEnum):
    """What somebody needs an image for."""

    RUNS = "runs"  # the working image of a VM that runs
    OFF = "off"  # the working image of a VM that is off
    SAVED = "saved"  # the working image of a VM whose memory is saved: it must fit that
    SNAPSHOT = "snapshot"  # a snapshot froze it
    UNDO = "undo"  # it lies in the undo slot
    PARENT = "parent"  # another image stands on it
    ATTACHED = "attached"  # it is a block device
    NATIVE = "native"  # what a system wrote natively lies in a layer that fits it as it is
    UNKNOWN = "unknown"  # a home that nobody can read may need it


@dataclass(frozen=True, slots=True)
class User:
    """One user of an image, with a name for people, and the name of the VM where it is one."""

    use: Use
    name: str
    vm: str | None = None


@dataclass(frozen=True, slots=True)
class ImageParent:
    """The parent of a differencing image: the names that are stored for it, and the file that was found (None: none).

    ``problem`` says why there is none, or what is wrong with it.
    """

    names: tuple[tuple[str, str], ...]
    id: str | None
    path: Path | None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """One image file. Sizes are bytes; ``id`` and times are what the format keeps, None where it has none.

    ``size`` is what a guest sees, ``file_size`` the file's length, ``taken`` its space on disk. ``allocation`` is the
    share of the disk that this file holds, ``fragmentation`` the share of its blocks that do not follow the one before
    them in the file; both in percent. ``libvirt_asked`` is False when libvirt could not be asked who uses it.
    """

    path: Path
    format: str
    type: ImageType
    size: int
    file_size: int
    taken: int
    block_size: int | None
    creator: str | None
    created: datetime | None
    id: str | None
    parent: ImageParent | None
    allocation: float | None
    fragmentation: float | None
    used_by: tuple[User, ...]
    libvirt_asked: bool
    faults: tuple[str, ...] = ()  # what is wrong with it and was read over
    open_change: str | None = None  # an operation that was cut off, which the next command completes


@dataclass(frozen=True, slots=True)
class ImageFault:
    """Something that a check found: ``code`` is a row of docs/vhd.md, or what qemu-img counts."""

    path: Path
    code: str
    severity: FaultSeverity
    sentence: str
    offset: int | None = None


@dataclass(frozen=True, slots=True)
class ImageCheck:
    """What a check found, and what it repaired."""

    path: Path
    format: str
    faults: tuple[ImageFault, ...]
    repaired: tuple[ImageFault, ...] = ()

    @property
    def is_sound(self) -> bool:
        """Whether readers take the image: nothing is wrong, or nothing but what is worth a warning."""
        return all(one.severity is FaultSeverity.WARNING for one in self.faults)
