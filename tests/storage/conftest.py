"""File systems of their own, in files: ones that share blocks, and ones that are soon full."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

MKFS = {
    "xfs": ["mkfs.xfs", "-q", "-f", "-m", "reflink=1"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
    "ext4": ["mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal"],
}
PACKAGES = {"xfs": "xfsprogs", "btrfs": "btrfs-progs"}


@contextlib.contextmanager
def mounted(kind, size, require, require_program):
    """A fresh file system of this kind on a loop device; its folder."""
    require(os.geteuid() == 0, "mounting needs root")
    require_program(MKFS[kind][0])
    place = Path(tempfile.mkdtemp(prefix="hvfs", dir="/tmp"))
    place.chmod(0o711)  # QEMU's user has to pass
    try:
        image, folder = place / "image", place / "on"
        folder.mkdir()
        with image.open("wb") as file:
            file.truncate(size)
        subprocess.run([*MKFS[kind], str(image)], check=True, capture_output=True, timeout=30)
        done = subprocess.run(["mount", "-o", "loop", image, folder], check=False, capture_output=True, timeout=30)
        require(done.returncode == 0, f"{kind} cannot be mounted here: {done.stderr.decode().strip()}")
        try:
            yield folder
        finally:
            subprocess.run(["umount", "-l", folder], check=True, timeout=30)
    finally:
        shutil.rmtree(place)


@pytest.fixture(scope="session", params=["xfs", "btrfs"])
def sharing(request, require, require_program):
    """A folder where copies can share blocks; each test makes its own files."""
    with mounted(request.param, 400 << 20, require, require_program) as folder:
        yield folder


@pytest.fixture
def small(require, require_program):
    """A folder with room for 14 MiB or so."""
    with mounted("ext4", 16 << 20, require, require_program) as folder:
        yield folder
