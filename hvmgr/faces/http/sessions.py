"""Who is logged in: a session for each login, until it is closed, is not used for long, or its user is no more the same."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from hvmgr.model.user import Role, User

REF = "OpaqueRef:"
NULL = "OpaqueRef:NULL"


def new_ref() -> str:
    """A reference that nobody can guess."""
    text = secrets.token_hex(16)
    return f"{REF}{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


@dataclass(slots=True)
class Session:
    """One login; ``user`` is what the file said of the user then."""

    ref: str
    user: User
    opened: float
    used: float
    originator: str = ""

    @property
    def name(self) -> str:
        """The user's name."""
        return self.user.name

    @property
    def is_admin(self) -> bool:
        """Whether this session may change things."""
        return self.user.role is Role.ADMIN


class Sessions:
    """The sessions by their references. The oldest of a user goes when there are too many."""

    def __init__(
        self,
        find_user: Callable[[str], User | None],
        *,
        idle_s: float,
        most_of_one: int = 500,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._find_user = find_user
        self._idle_s = idle_s
        self._most_of_one = most_of_one
        self._clock = clock
        self._lock = threading.Lock()
        self._known: dict[str, Session] = {}

    def now(self) -> float:
        """This moment, as sessions have it."""
        return self._clock()

    def open(self, user: User, originator: str = "") -> Session:
        """A new session."""
        now = self._clock()
        session = Session(new_ref(), user, now, now, originator)
        with self._lock:
            self._sweep(now)
            own = [one for one in self._known.values() if one.name == user.name]
            for old in sorted(own, key=lambda one: one.used)[: max(0, len(own) + 1 - self._most_of_one)]:
                del self._known[old.ref]
            self._known[session.ref] = session
        return session

    def find(self, ref: str) -> Session | None:
        """The session, which is thereby used; None when there is no such session any more."""
        now = self._clock()
        with self._lock:
            session = self._known.get(ref)
            if session is None or now - session.used > self._idle_s:
                self._known.pop(ref, None)
                return None
        if self._find_user(session.name) != session.user:  # removed, or another password or role
            self.close(ref)
            return None
        session.used = now
        return session

    def close(self, ref: str) -> None:
        """The session is over."""
        with self._lock:
            self._known.pop(ref, None)

    def __len__(self) -> int:
        return len(self._known)

    def _sweep(self, now: float) -> None:
        for ref in [ref for ref, one in self._known.items() if now - one.used > self._idle_s]:
            del self._known[ref]
