"""What the tests of mounts share: a mount namespace of their own, in which hvmgr runs, and disks with file systems."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shlex
import struct
import subprocess
import sys
from pathlib import Path

MIB = 1 << 20
START = 1 * MIB
FILES = {"hello": b"hello\n", "sub/many": bytes(range(256)) * 4096, "strange \n\t name": b"x"}


class Space:
    """A mount namespace; whatever is mounted in it goes with it."""

    def __init__(self, pid):
        self.pid = pid
        self.user = None  # whose hvmgr it is; root's without one

    def run(self, *words, ok=True, timeout=120):
        """A program in it."""
        argv = ["nsenter", f"--mount=/proc/{self.pid}/ns/mnt", "--", *map(str, words)]
        done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=timeout)
        assert not ok or done.returncode == 0, f"{shlex.join(map(str, words))}: {done.stderr or done.stdout}"
        return done

    def sh(self, script, **more):
        return self.run("sh", "-ec", script, **more).stdout

    def hvmgr(self, *words, code=0):
        """hvmgr in it; its document."""
        argv = [sys.executable] if self.user is None else self.user.command(self.user.python)
        done = self.run(*argv, "-m", "hvmgr", "--json", *words, ok=False)
        assert done.returncode == code, (words, done.stdout, done.stderr)
        self.said = done.stderr
        return json.loads(done.stdout)

    def fails(self, *words, code):
        """The sentence of a command that is refused."""
        return self.hvmgr(*words, code=code)["error"]["message"]

    def options(self, directory):
        """The options of what is mounted at a directory, each side of the dash; None where nothing is."""
        for line in Path(f"/proc/{self.pid}/mountinfo").read_text().splitlines():
            words = line.split()
            if words[4] == str(directory):
                return set(words[5].split(",")) | set(words[-1].split(","))
        return None


@contextlib.contextmanager
def space():
    """A namespace that nothing of is left of at the end of the block."""
    argv = ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo ready; exec sleep 600"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout.readline() == b"ready\n"
            yield Space(holder.pid)
        finally:
            holder.kill()


def fill(folder):
    """The known files in a folder."""
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def make_disk(path, folder, *, kind="ext4", size=16 * MIB):
    """A raw disk with one partition that holds the files of a folder."""
    with path.open("wb") as file:
        file.truncate(size)
        put_table(file, [(START, size - START)])
    blocks = (size - START) // 1024
    command = ["mke2fs", "-q", "-F", "-t", kind, "-d", folder, "-b", "1024", "-E", f"offset={START}", path, str(blocks)]
    subprocess.run(command, check=True, timeout=60, stderr=subprocess.DEVNULL)
    return path


def put_table(file, parts):
    """An MBR with these partitions (start, size in bytes)."""
    entries = b"".join(struct.pack("<8BII", 0, 0, 0, 0, 0x83, 0, 0, 0, at // 512, size // 512) for at, size in parts)
    file.seek(446)
    file.write(entries.ljust(64, b"\0") + b"\x55\xaa")


def hashes(*folders):
    """The bytes of every image in these folders."""
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in {".xml", ".yaml"} and ".hvmgr" not in path.parts
    }
