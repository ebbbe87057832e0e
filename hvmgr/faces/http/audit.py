"""Who did what, and how it ended: one line of JSON each, on stderr or at the end of a file."""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from hvmgr import errors, units


class Audit:
    """The log. What comes from clients is quoted by JSON, so that it stays in its line."""

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self._write = write
        self._lock = threading.Lock()

    def tell(self, what: str, **facts: object) -> None:
        """One line: the time, what was done, and facts; empty ones are left out."""
        known = {name: value for name, value in facts.items() if value not in (None, "")}
        line = json.dumps({"time": units.to_rfc3339(datetime.now(UTC)), "what": what, **known}, default=str)
        with self._lock:
            self._write(line.encode("ascii") + b"\n")

    def tell_defect(self, error: BaseException) -> None:
        """A defect, with where it happened."""
        self.tell("defect", error=f"{type(error).__name__}: {error}", trace=traceback.format_exception(error))


def to_stderr() -> Audit:
    """Lines for a terminal or a service manager's journal."""

    def write(line: bytes) -> None:
        sys.stderr.write(line.decode("ascii"))
        sys.stderr.flush()

    return Audit(write)


def to_file(path: Path) -> Audit:
    """Lines at the end of a file that only its owner reads; a log that was moved away is begun anew."""
    _append(path, b"")  # what cannot be written is said before anything is served

    def write(line: bytes) -> None:
        try:
            _append(path, line)
        except errors.HvmgrError as error:  # a full disk stops no transfer; whoever looks after the server hears of it
            sys.stderr.write(f"{error.message}\n{line.decode('ascii')}")

    return Audit(write)


def _append(path: Path, line: bytes) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise errors.HostFailed(
            f"cannot write the audit log {path}: {error.strerror}", hint="name another file with --audit"
        ) from error
