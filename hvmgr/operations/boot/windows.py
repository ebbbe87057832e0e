"""The script for a VHD with Windows, after the same checks of the VHD: Windows' boot menu is written in Windows."""

from __future__ import annotations

import os
from pathlib import Path

from hvmgr import errors
from hvmgr.host import volumes
from hvmgr.model import boot_windows
from hvmgr.model.boot_entry import Volume
from hvmgr.model.boot_windows import Kind
from hvmgr.operations.boot import requirements
from hvmgr.operations.boot.requirements import Place
from hvmgr.storage import durable


def script(
    path: Path, title: str | None, *, kind: Kind | None, drive: str, volume: Path | None, write_to: Path | None
) -> str:
    """The batch file; Unsupported for what Windows does not boot from."""
    real = Path(os.path.realpath(path))
    if not real.exists():
        raise errors.NotFound(f"there is no {path}", path=str(path))
    found = requirements.look(real, [real.parent])
    place = _place(real, volume)
    text = boot_windows.script(title or found.path.name, place.inside(real), drive=drive, kind=kind or Kind.PORTABLE)
    if write_to is not None:
        if os.path.lexists(write_to):
            raise errors.Conflict(f"{write_to} exists", hint="name a new file with --output")
        durable.write_file(write_to, text.encode(), mode=0o644)
    return text


def _place(path: Path, volume: Path | None) -> Place:
    """Whatever holds the VHD here has to be NTFS; a folder that the user names is going to be."""
    if volume is not None:
        return requirements.stated_place(volume, "", Volume.NTFS.value)
    found = volumes.of(path)
    if requirements.volumes_type(found) not in {"ntfs", "ntfs3"}:
        raise errors.Unsupported(
            f"{path} lies on {found.type}, and Windows boots VHDs from NTFS only",
            hint="name the folder that becomes the root of its NTFS volume with --volume",
        )
    return Place(found.folder, found.id or "", Volume.NTFS)
