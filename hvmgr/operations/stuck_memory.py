"""A QEMU whose background snapshot failed: its memory stays write-protected, and cannot be saved any more.

The guest runs on, and its disks can be snapshotted. Until that QEMU is gone, nothing that saves its memory is tried: it
would fail in the middle. ``.hvmgr/stuck-memory`` is the note of that QEMU.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from hvmgr import errors
from hvmgr.model.layout import Layout
from hvmgr.operations import running_qemu
from hvmgr.operations.session import Session
from hvmgr.storage import durable


def note(session: Session) -> None:
    """The VM's present QEMU is known for it; it need not be there any more."""
    running_qemu.note(session, _file(session.layout))


def is_noted(layout: Layout) -> bool:
    """Whether the QEMU that is known for it still runs; changes nothing."""
    return running_qemu.is_noted(_file(layout))


def refuse(session: Session, *, hint: str) -> None:
    """Conflict when the memory of the VM cannot be saved before it was restarted; a note of a QEMU that is gone goes."""
    if is_noted(session.layout):
        raise errors.Conflict(
            f"QEMU failed to save the memory of {session.home.name} in the background, and cannot save it again until the"
            " VM is restarted",
            hint=f"restart the VM: hvmgr vm stop, then vm start; or {hint}",
        )
    if not session.dry_run:
        with contextlib.suppress(errors.HvmgrError):
            durable.remove(_file(session.layout))


def _file(layout: Layout) -> Path:
    return layout.private / "stuck-memory"
