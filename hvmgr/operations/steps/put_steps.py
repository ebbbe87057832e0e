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
    with session.lent(step.parent):
        session.putting.write(session, step)
    durable.sync_file(Path(step.child))


def unput(_session: Session, step: plan.PutFiles) -> None:
    """Nothing shows the image any more; the step that made it removes it."""
    exporting.clear(Path(step.work))
