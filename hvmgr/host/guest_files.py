"""Files of a running guest, through its agent: read and written in pieces, and small shell scripts where the agent may run them.

Narrow and without decisions, as ``guest_agent``; every call has a limit. The agent's commands are those of QEMU's
qga/qapi-schema.json. What a guest answers is not believed: it is only compared, or shown with nothing that moves the cursor.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hvmgr import errors
from hvmgr.host import guest_agent

if TYPE_CHECKING:
    from hvmgr.host.domain import Domain

PIECE = 64 << 10
_CALL_S = 30
_SCRIPT_S = 60.0
_POLL_S = 0.02
_SLOWEST = 256 << 10  # bytes a second, of a guest that gets somewhere
_ABSENT = ("No such file", "cannot find the file", "cannot find the path")
_FILES = ("guest-file-open", "guest-file-read", "guest-file-write", "guest-file-close", "guest-file-flush")
_SCRIPTS = ("guest-exec", "guest-exec-status")
_WINDOWS = "mswindows"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a script ended with, and what it said."""

    code: int
    said: str


class GuestFiles:
    """The files of a guest; ``opened`` makes it."""

    def __init__(self, domain: Domain, *, can_run: bool, is_windows: bool) -> None:
        self._domain = domain
        self.can_run = can_run
        self.is_windows = is_windows

    # -- contents ------------------------------------------------------------------------------------------------

    def exists(self, path: str) -> bool:
        """Whether a file is there, for an agent that may run nothing; HostFailed where it does not say."""
        try:
            with self._open(path, "r"):
                return True
        except errors.HvmgrError as error:
            if guest_agent.is_silence(error):
                raise
            if any(words in error.message for words in _ABSENT):
                return False
            raise errors.HostFailed(
                f"whether {path} is there in the guest cannot be told: {error.message}",
                hint="--overwrite replaces what may be there",
            ) from error

    def write(self, path: str, mode: str, pieces: Iterator[bytes], wrote: Callable[[int], None]) -> str:
        """The file holds the pieces, one after the other; the SHA-256 of them all. ``mode`` is that of fopen(3)."""
        digest = hashlib.sha256()
        with self._open(path, mode) as handle:
            for piece in pieces:
                self._write(handle, piece, path, wrote)
                digest.update(piece)
            self._ask("guest-file-flush", handle=handle)
        return digest.hexdigest()

    def _write(self, handle: int, piece: bytes, path: str, wrote: Callable[[int], None]) -> None:
        view, limit = memoryview(piece), self._limit(path, len(piece))
        while view:
            limit()
            answer = self._ask("guest-file-write", handle=handle, **{"buf-b64": base64.b64encode(view).decode()})
            count = answer.get("count") if isinstance(answer, dict) else None
            if not isinstance(count, int) or not 0 < count <= len(view):
                raise errors.HostFailed(f"the guest agent of {self._domain.name} does not write {path}")
            view = view[count:]
            wrote(count)

    def digest(self, path: str, size: int, waiting: Callable[[], None] = lambda: None) -> str:
        """The SHA-256 of a file's content, read back in pieces; of one that is larger than ``size``, another one."""
        digest, count, limit = hashlib.sha256(), 0, self._limit(path, size)
        with self._open(path, "r") as handle:
            while True:
                waiting()
                limit()
                answer = self._ask("guest-file-read", handle=handle, count=PIECE)
                try:
                    data, is_end = base64.b64decode(answer["buf-b64"], validate=True), bool(answer["eof"])
                except (KeyError, TypeError, ValueError, binascii.Error) as error:
                    raise errors.HostFailed(f"the guest agent of {self._domain.name} does not read {path}") from error
                digest.update(data)
                count += len(data)
                if is_end or not data or count > size:
                    return digest.hexdigest()

    def _limit(self, path: str, size: int) -> Callable[[], None]:
        """Raises once that many bytes took longer than any guest needs."""
        deadline = time.monotonic() + limit_s(size)

        def check() -> None:
            if time.monotonic() > deadline:
                raise errors.HostFailed(
                    f"the guest agent of {self._domain.name} takes longer than {limit_s(size):.0f} s for {path}"
                )

        return check

    @contextlib.contextmanager
    def _open(self, path: str, mode: str) -> Iterator[int]:
        handle = self._ask("guest-file-open", path=path, mode=mode)
        if not isinstance(handle, int):
            raise errors.HostFailed(f"the guest agent of {self._domain.name} does not open {path}")
        try:
            yield handle
        except BaseException as error:
            if not (isinstance(error, errors.HvmgrError) and guest_agent.is_silence(error)):
                with contextlib.suppress(errors.HvmgrError):  # what went wrong first is told
                    self._ask("guest-file-close", handle=handle)
            raise
        self._ask("guest-file-close", handle=handle)

    # -- scripts -------------------------------------------------------------------------------------------------

    def run(
        self, script: str, *words: str, limit_s: float = _SCRIPT_S, waiting: Callable[[], None] = lambda: None
    ) -> Answer:
        """What a script of the guest's shell says with these as ``$1``, ``$2``, ...; HostFailed where it does not end in time.

        ``waiting`` is called now and then meanwhile; what it raises leaves the script to itself.
        """
        started = self._ask("guest-exec", path="sh", arg=["-c", script, "sh", *words], **{"capture-output": True})
        pid = started.get("pid") if isinstance(started, dict) else None
        deadline, pause = time.monotonic() + limit_s, _POLL_S
        while True:
            state = self._ask("guest-exec-status", pid=pid)
            if isinstance(state, dict) and state.get("exited"):
                return Answer(_code(state), _text(state, "out-data") + _text(state, "err-data"))
            waiting()
            if time.monotonic() > deadline:
                raise errors.HostFailed(
                    f"a program in the guest of {self._domain.name} did not end within {limit_s:g} s"
                )
            time.sleep(pause)
            pause = min(0.5, pause * 1.5)

    def _ask(self, command: str, **arguments: object) -> Any:
        return self._domain.ask_agent(command, timeout_s=_CALL_S, arguments=arguments)


