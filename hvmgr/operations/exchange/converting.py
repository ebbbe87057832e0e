"""``disk convert``: no state of a disk stands on a VHD any more, so that its VM's memory can be saved.

QEMU saves no memory while its VHD driver is anywhere in a chain, below qcow2 images and read-only too. The VHD is written
once as a qcow2 base of the home, and whatever stood on the VHD stands on that. The VHD is only read, and stays.

A VM that runs has its chain open: its working image takes in all that is below it, and the VHD is written as qcow2 only for
the other states that stand on it. One that writes to the VHD itself goes on in a new image first (``plan_go_on``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hvmgr import errors
from hvmgr.host.domain import State
from hvmgr.model import names, plan, tree
from hvmgr.model.layout import Layout
from hvmgr.model.plan import Plan, Step
from hvmgr.model.tree import Image, Keeper, Leaf, Tree
from hvmgr.operations import chains, snapshots, vhd_bases
from hvmgr.operations.exchange import compare_place, repointing
from hvmgr.operations.session import Session
from hvmgr.storage import frozen, images, vm_home


def has_to_go_on(session: Session, slot: str) -> bool:
    """Whether the VM runs and writes to a VHD itself."""
    before = session.home.present_tree()
    working = before.present.disks.get(slot)
    return working is not None and before.chain(working)[0].format == images.VPC and _is_active(session)


def plan_go_on(session: Session, slot: str) -> Plan:
    """The running VM goes on in a new image on the VHD, which nothing writes then."""
    home, present = session.home, session.home.present()
    snapshots.require_own_disks(session, present)
    snapshots.require_same_disks(session, present, with_memory=False)
    whole = snapshots.present_tree(session)
    before = dataclasses.replace(whole, present=Leaf(whole.present.parent, {slot: whole.present.disks[slot]}))
    children = {slot: str(session.layout.image(slot, session.new_id()))}
    change, after = tree.plan_go_on(before, children), present.copy()
    snapshots.point_disks(after, children)
    change_id = session.new_id()
    after.set_metadata(dataclasses.replace(vm_home.require_facts(present), change=change_id))
    freezes = [step for step in change.prepare if isinstance(step, plan.FreezeImage)]
    return Plan(
        plan_id=change_id,
        vm_id=home.vm_id,
        operation="disk convert",
        subject=f"new image for disk {slot} of {present.name}",
        prepare=tuple(step for step in change.prepare if isinstance(step, plan.CreateImage)),
        switch=plan.SwitchDisks(children=tuple(children.items()), memory=None),
        finish=(
            plan.Define(xml=after.to_xml()),
            *freezes,
            plan.WritePresent(),
            plan.RecordFrozen(paths=tuple(step.path for step in freezes)),
        ),
    )


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What becomes of a disk: whether its working image takes in all below it, which VHDs others still need as qcow2."""

    pulled: bool
    vhds: Mapping[str, Image]  # all that the disk stood on
    needed: tuple[str, ...]
    removes: tuple[Step, ...]  # images that nothing needs after the pull


