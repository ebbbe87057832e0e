"""How a disk gets another size. It happens at one moment: when the image's header, or a raw file's length, says so."""

from __future__ import annotations

from pathlib import Path

from hvmgr.host import nbd_client
from hvmgr.host.storage_daemon import Node
from hvmgr.model import plan
from hvmgr.operations.session import Session
from hvmgr.storage import durable, images, partitions


def resize(session: Session, step: plan.ResizeImage) -> None:
    """The image has its new size, on disk; a running guest sees it."""
    if is_resized(session, step):
        return
    domain = session.domain()
    if domain.is_active():
        domain.resize_disk(step.slot, step.size)
        return
    # With its parents: what they hold behind the old end must not come to light.
    node = session.hold_whole(step.path)
    if step.size < step.old:
        _fit_table(session, node, step.size)
    session.daemon.resize(node, step.size)
    session.daemon.flush(node)
    durable.sync_file(Path(step.path))


def is_resized(_session: Session, step: plan.ResizeImage) -> bool:
    """Whether the image has its new size."""
    return images.read(Path(step.path), step.format).size == step.size


def _fit_table(session: Session, node: Node, size: int) -> None:
    """A GPT's second copy lies at the new end; the table is whole before and after each of these writes."""
    with session.daemon.exported(node, writable=True) as uri, nbd_client.connected(uri) as disk:
        for offset, data in partitions.fitted(disk, size):
            disk.write(offset, data)
            disk.flush()
