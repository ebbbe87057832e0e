"""A physical machine for tests: a folder that is its volume, and a disk made of that, which a VM boots from."""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path

from hvmgr.host import bare_machine
from hvmgr.operations.boot import machine
from hvmgr.storage import ext, layer, partitions
from tests.operations.boot import mini

MEMORY = 256 << 20
TIME_S = 300.0  # on a busy host; a machine takes some five seconds on an idle one


class Physical:
    """``tree`` becomes the root of the machine's volume whenever ``build`` is called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tree = folder / "tree"
        self.disk = folder / "disk"
        (self.tree / "VHD").mkdir(parents=True)
        (self.tree / "boot" / "grub").mkdir(parents=True)
        (self.tree / "boot" / "grub" / "grub.cfg").write_text(machine.MENU)

    @property
    def options(self) -> list[str]:
        """What the command ``boot add`` has to know of the volume."""
        volume = ["--volume", str(self.tree), "--volume-id", mini.VOLUME, "--volume-type", "ext4"]
        return [*self.boot_dir, *volume]

    @property
    def boot_dir(self) -> list[str]:
        """Where the machine's menu is."""
        return ["--boot-dir", str(self.tree / "boot")]

    def build(self) -> None:
        """The disk, with everything in the tree as it is now."""
        self.disk.unlink(missing_ok=True)
        machine.make_disk(self.disk, self.tree, mini.VOLUME, free=64 << 20)

    def boot(self) -> str:
        """The machine runs until it turns itself off; what it said."""
        own = bare_machine.Machine([(self.disk, "raw", True)], MEMORY)
        return "\n".join(bare_machine.lines(own, self.folder, time_s=TIME_S))

    def content(self, path: str) -> bytes:
        """A file on the machine's volume, which has to be clean."""
        with partitions.File(self.disk) as disk:
            data = ext.FileSystem(disk, machine.START, "the machine's volume").read(path)
        assert data is not None, path
        return data

    def take_back(self, path: str) -> None:
        """What the machine made of a file is in the tree, too."""
        target = self.tree / path.lstrip("/")
        with target.open("r+b") as file:
            data = self.content(path)
            assert len(data) == target.stat().st_size
            file.write(data)

    def is_clean(self) -> bool:
        """Whether e2fsck agrees that the volume was unmounted."""
        return is_clean(self.disk, machine.START)


def is_clean(disk: Path, start: int) -> bool:
    """Whether e2fsck finds nothing to do in the file system there."""
    command = ["e2fsck", "-fn", f"{disk}?offset={start}"]
    told = subprocess.run(command, capture_output=True, text=True, check=False, env=mini.WITH_SBIN)
    return told.returncode == 0 and "recovering journal" not in told.stdout + told.stderr


def inside(disk: partitions.Disk, path: str) -> bytes | None:
    """A file of the small system in a disk."""
    return ext.FileSystem(disk, mini.START, "the small system").read(path)


def write_layer(path, chunks):
    """A layer with these chunks of the disk, as Linux writes it."""
    assert len(chunks) <= layer.CHUNK // 16  # of the first area
    data = bytearray(path.stat().st_size)
    struct.pack_into("<IIII", data, 0, 0x70416E53, 1, 1, 8)
    for number, (old, content) in enumerate(chunks.items()):
        struct.pack_into("<QQ", data, layer.CHUNK + 16 * number, old, 2 + number)
        data[(2 + number) * layer.CHUNK : (3 + number) * layer.CHUNK] = content
    path.write_bytes(data)


def later(path: Path, seconds: int) -> None:
    """The file's time of change is another one."""
    facts = path.stat()
    os.utime(path, (facts.st_atime, facts.st_mtime + seconds))
