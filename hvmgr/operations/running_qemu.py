"""Notes about the QEMU that runs a VM now; what they say ends with that QEMU. Each holds its pid and start time.

A word may follow, which says more.
"""

from __future__ import annotations

from pathlib import Path

from hvmgr.host import pids
from hvmgr.operations.session import Session
from hvmgr.storage import durable


def note(session: Session, file: Path, word: str = "") -> None:
    """What the file stands for is true of the VM's present QEMU, which need not be there any more."""
    found = pids.find("-uuid", session.home.vm_id)  # and not a command that names the VM
    if found is not None:
        durable.write_file(file, f"{found[0]} {found[1]} {word}".rstrip().encode() + b"\n")


def is_noted(file: Path) -> bool:
    """Whether the QEMU that the note is about still runs; changes nothing."""
    try:
        pid, started = map(int, file.read_text().split()[:2])
    except (OSError, ValueError):
        return False
    return pids.start_time(pid) == started


def word_of(file: Path) -> str:
    """What the note says besides; nothing where there is no note."""
    try:
        return " ".join(file.read_text().split()[2:])
    except (OSError, ValueError):
        return ""
