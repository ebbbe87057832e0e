"""A synchronous QMP session over qemu.qmp, for callers that wait anyway.

The event loop lives in a thread of its own, so that Ctrl-C and other signals, which Python delivers to the main
thread, never interrupt the protocol in the middle of a message: after a KeyboardInterrupt the session still works
and a job can be cancelled through it.

qemu.qmp is imported at the first use (it costs 50 ms); ``qemu.qmp.legacy`` is GPL and never imported.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import threading
from typing import TYPE_CHECKING, Any, TypeVar

from hvmgr import errors
from hvmgr.host.qemu_errors import CommandRefused

if TYPE_CHECKING:
    import socket
    from collections.abc import Coroutine, Iterator, Mapping

    from qemu.qmp import QMPClient

_T = TypeVar("_T")

# qemu.qmp reports a lost connection on its logger as well as by an exception; the exception is enough.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())


class Session:
    """A connection to one QMP server; commands are answered in order."""

    def __init__(self, client: QMPClient, loop: asyncio.AbstractEventLoop, peer: str) -> None:
        self._client = client
        self._loop = loop
        self._peer = peer

    def execute(self, command: str, arguments: Mapping[str, object] | None = None, *, timeout_s: float) -> Any:
        """The answer to a command.

        Raises CommandRefused for QEMU's own refusal, OutcomeUnknown when the connection is lost or no answer
        comes within ``timeout_s``.
        """
        from qemu.qmp import ExecInterruptedError, ExecuteError, QMPError

        try:
            return self._wait(self._client.execute(command, arguments), timeout_s)
        except ExecuteError as error:
            raise CommandRefused(str(error)) from error
        except TimeoutError as error:
            raise errors.OutcomeUnknown(f"{self._peer} did not answer '{command}' within {timeout_s:g} s") from error
        except (ExecInterruptedError, QMPError, OSError, EOFError) as error:
            raise errors.OutcomeUnknown(f"contact with {self._peer} was lost during '{command}'") from error

    def wait_event(self, timeout_s: float) -> None:
        """Return at the next event, or after ``timeout_s``."""
        with contextlib.suppress(TimeoutError):
            self._wait(asyncio.wait_for(self._client.events.get(), timeout_s), timeout_s + 1)

    def _wait(self, coroutine: Coroutine[Any, Any, _T], timeout_s: float) -> _T:
        return _result(coroutine, self._loop, timeout_s)


@contextlib.contextmanager
def connected(channel: socket.socket, *, peer: str, timeout_s: float) -> Iterator[Session]:
    """A session over a connected socket, which belongs to the session from now on.

    Raises HostFailed when the greeting does not come; ``peer`` names the other side in messages.
    """
    from qemu.qmp import ConnectError, QMPClient, QMPError

    with channel, _loop() as loop:
        client = QMPClient()
        try:
            _result(client.connect(channel), loop, timeout_s)
        except (ConnectError, OSError, TimeoutError) as error:
            raise errors.HostFailed(f"{peer} did not start: {error}") from error
        try:
            yield Session(client, loop, peer)
        finally:
            # A connection that was lost says so once more here; whoever needed it has heard it already.
            with contextlib.suppress(QMPError, OSError, EOFError, TimeoutError):
                _result(client.disconnect(), loop, timeout_s)


def _result(coroutine: Coroutine[Any, Any, _T], loop: asyncio.AbstractEventLoop, timeout_s: float) -> _T:
    future = asyncio.run_coroutine_threadsafe(coroutine, loop)
    try:
        return future.result(timeout_s)
    except concurrent.futures.CancelledError as error:
        raise ConnectionError("the event loop ended") from error
    finally:
        future.cancel()


@contextlib.contextmanager
def _loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="hvmgr-qmp", daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
