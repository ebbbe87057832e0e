"""A disk that somebody serves by NBD, for few and small reads and writes; bulk data is qemu-img's and the daemon's work."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from hvmgr import errors

_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")
_REQUEST_MAGIC, _REPLY_MAGIC = 0x25609513, 0x67446698
_READ, _WRITE, _DISCONNECT, _FLUSH = 0, 1, 2, 3
_EXPORT_NAME, _FLAGS = 1, 3
_TIMEOUT_S = 300.0


class Disk:
    """The disk; ``size`` in bytes."""

    def __init__(self, connection: socket.socket, export: str) -> None:
        self._connection = connection
        if not self._receive(18).startswith(b"NBDMAGICIHAVEOPT"):
            raise _failed("it does not speak NBD")
        name = export.encode()
        connection.sendall(struct.pack(">I8sII", _FLAGS, b"IHAVEOPT", _EXPORT_NAME, len(name)) + name)
        self.size, _ = struct.unpack(">QH", self._receive(10))

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole buffer."""
        self._request(_READ, offset, len(buffer))
        buffer[:] = self._receive(len(buffer))

    def write(self, offset: int, data: bytes) -> None:
        """The disk has these bytes from ``offset``; lasting after ``flush``."""
        self._request(_WRITE, offset, len(data), data)

    def flush(self) -> None:
        """All that was written is on the storage."""
        self._request(_FLUSH, 0, 0)

    def end(self) -> None:
        """Say good-bye."""
        self._connection.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, _DISCONNECT, 0, 0, 0))

    def _request(self, command: int, offset: int, length: int, data: bytes = b"") -> None:
        self._connection.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, command, 0, offset, length) + data)
        magic, error, _ = _REPLY.unpack(self._receive(_REPLY.size))
        if magic != _REPLY_MAGIC or error:
            raise _failed(f"error {error}")

    def _receive(self, length: int) -> bytes:
        found = bytearray()
        while len(found) < length:
            more = self._connection.recv(length - len(found))
            if not more:
                raise _failed("it went away")
            found += more
        return bytes(found)


@contextlib.contextmanager
def connected(uri: str) -> Iterator[Disk]:
    """The disk behind a URI like nbd+unix:///EXPORT?socket=PATH."""
    parts = urlsplit(uri)
    address = Path(parse_qs(parts.query)["socket"][0])
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_TIMEOUT_S)
        try:
            connection.connect(str(address))
            disk = Disk(connection, parts.path.lstrip("/"))
            yield disk
            disk.end()
        except OSError as error:
            raise _failed(error.strerror or str(error)) from error


def _failed(why: str) -> errors.HostFailed:
    return errors.HostFailed(f"the disk cannot be read or written by NBD: {why}")
