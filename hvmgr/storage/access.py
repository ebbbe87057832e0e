"""Who may use a home: the way to it, the modes and owners of what lies in it.

Folders are 0711 and files 0600 or 0400: QEMU's user can pass and nobody else can look. More for the owner's group alone is
somebody's wish (members of a group that keep homes together) and stays; what is open to all came from a umask.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from hvmgr import errors

FOLDER_MODE = 0o711
FILE_MODE = 0o600
_READ_WRITE_BY_ALL, _OTHERS = 0o006, 0o007

Owner = tuple[int, int] | None  # (uid, gid) of QEMU's user; None where it is the caller


def closed_folder(path: Path, owner: Owner) -> Path | None:
    """The first folder above ``path`` that QEMU's user may not search; None when the way is open."""
    if owner is None or owner[0] == 0:
        return None
    for folder in reversed(path.parents):
        if not folder.is_dir():
            return None
        if not can_pass(folder, owner):
            return folder
    return None


def can_pass(folder: Path, owner: tuple[int, int]) -> bool:
    """Whether QEMU's user may search a folder, by its mode."""
    facts = folder.stat()
    needed = stat.S_IXUSR if facts.st_uid == owner[0] else stat.S_IXGRP if facts.st_gid == owner[1] else stat.S_IXOTH
    return bool(facts.st_mode & needed)


def require_way(home: Path, owner: Owner) -> None:
    """Conflict when QEMU's user cannot get to a home."""
    folder = closed_folder(home, owner)
    if folder is not None and owner is not None:
        raise errors.Conflict(
            f"QEMU's user (uid {owner[0]}) may not pass through {folder}",
            hint=f"let it: chmod o+x '{folder}', or choose another place with --home",
            path=str(folder),
        )


def right_folder_mode(path: Path) -> int | None:
    """The mode that a folder of a home has to have, when it has another one."""
    mode = stat.S_IMODE(path.stat().st_mode)
    right = FOLDER_MODE if mode & _READ_WRITE_BY_ALL else mode | FOLDER_MODE
    return None if mode == right else right


def right_file_mode(path: Path) -> int | None:
    """The mode that a file of a home should have, when everybody may use it or its owner may not read it."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & _OTHERS or not mode & stat.S_IRUSR:
        return FILE_MODE
    return None


def may_own(path: Path, owner: tuple[int, int], *, dynamic: bool) -> bool:
    """Whether an image belongs to somebody from whom QEMU's user gets it: itself, or root where libvirt gives it away."""
    uid = path.stat().st_uid
    return uid == owner[0] or (dynamic and uid == 0)


def is_writable(folder: Path) -> bool:
    """Whether this process may change what lies in a folder (a read-only file system says no to root as well)."""
    return os.access(folder, os.W_OK | os.X_OK)
