"""Our NBD server, asked by QEMU, by nbdinfo where it is there, and by hand for what clients do not do."""

from __future__ import annotations

import contextlib
import errno
import json
import socket
import struct
import subprocess
import threading

import pytest

from hvmgr.host.nbd_server import Server

MIB = 1 << 20
PIECE = 64 << 10


class Memory:
    """A disk in memory; pieces that hold zeros alone are holes."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)
        self.flushed = 0
        self.broken = range(0)

    @property
    def size(self) -> int:
        return len(self.data)

    def stretches(self, offset=0, length=None):
        end = self.size if length is None else offset + length
        while offset < end:
            count = min(PIECE - offset % PIECE, end - offset)
            start = offset - offset % PIECE
            yield offset, count, any(self.data[start : start + PIECE])
            offset += count

    def read_into(self, offset, buffer):
        if offset in self.broken:
            raise OSError(errno.EIO, "broken \udcff")  # as the name of a file may be
        buffer[:] = self.data[offset : offset + len(buffer)]

    def write(self, offset, data):
        self.data[offset : offset + len(data)] = data

    def write_zeros(self, offset, length):
        self.data[offset : offset + length] = bytes(length)

    def flush(self):
        self.flushed += 1


@pytest.fixture
def disk():
    made = Memory(4 * MIB)
    made.data[MIB : MIB + 200_000] = bytes(range(1, 251)) * 800
    made.data[-512:] = b"e" * 512
    return made


@pytest.fixture
def serve(disk, tmp_path):
    """Starts a server on the disk; its URI."""
    listeners = []

    def start(*, writable=False):
        path = tmp_path / f"nbd{len(listeners)}"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()
        listeners.append(listener)
        threading.Thread(target=Server(disk, writable=writable).accept, args=(listener,), daemon=True).start()
        return f"nbd+unix:///?socket={path}"

    yield start
    for listener in listeners:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


@pytest.fixture
def connect():
    """Opens sockets that are closed at the end."""
    with contextlib.ExitStack() as stack:

        def open_one(uri):
            one = stack.enter_context(socket.socket(socket.AF_UNIX))
            one.settimeout(60)
            one.connect(uri.partition("socket=")[2])
            return one

        yield open_one


def tell(*words):
    done = subprocess.run(list(map(str, words)), check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr or done.stdout
    return done.stdout


def test_qemu_reads_every_byte(disk, serve, tmp_path):
    tell("qemu-img", "convert", "-f", "raw", "-O", "raw", "-m", "8", "-W", serve(), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == disk.data


def test_holes_are_told(disk, serve):
    said = json.loads(tell("qemu-img", "map", "--output=json", "-f", "raw", serve()))
    assert [(one["start"], one["length"], one["data"]) for one in said] == [
        (0, MIB, False),
        (MIB, 4 * PIECE, True),
        (MIB + 4 * PIECE, 3 * MIB - 5 * PIECE, False),
        (4 * MIB - PIECE, PIECE, True),
    ]


def test_qemu_writes_zeroes_and_flushes(disk, serve):
    uri = serve(writable=True)
    acts = ["write -P 7 2M 300k", "write -z 1M 100k", "write -f -P 9 3M 512", "discard 2M 64k", "flush"]
    tell("qemu-io", "-f", "raw", *(word for act in acts for word in ("-c", act)), uri)
    assert disk.data[2 * MIB : 2 * MIB + 300 * 1024] == b"\7" * 300 * 1024
    assert not any(disk.data[MIB : MIB + 100 * 1024])
    assert any(disk.data[MIB + 100 * 1024 : MIB + 200_000])
    assert disk.data[3 * MIB : 3 * MIB + 512] == b"\t" * 512
    assert disk.flushed >= 2


def test_read_only_export_refuses_writes(disk, serve):
    before = bytes(disk.data)
    with pytest.raises(AssertionError):
        tell("qemu-io", "-f", "raw", "-c", "write 0 512", serve())
    assert disk.data == before


def test_nbdinfo_understands_it(serve, require_program):
    require_program("nbdinfo")
    (export,) = json.loads(tell("nbdinfo", "--json", serve(writable=True)))["exports"]
    assert export["export-size"] == 4 * MIB
    assert export["contexts"] == ["base:allocation"]
    assert (export["is_read_only"], export["can_flush"], export["can_zero"]) == (False, True, True)


# --- by hand --------------------------------------------------------------------------------------------------------


class Client:
    """A client that says what it is told to."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        assert self.read(18) == b"NBDMAGICIHAVEOPT\0\3"
        self.socket.sendall(struct.pack(">I", 3))
        self.send_option(1)
        self.size, self.flags = struct.unpack(">QH", self.read(10))

    def read(self, length: int) -> bytes:
        found = b""
        while len(found) < length:
            more = self.socket.recv(length - len(found))
            if not more:
                raise EOFError
            found += more
        return found

    def send_option(self, option: int, data: bytes = b"") -> None:
        self.socket.sendall(b"IHAVEOPT" + struct.pack(">II", option, len(data)) + data)

    def request(self, command: int, offset: int, length: int, *, cookie: int = 0, data: bytes = b"") -> None:
        self.socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, command, cookie, offset, length) + data)

    def answer(self) -> tuple[int, int]:
        magic, error, cookie = struct.unpack(">IIQ", self.read(16))
        assert magic == 0x67446698
        return cookie, error


