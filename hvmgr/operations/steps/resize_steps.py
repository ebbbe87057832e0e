"""How a disk gets another size.

A larger one it has at one moment: when the image's header, or a raw file's length, says so. A smaller one with a GPT begins
with the table's second copy, which moves to the new end; from then on it is completed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from hvmgr.host import nbd_client
from hvmgr.host.storage_daemon import Node
from hvmgr.model import plan
from hvmgr.operations.session import Session
from hvmgr.storage import durable, images, partitions


def resize(session: Session, step: plan.ResizeDisk) -> None:
    """The image has its new size, on disk; a running guest sees it."""
    if _has_size(step):
        return
    if session.is_active():
        _resize_running(session, step)
        return
    with _opened(session, step) as node:
        if step.size < step.old:
            _fit_table(session, node, step.size)
        session.daemon.resize(node, step.size)
        session.daemon.flush(node)
    durable.sync_file(Path(step.path))


def is_resized(session: Session, step: plan.ResizeDisk) -> bool:
    """Whether the image has its new size, or has begun to get it."""
    return _has_size(step) or (step.size < step.old and not session.is_active() and _is_fitted(session, step))


def _has_size(step: plan.ResizeDisk) -> bool:
    return images.read(Path(step.path), step.format).size == step.size


def _resize_running(session: Session, step: plan.ResizeDisk) -> None:
    if step.size > step.old:
        session.domain().resize_disk(step.slot, step.size)
    else:  # others started it after a command had died
        session.say(
            f"disk {step.slot} keeps its size, because {session.home.name} was started; resize it again when it is off"
        )


@contextlib.contextmanager
def _opened(session: Session, step: plan.ResizeDisk) -> Iterator[Node]:
    """The image with its parents: what they hold behind the old end must not come to light."""
    if session.is_held(step.path):
        yield session.hold_whole(step.path)
        return
    node = session.daemon.open(Path(step.path), step.format, writable=True)
    try:
        yield node
    finally:
        session.daemon.close(node)


def _fit_table(session: Session, node: Node, size: int) -> None:
    """A GPT's second copy lies at the new end; the table is whole before and after each of these writes."""
    with session.daemon.exported(node, writable=True) as uri, nbd_client.connected(uri) as disk:
        for offset, data in partitions.fitted(disk, size):
            disk.write(offset, data)
            disk.flush()


def _is_fitted(session: Session, step: plan.ResizeDisk) -> bool:
    with (
        _opened(session, step) as node,
        session.daemon.exported(node) as uri,
        nbd_client.connected(uri) as disk,
    ):
        table = partitions.read(disk)
    return table is not None and table.made_for == step.size
