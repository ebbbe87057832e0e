"""Where things are: roots, connection, templates, limits. Read from the environment once per call, never written."""

from __future__ import annotations

import os
from pathlib import Path

SYSTEM_ROOT = Path("/var/lib/hvmgr")
SYSTEM_CACHE = Path("/var/cache/hvmgr")
SYSTEM_SETTINGS = Path("/etc/hvmgr")
SYSTEM_URI = "qemu:///system"
SESSION_URI = "qemu:///session"

# How long a command waits for the lock of a home or of an embedded root, seconds.
LOCK_WAIT_S = 10.0


def is_root() -> bool:
    """Whether this process may act on the system connection."""
    return os.geteuid() == 0


def default_root() -> Path:
    """The folder that holds the homes when ``--root`` is not given."""
    if root := os.environ.get("HVMGR_ROOT"):
        return Path(root)
    return SYSTEM_ROOT if is_root() else _user_data() / "hvmgr"


def default_uri() -> str:
    """The connection when ``-c`` is not given: the environment's, else the system's, else (no root) the session's."""
    if uri := os.environ.get("LIBVIRT_DEFAULT_URI"):
        return uri
    return SYSTEM_URI if is_root() else SESSION_URI


def index_folder() -> Path:
    """The host-wide index of homes and image users; independent of connection and root."""
    if folder := os.environ.get("HVMGR_INDEX"):
        return Path(folder)
    return SYSTEM_ROOT / ".index" if is_root() else _user_data() / "hvmgr" / ".index"


def cache_folder() -> Path:
    """Things that can be made again, such as the demo's guest; root's own home is closed to QEMU's user."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "hvmgr"
    return SYSTEM_CACHE if is_root() else Path.home() / ".cache" / "hvmgr"


def runtime_folder() -> Path:
    """What lasts until this host is started again: sockets of attached images. Short, for a socket's path has 107 bytes."""
    return Path(os.environ.get("HVMGR_RUN", "/run/hvmgr"))


def users_file() -> Path:
    """Who may use the HTTP server, when ``--users`` is not given."""
    if path := os.environ.get("HVMGR_USERS"):
        return Path(path)
    if is_root():
        return SYSTEM_SETTINGS / "users.json"
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "hvmgr" / "users.json"


def templates_folder() -> Path:
    """The shipped templates: inside the installed package, or beside it in an editable install."""
    package = Path(__file__).resolve().parent
    inside = package / "templates"
    return inside if inside.is_dir() else package.parent / "templates"


def _user_data() -> Path:
    base = os.environ.get("XDG_DATA_HOME")
    return Path(base) if base else Path.home() / ".local" / "share"
