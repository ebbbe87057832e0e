"""Downloads from the HTTP server beside nginx with a ready file: 1, 4 and 16 at once, by curl; and the server's memory.

What is compared: hvmgr makes the VHD of a disk while it sends it, and sends a raw disk; nginx sends finished files of the same
bytes. Both take turns. nginx is that of the system, or the package's own binary, unpacked and not installed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import harness
from bench.harness import Result
from hvmgr import Host, settings, units
from hvmgr.model.image_format import ImageFormat
from hvmgr.model.user import Role
from hvmgr.storage import users

_NAME, _PASSWORD = "bench", "nobody else has it"
_START_S = 60.0


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured; the tests take next to nothing."""

    rounds: int = 3
    warm_up: int = 1
    data: int = 512 * units.MIB
    at_once: tuple[int, ...] = (1, 4, 16)


def measure(say: Callable[[str], None], scale: Scale | None = None) -> list[Result]:
    """All results of this suite."""
    scale = scale or Scale()
    with tempfile.TemporaryDirectory(prefix="hvmgr-bench-", dir="/var/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        say("http: a disk, and finished files of it")
        uuid = _disk(folder, scale)
        with _hvmgr(folder) as (ours, pid), _nginx(folder) as theirs:
            words = f"session_id={_login(ours)}&vdi={uuid}"
            links = {
                fmt: (f"{ours}/export_raw_vdi?{words}&format={fmt}", f"{theirs}/disk.{fmt}") for fmt in ("vhd", "raw")
            }
            before = _peak(pid)
            results = [_beside_qemu(folder, links["vhd"][0], scale, say)]
            results += [line for fmt, pair in links.items() for line in _format(fmt, *pair, scale, say)]
            say(
                f"http: the server had {units.format_size(before)} at first and {units.format_size(_peak(pid))} at most"
            )
    return results


def _beside_qemu(folder: Path, link: str, scale: Scale, say: Callable[[str], None]) -> Result:
    """A whole disk as VHD over loopback, beside who writes it into a file."""
    say("http: beside qemu-img")
    (image,) = (folder / "root" / ".disks").glob("*.qcow2")
    to = folder / "converted.vhd"
    argv = ["qemu-img", "convert", "-f", "qcow2", "-O", "vpc", "-o", "force_size=on", str(image), str(to)]
    times = harness.in_turns(
        {"hvmgr": lambda: _download(link, 1), "qemu": lambda: harness.program(argv)},
        rounds=scale.rounds,
        warm_up=scale.warm_up,
    )
    what = f"1 download, vhd, {units.format_size(scale.data)}"
    return Result(what, times["hvmgr"], times["qemu"], "qemu-img convert into a file")


def _format(fmt: str, ours: str, theirs: str, scale: Scale, say: Callable[[str], None]) -> list[Result]:
    results = []
    for count in scale.at_once:
        say(f"http: {count} at once, {fmt}")
        times = harness.in_turns(
            {"hvmgr": lambda: _download(ours, count), "nginx": lambda: _download(theirs, count)},  # noqa: B023 - called here
            rounds=scale.rounds,
            warm_up=scale.warm_up,
        )
        what = f"{count} {'download' if count == 1 else 'downloads at once'}, {fmt}, {units.format_size(scale.data)}"
        results.append(
            Result(what, times["hvmgr"], times["nginx"], "nginx, a finished file", aim=1 / 0.7 if count == 1 else None)
        )
    return results


def _download(link: str, count: int) -> None:
    argv = ["curl", "-q", "-fsS", "-o", "/dev/null", link]
    running = [subprocess.Popen(argv, stdin=subprocess.DEVNULL) for _ in range(count)]
    codes = [one.wait() for one in running]  # all of them, whatever the first one says
    if any(codes):
        raise SystemExit(f"bench: {link} could not be downloaded")


def _login(server: str) -> str:
    """A session, as programs for backups have one: a password takes a tenth of a second of computing on purpose."""
    call = {"id": 1, "method": "session.login_with_password", "params": [_NAME, _PASSWORD]}
    with urllib.request.urlopen(f"{server}/jsonrpc", json.dumps(call).encode()) as answer:
        return str(json.load(answer)["result"])


def _disk(folder: Path, scale: Scale) -> str:
    """A free disk full of data, and what nginx sends of it."""
    raw = folder / "disk.raw"
    with raw.open("wb") as file:
        for _ in range(scale.data // units.MIB):
            file.write(os.urandom(units.MIB))
    with Host.open("qemu:///system", root=folder / "root") as host:
        uuid = host.disks.create(scale.data, name="bench")
        with raw.open("rb") as file:
            host.disks.receive(uuid, file, length=scale.data)
        with host.disks.export(uuid, format=ImageFormat.VHD) as stream, (folder / "disk.vhd").open("wb") as file:
            stream.send(file.fileno())
    return uuid


@contextlib.contextmanager
def _hvmgr(folder: Path) -> Iterator[tuple[str, int]]:
    file = folder / "users.json"
    users.add(file, _NAME, Role.READ, _PASSWORD, replace=True)
    argv = [sys.executable, "-m", "hvmgr", "--root", str(folder / "root"), "serve", "--port", "0", "--users", str(file),
            "--audit", str(folder / "audit")]  # fmt: skip
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield server.stdout.readline().strip(), server.pid
        finally:
            server.terminate()


@contextlib.contextmanager
def _nginx(folder: Path) -> Iterator[str]:
    """nginx as it is delivered: sendfile, and one process, for one machine of two cores has the clients, too."""
    port, state = _free_port(), folder / "nginx"
    state.mkdir()
    configuration = state / "nginx.conf"
    temporary = " ".join(
        f"{kind}_temp_path {state}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    configuration.write_text(
        f"daemon off; worker_processes auto; pid {state}/pid; error_log {state}/errors; user {_user()};\n"
        f"events {{ worker_connections 256; }}\n"
        f"http {{ access_log off; sendfile on; tcp_nopush on; {temporary}\n"
        f"  server {{ listen 127.0.0.1:{port}; root {folder}; }} }}\n"
    )
    argv = [str(_program()), "-c", str(configuration), "-e", str(state / "errors")]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL) as server:
        try:
            _await(f"http://127.0.0.1:{port}/users.json.none", server)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def _user() -> str:
    return "root" if os.geteuid() == 0 else "nobody"


def _await(link: str, server: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + _START_S
    argv = ["curl", "-q", "-s", "-o", "/dev/null", link]
    while subprocess.run(argv, check=False).returncode != 0:
        if server.poll() is not None or time.monotonic() > until:
            raise SystemExit("bench: nginx does not start")
        time.sleep(0.05)


def _program() -> Path:
    """nginx's binary; installing the package would start a server of the machine's own."""
    if found := shutil.which("nginx", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin"):
        return Path(found)
    kept = settings.cache_folder() / "nginx"
    program = kept / "usr" / "sbin" / "nginx"
    if not program.exists():
        kept.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="hvmgr-bench-") as folder:
            fetch = [
                "sh",
                "-ec",
                'cd "$1" && apt-get -q -o APT::Sandbox::User=root download nginx && dpkg-deb -x nginx_*.deb "$2"',
            ]
            harness.program([*fetch, "sh", folder, str(kept)])
    return program


def _free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _peak(pid: int) -> int:
    """The most memory that a process has had, bytes."""
    lines = Path(f"/proc/{pid}/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) * units.KIB for line in lines if line.startswith("VmHWM"))
