"""How a disk that arrives as a stream gets into an image."""

from __future__ import annotations

from pathlib import Path

from hvmgr.host import nbd_client, qemu_img
from hvmgr.model import plan
from hvmgr.operations.session import Session
from hvmgr.storage import contents, durable, images


def receive(session: Session, step: plan.ReceiveDisk) -> None:
    """All has arrived and is on disk. What it is written over is ours until the switch."""
    child, stream = Path(step.child), session.arriving
    assert stream is not None, "only who has the stream runs the plan: a dead command's is undone"
    size = images.read(child, images.QCOW2).size
    extents = qemu_img.map(Path(step.parent), step.parent_format, force_share=True)
    below = [(one.start, min(one.length, size - one.start)) for one in extents if one.data and not one.zero]
    daemon = session.daemon
    node = daemon.open(child, images.QCOW2, writable=True, backing=session.hold_whole(step.parent))
    try:
        with (
            durable.explained(child),
            daemon.exported(node, writable=True) as uri,
            nbd_client.connected(uri) as client,
        ):
            stream.write(client, size, below, session.progress)
    finally:
        daemon.close(node)
    durable.sync_file(child)
    if step.uuid is not None:  # before anybody can write it
        contents.note(session.layout.contents, child, step.uuid)


def unreceive(session: Session, step: plan.ReceiveDisk) -> None:
    """Nothing is known of the image, which the step that made it removes."""
    contents.forget(session.layout.contents, Path(step.child))
