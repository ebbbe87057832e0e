"""What a caller wants of a boot entry."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class BootOptions:
    """``title`` is the VHD's name unless it is said; ``layer`` None: for everything but fixed VHDs.

    ``volume``, ``volume_id`` and ``volume_type`` describe the volume where it is not the one that the VHD lies on now: the
    folder that is its root, the id that GRUB knows it by, its file system.
    """

    title: str | None = None
    layer: bool | None = None
    kernel: str | None = None
    arguments: str = ""
    copy_kernel: bool = False
    volume: Path | None = None
    volume_id: str | None = None
    volume_type: str | None = None
    folders: tuple[Path, ...] = ()
    replace: bool = False
