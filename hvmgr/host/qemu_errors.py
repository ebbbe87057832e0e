"""QEMU's words into hvmgr's errors: qemu-img, qemu-io and QMP give nothing but texts, and mostly the same ones."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from hvmgr import errors

_FULL = ("No space left on device", "quota exceeded", "File too large")
_DAMAGED = (
    "mage is not in ",  # qcow2, vpc: another format, or none
    "nvalid VPC image",
    "orrupt",
    "nvalid image",
    "is too large",  # tables of a header that cannot be
    "is too small",
    "ncorrect header",
    "must be a power of",
    "entry out of",
)
_IMPOSSIBLE = ("not support", "nknown driver", "not whitelisted", "nsupported")


def translated(words: str, path: Path) -> errors.HvmgrError:
    """The error that QEMU's words about the image at ``path`` mean."""
    facts = {"path": str(path)}
    if any(sign in words for sign in _FULL):
        hint = "free space and run the command again"
        return errors.NoSpace(f"no space left for '{path}': {words}", hint=hint, **facts)
    if "Failed to get" in words and "lock" in words:
        return _in_use(path)
    if "No such file or directory" in words:
        return errors.NotFound(words, **facts)
    if any(sign in words for sign in _DAMAGED):
        return errors.Corrupt(words, **facts)
    if any(sign in words for sign in _IMPOSSIBLE):
        return errors.Unsupported(words, **facts)
    return errors.HostFailed(words, **facts)


def holders_of(path: Path) -> list[int]:
    """The other processes that have a file open, as far as we may see.

    QEMU's locks are open-file-description locks, for which the kernel names no owner.
    """
    try:
        wanted = path.stat()
    except OSError:
        return []
    found = set()
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # ended meanwhile, or not ours to see
            there = entry.stat()
            if (there.st_dev, there.st_ino) == (wanted.st_dev, wanted.st_ino):
                found.add(int(entry.parts[2]))
    return sorted(found - {os.getpid()})


def _in_use(path: Path) -> errors.Conflict:
    holders = holders_of(path)
    who = f"process {', '.join(map(str, holders))}" if holders else "another process"
    hint = "a running VM or another command writes to it: let that end first"
    return errors.Conflict(f"'{path}' is in use by {who}", hint=hint, path=str(path), pids=holders)
