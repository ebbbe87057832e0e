"""Time limits: a connection that does not keep its own is shut, which wakes whoever waits for it in the kernel."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time

_TICK_S = 0.5
# struct tcp_info of linux/tcp.h since Linux 4.1: bytes that the other end has acknowledged, bytes that it has sent.
_MOVED_AT, _MOVED = 120, struct.Struct("=QQ")


def shut(sock: socket.socket, how: int) -> None:
    """The socket below TLS is shut: TLS's own ``shutdown`` would let what is written later through in the clear."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, how)


def _bytes_moved(sock: socket.socket) -> int:
    """What the kernel has counted in both directions."""
    try:
        return sum(_MOVED.unpack_from(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256), _MOVED_AT))
    except (OSError, struct.error):
        return 0


class Limit:
    """The time limit of one connection; only the latest one that was set counts."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()
        self._until: float | None = None
        self._stall_s = 0.0
        self._moved = 0
        self.expired = False
        self.is_shut = False

    def set(self, seconds: float | None) -> None:
        """So many seconds from now; None: as long as it takes."""
        with self._lock:
            self._stall_s = 0.0
            self._until = None if seconds is None else time.monotonic() + seconds

    def set_stall(self, seconds: float) -> None:
        """As long as it takes, but never so many seconds without one byte that moves in either direction."""
        with self._lock:
            self._stall_s = seconds
            self._until = time.monotonic() + seconds

    def expire_if_late(self, now: float) -> None:
        """Past its limit the other end is not listened to any more; after another tick nothing is sent either."""
        with self._lock:
            if self._until is None or now < self._until:
                return
            if self._stall_s and (moved := _bytes_moved(self._sock)) != self._moved:
                self._moved, self._until = moved, now + self._stall_s
                return
            how = socket.SHUT_RDWR if self.expired else socket.SHUT_RD
            self.expired = True
            shut(self._sock, how)

    def deafen(self) -> None:
        """Nothing more is heard of the other end; what waits for it is woken and can still answer."""
        shut(self._sock, socket.SHUT_RD)

    def shut(self) -> None:
        """At once, whatever the limit says."""
        self.is_shut = True
        shut(self._sock, socket.SHUT_RDWR)


class Watchdog:
    """Looks after the limits of all connections, in a thread of its own."""

    def __init__(self) -> None:
        self._limits: set[Limit] = set()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def watch(self, sock: socket.socket) -> Limit:
        """A limit that is looked after from now on."""
        limit = Limit(sock)
        with self._lock:
            self._limits.add(limit)
        return limit

    def forget(self, limit: Limit) -> None:
        """The connection is about to be closed."""
        with self._lock:
            self._limits.discard(limit)

    def close(self) -> None:
        """Nothing is looked after any more."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(_TICK_S):
            now = time.monotonic()
            with self._lock:  # a descriptor is closed only after ``forget``: this never shuts another one's
                for limit in self._limits:
                    limit.expire_if_late(now)
