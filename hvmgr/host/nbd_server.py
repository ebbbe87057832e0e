"""A disk that Python can read, served by NBD: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md

Fixed newstyle handshake; structured replies with holes; base:allocation. Requests of one connection are answered as they
are done, several at once. What the disk cannot read or write is an error for that request alone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

from hvmgr import errors

MAX_REQUEST = 32 << 20  # bytes in one read or write; what the protocol asks of every server
_WORKERS = 4
_IN_FLIGHT = 16

_INIT_MAGIC, _OPTION_MAGIC, _OPTION_REPLY_MAGIC = b"NBDMAGIC", b"IHAVEOPT", 0x3E889045565A9
_REQUEST_MAGIC, _SIMPLE_MAGIC, _STRUCTURED_MAGIC = 0x25609513, 0x67446698, 0x668E33EF
_OPTION = struct.Struct(">8sII")
_OPTION_REPLY = struct.Struct(">QIII")
_REQUEST = struct.Struct(">IHHQQI")
_SIMPLE = struct.Struct(">IIQ")
_CHUNK = struct.Struct(">IHHQI")

_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
_EXPORT_NAME, _ABORT, _LIST, _INFO, _GO, _STRUCTURED, _LIST_META, _SET_META = 1, 2, 3, 6, 7, 8, 9, 10
_ACK, _SERVER, _INFO_REPLY, _META_REPLY = 1, 2, 3, 4
_ERR_UNSUP, _ERR_INVALID, _ERR_UNKNOWN = 0x80000001, 0x80000003, 0x80000006
_INFO_EXPORT, _INFO_BLOCK_SIZE = 0, 3
_OPTION_MAX = 64 << 10

_HAS_FLAGS, _READ_ONLY, _SEND_FLUSH, _SEND_FUA, _SEND_TRIM, _SEND_ZEROES, _SEND_DF = 1, 2, 4, 8, 32, 64, 128
_READ, _WRITE, _DISCONNECT, _FLUSH, _TRIM, _WRITE_ZEROES, _BLOCK_STATUS = 0, 1, 2, 3, 4, 6, 7
_FUA, _DF, _REQ_ONE = 1, 4, 8
_DONE = 1
_NONE, _DATA, _HOLE, _STATUS, _ERROR = 0, 1, 2, 5, 0x8001
_ALLOCATION = b"base:allocation"
_CONTEXT = 1
_IS_HOLE_AND_ZERO = 3
_EXTENTS_MAX = 4096


class Stretch(NamedTuple):
    """A part of a disk; without ``data`` it reads as zeros."""

    offset: int
    length: int
    data: bool


class Disk(Protocol):
    """A disk to read: its size in bytes, where it has data, and the bytes."""

    @property
    def size(self) -> int:
        """Bytes."""

    def stretches(self, offset: int = 0, length: int | None = None) -> Iterator[tuple[int, int, bool]]:
        """(offset, length, data), ascending, together exactly the range."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole buffer."""


class WritableDisk(Disk, Protocol):
    """A disk to write as well."""

    def write(self, offset: int, data: memoryview) -> None:
        """The disk has these bytes from ``offset``."""

    def write_zeros(self, offset: int, length: int) -> None:
        """The range reads as zeros; what does so already takes no space for it."""

    def flush(self) -> None:
        """All that was written is on the storage itself."""


class Readable(Protocol):
    """A disk of which only the bytes are known."""

    @property
    def size(self) -> int:
        """Bytes."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole buffer."""


class Unmapped:
    """A disk of which nobody knows where it has data, as a ``Disk``."""

    def __init__(self, disk: Readable) -> None:
        self.size = disk.size
        self.read_into = disk.read_into

    def stretches(self, offset: int = 0, length: int | None = None) -> Iterator[tuple[int, int, bool]]:
        """All of it may be data."""
        yield offset, self.size - offset if length is None else length, True


