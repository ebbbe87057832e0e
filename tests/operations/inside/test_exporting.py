"""A volume as a file for a program: an ordinary user may have it, where he may open /dev/fuse; a kill leaves nothing that stays."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from hvmgr.storage.filesystems import luks
from hvmgr.storage.partitions import File
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
from hvmgr.storage.filesystems import luks
from hvmgr.storage.partitions import File

folder, how = Path(sys.argv[1]), sys.argv[2]
base = folder / ("sealed.raw" if how == "sealed" else "base.raw")
child, work = folder / f"{how}.qcow2", folder / "work"
with File(base) as disk:
    header = luks.Header(2, "aes-xts-plain64", 4096, None, luks.Slots(0))
    lock = luks.Decrypted(disk, header, bytes(range(64))) if how == "sealed" else None
qemu_img.create(child, "qcow2", size=base.stat().st_size, backing=(str(base), "raw"))
links = (Link(child, "qcow2"), Link(base, "raw"))
with exporting.shown(links, work, Place(Frozen("disk", links), 0, 4 << 20, lock)) as file:
    e2fsprogs.change(file, ["mkdir /made"])
    if how == "killed":
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


HEADER = luks.Header(2, "aes-xts-plain64", 4096, None, luks.Slots(0))


def sealed(folder):
    """What is in the other one, encrypted."""
    image, content = folder / "sealed.raw", (folder / "base.raw").read_bytes()
    image.write_bytes(bytes(4096 + len(content)))
    with File(image) as disk:
        at, sectors = luks.Decrypted(disk, HEADER, bytes(range(64))).encrypted(0, memoryview(content))
    image.write_bytes(bytes(at) + sectors)
    return image


def test_an_ordinary_user_writes_a_volume_and_a_kill_leaves_nothing_that_stays(folder, require_program):
    for name in ("debugfs", "fusermount3", "unshare", "setpriv"):
        require_program(name)
    python = ordinary_user.find_python()
    if os.geteuid() != 0 or python is None:
        pytest.skip("needs root, and a Python that every user may run")
    user = ordinary_user.OrdinaryUser(folder, "nobody", 65534, 65534, python)
    for name in ("home", "run"):
        (folder / name).mkdir()
    with File(sealed(folder)) as disk:
        lock = luks.Decrypted(disk, HEADER, bytes(range(64)))
    before = (folder / "base.raw").read_bytes(), (folder / "sealed.raw").read_bytes()
    user.owns(folder)
    fuse = f"mknod {folder}/fuse c 10 229; chmod 0666 {folder}/fuse; mount --bind {folder}/fuse /dev/fuse"

    def words(program, *more):
        return " ".join(f"'{one}'" for one in user.command(python, "-c", program, folder, *more))

    script = f"set -e; {fuse}; {words(_WRITE, 'child')}; {words(_WRITE, 'sealed')}; {words(_WRITE, 'killed')} || :; {words(_CLEAR)}"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    after = folder / "after.raw"
    file_trees.run("qemu-img", "convert", "-O", "raw", folder / "child.qcow2", after)
    assert b"/made/" in file_trees.run("debugfs", "-R", "ls -p /", after)
    file_trees.run("qemu-img", "convert", "-O", "raw", folder / "sealed.qcow2", after)
    with File(after) as disk:
        content = bytearray(4 << 20)
        lock.moved(disk, lock.start).read_into(0, memoryview(content))
    after.write_bytes(content)
    assert b"/made/" in file_trees.run("debugfs", "-R", "ls -p /", after)
    assert ((folder / "base.raw").read_bytes(), (folder / "sealed.raw").read_bytes()) == before
