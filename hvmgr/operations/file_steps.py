"""How the steps that concern files beside the images are done and undone."""

from __future__ import annotations

from pathlib import Path

from hvmgr.model import plan
from hvmgr.model.layout import CONFIGURATIONS
from hvmgr.operations.session import Session
from hvmgr.storage import durable, index


def make_home(session: Session, _step: plan.MakeHome) -> None:
    """All folders are there; the home itself and its private folder were made for the journal."""
    for folder in session.layout.folders():
        durable.make_folder(folder)


def unmake_home(session: Session, _step: plan.MakeHome) -> None:
    """Only the journal is left."""
    for folder in reversed(session.layout.folders()):
        if folder not in (session.layout.private, session.layout.home):
            durable.remove_empty_folder(folder)


def copy_file(session: Session, step: plan.CopyFile) -> None:
    """The copy is complete and on disk."""
    durable.copy_file(Path(step.source), Path(step.target), owner=session.owner)


def uncopy_file(_session: Session, step: plan.CopyFile) -> None:
    """The copy is not there."""
    durable.remove(Path(step.target))


def copy_folder(_session: Session, step: plan.CopyFolder) -> None:
    """The copy is complete and on disk."""
    durable.copy_folder(Path(step.source), Path(step.target))


def uncopy_folder(_session: Session, step: plan.CopyFolder) -> None:
    """The copy is not there."""
    durable.remove_folder(Path(step.target))


def replace_folder(_session: Session, step: plan.ReplaceFolder) -> None:
    """The folder is a copy of the source."""
    if Path(step.source).is_dir():
        durable.copy_folder(Path(step.source), Path(step.target))


def remove_folder(_session: Session, step: plan.RemoveFolder) -> None:
    """The folder is not there."""
    durable.remove_folder(Path(step.path))


def make_snapshot_folder(session: Session, step: plan.MakeSnapshotFolder) -> None:
    """The folder is there."""
    durable.make_folder(session.layout.snapshot_folder(step.snapshot_id))


def unmake_snapshot_folder(session: Session, step: plan.MakeSnapshotFolder) -> None:
    """The folder is not there."""
    durable.remove_folder(session.layout.snapshot_folder(step.snapshot_id))


def write_snapshot(session: Session, step: plan.WriteSnapshot) -> None:
    """The snapshot is in the tree."""
    durable.write_file(session.layout.snapshot(step.snapshot_id), step.xml.encode())
    session.forget_uses()


def remove_snapshot(session: Session, step: plan.RemoveSnapshot) -> None:
    """The snapshot is not in the tree, and its saved state is gone."""
    durable.remove(session.layout.snapshot(step.snapshot_id))
    durable.remove_folder(session.layout.snapshot_folder(step.snapshot_id))
    session.forget_uses()


def replace_file(session: Session, step: plan.ReplaceFile) -> None:
    """The file has the new content."""
    durable.write_file(Path(step.path), step.text.encode())
    session.forget_uses()


def remove_file(session: Session, step: plan.RemoveFile) -> None:
    """The file is not there."""
    durable.remove(Path(step.path))
    session.forget_uses()


def remove_home(session: Session, _step: plan.RemoveHome) -> None:
    """Nothing of hvmgr's is left but the journal; folders that still hold something stay."""
    layout = session.layout
    index.forget(layout.vm_id)
    durable.remove_folder(layout.vm_folder)
    durable.remove_folder(layout.frozen)
    durable.remove_empty_folder(layout.images)
    durable.remove_empty_folder(layout.snapshots)
    durable.remove_empty_folder(layout.bases)
    durable.remove(layout.configuration)
    durable.remove_empty_folder(layout.home / CONFIGURATIONS)


def remove_private(session: Session) -> None:
    """The journal and the lock are gone, and the home when nothing else is in it."""
    durable.remove_folder(session.layout.trash)
    durable.remove_folder(session.layout.private)
    durable.remove_empty_folder(session.layout.home)
