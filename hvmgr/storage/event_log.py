"""The host's log of events: one JSON document a line, written when an operation is over, followed by ``hvmgr watch``.

A line is written by one call, so that lines of several processes never mix; the lock keeps them from turning the log at
the same moment. It is not synced: after a loss of power the last lines may be missing, while the homes are as they are.
The old file of the log is kept, so that a reader who is a little late misses nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hvmgr import settings
from hvmgr.storage import durable, index, locks

LIMIT = 1 << 20  # of one of the two files: some thousand events
_WAIT_S = 5.0
_PIECE = 1 << 16


def append(document: Mapping[str, Any]) -> None:
    """The document is the log's last line."""
    folder = index.make_folder("events")
    line = json.dumps(document, default=str).encode() + b"\n"
    with locks.held(folder / "lock", wait_s=_WAIT_S, what="the log of events"):
        current = folder / "log"
        with contextlib.suppress(FileNotFoundError):
            if current.stat().st_size + len(line) > LIMIT:
                durable.replace_unsynced(current, folder / "log.1")
        with durable.explained(current):
            descriptor = os.open(current, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                size = os.fstat(descriptor).st_size
                if size and os.pread(descriptor, 1, size - 1) != b"\n":
                    line = b"\n" + line  # the disk was full in the middle of another one
                os.write(descriptor, line)
            finally:
                os.close(descriptor)


class Reader:
    """Reads the log from one end to the other and then whatever comes, through turns of the log."""

    def __init__(self, *, from_start: bool) -> None:
        """``from_start`` begins with the oldest line that there is, otherwise with the next one that is written."""
        self._folder = settings.index_folder() / "events"
        self._descriptor: int | None = None
        self._rest = b""
        # Where there is no log yet, it may be turned before it is read for the first time.
        self._older = from_start or not (self._open(at_end=True) or (self._folder / "log.1").exists())

    def documents(self) -> Iterator[dict[str, Any]]:
        """What has been written since the last call; lines that cannot be understood are left out."""
        if self._older:
            older = self._identity_of_old()
            whole = list(self._whole(self._folder / "log.1"))
            if not self._open():
                return
            if self._identity_of_old() != older:  # turned meanwhile
                self.close()
                yield from self.documents()
                return
            self._older = False
            yield from whole
        while True:
            if self._descriptor is None and not self._open():
                return
            yield from self._lines()
            if self._is_current():
                return
            yield from self._lines()  # what was written between the last look and the turn
            self.close()

    def close(self) -> None:
        """Nothing is kept open."""
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor, self._rest = None, b""

    def _open(self, *, at_end: bool = False) -> bool:
        with contextlib.suppress(OSError):
            self._descriptor = os.open(self._folder / "log", os.O_RDONLY | os.O_CLOEXEC)
            if at_end:
                os.lseek(self._descriptor, 0, os.SEEK_END)
        return self._descriptor is not None

    def _identity_of_old(self) -> tuple[int, int, int] | None:
        """Which file the log was before it was turned."""
        with contextlib.suppress(OSError):
            facts = (self._folder / "log.1").stat()
            return facts.st_dev, facts.st_ino, facts.st_ctime_ns
        return None

    def _is_current(self) -> bool:
        """Whether the file that is read is still the one that is written."""
        assert self._descriptor is not None
        try:
            return os.path.samestat(os.fstat(self._descriptor), (self._folder / "log").stat())
        except OSError:
            return not (self._folder / "log.1").exists()  # it is turned at this moment, or somebody removed all

    def _lines(self) -> Iterator[dict[str, Any]]:
        assert self._descriptor is not None
        while piece := os.read(self._descriptor, _PIECE):
            *lines, self._rest = (self._rest + piece).split(b"\n")
            yield from filter(None, map(_document, lines))

    @staticmethod
    def _whole(path: Path) -> Iterator[dict[str, Any]]:
        with contextlib.suppress(OSError):
            yield from filter(None, map(_document, path.read_bytes().split(b"\n")))


def _document(line: bytes) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError):
        found = json.loads(line)
        if isinstance(found, dict):
            return found
    return None
