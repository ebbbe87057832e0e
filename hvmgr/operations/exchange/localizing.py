"""``disk localize``: a disk needs nothing outside its home any more.

The images outside that the disk stands on, in the present, the undo slot or a snapshot, are copied into the home, and
whatever names them names the copies. What the guest sees of any state does not change. A VM that runs has the images
below its working image open: their data is pulled into that image first.
"""

from __future__ import annotations

import dataclasses
import stat
from collections.abc import Iterator
from pathlib import Path

from hvmgr import errors
from hvmgr.host.domain import State
from hvmgr.model import names, plan
from hvmgr.model.configuration import Configuration
from hvmgr.model.plan import Plan, Step
from hvmgr.model.tree import Image, Keeper, Tree
from hvmgr.operations import chains, snapshots
from hvmgr.operations.exchange import compare_place, gold
from hvmgr.operations.session import Session
from hvmgr.storage import frozen, images, vm_home

_SUFFIXES = {images.QCOW2: ".qcow2", images.VPC: ".vhd", images.RAW: ".img"}


def plan_localize(session: Session, slot: str) -> Plan | None:
    """None when the disk needs nothing outside."""
    home, layout = session.home, session.layout
    present, before = home.present(), home.tree()
    if slot not in before.present.disks:
        raise names.not_found("disk", slot, before.present.disks, where=f"in {present.name} that snapshots freeze")
    outside = _outside(before, slot)
    if not outside:
        return None
    active = session.state() not in (State.OFF, State.SAVED)
    working = before.present.disks[slot]
    if working in outside and active:
        raise errors.Conflict(
            f"{present.name} runs and writes to {working}, outside its home",
            hint=f"stop it first: hvmgr vm stop {present.name}",
        )
    _require_space(session, outside)
    places = _places(session, before, outside, slot)
    children = [one for one in before.images.values() if one.parent in places and one.path not in places]
    for one in children:
        frozen.require_unchanged(layout, Path(one.path))
    pulled = active and any(one.path in places for one in before.chain(working)[1:])
    change, after = session.new_id(), present.copy()
    facts = vm_home.require_facts(present)
    if working in places:
        _point(after, slot, before.images[working], places)
    disks = chains.set_apart(facts.disks, [slot]) if pulled else facts.disks
    after.set_metadata(dataclasses.replace(facts, change=change, disks=disks))
    prepare: list[Step] = [plan.PullDisk(slot=slot, path=working)] if pulled else []
    hashes = {path: frozen.recorded_hash(layout, Path(path)) or "" for path in places}
    prepare.append(plan.CopyImages(files=tuple((path, target, hashes[path]) for path, target in places.items())))
    prepare += [
        _named(session, places[path], before.images[path], places)
        for path in places
        if _has_parent(before, path, places)
    ]
    kept = [path for path in places if path != working]
    prepare += [plan.FreezeImage(path=places[path]) for path in kept]
    prepare += [_named(session, one.path, one, places) for one in children if not (pulled and one.path == working)]
    if working in places and session.state() is State.SAVED:
        prepare.append(plan.PointManagedSave(disks=((slot, working, places[working]),)))
    prepare += list(_texts(session, slot, before, places))
    frozen_now = [places[path] for path in kept]
    frozen_now += [one.path for one in children if one.path not in before.present.disks.values()]
    return Plan(
        plan_id=change,
        vm_id=home.vm_id,
        operation="disk localize",
        subject=f"localization of disk {slot} of {present.name}",
        prepare=tuple(prepare),
        switch=plan.Define(xml=after.to_xml()),
        finish=(
            plan.WritePresent(),
            plan.RecordFrozen(paths=tuple(frozen_now)),
            *_forget_use(before, layout.vm_id, slot),
        ),
        hold=() if active else snapshots.working(before),
    )


