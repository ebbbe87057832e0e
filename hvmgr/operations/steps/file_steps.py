"""How the steps that concern files beside the images are done and undone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from hvmgr.host import confinement, saved_state
from hvmgr.model import configuration, plan
from hvmgr.model.layout import CONFIGURATIONS
from hvmgr.model.metadata import SavedState
from hvmgr.operations.session import Session
from hvmgr.storage import durable, index, vm_home


def make_home(session: Session, _step: plan.MakeHome) -> None:
    """All folders are there; the home itself and its private folder were made for the journal."""
    for folder in session.layout.folders():
        durable.make_folder(folder)
        if not confinement.label(folder) and folder == session.layout.home:
            session.say(f"SELinux is on, and {folder} cannot be labelled for QEMU: hvmgr doctor says what to do")


def unmake_home(session: Session, _step: plan.MakeHome) -> None:
    """Only the journal is left."""
    for folder in reversed(session.layout.folders()):
        if folder not in (session.layout.private, session.layout.home):
            durable.remove_empty_folder(folder)


def note_uses(session: Session, step: plan.NoteUses) -> None:
    """The index knows the home and what it needs."""
    index.record(index.Entry(session.home.vm_id, step.name, session.home.path, session.connection.uri, step.paths))


def unnote_uses(_session: Session, _step: plan.NoteUses) -> None:
    """Nothing yet: the index leads to the journal until that is gone, and ``remove_private`` then forgets the VM."""


def take_file(session: Session, step: plan.TakeFile) -> None:
    """The file has our name as well, or there is a copy of it."""
    durable.link_or_copy(Path(step.source), Path(step.target), owner=session.owner)


def untake_file(_session: Session, step: plan.TakeFile) -> None:
    """Our name for it is gone."""
    durable.remove(Path(step.target))


def drop_old_name(session: Session, step: plan.DropOldName) -> None:
    """The old name is gone, unless something else than what was taken has it by now."""
    old, kept = Path(step.path), Path(step.kept)
    if not old.exists():
        return
    if kept.exists() and durable.is_same_or_copy(old, kept):
        durable.remove(old)
    else:
        session.say(f"{old} has changed since it was taken: it stays")


def copy_file(session: Session, step: plan.CopyFile) -> None:
    """The copy is complete and on disk."""
    durable.copy_file(Path(step.source), Path(step.target), owner=session.owner, plain=step.plain)


def uncopy_file(_session: Session, step: plan.CopyFile) -> None:
    """The copy is not there."""
    durable.remove(Path(step.target))


def copy_folder(_session: Session, step: plan.CopyFolder) -> None:
    """The copy is complete and on disk."""
    durable.make_folder(Path(step.target).parent)  # libvirt's own for TPM states, on a host that never had one
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
    """The snapshot is in the tree, all that it consists of on disk."""
    folder = session.layout.snapshot_folder(step.snapshot_id)
    for file in folder.iterdir() if folder.is_dir() else ():
        if file.is_file():
            durable.sync_file(file)
    durable.write_file(session.layout.snapshot(step.snapshot_id), _with_true_state(session, step).encode())
    session.forget_uses()


def unwrite_snapshot(session: Session, step: plan.WriteSnapshot) -> None:
    """The snapshot is not in the tree; its folder is another step's matter."""
    durable.remove(session.layout.snapshot(step.snapshot_id))
    session.forget_uses()


def _with_true_state(session: Session, step: plan.WriteSnapshot) -> str:
    """A snapshot whose memory did not come through is one without saved state."""
    snapshot = configuration.parse(step.xml, source="the plan")
    facts = vm_home.require_facts(snapshot)
    assert facts.snapshot is not None
    if facts.snapshot.state is SavedState.NONE or saved_state.is_complete(session.layout.memory(step.snapshot_id)):
        return step.xml
    session.say(f"the memory of snapshot '{facts.snapshot.name}' was not saved completely: it has its disks alone")
    durable.remove(session.layout.memory(step.snapshot_id))
    record = dataclasses.replace(facts.snapshot, state=SavedState.NONE)
    snapshot.set_metadata(dataclasses.replace(facts, snapshot=record))
    return snapshot.to_xml()


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
    """Nothing of hvmgr's is left but the journal; folders that still hold something stay.

    The configuration goes first: without it there is no VM, and no earlier step of a deletion is looked at again.
    """
    layout = session.layout
    durable.remove(layout.configuration)
    durable.remove_folder(layout.vm_folder)
    durable.remove_folder(layout.frozen)
    durable.remove_empty_folder(layout.images)
    durable.remove_empty_folder(layout.snapshots)
    durable.remove_empty_folder(layout.bases)
    for name, place in layout.links():
        if not place.exists():
            durable.remove(name)
            durable.remove_empty_folder(place.parent)
    durable.remove_empty_folder(layout.home / CONFIGURATIONS)


def leave_home(session: Session, _step: plan.LeaveHome) -> None:
    """Of hvmgr's nothing is left but the journal; whatever holds data of a guest is where it was.

    The configuration goes first, as in ``remove_home``.
    """
    layout = session.layout
    durable.remove(layout.configuration)
    durable.remove(layout.undo)
    for file in vm_home.snapshot_files(layout):
        durable.remove(file)
    durable.remove_folder(layout.frozen)
    for folder in (layout.snapshots, layout.vm_folder):
        for inner in folder.iterdir() if folder.is_dir() else ():
            durable.remove_empty_folder(inner)
        durable.remove_empty_folder(folder)
    durable.remove_empty_folder(layout.bases)
    durable.remove_empty_folder(layout.home / CONFIGURATIONS)


def remove_private(session: Session) -> None:
    """The journal and the lock are gone, and the home when nothing else is in it."""
    layout = session.layout
    for entry in layout.private.iterdir():
        if entry.is_dir():
            durable.remove_folder(entry)
        elif entry not in (layout.journal, layout.lock):
            durable.remove(entry)
    if all(one.home == layout.home for one in index.entries() if one.vm_id == layout.vm_id):  # not of a VM that moved
        index.forget(layout.vm_id)  # it leads to homes outside the root, and so to their journals
    durable.remove(layout.journal)  # as long as something else is there, so is the journal that removes it
    durable.remove_folder(layout.private)
    durable.remove_empty_folder(layout.home)
