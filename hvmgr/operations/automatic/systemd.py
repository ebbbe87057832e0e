"""The units that start ``hvmgr automatic run``: at once when the hook leaves word, and every few minutes.

They are shipped as files for ``/usr/bin/hvmgr``; installed by ``hvmgr hook install`` they run this very hvmgr.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from hvmgr import errors, settings
from hvmgr.host import process
from hvmgr.storage import durable

FOLDER = Path("/etc/systemd/system")
_BOOTED = Path("/run/systemd/system")  # sd_booted(3)
_SHIPPED_PROGRAM = "/usr/bin/hvmgr"
_SHIPPED_RUN = "/run/hvmgr"
_SERVICE = "hvmgr-automatic.service"
_STARTERS = ("hvmgr-automatic.path", "hvmgr-automatic.timer")
_OURS = "Description=hvmgr: "
_LIMIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Units:
    """What became of the units; ``present`` says that systemd runs this host and has them."""

    present: bool = False
    changed: bool = False


def is_there() -> bool:
    """Whether systemd runs this host."""
    return _BOOTED.is_dir()


def install(folder: Path = FOLDER, *, dry_run: bool = False) -> Units:
    """systemd starts the worker from now on; without systemd nothing is done. Conflict when a file is not ours."""
    if not is_there():
        return Units()
    wanted = {folder / name: text for name, text in texts().items()}
    changed = [path for path, text in wanted.items() if _read(path) != text]
    _require_ours(changed)
    if not dry_run:
        for path in changed:
            durable.write_file(path, wanted[path].encode(), mode=0o644)
        if changed:
            _systemctl("daemon-reload")
        _systemctl("enable", "--now", *_STARTERS)
    return Units(present=True, changed=bool(changed))


def uninstall(folder: Path = FOLDER, *, dry_run: bool = False) -> Units:
    """systemd does not start the worker any more; one that runs comes to its end."""
    found = [folder / name for name in (*_STARTERS, _SERVICE) if _read(folder / name) is not None]
    _require_ours(found)
    if found and not dry_run:
        if is_there():
            _systemctl("disable", "--now", *_STARTERS)
        for path in found:
            durable.remove(path)
        if is_there():
            _systemctl("daemon-reload")
    return Units(changed=bool(found))


def texts() -> dict[str, str]:
    """The units by name, for this very hvmgr."""
    program = f"{shlex.quote(sys.executable)} -m hvmgr".replace("%", "%%")  # a specifier of systemd's otherwise
    found = {}
    for name in (_SERVICE, *_STARTERS):
        text = (settings.units_folder() / name).read_text("utf-8")
        text = text.replace(f"={_SHIPPED_PROGRAM} ", f"={program} ")
        found[name] = text.replace(f"={_SHIPPED_RUN}/", f"={settings.runtime_folder()}/")
    return found


def cron_line() -> str:
    """What does the same every five minutes where there is no systemd."""
    return f"*/5 * * * * root {shlex.quote(sys.executable)} -m hvmgr automatic run"


def _require_ours(paths: list[Path]) -> None:
    for path in paths:
        if _OURS not in (_read(path) or _OURS):
            raise errors.Conflict(
                f"{path} is not hvmgr's", hint="move it away, or give it another name", path=str(path)
            )


def _read(path: Path) -> str | None:
    with durable.explained(path):
        try:
            return path.read_text("utf-8", errors="replace")
        except FileNotFoundError:
            return None


def _systemctl(*words: str) -> None:
    process.run(["systemctl", *words], timeout_s=_LIMIT_S)
