"""How files get into an image: the step between the making of a snapshot's new images and the switch to them."""

from __future__ import annotations

from pathlib import Path

from hvmgr.model import plan
from hvmgr.operations.inside import exporting
from hvmgr.operations.session import Session
from hvmgr.storage import durable


def put(session: Session, step: plan.PutFiles) -> None:
    """All files are in the image and on disk. What it stands on is ours again afterwards, until the switch."""
    assert session.putting is not None, "only who has the files runs the plan: a dead command's is undone"
    spool = _spool(session, step)
    durable.make_folder(spool.parent)
    durable.make_folder(spool, mode=0o700)
    with session.lent(step.parent):
        session.putting.write(session, step, spool)
    durable.sync_file(Path(step.child))
    durable.remove_folder(spool)


def unput(session: Session, step: plan.PutFiles) -> None:
    """Nothing shows the image any more; the step that made it removes it. No copy of a content is left."""
    exporting.clear(Path(step.work))
    durable.remove_folder(_spool(session, step))


def _spool(session: Session, step: plan.PutFiles) -> Path:
    """Where there is room for what is copied on the way: in the home, or below /run."""
    if step.in_memory:
        return Path(f"{step.work}-copies")
    return session.layout.private / f"put-{Path(step.work).name}"
