"""QEMU's words into hvmgr's errors: qemu-img, qemu-io and QMP give nothing but texts, and mostly the same ones."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from hvmgr import errors

_ACCESS = "run as root, or give your user access to it"
_FULL = ("No space left on device", "quota exceeded")
_DAMAGED = (
    "mage is not in ",  # qcow2, vpc: another format, or none
    "nvalid VPC image",
    "orrupt",
    "nvalid image",
    "too large",  # tables that no image can have
    "too small",
    "ncorrect header",
    "must be a power of",
    "entry out of",
)
_IMPOSSIBLE = (
    "File too large",  # EFBIG: no file of this file system can be that large
    "too large for file format",
    "not support",
    "nsupported",
    "nknown driver",
    "not whitelisted",
    "does not accept value",  # QMP, for a driver that was not built in
)


class CommandRefused(Exception):
    """QEMU answered a QMP command with an error; ``str()`` is its text."""


def translated(words: str, path: Path) -> errors.HvmgrError:
    """The error that QEMU's words about the image at ``path`` mean."""
    facts = {"path": str(path)}
    # Names are data: an image called "corrupt" is none.
    plain = re.sub(r"'[^']*'", "", words.replace(str(path), ""))
    if any(sign in plain for sign in _FULL):
        hint = "free space and run the command again"
        return errors.NoSpace(f"no space left for '{path}': {words}", hint=hint, **facts)
    if "Failed to get" in plain and "lock" in plain:
        return _in_use(words, path)
    if "No such file or directory" in plain:
        return errors.NotFound(words, **facts)
    way: str | None = None
    if (closed := re.search(r"Could not create '([^']*)': Permission denied", words)) is not None:
        words, way = f"no permission for {closed[1]}", _ACCESS
    elif path.name not in words:
        words = f"{path}: {words}"
    if any(sign in plain for sign in _IMPOSSIBLE):
        return errors.Unsupported(words, **facts)
    if any(sign in plain for sign in _DAMAGED):
        return errors.Corrupt(words, **facts)
    return errors.HostFailed(words, hint=way, **facts)


def require_utf8(path: Path) -> None:
    """Unsupported for a name that QEMU cannot be told: it takes names of its block nodes in JSON."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError as error:
        raise errors.Unsupported(
            f"QEMU cannot be told a name that is not UTF-8: {path}",
            hint="rename the file, or its folder",
            path=str(path),
        ) from error


def holders_of(*paths: Path) -> list[int]:
    """The other processes that have one of these files open, as far as we may see.

    QEMU's locks are open-file-description locks, for which the kernel names no owner.
    """
    wanted = set()
    for path in paths:
        with contextlib.suppress(OSError):
            facts = path.stat()
            wanted.add((facts.st_dev, facts.st_ino))
    if not wanted:
        return []
    own = os.getpid()
    return sorted(pid for pid in _processes() if pid != own and _holds(pid, wanted))


def _processes() -> Iterator[int]:
    return map(int, filter(str.isdigit, os.listdir("/proc")))  # noqa: PTH208 - the whole is looked through often


def _holds(pid: int, wanted: set[tuple[int, int]]) -> bool:
    folder = f"/proc/{pid}/fd"
    with contextlib.suppress(OSError):  # ended meanwhile, or not ours to see
        for name in os.listdir(folder):  # noqa: PTH208
            with contextlib.suppress(OSError):
                facts = os.stat(f"{folder}/{name}")  # noqa: PTH116
                if (facts.st_dev, facts.st_ino) in wanted:
                    return True
    return False


def _in_use(words: str, path: Path) -> errors.Conflict:
    named = re.search(r"using the image \[(.*)\]\?", words)  # a parent perhaps; QMP does not say which
    image = Path(named[1]) if named else path
    subject = f"a parent of '{path}'" if "backing file" in words and not named else f"'{image}'"
    holders = holders_of(image)
    who = f"process {', '.join(map(str, holders))}" if holders else "another process"
    hint = "a running VM, another command or an attachment (hvmgr image attachments) writes to it: let that end first"
    return errors.Conflict(f"{subject} is in use by {who}", hint=hint, path=str(image), pids=holders)
