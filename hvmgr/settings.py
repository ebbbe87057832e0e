"""Where things are: roots, connection, templates, limits. Read once per call, never written.

What the command line says comes before all of this; here the environment comes before the user's configuration file,
that before the system's, and all before what hvmgr has built in. ``origin`` says which one it was.
"""

from __future__ import annotations

import os
from pathlib import Path

TYPE_CHECKING = False  # typing's own costs 8 ms to import; type checkers know the name
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from hvmgr.keeping import Keep
    from hvmgr.preferences import Preference

CONFIG_FILE = "hvmgr.yaml"

SYSTEM_ROOT = Path("/var/lib/hvmgr")
SYSTEM_CACHE = Path("/var/cache/hvmgr")
SYSTEM_CONFIG = Path("/etc/hvmgr")
SYSTEM_URI = "qemu:///system"
SESSION_URI = "qemu:///session"

# How long a command waits for the lock of a home or of an embedded root, seconds.
LOCK_WAIT_S = 10.0

# How long a hook of the administrator's may take, seconds.
HOOK_LIMIT_S = 30.0

# Less than this part of a file system free is little.
SPACE_LOW = "5%"

BUILT_IN = "default"


def find(key: str) -> Preference | None:
    """What a configuration file says under this key: the user's before the system's; None where neither has it."""
    for folder in reversed(config_folders()):
        if (found := _preferences(folder).get(key)) is not None:
            return found
    return None


def origin(key: str, variable: str = "") -> str:
    """Where a setting comes from: a variable of the environment, a line of a file, or hvmgr itself."""
    if variable and os.environ.get(variable):
        return variable
    found = find(key)
    return BUILT_IN if found is None else found.source


def hook_time_limit_s() -> float:
    """How long a hook of the administrator's may take, in seconds."""
    return float(_value("hook-time-limit", HOOK_LIMIT_S))


def space_low_text() -> str:
    """How much has to be free before hooks and watchers are told: a part of the file system (``5%``), or bytes."""
    return str(_value("space-low", SPACE_LOW))


def space_low(total: int) -> int:
    """The same in bytes, for a file system of ``total`` bytes."""
    text = space_low_text()
    return int(total * float(text[:-1]) / 100) if text.endswith("%") else int(text)


def compression() -> str:
    """Whether saved memory is compressed when nobody says so: ``none`` or ``zstd``."""
    return str(_value("compress", "none"))


def retention() -> Keep:
    """How many scheduled snapshots are kept of a VM for which nobody says it."""
    from hvmgr import keeping

    found = find("retention")
    return keeping.KEEP if found is None else keeping.parse(found.value)


def import_maps(key: str) -> list[tuple[str, str, str]]:
    """The ``networks`` or ``paths`` that imports on this host map when nobody says so: old, new, and where it stands.

    Of several lines for one thing the first counts: the user's before the system's.
    """
    import fnmatch

    name = os.uname().nodename
    names = {name, name.partition(".")[0]}
    found: dict[str, tuple[str, str, str]] = {}
    for folder in reversed(config_folders()):
        here = _preferences(folder).get("maps")
        for one in () if here is None else here.value:
            if not one.hosts or any(fnmatch.fnmatch(each, pattern) for each in names for pattern in one.hosts):
                for line in getattr(one, key):
                    found.setdefault(line[0], line)
    return list(found.values())


def is_root() -> bool:
    """Whether this process may act on the system connection."""
    return os.geteuid() == 0


def default_root() -> Path:
    """The folder that holds the homes when ``--root`` is not given."""
    if root := os.environ.get("HVMGR_ROOT"):
        return Path(root)
    if (found := find("root")) is not None:
        return Path(found.value)
    return SYSTEM_ROOT if is_root() else user_data() / "hvmgr"


def default_uri() -> str:
    """The connection when ``-c`` is not given: the environment's, else the system's, else (no root) the session's."""
    if uri := os.environ.get("LIBVIRT_DEFAULT_URI"):
        return uri
    if (found := find("connection")) is not None:
        return str(found.value)
    return SYSTEM_URI if is_root() else SESSION_URI


def index_folder() -> Path:
    """The host-wide index of homes and image users; independent of connection and root."""
    if folder := os.environ.get("HVMGR_INDEX"):
        return Path(folder)
    return SYSTEM_ROOT / ".index" if is_root() else user_data() / "hvmgr" / ".index"


def cache_folder() -> Path:
    """Things that can be made again, such as the demo's guest; root's own home is closed to QEMU's user."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "hvmgr"
    return SYSTEM_CACHE if is_root() else Path.home() / ".cache" / "hvmgr"


def runtime_folder() -> Path:
    """What lasts until this host is started again: sockets of attached images. Short, for a socket's path has 107 bytes."""
    return Path(os.environ.get("HVMGR_RUN", "/run/hvmgr"))


def own_runtime_folder() -> Path | None:
    """The same for what an ordinary user has mounted; root's is that of the host. None without a session: see ``storage/runtime``."""
    if is_root() or "HVMGR_RUN" in os.environ:
        return runtime_folder()
    folder = os.environ.get("XDG_RUNTIME_DIR")
    return Path(folder) / "hvmgr" if folder else None


def config_folders() -> tuple[Path, ...]:
    """Where the configuration file and the hooks of the system are, then those of the user, when he has any.

    A folder of another user is not the user's own: ``sudo`` may leave HOME as it was.
    """
    if folder := os.environ.get("HVMGR_CONFIG"):
        return (Path(folder),)
    base = os.environ.get("XDG_CONFIG_HOME")
    own = os.path.join(base or os.path.expanduser("~/.config"), "hvmgr")  # noqa: PTH111, PTH118 - no error without a home
    try:
        is_own = os.stat(own).st_uid == os.geteuid()  # noqa: PTH116
    except OSError:
        is_own = False
    return (SYSTEM_CONFIG, Path(own)) if is_own else (SYSTEM_CONFIG,)


def users_file() -> Path:
    """Who may use the HTTP server, when ``--users`` is not given."""
    if path := os.environ.get("HVMGR_USERS"):
        return Path(path)
    if is_root():
        return SYSTEM_CONFIG / "users.json"
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "hvmgr" / "users.json"


def templates_folder() -> Path:
    """The shipped templates: inside the installed package, or beside it in an editable install."""
    package = Path(__file__).resolve().parent
    inside = package / "templates"
    return inside if inside.is_dir() else package.parent / "templates"


def units_folder() -> Path:
    """The shipped systemd units: inside the installed package, or beside it in an editable install."""
    return _shipped("systemd")


def native_boot_folder() -> Path:
    """The shipped parts of an initramfs that boots from a VHD: found as the units are."""
    return _shipped("native-boot")


def netboot_folder() -> Path:
    """The shipped parts of the system that a machine starts over the network: found as the units are."""
    return _shipped("netboot")


def _shipped(name: str) -> Path:
    package = Path(__file__).resolve().parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / "share" / name


def _preferences(folder: Path) -> Mapping[str, Preference]:
    """What the folder's file says; where there is none, nothing is imported for it."""
    file = folder / CONFIG_FILE
    if not os.path.lexists(file):
        return {}
    from hvmgr import preferences

    return preferences.read(file)


def _value(key: str, otherwise: Any) -> Any:
    found = find(key)
    return otherwise if found is None else found.value


def user_data() -> Path:
    """Where an ordinary user's data are."""
    base = os.environ.get("XDG_DATA_HOME")
    return Path(base) if base else Path.home() / ".local" / "share"
