"""A real file system of a few megabytes on which nothing is free: a loop device and a file that takes the rest."""

from __future__ import annotations

import contextlib
import os
import subprocess

MAKE = {
    "ext4": (("mkfs.ext4", "-q", "-F", "-m", "0"), 64),
    "xfs": (("mkfs.xfs", "-q"), 320),
    "btrfs": (("mkfs.btrfs", "-q"), 256),
}
_BALLAST = "ballast"


@contextlib.contextmanager
def mounted(kind, image, folder, *options, megabytes=None):
    """The file system at ``folder``, which QEMU's user can enter."""
    make, usual = MAKE[kind]
    with image.open("wb") as file:
        file.truncate((megabytes or usual) << 20)
    subprocess.run([*make, *options, str(image)], check=True, timeout=60, capture_output=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(folder)], check=True, timeout=60)
    try:
        folder.chmod(0o711)
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, timeout=60)
        image.unlink()


def fill(folder):
    """Nobody, not even root, can write another block; what was freed a moment ago is taken, too."""
    with (folder / _BALLAST).open("ab", buffering=0) as file:
        for size in (1 << 20, 4096, 4096, 512):
            with contextlib.suppress(OSError):
                while True:
                    file.write(os.urandom(size))
            os.sync()


def is_full(folder):
    """Whether a file of one block cannot be made."""
    probe = folder / "probe"
    try:
        probe.write_bytes(bytes(4096))
        return False
    except OSError:
        return True
    finally:
        probe.unlink(missing_ok=True)


def clear(folder):
    """There is space again."""
    (folder / _BALLAST).unlink()
    os.sync()
