"""Another size for a disk of a VM: the present's working image alone, snapshots keep theirs.

| the working image is                                   | off                          | running            |
|--------------------------------------------------------|------------------------------|--------------------|
| qcow2 or raw, and nobody else's                        | grows, shrinks where it may  | grows              |
| VHD, a block device, or needed by others as it is      | grows in a new image on it   | Unsupported        |

A shrink ends behind the last partition, and behind the second copy of a GPT, which moves. It is refused where no partition
table says what is needed.
"""

from __future__ import annotations

import dataclasses
import stat
from pathlib import Path

from hvmgr import errors, units
from hvmgr.host import nbd_client
from hvmgr.host.domain import State
from hvmgr.model import names, plan
from hvmgr.model.plan import Plan
from hvmgr.model.tree import MAX_DEPTH, Image, Tree
from hvmgr.operations import snapshots, strangers
from hvmgr.operations.session import Session
from hvmgr.storage import images, partitions, vm_home

_SECTOR = 512
_IN_PLACE = (images.QCOW2, images.RAW)


def plan_resize(session: Session, slot: str, size: int, *, shrink: bool = False) -> Plan | None:
    """The disk has ``size`` bytes; None when it has. ``shrink`` says that what lies behind the new end may go."""
    if size <= 0 or size % _SECTOR:
        raise errors.UsageError(f"a disk cannot have {size} bytes", hint="give a multiple of 512 bytes, such as 20G")
    before = snapshots.present_tree(session)
    path = before.present.disks.get(slot)
    if path is None:
        raise names.not_found("disk", slot, before.present.disks, where=f"in {session.home.name}")
    image = before.chain(path)[0]
    if image.size == size:
        return None
    state = session.state()
    _require_state(session, state, image, size, shrink=shrink)
    if not _can_change(session, before, image):
        return _plan_child(session, before, slot, image, size, state)
    if state is not State.OFF:
        snapshots.require_same_disks(session, session.home.present(), with_memory=False)
    elif size < image.size:
        _require_room(session, slot, image, size)
    step = plan.ResizeDisk(slot=slot, path=path, format=image.format, size=size, old=image.size)
    return Plan(
        plan_id=session.new_id(),
        vm_id=session.home.vm_id,
        operation="disk resize",
        subject=_subject(session, slot, size),
        switch=step,
        finish=(step,) if size < image.size else (),  # what is cut off in two acts is completed from the first one on
        hold=((path, image.format),) if state is State.OFF else (),
    )


def _require_state(session: Session, state: State, image: Image, size: int, *, shrink: bool) -> None:
    name = session.home.name
    if state is State.SAVED:
        raise errors.Conflict(
            f"the memory of {name} is saved, and fits its disks as they are",
            hint=f"start it, or drop the saved memory: virsh managedsave-remove {name}",
        )
    if size > image.size:
        return
    if not shrink:
        raise errors.UsageError(
            f"the disk has {units.format_size(image.size)}: to make it smaller cuts off its end",
            hint="give --yes if that is meant",
        )
    if state is not State.OFF:
        raise errors.Conflict(
            f"{name} runs: a disk gets smaller only while its VM is off", hint=f"hvmgr vm stop {name}"
        )


def _can_change(session: Session, before: Tree, image: Image) -> bool:
    """Whether the image itself can have another size: a file that grows, and that the present alone needs."""
    if image.format not in _IN_PLACE or not stat.S_ISREG(Path(image.path).stat().st_mode):
        return False
    is_shared = list(before.present.disks.values()).count(image.path) > 1 or bool(
        strangers.of(session, [image.path]).get(image.path)
    )
    return not is_shared and not session.uses.is_frozen(image.path)


def _plan_child(session: Session, before: Tree, slot: str, image: Image, size: int, state: State) -> Plan:
    if size < image.size:
        raise errors.Unsupported(
            f"{image.path} cannot be made smaller: it is {_what(image)}",
            hint="copy the disk to a smaller one inside a guest",
            path=image.path,
        )
    if state is not State.OFF:
        raise errors.Unsupported(
            f"{image.path} cannot grow while {session.home.name} runs: it is {_what(image)}",
            hint=f"stop the VM: hvmgr vm stop {session.home.name}; then the disk goes on in a new, larger image",
            path=image.path,
        )
    if len(before.chain(image.path)) >= MAX_DEPTH:
        raise errors.Conflict(f"the disk {slot} already stands on {MAX_DEPTH} images", hint="delete snapshots")
    child, change = str(session.layout.image(slot, session.new_id())), session.new_id()
    present = session.home.present()
    after = present.copy()
    snapshots.point_disks(after, {slot: child})
    after.set_metadata(dataclasses.replace(vm_home.require_facts(present), change=change))
    return Plan(
        plan_id=change,
        vm_id=session.home.vm_id,
        operation="disk resize",
        subject=_subject(session, slot, size),
        prepare=(
            plan.CreateImage(path=child, size=size, parent=image.path, parent_format=image.format),
            plan.FreezeImage(path=image.path),
        ),
        switch=plan.Define(xml=after.to_xml()),
        finish=(plan.WritePresent(), plan.RecordFrozen(paths=(image.path,))),
        hold=((image.path, image.format),),
    )


def _what(image: Image) -> str:
    if image.format not in _IN_PLACE:
        return f"of the format {image.format}"
    is_file = stat.S_ISREG(Path(image.path).stat().st_mode)
    return "needed by others as it is" if is_file else "a block device"


def _require_room(session: Session, slot: str, image: Image, size: int) -> None:
    """Nothing that a partition holds is cut off."""
    daemon = session.daemon
    node = daemon.open(Path(image.path), image.format, writable=False)
    try:
        with daemon.exported(node) as uri, nbd_client.connected(uri) as disk:
            table, least = partitions.read(disk), partitions.least_size(disk)
    finally:
        daemon.close(node)
    if size >= least:
        return
    facts = {"least": least, "path": image.path}
    if table is None or table.fault is not None:
        why = "it has no partition table" if table is None else f"of its partition table {table.fault}"
        raise errors.Conflict(
            f"nobody can tell what the end of disk {slot} holds: {why}",
            hint="make the file system smaller and copy it to a smaller disk",
            **facts,
        )
    raise errors.Conflict(
        f"disk {slot} cannot be cut to {units.format_size(size)}: its partitions end at {least} bytes",
        hint="make the last file system and its partition smaller first, inside the guest",
        **facts,
    )


def _subject(session: Session, slot: str, size: int) -> str:
    return f"resize of disk {slot} of {session.home.name} to {units.format_size(size)}"