def _outside(before: Tree, slot: str) -> dict[str, Image]:
    """The images outside the home that any state of the disk stands on, bases first."""
    leaves = [before.present.disks, *(node.disks for node in before.nodes.values())]
    leaves += [before.undo.disks] if before.undo is not None else []
    found: dict[str, Image] = {}
    for disks in leaves:
        for image in reversed(before.chain(disks[slot])) if slot in disks else ():
            if image.keeper is Keeper.OUTSIDE:
                found.setdefault(image.path, image)
    return found


def _places(session: Session, before: Tree, outside: dict[str, Image], slot: str) -> dict[str, str]:
    """A name in the home for each copy: bases beside the bases, the others among the differencing images."""
    layout, taken, places = session.layout, set[str](), dict[str, str]()
    for path, image in outside.items():
        if image.parent is not None and image.parent in before.images:
            target = layout.image(slot, session.new_id())
        else:
            target, number = layout.bases / f"{slot}{_SUFFIXES[image.format]}", 1
            while target.exists() or str(target) in taken:
                number += 1
                target = layout.bases / f"{slot}-{number}{_SUFFIXES[image.format]}"
        taken.add(str(target))
        places[path] = str(target)
    return places


def _has_parent(before: Tree, path: str, places: dict[str, str]) -> bool:
    return before.images[path].parent in places


def _named(session: Session, path: str, image: Image, places: dict[str, str]) -> plan.NameParent:
    """The header names the copy of its parent."""
    assert image.parent is not None
    header = images.read(Path(image.path), images.QCOW2)
    assert header.backing is not None
    assert header.backing_format is not None
    name = session.layout.parent_name(Path(path), places[image.parent])
    mode = (
        frozen.WORKING_MODE if path != image.path else stat.S_IMODE(Path(path).stat().st_mode)
    )  # a copy, or the image
    return plan.NameParent(
        path=path, parent=name, parent_format=header.backing_format, before=header.backing, mode=mode
    )


def _texts(session: Session, slot: str, before: Tree, places: dict[str, str]) -> Iterator[Step]:
    """Configurations of snapshots and of the undo slot that name an image outside."""
    for node in before.nodes.values():
        if node.disks.get(slot) in places:
            file = session.layout.snapshot(node.snapshot_id)
            yield _changed(file, session.home.snapshot(node.snapshot_id), slot, before.images[node.disks[slot]], places)
    undo = session.home.undo()
    if undo is not None and before.undo is not None and before.undo.disks.get(slot) in places:
        yield _changed(session.layout.undo, undo, slot, before.images[before.undo.disks[slot]], places)


def _changed(file: Path, one: Configuration, slot: str, image: Image, places: dict[str, str]) -> plan.ChangeFile:
    text = file.read_text("utf-8")
    _point(one, slot, image, places)
    return plan.ChangeFile(path=str(file), before=text, after=one.to_xml())


def _point(one: Configuration, slot: str, image: Image, places: dict[str, str]) -> None:
    one.set_disk_source(slot, Path(places[image.path]), image.format)


def _require_space(session: Session, outside: dict[str, Image]) -> None:
    needed = sum(image.data for image in outside.values())
    if session.is_active():
        needed *= 2  # the working image takes the data in as well
    for finding in compare_place.space_finding(session.layout.home, needed):
        raise errors.NoSpace(finding.sentence, hint="free space there, then run the command again")
    for path in outside:
        frozen.require_unchanged(session.layout, Path(path))


def _forget_use(before: Tree, vm_id: str, slot: str) -> Iterator[Step]:
    """The note beside a gold goes, unless another disk stands on it still."""
    leaves = [before.present.disks, *(node.disks for node in before.nodes.values())]
    leaves += [] if before.undo is None else [before.undo.disks]
    others = {one for disks in leaves for one in disks} - {slot}
    still = gold.notes_of(vm_id, (path for one in others for path in _outside(before, one)))
    for note in sorted(gold.notes_of(vm_id, _outside(before, slot)) - still):
        yield plan.RemoveFile(path=str(note))
