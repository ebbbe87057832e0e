"""A libvirtd for the crash tests of one worker, and the program that runs them below it."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def crash_run(new_libvirtd):
    """``crash_run(shape, …)``: runs ``crash.py`` inside a libvirtd of its own; fails with what it found."""
    with new_libvirtd() as daemon:
        yield functools.partial(_run, daemon)


def _run(daemon, *arguments, program="crash.py", timeout_s=280):
    environment = os.environ | {
        "PYTHONPATH": str(HERE.parent.parent),
        "HVMGR_CRASH_FOLDER": str(daemon.root / "homes"),
    }
    (daemon.root / "homes").mkdir(mode=0o711, exist_ok=True)
    command = [*daemon.enter, sys.executable, str(HERE / program), *map(str, arguments)]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=timeout_s, env=environment, cwd=HERE
    )
    print(done.stdout[-20000:], done.stderr[-5000:])
    assert done.returncode == 0, done.stdout[:4000] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="session")
def every():
    """``every(stride)``: which acts are killed: each one when HVMGR_CRASH is ``all``, else each stride-th."""
    return lambda stride: 1 if os.environ.get("HVMGR_CRASH") == "all" else stride


@pytest.fixture(scope="session")
def random_kills():
    """How many kills at random moments: 200 when HVMGR_CRASH is ``all``, else 20 in all."""
    return 100 if os.environ.get("HVMGR_CRASH") == "all" else 10
