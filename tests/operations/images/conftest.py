"""Image files in a folder of the test, and a host whose libvirt is not there: these commands do without."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import hvmgr
from hvmgr import vhd
from hvmgr.vhd import source

MIB = 1 << 20


class Folder:
    """A folder with images: makes them, and reads back what a guest would see."""

    def __init__(self, path: Path, host: hvmgr.Host, notices: list[str]) -> None:
        self.path = path
        self.host = host
        self.notices = notices
        self.images = host.images

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def raw(self, name: str, *, size: int = 4 * MIB, seed: int = 1, spots: int = 6) -> bytes:
        """A raw disk with some spots of random bytes in it, and its bytes."""
        data = scattered(bytes(size), seed=seed, spots=spots)
        (self.path / name).write_bytes(data)
        return data

    def chain(self, *names: str, size: int = 4 * MIB) -> list[bytes]:
        """A VHD (or qcow2, by the suffix) with differencing ones on it: what each of them shows."""
        shown = []
        for number, name in enumerate(names):
            data = scattered(shown[-1] if shown else bytes(size), seed=number + 10, spots=4)
            (self.path / "content.raw").write_bytes(data)
            parent = self.path / names[number - 1] if number else None
            self.images.convert(self.path / "content.raw", self.path / name, hvmgr.ImageOptions(parent=parent))
            shown.append(data)
        (self.path / "content.raw").unlink()
        return shown

    def shown(self, name: str) -> bytes:
        """What a guest would see: of a VHD by our codec, of all else by qemu-img."""
        path = self.path / name
        if vhd.identify(path) is not None:
            with vhd.open_chain(path) as disk:
                return source.read(disk, 0, disk.size)
        return self.seen_by_qemu(name, path.suffix.removeprefix(".").replace("vhd", "vpc").replace("vpcx", "vhdx"))

    def seen_by_qemu(self, name: str, fmt: str) -> bytes:
        """What QEMU shows of an image that is complete in itself, or of a qcow2 chain."""
        target = self.path / "seen.raw"
        command = ["qemu-img", "convert", "-f", fmt, "-O", "raw", self.path / name, target]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        data = target.read_bytes()
        target.unlink()
        return data

    def names(self) -> set[str]:
        """The files that are there, hidden ones too."""
        return set(os.listdir(self.path))

    def bytes_of_files(self) -> dict[str, bytes]:
        """Everything in the folder."""
        return {name: (self.path / name).read_bytes() for name in self.names()}


@contextlib.contextmanager
def filled(place: Path, free: int) -> Iterator[None]:
    """A file system with so many bytes left, as long as the block takes."""
    facts = os.statvfs(place)
    filler = place / "filler"
    filler.write_bytes(bytes(facts.f_bavail * facts.f_frsize - free))
    try:
        yield
    finally:
        filler.unlink()


def scattered(data: bytes, *, seed: int, spots: int) -> bytes:
    """The same disk with random bytes in some places, all in whole pages."""
    chosen, changed = random.Random(seed), bytearray(data)
    for _ in range(spots):
        length = 4096 * chosen.randint(1, 40)
        at = chosen.randrange(0, len(data) - length + 1, 4096)
        changed[at : at + length] = chosen.randbytes(length)
    return bytes(changed)


@pytest.fixture
def small(folder, require):
    """A file system of its own with 64 MiB below the folder."""
    place = folder / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", place]
    require(
        subprocess.run(command, check=False, capture_output=True, timeout=60).returncode == 0, "cannot mount a tmpfs"
    )
    yield Folder(place, folder.host, folder.notices)
    subprocess.run(["umount", "-l", place], check=True, timeout=60)
    place.rmdir()


@pytest.fixture
def folder(tmp_path, require_program):
    """A folder of image files."""
    require_program("qemu-img")
    place = tmp_path / "images"
    place.mkdir()
    notices: list[str] = []
    reporter = hvmgr.Reporter(notice=notices.append)
    with hvmgr.Host.open("test:///default", root=tmp_path / "homes", reporter=reporter) as host:
        yield Folder(place, host, notices)
