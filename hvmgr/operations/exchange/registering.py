"""``import --mode register``: the source's folder becomes the home. Nothing is copied, every change can go back.

What has to change: the modes (an export is read-only), the paths in the configurations when the folder has moved, and
with a new id the names of files that are ids. The present is written last, by libvirt's own word.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors
from hvmgr.host import saved_state
from hvmgr.model import manifest, plan
from hvmgr.model.layout import Layout
from hvmgr.model.plan import Plan, Step
from hvmgr.operations import occasions
from hvmgr.operations.exchange import import_, importing
from hvmgr.operations.exchange.intake import Intake
from hvmgr.operations.session import Session
from hvmgr.operations.steps import execution
from hvmgr.operations.vm import VM
from hvmgr.storage import durable, frozen, locks, source_configurations
from hvmgr.storage.source_home import SourceHome
from hvmgr.storage.vm_home import VmHome

if TYPE_CHECKING:
    from hvmgr.operations.exchange.compare import Comparison
    from hvmgr.operations.host import Host

_FOLDER = 0o711
_TPM_FOLDER = 0o700


def run(host: Host, comparison: Comparison) -> VM:
    """The folder is a VM; when it raises, the folder is what it was."""
    home = VmHome(comparison.layout)
    change = Session.new_id()
    session = Session(home, host.connection, host.reporter, wait_s=host.wait_s)
    try:
        one = plan_register(session, comparison, change)
        session.require_approval(one)
    finally:
        session.close()
    layout = home.layout
    durable.make_folder(layout.private)
    with locks.held(layout.lock, wait_s=host.wait_s, what=f"the VM in {home.path}"):
        _require_as_planned(comparison.source, layout)
        session = Session(home, host.connection, host.reporter, wait_s=host.wait_s, occasions=host.occasions)
        try:
            who = comparison.identity.name
            with occasions.operation(session, one, name=who, path=comparison.source.origin, is_approved=True):
                importing.note_home(session, comparison)
                execution.run(session, one)
        finally:
            session.close()
    return VM(host, home)


def _require_as_planned(source: SourceHome, layout: Layout) -> None:
    """Nobody else has registered the folder, or begun to, while the lock was waited for."""
    try:
        with durable.explained(source.file):
            is_same = source_configurations.read(source.file).to_xml() == source.present.to_xml()
    except (errors.NotFound, errors.Corrupt):
        is_same = False
    if not is_same or layout.journal.exists():
        raise errors.Conflict(f"{source.folder} was changed meanwhile", hint="run the command again")


def plan_register(session: Session, comparison: Comparison, change: str) -> Plan:
    """Every step of it; nothing was touched."""
    source, layout = comparison.source, session.layout
    taken = _take_in(session, comparison)
    renames = list(_renames(taken))
    disks = disks_of(taken, source.disks)
    nvram = _moved_nvram(taken, source.present.nvram)
    outside = tuple(path for path, image in source.images.items() if not image.inside)
    prepare: list[Step] = [
        plan.NoteUse(name=taken.identity.name, outside=outside, beside=None),  # so that the journal here is found
        plan.SetModes(modes=tuple(_modes(taken))),
        *renames,
        plan.TakeHome(home=str(layout.home), vm_id=layout.vm_id, made=tuple(_lacking(source.layout, layout))),
        *_texts(taken),
        *_parents(taken),
        *_memories(taken),
    ]
    finish: list[Step] = [plan.WritePresent(), plan.RecordFrozen(paths=tuple(sorted(frozen_of(taken))))]
    finish += [plan.RemoveFile(path=str(layout.home / name)) for name in (manifest.FILE, manifest.SUMS)]
    finish += _without_state(taken)
    state, rest = _state_of_present(session, taken, disks, nvram)
    return Plan(
        plan_id=change,
        vm_id=layout.vm_id,
        operation="import",
        subject=f"registration of {taken.identity.name} in {layout.home}",
        prepare=(*prepare, *state),
        switch=plan.Define(xml=taken.present(change=change, nvram=nvram, disks=disks).to_xml()),
        finish=(*finish, *rest),
    )


def _take_in(session: Session, comparison: Comparison) -> Intake:
    source, layout = comparison.source, session.layout
    old = source.layout
    places = {path: str(_renamed(Path(path), old, layout)) for path in source.images}
    return Intake(
        source=source,
        options=comparison.options,
        origin=source.as_origin(comparison.options.mode),
        maps=comparison.maps,
        used=comparison.used,
        identity=comparison.identity,
        layout=layout,
        uri=session.connection.uri,
        now=session.now(),
        new_id=session.new_id,
        snapshots=comparison.snapshots,
        places=places,
        emulators=session.connection.capabilities().emulators,
    )


def _renamed(path: Path, old: Layout, new: Layout) -> Path:
    """A file's name when the folders that are named after the VM have its new id."""
    for before, after in ((old.images, new.images), (old.vm_folder, new.vm_folder)):
        if path.is_relative_to(before):
            return after / path.relative_to(before)
    return path


