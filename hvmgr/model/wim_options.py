"""What the commands on WIM files are asked for. Values only."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from hvmgr.model.disk_layout import FileSystem, LayoutWish
from hvmgr.model.image_info import ImageOptions


class WimCompression(StrEnum):
    """How a WIM is compressed: not, quickly, as Windows' own images are, or as small as can be (an ESD)."""

    NONE = "none"
    FAST = "fast"
    MAXIMUM = "maximum"
    SOLID = "solid"


@dataclass(frozen=True, slots=True)
class WimCaptureOptions:
    """How an image is captured. ``append`` adds it to a WIM that is there; ``partition`` says which volume is meant.

    ``unix`` also keeps owners, modes and device nodes of a Linux folder.
    """

    name: str | None = None
    description: str = ""
    compression: WimCompression = WimCompression.MAXIMUM
    append: bool = False
    partition: int | None = None
    unix: bool = False


@dataclass(frozen=True, slots=True)
class WimApplyOptions:
    """How an image of a WIM, or with ``rootfs`` a Linux tree, gets onto a disk.

    ``image`` is its index or its name, which only a WIM with one image can do without. ``reformat``: the volume is formatted
    anew first. With ``size`` a new disk is made: in the layout, of the format that ``new`` states.
    """

    image: str | None = None
    partition: int | None = None
    reformat: bool = False
    rootfs: bool = False
    size: int | None = None
    layout: LayoutWish = field(default_factory=lambda: LayoutWish(FileSystem.NTFS))
    new: ImageOptions = field(default_factory=ImageOptions)


@dataclass(frozen=True, slots=True)
class Applied:
    """Where something was applied to: the image, the partition (0: the whole disk), whether the image is new, what was warned of."""

    path: Path
    partition: int
    is_new: bool
    source: str
    warnings: tuple[str, ...] = ()
