"""The serial console of the counting guest: what it says, read from a pty or from a log file.

QEMU drops what a guest says while nobody has the pty open. While it is open it has to be read: after 4 KiB, some ten
seconds, the guest stands still in its next line until it is. Open it late, close it early.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from hvmgr import errors
from hvmgr.storage import durable

# A guest that was stopped in the middle of a line leaves it in front of the next one's first.
_TICK = re.compile(r"tick memory=(\d{6}) disk=([\d,]+|-) (ok|MISMATCH)$")
_BOOT = re.compile(r"boot disk=([\d,]+|-)$")
_FILE_POLL_S = 0.02
_PIECE = 65536


@dataclass(frozen=True, slots=True)
class Tick:
    """One count: what memory counts now, and what each disk held just before it was written with that.

    ``ok`` says that memory and disks belong together, now and since the guest booted.
    """

    memory: int
    disks: tuple[int, ...]
    ok: bool

    @property
    def disk(self) -> int:
        """The first disk's count; -1 for a guest without disks."""
        return self.disks[0] if self.disks else -1

    def follows(self, counter: int) -> bool:
        """Whether this can be the first tick of a restored memory whose frozen disk holds ``counter``."""
        return self.ok and self.memory - counter in (1, 2)


class Console:
    """A guest's console, open for reading; a context manager.

    A pty never becomes our controlling terminal. What was said before is dropped, so that the next tick is a
    fresh one; with ``from_start`` a log file is read from its beginning.
    """

    def __init__(self, path: Path, *, from_start: bool = False) -> None:
        self.path = path
        with durable.explained(path):
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._is_file = stat.S_ISREG(os.fstat(self._descriptor).st_mode)
        self._rest = b""
        self._last = ""
        if not from_start:
            self.drain()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """The guest's words are dropped again; more than once is fine."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def drain(self) -> None:
        """Drops what the guest has said up to now, also the beginning of a line that it is saying."""
        self._rest = b""
        if self._is_file:
            os.lseek(self._descriptor, 0, os.SEEK_END)
            return
        with contextlib.suppress(errors.HostFailed):
            while self._read():
                pass

    def next_tick(self, timeout_s: float) -> Tick:
        """The next count that the guest says in full; raises HostFailed after ``timeout_s``."""
        match = self._match(_TICK, timeout_s, "no tick")
        return Tick(int(match[1]), _counters(match[2]), match[3] == "ok")

    def next_boot(self, timeout_s: float) -> tuple[int, ...]:
        """What each disk held when the guest booted, as it says before its first tick; HostFailed as above."""
        return _counters(self._match(_BOOT, timeout_s, "no boot")[1])

    def wait_for(self, text: str, timeout_s: float) -> str:
        """The next whole line that holds ``text``; raises HostFailed after ``timeout_s``."""
        return self._match(re.compile(f".*{re.escape(text)}.*"), timeout_s, f"no '{text}'").string

    def _match(self, pattern: re.Pattern[str], timeout_s: float, what: str) -> re.Match[str]:
        deadline = time.monotonic() + timeout_s
        while True:
            line = self._next_line(deadline)
            if line is None:
                raise errors.HostFailed(
                    f"{what} on the console {self.path} within {timeout_s:g} s; last line: '{self._last}'",
                    console=str(self.path),
                    last=self._last,
                )
            if match := pattern.search(line):
                return match

    def _next_line(self, deadline: float) -> str | None:
        """The next whole line without its end; None when ``deadline`` comes first."""
        while b"\n" not in self._rest:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return None
            if self._is_file:
                piece = self._read()
                if not piece:
                    time.sleep(min(_FILE_POLL_S, remaining))
            else:
                select.select([self._descriptor], [], [], remaining)
                piece = self._read()
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        self._last = line.rstrip(b"\r").decode("ascii", "replace")
        return self._last

    def _read(self) -> bytes:
        """What is there, nothing if nothing is; raises HostFailed when the pty's other end is gone."""
        try:
            piece = os.read(self._descriptor, _PIECE)
        except BlockingIOError:
            return b""
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            piece = b""
        if not piece and not self._is_file:
            raise errors.HostFailed(f"the console {self.path} was closed: the guest is off", last=self._last)
        return piece


def _counters(text: str) -> tuple[int, ...]:
    return () if text == "-" else tuple(int(number) for number in text.split(","))
