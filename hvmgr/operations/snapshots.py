"""Snapshots of one VM: create, rename, and what other operations need to know of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from hvmgr import errors
from hvmgr.host import saved_state
from hvmgr.host.domain import State
from hvmgr.model import configuration, plan, tree
from hvmgr.model.configuration import Configuration
from hvmgr.model.metadata import DiskRecord, SavedState, SnapshotRecord, SnapshotType
from hvmgr.model.plan import Plan, Step
from hvmgr.model.policy import Origin
from hvmgr.model.tree import Tree
from hvmgr.operations import background, quiescing, strangers, stuck_memory, undo_slot, vhd_bases
from hvmgr.operations.background import How
from hvmgr.operations.session import Session
from hvmgr.storage import durable, frozen, images, vm_home

NAME_LENGTH = 100


@dataclass(frozen=True, slots=True)
class Wish:
    """What ``create`` is asked for."""

    name: str | None = None
    notes: str = ""
    type: SnapshotType = SnapshotType.STANDARD
    how: How = background.USUAL
    automatic: Origin | None = None


# --- create ---------------------------------------------------------------------------------------------------------


def plan_create(session: Session, wish: Wish) -> Plan:
    """The present becomes a snapshot, and goes on in new images."""
    name = require_name(wish.name) if wish.name is not None else None
    home, layout, state = session.home, session.layout, session.state()
    present = home.present()
    if state in (State.SLEEPING, State.CRASHED):
        raise errors.Conflict(f"{present.name} is {state}", hint="wake it up or stop it, then run the command again")
    facts = vm_home.require_facts(present)
    undo = home.undo()
    before = present_tree(session) if undo is None else whole_tree(session)
    snapshot_id, change_id, moment = session.new_id(), session.new_id(), session.now()
    require_own_disks(session, present)
    children = {slot: str(layout.image(slot, session.new_id())) for slot in before.present.disks}
    change = tree.plan_create(before, snapshot_id, children)
    warn_of_depth(session, change.after)
    if state not in (State.RUNNING, State.PAUSED):  # a running QEMU carries them over to the new images
        strangers.say_what_bitmaps_lose(session)
    active = state in (State.RUNNING, State.PAUSED)
    taken = quiescing.settle_type(session, state, wish.type)
    saved = _state_to_save(session, state, taken, present)
    saves = active and saved is not SavedState.NONE
    record = SnapshotRecord(
        id=snapshot_id,
        name=name or default_name(present.name, moment, wish.automatic),
        created=moment,
        type=taken,
        state=saved,
        parent=facts.parent,
        automatic=wish.automatic,
        notes=wish.notes,
        qemu=session.domain().qemu_version() if saves else None,
        host=session.connection.capabilities().uuid or None if saves else None,
    )
    snapshot = present.copy()
    if present.nvram is not None:  # also when no start has made it yet: that is what comes back then
        snapshot.set_nvram(layout.snapshot_nvram(snapshot_id))
    snapshot.set_metadata(dataclasses.replace(facts, snapshot=record))
    after = present.copy()
    point_disks(after, children)
    after.set_metadata(dataclasses.replace(facts, parent=snapshot_id, change=change_id, disks=together(facts.disks)))

    creates = [step for step in change.prepare if isinstance(step, plan.CreateImage)]
    freezes = [step for step in change.prepare if isinstance(step, plan.FreezeImage)]
    prepare: list[Step] = [*creates, plan.MakeSnapshotFolder(snapshot_id=snapshot_id)]
    finish: list[Step] = []
    # The TPM's state lies in saved memory too, which an apply may leave.
    nvram, tpm = layout.snapshot_nvram(snapshot_id), layout.snapshot_tpm(snapshot_id)
    copies = copies_of_firmware(session, present, nvram, tpm)
    memory = None if saved is SavedState.NONE else layout.memory(snapshot_id)
    switch: Step
    if active:
        rests = taken is SnapshotType.PRODUCTION
        going_on = background.plan_switch(session, state, children, memory, copies, wish.how, quiesce=rests)
        prepare += going_on.prepare
        switch = going_on.switch
        finish += [*going_on.resume, plan.Define(xml=after.to_xml()), *freezes]
        after_memory = going_on.memory
    else:
        prepare += [*copies, *freezes]
        if state is State.SAVED:
            prepare += _steps_for_managed_save(session, before, children, memory)
        switch = plan.Define(xml=after.to_xml())
        after_memory = background.compression(memory, wish.how)
    finish += [
        *after_memory,
        plan.WriteSnapshot(snapshot_id=snapshot_id, xml=snapshot.to_xml()),
        plan.WritePresent(),
        *undo_slot.emptied(session, undo),
        *change.finish,
        plan.RecordFrozen(paths=tuple(step.path for step in freezes)),
    ]
    return Plan(
        plan_id=change_id,
        vm_id=home.vm_id,
        operation="snapshot create",
        subject=f"creation of snapshot '{record.name}' of {present.name}",
        prepare=tuple(prepare),
        switch=switch,
        finish=tuple(finish),
        hold=() if active else working(before),
    )


def snapshot_of(one: Plan) -> str:
    """The id of the snapshot that a ``plan_create`` makes."""
    return next(step.snapshot_id for step in one.finish if isinstance(step, plan.WriteSnapshot))


def require_name(name: str) -> str:
    """The name, when it may be a snapshot's; UsageError says why not."""
    if not name.strip():
        raise errors.UsageError("a snapshot's name cannot be empty", hint="give it 1 to 100 characters")
    if len(name) > NAME_LENGTH:
        raise errors.UsageError(
            f"a snapshot's name has at most {NAME_LENGTH} characters, this one has {len(name)}",
            hint="put the rest into --notes",
        )
    if not name.isprintable():
        raise errors.UsageError("a snapshot's name cannot hold control characters", hint="use printable characters")
    return name


