"""The reserve of a home: a file of real blocks, given up when the disk is full, so that there is room to make room.

Even taking away has to be written down first. What only takes away, and what ends an operation that is open, may have
the reserve; what makes something new may not. It comes back when there is space again. Nothing depends on it, but that
somebody whose disk is full can delete a snapshot.
"""

from __future__ import annotations

import contextlib
import os

from hvmgr import errors
from hvmgr.model.layout import Layout
from hvmgr.storage import durable

SIZE = 512 << 10  # XFS wants 150 KiB free before it makes any file


def keep(layout: Layout) -> None:
    """The home has a reserve, unless there is little space, or nobody may write there.

    Its bytes are random: a file system that compresses, or finds blocks that are alike, stores them all the same.
    """
    if layout.reserve.exists():
        return
    with contextlib.suppress(OSError, errors.HvmgrError):
        if layout.configuration.exists() and not is_needed(layout):
            durable.write_file(layout.reserve, os.urandom(SIZE), alone=True)


def give_up(layout: Layout) -> bool:
    """The space of the reserve is free; whether there was one."""
    if not layout.reserve.exists():
        return False
    durable.remove(layout.reserve)
    return True


def is_needed(layout: Layout) -> bool:
    """Whether less is free than the reserve would give. A quota does not show here, only when something is written."""
    return _free(layout) < SIZE


def _free(layout: Layout) -> int:
    facts = os.statvfs(layout.private)
    return facts.f_bavail * facts.f_frsize