def disks_of(taken: Intake, disks: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Disks by slot as (path, format), under their new names."""
    return {slot: (taken.places[path], taken.source.images[path].format) for slot, path in disks.items()}


def _moved_nvram(taken: Intake, recorded: Path | None) -> Path | None:
    """Where the NVRAM of a present lies after the move, there or still to be made by a start."""
    source = taken.source
    if recorded is None or not recorded.is_relative_to(source.recorded_home):
        return recorded
    return _renamed(source.folder / recorded.relative_to(source.recorded_home), source.layout, taken.layout)


# --- steps ----------------------------------------------------------------------------------------------------------


def _renames(taken: Intake) -> Iterator[Step]:
    """Files whose names are ids, in an order in which parents of names come first."""
    old, new = taken.source.layout, taken.layout
    pairs = [(old.configuration, new.configuration), (old.vm_folder, new.vm_folder), (old.images, new.images)]
    for one in taken.source.snapshots:
        new_id = taken.identity.snapshot(one.record.id) or one.record.id
        pairs.append((old.snapshot(one.record.id), new.snapshot(new_id)))
        pairs.append((old.snapshot_folder(one.record.id), new.snapshot_folder(new_id)))
    for before, after in pairs:
        if before != after and before.exists():
            yield plan.RenameFile(source=str(before), target=str(after))


def _lacking(old: Layout, new: Layout) -> Iterator[str]:
    renamed = {new.vm_folder: old.vm_folder, new.images: old.images}
    for folder in new.folders():
        if folder != new.private and not folder.exists() and not renamed.get(folder, folder).exists():
            yield str(folder)


def _texts(taken: Intake) -> Iterator[Step]:
    """The configurations of snapshots and undo slot."""
    layout = taken.layout
    for one in taken.source.snapshots:
        path = layout.snapshot(taken.identity.snapshot(one.record.id) or one.record.id)
        before, after = one.file.read_text("utf-8"), taken.snapshot(one).to_xml()
        if before != after:
            yield plan.ChangeFile(path=str(path), before=before, after=after)
    undo = taken.source.undo
    if undo is not None:
        disks = disks_of(taken, {slot: path for slot, path in taken.source.undo_disks.items() if path in taken.places})
        text = taken.undo(undo, disks, _moved_nvram(taken, undo.nvram)).to_xml()
        yield plan.ChangeFile(path=str(layout.undo), before=taken.source.layout.undo.read_text("utf-8"), after=text)


def _parents(taken: Intake) -> Iterator[Step]:
    """Headers that name their parents by paths of the place where the home was."""
    frozen_now = frozen_of(taken)
    for image in taken.source.images.values():
        if image.parent is None or image.backing is None or image.parent not in taken.places:
            continue
        beside = os.path.normpath(os.path.join(os.path.dirname(image.path), image.backing))  # noqa: PTH118, PTH120
        if os.path.realpath(beside) == image.parent:
            continue  # also after a folder was renamed: names within the home are relative
        child, parent = Path(taken.places[image.path]), taken.places[image.parent]
        assert image.parent_format is not None
        yield plan.NameParent(
            path=str(child),
            parent=taken.layout.parent_name(child, parent),
            parent_format=image.parent_format,
            before=image.backing,
            mode=frozen.FROZEN_MODE if str(child) in frozen_now else frozen.WORKING_MODE,
        )


def _memories(taken: Intake) -> Iterator[Step]:
    """The configurations inside saved states."""
    for one in taken.source.snapshots:
        if one.memory is None or one.saved is None or not taken.keeps_state(one):
            continue
        new_id = taken.identity.snapshot(one.record.id) or one.record.id
        disks = disks_of(taken, one.disks)
        after = taken.saved(one.saved, one.configuration, disks, taken.layout.snapshot_nvram(new_id))
        before = saved_state.read(one.memory).xml
        if before != after:
            yield plan.ChangeMemory(path=str(taken.layout.memory(new_id)), before=before, after=after)


def _without_state(taken: Intake) -> list[Step]:
    """Saved states that are to stay away go, last of all."""
    if not taken.options.without_state:
        return []
    ids = [taken.identity.snapshot(one.record.id) or one.record.id for one in taken.source.snapshots]
    return [plan.RemoveFile(path=str(path)) for path in (*map(taken.layout.memory, ids), taken.layout.present_memory)]


def _state_of_present(
    session: Session, taken: Intake, disks: dict[str, tuple[str, str]], nvram: Path | None
) -> tuple[list[Step], list[Step]]:
    """TPM state and saved memory of the present go where libvirt keeps them: before the switch, and what is left then."""
    source, prepare, finish = taken.source, list[Step](), list[Step]()
    tpm = import_.tpm_of(session.connection, source)
    target = session.connection.tpm_folder(session.layout.vm_id)
    if tpm is not None and tpm != target:
        there = _renamed(tpm, source.layout, session.layout)
        prepare.append(plan.CopyFolder(source=str(there), target=str(target)))
        if there.is_relative_to(session.layout.home):
            finish.append(plan.RemoveFolder(path=str(there)))
    if source.memory is not None and source.saved is not None and not taken.options.without_state:
        there = _renamed(source.memory, source.layout, session.layout)
        save = session.connection.managed_save_path(taken.identity.name)
        xml = taken.saved(source.saved, source.present, disks, nvram)
        prepare.append(plan.CopyMemory(source=str(there), target=str(save), xml=xml))
        finish.append(plan.RemoveFile(path=str(there)))
    return prepare, finish


# --- modes ----------------------------------------------------------------------------------------------------------


def frozen_of(taken: Intake) -> set[str]:
    """Images of the home that a snapshot or a child needs, under their new names."""
    source = taken.source
    needed = {image.parent for image in source.images.values() if image.parent is not None}
    needed |= {path for one in source.snapshots for path in one.disks.values()}
    return {taken.places[path] for path in needed if path in taken.places and source.images[path].inside}


def _modes(taken: Intake) -> Iterator[tuple[str, int, int, int, int]]:
    """What an export's read-only files and folders become."""
    source, old = taken.source, taken.source.layout
    frozen_now = frozen_of(taken)
    for folder in _folders(source):
        yield _mode(folder, _FOLDER, with_owner=False)
    for path, image in source.images.items():
        if image.inside:
            is_frozen = taken.places[path] in frozen_now
            yield _mode(Path(path), frozen.FROZEN_MODE if is_frozen else frozen.WORKING_MODE, with_owner=True)
    state = [one for snapshot in source.snapshots for one in (snapshot.memory, snapshot.nvram) if one is not None]
    state += sorted(old.vm_folder.glob("nvram_*")) if old.vm_folder.is_dir() else []
    for file in state:
        if file.is_relative_to(source.folder):
            yield _mode(file, frozen.WORKING_MODE, with_owner=True)
    for tpm in (one.tpm for one in source.snapshots if one.tpm is not None):
        for entry in (tpm, *sorted(tpm.rglob("*"))):
            mode = _TPM_FOLDER if entry.is_dir() else frozen.WORKING_MODE
            yield _mode(entry, _FOLDER if entry == tpm else mode, with_owner=False)
    for file in [source.file, *(one.file for one in source.snapshots)]:
        yield _mode(file, frozen.WORKING_MODE, with_owner=False)


def _folders(source: SourceHome) -> list[Path]:
    old = source.layout
    folders = [*old.folders(), *(old.snapshot_folder(one.record.id) for one in source.snapshots)]
    return [folder for folder in folders if folder.is_dir() and folder != old.private]


def _mode(path: Path, mode: int, *, with_owner: bool) -> tuple[str, int, int, int, int]:
    facts = path.stat()
    uid, gid = (facts.st_uid, facts.st_gid) if with_owner else (-1, -1)
    return str(path), mode, stat.S_IMODE(facts.st_mode), uid, gid
