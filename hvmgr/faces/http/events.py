"""What has changed, for those who wait for it: a number that grows, and the last change of each object."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Event:
    """One change of one object; ``record`` is how it looked then, None when it is gone."""

    id: int
    kind: str  # the class, lower case
    operation: str  # add, mod, del
    ref: str
    record: Record | None
    time: float = field(default_factory=time.time)


class Events:
    """The changes in their order; of each object only the last one is kept, which is all that a late reader needs."""

    def __init__(self, *, most: int = 20_000) -> None:
        self._most = most
        self._changed = threading.Condition()
        self._last: dict[tuple[str, str], Event] = {}  # in the order of their ids
        self._number = 0
        self._forgotten = 0  # up to this number changes are missing
        self._closed = False

    @property
    def number(self) -> int:
        """The number of the last change."""
        return self._number

    def has_all_since(self, number: int) -> bool:
        """Whether no change after this one was forgotten: whoever asks too late has to look at everything again."""
        return number >= self._forgotten

    def note(self, kind: str, operation: str, ref: str, record: Record | None) -> None:
        """Something has changed."""
        with self._changed:
            self._number += 1
            self._last.pop((kind, ref), None)
            self._last[kind, ref] = Event(self._number, kind, operation, ref, record)
            while len(self._last) > self._most:
                self._forgotten = self._last.pop(next(iter(self._last))).id
            self._changed.notify_all()

    def since(self, number: int, wants: Callable[[Event], bool], timeout_s: float) -> tuple[list[Event], int]:
        """The wanted changes after ``number``, as soon as there are any, and the number to go on from."""
        until = time.monotonic() + timeout_s
        with self._changed:
            while True:
                found = []
                for event in reversed(self._last.values()):
                    if event.id <= number:
                        break
                    if wants(event):
                        found.append(event)
                left = until - time.monotonic()
                if found or left <= 0 or self._closed:
                    return found[::-1], self._number
                number = self._number
                self._changed.wait(left)

    def close(self) -> None:
        """Nobody waits any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
