"""The calls of the Xen API: a table from names to functions, and how one of them is carried out.

    @call("VDI.get_uuid", least=1)
    def get_uuid(asked: Asked, ref: str) -> str: …

Each says which role it needs and how many parameters it takes besides the session. Anything that it raises is a failure
with a code. ``Async.`` before a name makes a task of the call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from hvmgr import errors
from hvmgr.faces.http import failure, xml_rpc
from hvmgr.faces.http.failure import TooMany, XenFailure
from hvmgr.faces.http.sessions import Session
from hvmgr.model.user import Role

if TYPE_CHECKING:
    from hvmgr.faces.http.service import Service

_ASYNC = "Async."


@dataclass(frozen=True, slots=True)
class Asked:
    """One call: who asks, from where, and whom."""

    service: Service
    peer: str
    local: str  # the address at which the client reached us
    session: Session | None = None

    @property
    def known(self) -> Session:
        """The session of a call that needs one."""
        assert self.session is not None
        return self.session


Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Entry:
    """One call of the table."""

    function: Callable[..., Any]
    role: Role | None  # None: without a session
    least: int
    most: int
    is_async: bool
    is_told: bool  # whether it is told to the audit log


CALLS: dict[str, Entry] = {}


def call(
    name: str, *, role: Role | None = Role.READ, least: int = 0, most: int | None = None, is_async: bool = False
) -> Callable[[Function], Function]:
    """Puts a function into the table, with ``least`` to ``most`` parameters after the session."""

    def put(function: Function) -> Function:
        entry = Entry(function, role, least, least if most is None else most, is_async, role is not Role.READ)
        CALLS[name] = entry
        if is_async:
            CALLS[_ASYNC + name] = entry
        return function

    return put


def carry_out(service: Service, peer: str, local: str, method: str, parameters: Sequence[Any]) -> Any:
    """The value of a call; XenFailure for everything that is in its way."""
    entry = CALLS.get(method)
    if entry is None:
        raise XenFailure("MESSAGE_METHOD_UNKNOWN", method[:80])
    session, rest = None, list(parameters)
    if entry.role is not None:
        session = _session(service, rest)
        rest = rest[1:]
    _require_count(method, entry, len(rest))
    asked = Asked(service, peer, local, session)
    try:
        _require_role(method, entry, session)
        if method.startswith(_ASYNC):
            value: Any = _begin(asked, method, entry, rest)
        else:
            value = run(entry.function, asked, rest)
    except XenFailure as problem:
        if entry.is_told:
            _tell(asked, method, rest, problem.code)
        raise
    if entry.is_told:
        _tell(asked, method, rest, "ok")
    return value


def run(function: Callable[..., Any], asked: Asked, parameters: Sequence[Any]) -> Any:
    """The value of a call's function; every failure is a XenFailure, a defect too."""
    try:
        return function(asked, *parameters)
    except XenFailure:
        raise
    except errors.HvmgrError as error:
        raise failure.translate(error) from error
    except OSError as error:
        raise failure.of_system(error) from error
    except TooMany as error:
        raise XenFailure("SESSION_AUTHENTICATION_FAILED", "", str(error)) from error
    except Exception as error:
        asked.service.report_defect(error)
        raise failure.defect() from error


def _begin(asked: Asked, method: str, entry: Entry, parameters: Sequence[Any]) -> str:
    service, session = asked.service, asked.known
    ref = service.tasks.create(session.name, method)
    service.tasks.take(ref, session.name)

    def work() -> None:
        try:
            value = run(entry.function, asked, parameters)
        except XenFailure as problem:
            service.tasks.fail(ref, problem)
        else:
            service.tasks.succeed(ref, "" if value == "" else xml_rpc.to_text(value))

    try:
        service.in_background(work, name=method)
    except XenFailure as problem:
        service.tasks.fail(ref, problem)
        raise
    return ref


def _session(service: Service, parameters: list[Any]) -> Session:
    ref = parameters[0] if parameters and isinstance(parameters[0], str) else ""
    session = service.sessions.find(ref)
    if session is None:
        raise XenFailure("SESSION_INVALID", ref[:64])
    return session


def _require_count(method: str, entry: Entry, given: int) -> None:
    if not entry.least <= given <= entry.most:
        raise XenFailure("MESSAGE_PARAMETER_COUNT_MISMATCH", method, str(entry.least), str(given))


def _require_role(method: str, entry: Entry, session: Session | None) -> None:
    if entry.role is Role.ADMIN and session is not None and not session.is_admin:
        raise XenFailure("RBAC_PERMISSION_DENIED", method, f"the user {session.name} may only look and export")


def _tell(asked: Asked, method: str, parameters: Sequence[Any], outcome: str) -> None:
    if asked.session is None:
        return  # a login tells itself, without the password
    about = next((one for one in parameters if isinstance(one, str)), "")
    asked.service.audit.tell(method, peer=asked.peer, user=asked.session.name, about=about[:100], outcome=outcome)


# -- what parameters have to be ----------------------------------------------------------------------------------------


def shown(value: Any) -> str:
    """A parameter that is not what it has to be, for the answer; of lists and maps only what they are: they may be deep."""
    return str(value)[:64] if isinstance(value, str | int | float) else type(value).__name__


def text(name: str, value: Any, *, most: int = 1000) -> str:
    """A parameter that is a text."""
    if not isinstance(value, str) or len(value) > most:
        raise XenFailure("INVALID_VALUE", name, shown(value))
    return value


def number(name: str, value: Any) -> float:
    """A parameter that is a finite number, also one that is sent as a text."""
    try:
        if (
            isinstance(value, str | int | float)
            and not isinstance(value, bool)
            and math.isfinite(found := float(value))
        ):
            return found
    except (ValueError, OverflowError):
        pass
    raise XenFailure("INVALID_VALUE", name, shown(value))


def size(name: str, value: Any) -> int:
    """A parameter that is a number of bytes, also one that is sent as a text."""
    try:
        if isinstance(value, str | int) and not isinstance(value, bool) and 0 <= int(value) < 1 << 63:
            return int(value)
    except ValueError:
        pass
    raise XenFailure("INVALID_VALUE", name, shown(value))


def mapping(name: str, value: Any) -> dict[str, Any]:
    """A parameter that is a record or a map."""
    if not isinstance(value, dict):
        raise XenFailure("INVALID_VALUE", name, shown(value))
    return value
