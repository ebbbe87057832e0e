"""``hvmgr serve`` and ``hvmgr user`` as commands; a server that is killed in the middle of imports; the page's own examples."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import termios
import textwrap
import threading
import time
from pathlib import Path

import pytest

from hvmgr.faces.cli import serve
from hvmgr.model.user import Role
from hvmgr.storage import users
from tests.faces.http.conftest import MIB, PATIENCE_S, Running, pattern
from tests.faces.http.test_transfers import put_head

ROOT = Path(__file__).resolve().parents[3]
HVMGR = [sys.executable, "-m", "hvmgr"]


class Process(Running):
    """A server in a process of its own, by its command."""

    def __init__(self, folder, *words):
        self.users, self.sessions = folder / "users.json", []
        self.folder = folder
        with (folder / "log").open("ab") as log:
            command = [*HVMGR, "serve", "--port", "0", "--users", self.users, *words]
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True)
        self.url = self.process.stdout.readline().strip()
        assert self.url, (folder / "log").read_text()
        self.address = ("127.0.0.1", int(self.url.rpartition(":")[2]))

    def stop(self, number=signal.SIGTERM):
        for session in self.sessions:
            session("close")()
        self.process.send_signal(number)
        code = self.process.wait(PATIENCE_S)
        self.process.stdout.close()
        return code


@pytest.fixture
def root(place, new_embed_root, monkeypatch):
    """A root with a libvirt that nobody else uses."""
    monkeypatch.setenv("HVMGR_ROOT", str(place / "root"))
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", f"qemu:///embed?root={new_embed_root()}")
    monkeypatch.setenv("HVMGR_USERS", str(place / "users.json"))
    return place / "root"


@pytest.fixture
def hvmgr(capsys, monkeypatch):
    """A command in this process, with the lines of its standard input and the code that it has to end with."""
    from hvmgr.faces import cli

    def call(*words, input="", code=0):
        monkeypatch.setattr("sys.stdin", io.StringIO(input))
        capsys.readouterr()
        ended = cli.run([*map(str, words)])
        heard = capsys.readouterr()
        assert ended == code, heard.err
        return heard

    return call


def files_of(root):
    """What is on the disk, but locks."""
    return {path.relative_to(root) for path in root.rglob("*") if path.is_file() and "lock" not in path.name}


def test_server_killed_in_the_middle_of_imports_loses_nothing_and_leaves_nothing(root, place):
    made = [*HVMGR, "vm", "create", "web", "--memory", "64M", "--disk", "4M", "--network", "none", "--accel", "tcg"]
    subprocess.run(made, cwd=ROOT, check=True, capture_output=True, timeout=PATIENCE_S)
    server = Process(place)
    server.add_user("anna")
    session = server.login()
    free = session.xenapi.VDI.create({"name_label": "free", "virtual_size": 4 * MIB})
    vdis = [free, *session.xenapi.VDI.get_by_name_label("web vda")]
    old = pattern(4 * MIB)
    for vdi in vdis:
        assert server.put(old, session_id=session.handle, vdi=vdi).code == 0
    before = files_of(root)
    with contextlib.ExitStack() as stack:
        for vdi, sent in zip(vdis, (MIB, 4 * MIB - 512), strict=True):
            one = stack.enter_context(server.connected())
            one.sendall(put_head(server, session, 4 * MIB, vdi=vdi) + bytes(sent))
            assert one.recv(4096).startswith(b"HTTP/1.1 200 ")
        time.sleep(0.3)  # in the middle, wherever that is
        assert server.stop(signal.SIGKILL) == -signal.SIGKILL
    server = Process(place)
    try:
        session = server.login()
        for vdi in vdis:
            assert server.curl(server.export_link(session_id=session.handle, vdi=vdi)).body == old
            assert server.put(bytes(4 * MIB), session_id=session.handle, vdi=vdi).code == 0
        assert len(files_of(root)) == len(before)
    finally:
        assert server.stop() == 0
    log = [json.loads(line) for line in (place / "log").read_text().splitlines() if line.startswith("{")]
    assert [line["what"] for line in log if line["what"] in {"start", "stop", "defect"}] == ["start", "start", "stop"]


class TestUserCommand:
    def test_life_of_a_user(self, root, place, hvmgr):
        file = place / "users.json"
        told = hvmgr("user", "add", "anna", "--role", "admin", "--json", input="correct horse\n")
        assert json.loads(told.out)["user"] == {"name": "anna", "role": "admin"}
        assert file.stat().st_mode & 0o777 == 0o600
        assert b"correct" not in file.read_bytes()
        assert "--replace" in hvmgr("user", "add", "anna", input="another one\n", code=4).err
        hvmgr("user", "add", "anna", "--replace", input="another one\n")
        assert users.read(file)["anna"].role is Role.READ
        assert hvmgr("user", "list").out.split() == ["anna", "read"]
        hvmgr("user", "remove", "anna")
        hvmgr("user", "remove", "anna", code=3)
        assert json.loads(hvmgr("user", "list", "--json").out)["users"] == []

    @pytest.mark.parametrize(
        ("name", "password"), [("a", "short\n"), ("../x", "correct horse\n"), ("a", ""), ("a", "x" * 2000)]
    )
    def test_bad_input(self, root, place, hvmgr, name, password):
        hvmgr("user", "add", name, input=password, code=2)
        assert users.read(place / "users.json") == {}

    def test_password_is_asked_for_twice_on_a_terminal(self, root, place):
        pid, terminal = pty.fork()
        if pid == 0:
            os.chdir(ROOT)
            os.execv(sys.executable, [*HVMGR, "user", "add", "rita"])
        for question in (b"Password of rita:", b"Once more:"):
            heard = b""
            while question not in heard:
                heard += os.read(terminal, 1000)
            while termios.tcgetattr(terminal)[3] & termios.ECHO:
                time.sleep(0.02)
            os.write(terminal, b"correct horse\n")
        with contextlib.suppress(OSError):
            while more := os.read(terminal, 1000):
                heard += more
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        os.close(terminal)
        assert b"correct horse" not in heard
        assert list(users.read(place / "users.json")) == ["rita"]

    def test_file_that_others_can_read_or_that_is_damaged(self, root, place, hvmgr):
        file = place / "users.json"
        hvmgr("user", "add", "anna", input="correct horse\n")
        file.chmod(0o644)
        assert "chmod 600" in hvmgr("user", "list", code=2).err
        file.chmod(0o600)
        file.write_text("{}")
        hvmgr("serve", "--port", "0", code=6)


class TestServeCommand:
    @pytest.mark.parametrize(
        ("words", "code", "told"),
        [
            (["--listen", "0.0.0.0"], 2, "--tls-cert"),
            (["--listen", "::"], 2, "in the clear"),
            (["--listen", "example.org"], 2, "in the clear"),
            (["--tls-key", "/nowhere"], 2, "--tls-cert"),
            (["--tls-cert", "/nowhere"], 2, "PEM"),
            (["--listen", "192.0.2.1", "--insecure"], 8, "--listen"),
            (["--port", "99999"], 2, "99999"),
            (["--dry-run"], 2, "dry run"),
            (["--audit", "/nowhere/log"], 8, "--audit"),
        ],
    )  # fmt: skip
    def test_refuses(self, root, hvmgr, words, code, told):
        assert told in hvmgr("serve", "--port", "0", *words, code=code).err

    def test_tells_its_manager_and_ends_at_a_signal(self, root, place, monkeypatch):
        import socket

        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(str(place / "notify"))
            manager.settimeout(PATIENCE_S)
            monkeypatch.setenv("NOTIFY_SOCKET", str(place / "notify"))
            server = Process(place, "--audit", place / "audit")
            assert manager.recv(100) == b"READY=1"
        server.process.send_signal(signal.SIGHUP)
        until = time.monotonic() + PATIENCE_S
        while "reload" not in (place / "audit").read_text():
            assert time.monotonic() < until
            time.sleep(0.02)
        assert server.stop(signal.SIGINT) == 0
        assert (place / "audit").stat().st_mode & 0o777 == 0o600
        assert "no user yet" in (place / "log").read_text()


def test_signals_wait_for_no_lock(server, monkeypatch):
    """What a handler interrupts may hold the log's: the loop of the server does the work."""

    class Held:
        def __enter__(self):
            assert threading.current_thread() is not threading.main_thread()

        def __exit__(self, *_):
            pass

    numbers = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    monkeypatch.setattr(server.service.audit, "_lock", Held())
    serve._obey_signals(server.server)
    try:
        for count in (1, 2):
            signal.raise_signal(signal.SIGHUP)
            until = time.monotonic() + PATIENCE_S
            while len(server.told("reload")) < count:
                assert time.monotonic() < until
                time.sleep(0.02)
        signal.raise_signal(signal.SIGTERM)
        server.thread.join(PATIENCE_S)
        assert not server.thread.is_alive()
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


