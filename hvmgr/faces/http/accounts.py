"""Is somebody who they say they are: passwords against the file of users, and how often one may be wrong."""

from __future__ import annotations

import base64
import binascii
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from hvmgr import errors
from hvmgr.faces.http import peers
from hvmgr.faces.http.failure import TooMany
from hvmgr.model import user as users_model
from hvmgr.model.user import Role, Secret, User
from hvmgr.storage import users

_AT_ONCE = 2  # guesses that cost memory and time at the same moment
_MOST_PLACES = 10_000


class Accounts:
    """The file of users, read again when it was changed; a damaged one lets nobody in."""

    def __init__(self, path: Path, failures: Failures, report: Callable[[str], None]) -> None:
        self._path = path
        self._report = report
        self._failures = failures
        self._lock = threading.Lock()
        self._at_once = threading.Semaphore(_AT_ONCE)
        self._stamp: object = None
        self._known: dict[str, User] = {}
        self._nobody = User("", Role.READ, Secret(os.urandom(users_model.SALT_SIZE), bytes(32)))

    def find(self, name: str) -> User | None:
        """The user of this name, by what the file says now."""
        try:
            facts = self._path.stat()
            stamp: object = (facts.st_ino, facts.st_mtime_ns, facts.st_size, facts.st_mode)
        except OSError:
            stamp = None
        with self._lock:
            if stamp is None or stamp != self._stamp:
                self._read(stamp)
            return self._known.get(name)

    def check(self, name: str, password: str, peer: str) -> User | None:
        """The user, if this is the password; it takes the same time for a name that nobody has. TooMany before that."""
        origin = peers.origin(peer)
        places = [f"{origin} {name}", origin]
        self._failures.require_few(places)
        user = self.find(name)
        with self._at_once:
            self._failures.require_few(places)
            is_right = users_model.has_password((user or self._nobody).secret, password)
        if user is None or not is_right:
            self._failures.note(places)
            return None
        return user

    def _read(self, stamp: object) -> None:
        """What is damaged is read again after a change; what could not be read this time, the next time."""
        self._stamp, self._known = stamp, {}
        try:
            self._known = users.read(self._path)
        except errors.HvmgrError as error:
            self._report(error.message)
            if isinstance(error, errors.HostFailed):
                self._stamp = None


class Failures:
    """Failed logins by place, an address alone or with a name: after so many within a time none is looked at any more."""

    def __init__(self, *, most: int = 10, within_s: float = 60.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._within_s = within_s
        self._clock = clock
        self._lock = threading.Lock()
        self._times: dict[str, deque[float]] = {}
        self._closed: set[str] = set()  # those of which somebody was turned away already

    def require_few(self, places: list[str]) -> None:
        """TooMany when one of the places has failed too often."""
        now = self._clock()
        with self._lock:
            for place in places:
                times = self._times.get(place)
                while times and now - times[0] > self._within_s:
                    times.popleft()
                if not times:
                    self._times.pop(place, None)
                    self._closed.discard(place)
                elif len(times) >= self._limit(place):
                    is_first = place not in self._closed
                    self._closed.add(place)
                    raise TooMany(self._within_s - (now - times[0]), is_first=is_first)

    def note(self, places: list[str]) -> None:
        """One more failure."""
        now = self._clock()
        with self._lock:
            if len(self._times) > _MOST_PLACES:
                self._times = {key: one for key, one in self._times.items() if one and now - one[-1] <= self._within_s}
                self._closed &= self._times.keys()
            for place in places:
                self._times.setdefault(place, deque(maxlen=self._limit(place))).append(now)

    def _limit(self, place: str) -> int:
        return self._most if " " in place else 3 * self._most


def parse_basic(header: str) -> tuple[str, str] | None:
    """Name and password of an Authorization header; None for another scheme, or nonsense."""
    scheme, _, word = header.partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        name, colon, password = base64.b64decode(word.strip(), validate=True).decode("utf-8").partition(":")
    except (binascii.Error, ValueError):
        return None
    return (name, password) if colon else None
