"""Disks of VMs that are off: a qemu-storage-daemon of our own for the length of one operation.

What it promises:

- The daemon never outlives us: it is ended on every way out of ``started`` and by the kernel when we are killed.
- An image opened with ``writable=True`` carries QEMU's own write lock until ``close``.
- After ``create_qcow2``, ``stream``, ``commit`` and ``write_zeroes`` the image's own caches are written out
  (in the page cache at least; a durable file needs an fsync by the caller).
- ``stream`` may be killed at any moment and run again: the header names the old parent until all data
  of it is in the image *and written out*. QEMU alone does not keep that order, see ``stream``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import socket
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors
from hvmgr.host import image_export, image_locks, pids, process, qemu_errors
from hvmgr.host.monitor import COMMAND_S, POLL_S, Monitor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from hvmgr.host import qmp
    from hvmgr.host.image_export import Link
    from hvmgr.model.progress import Progress

PROGRAM = "qemu-storage-daemon"
_FOLDER_PREFIX = "hvmgr-"

# One request of QEMU's block layer stays below 2 GiB.
_ZEROES_MAX = 1 << 30
# What is pulled is read through a socket: pieces that fit a request of NBD, 512 MiB between two reports of progress.
_PULL_MAX = 16 << 20
_PULLS_AT_ONCE = 32
# The namespace follows the host's: a file system that is unmounted here is unmounted there too.
_APART = ("unshare", "--mount", "--propagation", "slave")
# Words on one command line of qemu-io: far below the kernel's limit.
_COMMANDS_MAX = 1000


@dataclass(frozen=True, slots=True)
class Node:
    """An image that the daemon holds open; ``size`` is what a guest would see, in bytes."""

    name: str
    path: Path
    fmt: str
    size: int
    writable: bool


@contextlib.contextmanager
def started(*, on_progress: Callable[[Progress], None] | None = None, apart: bool = False) -> Iterator[Daemon]:
    """A daemon for the length of the block; about 20 ms. Enter and leave in one thread (see ``process.spawned``).

    ``on_progress`` is called in the caller's thread. When it raises, and at Ctrl-C, the job is cancelled first.
    ``apart``: what it mounts (``shown``) is in a mount namespace of its own, as far as that is allowed, and dies with it.
    """
    from hvmgr.host import qmp  # it needs asyncio: commands that start no daemon do without

    ours, theirs = socket.socketpair()
    with contextlib.ExitStack() as stack:
        stack.enter_context(ours)
        with theirs:
            monitor = ("--chardev", f"socket,id=qmp,fd={theirs.fileno()}", "--monitor", "chardev=qmp")
            argv = [*(_APART if apart and os.geteuid() == 0 else ()), PROGRAM, *monitor]
            program = stack.enter_context(process.spawned(argv, pass_fds=[theirs.fileno()]))
        try:
            session = stack.enter_context(qmp.connected(ours, peer=PROGRAM, timeout_s=30))
        except errors.HostFailed as error:
            if words := program.stderr_text().strip():
                raise errors.HostFailed(f"{PROGRAM} did not start: {words}") from error
            raise
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=_FOLDER_PREFIX)))  # mode 0700
        daemon = Daemon(session, program, folder, on_progress)
        yield daemon
        daemon.close_all()


class Daemon(Monitor):
    """The running daemon. Paths are absolute or relative to our working directory, sizes and offsets bytes."""

    def __init__(
        self,
        session: qmp.Session,
        program: process.Spawned,
        folder: Path,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        super().__init__(session, on_progress)
        self._folder = folder
        self._socket = folder / "nbd"
        self._nodes: dict[str, Node] = {}
        self.pid = program.pid
        self.start_time = program.start_time

    @property
    def note(self) -> str:
        """What ``end_left_over`` needs to clean up behind us, should we be killed."""
        return f"{self.pid} {self.start_time} {self._folder}"

    # -- images ---------------------------------------------------------------------------------------------------

    def create_qcow2(self, path: Path, *, size: int, backing: tuple[str, str] | None) -> None:
        """Make a new image, mode 0600; a half-made one does not stay.

        ``backing`` is (name as written into the header, its format); the file it names is not looked at.
        Raises Conflict when ``path`` exists, NotFound when its folder does not.
        """
        path = path.absolute()
        _create_exclusively(path)
        node = self._name("file")
        options: dict[str, object] = {"driver": "qcow2", "file": node, "size": size}
        if backing is not None:
            options |= {"backing-file": backing[0], "backing-fmt": backing[1]}
        try:
            self._execute("blockdev-add", {**_file(path), "node-name": node}, path)
            try:
                self._run_job("blockdev-create", {"options": options}, what=f"create {path.name}", path=path)
            finally:
                self._execute("blockdev-del", {"node-name": node}, path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def open(
        self, path: Path, fmt: str, *, writable: bool, backing: Node | None = None, detached_backing: bool = False
    ) -> Node:
        """Open an image as ``fmt`` (qcow2, raw or vpc; never guessed).

        Its parent is ``backing``, or nothing with ``detached_backing``, or else what its header names. A
        differencing VHD must never get here: QEMU would read its parent as zeros. Raises Conflict when another
        process holds the image, NotFound, and Corrupt when it is not of that format.
        """
        path = path.absolute()
        qemu_errors.require_utf8(path)
        name = self._name("node")
        options: dict[str, object] = {
            "driver": fmt,
            "node-name": name,
            "read-only": not writable,
            "file": _file(path, locked=writable and fmt == "raw"),
        }
        if fmt == "qcow2" and (backing is not None or detached_backing):
            options["backing"] = backing.name if backing is not None else None
        self._execute("blockdev-add", options, path)
        node = Node(name, path, fmt, self._virtual_size(name), writable)
        self._nodes[name] = node
        return node

    @contextlib.contextmanager
    def chain(self, links: Sequence[Link], *, writable: bool = False) -> Iterator[Node]:
        """The disk of a chain (top first) of images that QEMU reads right; none of their parents is taken from a header.

        Nobody else writes any of them during the block. With ``writable`` the top one is written by whoever has the node.
        """
        with contextlib.ExitStack() as stack:
            node = None
            for link in reversed(links):
                if link.format == "raw":  # its driver lets writers in
                    stack.enter_context(image_locks.held(link.path, writable=False))
                is_written = writable and link is links[0]
                detached = node is None
                node = self.open(link.path, link.format, writable=is_written, backing=node, detached_backing=detached)
            assert node is not None
            yield node

    def open_served(self, address: Path) -> Node:
        """What a server of ours has on a socket (NBD), to be read and written."""
        name = self._name("node")
        server = {"type": "unix", "path": os.fspath(address)}
        self._execute("blockdev-add", {"driver": "nbd", "node-name": name, "server": server}, address)
        node = self._nodes[name] = Node(name, address, "nbd", self._virtual_size(name), writable=True)
        return node

    def close(self, node: Node) -> None:
        """Write out and let go of an image, and of its lock. Children first: a parent in use is a Conflict."""
        try:
            self._session.execute("blockdev-del", {"node-name": node.name}, timeout_s=COMMAND_S)
        except qemu_errors.CommandRefused as error:
            raise errors.Conflict(f"'{node.path}' is still in use: {error}", path=str(node.path)) from error
        del self._nodes[node.name]

    def close_all(self) -> None:
        """Close every image that is still open, the last one first."""
        for node in reversed(list(self._nodes.values())):
            self.close(node)

    # -- jobs -----------------------------------------------------------------------------------------------------

    def stream(self, node: Node, *, base: Node | None, backing_file: str | None) -> None:
        """Pull everything between ``node`` and ``base`` (not included) into ``node``; None: everything there is.

        The header then names ``backing_file`` with the format of ``base``.

        QEMU 7.2 writes that header before the tables that point to the pulled data: killed at that moment, the
        image falls back to the data of ``base``, without a word from qemu-img check. So the job stops before
        its last step, the image is flushed, and only then may the header change.
        """
        arguments: dict[str, object] = {"device": node.name, "auto-finalize": False, "auto-dismiss": False}
        if base is not None:
            arguments |= {"base-node": base.name, "backing-file": backing_file or base.path.name}
        with self.exported(node, writable=True) as uri:
            self._run_job(
                "block-stream",
                arguments,
                what=f"stream {node.path.name}",
                path=node.path,
                before_end=lambda: self._io(uri, node, ["flush"]),
            )
            self._io(uri, node, ["flush"])

    def pull(
        self, node: Node, parent: Node, *, base: Node, backing_file: str, ranges: Sequence[tuple[int, int]]
    ) -> None:
        """What ``stream`` does, for a caller who knows which (offset, length) ``node`` still takes from ``parent``.

        QEMU 7.2 streams in steps of 512 KiB over the whole disk, data or not: 8 s for an empty TiB. Here only the
        ranges are touched, at less than half of stream's speed for each byte. It may be killed and run again like ``stream``:
        the header changes last. ``base`` is qcow2: QEMU writes the image's own format as that of the new parent.
        """
        assert base.fmt == node.fmt == "qcow2", "QEMU would state a wrong format"
        what = f"stream {node.path.name}"
        try:
            self._pull_ranges(node, parent, ranges, what)
        except errors.HostFailed:
            # Whoever reads hears of a full disk as an I/O error; the job says what it is.
            self.stream(node, base=base, backing_file=backing_file)
            return
        self.flush(node)
        change: dict[str, object] = {"device": node.name, "image-node-name": node.name, "backing-file": backing_file}
        self._execute("change-backing-file", change, node.path)
        self.flush(node)

    def _pull_ranges(self, node: Node, parent: Node, ranges: Sequence[tuple[int, int]], what: str) -> None:
        name = self._name("pull")
        options = {"driver": "copy-on-read", "node-name": name, "file": node.name, "bottom": parent.name}
        self._execute("blockdev-add", {**options}, node.path)
        through = self._nodes[name] = dataclasses.replace(node, name=name, writable=False)
        pieces, done = list(_pieces(ranges, _PULL_MAX)), 0
        total = sum(length for _, length in pieces)
        try:
            with self.exported(through) as uri:
                for first in range(0, len(pieces), _PULLS_AT_ONCE):
                    part = pieces[first : first + _PULLS_AT_ONCE]
                    self._report_bytes(done, total, what)
                    self._io(uri, node, [f"read {start} {length}" for start, length in part], read_only=True)
                    done += sum(length for _, length in part)
        finally:
            self.close(through)
        self._report_bytes(total, total, what)

    def commit(self, top: Node, base: Node) -> None:
        """Write what ``top`` and all below it down to ``base`` hold into ``base``, which then equals ``top``.

        Both have to be open for writing: QEMU makes ``base`` as read-only as ``top`` at the end, and would drop the
        lock. ``top`` stays as it is, so a commit that was killed is simply run again. Unsupported when the sizes
        differ: QEMU resizes ``base`` first, and killed at that moment ``top`` would show old data from below it.
        """
        assert top.writable and base.writable, "a commit needs both images open for writing"  # noqa: PT018
        if base.size != top.size:
            raise errors.Unsupported(
                f"'{base.path}' has another size than '{top.path}'",
                hint="merge in the other direction",
                path=str(base.path),
            )
        arguments = {"device": top.name, "base-node": base.name, "auto-finalize": True, "auto-dismiss": False}
        self._run_job("block-commit", arguments, what=f"commit {top.path.name}", path=base.path)
        self.flush(base)

    def resize(self, node: Node, size: int) -> None:
        """The disk has another size; what is new reads as zeros, whatever the parents have there.

        Unsupported where the format or the file cannot. The header changes last: killed in between, it is as it was.
        """
        self._execute("block_resize", {"node-name": node.name, "size": size}, node.path)
        self._nodes[node.name] = dataclasses.replace(node, size=size)

    def drop_bitmaps(self, node: Node) -> list[str]:
        """Remove the dirty bitmaps of an image that is open for writing, and give their names.

        After a commit into it they would tell a backup tool less than what changed.
        """
        nodes = self._query("query-named-block-nodes", {"flat": True})
        found = next(one for one in nodes if one["node-name"] == node.name).get("dirty-bitmaps", [])
        names = [str(one["name"]) for one in found]
        for name in names:
            self._execute("block-dirty-bitmap-remove", {"node": node.name, "name": name}, node.path)
        return names

    # -- bytes ----------------------------------------------------------------------------------------------------

    def write_zeroes(self, node: Node, ranges: Sequence[tuple[int, int]]) -> None:
        """Make each (offset, length) read as zeros from this image itself, whatever its parents hold there."""
        commands = [f"write -z -u {start} {length}" for start, length in _pieces(ranges)]
        if not commands:
            return
        with self.exported(node, writable=True) as uri:
            for first in range(0, len(commands), _COMMANDS_MAX):
                self._io(uri, node, commands[first : first + _COMMANDS_MAX])
            self._io(uri, node, ["flush"])

    def flush(self, node: Node) -> None:
        """Write out the image's caches and sync its file; raises when that fails, which ``close`` cannot."""
        with self.exported(node, writable=True) as uri:
            self._io(uri, node, ["flush"])

    @contextlib.contextmanager
    def exported(self, node: Node, *, writable: bool = False) -> Iterator[str]:
        """The NBD URI under which the disk's bytes are served on a private socket during the block."""
        export = self._add_export(node, writable=writable)
        try:
            yield f"nbd+unix:///{export}?socket={self._socket}"
        finally:
            self._remove_export(export)

    @contextlib.contextmanager
    def shown(self, node: Node, mountpoint: Path, *, start: int, size: int) -> Iterator[Path]:
        """A part of the disk as a file that programs can write, by FUSE on ``mountpoint``, an empty file; the file's path.

        The path leads through the daemon's own mount namespace. Unsupported where QEMU cannot export so.
        """
        window = self._name("window")
        below = image_export.guarded(node.name)
        options = {"driver": "raw", "node-name": window, "offset": start, "size": size, "file": below}
        self._execute("blockdev-add", options, node.path)
        export = self._name("export")
        arguments = {"type": "fuse", "id": export, "node-name": window, "mountpoint": os.fspath(mountpoint)}
        try:
            try:
                self._session.execute(
                    "block-export-add", {**arguments, "writable": True, "allow-other": "off"}, timeout_s=COMMAND_S
                )
            except qemu_errors.CommandRefused as error:
                raise image_export.explained(str(error), node.path) from error
            try:
                yield Path(f"/proc/{self.pid}/root") / mountpoint.relative_to("/")
            finally:
                self._remove_export(export)
        finally:
            self._execute("blockdev-del", {"node-name": window}, node.path)

    def _add_export(self, node: Node, *, writable: bool) -> str:
        if not self._socket.exists():
            address = {"type": "unix", "data": {"path": os.fspath(self._socket)}}
            self._execute("nbd-server-start", {"addr": address}, node.path)
        export = self._name("export")
        arguments = {"type": "nbd", "id": export, "name": export, "node-name": node.name, "writable": writable}
        self._execute("block-export-add", arguments, node.path)
        return export

    def _remove_export(self, export: str) -> None:
        # "hard": a client that has just said good-bye may still be in the books.
        with contextlib.suppress(qemu_errors.CommandRefused):
            self._session.execute("block-export-del", {"id": export, "mode": "hard"}, timeout_s=COMMAND_S)
        while any(entry["id"] == export for entry in self._query("query-block-exports")):
            self._session.wait_event(POLL_S)

    def _io(self, uri: str, node: Node, commands: Sequence[str], *, read_only: bool = False) -> None:
        options = ["-r"] if read_only else []
        options += [word for command in commands for word in ("-c", command)]
        try:
            process.run(["qemu-io", "-f", "raw", *options, uri], timeout_s=COMMAND_S * len(commands))
        except errors.HostFailed as error:
            self._query("query-jobs")  # a daemon that is gone says so here, with the right error
            raise qemu_errors.translated(str(error.facts.get("words", error)), node.path) from error

    def _virtual_size(self, name: str) -> int:
        nodes = self._query("query-named-block-nodes", {"flat": True})
        return next(int(node["image"]["virtual-size"]) for node in nodes if node["node-name"] == name)


