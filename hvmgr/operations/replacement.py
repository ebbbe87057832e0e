"""The present replaced by another state: apply and undo. Each plans with the model; the plan is run by ``execution``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from hvmgr import errors
from hvmgr.host.domain import State
from hvmgr.model import configuration, plan, tree
from hvmgr.model.configuration import Configuration
from hvmgr.model.metadata import Metadata, SavedState, SnapshotRecord
from hvmgr.model.plan import Plan, Step
from hvmgr.operations import loading, snapshots, strangers, stuck_memory, undo_slot, vhd_bases
from hvmgr.operations.session import Session
from hvmgr.storage import vm_home


@dataclass(frozen=True, slots=True)
class Replacement:
    """How an apply treats the present."""

    without_state: bool = False
    keep_undo: bool = True
    discard_state: bool = False


def plan_apply(session: Session, snapshot_id: str, how: Replacement) -> Plan:
    """The VM becomes what it was at a snapshot; its name and id stay, its present goes into the undo slot."""
    home, layout = session.home, session.layout
    present, target = home.present(), home.snapshot(snapshot_id)
    facts, record = vm_home.require_facts(present), snapshots.record_of(target)
    before = snapshots.whole_tree(session)
    node = tree.require_node(before, snapshot_id)
    _require_undamaged(record, present)
    snapshots.require_whole(session, before, node.disks)
    children = {slot: str(layout.image(slot, session.new_id())) for slot in node.disks}
    change = tree.plan_apply(before, snapshot_id, children, keep_undo=how.keep_undo)
    snapshots.warn_of_depth(session, change.after)
    strangers.say_what_bitmaps_lose(session)
    change_id = session.new_id()
    after = target.copy()
    _become_present(session, after, present)
    snapshots.point_disks(after, children)
    prepare: list[Step] = list(change.prepare)
    if target.nvram is not None:
        nvram = layout.nvram(session.new_id())
        after.set_nvram(nvram)
        if target.nvram.exists():
            prepare.append(plan.CopyFile(source=str(target.nvram), target=str(nvram)))
    target_facts = vm_home.require_facts(target)
    after.set_metadata(
        Metadata(
            home=home.path,
            uri=facts.uri,
            created=facts.created,
            parent=snapshot_id,
            disks=snapshots.together(target_facts.disks),
            change=change_id,
            owner=facts.owner,  # who owns the VM, and what he wants of it, does not change with time
            tags=facts.tags,
            policy=facts.policy,
            origin=facts.origin,
        )
    )
    prepare += put_present_away(session, present, facts, how)
    uses_memory = record.state is not SavedState.NONE and not how.without_state
    if uses_memory:
        prepare.append(_start_from(session, record, after, children))
    finish: list[Step] = []
    if target.has_tpm and not uses_memory:
        was_off = record.state is SavedState.NONE  # else the TPM's state lies in the saved memory alone
        finish += _tpm_becomes(session, layout.snapshot_tpm(snapshot_id), may_be_blank=was_off)
    return Plan(
        plan_id=change_id,
        vm_id=home.vm_id,
        operation="snapshot apply",
        subject=f"return of {present.name} to snapshot '{record.name}'",
        prepare=tuple(prepare),
        switch=plan.Define(xml=after.to_xml()),
        finish=(
            *finish,
            *undo_slot.filled_by(session, present, keep=how.keep_undo),
            plan.WritePresent(),
            *change.finish,
            plan.RemoveFile(path=str(layout.put_away)),
        ),
        hold=snapshots.working(before),
    )


def plan_undo(session: Session, how: Replacement) -> Plan:
    """Present and undo slot change places."""
    home = session.home
    present, undo = home.present(), home.undo()
    before = snapshots.whole_tree(session)
    tree.plan_undo(before)
    assert undo is not None
    facts = vm_home.require_facts(present)
    undo_facts = vm_home.require_facts(undo)
    snapshots.require_whole(session, before, vm_home.disks_of(undo), skip=1)
    change_id = session.new_id()
    after = undo.copy()
    _become_present(session, after, present)
    after.set_metadata(
        dataclasses.replace(
            undo_facts,
            change=change_id,
            owner=facts.owner,
            tags=facts.tags,
            policy=facts.policy,
            origin=facts.origin,
        )
    )
    finish: list[Step] = []
    if undo.has_tpm and undo_facts.change is not None:
        tpm = session.layout.tpm_copy(undo_facts.change)
        finish = [*_tpm_becomes(session, tpm, may_be_blank=True), plan.RemoveFolder(path=str(tpm))]
    return Plan(
        plan_id=change_id,
        vm_id=home.vm_id,
        operation="snapshot undo",
        subject=f"undo of the last apply of {present.name}",
        prepare=tuple(put_present_away(session, present, facts, how)),
        switch=plan.Define(xml=after.to_xml()),
        finish=(
            *finish,
            plan.ReplaceFile(path=str(session.layout.undo), text=present.to_xml()),
            plan.WritePresent(),
            plan.RemoveFile(path=str(session.layout.put_away)),
        ),
        hold=snapshots.working(before),
    )


def _require_undamaged(record: SnapshotRecord, present: Configuration) -> None:
    if record.damaged:
        raise errors.Corrupt(
            f"snapshot '{record.name}' is damaged: an image of its disk {', '.join(record.damaged)} was written outside "
            "hvmgr after it was taken",
            hint=f"apply another one; this one can be deleted: hvmgr snapshot delete {present.name} '{record.name}'",
            snapshot=record.id,
            disks=list(record.damaged),
        )


def _tpm_becomes(session: Session, copy: Path, *, may_be_blank: bool) -> list[Step]:
    """The TPM's state is what was copied; without a copy there was none yet, and the next start makes a new one."""
    folder = session.connection.tpm_folder(session.home.vm_id)
    if copy.is_dir():
        return [plan.ReplaceFolder(source=str(copy), target=str(folder))]
    return [plan.RemoveFolder(path=str(folder))] if may_be_blank else []