_AUTOMATIC = {Origin.START: "at start", Origin.SCHEDULE: "scheduled", Origin.CRASH: "crashed"}


def default_name(vm: str, moment: datetime, automatic: Origin | None = None) -> str:
    """``web (2026-11-21 14.03.05)``, in local time; ``web scheduled (…)``."""
    why = "" if automatic is None else f" {_AUTOMATIC[automatic]}"
    name = f"{vm}{why} ({moment.astimezone():%Y-%m-%d %H.%M.%S})"
    return name if len(name) <= NAME_LENGTH else name[-NAME_LENGTH:]


def _state_to_save(session: Session, state: State, taken: SnapshotType, present: Configuration) -> SavedState:
    with_memory = taken is SnapshotType.STANDARD
    if state is State.OFF:
        return SavedState.NONE
    if state is State.SAVED:
        if not with_memory:
            return SavedState.NONE
        was_running = saved_state.read(session.connection.managed_save_path(present.name)).was_running
        return SavedState.RUNNING if was_running else SavedState.PAUSED
    require_same_disks(session, present, with_memory=with_memory)
    if not with_memory:
        return SavedState.NONE
    require_memory(session, present)
    return SavedState.RUNNING if state is State.RUNNING else SavedState.PAUSED


def require_own_disks(session: Session, present: Configuration) -> None:
    """A disk that is frozen under a VM that writes it loses that VM's data."""
    for disk in present.disks():
        if disk.takes_part and disk.shareable:
            raise errors.Unsupported(
                f"disk {disk.slot} is shareable: other VMs may write it while a snapshot needs it unchanged",
                hint="leave it out of snapshots: snapshot='no' on the <disk>",
            )
    for path, name in strangers.writers(session, vm_home.disks_of(present).values()).items():
        raise errors.Conflict(
            f"{path} is written by the VM '{name}' as well",
            hint="give each VM a disk of its own, or leave it out of snapshots: snapshot='no' on the <disk>",
            path=path,
        )


