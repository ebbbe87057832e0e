"""A client of the network block device protocol, for the disks that a storage daemon of ours serves on a private socket.

Source: "The NBD protocol" (NetworkBlockDevice/nbd, doc/proto.md), fixed newstyle negotiation and simple replies. The
server is our own and on this host: whatever it says that is not expected is HostFailed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator
from typing import Self
from urllib.parse import parse_qs, unquote, urlsplit

from hvmgr import errors

# One request may have 32 MiB by the protocol; more than this gains nothing.
PIECE = 4 << 20
_ZEROES_PIECE = 1 << 30
_WINDOW = 8  # requests that are written before the first answer is awaited
_TIMEOUT_S = 300.0

_GREETING = struct.Struct(">8s8sH")
_OPTION = struct.Struct(">8sII")
_OPTION_REPLY = struct.Struct(">QIII")
_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")
_MAGIC, _OPTION_MAGIC, _OPTION_REPLY_MAGIC = b"NBDMAGIC", b"IHAVEOPT", 0x3E889045565A9
_REQUEST_MAGIC, _REPLY_MAGIC = 0x25609513, 0x67446698
_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
_GO, _ACK, _INFO, _INFO_EXPORT, _REPLY_ERROR = 7, 1, 3, 0, 1 << 31
_READ, _WRITE, _DISCONNECT, _FLUSH, _WRITE_ZEROES = 0, 1, 2, 3, 6


class Client:
    """One export. ``size`` is that of the disk in bytes; offsets and lengths are bytes and lie within it."""

    def __init__(self, connection: socket.socket, name: str) -> None:
        self._socket = connection
        self._waiting = 0
        self.size = self._negotiate(name)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole buffer with the bytes of the disk from ``offset``."""
        self.settle()
        for start in range(0, len(buffer), PIECE):
            piece = buffer[start : start + PIECE]
            self._send(_READ, offset + start, len(piece))
            self._take_reply()
            self._receive(piece)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """The bytes stand at ``offset``, for ``flush`` to say that they do: several writes are under way at once."""
        view = memoryview(data)
        for start in range(0, len(view), PIECE):
            piece = view[start : start + PIECE]
            self._begin(_WRITE, offset + start, len(piece))
            self._socket.sendall(piece)

    def write_zeroes(self, offset: int, length: int) -> None:
        """The range reads as zeros, whatever a parent holds there; it takes no space where the format can do that."""
        for start in range(0, length, _ZEROES_PIECE):
            self._begin(_WRITE_ZEROES, offset + start, min(_ZEROES_PIECE, length - start))

    def flush(self) -> None:
        """Everything that was written is with the server's file; raises what went wrong with it."""
        self.settle()
        self._send(_FLUSH, 0, 0)
        self._take_reply()

    def _begin(self, kind: int, offset: int, length: int) -> None:
        while self._waiting >= _WINDOW:
            self._settle_one()
        self._send(kind, offset, length)
        self._waiting += 1

    def settle(self) -> None:
        """Every request was answered; raises what went wrong with one."""
        while self._waiting:
            self._settle_one()

    def _settle_one(self) -> None:
        self._waiting -= 1
        self._take_reply()

    def _send(self, kind: int, offset: int, length: int) -> None:
        self._socket.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, kind, 0, offset, length))

    def _take_reply(self) -> None:
        magic, error, _ = _REPLY.unpack(self._received(_REPLY.size))
        if magic != _REPLY_MAGIC:
            raise errors.HostFailed("the storage daemon answered something that is no reply")
        if error in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error, os.strerror(error))
        if error:
            raise errors.HostFailed(f"the storage daemon could not do it: {os.strerror(error)}")

    def _negotiate(self, name: str) -> int:
        magic, option, flags = _GREETING.unpack(self._received(_GREETING.size))
        if (magic, option) != (_MAGIC, _OPTION_MAGIC) or not flags & _FIXED_NEWSTYLE:
            raise errors.HostFailed("what answers on the storage daemon's socket is no NBD server")
        self._socket.sendall(struct.pack(">I", _FIXED_NEWSTYLE | (flags & _NO_ZEROES)))
        wanted = name.encode()
        body = struct.pack(">I", len(wanted)) + wanted + struct.pack(">H", 0)
        self._socket.sendall(_OPTION.pack(_OPTION_MAGIC, _GO, len(body)) + body)
        size = None
        while True:
            magic, _, kind, length = _OPTION_REPLY.unpack(self._received(_OPTION_REPLY.size))
            data = self._received(length)
            if magic != _OPTION_REPLY_MAGIC or kind & _REPLY_ERROR:
                raise errors.HostFailed(f"the storage daemon does not serve '{name}'")
            if kind == _INFO and struct.unpack_from(">H", data)[0] == _INFO_EXPORT:
                (size,) = struct.unpack_from(">Q", data, 2)
            if kind == _ACK:
                break
        if size is None:
            raise errors.HostFailed(f"the storage daemon does not say how large '{name}' is")
        return int(size)

    def _received(self, length: int) -> bytes:
        data = bytearray(length)
        self._receive(memoryview(data))
        return bytes(data)

    def _receive(self, view: memoryview) -> None:
        while view:
            count = self._socket.recv_into(view)
            if count == 0:
                raise errors.HostFailed("the storage daemon has ended the connection")
            view = view[count:]

    def close(self) -> None:
        """Say good-bye; never raises."""
        with contextlib.suppress(OSError):
            self._send(_DISCONNECT, 0, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def connected(uri: str) -> Iterator[Client]:
    """The export behind ``nbd+unix:///NAME?socket=PATH`` for the length of the block."""
    parts = urlsplit(uri)
    path = parse_qs(parts.query)["socket"][0]
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_TIMEOUT_S)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PIECE)
        try:
            connection.connect(path)
        except OSError as error:
            raise errors.HostFailed(f"the storage daemon cannot be reached: {error.strerror}") from error
        try:
            with Client(connection, unquote(parts.path.removeprefix("/"))) as client:
                yield client
        except (ConnectionError, TimeoutError) as error:
            raise errors.HostFailed(f"the storage daemon has hung up: {error.strerror or error}") from error
