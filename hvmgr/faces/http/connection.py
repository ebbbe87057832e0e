"""One connection of a client: requests come in, answers go out, in turn; and nothing waits for ever.

    with Connection(sock, peer, watchdog, limits) as connection:
        while (head := connection.next_request()) is not None:
            …connection.answer(…)

An answer may begin before the body of its request has arrived, and go on beside it. One that is not finished is cut off:
the other end sees fewer bytes than were announced.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from dataclasses import dataclass
from http import HTTPStatus
from typing import Self

import h11

from hvmgr.faces.http import watchdog
from hvmgr.faces.http.failure import Gone, Headers, Refused
from hvmgr.faces.http.message import Head, parse_head
from hvmgr.units import KIB, MIB
from hvmgr.version import __version__

_PIECE = 512 * KIB
_HEAD_PIECE = 4 * KIB  # h11 measures what is incomplete: a long head must not come in one piece
_AT_ONCE = struct.pack("ii", 1, 0)  # SO_LINGER: the connection is reset when it is closed
_LINGER = 8 * MIB  # what is still read of a request that was answered, so that the answer is not lost with it


@dataclass(frozen=True, slots=True)
class Limits:
    """How long and how much, for one connection; seconds and bytes."""

    head_s: float = 15.0  # for the whole head of a request
    body_s: float = 30.0  # for the whole body of a call
    idle_s: float = 60.0  # between two requests
    stall_s: float = 120.0  # without one byte moving in a transfer
    linger_s: float = 2.0
    head_size: int = 32 * KIB
    call_size: int = MIB  # the body of a call


class _Weight:
    """Bytes that the kernel has sent already, for h11 to count."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length