def require_same_disks(session: Session, present: Configuration, *, with_memory: bool) -> None:
    """A disk that is there only until the VM stops, or only after that, has no place in a snapshot."""
    domain = session.domain()
    live = configuration.parse(domain.xml(live=True), source=f"libvirt's live XML of {domain.name}")
    left_out = {disk.slot for disk in present.disks() if not disk.takes_part}  # by a mark that the next start takes
    running = {slot: path for slot, path in vm_home.disks_of(live).items() if slot not in left_out}
    stored = vm_home.disks_of(present)
    for slot in sorted(stored.keys() - running.keys()):
        raise errors.Conflict(
            f"disk {slot} is attached only after the next start",
            hint="make it the same in both: virsh attach-disk --live or detach-disk --config",
        )
    for slot in sorted(running.keys() - stored.keys()):
        if with_memory:
            raise errors.Conflict(
                f"disk {slot} is attached only until the VM stops and takes no part, so that saved memory would not fit it",
                hint="make it the same in both: virsh attach-disk or detach-disk --config; or give --type disk-only",
            )
        session.say(f"disk {slot} is attached only until the VM stops: it takes no part in the snapshot")
    writing = {vm_home.canonical(str(path)) for path in domain.writable_files()}
    for slot, path in stored.items():
        if running[slot] != path or path not in writing:
            raise errors.Conflict(
                f"disk {slot}: QEMU does not write to {path}",
                hint="stop the VM and start it again, then run the command again",
                path=path,
            )
    if domain.has_job():
        raise errors.Busy(f"libvirt or QEMU works on {domain.name}", hint="wait until that is done, then run it again")


def require_memory(session: Session, present: Configuration) -> None:
    """The running VM's memory can be saved, and would fit its frozen disks."""
    hint = "take the disks alone with --type disk-only, or stop the VM first"
    for disk in present.disks():
        if disk.device in ("disk", "lun") and not disk.readonly and not disk.takes_part:
            raise errors.Conflict(
                f"disk {disk.slot} is writable and takes no part in snapshots, so that saved memory would not fit it",
                hint=hint,
            )
    stuck_memory.refuse(session, hint="take the disks alone with --type disk-only")
    if reasons := session.domain().blocked_reasons():
        vhd = vhd_bases.find_reason(session)
        why, way = vhd or ("; ".join(reasons), "stop the VM first")
        raise errors.Unsupported(
            f"QEMU cannot save the memory of {present.name}: {why}",
            hint=f"{way}; or take the disks alone with --type disk-only",
        )


def _steps_for_managed_save(
    session: Session, before: Tree, children: dict[str, str], memory: Path | None
) -> list[Step]:
    steps: list[Step] = []
    if memory is not None:
        steps.append(
            plan.CopyFile(source=str(session.connection.managed_save_path(session.home.name)), target=str(memory))
        )
    disks = tuple((slot, path, children[slot]) for slot, path in before.present.disks.items())
    return [*steps, plan.PointManagedSave(disks=disks)]


def copies_of_firmware(
    session: Session, present: Configuration, nvram: Path, tpm: Path
) -> list[plan.CopyFile | plan.CopyFolder]:
    """Copies of what the VM's firmware and its TPM keep, as far as a start has made it yet."""
    steps: list[plan.CopyFile | plan.CopyFolder] = []
    if present.nvram is not None and present.nvram.exists():
        steps.append(plan.CopyFile(source=str(present.nvram), target=str(nvram)))
    folder = session.connection.tpm_folder(session.home.vm_id)
    if present.has_tpm and folder.is_dir():
        steps.append(plan.CopyFolder(source=str(folder), target=str(tpm)))
    return steps


# --- rename, notes --------------------------------------------------------------------------------------------------


