"""What ends a request early, as values of HTTP and of the Xen API; none of these leaves the face.

| raised | means |
|---|---|
| XenFailure | the call or transfer failed with a code of the Xen API |
| Refused | the request gets this answer and nothing else |
| Unreadable | the body is no call |
| TooMany | too many wrong passwords |
| Gone | there is nobody left to answer |
"""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path

from hvmgr import errors, os_errors

Headers = Sequence[tuple[str, str]]


class XenFailure(Exception):
    """A call or transfer that failed: ``code`` and its parameters, the last of which says it in words."""

    def __init__(self, code: str, *parameters: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> None:
        super().__init__(f"{code}: {', '.join(parameters)}" if parameters else code)
        self.code = code
        self.parameters = parameters
        self.status = status

    @property
    def description(self) -> list[str]:
        """The code and its parameters."""
        return [self.code, *self.parameters]


class Refused(Exception):
    """The request gets this answer and nothing else; nothing was changed."""

    def __init__(self, status: HTTPStatus, text: str, *, headers: Headers = ()) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.headers = headers


class Unreadable(Exception):
    """The body is no call."""


class TooMany(Exception):
    """Too many failed logins; ``wait_s`` until the next try counts. ``is_first`` of those that are turned away like that."""

    def __init__(self, wait_s: float, *, is_first: bool = True) -> None:
        super().__init__(f"too many failed logins; try again in {wait_s:.0f} s")
        self.wait_s = wait_s
        self.is_first = is_first


class Gone(Exception):
    """The other end is not there any more, or its time is over."""


# By the error's class, nearest first. What names a cause of its own says so by its fact ``xen``.
_CODES = {
    errors.UsageError: ("INVALID_VALUE", HTTPStatus.BAD_REQUEST),
    errors.NotFound: ("HANDLE_INVALID", HTTPStatus.NOT_FOUND),
    errors.Busy: ("VDI_IN_USE", HTTPStatus.CONFLICT),
    errors.Conflict: ("OPERATION_NOT_ALLOWED", HTTPStatus.CONFLICT),
    errors.Unsupported: ("NOT_IMPLEMENTED", HTTPStatus.NOT_IMPLEMENTED),
    errors.Corrupt: ("VDI_IO_ERROR", HTTPStatus.INTERNAL_SERVER_ERROR),
    errors.NoSpace: ("SR_FULL", HTTPStatus.INSUFFICIENT_STORAGE),
    errors.Cancelled: ("TASK_CANCELLED", HTTPStatus.SERVICE_UNAVAILABLE),
    errors.OutcomeUnknown: ("INTERNAL_ERROR", HTTPStatus.GATEWAY_TIMEOUT),
    errors.HostFailed: ("SR_BACKEND_FAILURE", HTTPStatus.BAD_GATEWAY),
    errors.HvmgrError: ("INTERNAL_ERROR", HTTPStatus.INTERNAL_SERVER_ERROR),
}


def translate(error: errors.HvmgrError) -> XenFailure:
    """What the client is told of an error of hvmgr's: its sentence and its hint, no facts (they name files)."""
    if "pids" in error.facts:  # another process has the image open: its path is nothing for clients
        return XenFailure("VDI_IN_USE", "another command or a running VM uses the disk", status=HTTPStatus.CONFLICT)
    code, status = next(_CODES[kind] for kind in type(error).__mro__ if kind in _CODES)
    words = error.message if error.hint is None else f"{error.message} ({error.hint})"
    if "most" in error.facts:
        return XenFailure("VDI_TOO_LARGE", str(error.facts.get("size", "")), str(error.facts["most"]), words)
    return XenFailure(code, words, status=status)


def is_done(error: errors.HvmgrError) -> bool:
    """Whether all that was asked for is done, and only merges behind it wait. What a dead command had begun is another's."""
    return bool(error.facts.get("done")) and not error.facts.get("recovered")


def of_system(error: OSError) -> XenFailure:
    """What the client is told when the system says no where nobody foresaw it."""
    try:
        with os_errors.explained(Path("the disk")):
            raise error
    except errors.HvmgrError as found:
        return translate(found)


def defect() -> XenFailure:
    """What the client is told of a defect: the log says the rest."""
    return XenFailure(
        "INTERNAL_ERROR", "a defect in hvmgr; the server's log says more", status=HTTPStatus.INTERNAL_SERVER_ERROR
    )