class Server:
    """Serves one disk, under every export name, on connections that are given to it."""

    def __init__(self, disk: Disk | WritableDisk, *, writable: bool) -> None:
        self.disk = disk
        self.writable = writable
        self.lock = threading.Lock()  # the disk is used by one thread at a time

    def accept(self, listener: socket.socket) -> None:
        """Serve whoever connects, each in a thread of its own, until the listening socket is closed."""
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    @contextlib.contextmanager
    def listening(self, address: Path) -> Iterator[None]:
        """Serve whoever connects to this Unix socket, as long as the block lasts."""
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.fspath(address))
            listener.listen()
            threading.Thread(target=self.accept, args=(listener,), daemon=True).start()
            try:
                yield
            finally:
                listener.shutdown(socket.SHUT_RDWR)

    def serve(self, connection: socket.socket) -> None:
        """Serve one client to its end; a client that breaks the protocol is sent away."""
        with connection, contextlib.suppress(OSError, EOFError, _Broken):
            client = _Client(connection, self)
            if client.shake_hands():
                client.serve()

    @property
    def flags(self) -> int:
        """What the server can do, as the handshake says it."""
        found = _HAS_FLAGS | _SEND_FLUSH | _SEND_DF
        return found | (_SEND_FUA | _SEND_TRIM | _SEND_ZEROES if self.writable else _READ_ONLY)

    # -- the disk ------------------------------------------------------------------------------------------------

    def read(self, offset: int, buffer: memoryview) -> None:
        """Fill a buffer."""
        with self.lock:
            self.disk.read_into(offset, buffer)

    def write(self, offset: int, data: memoryview, *, through: bool) -> None:
        """Write bytes, ``through`` to the storage where that is asked for."""
        disk = self._writable()
        with self.lock:
            disk.write(offset, data)
            if through:
                disk.flush()

    def write_zeroes(self, offset: int, length: int, *, through: bool) -> None:
        """The range reads as zeros, ``through`` to the storage where that is asked for."""
        disk = self._writable()
        with self.lock:
            disk.write_zeros(offset, length)
            if through:
                disk.flush()

    def flush(self) -> None:
        """All that was answered is on the storage."""
        if self.writable:
            with self.lock:
                self._writable().flush()

    def stretches(self, offset: int, length: int, *, most: int) -> list[Stretch]:
        """The range as stretches, each of a kind that its neighbours are not; not all of it when there are too many."""
        found: list[Stretch] = []
        with self.lock:
            for start, count, data in self.disk.stretches(offset, length):
                if found and found[-1].data == data:
                    found[-1] = found[-1]._replace(length=found[-1].length + count)
                elif len(found) == most:
                    break
                else:
                    found.append(Stretch(start, count, data))
        return found

    def _writable(self) -> WritableDisk:
        if not self.writable:
            raise OSError(errno.EPERM, "the export is read-only")
        return self.disk  # type: ignore[return-value]  # who says that it is writable gives such a disk


class _Broken(Exception):
    """The client does not speak the protocol."""


