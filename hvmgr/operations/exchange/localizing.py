"""``disk localize``: a disk needs nothing outside its home any more.

The images outside that the disk stands on, in the present, the undo slot or a snapshot, are copied into the home, and
whatever names them names the copies. What the guest sees of any state does not change. A VM that runs has the images
below its working image open: their data is pulled into that image first.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from hvmgr import errors
from hvmgr.host.domain import State
from hvmgr.model import names, plan
from hvmgr.model.plan import Plan, Step
from hvmgr.model.tree import Image, Keeper, Tree
from hvmgr.operations import chains, snapshots
from hvmgr.operations.exchange import compare_place, repointing
from hvmgr.operations.session import Session
from hvmgr.storage import frozen, vm_home


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
    children = [
        one
        for one in before.images.values()
        if one.parent in places and one.path not in places and one.keeper is not Keeper.OUTSIDE  # another disk's
    ]
    for one in children:
        frozen.require_unchanged(layout, Path(one.path))
    pulled = active and any(one.path in places for one in before.chain(working)[1:])
    change, after = session.new_id(), present.copy()
    facts = vm_home.require_facts(present)
    formats = {path: one.format for path, one in outside.items()}
    repointing.point(after, before.present.disks, places, formats)
    disks = chains.set_apart(facts.disks, [slot]) if pulled else facts.disks
    after.set_metadata(dataclasses.replace(facts, change=change, disks=disks))
    prepare: list[Step] = [plan.PullDisk(slot=slot, path=working)] if pulled else []
    hashes = {path: frozen.recorded_hash(layout, Path(path)) or "" for path in places}
    prepare.append(plan.CopyImages(files=tuple((path, target, hashes[path]) for path, target in places.items())))
    prepare += [
        repointing.named(session, places[path], before.images[path], places, formats)
        for path in places
        if _has_parent(before, path, places)
    ]
    kept = [path for path in places if path != working]
    prepare += [plan.FreezeImage(path=places[path]) for path in kept]
    prepare += [
        repointing.named(session, one.path, one, places, formats)
        for one in children
        if not (pulled and one.path == working)
    ]
    if working in places and session.state() is State.SAVED:
        prepare.append(plan.PointManagedSave(disks=((slot, working, places[working]),)))
    prepare += list(repointing.texts(session, before, places, formats))
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
            *repointing.forget_use(before, layout.vm_id, slot, outside),
        ),
        hold=() if active else snapshots.working(before),
    )


def _outside(before: Tree, slot: str) -> dict[str, Image]:
    """The images outside the home that any state of the disk stands on, bases first."""
    return {path: one for path, one in repointing.images_of(before, slot).items() if one.keeper is Keeper.OUTSIDE}


def _places(session: Session, before: Tree, outside: dict[str, Image], slot: str) -> dict[str, str]:
    """A name in the home for each copy: bases beside the bases, the others among the differencing images."""
    layout, places = session.layout, dict[str, str]()
    for path, image in outside.items():
        if image.parent is not None and image.parent in before.images:
            places[path] = str(layout.image(slot, session.new_id()))
        else:
            places[path] = repointing.place_for_base(layout, slot, image.format, places.values())
    return places


def _has_parent(before: Tree, path: str, places: dict[str, str]) -> bool:
    return before.images[path].parent in places


def _require_space(session: Session, outside: dict[str, Image]) -> None:
    needed = sum(image.data for image in outside.values())
    if session.is_active():
        needed *= 2  # the working image takes the data in as well
    for finding in compare_place.space_finding(session.layout.home, needed):
        raise errors.NoSpace(finding.sentence, hint="free space there, then run the command again")
    for path in outside:
        frozen.require_unchanged(session.layout, Path(path))
