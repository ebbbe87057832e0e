"""A snapshot of one disk of a VM alone, outside its tree: made while the VM is off, runs or is saved, and taken away again.

The disk goes on in a new image; what it wrote until then is frozen, and needed for as long as the record is there.
"""

from __future__ import annotations

import dataclasses

from hvmgr import errors
from hvmgr.host.domain import State
from hvmgr.model import plan, tree
from hvmgr.model.plan import Plan, Step
from hvmgr.operations import merge, snapshots, strangers
from hvmgr.operations.session import Session
from hvmgr.operations.steps import execution
from hvmgr.operations.transfer import points
from hvmgr.storage import disk_snapshots, transfers, vm_home
from hvmgr.storage.disk_snapshots import DiskSnapshot

_ACTIVE = (State.RUNNING, State.PAUSED)


def create(session: Session, slot: str, label: str) -> str:
    """The uuid of a new snapshot of the disk as it is now."""
    point = points.of_slot(session.home, slot)
    layout = session.layout
    one = DiskSnapshot(
        uuid=session.new_id(),
        disk=point.disk,
        slot=slot,
        image=disk_snapshots.image_name(layout, str(point.top[0])),
        created=session.now(),
        label=label,
    )
    made = _plan(session, slot, one)
    session.require_approval(made)
    execution.run(session, made)
    return one.uuid


def destroy(session: Session, one: DiskSnapshot) -> None:
    """The snapshot is gone; its image goes, or is merged, as far as nothing else needs it."""
    path = str(one.path(session.layout))
    transfers.require_none([path])
    subject = f"deletion of the snapshot {one.uuid} of disk {one.slot} of {session.home.name}"
    made = merge.plan_forget(
        session, disk_snapshots.file_of(session.layout, one.uuid), path, disk_snapshots.name_of(one), subject
    )
    session.require_approval(made)
    session.forget_uses()  # the record is one of them until it goes
    execution.run(session, made)


def _plan(session: Session, slot: str, one: DiskSnapshot) -> Plan:
    present, state, layout = session.home.present(), session.state(), session.layout
    if state in (State.SLEEPING, State.CRASHED):
        raise errors.Conflict(f"{present.name} is {state}", hint="wake it up or stop it, then run the command again")
    snapshots.require_own_disks(session, present)
    active = state in _ACTIVE
    if active:
        snapshots.require_same_disks(session, present, with_memory=False)
    else:
        strangers.say_what_bitmaps_lose(session)
    whole = snapshots.present_tree(session)
    path = whole.present.disks[slot]
    before = dataclasses.replace(whole, present=tree.Leaf(whole.present.parent, {slot: path}))
    children = {slot: str(layout.image(slot, session.new_id()))}
    change = tree.plan_go_on(before, children)
    snapshots.warn_of_depth(session, change.after)
    change_id = session.new_id()
    after = present.copy()
    snapshots.point_disks(after, children)
    after.set_metadata(dataclasses.replace(vm_home.require_facts(present), change=change_id))
    creates = [step for step in change.prepare if isinstance(step, plan.CreateImage)]
    freezes = [step for step in change.prepare if isinstance(step, plan.FreezeImage)]
    prepare: list[Step] = [*creates]
    define = plan.Define(xml=after.to_xml())
    switch: Step = define
    finish: list[Step] = []
    if active:
        switch = plan.SwitchDisks(children=tuple(children.items()), memory=None)
        finish += [define, *freezes]
    else:
        prepare += freezes
    if state is State.SAVED:
        prepare.append(plan.PointManagedSave(disks=((slot, path, children[slot]),)))
    record = disk_snapshots.file_of(layout, one.uuid)
    finish += [
        plan.ReplaceFile(path=str(record), text=disk_snapshots.text_of(one)),
        plan.WritePresent(),
        plan.RecordFrozen(paths=(path,)),
    ]
    return Plan(
        plan_id=change_id,
        vm_id=session.home.vm_id,
        operation="vdi-snapshot",
        subject=f"snapshot of disk {slot} of {present.name} alone",
        prepare=tuple(prepare),
        switch=switch,
        finish=tuple(finish),
        hold=() if active else snapshots.working(before),
    )
