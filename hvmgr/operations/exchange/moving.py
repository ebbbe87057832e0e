"""``vm move``: a VM that is off gets another home: copied, switched over, and the old one removed.

The journal stays in the old home until the end: who names the VM meets it there, and the move is completed or undone
before anything else.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors
from hvmgr.host import qemu_errors
from hvmgr.host.domain import State
from hvmgr.model import configuration, plan
from hvmgr.model.identity import Identity
from hvmgr.model.import_options import ImportOptions
from hvmgr.model.layout import Layout
from hvmgr.model.maps import Maps, Used
from hvmgr.model.plan import Plan, Step
from hvmgr.operations import snapshots
from hvmgr.operations.exchange import compare_place, registering
from hvmgr.operations.exchange.intake import Intake
from hvmgr.operations.session import Session
from hvmgr.storage import attachments, frozen, images, source_home, vm_home

if TYPE_CHECKING:
    from hvmgr.model.tree import Tree

_QCOW2_SUFFIX = ".qcow2"


def target_of(folder: Path, old: Path) -> Path:
    """The new home that ``mv`` would make: in a folder that is there, else under the name that is given."""
    folder = Path(os.path.realpath(folder))
    return folder / old.name if folder.is_dir() and not vm_home.holds_nothing(folder) else folder


def plan_move(session: Session, folder: Path) -> Plan:
    """Every file of the home goes to ``folder``, and every name of it is mended."""
    old, present = session.layout, session.home.present()
    state = session.state()
    if state not in (State.OFF, State.SAVED):
        raise errors.Conflict(f"{present.name} is {state}", hint=f"stop it first: hvmgr vm stop {present.name}")
    before = snapshots.whole_tree(session)
    _require_no_strangers(before)
    new = Layout(home=folder, vm_id=old.vm_id)
    _require_place(session, old, new)
    taken = _take_in(session, new)
    change = session.new_id()
    disks = registering.disks_of(taken, taken.source.disks)
    nvram = _moved_file(taken, taken.source.present.nvram)
    after = taken.present(change=change, nvram=nvram, disks=disks)
    moved = {source: target for source, target in taken.places.items() if old.owns(source)}  # others stay
    folders = [one for one in new.folders() if one != new.home]
    folders += [new.snapshot_folder(one.record.id) for one in taken.snapshots]
    prepare: list[Step] = [
        plan.MakeFolders(folders=(str(new.home), *map(str, folders))),
        plan.CopyImages(files=tuple((source, target, "") for source, target in moved.items())),
        *_parents(taken),
        plan.SetModes(modes=tuple(_modes(taken))),
        *_state_files(old, new),
        *_texts(taken),
    ]
    if state is State.SAVED:
        prepare.append(_managed_save(session, taken, disks, nvram))
    kept = [plan.RemoveFile(path=path) for path in moved]
    return Plan(
        plan_id=change,
        vm_id=old.vm_id,
        operation="vm move",
        subject=f"move of {present.name} to {new.home}",
        prepare=tuple(prepare),
        switch=plan.Define(xml=after.to_xml()),
        finish=(
            plan.SettleHome(home=str(new.home), frozen=tuple(sorted(registering.frozen_of(taken)))),
            *kept,
            *(plan.RemoveSnapshot(snapshot_id=one.record.id) for one in taken.snapshots),
            plan.RemoveHome(),
        ),
        hold=snapshots.working(before),
    )


def _require_no_strangers(before: Tree) -> None:
    attachments.require_free(path for path, names in before.strangers.items() if names)
    for path, names in before.strangers.items():
        if names:
            raise errors.Conflict(
                f"{Path(path).name} is needed by {', '.join(names)}",
                hint="localize the disks of those VMs first: hvmgr disk localize VM SLOT",
                path=path,
                users=list(names),
            )


def _require_place(session: Session, old: Layout, new: Layout) -> None:
    if new.home.is_relative_to(old.home) or old.home.is_relative_to(new.home):
        raise errors.UsageError(f"{new.home} and the home {old.home} lie in each other")
    if new.home.exists() and not (new.home.is_dir() and vm_home.holds_nothing(new.home)):
        raise errors.Conflict(f"{new.home} is there already", hint="name a folder that is not there yet")
    qemu_errors.require_utf8(new.home)
    if (above := vm_home.around(new.home)) is not None:
        raise errors.Conflict(
            f"{new.home} lies in {above}, which is a VM's home or an export", hint="choose a place outside it"
        )
    if not new.home.parent.is_dir():
        raise errors.NotFound(f"there is no folder {new.home.parent}", hint=f"make it: mkdir -p '{new.home.parent}'")
    for finding in compare_place.way_findings(new.home, session.owner):
        raise errors.Conflict(finding.sentence, hint=finding.repair, path=finding.where)
    needed = sum(file.stat().st_blocks * 512 for file in old.home.rglob("*") if file.is_file())
    for finding in compare_place.space_finding(new.home.parent, needed):
        raise errors.NoSpace(finding.sentence, hint="free space there, or choose another place")


def _take_in(session: Session, new: Layout) -> Intake:
    """The home as a source whose identity stays, with a place for every image in it, used or not."""
    old = session.layout
    source = source_home.open_source(old.home, own=True)
    for problem in source.problems:
        raise errors.Corrupt(problem.sentence, hint=problem.repair, path=problem.where)
    places = {path: path for path in source.images if not old.owns(path)}
    for before, after in ((old.images, new.images), (old.bases, new.bases)):
        for file in sorted(before.iterdir()) if before.is_dir() else ():
            if file.is_file():
                places[str(file)] = str(after / file.name)
    for path in source.images:
        if path not in places:  # a disk that snapshots leave out may lie anywhere in the home
            target = new.bases / Path(path).name
            places[path] = str(target.with_stem(session.new_id()) if str(target) in places.values() else target)
    return Intake(
        source=source,
        options=ImportOptions(),
        maps=Maps(),
        used=Used(),
        identity=Identity(vm_id=old.vm_id, name=source.present.name, genid=None),
        layout=new,
        uri=session.connection.uri,
        now=session.now(),
        new_id=session.new_id,
        snapshots=source.snapshots,
        places=places,
    )


def _parents(taken: Intake) -> Iterator[Step]:
    """Headers whose names are not true in the new place: absolute ones within the home, and between its folders."""
    for source, target in taken.places.items():
        if source == target or not source.endswith(_QCOW2_SUFFIX):
            continue
        header = images.read(Path(source), images.QCOW2)
        if header.backing is None or header.parent is None or header.backing_format is None:
            continue
        parent = taken.places.get(str(header.parent), str(header.parent))
        name = taken.layout.parent_name(Path(target), parent)
        if name != header.backing:
            yield plan.NameParent(
                path=target,
                parent=name,
                parent_format=header.backing_format,
                before=header.backing,
                mode=frozen.WORKING_MODE,
            )


def _modes(taken: Intake) -> Iterator[tuple[str, int, int, int, int]]:
    """Copies of frozen images are frozen."""
    for target in sorted(registering.frozen_of(taken)):
        yield target, frozen.FROZEN_MODE, frozen.WORKING_MODE, -1, -1


def _state_files(old: Layout, new: Layout) -> Iterator[Step]:
    """NVRAM, TPM states and saved states, as they are: their folders carry ids."""
    folders = [(old.vm_folder, new.vm_folder)]
    folders += [
        (folder, new.snapshots / folder.name)
        for folder in (sorted(old.snapshots.iterdir()) if old.snapshots.is_dir() else ())
        if folder.is_dir() and folder != old.images
    ]
    for before, after in folders:
        for entry in sorted(before.iterdir()) if before.is_dir() else ():
            if entry.is_dir():
                yield plan.CopyFolder(source=str(entry), target=str(after / entry.name))
            elif entry != old.undo:
                yield plan.CopyFile(source=str(entry), target=str(after / entry.name))


def _texts(taken: Intake) -> Iterator[Step]:
    """The configurations of the snapshots and of the undo slot."""
    for one in taken.snapshots:
        yield plan.WriteFile(path=str(taken.layout.snapshot(one.record.id)), text=taken.snapshot(one).to_xml())
    undo = taken.source.undo
    if undo is not None:
        disks = registering.disks_of(taken, taken.source.undo_disks)
        text = taken.undo(undo, disks, _moved_file(taken, undo.nvram)).to_xml()
        yield plan.WriteFile(path=str(taken.layout.undo), text=text)


def _moved_file(taken: Intake, path: Path | None) -> Path | None:
    home = taken.source.folder
    if path is None or not path.is_relative_to(home):
        return path
    return taken.layout.home / path.relative_to(home)


def _managed_save(
    session: Session, taken: Intake, disks: dict[str, tuple[str, str]], nvram: Path | None
) -> plan.ChangeManagedSave:
    text = session.domain().managed_save_xml()
    saved = configuration.parse(text, source="the managed save")
    return plan.ChangeManagedSave(before=text, after=taken.saved(saved, taken.source.present, disks, nvram))
