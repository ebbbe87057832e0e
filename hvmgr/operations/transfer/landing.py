"""A stream becomes what a VM's disk holds: in a new image on the old one, which the VM gets when all has arrived.

| the VM          | what happens                                                                   |
|-----------------|--------------------------------------------------------------------------------|
| off             | the stream lands in a new image; then that is the disk, and the old one is merged |
| runs, is saved  | Conflict: the guest would not know                                             |

A full image hides all that the disk held; a delta has to start from what the disk holds now.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from hvmgr import errors
from hvmgr.host import qemu_img
from hvmgr.host.domain import State
from hvmgr.model import plan, tree
from hvmgr.model.plan import Plan
from hvmgr.model.tree import Leaf, Tree
from hvmgr.operations import merge, snapshots
from hvmgr.operations.session import Session
from hvmgr.operations.steps import execution
from hvmgr.operations.transfer import points
from hvmgr.operations.transfer.incoming import Incoming
from hvmgr.operations.transfer.points import Point
from hvmgr.storage import contents, disk_snapshots, frozen, vm_home
from hvmgr.storage.vm_home import VmHome

if TYPE_CHECKING:
    from hvmgr.host.qemu_img import Extent


def require_ready(session: Session, slot: str) -> Point:
    """The disk that would be written; Conflict when the VM's state does not let it."""
    point = points.of_slot(session.home, slot)
    name, state = session.home.name, session.state()
    if state is State.SAVED:
        raise errors.Conflict(
            f"the memory of {name} is saved, and fits its disks as they are",
            hint=f"start it, or drop the saved memory: virsh managedsave-remove {name}",
        )
    if state is not State.OFF:
        raise errors.Conflict(
            f"{name} is {state}, and has its disk {slot} open", hint=f"stop it first: hvmgr vm stop {name}"
        )
    return point


def receive(session: Session, slot: str, stream: Incoming, *, force: bool) -> None:
    """The disk holds what arrives; on any failure it holds what it held."""
    point = require_ready(session, slot)
    what = f"disk {slot} of {session.home.name}"
    stream.require_meant(force=force)
    stream.require_fitting(
        point.size, what, f"make it larger first: hvmgr disk resize {session.home.name} {slot} {stream.size}"
    )
    stream.require_held(held(session.home, slot), what, force=force)
    one = _plan(session, slot, stream)
    session.require_approval(one)
    session.arriving = stream
    try:
        execution.run(session, one)
    finally:
        session.arriving = None


def held(home: VmHome, slot: str) -> list[str]:
    """What a disk is known to hold now: the uuids of the points that its present is equal to.

    That of its last import as long as nobody wrote; those of the snapshots on whose images it stands as long as it wrote
    nothing of its own.
    """
    forest = home.tree()
    point = points.of_slot(home, slot, forest)
    names = _names(home, forest)
    found: list[str] = []
    empty = _empty(qemu_img.map(*point.top, force_share=True), len(point.chain))
    for number, (path, _) in enumerate(point.chain):
        if frozen.is_changed(home.layout, path):
            break
        found += names.get(str(path), [])
        known = contents.held(home.layout.contents, path)
        found += [known] if known else []
        below = point.chain[number + 1] if number + 1 < len(point.chain) else None
        is_same_size = below is not None and forest.images[str(path)].size == forest.images[str(below[0])].size
        if number >= empty or not is_same_size:
            break
    return list(dict.fromkeys(found))


def _names(home: VmHome, forest: Tree) -> dict[str, list[str]]:
    """For each image the uuids of the snapshots that froze it."""
    names: dict[str, list[str]] = {}
    for node in forest.nodes.values():
        facts = vm_home.require_facts(home.snapshot(node.snapshot_id))
        disks = {one.slot: one.id for one in facts.disks}
        for slot, path in node.disks.items():
            if slot in disks:
                names.setdefault(path, []).append(points.snapshot_uuid(node.snapshot_id, disks[slot]))
    for one in disk_snapshots.read_all(home.layout):
        names.setdefault(str(one.path(home.layout)), []).append(one.uuid)
    return names


def _empty(extents: list[Extent], depth: int) -> int:
    """How many images from the top hold nothing of their own."""
    return min((one.depth for one in extents if one.present), default=depth)


def _plan(session: Session, slot: str, stream: Incoming) -> Plan:
    whole = snapshots.whole_tree(session)
    path = whole.present.disks[slot]
    child, change = str(session.layout.image(slot, session.new_id())), session.new_id()
    after = _after(whole, slot, child, stream)
    merges = merge.steps_after(session, after)
    present = session.home.present()
    new = present.copy()
    snapshots.point_disks(new, {slot: child})
    new.set_metadata(dataclasses.replace(vm_home.require_facts(present), change=change))
    kind = "full image" if stream.parent is None else "delta"
    image = whole.images[path]
    return Plan(
        plan_id=change,
        vm_id=session.home.vm_id,
        operation="disk import",
        subject=f"import of a {kind} into disk {slot} of {session.home.name}",
        prepare=(
            plan.CreateImage(path=child, size=image.size, parent=path, parent_format=image.format),
            plan.ReceiveDisk(child=child, parent=path, parent_format=image.format, uuid=stream.uuid),
            plan.FreezeImage(path=path),
        ),
        switch=plan.Define(xml=new.to_xml()),
        finish=(plan.WritePresent(), plan.RecordFrozen(paths=(path,)), *merges),
        hold=((path, image.format),),
    )


def _after(whole: Tree, slot: str, child: str, stream: Incoming) -> Tree:
    """The tree with the new image, which counts as large when it holds everything: nothing is left to pull into it then."""
    one = dataclasses.replace(whole, present=Leaf(whole.present.parent, {slot: whole.present.disks[slot]}))
    after = tree.plan_go_on(one, {slot: child}).after
    data = after.images[whole.present.disks[slot]].data + 1 if stream.parent is None else 0
    images = {**after.images, child: dataclasses.replace(after.images[child], data=data)}
    present = Leaf(whole.present.parent, {**whole.present.disks, slot: child})
    return dataclasses.replace(after, images=images, present=present)
