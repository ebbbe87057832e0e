"""An image as a file that looks like the disk inside it: a storage daemon that goes on when we end, with a FUSE export.

Everything of one export lies in one folder, and every process of it has that folder on its command line: what was left
over by a command that died is found by that alone.

The export is mounted in a mount namespace of the daemon's own and reached by its ``/proc/PID/root``. It dies with the
daemon, no dead mount stays for others to hang on, and nobody mistakes it for a file of the host. The namespace follows
the host's (``slave``): a file system that is unmounted here is unmounted there too. Where the host's mounts are private it
follows nothing; so it lets go of all that the daemon needs no way through, or nobody could unmount that for good.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvmgr import errors
from hvmgr.host import file_systems, pids, process, qemu_errors

PROGRAM = "qemu-storage-daemon"
CODEC = "hvmgr"  # the format of a link that our own program serves, see ``serve``
VOLUME = "volume"  # of one that another program of ours serves, see ``serve_volume``

_START_S = 60.0
_SERVE_S = 600.0  # a key of LUKS is meant to take its time
_END_S = 300.0  # what a slow disk gets to take the last writes
_FILE, _PID, _SOCKET = "disk", "daemon.pid", "nbd"
_SERVER, _VOLUME_SERVER = "hvmgr.faces.block_server", "hvmgr.faces.volume_server"
_FUSE = Path("/dev/fuse")
_PUNCH, _KEEP_SIZE = 2, 1
_NO_FUSE = ("does not accept value 'fuse'", "Invalid parameter 'fuse'")


@dataclass(frozen=True, slots=True)
class Link:
    """One image of a chain: a file or device, and its format (raw, qcow2, vpc, vhdx, ``CODEC`` or ``VOLUME``)."""

    path: Path
    format: str


def require() -> None:
    """Unsupported where images cannot be exported: not root, no FUSE, a missing program."""
    if os.geteuid() != 0:
        raise errors.Unsupported("only root can attach an image", hint="run the command as root")
    if not _FUSE.exists():
        raise errors.Unsupported("this host has no FUSE (there is no /dev/fuse)", hint="load the module: modprobe fuse")
    for program in (PROGRAM, "unshare", "nsenter", "umount", "setsid"):
        process.require(program)


def require_for_users() -> None:
    """Unsupported where an ordinary user cannot export an image."""
    if not _FUSE.exists():
        raise errors.Unsupported("this host has no FUSE (there is no /dev/fuse)", hint="load the module: modprobe fuse")
    if not os.access(_FUSE, os.R_OK | os.W_OK):
        raise errors.Unsupported(
            f"this user may not open {_FUSE}", hint="run the command as root, or let users have it: chmod 666 /dev/fuse"
        )
    process.require(PROGRAM)


def serve(folder: Path, path: Path, *, writable: bool) -> None:
    """Our own codec serves the VHD at ``path``, with its parents, on a socket in the folder, until it is ended."""
    _serve(folder, _SERVER, [*(["--writable"] if writable else []), path])


def serve_volume(folder: Path, text: bytes) -> None:
    """The volume that the text describes is served, to be read, on a socket in the folder, until that is ended."""
    _serve(folder, _VOLUME_SERVER, [], text)


def serve_lowest(folder: Path, links: Sequence[Link], *, writable: bool, volume: bytes = b"") -> Sequence[Link]:
    """What QEMU does not read of a chain (top first) is served; the links down to that. ``volume``: see ``serve_volume``."""
    for number, link in enumerate(links):
        if link.format == VOLUME:
            serve_volume(folder, volume)
        elif link.format == CODEC:
            serve(folder, link.path, writable=writable and number == 0)
        else:
            continue
        return links[: number + 1]
    return links


def _serve(folder: Path, server: str, words: Sequence[str | Path], text: bytes = b"") -> None:
    socket = folder / _SOCKET
    # It finds its modules where we found ours, however hvmgr was installed.
    program = f"import sys; sys.path[:] = {sys.path!r}; from {server} import main; sys.exit(main(sys.argv[1:]))"
    argv: list[str | Path] = ["setsid", "--fork", sys.executable, "-I", "-c", program, *words, socket]
    # It lets go of its output when it is ready: the call ends then, and what it says before is why it is not.
    said = process.run(argv, input=text, timeout_s=_SERVE_S if text else _START_S).stderr.strip()
    if not socket.exists():
        kind, _, why = said.partition(": ")
        error = getattr(errors, kind, errors.HostFailed)
        raise error(why or said or "the disk cannot be served: the server ended without a word")


def start(folder: Path, links: Sequence[Link], *, writable: bool, part: tuple[int, int] | None = None) -> None:
    """The disk of a chain (top first) is a file in the folder's namespace, until ``end``.

    A ``part`` of it (start, size) is a file that this user's programs see, in the folder itself: no root is needed.

    Raises Conflict when another process has an image open in a way that forbids it, Unsupported without FUSE.
    """
    for link in links:
        qemu_errors.require_utf8(link.path)
    file = folder / _FILE
    file.touch(0o600)
    nodes = _nodes(folder, links, writable=writable)
    export = {"type": "fuse", "id": "disk", "mountpoint": os.fspath(file)}
    apart = ["unshare", "--mount", "--propagation", "slave"]
    if part is not None:
        apart, export["allow-other"] = [], "off"
        window = {"driver": "raw", "node-name": "part", "file": nodes[-1]["node-name"], "read-only": not writable}
        nodes.append(window | {"offset": part[0], "size": part[1]})
    export["node-name"] = str(nodes[-1]["node-name"])
    argv: list[str | Path] = [*apart, PROGRAM, "--daemonize", "--pidfile", folder / _PID]
    argv += [word for node in nodes for word in ("--blockdev", json.dumps(node))]
    argv += ["--export", json.dumps({**export, "writable": writable, "growable": False})]
    try:
        process.run(argv, timeout_s=_START_S)
    except errors.HostFailed as error:
        raise explained(str(error.facts.get("words", error)), links[0].path) from error
    if part is None:
        _let_go(folder, [folder / _FILE, *(link.path for link in links)])


def _let_go(folder: Path, needed: Sequence[Path]) -> None:
    """Nothing is mounted in the daemon's namespace but what is on the way to these files."""
    try:
        pid = int((folder / _PID).read_text())
        there = [one.directory for one in file_systems.points(pid)]
    except (OSError, ValueError) as error:
        raise errors.HostFailed(f"the {PROGRAM} of {folder} has ended") from error
    ways = {os.fspath(way) for path in needed for one in (path, path.resolve()) for way in (one, *one.parents)}
    # The deepest first. Without /proc umount does not see what is mounted; and no file of the host is to hear of it.
    foreign = sorted((one for one in there if one not in ways | {"/proc"}), reverse=True)
    if foreign:
        umount = ["umount", "--lazy", "--internal-only", "--no-mtab", "--no-canonicalize", "--", *foreign]
        # What was unmounted meanwhile is not there any more.
        process.run(["nsenter", f"--mount=/proc/{pid}/ns/mnt", "--", *umount], timeout_s=_START_S, ok_codes=range(256))


