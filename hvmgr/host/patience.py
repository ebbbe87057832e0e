"""An act with a time limit that holds even where the kernel itself waits: on a dead file server, nothing returns.

No signal ends such a wait, and no thread can be left behind in it. So the act is done by a child that can be.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import time

TYPE_CHECKING = False  # typing's own costs 8 ms to import; type checkers know the name
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_PIECE = 1 << 16


class Overdue(Exception):
    """It was not done in time; what was begun may still hang."""


def within(seconds: float, act: Callable[[], Any]) -> Any:
    """What ``act`` gives (as JSON can say it), done in a child of this process; raises ``Overdue``, or what went wrong.

    The child has no stdin, stdout and stderr, so that nobody waits for it who waits for their end.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        _be_the_child(act, reader, writer)
    os.close(writer)
    try:
        answer = _read(reader, time.monotonic() + seconds)
    except Overdue:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, os.WNOHANG)
        raise
    finally:
        os.close(reader)
    os.waitpid(pid, 0)
    good, value = json.loads(answer) if answer else (False, "it ended without an answer")
    if not good:
        raise RuntimeError(value)
    return value


def _be_the_child(act: Callable[[], Any], reader: int, writer: int) -> None:
    answer: tuple[bool, Any] = (False, "it ended without an answer")
    try:
        os.close(reader)
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        answer = (True, act())
    except BaseException as error:  # noqa: BLE001 - it is raised again by the parent
        answer = (False, f"{type(error).__name__}: {error}")
    finally:
        view = memoryview(json.dumps(answer).encode())
        with contextlib.suppress(OSError):
            while view:
                view = view[os.write(writer, view) :]
        os._exit(0)


def _read(reader: int, deadline: float) -> bytes:
    found = b""
    poller = select.poll()
    poller.register(reader, select.POLLIN)
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not poller.poll(left * 1000):
            raise Overdue
        piece = os.read(reader, _PIECE)
        if not piece:
            return found
        found += piece
