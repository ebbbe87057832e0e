"""The script in libvirt's folder of hooks that runs ``faces/hook.py``; and one start without asking it.

It is a file of its own in ``qemu.d``, which libvirt runs beside all other hooks since 6.5. It lets everything pass when
hvmgr or its Python is gone.
"""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from hvmgr import errors, settings
from hvmgr.host import libvirt_door
from hvmgr.model.finding import Finding
from hvmgr.storage import durable, start_guard
from hvmgr.storage.vm_home import VmHome

FOLDER = Path("/etc/libvirt/hooks")
_NAME = Path("qemu.d", "50-hvmgr")
_NEEDS = (6, 5)  # https://libvirt.org/hooks.html: scripts in qemu.d
_OURS = "# hvmgr's start guard"
_MODE = 0o755

_SCRIPT = """\
#!/bin/sh
{ours}, made by 'hvmgr hook install'; 'hvmgr hook uninstall' removes it.
# libvirt runs it with: guest, operation, sub-operation, extra; and the domain's XML on stdin.
case "$2" in prepare|started|release|restore|migrate) ;; *) exit 0 ;; esac
python={python}
hook={hook}
export HVMGR_RUN={run} HVMGR_CONFIG={config} HVMGR_INDEX={index}
[ -x "$python" ] && [ -r "$hook" ] || exit 0
exec "$python" -I -S "$hook" "$@"
"""


@dataclass(frozen=True, slots=True)
class Installed:
    """What became of the script; ``alone`` says that libvirt's daemons found no other qemu hook when they started."""

    path: Path
    changed: bool
    alone: bool


def path_in(folder: Path) -> Path:
    """Where the script is, or would be."""
    return folder / _NAME


class Asked(StrEnum):
    """Whom libvirt asks before each start."""

    US = "us"  # this very hvmgr, with these folders
    ANOTHER = "another"  # another installation of it, or other folders
    NOBODY = "nobody"


def asked(folder: Path) -> Asked:
    """Whose script is there."""
    found = _read(path_in(folder))
    if found == _text():
        return Asked.US
    return Asked.NOBODY if found is None or _OURS not in found else Asked.ANOTHER


def install(folder: Path, *, dry_run: bool = False) -> Installed:
    """libvirt asks this hvmgr before each start; Conflict when a file that is not ours has the script's name."""
    _require_libvirt()
    path, text = path_in(folder), _text()
    found = _read(path)
    _require_ours(path, found)
    result = Installed(path, changed=found != text or not os.access(path, os.X_OK), alone=not _others(folder))
    if result.changed and not dry_run:
        if not folder.parent.is_dir():
            raise errors.NotFound(f"there is no {folder.parent}", hint="name libvirt's folder of hooks with --dir")
        for one in (folder, path.parent):
            durable.make_folder(one, mode=_MODE)
        durable.write_file(path, text.encode(), mode=_MODE)
    return result


def uninstall(folder: Path, *, dry_run: bool = False) -> Installed:
    """No hvmgr is asked before a start; other hooks stay."""
    path = path_in(folder)
    found = _read(path)
    _require_ours(path, found)
    if found is not None and not dry_run:
        durable.remove(path)
        durable.remove_empty_folder(path.parent)
    return Installed(path, changed=found is not None, alone=not _others(folder))


def in_the_way(home: VmHome) -> list[Finding]:
    """For what a start of the VM as it is now would be refused."""
    return start_guard.refusals(start_guard.examine(home.present()))


def allow_once(home: VmHome, *, wait_s: float) -> None:
    """The next start of the VM passes whatever is in its way; Busy while a command works on it."""
    with home.locked(wait_s=wait_s):
        start_guard.allow_once(home.layout)


def _require_libvirt() -> None:
    found = libvirt_door.version()
    if found < _NEEDS:
        raise errors.Unsupported(
            f"libvirt {'.'.join(map(str, found))} runs no scripts in {_NAME.parent}: that came with "
            f"{'.'.join(map(str, _NEEDS))}",
            hint="use a newer libvirt; without the hook every state between two steps of hvmgr's is safe to start",
        )


def _require_ours(path: Path, found: str | None) -> None:
    if found is not None and _OURS not in found:
        raise errors.Conflict(f"{path} is not hvmgr's", hint="move it away, or give it another name", path=str(path))


def _others(folder: Path) -> list[Path]:
    """Qemu hooks of other programs."""
    entries = [folder / "qemu", *sorted(folder.glob("qemu.d/*"))]
    return [one for one in entries if one != path_in(folder) and one.is_file() and os.access(one, os.X_OK)]


def _read(path: Path) -> str | None:
    with durable.explained(path):
        try:
            return path.read_text(errors="replace")
        except FileNotFoundError:
            return None


def _text() -> str:
    hook = Path(__file__).resolve().parents[1] / "faces" / "hook.py"
    return _SCRIPT.format(
        ours=_OURS,
        python=shlex.quote(sys.executable),
        hook=shlex.quote(str(hook)),
        run=shlex.quote(str(settings.runtime_folder().absolute())),
        config=shlex.quote(str(settings.config_folders()[0].absolute())),  # that of the system, whoever starts libvirt
        index=shlex.quote(str(settings.index_folder().absolute())),
    )
