"""A server in this process, on the embedded driver, and clients that know nothing of it: XenAPI from PyPI, curl, bare sockets."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import socket
import subprocess
import threading
import time
import urllib.parse

import pytest
import XenAPI

from hvmgr.faces.cli import serve
from hvmgr.faces.http.app import App
from hvmgr.faces.http.audit import Audit
from hvmgr.faces.http.connection import Limits
from hvmgr.faces.http.server import Address, Server
from hvmgr.faces.http.service import Service, Settings
from hvmgr.model import user as user_model
from hvmgr.model.user import Role, User
from hvmgr.storage import users
from tests.operations.rules.conftest import MIB, Bench, place, run  # noqa: F401 - a fixture

PASSWORD = "correct horse"
PATIENCE_S = 120.0
FINISHED = {"success", "failure", "cancelled"}


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a client got: the status, the headers (names lower case), the body, and how the client ended."""

    status: int
    headers: dict
    body: bytes
    code: int = 0

    @property
    def text(self):
        return self.body.decode()


class Running:
    """A server that runs, and its clients."""

    def __init__(self, uri, root, folder, *, limits=None, connections=100, failures=None, tls=(None, None), grace=0.0):
        self.log = io.BytesIO()
        self.sessions = []
        self.users = folder / "users.json"
        self.service = Service(Settings(uri, root, self.users, wait_s=PATIENCE_S), Audit(self.log.write))
        if failures is not None:
            self.service.accounts._failures = failures
        app = App(self.service)
        self.server = Server(
            Address("127.0.0.1", 0, *tls), app.serve, limits=limits or Limits(), most_connections=connections
        )
        app.server = self.server
        self.scheme = "http" if tls[0] is None else "https"
        self.address = self.server.ports[0]
        self.url = f"{self.scheme}://127.0.0.1:{self.address[1]}"
        words = {
            "grace_s": grace,
            "on_stop": self.service.stop,
            "on_reload": lambda: serve._reload(self.server, self.service.audit),
        }
        self.thread = threading.Thread(target=self.server.run, kwargs=words)
        self.thread.start()

    def stop(self):
        for session in self.sessions:
            session("close")()
        self.server.stop()
        self.thread.join(PATIENCE_S)
        self.service.close()
        assert not self.thread.is_alive()

    def add_user(self, name, role=Role.ADMIN, password=PASSWORD):
        """A user whose password costs nothing to check."""
        secret = user_model.make_secret(password, b"salt", log_n=4)
        known = {**users.read(self.users), name: User(name, role, secret)}
        users._write(self.users, known)

    def told(self, what=None):
        """The lines of the audit log."""
        lines = [json.loads(line) for line in self.log.getvalue().splitlines()]
        return [line for line in lines if what in {None, line["what"]}]

    def await_rest(self):
        """All transfers have let go of their disks, which is a moment after the last byte."""
        until = time.monotonic() + PATIENCE_S
        while any(record["status"] == "pending" for record in self.service.tasks.records().values()):
            assert time.monotonic() < until
            time.sleep(0.02)

    # -- clients ---------------------------------------------------------------------------------------------------

    def login(self, name="anna", password=PASSWORD):
        """A session of the unmodified client."""
        session = XenAPI.Session(self.url, ignore_ssl=True)
        self.sessions.append(session)
        session.xenapi.login_with_password(name, password, "1.0", "tests")
        return session

    def link(self, path, **parameters):
        """The address of a disk."""
        return f"{self.url}{path}?{urllib.parse.urlencode(parameters)}"

    def export_link(self, **parameters):
        return self.link("/export_raw_vdi/", **parameters)

    def import_link(self, **parameters):  # without a slash at the end: curl would put the name of the file there
        return self.link("/import_raw_vdi", **parameters)

    def curl(self, *words, data=None):
        """What curl gets; its own exit code says whether the answer was whole."""
        done = subprocess.run(
            ["curl", "-q", "-sS", "-k", "-i", "--max-time", "200", *map(str, words)],
            input=data, capture_output=True, check=False, timeout=220,
        )  # fmt: skip
        return parse_answer(done.stdout, done.returncode)

    def put(self, data, *words, **parameters):
        """An upload by curl from a pipe or a file."""
        return self.curl("-T", "-" if isinstance(data, bytes) else data, *words, self.import_link(**parameters),
                         data=data if isinstance(data, bytes) else None)  # fmt: skip

    @contextlib.contextmanager
    def connected(self):
        """A bare connection."""
        with socket.create_connection(self.address, timeout=PATIENCE_S) as one:
            yield one

    def talk(self, *pieces, end=False):
        """What comes back for some bytes, until the server ends the connection; ``end``: nothing follows them."""
        with self.connected() as one:
            with contextlib.suppress(ConnectionError):
                for piece in pieces:
                    one.sendall(piece)
                if end:
                    one.shutdown(socket.SHUT_WR)
            return read_all(one)

    def json(self, method, *parameters):
        """One call by JSON-RPC."""
        body = json.dumps({"jsonrpc": "2.0", "id": 7, "method": method, "params": parameters}).encode()
        found = parse_answer(self.talk(post("/jsonrpc", body, "Connection: close")))
        assert found.headers["content-type"] == "application/json"
        return json.loads(found.body)


