"""Listens, gives each connection a thread, and ends all of them when it is told to.

A stop has three parts: nobody new comes in; whoever is in the middle of a transfer has some time to finish it; what is then
still there is cut off, and what it had begun is undone by the thread that did it.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hvmgr import errors
from hvmgr.faces.http import peers
from hvmgr.faces.http.connection import Connection, Limits
from hvmgr.faces.http.failure import Gone
from hvmgr.faces.http.watchdog import Watchdog

_BACKLOG = 128
_FULL = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen; with a certificate only over TLS. Port 0: any that is free."""

    host: str = "127.0.0.1"
    port: int = 8006
    certificate: Path | None = None
    key: Path | None = None


Serve = Callable[[Connection], None]


class Server:
    """Connections, each served by ``serve`` in a thread of its own."""

    def __init__(
        self, address: Address, serve: Serve, *, limits: Limits, most_connections: int, most_of_one: int | None = None
    ) -> None:
        self._serve = serve
        self._limits = limits
        self._most = most_connections
        self._most_of_one = most_of_one or max(1, most_connections * 3 // 4)
        self._address = address
        self._tls = None if address.certificate is None else _tls(address.certificate, address.key)
        self._sockets = _listen(address)
        self._wake, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self._lock = threading.Lock()
        self._threads: dict[threading.Thread, Connection | None] = {}
        self._busy: set[Connection] = set()
        self._origins: Counter[str] = Counter()
        self._watchdog = Watchdog()
        self._stops = 0  # plain values, for signal handlers: a lock might be held by what they interrupt
        self._wants_reload = False

    @property
    def ports(self) -> list[tuple[str, int]]:
        """Where it listens: addresses and ports."""
        return [one.getsockname()[:2] for one in self._sockets]

    def run(self, *, grace_s: float, on_stop: Callable[[], None], on_reload: Callable[[], None]) -> None:
        """Serves until ``stop``, then calls ``on_stop``; returns when every connection has ended."""
        with selectors.DefaultSelector() as selector:
            for one in (*self._sockets, self._wake):
                selector.register(one, selectors.EVENT_READ)
            while not self._stops:
                for key, _ in selector.select():
                    if key.fileobj is not self._wake:
                        self._accept(key.fileobj)  # type: ignore[arg-type]
                        continue
                    self._wake.recv(4096)
                    if self._wants_reload:
                        self._wants_reload = False
                        on_reload()
        for one in self._sockets:
            one.close()
        on_stop()
        self._end(grace_s)

    def stop(self) -> None:
        """Tells ``run`` to end; may be called from a signal and more than once: the second time nobody has time any more."""
        self._stops += 1
        self._awake()

    def wish_reload(self) -> None:
        """Tells ``run`` to call ``on_reload``; may be called from a signal."""
        self._wants_reload = True
        self._awake()

    def reload(self) -> None:
        """New connections get the certificate that is in the files now; a broken one changes nothing."""
        if self._address.certificate is not None:  # whole or not: OpenSSL takes a certificate and then refuses its key
            self._tls = _tls(self._address.certificate, self._address.key)

    def _awake(self) -> None:
        with contextlib.suppress(OSError):
            self._waker.send(b"x")

    @contextlib.contextmanager
    def working(self, connection: Connection) -> Iterator[None]:
        """A transfer, which a stop gives time to finish."""
        with self._lock:
            self._busy.add(connection)
        try:
            yield
        finally:
            with self._lock:
                self._busy.discard(connection)

    # -- connections ---------------------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, address = listener.accept()
        except OSError:
            time.sleep(0.05)  # out of descriptors: those who are there go on
            return
        peer = str(address[0])
        origin = peers.origin(peer)
        with self._lock:
            has_room = len(self._threads) < self._most and self._origins[origin] < self._most_of_one
            if has_room:
                self._origins[origin] += 1
                thread = threading.Thread(target=self._thread, args=(sock, peer), name=f"connection {peer}")
                self._threads[thread] = None
        if not has_room:
            self._turn_away(sock)
            return
        try:
            thread.start()
        except RuntimeError:  # no more threads
            self._forget(thread, peer)
            self._turn_away(sock)

    def _turn_away(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            sock.setblocking(False)
            if self._tls is None:
                sock.send(_FULL)
        sock.close()

    def _thread(self, sock: socket.socket, peer: str) -> None:
        thread = threading.current_thread()
        try:
            with contextlib.suppress(OSError, Gone):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._talk(thread, sock, peer)
        finally:
            self._forget(thread, peer)

    def _talk(self, thread: threading.Thread, sock: socket.socket, peer: str) -> None:
        if self._tls is not None:
            sock = self._tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        with Connection(sock, peer, self._watchdog, self._limits) as connection:
            with self._lock:
                self._threads[thread] = connection
            if isinstance(sock, ssl.SSLSocket):
                connection.limit.set(self._limits.head_s)
                sock.do_handshake()
            self._serve(connection)

    def _forget(self, thread: threading.Thread, peer: str) -> None:
        with self._lock:
            self._threads.pop(thread, None)
            origin = peers.origin(peer)
            self._origins[origin] -= 1
            if not self._origins[origin]:
                del self._origins[origin]

    # -- the end -------------------------------------------------------------------------------------------------

    def _end(self, grace_s: float) -> None:
        until = time.monotonic() + grace_s
        while self._threads:
            is_over = time.monotonic() >= until or self._stops > 1
            with self._lock:
                for connection in self._threads.values():
                    if connection is not None and (is_over or connection not in self._busy):
                        connection.limit.shut()
            time.sleep(0.05)
        self._watchdog.close()
        self._wake.close()
        self._waker.close()


def _listen(address: Address) -> list[socket.socket]:
    """One socket for each address that the name has."""
    found: list[socket.socket] = []
    try:
        infos = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
        )
        for family, _, _, _, place in dict.fromkeys(infos):
            one = socket.socket(family, socket.SOCK_STREAM)
            found.append(one)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.bind(place)
            one.listen(_BACKLOG)
            one.setblocking(False)
    except OSError as error:
        for one in found:
            one.close()
        raise errors.HostFailed(
            f"cannot listen on {address.host} port {address.port}: {error.strerror or error}",
            hint="choose another place with --listen and --port",
        ) from error
    return found


def _tls(certificate: Path, key: Path | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) else error
        raise errors.UsageError(
            f"{certificate} and its key cannot be used: {why}",
            hint="--tls-cert takes the certificate with those that signed it, --tls-key its key, both as PEM and without a password",
        ) from error
    return context


def _no_password() -> str:
    raise ValueError("the key has a password")