def explained(words: str, path: Path) -> errors.HvmgrError:
    """The error for what the daemon says where it cannot export."""
    if any(one in words for one in _NO_FUSE):
        return errors.Unsupported(f"this host's {PROGRAM} cannot export by FUSE")
    return qemu_errors.translated(words, path)


@contextlib.contextmanager
def opened(folder: Path, *, writable: bool) -> Iterator[int]:
    """A descriptor of the exported file, which is as large as the disk."""
    try:
        pid = int((folder / _PID).read_text())
        inside = Path(f"/proc/{pid}/root") / (folder / _FILE).relative_to("/")
        descriptor = os.open(inside, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise errors.HostFailed(f"the {PROGRAM} of {folder} has ended") from error
    try:
        if writable:
            _forbid_punching(descriptor)
        yield descriptor
    finally:
        os.close(descriptor)


def file_of(folder: Path) -> Path:
    """The exported file's path, as a loop device names it."""
    return folder / _FILE


def processes(folder: Path) -> list[tuple[int, int]]:
    """The processes that serve the folder's export, each with its start time."""
    return [one for program in (PROGRAM, _SERVER, _VOLUME_SERVER) for one in pids.naming(f"{folder}/", program)]


def is_served(folder: Path) -> bool:
    """Whether the daemon that fills the exported file is there."""
    return any(_is_daemon(pid) for pid, _ in processes(folder))


def end(folder: Path) -> None:
    """No process serves the export: what fills the file ends first, what is below it after that, written out."""
    found = processes(folder)
    daemons = [one for one in found if _is_daemon(one[0])]
    for pid, started in (*daemons, *(one for one in found if one not in daemons)):
        pids.end(pid, started, timeout_s=_END_S)


def _is_daemon(pid: int) -> bool:
    try:
        return PROGRAM.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]
    except OSError:
        return False


