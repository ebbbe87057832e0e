"""A small NTFS volume with everything that only Windows has: made by the ntfs-3g driver, in a mount namespace of its own.

python ntfs_volume.py VOLUME FOLDER        as root, below ``unshare -m``
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

JUNCTION = 0xA0000003
HIDDEN_ARCHIVE = 0x22
SHORT = "ARATHER~1.TE"
STREAM = "stream one"
_ADMINISTRATORS = bytes.fromhex("01020000000000052000000020020000")
_EVERYONE = bytes.fromhex("010100000000000100000000")


def security_descriptor():
    """Owner and group are the administrators, and everybody may read."""
    entry = struct.pack("<BBHI", 0, 3, 8 + len(_EVERYONE), 0x120089) + _EVERYONE
    listed = struct.pack("<BBHHH", 2, 0, 8 + len(entry), 1, 0) + entry
    owner, group = 20, 20 + len(_ADMINISTRATORS)
    head = struct.pack("<BBHIIII", 1, 0, 0x8004, owner, group, 0, group + len(_ADMINISTRATORS))
    return head + _ADMINISTRATORS + _ADMINISTRATORS + listed


def junction_to(path):
    """A reparse point, as Windows makes them for folders."""
    target, shown = (text.encode("utf-16-le") for text in (f"\\??\\{path}", path))
    names = target + b"\0\0" + shown + b"\0\0"
    data = struct.pack("<HHHH", 0, len(target), len(target) + 2, len(shown)) + names
    return struct.pack("<IHH", JUNCTION, len(data), 0) + data


def fill(place):
    """A long name with a short one, a named stream, attributes, a descriptor, a junction, a second name, a large file."""
    folder = place / "Folder with a long name"
    folder.mkdir()
    file = folder / "A rather long name.text"
    file.write_bytes(b"main\n")
    Path(f"{file}:{STREAM}").write_bytes(b"S" * 5000)
    os.setxattr(file, "system.ntfs_dos_name", SHORT.encode())
    os.setxattr(file, "system.ntfs_attrib_be", struct.pack(">I", HIDDEN_ARCHIVE))
    os.setxattr(file, "system.ntfs_acl", security_descriptor())
    (place / "junction").mkdir()
    os.setxattr(place / "junction", "system.ntfs_reparse_data", junction_to("C:\\Folder with a long name"))
    (place / "second name").hardlink_to(file)
    (place / "large").write_bytes(os.urandom(300_000))


def main(volume, place):
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["ntfs-3g", "-o", "streams_interface=windows", volume, place], check=True)
    try:
        fill(Path(place))
    finally:
        subprocess.run(["umount", place], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