class Connection:
    """The server's end of one connection."""

    def __init__(self, sock: socket.socket, peer: str, watcher: watchdog.Watchdog, limits: Limits) -> None:
        self.peer = peer
        self.limits = limits
        self._sock = sock
        self._watchdog = watcher
        self.limit = watcher.watch(sock)
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=limits.head_size)
        self._is_first = True
        self._is_bodiless = False  # the answer to HEAD
        self._is_open_ended = False  # nobody knows where the request ends
        self._has_trailing_data_read = False
        self._ends_by_closing = False  # nothing else tells that the answer is complete

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._watchdog.forget(self.limit)
        with contextlib.suppress(OSError):
            self._sock.close()

    @property
    def is_encrypted(self) -> bool:
        """Whether bytes have to go through TLS, and not into the descriptor."""
        return hasattr(self._sock, "do_handshake")

    @property
    def local(self) -> str:
        """The address at which the client reached us."""
        try:
            return str(self._sock.getsockname()[0])
        except OSError:
            return ""

    @property
    def has_begun(self) -> bool:
        """Whether the head of the answer is on its way."""
        return self._http.our_state not in {h11.IDLE, h11.SEND_RESPONSE}

    # -- reading -------------------------------------------------------------------------------------------------

    def next_request(self) -> Head | None:
        """The head of the next request; None when there is none. Refused when it cannot be understood."""
        if not self._is_first:
            if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
                return None
            self._http.start_next_cycle()
            if not self._http.trailing_data[0]:
                self.limit.set(self.limits.idle_s)
                self._http.receive_data(self._receive(_HEAD_PIECE))
        self._is_first = False
        self.limit.set(self.limits.head_s)
        try:
            event = self._next_event(_HEAD_PIECE)
        except h11.RemoteProtocolError as error:
            status = HTTPStatus(error.error_status_hint)
            if self.limit.expired:
                status = HTTPStatus.REQUEST_TIMEOUT
            raise Refused(status, f"no request: {error}") from error
        if not isinstance(event, h11.Request):
            return None
        self.limit.set(None)
        head = parse_head(event.method, event.target, list(event.headers), event.http_version)
        self._is_bodiless = head.method == "HEAD"
        self._is_open_ended = head.method == "PUT" and head.length is None and not head.is_chunked
        if not head.length and not head.is_chunked:
            self._next_event()  # the end of the request, which has come with its head
        return head

    @property
    def waits_for_word(self) -> bool:
        """Whether the client sends the body only when it is told to (Expect: 100-continue)."""
        return self._http.they_are_waiting_for_100_continue

    def let_come(self) -> None:
        """A client that waits to be told so sends the body of its request."""
        if self.waits_for_word:
            self._send(h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue"))

    def read_body(self) -> bytes | bytearray:
        """The next bytes of the request's body; none at its end. Gone when it breaks off."""
        if self._http.their_state is not h11.SEND_BODY:
            return b""
        try:
            event = self._next_event()
        except h11.RemoteProtocolError as error:
            raise Gone(str(error)) from error
        return event.data if isinstance(event, h11.Data) else b""

    def read_to_end(self) -> bytes:
        """What follows a request that does not say how long its body is: bytes until the other end has sent all."""
        if not self._has_trailing_data_read:
            self._has_trailing_data_read = True
            data, _ = self._http.trailing_data
            if data:
                return data
        return self._receive()

    def read_call(self) -> bytes:
        """The whole body of a call; Refused when it is too large or does not come."""
        self.limit.set(self.limits.body_s)
        self.let_come()
        body = bytearray()
        try:
            while piece := self.read_body():
                body += piece
                if len(body) > self.limits.call_size:
                    raise Refused(
                        HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a call has at most {self.limits.call_size} bytes"
                    )
        except Gone as error:
            if self.limit.expired:
                raise Refused(HTTPStatus.REQUEST_TIMEOUT, "the request took too long") from error
            raise Refused(HTTPStatus.BAD_REQUEST, f"the body of the call breaks off: {error}") from error
        self.limit.set(None)
        return bytes(body)

    def _next_event(self, size: int = _PIECE) -> object:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._http.receive_data(self._receive(size))
        return event

    def _receive(self, size: int = _PIECE) -> bytes:
        try:
            return self._sock.recv(size)
        except OSError:
            return b""

    # -- answering -----------------------------------------------------------------------------------------------

    def begin(self, status: HTTPStatus, headers: Headers) -> None:
        """The head of an answer whose body follows; without Content-Length its end is that of the chunks or the connection."""
        is_old = self._http.their_http_version == b"1.0"
        self._ends_by_closing = is_old and not any(name.lower() == "content-length" for name, _ in headers)
        fields = [("Server", f"hvmgr/{__version__}"), *headers]
        is_read = self._http.their_state is h11.DONE and not self._is_open_ended
        if not is_read and ("Connection", "close") not in headers:
            fields.append(("Connection", "close"))  # the rest of the request, a disk maybe, is not the next one
        self._send(
            h11.Response(
                status_code=status.value,
                headers=[(name.encode(), value.encode("latin-1", "replace")) for name, value in fields],
                reason=status.phrase.encode(),
            )
        )

    def answer(self, status: HTTPStatus, content_type: str, body: bytes, headers: Headers = ()) -> None:
        """A whole answer."""
        self.limit.set(self.limits.stall_s)
        self.begin(status, [("Content-Type", content_type), ("Content-Length", str(len(body))), *headers])
        if not self._is_bodiless:
            self._send(h11.Data(data=body))
        self.finish()
        self.limit.set(None)

    def write(self, piece: bytes | memoryview) -> None:
        """Bytes of the body, one piece after the other."""
        self._send(h11.Data(data=piece))  # type: ignore[arg-type]  # passed on as it is

    def lend(self) -> int:
        """The descriptor for who writes the body by the kernel; ``count`` then says how much that was."""
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)  # small pieces go with the large ones beside them
        return self._sock.fileno()

    def count(self, length: int) -> None:
        """So many bytes of the body went through the descriptor."""
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)
        if length:
            self._http.send_with_data_passthrough(h11.Data(data=_Weight(length)))  # type: ignore[arg-type]

    def finish(self) -> None:
        """The answer is complete."""
        self._send(h11.EndOfMessage())

    def cut_off(self) -> None:
        """The answer is not complete, and the other end notices."""
        if self._ends_by_closing:
            with contextlib.suppress(OSError):
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)

    def linger(self) -> None:
        """What a client still sends is read for a while: closing at once would take its answer away from it."""
        if self._http.their_state is h11.DONE and not self._has_trailing_data_read:
            return
        watchdog.shut(self._sock, socket.SHUT_WR)
        self.limit.set(self.limits.linger_s)
        left = _LINGER
        while left > 0 and (data := self._receive()):
            left -= len(data)

    def _send(self, event: h11.Event) -> None:
        if isinstance(event, h11.Data):
            pieces = self._http.send_with_data_passthrough(event) or []
        else:
            pieces = [self._http.send(event) or b""]  # the whole head in one packet
        try:
            for piece in pieces:
                self._sock.sendall(piece)
        except OSError as error:
            raise Gone(str(error)) from error