def plan_convert(session: Session, slot: str) -> Plan | None:
    """None when no state of the disk stands on a VHD."""
    home, layout, present = session.home, session.layout, session.home.present()
    before = snapshots.whole_tree(session, outside=True)
    if slot not in before.present.disks:
        raise names.not_found("disk", slot, before.present.disks, where=f"in {present.name} that snapshots freeze")
    outcome = _outcome(session, before, slot)
    if not outcome.vhds:
        return None
    working, change, after = before.present.disks[slot], session.new_id(), present.copy()
    places = dict[str, str]()
    for path in outcome.needed:
        places[path] = repointing.place_for_base(layout, slot, images.QCOW2, places.values())
    formats = dict.fromkeys(places, images.QCOW2)
    gone = {step.path for step in outcome.removes if isinstance(step, plan.RemoveImage)}
    left = [one for one in before.images.values() if one.parent in places and one.path not in gone]
    children = [one for one in left if not (outcome.pulled and one.path == working)]
    _require_possible(session, before, outcome, slot, children)
    after.strip_backing_chains()  # one that somebody wrote out would still lead to the VHD
    repointing.point(after, before.present.disks, places, formats)
    facts = vm_home.require_facts(present)
    disks = chains.set_apart(facts.disks, [slot]) if outcome.pulled else facts.disks
    after.set_metadata(dataclasses.replace(facts, change=change, disks=disks))
    kept = [path for path in places if path not in before.present.disks.values()]
    prepare: list[Step] = [plan.PullDisk(slot=slot, path=working)] if outcome.pulled else []
    prepare += [
        plan.ConvertBase(source=path, format=images.VPC, target=target, size=before.images[path].size)
        for path, target in places.items()
    ]
    prepare += [plan.FreezeImage(path=places[path]) for path in kept]
    prepare += [repointing.named(session, one.path, one, places, formats) for one in children]
    if session.state() is State.SAVED:
        prepare.append(plan.PointManagedSave(disks=((slot, working, places.get(working, working)),)))
    prepare += list(repointing.texts(session, before, places, formats))
    frozen_now = [places[path] for path in kept]
    frozen_now += [one.path for one in children if one.path not in before.present.disks.values()]
    return Plan(
        plan_id=change,
        vm_id=home.vm_id,
        operation="disk convert",
        subject=f"conversion of disk {slot} of {present.name} to qcow2",
        prepare=tuple(prepare),
        switch=plan.Define(xml=after.to_xml()),
        finish=(
            plan.WritePresent(),
            plan.RecordFrozen(paths=tuple(frozen_now)),
            *outcome.removes,
            *_let_go(before, outcome),
            *repointing.forget_use(before, layout.vm_id, slot, outcome.vhds),
        ),
        hold=() if _is_active(session) else snapshots.working(before),
    )


def _is_active(session: Session) -> bool:
    return session.state() not in (State.OFF, State.SAVED)


def _outcome(session: Session, before: Tree, slot: str) -> _Outcome:
    vhds = vhd_bases.below(repointing.images_of(before, slot).values())
    working = before.present.disks[slot]
    chain = before.chain(working)
    if not (_is_active(session) and any(one.path in vhds for one in chain[1:])):
        return _Outcome(pulled=False, vhds=vhds, needed=tuple(vhds), removes=())
    alone = {**before.images, working: dataclasses.replace(chain[0], parent=None)}
    change = tree.remove_userless(dataclasses.replace(before, images=alone), [chain[1].path])
    used = {*change.after.named(), *change.after.children()}
    needed = tuple(path for path in vhds if path in used)
    return _Outcome(pulled=True, vhds=vhds, needed=needed, removes=change.finish)


def _require_possible(session: Session, before: Tree, outcome: _Outcome, slot: str, children: list[Image]) -> None:
    working = before.present.disks[slot]
    for path in outcome.vhds:
        if path != working:
            frozen.require_unchanged(session.layout, Path(path))
    busy = session.busy_images() - ({one.path for one in before.chain(working)} if outcome.pulled else set())
    for one in children:
        if one.path in busy:
            raise errors.Conflict(
                f"another disk of {session.home.name} stands on the same VHD with {one.path}, which is open while the VM runs",
                hint=f"stop it first: hvmgr vm stop {session.home.name}",
                path=one.path,
            )
        if one.keeper is Keeper.OUTSIDE:
            raise errors.Conflict(
                f"{one.path} stands on a VHD and lies outside the home, where nothing is written",
                hint=f"bring the disk into the home first: hvmgr disk localize {session.home.name} {slot}",
                path=one.path,
            )
        if one.path != working:
            frozen.require_unchanged(session.layout, Path(one.path))
    _require_space(session.layout, before, outcome, working)


def _require_space(layout: Layout, before: Tree, outcome: _Outcome, working: str) -> None:
    written = sum(before.images[path].data for path in outcome.needed)
    pulled = sum(one.data for one in before.chain(working)[1:]) if outcome.pulled else 0
    if layout.bases.stat().st_dev == layout.images.stat().st_dev:
        written, pulled = written + pulled, 0
    for folder, size in ((layout.bases, written), (layout.images, pulled)):
        for finding in compare_place.space_finding(folder, size) if size else ():
            raise errors.NoSpace(finding.sentence, hint="free space there, then run the command again")


def _let_go(before: Tree, outcome: _Outcome) -> Iterator[Step]:
    """VHDs that nobody needs can be written again, as before they were frozen."""
    for path in outcome.vhds:
        if not before.strangers.get(path):
            yield plan.ThawImage(path=path)