def describe(session: Session, snapshot_id: str, *, name: str | None = None, notes: str | None = None) -> None:
    """A snapshot has another name or other notes; the only things of it that can be changed.

    Whoever says something about an automatic one makes it his own: from then on nobody else removes it.
    """
    snapshot = session.home.snapshot(snapshot_id)
    facts, record = vm_home.require_facts(snapshot), record_of(snapshot)
    subject = f"new {'notes' if name is None else 'name'} of snapshot '{record.name}' of {session.home.name}"
    if name is not None:
        record = dataclasses.replace(record, name=require_name(name))
    if notes is not None:
        record = dataclasses.replace(record, notes=notes)
    record = dataclasses.replace(record, automatic=None)
    snapshot.set_metadata(dataclasses.replace(facts, snapshot=record))
    session.require_consent("snapshot rename" if notes is None else "snapshot notes", subject)
    durable.write_file(session.layout.snapshot(snapshot_id), snapshot.to_xml().encode())


# --- shared ---------------------------------------------------------------------------------------------------------


def whole_tree(session: Session, *, with_libvirts: bool = True, outside: bool = False) -> Tree:
    """Both graphs with every user on this host; ``with_libvirts`` own snapshots and dirty bitmaps of this VM too.

    While nobody can tell what belongs to the present, every image counts as used. Other VMs are counted for images
    ``outside`` the home only where these may be written.
    """
    alone = session.home.tree()
    counted = [image.path for image in alone.images.values() if outside or image.keeper is not tree.Keeper.OUTSIDE]
    users = strangers.of(session, counted)
    for path, names in alone.strangers.items():
        users[path] = (*users.get(path, ()), *names)
    for path in strangers.in_other_slots(session, alone):
        users[path] = (*users.get(path, ()), "a disk of its own that snapshots leave out")
    if with_libvirts:
        for path, names in strangers.libvirts_own(session, alone).items():
            users[path] = (*users.get(path, ()), *names)
    if session.doubt is not None:
        users = {**dict.fromkeys(alone.images, ("a disk that was changed outside hvmgr",)), **users}
    return dataclasses.replace(alone, strangers=users)


def require_whole(session: Session, before: Tree, disks: Mapping[str, str], *, skip: int = 0) -> None:
    """The images of these disks (without the first ``skip`` of each chain) are what they were; Corrupt names who is hurt."""
    for path in disks.values():
        for image in before.chain(path)[skip:]:
            if not frozen.is_changed(session.layout, Path(image.path)):
                continue
            hurt = [
                f"'{session.home.entry(node.snapshot_id).record.name}'"
                for node in before.nodes.values()
                if any(image in before.chain(one) for one in node.disks.values())
            ]
            raise errors.Corrupt(
                f"{image.path} was changed after it was frozen; the snapshots that need it are damaged: {', '.join(hurt)}",
                hint="put the file back from a backup, or delete those snapshots; others can be applied",
                path=image.path,
                snapshots=hurt,
            )


def present_tree(session: Session) -> Tree:
    """The present's chains alone, whatever the size of the tree."""
    return session.home.present_tree()


def record_of(snapshot: Configuration) -> SnapshotRecord:
    """What a snapshot's configuration says of the snapshot; Corrupt when it is none."""
    record = vm_home.require_facts(snapshot).snapshot
    if record is None:
        raise errors.Corrupt(f"{snapshot.source} is no snapshot", path=snapshot.source)
    return record


def together(disks: Iterable[DiskRecord]) -> tuple[DiskRecord, ...]:
    """The records of disks that stand on the images of the snapshot above them again."""
    return tuple(dataclasses.replace(one, apart=False) for one in disks)


def point_disks(target: Configuration, children: dict[str, str]) -> None:
    """The disks are these qcow2 images, by slot."""
    target.strip_backing_chains()
    for slot, path in children.items():
        target.set_disk_source(slot, Path(path), images.QCOW2)


def working(before: Tree) -> tuple[tuple[str, str], ...]:
    """What is held while the present is put away; one that is missing cannot be held, and going back is the way out."""
    return tuple((path, before.images[path].format) for path in before.present.disks.values() if path in before.images)


def warn_of_depth(session: Session, after: Tree) -> None:
    """Say when chains have become long."""
    if (depth := after.depth()) > tree.WARN_DEPTH:
        session.say(f"the disks stand on chains of up to {depth} images; each one makes the next start slower")
