"""VMs whose disks are sent and received, and what other programs make of the streams."""

from __future__ import annotations

import contextlib
import io
import subprocess
import tempfile
from pathlib import Path

import pytest

from hvmgr import vhd
from hvmgr.model.image_format import ImageFormat
from tests.operations.rules.conftest import MIB, Bench, place, run  # noqa: F401 - a fixture

VHD, RAW, QCOW2 = ImageFormat.VHD, ImageFormat.RAW, ImageFormat.QCOW2


class Transferring(Bench):
    """A host whose disks come and go as streams."""

    def send(self, vm, name, slot="hda", **wishes):
        """A stream in a file; it is as long as was promised, and comes the same in pieces."""
        path = self.place / name
        with vm.export_disk(slot, **wishes) as stream, path.open("wb") as file:
            stream.send(file.fileno())
            assert path.stat().st_size == stream.length
            assert b"".join(map(bytes, stream.chunks())) == path.read_bytes()
        return path

    def take(self, vm, path, slot="hda", fmt=VHD, **wishes):
        """A stream out of a file, of a length that nobody says."""
        with path.open("rb") as file:
            vm.import_disk(slot, file, format=fmt, **wishes)

    def disk_of(self, vm, slot="hda", snapshot=None):
        """All bytes that a guest would see, by QEMU."""
        disks = vm.now().disks if snapshot is None else vm.snapshot(snapshot).disks
        return raw_of(disks[slot], vm.tree().images[disks[slot]].format)


def raw_of(path, fmt):
    """The bytes of an image's disk, by QEMU."""
    with tempfile.TemporaryDirectory(prefix="hv", dir="/tmp") as folder:
        raw = Path(folder) / "raw"
        run("qemu-img", "convert", "-U", "-f", fmt, "-O", "raw", path, raw)
        return raw.read_bytes()


def chain_of(folder, *paths):
    """Streams stored beside each other under the names by which they call one another; all are strictly sound."""
    folder.mkdir(exist_ok=True)
    for path in paths:
        with vhd.open_image(path) as image:
            stored = folder / f"{uuid_of(image)}.vhd"
        stored.write_bytes(path.read_bytes())
        assert [str(fault) for fault in vhd.check(stored, chain=True)] == []
    return stored


def uuid_of(image):
    import uuid

    return str(uuid.UUID(bytes=image.uid))


def by_codec(path):
    """The bytes of a VHD chain, by our own reader."""
    with vhd.open_chain(path) as chain:
        buffer = bytearray(chain.size)
        chain.read_into(0, memoryview(buffer))
        return bytes(buffer)


def by_libvhdi(*paths):
    """The bytes of a VHD chain (the base first), by libvhdi."""
    pyvhdi = pytest.importorskip("pyvhdi", reason="libvhdi-python is missing: make setup installs it")
    below = None
    with contextlib.ExitStack() as stack:
        for path in paths:
            top = pyvhdi.file()
            top.open(str(path))
            stack.callback(top.close)
            if below is not None:
                top.set_parent(below)
            below = top
        size = below.get_media_size()
        unit = 2 * MIB  # it gets a read over several blocks of a child wrong
        return b"".join(below.read_buffer_at_offset(min(unit, size - at), at) for at in range(0, size, unit))


class Pipe(io.RawIOBase):
    """Bytes in small pieces, as a socket gives them."""

    def __init__(self, data, piece=1000):
        self._data, self._piece, self._at = memoryview(data), piece, 0

    def readable(self):
        return True

    def readinto(self, buffer):
        count = min(len(buffer), self._piece, len(self._data) - self._at)
        buffer[:count] = self._data[self._at : self._at + count]
        self._at += count
        return count


@pytest.fixture
def bench(connection, place):  # noqa: F811
    """A host without VMs."""
    bench = Transferring(place, connection.uri)
    yield bench
    for host in bench.hosts:
        host.close()


def qemu_check(path):
    """QEMU finds nothing wrong with a qcow2 image."""
    done = subprocess.run(["qemu-img", "check", "-f", "qcow2", str(path)], check=False, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
