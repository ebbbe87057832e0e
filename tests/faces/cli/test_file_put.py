"""``hvmgr file put`` and ``restore`` for a VM that is off: bytes, owners, modes and times, and every way to fail."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.storage import file_trees

START = 1 << 20


def disk_with(folder, part, name="disk"):
    """A disk with a GPT and one partition, which is what ``part`` holds."""
    image = folder / name
    size = part.stat().st_size
    with image.open("wb") as file:
        file.truncate(START + size + (1 << 20))
    file_trees.run("sfdisk", "-q", image, input=f"label: gpt\nstart=2048,size={size // 512}\n".encode())
    with image.open("r+b") as file:
        file.seek(START)
        file.write(part.read_bytes())
    return image


def present(hvmgr, vm):
    (image,) = hvmgr.ok("vm", "show", vm, "--json").json["now"]["disks"].values()
    return image


def partition_of(hvmgr, vm, to):
    """The partition of the VM's present, in a file."""
    raw = to.with_suffix(".raw")
    file_trees.run("qemu-img", "convert", "-O", "raw", present(hvmgr, vm), raw)
    with raw.open("rb") as file:
        file.seek(START)
        to.write_bytes(file.read()[: -(1 << 20)])
    raw.unlink()
    return to


def is_sound(part):
    return subprocess.run(["e2fsck", "-f", "-n", part], capture_output=True, timeout=60, check=False).returncode == 0


@pytest.fixture(scope="module")
def linux(tmp_path_factory):
    folder = tmp_path_factory.mktemp("linux")
    tree = folder / "tree"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc" / "passwd").write_text("root:x:0:0::/root:/bin/sh\nanna:x:1001:1002::/home/anna:/bin/sh\n")
    (tree / "etc" / "group").write_text("root:x:0:\nweb:x:77:anna\n")
    (tree / "etc" / "hosts").write_text("127.0.0.1 localhost\n")
    (tree / "etc" / "hosts").chmod(0o640)
    (tree / "srv").mkdir()
    (tree / "srv" / "link").symlink_to("../etc")
    os.link(tree / "etc" / "hosts", tree / "srv" / "same")
    part = folder / "part"
    file_trees.ext(part, tree, "-t", "ext4", size="16M")
    debug = 'set_inode_field /etc/hosts uid 5\nea_set /etc/hosts user.note kept\nea_set /etc security.selinux "etc_t"\n'
    subprocess.run(["debugfs", "-w", "-f", "-", part], input=debug.encode(), check=True, capture_output=True, timeout=60)
    return disk_with(folder, part)


@pytest.fixture
def web(hvmgr, root, linux):
    hvmgr.ok("vm", "create", "web", "--memory", "64M", "--disk", linux, "--network", "none", "--accel", "tcg")
    return "web"


def stat(hvmgr, path, *words):
    (found,) = hvmgr.ok("file", "stat", "web", path, "--json", *words).json["entries"]
    return found


def test_first(hvmgr, web, tmp_path):
    (tmp_path / "new").write_bytes(b"bytes" * 1000)
    os.utime(tmp_path / "new", ns=(5, 1_600_000_000_123_456_789))
    answer = hvmgr("file", "put", web, tmp_path / "new", "/srv", "--json")
    print(answer)
    assert answer.code == 0
    assert hvmgr.ok("file", "cat", web, "/srv/new").out == "bytes" * 1000
    print(stat(hvmgr, "/srv/new"))
    assert is_sound(partition_of(hvmgr, web, tmp_path / "part"))
    assert 0