def settled(session, task):
    """The record of a task that has ended."""
    until = time.monotonic() + PATIENCE_S
    while (record := session.xenapi.task.get_record(task))["status"] not in FINISHED:
        assert time.monotonic() < until, record
        time.sleep(0.02)
    return record


def parse_answer(data, code=0):
    """The last of several answers (100, 200)."""
    status, headers, rest = 0, {}, data
    while match := re.match(rb"HTTP/1\.[01] (\d\d\d)[^\r]*\r\n((?:[^\r]+\r\n)*)\r\n", rest):
        status = int(match[1])
        lines = match[2].decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines) if name}
        rest = rest[match.end() :]
        if status != 100:
            break
    return Answer(status, headers, rest, code)


def post(path, body, *headers):
    """A request as bytes."""
    lines = [f"POST {path} HTTP/1.1", "Host: h", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def read_all(one):
    """All that comes until the end."""
    data = bytearray()
    with contextlib.suppress(ConnectionError):
        while piece := one.recv(1 << 20):
            data += piece
    return bytes(data)


def pattern(size, seed=1):
    """Bytes of which every sector says where it is."""
    return b"".join(
        os.urandom(16).ljust(504, bytes([seed])) + number.to_bytes(8, "big") for number in range(size // 512)
    )


def raw_of(vm, slot="hda", snapshot=None):
    """All bytes that a guest would see, by QEMU."""
    disks = vm.now().disks if snapshot is None else vm.snapshot(snapshot).disks
    path = disks[slot]
    out = vm.path.parent.parent / "raw"
    run("qemu-img", "convert", "-U", "-f", vm.tree().images[path].format, "-O", "raw", path, out)
    return out.read_bytes()


@pytest.fixture
def bench(connection, place):  # noqa: F811
    """A host without VMs."""
    bench = Bench(place, connection.uri)
    yield bench
    for host in bench.hosts:
        host.close()


@pytest.fixture
def start(bench):
    """``start(…)``: a server with the users anna (admin) and rita (read)."""
    with contextlib.ExitStack() as stack:

        def begin(**wishes):
            running = Running(bench.uri, bench.place / "root", bench.place, **wishes)
            stack.callback(running.stop)
            running.add_user("anna")
            running.add_user("rita", Role.READ)
            return running

        yield begin


@pytest.fixture
def server(start):
    """A server as it is without wishes."""
    return start()


def make_certificate(folder):
    """A certificate that signed itself, and its key, in a folder that is made if need be."""
    folder.mkdir(exist_ok=True)
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-keyout", folder / "key.pem", "-out", folder / "cert.pem"],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    return folder / "cert.pem", folder / "key.pem"