def _become_present(session: Session, after: Configuration, present: Configuration) -> None:
    """What an old configuration takes over from the present: name and id; a new generation id; media that are gone."""
    after.set_name(present.name)
    after.set_uuid(present.uuid)
    if after.genid is not None:
        after.set_genid(session.new_id())
    after.strip_backing_chains()
    _eject_missing(session, after)


def _eject_missing(session: Session, after: Configuration) -> None:
    for disk in after.disks():
        is_local = disk.is_removable and disk.source is not None and disk.type in {"file", "block"}
        if is_local and disk.source is not None and not Path(disk.source).exists():
            after.eject(disk.slot)
            session.say(f"{disk.source} is gone: {disk.slot} is empty now")


def put_present_away(session: Session, present: Configuration, facts: Metadata, how: Replacement) -> list[Step]:
    """The present is off afterwards; what it had in memory can be put back until the new state is in place."""
    state, memory = session.state(), str(session.layout.put_away)
    steps: list[Step] = []
    if state is State.CRASHED or (how.discard_state and state is not State.OFF):
        steps.append(plan.DiscardPresent())
    elif state is State.SLEEPING:
        raise errors.Conflict(f"{present.name} sleeps", hint="wake it up, or give --discard-state")
    elif state in (State.RUNNING, State.PAUSED):
        stuck_memory.refuse(session, hint="give --discard-state to lose what it has in memory")
        if reasons := session.domain().blocked_reasons():
            vhd = vhd_bases.find_reason(session)
            why, way = vhd or ("; ".join(reasons), "stop it first")
            raise errors.Conflict(
                f"{present.name} runs and its memory cannot be saved: {why}",
                hint=f"{way}; or give --discard-state to lose what it has in memory",
            )
        _require_true_view(session)
        steps.append(plan.SavePresent(memory=memory, paused=state is State.PAUSED))
    elif state is State.SAVED:
        steps.append(plan.TakeManagedSave(memory=memory))
    folder = session.connection.tpm_folder(session.home.vm_id)
    if present.has_tpm and folder.is_dir() and facts.change is not None:
        steps.append(plan.CopyFolder(source=str(folder), target=str(session.layout.tpm_copy(facts.change))))
    return steps


def _require_true_view(session: Session) -> None:
    """Saved memory can only be put back when libvirt knows the images that belong to it."""
    domain = session.domain()
    live = configuration.parse(domain.xml(live=True), source=f"libvirt's live XML of {domain.name}")
    writing = {vm_home.canonical(str(path)) for path in domain.writable_files()}
    if domain.has_job():
        raise errors.Busy(f"libvirt or QEMU works on {domain.name}", hint="wait until that is done, then run it again")
    stored = vm_home.disks_of(session.home.present())
    for slot, path in vm_home.disks_of(live).items():
        if path not in writing:
            raise errors.Conflict(
                f"disk {slot}: QEMU does not write to {path}, as libvirt believes, so that its memory cannot be kept",
                hint="stop it first, or give --discard-state to lose what it has in memory",
                path=path,
            )
        if stored.get(slot, path) != path:
            raise errors.Conflict(
                f"disk {slot}: the VM runs on {path}, its configuration has been edited to {stored[slot]}",
                hint="stop it first, or give --discard-state to lose what it has in memory",
                path=path,
            )


def _start_from(
    session: Session, record: SnapshotRecord, after: Configuration, children: dict[str, str]
) -> plan.StartFrom:
    memory = session.layout.memory(record.id)
    live = loading.require_loadable(session, record, memory)
    live.strip_backing_chains()
    live.set_name(after.name)
    snapshots.point_disks(live, children)
    if after.nvram is not None:
        live.set_nvram(after.nvram)
    _eject_missing(session, live)
    return plan.StartFrom(memory=str(memory), xml=live.to_xml(), paused=record.state is SavedState.PAUSED)
