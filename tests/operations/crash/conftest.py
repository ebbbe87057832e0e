"""A libvirtd for the crash tests of one worker, and the programs that run below it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import private_libvirt

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def crash_run(new_embed_root):
    """``crash_run(shape, …)``: runs ``crash.py`` inside a libvirtd of its own; fails with what it found."""
    if os.geteuid() != 0 or shutil.which("libvirtd") is None:
        pytest.skip("needs root and libvirtd")
    with private_libvirt.daemon(new_embed_root()) as daemon, server(daemon.root, before=daemon.enter) as run:
        yield run


@contextlib.contextmanager
def server(root, *, before=(), environment=None):
    """A Server whose programs have their homes in ``root``."""
    folder = root / "homes"
    folder.mkdir(mode=0o711, exist_ok=True)
    variables = {"PYTHONPATH": str(HERE.parents[2]), "HVMGR_CRASH_FOLDER": str(folder), **(environment or {})}
    command = [*before, sys.executable, str(HERE / "server.py")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=os.environ | variables, stdin=pipe, stdout=pipe, bufsize=0) as process:
        try:
            yield Server(process, root / "said")
        finally:
            process.stdin.close()


@dataclass
class Server:
    """Runs programs of this folder: ``run(shape, …)``; fails with what they found."""

    process: subprocess.Popen
    output: Path

    def __call__(self, *arguments, program="crash", timeout_s=280):
        names = ("HVMGR_ROOT", "HVMGR_INDEX", "HVMGR_RUN", "HVMGR_CONFIG")  # each test has its own
        request = {
            "program": program,
            "arguments": [str(one) for one in arguments],
            "environment": {name: os.environ[name] for name in names},
            "output": str(self.output),
        }
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        pid = self._answer(timeout_s)
        try:
            code = self._answer(timeout_s)
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)
            self._answer(timeout_s)
            code = f"no end within {timeout_s} s"
        said = self.output.read_text(errors="replace")
        print(said[-25000:])
        assert code == 0, f"{code}: {said[:6000]}\n...\n{said[-4000:]}"
        return said

    def _answer(self, timeout_s):
        ready, _, _ = select.select([self.process.stdout], [], [], timeout_s)
        if not ready:
            raise TimeoutError
        line = self.process.stdout.readline()
        assert line, "the server ended"
        return int(line)


@pytest.fixture(scope="session")
def every():
    """``every(stride)``: which acts are killed: each one when HVMGR_CRASH is ``all``, else each THIN * stride-th.

    With the name of a long shape, fewer.
    """
    return lambda stride, shape="": 1 if os.environ.get("HVMGR_CRASH") == "all" else THIN * stride * LONG.get(shape, 1)


# Some fifty shapes share the minutes that the whole check may take.
THIN = 3


# Long ones, of whose acts fewer are killed: how many times the stride of the others.
LONG = {
    "merge-by-name": 3,
    "resize": 2,
    "resize-smaller": 2,
    "vm-adopt-convert": 3,
    "vm-adopt-drop": 2,
    "vm-release-flatten": 2,
}


@pytest.fixture(scope="session")
def random_kills():
    """How many kills at random moments: 200 when HVMGR_CRASH is ``all``, else 12 in all."""
    return 100 if os.environ.get("HVMGR_CRASH") == "all" else 6
