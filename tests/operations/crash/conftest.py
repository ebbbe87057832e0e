"""A libvirtd for the crash tests of one worker, and the program that runs them below it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import private_libvirt

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def crash_run(new_embed_root):
    """``crash_run(shape, …)``: runs ``crash.py`` inside a libvirtd of its own; fails with what it found."""
    if os.geteuid() != 0 or shutil.which("libvirtd") is None:
        pytest.skip("needs root and libvirtd")
    with private_libvirt.daemon(new_embed_root()) as daemon:
        yield lambda *arguments, **more: run_inside(daemon, *arguments, **more)


def run_inside(daemon, *arguments, **more):
    """What the program wrote below a daemon; it has to end with 0."""
    return run_program(daemon.root, *arguments, before=daemon.enter, **more)


def run_program(root, *arguments, program="crash.py", timeout_s=280, before=(), environment=None):
    """What the program wrote, with its homes in ``root``; it has to end with 0."""
    folder = root / "homes"
    folder.mkdir(mode=0o711, exist_ok=True)
    variables = os.environ | {"PYTHONPATH": str(HERE.parents[2]), "HVMGR_CRASH_FOLDER": str(folder)}
    command = [*before, sys.executable, str(HERE / program), *map(str, arguments)]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=timeout_s, env=variables | (environment or {})
    )
    print(done.stdout[-20000:], done.stderr[-5000:])
    assert done.returncode == 0, done.stdout[:6000] + done.stderr[-4000:]
    return done.stdout


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
