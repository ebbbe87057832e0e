"""A VM as a whole: start, stop, rename, delete."""

from __future__ import annotations

import time
from pathlib import Path

from hvmgr import errors
from hvmgr.host.domain import State
from hvmgr.model import plan, specification, tree
from hvmgr.model.configuration import Configuration
from hvmgr.model.plan import Plan, Step
from hvmgr.model.tree import Image, Keeper, Tree
from hvmgr.operations import snapshots, undo_slot
from hvmgr.operations.exchange import gold
from hvmgr.operations.session import Session
from hvmgr.storage import attachments, start_guard, transfers, vm_home

_POLL_S = 0.2


def start(session: Session) -> bool:
    """The VM runs; whether that is a change."""
    domain = session.domain()
    state = domain.state()
    if state is State.RUNNING:
        return False
    if state is State.PAUSED:
        session.require_consent("vm start", f"start of {domain.name}")
        domain.resume()
        return True
    present = session.home.present()
    transfers.require_none(vm_home.disks_of(present).values())  # QEMU would say it in its own words
    allowed = start_guard.is_allowed(session.layout)
    if not allowed:
        _require_startable(session, present)
    session.require_consent("vm start", f"start of {domain.name}")
    try:
        domain.start()
    finally:
        if allowed:
            start_guard.use_up(present)  # where a hook is installed, it has done that
    return True


def _require_startable(session: Session, present: Configuration) -> None:
    """What the hook says where there is one, and before QEMU does: a missing image, a changed one."""
    findings = start_guard.examine(present)
    for finding in start_guard.refusals(findings):
        kind = errors.NotFound if finding.code == "image-missing" else errors.Corrupt
        raise kind(finding.sentence, hint=finding.repair, finding=finding.code, where=finding.where)
    for finding in findings:
        session.say(finding.sentence)


def stop(session: Session, *, force: bool, timeout_s: float) -> bool:
    """The VM is off; by its own shutdown, or with ``force`` at once. Whether that is a change."""
    domain = session.domain()
    if not domain.is_active():
        return False
    session.require_consent("vm stop", f"{'forced ' if force else ''}stop of {domain.name}")
    if force:
        domain.destroy()
        return True
    if domain.state() is State.PAUSED:
        raise errors.Conflict(f"{domain.name} is paused and cannot shut down", hint="start it again, or use --force")
    domain.shutdown()
    deadline = time.monotonic() + timeout_s
    while domain.is_active():
        session.interrupts.check()
        if time.monotonic() > deadline:
            raise errors.Conflict(
                f"{domain.name} did not shut down within {timeout_s:.0f} seconds",
                hint="wait longer with --timeout, or use --force, which is like pulling the plug",
            )
        time.sleep(_POLL_S)
    return True


def plan_rename(session: Session, name: str) -> Plan:
    """libvirt and home know the VM by another name; its folder keeps its own."""
    specification.require_name(name)
    present, state = session.home.present(), session.state()
    if name == present.name:
        raise errors.Conflict(f"the VM is called '{name}' already")
    if session.connection.find_domain_by_name(name) is not None:
        raise errors.Conflict(f"libvirt has a VM '{name}' already", hint="choose another name")
    if state is not State.OFF:
        raise errors.Conflict(
            f"{present.name} is {state}; libvirt renames only a VM that is off", hint=f"hvmgr vm stop {present.name}"
        )
    return Plan(
        plan_id=session.new_id(),
        vm_id=session.home.vm_id,
        operation="vm rename",
        subject=f"renaming of {present.name} to {name}",
        switch=plan.RenameDomain(name=name),
        finish=(plan.WritePresent(),),
    )