def test_many_requests_in_flight_are_all_answered(disk, serve, connect):
    client = Client(connect(serve()))
    for number in range(50):
        client.request(0, number * PIECE, PIECE, cookie=number)
    seen = set()
    for _ in range(50):
        cookie, error = client.answer()
        assert (error, client.read(PIECE)) == (0, disk.data[cookie * PIECE : (cookie + 1) * PIECE])
        seen.add(cookie)
    assert seen == set(range(50))


@pytest.mark.parametrize(
    ("command", "offset", "length", "error"),
    [
        (0, 4 * MIB, 512, errno.EINVAL),
        (0, 0, 0, errno.EINVAL),
        (0, 4 * MIB - 512, 1024, errno.EINVAL),
        (6, 4 * MIB, 512, errno.ENOSPC),
        (7, 0, 512, errno.EINVAL),
        (99, 0, 512, errno.EINVAL),
        (0, MIB, 512, errno.EIO),
    ],
)
def test_wrong_request_fails_alone(disk, serve, connect, command, offset, length, error):
    disk.broken = range(MIB, MIB + 1)
    client = Client(connect(serve(writable=True)))
    client.request(command, offset, length, cookie=5)
    assert client.answer() == (5, error)
    client.request(0, 2 * MIB, 512, cookie=6)
    assert client.answer() == (6, 0)
    assert client.read(512) == bytes(512)


def test_broken_place_is_an_error_for_qemu_and_no_wait(disk, serve):
    disk.broken = range(MIB, MIB + 1)
    words = ["qemu-io", "-r", "-f", "raw", "-c", f"read {MIB} 512", "-c", f"read {2 * MIB} 512", serve()]
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=60)
    assert "read failed: Input/output error" in done.stdout + done.stderr
    assert f"read 512/512 bytes at offset {2 * MIB}" in done.stdout


def test_unknown_option_is_refused_and_goes_on(serve, connect):
    client = connect(serve())
    client.recv(18)
    client.sendall(struct.pack(">I", 1) + b"IHAVEOPT" + struct.pack(">II", 77, 3) + b"abc")
    assert struct.unpack(">QIII", client.recv(20))[2] == 0x80000001
    client.sendall(b"IHAVEOPT" + struct.pack(">II", 2, 0))
    assert struct.unpack(">QIII", client.recv(20))[2] == 1


@pytest.mark.parametrize("junk", [b"IHAVEOPX" + bytes(8), b"IHAVEOPT" + struct.pack(">II", 6, 1 << 30)])
def test_client_that_breaks_the_protocol_is_sent_away(serve, connect, junk):
    client = connect(serve())
    client.recv(18)
    client.sendall(struct.pack(">I", 3) + junk)
    assert client.recv(1) == b""