PAGE = (ROOT / "docs" / "http.md").read_text("utf-8")


def test_examples_of_the_page_work_as_they_stand(root, place):
    """Every line of the page's sections of sh and python, in its order, against a server of its own."""
    server = Process(place)
    server.add_user("backup", password="a long password")
    try:
        with_port = PAGE.replace("127.0.0.1:8006", f"127.0.0.1:{server.address[1]}")
        script = "\n".join(re.findall(r"```sh run\n(.*?)```", with_port, re.DOTALL))
        assert "export_raw_vdi" in script
        assert "import XenAPI" in script
        words = textwrap.dedent(script).replace("python3 -", f"{shlex.quote(sys.executable)} -")
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", words], cwd=place, capture_output=True, text=True, check=False, timeout=250,
            env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        )  # fmt: skip
        assert done.returncode == 0, (done.stdout, done.stderr)
        assert "identical" in done.stdout
    finally:
        server.stop()


def test_unit_runs_what_there_is():
    text = (ROOT / "share" / "systemd" / "hvmgr.service").read_text("utf-8")
    line = re.search(r"^ExecStart=\S*hvmgr (.*)$", text, re.MULTILINE)[1]
    from hvmgr.faces.cli.serve import command

    assert line.startswith("serve")
    known = {option for param in command.params for option in param.opts}
    assert {word for word in shlex.split(line) if word.startswith("--")} <= known
