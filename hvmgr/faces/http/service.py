"""All that requests share: users, sessions, tasks, events, disks, the log."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hvmgr import errors
from hvmgr.faces.http.accounts import Accounts, Failures
from hvmgr.faces.http.audit import Audit
from hvmgr.faces.http.calls_host import Place
from hvmgr.faces.http.disks import Disks
from hvmgr.faces.http.events import Events
from hvmgr.faces.http.failure import TooMany, XenFailure
from hvmgr.faces.http.notes import Notes
from hvmgr.faces.http.sessions import Sessions
from hvmgr.faces.http.tasks import Tasks
from hvmgr.model.user import LONGEST_NAME, User

_MOST_ASIDE = 16


@dataclass(frozen=True, slots=True)
class Settings:
    """What a server is made of."""

    uri: str
    root: Path
    users: Path
    wait_s: float
    session_s: float = 24 * 3600.0


class Service:
    """One server's state. Nothing of it outlives the process but what the disks' homes keep."""

    def __init__(self, settings: Settings, audit: Audit) -> None:
        self.audit = audit
        self.place = Place(settings.root)
        self.pool_notes = Notes("pool")
        self.life = secrets.token_hex(4)  # tokens of another life are none
        self.events = Events()
        self.tasks = Tasks(self.events, self.place.host)
        self.accounts = Accounts(settings.users, Failures(), lambda words: audit.tell("users", outcome=words))
        self.sessions = Sessions(self.accounts.find, idle_s=settings.session_s)
        self.disks = Disks(
            settings.uri,
            settings.root,
            wait_s=settings.wait_s,
            sr=self.place.sr,
            report=lambda words: audit.tell("merge", outcome=words),
        )
        self.stopping = threading.Event()
        self._aside: set[threading.Thread] = set()
        self._lock = threading.Lock()
        self._looking = threading.Lock()
        self._looked = 0.0
        self._seen: dict[str, object] = {}

    @property
    def is_stopping(self) -> bool:
        """Whether the server is about to end."""
        return self.stopping.is_set()

    def stop(self) -> None:
        """What can be stopped stops; nobody waits for events any more."""
        self.stopping.set()
        self.events.close()

    def close(self) -> None:
        """Returns when the work beside the requests has ended."""
        self.stop()
        with self._lock:
            left = list(self._aside)
        for thread in left:
            thread.join()

    def find_user(self, name: str, password: str, peer: str) -> User | None:
        """The user, if this is the password; who is turned away is told to the log. TooMany as ``Accounts.check``."""
        shown = name[:LONGEST_NAME]  # of a stranger's words no more than a name has
        try:
            user = self.accounts.check(name, password, peer)
        except TooMany as error:
            if error.is_first:  # the log must not grow as fast as somebody asks
                self.audit.tell("login", peer=peer, user=shown, outcome="too many failures")
            raise
        if user is None:
            self.audit.tell("login", peer=peer, user=shown, outcome="wrong user or password")
        return user

    def report_defect(self, error: BaseException) -> None:
        """A defect is told to the log."""
        self.audit.tell_defect(error)

    def in_background(self, work: Callable[[], None], *, name: str) -> None:
        """Work that outlives its request."""

        def run() -> None:
            try:
                work()
            finally:
                with self._lock:
                    self._aside.discard(threading.current_thread())

        with self._lock:
            if len(self._aside) >= _MOST_ASIDE or self.is_stopping:
                raise _busy()
            thread = threading.Thread(target=run, name=name)
            try:
                thread.start()
            except RuntimeError as error:  # no more threads
                raise _busy() from error
            self._aside.add(thread)

    def parse_token(self, token: str) -> int | None:
        """The number that a token stands for; None for the beginning of time, and for a token of another life."""
        life, _, number = token.partition(",")
        return int(number) if life == self.life and number.isdecimal() and len(number) < 19 else None

    def look_at_disks(self, *, older_than_s: float = 0.0) -> None:
        """What has become of the disks since the last look is told as events; a look that fails waits for the next one."""
        with self._looking, contextlib.suppress(errors.HvmgrError):
            now = time.monotonic()
            if self._looked and now - self._looked < older_than_s:
                return
            found = self.disks.records()
            is_first, self._looked = not self._looked, now
            before, self._seen = self._seen, dict(found)
            for ref, record in found.items():
                if not is_first and before.get(ref) != record:
                    self.events.note("vdi", "mod" if ref in before else "add", ref, record)
            for ref in before.keys() - found.keys():
                self.events.note("vdi", "del", ref, None)


def _busy() -> XenFailure:
    return XenFailure("HOST_IN_USE", "too much is being done already; try again later")