def end_left_over(note: str) -> None:
    """The daemon of a process that was killed is gone, and so is its folder. A note that is no note is ignored."""
    try:
        pid, started, folder = note.split(maxsplit=2)
        pids.end_left_over(int(pid), int(started))
    except ValueError:
        return
    place = Path(folder.strip())
    if place.parent == Path(tempfile.gettempdir()) and place.name.startswith(_FOLDER_PREFIX):
        shutil.rmtree(place, ignore_errors=True)


def _create_exclusively(path: Path) -> None:
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    except FileExistsError as error:
        raise errors.Conflict(f"'{path}' exists already", path=str(path)) from error
    except FileNotFoundError as error:
        raise errors.NotFound(f"the folder of '{path}' does not exist", path=str(path)) from error
    except OSError as error:
        raise qemu_errors.translated(f"cannot create it: {error.strerror}", path) from error


def _file(path: Path, *, locked: bool = False) -> dict[str, object]:
    """The protocol layer of an image.

    ``locked``: qcow2 and vpc take QEMU's write lock on their file as soon as they are opened for writing; the raw
    driver does so only while somebody writes through it. blkdebug, a filter, can be told to take it from the start.
    """
    try:
        is_device = stat.S_ISBLK(path.stat().st_mode)
    except OSError:
        is_device = False  # QEMU says it better
    file: dict[str, object] = {"driver": "host_device" if is_device else "file", "filename": os.fspath(path)}
    if not locked:
        return file
    exclusive = ["write"]
    return {"driver": "blkdebug", "image": file, "take-child-perms": exclusive, "unshare-child-perms": exclusive}


def _pieces(ranges: Sequence[tuple[int, int]], largest: int = _ZEROES_MAX) -> Iterator[tuple[int, int]]:
    for offset, length in ranges:
        for start in range(offset, offset + length, largest):
            yield start, min(largest, offset + length - start)
