"""Who may use a home: the way to it, the modes, owners and access lists of what lies in it.

Folders are 0711 and files 0600 or 0400: QEMU's user can pass and nobody else can look. More for the owner's group alone is
somebody's wish (members of a group that keep homes together) and stays; what is open to all came from a umask.

Whether QEMU's user may do something is decided as the kernel does it (acl(5)): owner, access list, groups, others.
"""

from __future__ import annotations

import os
import pwd
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

from hvmgr import errors
from hvmgr.host import confinement

FOLDER_MODE = 0o711
FILE_MODE = 0o600
_READ_WRITE_BY_ALL, _OTHERS = 0o006, 0o007

READ, WRITE, SEARCH = 4, 2, 1  # the bits of a mode, and of an entry in an access list

# linux/posix_acl_xattr.h: a version, then entries of tag, permissions and id.
_ACL = "system.posix_acl_access"
_ACL_VERSION = 2
_ACL_ENTRY = struct.Struct("<HHI")
_USER, _GROUP_OWNER, _GROUP, _MASK = 0x02, 0x04, 0x08, 0x10

Owner = tuple[int, int] | None  # (uid, gid) of QEMU's user; None where it is the caller


def allows(path: Path, owner: tuple[int, int], wanted: int) -> bool:
    """Whether a user (uid, gid, and the groups that the uid is in) has the ``wanted`` rights on a file or folder."""
    uid, gid = owner
    facts = path.stat()
    if uid == 0:
        return True
    if facts.st_uid == uid:
        return facts.st_mode >> 6 & wanted == wanted
    entries = list(_acl(path))
    mask = next((rights for tag, rights, _ in entries if tag == _MASK), 7)
    for tag, rights, one in entries:
        if tag == _USER and one == uid:
            return rights & mask & wanted == wanted
    groups = confinement.groups_of(uid, gid)
    mine = [rights & mask for tag, rights, one in entries if tag == _GROUP and one in groups]
    if facts.st_gid in groups:
        # With an access list the mode's middle bits are its mask; the group has an entry of its own.
        mine += [rights & mask for tag, rights, _ in entries if tag == _GROUP_OWNER] or [facts.st_mode >> 3]
    if mine:
        return any(rights & wanted == wanted for rights in mine)
    return facts.st_mode & wanted == wanted


def closed_folder(path: Path, owner: Owner) -> Path | None:
    """The first folder above ``path`` that QEMU's user may not search; None when the way is open."""
    if owner is None or owner[0] == 0:
        return None
    for folder in reversed(path.parents):
        if not folder.is_dir():
            return None
        if not allows(folder, owner, SEARCH):
            return folder
    return None


def require_way(path: Path, owner: Owner) -> None:
    """Conflict when QEMU's user cannot get to a home or a file."""
    folder = closed_folder(path, owner)
    if folder is not None and owner is not None:
        raise errors.Conflict(
            f"QEMU's user ({name_of(owner[0])}) may not pass through {folder}",
            hint=f"let it: chmod o+x '{folder}' (or setfacl -m u:{name_of(owner[0])}:x '{folder}'), "
            "or choose another place",
            path=str(folder),
        )


def require_usable(path: Path, owner: Owner, *, dynamic: bool, writable: bool) -> None:
    """Conflict when QEMU's user cannot get to a file outside the home, or may not use it and libvirt gives it no right.

    With ``dynamic`` ownership libvirt gives images to QEMU's user at a start.
    """
    require_way(path, owner)
    wanted = READ | WRITE if writable else READ
    if owner is None or dynamic or allows(path, owner, wanted):
        return
    act, rights = ("write", "rw") if writable else ("read", "r")
    name = name_of(owner[0])
    raise errors.Conflict(
        f"QEMU's user ({name}) may not {act} {path}, and libvirt gives nothing away here (dynamic_ownership is 0)",
        hint=f"chown {name} '{path}', or setfacl -m u:{name}:{rights} '{path}'",
        path=str(path),
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


def is_private(folder: Path) -> bool:
    """Whether it is a folder of this process' user that nobody else may change: what lies in it is what this user put there."""
    try:
        facts = folder.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.geteuid() and not facts.st_mode & 0o022


def name_of(uid: int) -> str:
    """A user's name, or the number where there is none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def _acl(path: Path) -> Iterator[tuple[int, int, int]]:
    """The entries of a file's access list (tag, rights, id); none where it has no list or the file system knows none."""
    try:
        raw = os.getxattr(path, _ACL)
    except OSError:
        return
    if len(raw) >= 4 and struct.unpack_from("<I", raw) == (_ACL_VERSION,):
        for offset in range(4, len(raw) - _ACL_ENTRY.size + 1, _ACL_ENTRY.size):
            yield _ACL_ENTRY.unpack_from(raw, offset)
