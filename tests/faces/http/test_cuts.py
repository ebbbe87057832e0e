"""Connections that end in the middle, in both directions: the disk is as before or as after, and nothing is left behind.

With HVMGR_CUTS=all at every 64 KiB of larger disks, else at a few places.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from pathlib import Path

import pytest

from hvmgr import settings
from tests.faces.http.conftest import MIB, PATIENCE_S, parse_answer, pattern, raw_of, settled
from tests.faces.http.test_transfers import PIB, put_head, vdi_of

EVERY = os.environ.get("HVMGR_CUTS") == "all"
SIZE = 4 * MIB if EVERY else MIB
STEP = 64 << 10
RESET = struct.pack("ii", 1, 0)

pytestmark = pytest.mark.timeout(3000 if EVERY else 300)


def cuts(length, count):
    """Where a stream is cut: also within its first and its last bytes."""
    places = list(range(0, length, STEP))
    if not EVERY:
        places = [places[len(places) * number // count] for number in range(1, count)]
    return [100, *places, length - 1] if EVERY else [*places, length - 1]


class Ends:
    """How a client goes: it says that it has sent all, or is gone without a word."""

    def __init__(self):
        self._number = 0

    def __call__(self, one):
        self._number += 1
        if self._number % 2:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        one.close()


@pytest.fixture
def streams(server, bench):
    """A disk's streams and what it holds: whole in each format, and a delta; a VM and a free disk that hold what the delta is on."""
    session = server.login()
    vdi = session.xenapi.VDI
    source = vdi.create({"name_label": "source", "virtual_size": SIZE})
    old, new = pattern(SIZE), bytearray(pattern(SIZE, 2))
    new[: SIZE // 2] = old[: SIZE // 2]

    def export(**words):
        return server.curl(server.export_link(session_id=session.handle, **words)).body

    assert server.put(old, session_id=session.handle, vdi=source).code == 0
    base = vdi.snapshot(source)
    assert server.put(bytes(new), session_id=session.handle, vdi=source).code == 0
    point = vdi.snapshot(source)
    made = {fmt: export(vdi=point, format=fmt) for fmt in ("raw", "vhd", "qcow2")}
    made["delta"] = export(vdi=point, base=base, format="vhd")
    vm = bench.make(SIZE // MIB)
    targets = {"slot": vdi_of(session, vm, "hda"), "free": vdi.create({"name_label": "free", "virtual_size": SIZE})}
    full = export(vdi=base, format="vhd")
    for ref in targets.values():
        assert server.put(full, session_id=session.handle, vdi=ref, format="vhd").code == 0
    return session, made, targets, vm, old, bytes(new)


def files_of(bench):
    """All files of all homes and free disks, but locks, with what they hold."""
    root = bench.place / "root"
    paths = [path for path in root.rglob("*") if path.is_file() and "lock" not in path.name]
    return {path.relative_to(root): path.read_bytes() for path in paths}


def test_upload_that_is_cut_off(server, bench, streams):
    session, made, targets, vm, old, new = streams
    before = files_of(bench)
    for kind, data in made.items():
        cut_uploads(server, session, targets, kind, data)
    assert files_of(bench) == before
    bench.check(vm)
    assert raw_of(vm) == old
    for ref in targets.values():  # begun anew, it goes through
        assert server.put(made["delta"], session_id=session.handle, vdi=ref, format="vhd").code == 0
        assert server.curl(server.export_link(session_id=session.handle, vdi=ref)).body == new
    bench.check(vm)


def cut_uploads(server, session, targets, kind, data):
    """Each of them fails, and says so."""
    fmt, end = "vhd" if kind == "delta" else kind, Ends()
    for number, cut in enumerate(cuts(len(data), 3)):
        for place in targets if EVERY else [sorted(targets)[number % 2]]:
            # Of an unknown length a qcow2 image has to be whole to its last cluster, not to its last byte.
            length = (len(data), None, PIB)[number % 3] if fmt != "qcow2" else len(data)
            task = session.xenapi.task.create("import", "")
            head = put_head(server, session, length, vdi=targets[place], task_id=task, format=fmt)
            with server.connected() as one:
                with contextlib.suppress(ConnectionError):
                    one.sendall(head + data[:cut])
                    assert one.recv(4096).startswith(b"HTTP/1.1 200 ")
                end(one)
            record = settled(session, task)
            assert (record["status"], record["error_info"][0]) == ("failure", "IMPORT_ERROR_PREMATURE_EOF"), (
                cut,
                record,
            )


def test_download_that_is_cut_off(server, bench, streams):
    session, made, targets, vm, old, _ = streams
    before, connections, open_files = files_of(bench), len(server.server._threads), count_files()
    for fmt in ("raw", "vhd"):
        cut_downloads(server, session, targets, fmt, len(made[fmt]), old if fmt == "raw" else None)
    server.await_rest()
    assert files_of(bench) == before
    assert list((settings.index_folder() / "transfers").iterdir()) == []
    until = time.monotonic() + PATIENCE_S
    while len(server.server._threads) > connections:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert count_files() <= open_files
    vm.create_snapshot("free")  # nobody holds its images
    session.xenapi.VDI.destroy(targets["free"])
    bench.check(vm)


def count_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def cut_downloads(server, session, targets, fmt, length, whole):
    """Each of them ends; of a disk whose bytes are ``whole`` the rest can be had."""
    end = Ends()
    for number, cut in enumerate(cuts(length, 3)):
        for place in targets if EVERY else [sorted(targets)[number % 2]]:
            task = session.xenapi.task.create("export", "")
            link = server.export_link(session_id=session.handle, vdi=targets[place], task_id=task, format=fmt)
            with socket.socket() as one:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                one.settimeout(120)
                one.connect(server.address)
                one.sendall(f"GET {link.removeprefix(server.url)} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
                got = bytearray()
                while (head := got.find(b"\r\n\r\n")) < 0 or len(got) < head + 4 + cut:
                    piece = one.recv(1000 if head < 0 else min(65536, head + 4 + cut - len(got)))
                    assert piece, "the answer is short"
                    got += piece
                end(one)
            record = settled(session, task)  # the kernel may have taken all of it already
            assert record["status"] == "success" or record["error_info"][0] == "CLIENT_ERROR", (cut, record)
            if whole is not None:  # what is missing can be asked for
                have = parse_answer(bytes(got)).body
                rest = server.curl("-r", f"{len(have)}-", link.replace(f"&task_id={task.replace(':', '%3A')}", ""))
                if len(have) < len(whole):
                    assert (rest.status, have + rest.body) == (206, whole)
