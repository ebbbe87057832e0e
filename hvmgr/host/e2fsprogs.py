"""ext2, ext3 and ext4 in an ordinary file, through e2fsprogs: its journal replayed, its files read and changed. No mount.

debugfs ends well whatever went wrong, and says it on stderr: whatever it says there, its version aside, is a failure.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvmgr import errors
from hvmgr.host import process

_LIMIT_S = 1800.0
_VERSION = re.compile(r"^debugfs \d+\.\d.*$")
# /inode/mode/uid/gid/name/size/
_ENTRY = re.compile(r"^/(\d+)/(\d{6})/(\d+)/(\d+)/(.*)/(\d*)/$")
_FOLDER, _LINK, _KINDS = 0o040000, 0o120000, 0o170000
_DIRECT_MAX = 4  # extents that fit an inode
_PROGRESS = re.compile(r"Pass \d|e2fsck \d+\.\d")
_ENDS = ("\n", "\r", "\0")  # of a line in debugfs' script
_LINE_MAX = 8000  # debugfs reads pieces of 8191 bytes: what comes behind would be a command of its own
_HARMLESS = (0, 1)  # exit codes of e2fsck: what it found is right now


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in a folder."""

    name: str
    inode: int
    mode: int
    size: int

    @property
    def is_folder(self) -> bool:
        """Whether names can be in it."""
        return self.mode & _KINDS == _FOLDER

    @property
    def is_link(self) -> bool:
        """Whether it is a symbolic link."""
        return self.mode & _KINDS == _LINK


def require() -> None:
    """Unsupported, with the package, where a program is missing."""
    for program in ("debugfs", "e2fsck", "mke2fs"):
        process.require(program)


def replay(volume: Path) -> None:
    """What the file system's journal holds is in its place; Corrupt where it needs more than that."""
    _fsck(volume, ["-E", "journal_only", "-p"])


def settle(volume: Path, *, whole: bool = False) -> None:
    """What the guest does before it mounts: the journal is replayed, files without a name go; Corrupt where that is not enough.

    ``whole``: all of it is looked at and quotas are counted anew.
    """
    _fsck(volume, ["-f", "-p"] if whole else ["-p"])


def check(volume: Path) -> None:
    """The whole file system is consistent; Corrupt otherwise. Nothing is changed."""
    _fsck(volume, ["-f", "-n"])


def _fsck(volume: Path, options: Sequence[str]) -> None:
    done = process.run(["e2fsck", *options, volume], timeout_s=_LIMIT_S, ok_codes=range(128))
    if done.code not in _HARMLESS:
        said = (line.strip() for line in (done.stdout.decode("utf-8", "replace") + done.stderr).splitlines())
        words = "; ".join([line for line in said if line and not _PROGRESS.match(line)][:3])
        raise errors.Corrupt(
            f"the file system is damaged: {words}", hint="start the system and let it check its disk, or e2fsck it"
        )


def entries(volume: Path, folder: str) -> list[Entry]:
    """What is in a folder, without . and ..; nothing when it is not there, but for the root, which always is."""
    text, said = _ask(volume, [f"ls -p {quoted(folder)}"])
    if folder != "/" and any("File not found" in line or "not a directory" in line for line in said):
        return []
    _require_silence(said)
    found = [_ENTRY.match(line) for line in text.splitlines()]
    return [
        Entry(one[5], int(one[1]), int(one[2], 8), int(one[6] or 0))
        for one in found
        if one is not None and int(one[1]) and one[5] not in {".", ".."}  # inode 0: a free place
    ]


def entry(volume: Path, path: str) -> Entry | None:
    """What stands at a path; None when nothing does."""
    parent, _, name = path.rstrip("/").rpartition("/")
    return next((one for one in entries(volume, parent or "/") if one.name == name), None)


def read(volume: Path, path: str) -> bytes | None:
    """The bytes of a file; None when it is not there."""
    with tempfile.TemporaryDirectory(prefix="hvmgr-") as folder:
        target = Path(folder) / "file"
        _, said = _ask(volume, [f"dump {quoted(path)} {quoted(str(target))}"])
        if any("File not found" in line for line in said):
            return None
        _require_silence(said)
        return target.read_bytes()


def blocks(volume: Path, path: str) -> list[int]:
    """Where the bytes of a small file stand: numbers of blocks. Empty for a larger one, whose list may hold more than those."""
    text, said = _ask(volume, [f"blocks {quoted(path)}"])
    _require_silence(said)
    found = [int(one) for one in text.split() if one.isdecimal()]
    return found if len(found) <= _DIRECT_MAX else []


def change(volume: Path, commands: Sequence[str]) -> None:
    """The commands of debugfs are done, in one go; HostFailed with its words when one of them could not be."""
    _require_silence(_ask(volume, commands, writable=True)[1])


def quoted(path: str) -> str:
    """A word on a line of debugfs."""
    if any(one in path for one in _ENDS):
        raise errors.Unsupported(f"{path!r} has a line break in its name, which debugfs cannot take")
    return '"' + path.replace('"', '""') + '"'


def _ask(volume: Path, commands: Sequence[str], *, writable: bool = False) -> tuple[str, list[str]]:
    for one in commands:
        if any(
            end in one for end in _ENDS
        ):  # what comes behind would be a command of its own, on this host's files too
            raise errors.Unsupported(f"{one!r} has a line break, which debugfs cannot take")
        if len(one.encode("utf-8", "surrogateescape")) > _LINE_MAX:
            raise errors.Unsupported(f"'{one[:60]}…' is longer than a line that debugfs can take")
    with tempfile.NamedTemporaryFile("w", prefix="hvmgr-", encoding="utf-8", errors="surrogateescape") as script:
        script.write("\n".join(commands) + "\n")
        script.flush()
        words = ["-w"] if writable else []
        done = process.run(["debugfs", *words, "-f", script.name, volume], timeout_s=_LIMIT_S)
    return done.stdout.decode("utf-8", "surrogateescape"), list(_said(done.stderr))


def _said(text: str) -> Iterator[str]:
    for line in text.splitlines():
        if line.strip() and not _VERSION.match(line):
            yield line.strip()


def _require_silence(said: Sequence[str]) -> None:
    if said:
        raise errors.HostFailed(f"debugfs failed: {'; '.join(said[:3])}", words="; ".join(said))