class _Client:
    """One connection."""

    def __init__(self, connection: socket.socket, server: Server) -> None:
        self.connection = connection
        self.server = server
        self.structured = False
        self.has_context = False
        self.sending = threading.Lock()
        self.slots = threading.Semaphore(_IN_FLIGHT)

    # -- handshake -----------------------------------------------------------------------------------------------

    def shake_hands(self) -> bool:
        """Whether transmission begins."""
        self.send(_INIT_MAGIC + _OPTION_MAGIC + struct.pack(">H", _FIXED_NEWSTYLE | _NO_ZEROES))
        (flags,) = struct.unpack(">I", self.receive(4))
        while True:
            magic, option, length = _OPTION.unpack(self.receive(_OPTION.size))
            if magic != _OPTION_MAGIC or length > _OPTION_MAX:
                raise _Broken
            data = self.receive(length)
            if option == _EXPORT_NAME:
                padding = b"" if flags & _NO_ZEROES else bytes(124)
                self.send(struct.pack(">QH", self.server.disk.size, self.server.flags) + padding)
                return True
            if option == _ABORT:
                self.reply_option(option, _ACK)
                return False
            if self.answer_option(option, data):
                return True

    def answer_option(self, option: int, data: bytes) -> bool:
        """Whether that was the last one."""
        if option in (_INFO, _GO):
            wanted = _info_requests(data)
            self.reply_option(
                option, _INFO_REPLY, struct.pack(">HQH", _INFO_EXPORT, self.server.disk.size, self.server.flags)
            )
            if _INFO_BLOCK_SIZE in wanted:
                sizes = struct.pack(">HIII", _INFO_BLOCK_SIZE, 512, 64 << 10, MAX_REQUEST)
                self.reply_option(option, _INFO_REPLY, sizes)
            self.reply_option(option, _ACK)
            return option == _GO
        if option == _STRUCTURED and not data:
            self.structured = True
            self.reply_option(option, _ACK)
        elif option == _LIST and not data:
            self.reply_option(option, _SERVER, struct.pack(">I", 0))
            self.reply_option(option, _ACK)
        elif option in (_LIST_META, _SET_META) and self.structured:
            queries = _queries(data)
            found = _ALLOCATION in queries or (option == _LIST_META and (not queries or b"base:" in queries))
            if found:
                self.reply_option(option, _META_REPLY, struct.pack(">I", _CONTEXT) + _ALLOCATION)
            if option == _SET_META:
                self.has_context = found
            self.reply_option(option, _ACK)
        else:
            self.reply_option(option, _ERR_INVALID if option in (_LIST_META, _SET_META) else _ERR_UNSUP)
        return False

    def reply_option(self, option: int, kind: int, data: bytes = b"") -> None:
        """One answer to an option."""
        self.send(_OPTION_REPLY.pack(_OPTION_REPLY_MAGIC, option, kind, len(data)) + data)

    # -- transmission --------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Answer requests until the client goes."""
        with ThreadPoolExecutor(_WORKERS) as pool:
            while True:
                magic, flags, command, cookie, offset, length = _REQUEST.unpack(self.receive(_REQUEST.size))
                if magic != _REQUEST_MAGIC or (command == _WRITE and length > MAX_REQUEST):
                    raise _Broken
                if command == _DISCONNECT:
                    return
                data = self.receive(length) if command == _WRITE else b""
                self.slots.acquire()
                pool.submit(self.answer, flags, command, cookie, offset, length, data)

    def answer(self, flags: int, command: int, cookie: int, offset: int, length: int, data: bytes) -> None:
        """One request and its answer."""
        try:
            self.check_range(command, offset, length)
            if command == _READ:
                self.answer_read(flags, cookie, offset, length)
            elif command == _BLOCK_STATUS:
                self.answer_status(flags, cookie, offset, length)
            else:
                self.change(flags, command, offset, length, data)
                self.answer_done(cookie)
        except Exception as error:  # noqa: BLE001 - whatever it is, the client waits for an answer
            with contextlib.suppress(OSError):
                self.answer_error(cookie, error)
        finally:
            self.slots.release()

    def check_range(self, command: int, offset: int, length: int) -> None:
        """Requests lie in the disk, and are of a size that an answer can have."""
        if command != _FLUSH and (offset + length > self.server.disk.size or length == 0):
            raise OSError(errno.ENOSPC if command in (_WRITE, _WRITE_ZEROES) and length else errno.EINVAL, "range")
        if command == _READ and length > MAX_REQUEST:
            raise OSError(errno.EINVAL, "too long")

    def change(self, flags: int, command: int, offset: int, length: int, data: bytes) -> None:
        """What needs no answer but that it is done."""
        if command == _WRITE:
            self.server.write(offset, memoryview(data), through=bool(flags & _FUA))
        elif command == _WRITE_ZEROES:
            self.server.write_zeroes(offset, length, through=bool(flags & _FUA))
        elif command == _FLUSH:
            self.server.flush()
        elif command != _TRIM or not self.server.writable:  # a trim is a wish; space comes back by compacting
            raise OSError(errno.EINVAL, "command")

    def answer_read(self, flags: int, cookie: int, offset: int, length: int) -> None:
        """The bytes; holes are told and not sent where the client knows of such."""
        if not self.structured:
            buffer = memoryview(bytearray(length))
            self.server.read(offset, buffer)
            self.send(_SIMPLE.pack(_SIMPLE_MAGIC, 0, cookie), buffer)
            return
        whole = [Stretch(offset, length, True)]
        parts = whole if flags & _DF else self.server.stretches(offset, length, most=_EXTENTS_MAX)
        if sum(part.length for part in parts) != length:
            parts = whole
        for part in parts:
            last = _DONE if part is parts[-1] else 0
            place = struct.pack(">Q", part.offset)
            if part.data:
                buffer = memoryview(bytearray(part.length))
                self.server.read(part.offset, buffer)
                self.send_chunk(last, _DATA, cookie, place, buffer)
            else:
                self.send_chunk(last, _HOLE, cookie, place + struct.pack(">I", part.length))

    def answer_status(self, flags: int, cookie: int, offset: int, length: int) -> None:
        """Where there is data and where are zeros."""
        if not self.has_context:
            raise OSError(errno.EINVAL, "no context")
        parts = self.server.stretches(offset, length, most=1 if flags & _REQ_ONE else _EXTENTS_MAX)
        told = (struct.pack(">II", part.length, 0 if part.data else _IS_HOLE_AND_ZERO) for part in parts)
        self.send_chunk(_DONE, _STATUS, cookie, struct.pack(">I", _CONTEXT) + b"".join(told))

    def answer_done(self, cookie: int) -> None:
        """It is done."""
        if self.structured:
            self.send_chunk(_DONE, _NONE, cookie)
        else:
            self.send(_SIMPLE.pack(_SIMPLE_MAGIC, 0, cookie))

    def answer_error(self, cookie: int, error: Exception) -> None:
        """It is not done, and why."""
        number = _errno(error)
        if self.structured:
            text = str(error).encode(errors="replace")[:4096]  # of a path that is no text too
            self.send_chunk(_DONE, _ERROR, cookie, struct.pack(">IH", number, len(text)) + text)
        else:
            self.send(_SIMPLE.pack(_SIMPLE_MAGIC, number, cookie))

    # -- bytes ---------------------------------------------------------------------------------------------------

    def send_chunk(self, flags: int, kind: int, cookie: int, head: bytes = b"", data: memoryview | None = None) -> None:
        """One chunk of a structured answer."""
        length = len(head) + (0 if data is None else len(data))
        self.send(_CHUNK.pack(_STRUCTURED_MAGIC, flags, kind, cookie, length) + head, data)

    def send(self, head: bytes, data: memoryview | None = None) -> None:
        """Whole messages, one after the other."""
        with self.sending:
            self.connection.sendall(head)
            if data is not None:
                self.connection.sendall(data)

    def receive(self, length: int) -> bytes:
        """Exactly so many bytes; EOFError when the client goes."""
        buffer = bytearray(length)
        view = memoryview(buffer)
        while view:
            count = self.connection.recv_into(view)
            if count == 0:
                raise EOFError
            view = view[count:]
        return bytes(buffer) if length < _OPTION_MAX else buffer  # type: ignore[return-value]  # read only from here


def _info_requests(data: bytes) -> list[int]:
    with _parsing():
        (name,) = struct.unpack_from(">I", data)
        (count,) = struct.unpack_from(">H", data, 4 + name)
        return list(struct.unpack_from(f">{count}H", data, 6 + name))


def _queries(data: bytes) -> list[bytes]:
    with _parsing():
        (name,) = struct.unpack_from(">I", data)
        (count,) = struct.unpack_from(">I", data, 4 + name)
        at, found = 8 + name, []
        for _ in range(min(count, _OPTION_MAX)):
            (length,) = struct.unpack_from(">I", data, at)
            found.append(data[at + 4 : at + 4 + length])
            at += 4 + length
        return found


@contextlib.contextmanager
def _parsing() -> Iterator[None]:
    try:
        yield
    except struct.error as error:
        raise _Broken from error


def _errno(error: Exception) -> int:
    """What NBD calls it: a few of Linux' numbers."""
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, errors.NoSpace):
        number = errno.ENOSPC
    known: Iterable[int | None] = (errno.EPERM, errno.EINVAL, errno.ENOSPC, errno.ENOMEM)
    return number if number is not None and number in known else errno.EIO
