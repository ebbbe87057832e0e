"""The client of NBD, against a real storage daemon and against a peer that does not keep the rules."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading

import pytest

from hvmgr import errors
from hvmgr.host import nbd_client, storage_daemon

MIB = 1 << 20


@pytest.fixture
def served(tmp_path, require_program):
    """The URI of an empty qcow2 disk of 16 MiB, which may be written."""
    require_program("qemu-storage-daemon")
    with storage_daemon.started() as daemon:
        daemon.create_qcow2(tmp_path / "disk.qcow2", size=16 * MIB, backing=None)
        node = daemon.open(tmp_path / "disk.qcow2", "qcow2", writable=True)
        with daemon.exported(node, writable=True) as uri:
            yield uri


def read(client, offset, length):
    buffer = bytearray(length)
    client.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def test_what_is_written_is_read(served):
    data = bytes(range(256)) * (9 * MIB // 256)
    with nbd_client.connected(served) as client:
        assert client.size == 16 * MIB
        client.write(MIB + 512, memoryview(data))
        assert read(client, MIB, 512) == bytes(512)
        client.write_zeroes(2 * MIB, MIB)
        client.flush()
    with nbd_client.connected(served) as client:
        assert read(client, MIB + 512, MIB - 512) == data[: MIB - 512]
        assert read(client, 2 * MIB, MIB) == bytes(MIB)
        assert read(client, 3 * MIB, 6 * MIB) == data[2 * MIB - 512 :][: 6 * MIB]


def test_what_lies_behind_the_end_is_refused(served):
    with nbd_client.connected(served) as client, pytest.raises(errors.HostFailed):
        client.write(16 * MIB, memoryview(b"x" * 512))
        client.flush()


def test_export_that_is_not_there(served):
    with pytest.raises(errors.HostFailed, match="does not serve"), nbd_client.connected(served.replace("export", "x")):
        pass


def test_nobody_there(tmp_path):
    with pytest.raises(errors.HostFailed, match="reached"), nbd_client.connected(f"nbd+unix:///x?socket={tmp_path}/no"):
        pass


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"SSH-2.0-OpenSSH_9.2\r\n", id="no-nbd"),
        pytest.param(b"NBDMAGIC" + b"IHAVEOPT" + struct.pack(">H", 0), id="old-style"),
        pytest.param(b"NBDMAGIC" + b"IHAVEOPT" + struct.pack(">H", 1) + bytes(20), id="no-reply"),
    ],
)
def test_peer_that_speaks_something_else(tmp_path, said):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()

        def answer():
            peer, _ = listener.accept()
            with peer, contextlib.suppress(OSError):  # we may hang up in the middle of its words
                peer.sendall(said)
                peer.shutdown(socket.SHUT_WR)
                while peer.recv(4096):
                    pass

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            with (
                pytest.raises(errors.HostFailed),
                nbd_client.connected(f"nbd+unix:///disk?socket={tmp_path / 'socket'}"),
            ):
                pass
        finally:
            thread.join(60)
