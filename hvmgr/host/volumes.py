"""Which volume of this machine a file lies on: its device, file system, id, and the folder where it is mounted."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from hvmgr import errors
from hvmgr.host import process

_BY_ID = Path("/dev/disk/by-uuid")
_PROGRAM_S = 20.0


@dataclass(frozen=True, slots=True)
class Volume:
    """A mounted file system; ``id`` is None where nobody knows one, ``subfolder`` what of it is mounted there."""

    folder: Path
    device: str
    type: str
    id: str | None
    subfolder: str = "/"


def of(path: Path) -> Volume:
    """The volume that holds an existing file."""
    wanted = path.stat()
    device = f"{os.major(wanted.st_dev)}:{os.minor(wanted.st_dev)}"
    found: Volume | None = None
    for line in Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape").splitlines():
        fields, _, rest = line.partition(" - ")
        words, kind = fields.split(" "), rest.split(" ")
        folder = Path(_plain(words[4]))
        # What is mounted last hides what was mounted there before.
        if (
            words[2] == device
            and path.is_relative_to(folder)
            and (found is None or len(folder.parts) >= len(found.folder.parts))
        ):
            found = Volume(folder, _plain(kind[1]), kind[0], None, _plain(words[3]))
    if found is None:
        raise errors.Unsupported(f"nobody says which volume {path} lies on")
    return Volume(found.folder, found.device, found.type, _id(found.device), found.subfolder)


def _plain(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _id(device: str) -> str | None:
    try:
        number = Path(device).stat().st_rdev
    except OSError:
        return None
    if _BY_ID.is_dir():
        for link in sorted(_BY_ID.iterdir()):
            try:
                if link.stat().st_rdev == number:
                    return link.name
            except OSError:
                continue
    try:
        told = process.run(["blkid", "-o", "value", "-s", "UUID", device], timeout_s=_PROGRAM_S, ok_codes=(0, 2))
    except errors.HvmgrError:
        return None
    return told.stdout.decode().strip() or None


def is_stacked(device: str) -> bool:
    """Whether a volume's device is made of others, so that a boot loader or an early system cannot be sure to find it."""
    name = Path(device).resolve().name
    return bool(re.match(r"(dm-|md|loop|nbd|bcache|drbd|zd)", name))
