"""One volume of a chain as an ordinary file that programs write: a storage daemon of ours shows it by FUSE. No root, no mount.

What is encrypted goes through this process: the daemon that shows the file has it in clear from a server of ours, which reads and
writes its sectors encrypted, by the daemon that has the images open. The key stays here.

The daemon dies with this process, and with it, for root, the mount namespace that the file is in. An ordinary user's dead
export is left in his runtime folder; ``clear`` takes it away.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr.host import file_systems, image_export, nbd_client, process, storage_daemon
from hvmgr.host.image_export import Link
from hvmgr.host.nbd_server import Server
from hvmgr.os_errors import explained
from hvmgr.storage import durable

if TYPE_CHECKING:
    from hvmgr.host.nbd_client import Client
    from hvmgr.host.storage_daemon import Daemon, Node
    from hvmgr.operations.inside.looking import Place
    from hvmgr.storage.filesystems.luks import Decrypted

_FILE, _SOCKET = "volume", "clear"
_PIECE = 1 << 20


def require() -> None:
    """Unsupported where this user cannot have such a file."""
    image_export.require_for_users()
    process.require("unshare" if os.geteuid() == 0 else "fusermount3")


@contextlib.contextmanager
def shown(links: Sequence[Link], work: Path, place: Place) -> Iterator[Path]:
    """A volume as a file; all writes go into the first of the links, the top one. Nobody else writes any of them.

    ``work`` is a folder for it, which is gone afterwards. What was written is in the image when the block has ended.
    """
    durable.make_folder(work.parent, mode=0o711)
    durable.make_folder(work, mode=0o700)
    try:
        mountpoint = work / _FILE
        mountpoint.touch(0o600)
        with contextlib.ExitStack() as stack:
            daemon = stack.enter_context(storage_daemon.started(apart=place.lock is None))
            node = stack.enter_context(daemon.chain(links, writable=True))
            if place.lock is not None:
                daemon, node = stack.enter_context(_in_clear(daemon, node, place.lock, work / _SOCKET))
            yield stack.enter_context(daemon.shown(node, mountpoint, start=place.start, size=place.size))
    finally:
        clear(work)


@contextlib.contextmanager
def _in_clear(daemon: Daemon, node: Node, lock: Decrypted, address: Path) -> Iterator[tuple[Daemon, Node]]:
    """Another daemon, and what is encrypted on the node in clear there. In two of them neither waits for itself."""
    with contextlib.ExitStack() as stack:
        uri = stack.enter_context(daemon.exported(node, writable=True))
        server = Server(_Clear(stack.enter_context(nbd_client.connected(uri)), lock), writable=True)
        with server.listening(address), storage_daemon.started(apart=True) as other:
            yield other, other.open_served(address)
        with explained(node.path):
            server.flush()


class _Clear:
    """What is encrypted on a disk, as the server wants it."""

    def __init__(self, client: Client, lock: Decrypted) -> None:
        self._client, self._lock = client, lock.moved(client, lock.start)
        self.size = lock.size

    def stretches(self, offset: int = 0, length: int | None = None) -> Iterator[tuple[int, int, bool]]:
        yield offset, self.size - offset if length is None else length, True

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._lock.read_into(offset, buffer)

    def write(self, offset: int, data: memoryview) -> None:
        self._client.write(*self._lock.encrypted(offset, data))
        self._client.settle()  # who is told that it is written is told what went wrong, too

    def write_zeros(self, offset: int, length: int) -> None:
        for at in range(offset, offset + length, _PIECE):
            self.write(at, memoryview(bytes(min(_PIECE, offset + length - at))))

    def flush(self) -> None:
        self._client.flush()


def clear(work: Path) -> None:
    """Nothing is left of what a process that died showed there."""
    file = work / _FILE
    if file_systems.at(str(file)) is not None:
        file_systems.unmount_as_user(str(file), lazily=True)
    durable.remove_folder(work)
