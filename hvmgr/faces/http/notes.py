"""What clients note on an object (``other_config``), kept as long as the server runs."""

from __future__ import annotations

import threading

from hvmgr.faces.http.failure import XenFailure

_MOST, _LONGEST = 50, 4_000  # notes on one object, and their characters together: they are kept in memory


def put(notes: dict[str, str], key: str, value: str, *, kind: str, name: str) -> None:
    """One more among those on an object; XenFailure where there is one under this key, or there are too many."""
    if key in notes:
        raise XenFailure("MAP_DUPLICATE_KEY", kind, "other_config", name, key)
    if len(notes) >= _MOST:
        raise XenFailure("OUT_OF_SPACE", f"there are at most {_MOST} notes on one object")
    if sum(map(len, (*notes, *notes.values(), key, value))) > _LONGEST:
        raise XenFailure("OUT_OF_SPACE", f"the notes on one object have at most {_LONGEST} characters")
    notes[key] = value


class Notes:
    """The notes on the objects of one class, by whatever names an object."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._lock = threading.Lock()
        self._of: dict[str, dict[str, str]] = {}

    def of(self, name: str) -> dict[str, str]:
        """Those on one object."""
        with self._lock:
            return dict(self._of.get(name, {}))

    def add(self, name: str, key: str, value: str) -> None:
        """One more, as ``put``."""
        with self._lock:
            put(self._of.setdefault(name, {}), key, value, kind=self._kind, name=name)

    def remove(self, name: str, key: str) -> None:
        """The note is gone; there need not have been one."""
        with self._lock:
            self._of.get(name, {}).pop(key, None)

    def forget(self, name: str) -> None:
        """The object is gone."""
        with self._lock:
            self._of.pop(name, None)