def _nodes(folder: Path, links: Sequence[Link], *, writable: bool) -> list[dict[str, object]]:
    """Block nodes, parents first; the last one is the disk. No format is guessed, and no parent taken from a header."""
    found: list[dict[str, object]] = []
    for number, link in reversed(list(enumerate(links))):
        top = number == 0
        node: dict[str, object] = {"node-name": f"image{number}", "read-only": not (writable and top)}
        if top and writable:
            # The guest's zeros take no space. It cannot give space back otherwise, see below.
            node |= {"discard": "unmap", "detect-zeroes": "unmap"}
        if link.format in {CODEC, VOLUME}:
            server = {"type": "unix", "path": os.fspath(folder / _SOCKET)}
            node |= {"driver": "nbd", "server": server}
        else:
            node |= {"driver": link.format, "file": _file(link.path, locked=link.format == "raw")}
        if link.format == "qcow2":
            node["backing"] = found[-1]["node-name"] if found else None
        found.append(node)
    return [*found, {**guarded(str(found[-1]["node-name"])), "node-name": "disk"}] if writable else found


def guarded(below: str) -> dict[str, object]:
    """A node that answers ENOSYS to every request to punch or zero a range.

    QEMU's FUSE export carries a punched hole out as a discard, which images may ignore, and reports success; file systems
    on a loop device believe that such a range then reads as zeros. After ENOSYS the kernel writes zeros itself.
    """
    rules = [
        {"event": "none", "iotype": kind, "errno": errno.ENOSYS, "once": False} for kind in ("discard", "write-zeroes")
    ]
    return {"driver": "blkdebug", "image": below, "discard": "unmap", "inject-error": rules}


def _forbid_punching(descriptor: int) -> None:
    """From here on the kernel knows that the file cannot be punched; a daemon that can be is none to write through."""
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.fallocate(descriptor, _PUNCH | _KEEP_SIZE, ctypes.c_int64(0), ctypes.c_int64(512))
    if result == 0 or ctypes.get_errno() != errno.EOPNOTSUPP:
        raise errors.HostFailed(
            f"this {PROGRAM} punches holes in a way that is not known: nothing is written through it"
        )


def _file(path: Path, *, locked: bool) -> dict[str, object]:
    """The protocol layer. Formats keep writers away by themselves; ``locked`` does it for raw, which lets them in."""
    is_device = stat.S_ISBLK(path.stat().st_mode)
    file: dict[str, object] = {"driver": "host_device" if is_device else "file", "filename": os.fspath(path)}
    if not locked:
        return file
    keep_out = ["write", "resize"]
    return {
        "driver": "blkdebug",
        "image": file,
        "take-child-perms": ["consistent-read"],
        "unshare-child-perms": keep_out,
    }
