"""Notes about the QEMU that runs a VM now; what they say ends with that QEMU. Each holds its pid and start time."""

from __future__ import annotations

from pathlib import Path

from hvmgr.host import process
from hvmgr.operations.session import Session
from hvmgr.storage import durable


def note(session: Session, file: Path) -> None:
    """What the file stands for is true of the VM's present QEMU, which need not be there any more."""
    found = process.find(session.home.vm_id)
    if found is not None:
        durable.write_file(file, f"{found[0]} {found[1]}\n".encode())


def is_noted(file: Path) -> bool:
    """Whether the QEMU that the note is about still runs; changes nothing."""
    try:
        pid, started = map(int, file.read_text().split())
    except (OSError, ValueError):
        return False
    return process.start_time(pid) == started
