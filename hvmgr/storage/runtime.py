"""Where this user has what lasts until a command or a mount ends: sockets, and what of an encrypted volume is in clear meanwhile.

root has it below /run, an ordinary user in the folder of his session (``XDG_RUNTIME_DIR``): both are memory. Without a session
it is in his data folder, which is on a disk; but what is in clear is in a folder of his own in shared memory, if there can be
one which no other user has put there, and none can take away. (systemd empties it when the last of his sessions ends.)
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from hvmgr import settings

_SHARED = Path("/dev/shm")  # noqa: S108 - what is believed of it is looked at first


def own_folder(*, in_clear: bool) -> Path:
    """The folder, for what is ``in_clear`` or for other things; it may have to be made."""
    folder = settings.own_runtime_folder()
    if folder is None and in_clear:
        folder = _in_memory()
    return folder or settings.user_data() / "hvmgr" / ".run"


def _in_memory() -> Path | None:
    """The user's folder in shared memory, made where it is not there; None for somebody else's, a link, or an open one."""
    user = os.geteuid()
    own = _SHARED / f"hvmgr-{user}"
    try:
        about = _SHARED.lstat()
        if not stat.S_ISDIR(about.st_mode) or about.st_uid != 0 or not about.st_mode & stat.S_ISVTX:
            return None  # what is ours there could be exchanged by others
        with contextlib.suppress(FileExistsError):
            own.mkdir(mode=0o700)
        about = own.lstat()
    except OSError:
        return None
    is_ours = stat.S_ISDIR(about.st_mode) and about.st_uid == user and not about.st_mode & 0o077
    return own if is_ours else None
