"""What exports and imports have in common: who asks, for which task, and that the task ends whatever happens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING

from hvmgr import errors
from hvmgr.faces.http import accounts, failure
from hvmgr.faces.http.connection import Connection
from hvmgr.faces.http.failure import Gone, Refused, TooMany, XenFailure
from hvmgr.faces.http.message import Head
from hvmgr.faces.http.sessions import Session
from hvmgr.model.image_format import ImageFormat
from hvmgr.model.progress import Progress
from hvmgr.model.user import Role
from hvmgr.operations.reporter import Reporter

if TYPE_CHECKING:
    from hvmgr.faces.http.service import Service

_FORMATS = {one.value: one for one in (ImageFormat.RAW, ImageFormat.VHD, ImageFormat.QCOW2)}


@dataclass(slots=True)
class Work:
    """One transfer: its connection, its request, and the task that it works for."""

    service: Service
    connection: Connection
    head: Head
    session: Session
    task: str
    is_own_task: bool  # made by us: nobody else knows of it yet
    about: str = ""
    done: int = 0
    is_settled: bool = False

    def check(self) -> None:
        """Cancelled when nobody wants the transfer any more."""
        if self.service.tasks.is_cancelled(self.task):
            raise errors.Cancelled("the task was cancelled")
        if self.connection.limit.is_shut:
            raise errors.Cancelled("the server is stopped")

    def report(self, done: int, total: int) -> None:
        """How far it is; Cancelled as ``check``."""
        self.done = done
        self.service.tasks.report(self.task, done, total)
        self.check()

    def reporter(self) -> Reporter:
        """Whom an operation tells; what it reports before and beside the bytes moves no bar."""

        def progress(_: Progress) -> None:
            self.check()

        return Reporter(progress=progress)

    def importing(self) -> Reporter:
        """Whom an import tells: what it reports of its bytes moves the bar."""

        def progress(one: Progress) -> None:
            if one.what.startswith("import "):
                self.service.tasks.report(self.task, one.done, one.total)
            self.check()

        return Reporter(progress=progress)

    def succeed(self, result: str = "") -> None:
        """The transfer came through, and the disk is let go."""
        self.service.tasks.succeed(self.task, result)
        self._tell("ok")

    def fail(self, problem: XenFailure) -> None:
        """The transfer failed, and the disk is as it was; nothing more happens to one that came through."""
        if self.is_settled:
            return
        self.service.tasks.fail(self.task, problem)
        self._tell(problem.code, ", ".join(problem.parameters))

    def _tell(self, outcome: str, words: str = "") -> None:
        self.is_settled = True
        what = "export" if self.head.method == "GET" else "import"
        self.service.audit.tell(
            what, peer=self.connection.peer, user=self.session.name, about=self.about, task=self.task,
            bytes=self.done, outcome=outcome, words=words,
        )  # fmt: skip


@contextlib.contextmanager
def begun(service: Service, connection: Connection, head: Head, role: Role, realm: str) -> Iterator[Work]:
    """A transfer for who may do it. Its task has ended when the block is left, in whatever way.

    Raises Refused with what the client is told, as long as nothing was answered; Gone otherwise.
    """
    session = _authenticate(service, connection, head, realm)
    work = _bind(service, connection, head, session)
    try:
        if role is Role.ADMIN and not session.is_admin:
            raise XenFailure(
                "RBAC_PERMISSION_DENIED",
                realm,
                f"the user {session.name} may only look and export",
                status=HTTPStatus.FORBIDDEN,
            )
        yield work
    except XenFailure as problem:
        _end(work, problem)
    except Gone as error:
        if service.tasks.is_cancelled(work.task):
            work.fail(XenFailure("TASK_CANCELLED", work.task))
            raise
        words = "no byte moved for too long" if connection.limit.expired else "the client ended the connection"
        words = "the server is stopped" if connection.limit.is_shut else words
        work.fail(XenFailure("CLIENT_ERROR", f"{words} at byte {work.done}"))
        raise Gone(words) from error
    except errors.HvmgrError as error:
        _end(work, failure.translate(error))
    except OSError as error:
        _end(work, failure.of_system(error))
    except Refused as refusal:
        work.fail(XenFailure("INVALID_VALUE", refusal.text))
        raise
    except Exception:
        work.fail(failure.defect())
        raise


def _end(work: Work, problem: XenFailure) -> None:
    """The task has failed; the client is told so, or cut off when the answer has begun."""
    work.fail(problem)
    if work.connection.has_begun:
        raise Gone(str(problem)) from problem
    raise Refused(problem.status, str(problem), headers=[("task-id", work.task)]) from problem


def parse_format(head: Head) -> ImageFormat:
    """The format that is asked for; raw unless stated otherwise."""
    word = (head.parameter("format") or "raw").lower()
    if word not in _FORMATS:
        raise XenFailure("INTERNAL_ERROR", f"there is no format '{word[:20]}' here; {', '.join(_FORMATS)} are possible")
    return _FORMATS[word]


def _authenticate(service: Service, connection: Connection, head: Head, realm: str) -> Session:
    ref = head.parameter("session_id", cookie_first=True)
    if ref is not None:
        if (session := service.sessions.find(ref)) is not None:
            return session
        raise _unauthorized(realm, "the session is not valid")
    header = head.headers.get("authorization")
    given = None if header is None else accounts.parse_basic(header)
    if given is None:
        raise _unauthorized(realm, "log in first: by session_id, or by name and password (Basic)")
    name, password = given
    try:
        user = service.find_user(name, password, connection.peer)
    except TooMany as error:
        headers = [("Retry-After", str(int(error.wait_s) + 1))]
        raise Refused(HTTPStatus.TOO_MANY_REQUESTS, str(error), headers=headers) from error
    if user is None:
        raise _unauthorized(realm, "wrong user or password")
    now = service.sessions.now()
    return Session("", user, now, now)  # for this request only


def _unauthorized(realm: str, words: str) -> Refused:
    headers = [("WWW-Authenticate", f'Basic realm="{realm}"')]
    return Refused(HTTPStatus.UNAUTHORIZED, words, headers=headers)


def _bind(service: Service, connection: Connection, head: Head, session: Session) -> Work:
    """The client's task from now on has its transfer; without one there is a task of ours, which stays to be looked at."""
    ref = head.parameter("task_id", cookie_first=True) or head.parameter("subtask_of", cookie_first=True)
    try:
        task = ref or service.tasks.create(session.name, f"{head.method} {head.path.strip('/')}")
        limit = connection.limit
        service.tasks.take(task, session.name, limit.shut if head.method == "GET" else limit.deafen)
    except XenFailure as problem:
        status = {"HANDLE_INVALID": HTTPStatus.NOT_FOUND, "RBAC_PERMISSION_DENIED": HTTPStatus.FORBIDDEN}
        raise Refused(status.get(problem.code, HTTPStatus.CONFLICT), str(problem)) from problem
    return Work(service, connection, head, session, task, is_own_task=ref is None)