def plan_delete(session: Session, *, with_disks: bool) -> Plan:
    """libvirt and hvmgr forget the VM; its present stays as one complete image per disk, unless asked otherwise."""
    home = session.home
    present, state = home.present(), session.state()
    before = snapshots.whole_tree(
        session, with_libvirts=False
    )  # libvirt forgets the VM, and with it what it kept of it
    _require_no_strangers(before)
    if state not in (State.OFF, State.SAVED):  # last: who is told this knows that nothing else is in the way
        raise errors.Conflict(
            f"{present.name} is {state}", hint=f"stop it first: hvmgr vm stop {present.name}", state=str(state)
        )
    nodes = list(before.nodes)
    finish: list[Step] = [
        *undo_slot.emptied(session, home.undo()),
        *(plan.RemoveSnapshot(snapshot_id=one) for one in nodes),
    ]
    if with_disks:
        finish += [plan.RemoveFile(path=image.path) for image in _children_first(before) if _is_ours(image)]
    else:
        change = tree.plan_delete(before, nodes)
        finish += change.finish
        moves = _complete_images(session, change.after)
        finish += [step for step in moves if isinstance(step, plan.Flatten)]
        finish += [step for step in moves if isinstance(step, plan.MoveImage)]
        finish += _free_what_stays(change.after, {step.path for step in moves if isinstance(step, plan.Flatten)})
    outside = [image.path for image in before.images.values() if image.keeper is Keeper.OUTSIDE]
    finish += [plan.ThawImage(path=path) for path in outside]
    finish += [plan.RemoveFile(path=str(note)) for note in sorted(gold.notes_of(home.vm_id, outside))]
    return Plan(
        plan_id=session.new_id(),
        vm_id=home.vm_id,
        operation="vm delete",
        subject=f"deletion of {present.name}",
        switch=plan.UndefineDomain(),  # from here on nobody can start it
        finish=(*finish, plan.RemoveHome()),
        hold=snapshots.working(before),
    )


def _complete_images(session: Session, after: Tree) -> list[Step]:
    steps: list[Step] = []
    taken: set[str] = set()
    for slot, path in after.present.disks.items():
        image = after.chain(path)[0]
        if image.keeper is not Keeper.IMAGES:
            continue  # the disk's own base, never frozen: complete where it is
        if image.parent is not None:
            steps.append(plan.Flatten(path=path))
        target = _free_name(session, f"{session.home.name}-{slot}", taken)
        taken.add(target)
        steps.append(plan.MoveImage(source=path, target=target))
    return steps


def _free_what_stays(after: Tree, flattened: set[str]) -> list[Step]:
    """Bases and detached disks that no image stands on any more are files like any other."""
    needed = {image.parent for image in after.images.values() if image.path not in flattened}
    return [
        plan.ThawImage(path=image.path)
        for image in after.images.values()
        if image.keeper is not Keeper.OUTSIDE and image.path not in needed
    ]


def _free_name(session: Session, stem: str, taken: set[str]) -> str:
    folder, number = session.layout.bases, 1
    target = folder / f"{stem}.qcow2"
    while target.exists() or str(target) in taken:
        number += 1
        target = folder / f"{stem}-{number}.qcow2"
    return str(target)


def _require_no_strangers(before: Tree) -> None:
    attachments.require_free(path for path, names in before.strangers.items() if names)
    for path, names in before.strangers.items():
        if names:
            raise errors.Conflict(
                f"{Path(path).name} is needed by {', '.join(names)}",
                hint="delete those VMs first, or bring their disks into their own homes: hvmgr disk localize VM SLOT",
                path=path,
                users=list(names),
            )


def _is_ours(image: Image) -> bool:
    return image.keeper is not Keeper.OUTSIDE


def _children_first(before: Tree) -> list[Image]:
    return sorted(before.images.values(), key=lambda image: -_depth(before, image))


def _depth(before: Tree, image: Image) -> int:
    """How many images of a chain are left, damaged or not."""
    seen: set[str] = set()
    below: Image | None = image
    while below is not None and below.path not in seen:
        seen.add(below.path)
        below = None if below.parent is None else before.images.get(below.parent)
    return len(seen)
