"""A volume as a file for a program: an ordinary user may have it, where he may open /dev/fuse; a kill leaves nothing that stays."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests import ordinary_user
from tests.storage import file_trees

_WRITE = """
import os, signal, sys
from pathlib import Path
from hvmgr.host import e2fsprogs, file_systems, qemu_img
from hvmgr.host.image_export import Link
from hvmgr.operations.inside import exporting
from hvmgr.operations.inside.looking import Place
from hvmgr.operations.inside.views import Frozen

folder = Path(sys.argv[1])
name = "killed.qcow2" if len(sys.argv) > 2 else "child.qcow2"
child, base, work = folder / name, folder / "base.raw", folder / "work"
qemu_img.create(child, "qcow2", size=base.stat().st_size, backing=(str(base), "raw"))
links = (Link(child, "qcow2"), Link(base, "raw"))
with exporting.shown(links, work, Place(Frozen("disk", links), 0, base.stat().st_size)) as file:
    e2fsprogs.change(file, ["mkdir /made"])
    if len(sys.argv) > 2:
        os.kill(os.getpid(), signal.SIGKILL)
assert not work.exists()
"""
_CLEAR = """
import sys
from pathlib import Path
from hvmgr.host import file_systems
from hvmgr.operations.inside import exporting

work = Path(sys.argv[1]) / "work"
assert work.exists()
exporting.clear(work)
assert not work.exists()
assert not [one for one in file_systems.points() if one.directory.startswith(str(work))]
"""


@pytest.fixture
def folder():
    place = Path(tempfile.mkdtemp(prefix="hv", dir="/tmp"))
    (place / "empty").mkdir()
    file_trees.ext(place / "base.raw", place / "empty", "-t", "ext4", size="4M")
    yield place
    shutil.rmtree(place)


def test_an_ordinary_user_writes_a_volume_and_a_kill_leaves_nothing_that_stays(folder, require_program):
    for name in ("debugfs", "fusermount3", "unshare", "setpriv"):
        require_program(name)
    python = ordinary_user.find_python()
    if os.geteuid() != 0 or python is None:
        pytest.skip("needs root, and a Python that every user may run")
    user = ordinary_user.OrdinaryUser(folder, "nobody", 65534, 65534, python)
    for name in ("home", "run"):
        (folder / name).mkdir()
    before = (folder / "base.raw").read_bytes()
    user.owns(folder)
    fuse = f"mknod {folder}/fuse c 10 229; chmod 0666 {folder}/fuse; mount --bind {folder}/fuse /dev/fuse"

    def words(program, *more):
        return " ".join(f"'{one}'" for one in user.command(python, "-c", program, folder, *more))

    script = f"set -e; {fuse}; {words(_WRITE)}; {words(_WRITE, 'kill')} || :; {words(_CLEAR)}"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    file_trees.run("qemu-img", "convert", "-O", "raw", folder / "child.qcow2", folder / "after.raw")
    assert b"/made/" in file_trees.run("debugfs", "-R", "ls -p /", folder / "after.raw")
    assert (folder / "base.raw").read_bytes() == before
