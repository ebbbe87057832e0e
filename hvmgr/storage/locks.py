"""Locks between hvmgr's processes: one per home, one per image that more than one VM could use.

A lock dies with its process (flock), and nobody inherits it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from hvmgr import errors
from hvmgr.storage import durable

_POLL_S = 0.05


@contextlib.contextmanager
def held(path: Path, *, wait_s: float, what: str, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Exclusive for this process; raises Busy when another one still has it after ``wait_s`` seconds.

    ``on_wait`` is called again and again while another one has it: who has it may change meanwhile.
    """
    deadline = time.monotonic() + wait_s
    while True:
        with durable.explained(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            _take(descriptor, deadline, what, on_wait)
            if _is_same(descriptor, path):
                with contextlib.suppress(
                    OSError
                ):  # a full disk keeps nobody out; written over, it takes no space again
                    os.pwrite(descriptor, f"{os.getpid():<31}\n".encode(), 0)
                yield
                return
        finally:
            os.close(descriptor)


def is_held(path: Path) -> bool:
    """Whether some process has the lock now."""
    return holder(path) is not None


def holder(path: Path) -> int | None:
    """The id of the process that has the lock now, 0 when it has not said it yet; None when nobody has it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        number = os.pread(descriptor, 32, 0).strip()
        return int(number) if number.isdigit() else 0
    finally:
        os.close(descriptor)
    return None


def _take(descriptor: int, deadline: float, what: str, on_wait: Callable[[], None] | None) -> None:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if on_wait is not None:
                on_wait()
            if time.monotonic() >= deadline:
                holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
                raise errors.Busy(
                    f"another command works on {what}" + (f" (process {holder})" if holder else ""),
                    hint="run it again later, or wait longer with --wait SECONDS",
                ) from None
            time.sleep(_POLL_S)
        else:
            return


def _is_same(descriptor: int, path: Path) -> bool:
    """The file at ``path`` may have been removed and made anew while we waited."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
