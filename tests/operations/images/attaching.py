"""What the tests of attached images share: a host that takes down at the end whatever a test left attached."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import subprocess
from pathlib import Path

import pytest

import hvmgr
from hvmgr.host import image_export, loop
from hvmgr.operations import attaching
from hvmgr.storage import attachments

MIB = 1 << 20
BLKZEROOUT = 0x127F


def skip_where_impossible():
    """Loop devices and FUSE belong to a machine, not to a program that could be installed."""
    try:
        image_export.require()
        loop.require()
    except hvmgr.errors.Unsupported as error:
        pytest.skip(str(error))


def run(*words, timeout=60):
    """A program that has to succeed; what it says."""
    done = subprocess.run([*map(str, words)], check=False, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{words}: {done.stderr or done.stdout}"
    return done.stdout


def write(device, offset, data):
    """As a guest writes."""
    descriptor = os.open(device, os.O_WRONLY)
    try:
        assert os.pwrite(descriptor, data, offset) == len(data)
    finally:
        os.close(descriptor)


def read(device, offset, length):
    """Past the cache of an earlier life of the device."""
    descriptor = os.open(device, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        return os.pread(descriptor, length, offset)
    finally:
        os.close(descriptor)


def zero_out(device, offset, length):
    """What file systems do with ranges that have to read as zeros."""
    descriptor = os.open(device, os.O_WRONLY)
    try:
        fcntl.ioctl(descriptor, BLKZEROOUT, struct.pack("<QQ", offset, length))
    finally:
        os.close(descriptor)


def disk_of(path, fmt, *, length=None):
    """The disk in an image as QEMU reads it."""
    raw = Path(f"{path}.read")
    run("qemu-img", "convert", "-f", fmt, "-O", "raw", path, raw)
    data = raw.read_bytes()
    raw.unlink()
    return data if length is None else data[:length]


def number_of(node):
    """What /sys says that a node has to be."""
    return (Path("/sys/class/block") / Path(node).name / "dev").read_text().strip()


def require_node(node):
    """The node is that of this device, not of an earlier one with this name."""
    rdev = os.stat(node).st_rdev
    assert f"{os.major(rdev)}:{os.minor(rdev)}" == number_of(node)


def is_clean():
    """Nothing of any attachment of this test is left."""
    runs = Path(os.environ["HVMGR_RUN"])
    return (
        attachments.all_records() == []
        and not (runs.is_dir() and any(runs.iterdir()))
        and image_export.processes(runs) == []
        and not any(str(loop.backing(one)).startswith(str(runs)) for one in Path("/dev").glob("loop[0-9]*"))
    )


@contextlib.contextmanager
def taken_down():
    """Whatever is attached in the block is taken down at its end."""
    try:
        yield
    finally:
        for one in attachments.all_records():
            with contextlib.suppress(hvmgr.errors.HvmgrError):
                attaching.take_down(one)
