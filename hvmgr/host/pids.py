"""Processes that others started or a dead command left: each is named by its pid and the time when it started.

A pid alone comes to mean another process; with the start time it names one process for ever. What is ended is held by a
descriptor of the kernel's first, so that it cannot become another one between the look and the signal.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from pathlib import Path

from hvmgr import errors

_PR_SET_DUMPABLE = 4
_KILLED_S = 5.0  # how long a process may take to be gone after SIGKILL


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot: with the pid it names one process for ever.

    None when there is no such process. Source: proc_pid_stat(5), field 22.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field, the name in parentheses, may hold blanks and parentheses itself.
    return int(stat.rpartition(b")")[2].split()[19])


def keep_memory_secret() -> None:
    """What this process has in memory comes into no core file, and no other process of its user's may look at it."""
    import ctypes  # it takes as long to load as all that is above

    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def find(*wanted: str) -> tuple[int, int] | None:
    """Pid and ``start_time`` of a process that has these words, one after the other, on its command line; None when none is seen."""
    looked_for = b"\0" + b"\0".join(word.encode() for word in wanted) + b"\0"
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            line = b"\0" + (entry / "cmdline").read_bytes() + b"\0"
        except OSError:
            continue
        started = start_time(int(entry.name)) if looked_for in line else None
        if started is not None:
            return int(entry.name), started
    return None


def end_left_over(pid: int, started: int, *, timeout_s: float = _KILLED_S) -> bool:
    """Kill the process with this pid and ``start_time``, if it still is that one; whether there was one.

    Raises HostFailed when it does not end, or is not ours to end.
    """
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        # From here on the descriptor cannot come to mean another process.
        if start_time(pid) != started:
            return False
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        if not has_ended(descriptor, timeout_s):
            raise errors.HostFailed(f"process {pid} does not end", pid=pid)
    except ProcessLookupError:
        return False
    except PermissionError as error:
        raise errors.HostFailed(f"process {pid} belongs to another user", pid=pid) from error
    finally:
        os.close(descriptor)
    return True


def has_ended(descriptor: int, timeout_s: float) -> bool:
    """Whether the process behind a descriptor of the kernel's has ended, as soon as it has, or is there after that time."""
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    return bool(poller.poll(timeout_s * 1000))


def is_running(pid: int, started: int) -> bool:
    """Whether the process with this pid and ``start_time`` is there and has not ended (a zombie has)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False
    fields = stat.rpartition(b")")[2].split()
    return fields[0] not in {b"Z", b"X"} and int(fields[19]) == started


def naming(*words: str) -> list[tuple[int, int]]:
    """The running processes, each with its ``start_time``, whose command lines have all ``words`` in them; not our own."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                pid = int(entry.name)
                started = start_time(pid)
                line = (entry / "cmdline").read_bytes()
                if all(word.encode() in line for word in words) and started and is_running(pid, started):
                    found.append((pid, started))
    return found


def end(pid: int, started: int, *, timeout_s: float) -> None:
    """The process has ended, asked by SIGTERM first; nothing happens when it is another one by now."""
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            if start_time(pid) == started:
                signal.pidfd_send_signal(descriptor, signal.SIGTERM)
                has_ended(descriptor, timeout_s)
        finally:
            os.close(descriptor)
    end_left_over(pid, started)
