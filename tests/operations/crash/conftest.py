"""A libvirtd for all crash tests of one worker, and the programs that run below it."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from pathlib import Path

import pytest

from tests import forking, private_libvirt

HERE = Path(__file__).resolve().parent
EVERY_ACT = os.environ.get("HVMGR_CRASH") == "all"
LIMIT_S = 3600 if EVERY_ACT else 580  # of one program


def pytest_collection_modifyitems(items):
    """A test is cut off after its program would have been."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.timeout(LIMIT_S + 20))


@pytest.fixture(scope="session")
def crash_run(new_embed_root):
    """``crash_run(shape, …)``: runs ``crash.py`` inside a libvirtd of its own; fails with what it found."""
    if os.geteuid() != 0 or shutil.which("libvirtd") is None:
        pytest.skip("needs root and libvirtd")
    with private_libvirt.daemon(new_embed_root()) as daemon, server(daemon.root, before=daemon.enter) as run:
        yield run


@contextlib.contextmanager
def server(root, *, before=(), environment=None):
    """``run(shape, …)``: runs a program of this folder, with its homes in ``root``; fails with what it found."""
    folder = root / "homes"
    folder.mkdir(mode=0o711, exist_ok=True)
    variables = {"HVMGR_CRASH_FOLDER": str(folder), **(environment or {})}
    paths = {"PYTHONPATH": f"{HERE.parents[2]}{os.pathsep}{HERE}"}
    # The shapes import what all the programs do, and all of hvmgr.
    with forking.opened(["shapes"], command=[*before, sys.executable], environment=os.environ | paths) as programs:

        def run(*arguments, program="crash"):
            done = programs.run(program, *arguments, timeout_s=LIMIT_S, environment=forking.own() | variables)
            print(done.stdout[-20000:], done.stderr[-5000:])
            assert done.returncode == 0, done.stdout[:6000] + done.stderr[-4000:]
            return done.stdout

        yield run


@pytest.fixture(scope="session")
def every():
    """``every(stride)``: which acts are killed: each one when HVMGR_CRASH is ``all``, else each THIN * stride-th.

    With the name of a long shape, fewer.
    """
    return lambda stride, shape="": 1 if EVERY_ACT else THIN * stride * LONG.get(shape, 1)


# Some fifty shapes share the minutes that the whole check may take.
THIN = 6


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
    return 100 if EVERY_ACT else 6
