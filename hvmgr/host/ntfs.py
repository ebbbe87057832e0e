"""NTFS in an ordinary file, read through the programs of ntfs-3g: names in a folder, one file; and one file written. No mount."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hvmgr import errors
from hvmgr.host import process

_LIMIT_S = 600.0
_OWN = {
    "$AttrDef", "$BadClus", "$Bitmap", "$Boot", "$Extend", "$LogFile", "$MFT", "$MFTMirr", "$Secure", "$UpCase", "$Volume",
}  # fmt: skip


def names(volume: Path, folder: str = "/") -> list[str]:
    """What is in a folder, NTFS's own files aside."""
    said = _run(volume, ["ntfsls", "-f", "-a", "-p", folder, volume]).decode("utf-8", "replace")
    return [one for one in said.splitlines() if one and one not in {".", "..", *_OWN}]


def find(volume: Path, path: str) -> str | None:
    """A path as its names are written; None when there is none."""
    found = ""
    for word in path.strip("/").split("/"):
        name = next((one for one in names(volume, found or "/") if one.lower() == word.lower()), None)
        if name is None:
            return None
        found += f"/{name}"
    return found.lstrip("/")


def read(volume: Path, path: str) -> bytes | None:
    """The bytes of a file, in whatever case its names are written; None when it is not there."""
    found = find(volume, path)
    return None if found is None else _run(volume, ["ntfscat", "-f", volume, found])


def write(volume: Path, path: str, source: Path) -> None:
    """A file in a folder that is there holds the bytes of ``source``."""
    _run(volume, ["ntfscp", "-f", "-q", volume, source, path])


def check(volume: Path) -> None:
    """What ntfsfix looks at is consistent; Corrupt otherwise. Nothing is changed."""
    done = process.run(["ntfsfix", "-n", volume], timeout_s=_LIMIT_S, ok_codes=range(128))
    if done.code != 0:
        words = "; ".join((done.stdout.decode("utf-8", "replace") + done.stderr).split("\n")[:3])
        raise errors.Corrupt(f"the file system is damaged: {words}", hint="start Windows and let it check: chkdsk /f")


def _run(volume: Path, argv: Sequence[str | Path]) -> bytes:
    try:
        return process.run(argv, timeout_s=_LIMIT_S).stdout
    except errors.HostFailed as error:
        words = str(error.facts.get("words", error))
        if "hibernat" in words:
            raise errors.Conflict(
                f"a Windows sleeps in {volume.name}", hint="start it and shut it down, with fast start off"
            ) from error
        raise
