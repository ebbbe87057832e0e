"""FAT in an ordinary file, written through mtools: folders, files, their times. No root, no mount.

Names are UTF-8 on the command line. mtools takes ``*``, ``?`` and ``[`` in any name for a pattern, and no quoting helps.
"""

from __future__ import annotations

import re
from pathlib import Path

from hvmgr import errors
from hvmgr.host import file_systems, process

_LIMIT_S = 3600.0
# The user's own settings mean other drives; times on FAT have no zone.
_ENVIRONMENT = {"MTOOLSRC": "/dev/null", "HOME": "/nonexistent", "LC_ALL": "C.UTF-8", "TZ": "UTC"}
_PATTERN = re.compile(r"[*?\[\]]")


def require() -> None:
    """Unsupported, with the package, where a program is missing."""
    for program in ("mcopy", "mmd", "fsck.fat"):
        process.require(program)


def is_possible(name: str) -> bool:
    """Whether mtools takes the name as it is."""
    return _PATTERN.search(name) is None


def make_folder(volume: Path, path: str) -> None:
    """The folder, which was not there, is there."""
    _run(volume, ["mmd", "-D", "s", "-i", volume, f"::{path}"])


def write(volume: Path, path: str, source: str, *, replaces: bool = False) -> None:
    """The file holds the bytes of ``source`` and has its time.

    Where it is not to replace one, and the name leads to one all the same, as the short names of others do, that stays what it is.
    """
    clash = "o" if replaces else "s"
    _run(volume, ["mcopy", "-n", "-m", "-D", clash, "-i", volume, source, f"::{path}"])


def check(volume: Path) -> None:
    """The whole file system is consistent; Corrupt otherwise. Nothing is changed."""
    done = process.run(["fsck.fat", "-n", volume], timeout_s=_LIMIT_S, ok_codes=range(128))
    if done.code != 0:
        words = "; ".join(done.stdout.decode("utf-8", "replace").splitlines()[1:4])
        raise errors.Corrupt(f"the file system is damaged: {words}", hint="let the guest check it, or: fsck.fat")


def _run(volume: Path, argv: list[str | Path]) -> None:
    done = process.run(argv, timeout_s=_LIMIT_S, ok_codes=range(128), environment=_ENVIRONMENT)
    if done.code == 0:
        return
    words = " ".join(done.stderr.split())
    if "full" in words:
        raise file_systems.full("the FAT volume")
    raise errors.HostFailed(f"{argv[0]} failed: {words.replace(str(volume), 'the volume')}", words=words)