def limit_s(size: int) -> float:
    """How long a guest may take to read or write that many bytes."""
    return _SCRIPT_S + size / _SLOWEST


def opened(domain: Domain) -> GuestFiles:
    """The files of the guest, whose agent answers and may write files; Conflict or Unsupported say what is in the way."""
    if not guest_agent.is_connected(domain):
        raise errors.Conflict(
            f"no guest agent answers in {domain.name}", hint="install and start qemu-guest-agent in the guest"
        )
    try:
        told = domain.ask_agent("guest-info", timeout_s=guest_agent.ANSWER_S)
        commands = {str(one["name"]) for one in told["supported_commands"] if one["enabled"]}
    except (KeyError, TypeError) as error:
        raise errors.HostFailed(f"the guest agent of {domain.name} does not say what it can do") from error
    except errors.HvmgrError as error:
        if not guest_agent.is_silence(error):
            raise
        raise errors.Conflict(
            f"the guest agent of {domain.name} gave no answer within {guest_agent.ANSWER_S} s",
            hint="see to it that the guest runs and its agent too",
        ) from error
    if missing := [one for one in _FILES if one not in commands]:
        raise errors.Unsupported(
            f"the guest agent of {domain.name} may not write files: it has {', '.join(missing)} switched off",
            hint="allow the guest-file commands in the guest: in Red Hat's, FILTER_RPC_ARGS in /etc/sysconfig/qemu-ga",
        )
    is_windows = "guest-get-osinfo" in commands and _system(domain) == _WINDOWS
    can_run = not is_windows and all(one in commands for one in _SCRIPTS)
    return GuestFiles(domain, can_run=can_run, is_windows=is_windows)


def _system(domain: Domain) -> str:
    try:
        told = domain.ask_agent("guest-get-osinfo", timeout_s=guest_agent.ANSWER_S)
        return str(told.get("id", "")) if isinstance(told, dict) else ""
    except errors.HvmgrError as error:
        if guest_agent.is_silence(error):
            raise
        return ""


def _code(state: dict[str, Any]) -> int:
    """255 for one that was killed, and for what is no exit code."""
    code = state.get("exitcode")
    return code if isinstance(code, int) and not isinstance(code, bool) else 255


def _text(state: dict[str, Any], key: str) -> str:
    try:
        raw = base64.b64decode(str(state.get(key, "")))
    except (ValueError, binascii.Error):
        return ""
    return "".join(one if one.isprintable() or one == "\n" else "?" for one in raw.decode("utf-8", "replace"))
