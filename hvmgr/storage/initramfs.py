"""What an initramfs is packed of: cpio archives, a static busybox, a program with the libraries that it needs."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from hvmgr import errors
from hvmgr.host import process

BUSYBOX = Path("/bin/busybox")
_PROGRAM_S = 60.0


def pack(entries: Iterable[tuple[str, int, bytes]]) -> bytes:
    """A cpio archive of names, modes and contents as the kernel unpacks it: "newc", all of root.

    Source: Documentation/driver-api/early-userspace/buffer-format.rst of Linux.
    """
    console = 5 << 8 | 1  # the one device node that we need, before devtmpfs is there
    archive = bytearray()
    for name, mode, data in [*entries, ("TRAILER!!!", 0, b"")]:
        encoded = name.encode() + b"\0"
        device = console if mode & 0o170000 == 0o020000 else 0
        fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, device >> 8, device & 0xFF, len(encoded), 0)
        archive += b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        archive += bytes(-len(archive) % 4) + data
        archive += bytes(-len(archive) % 4)
    return bytes(archive)


def is_static(program: bytes) -> bool:
    """Whether a 64-bit ELF program runs without a loader: it has no program header PT_INTERP (elf(5))."""
    if not program.startswith(b"\x7fELF\x02"):
        return False
    (table,) = struct.unpack_from("<Q", program, 32)
    size, count = struct.unpack_from("<HH", program, 54)
    return all(struct.unpack_from("<I", program, table + size * number) != (3,) for number in range(count))


def installed_busybox() -> bytes:
    """The static busybox of this host; Unsupported without one."""
    if BUSYBOX.is_file() and is_static(data := BUSYBOX.read_bytes()):
        return data
    raise errors.Unsupported(
        "there is no static busybox on this host", hint="install it, on Debian with: apt install busybox-static"
    )


def with_libraries(program: str) -> dict[str, Path]:
    """A program and all that it is linked with: names to files, the loader under the name ``loader``."""
    process.require(program)
    process.require("ldd")
    path = process.path_of(program)
    told = process.run(["ldd", path], timeout_s=_PROGRAM_S).stdout.decode()
    found = {program: path}
    for line in told.splitlines():
        if match := re.fullmatch(r"\s*(\S+) => (/\S+) \(0x[0-9a-f]+\)", line):
            found[match[1]] = Path(match[2])
        elif match := re.fullmatch(r"\s*(/\S*/ld-\S+) \(0x[0-9a-f]+\)", line):
            found["loader"] = Path(match[1])
    if "loader" not in found:
        raise errors.HostFailed(f"ldd does not say what {path} is linked with: {told.strip()}")
    return found


def programs(wanted: Iterable[str], folder: str) -> Iterator[tuple[str, int, bytes]]:
    """Programs of this host in ``folder/bin``, and what they are linked with, once each, in ``folder/lib``: to be packed."""
    packed: dict[str, Path] = {}
    for program in wanted:
        for name, path in with_libraries(program).items():
            packed.setdefault(f"{folder}/{'bin' if name == program else 'lib'}/{name}", path)
    for name, path in packed.items():
        yield name, 0o100755, path.read_bytes()
