"""A tiny guest without an operating system, and the disks for it."""

from __future__ import annotations

import subprocess
import tempfile
import uuid
from pathlib import Path

import pytest


def domain_xml(name, disks=(), *, uuid_=None, devices=""):
    """A 64 MiB TCG domain; ``disks`` are (slot, format, path)."""
    disk_xml = "".join(
        f"<disk type='file' device='disk'><driver name='qemu' type='{format_}'/><source file='{path}'/>"
        f"<target dev='{slot}' bus='virtio'/></disk>"
        for slot, format_, path in disks
    )
    return (
        f"<domain type='qemu'><name>{name}</name><uuid>{uuid_ or uuid.uuid4()}</uuid>"
        "<memory unit='MiB'>64</memory><os><type arch='x86_64' machine='pc'>hvm</type></os>"
        f"<devices>{disk_xml}<serial type='pty'/>{devices}</devices></domain>"
    )


@pytest.fixture
def make_xml():
    return domain_xml


@pytest.fixture
def folder():
    """A folder that QEMU's user can enter (pytest's own tmp_path is private to root)."""
    with tempfile.TemporaryDirectory(prefix="hvd", dir="/tmp") as name:
        path = Path(name)
        path.chmod(0o711)
        yield path


@pytest.fixture
def make_image(folder):
    """Makes an image with qemu-img: name, format, and a backing image with its format."""

    def make(name, format_="qcow2", *, backing=None, backing_format="qcow2", size="16M"):
        path = folder / name
        command = ["qemu-img", "create", "-q", "-f", format_]
        command += ["-b", backing.name, "-F", backing_format, str(path)] if backing else [str(path), size]
        subprocess.run(command, check=True, timeout=30)
        return path

    return make
