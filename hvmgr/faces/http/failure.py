"""Failures as the Xen API tells them: a code with parameters, and the status that HTTP has for it."""

from __future__ import annotations

from http import HTTPStatus

from hvmgr import errors


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
    code, status = next(_CODES[kind] for kind in type(error).__mro__ if kind in _CODES)
    words = error.message if error.hint is None else f"{error.message} ({error.hint})"
    if "most" in error.facts:
        return XenFailure("VDI_TOO_LARGE", str(error.facts.get("size", "")), str(error.facts["most"]), words)
    return XenFailure(code, words, status=status)


def defect() -> XenFailure:
    """What the client is told of a defect: the log says the rest."""
    return XenFailure("INTERNAL_ERROR", "a defect in hvmgr; the server's log says more", status=HTTPStatus.INTERNAL_SERVER_ERROR)
