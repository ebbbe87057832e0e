"""A running VM is exported from images that nothing writes any more: it goes on in new ones.

What it wrote until then becomes unnamed images below the new ones: a state that needs no repair whenever the command
dies, and which ends when they are merged, by the VM itself after the export, or later.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from hvmgr import errors
from hvmgr.host.domain import State
from hvmgr.model import plan, tree
from hvmgr.model.configuration import Configuration
from hvmgr.model.export_options import ExportOptions
from hvmgr.model.layout import Layout
from hvmgr.model.plan import Plan, Step
from hvmgr.operations import merge, snapshots
from hvmgr.operations.session import Session
from hvmgr.operations.steps import execution
from hvmgr.storage import durable, vm_home

_ACTIVE = (State.RUNNING, State.PAUSED)


def is_needed(state: State, options: ExportOptions) -> bool:
    """Whether the export reads what the VM writes at present."""
    return state in _ACTIVE and options.snapshot is None and not options.config_only


def memory(layout: Layout) -> Path:
    """Where the memory of that moment lies while it is exported."""
    return layout.export / "memory.save"


def firmware(session: Session, present: Configuration, *, memory: bool) -> tuple[Path | None, Path | None]:
    """Where NVRAM and TPM state of that moment lie while they are exported; None for what there is not."""
    has_nvram = present.nvram is not None and present.nvram.is_file()
    has_tpm = present.has_tpm and not memory and session.connection.tpm_folder(session.home.vm_id).is_dir()
    folder = session.layout.export
    return folder / "nvram" if has_nvram else None, folder / "tpm" if has_tpm else None


def freeze(session: Session, *, memory: bool, quiesce: bool) -> None:
    """The VM runs on in new images; its disks of this moment, and with ``memory`` its memory, are frozen."""
    durable.make_folder(session.layout.export)
    execution.run(session, _plan(session, with_memory=memory, quiesce=quiesce))
    session.forget_uses()


def end(session: Session) -> None:
    """What was frozen for the export is merged again; what keeps that from being done now is no failure of the export."""
    one = merge.plan_merge(session)
    if one.finish:
        try:
            execution.run(session, one)
        except (errors.NoSpace, errors.HostFailed, errors.Conflict, errors.Cancelled) as error:
            session.say(f"the export is complete; {error}")
            return
    if tree.pending(session.home.tree()):
        session.say(
            f"images of {session.home.name} that were frozen for the export wait as unnamed images, and the next"
            " 'hvmgr snapshot merge' after it is off merges them"
        )


def _plan(session: Session, *, with_memory: bool, quiesce: bool) -> Plan:
    present, state, layout = session.home.present(), session.state(), session.layout
    snapshots.require_own_disks(session, present)
    snapshots.require_same_disks(session, present, with_memory=with_memory)
    if with_memory:
        snapshots.require_memory(session, present)
    before = snapshots.present_tree(session)
    children = {slot: str(layout.image(slot, session.new_id())) for slot in before.present.disks}
    change = tree.plan_go_on(before, children)
    snapshots.warn_of_depth(session, change.after)
    change_id = session.new_id()
    after = present.copy()
    snapshots.point_disks(after, children)
    after.set_metadata(dataclasses.replace(vm_home.require_facts(present), change=change_id))
    freezes = [step for step in change.prepare if isinstance(step, plan.FreezeImage)]
    prepare: list[Step] = [step for step in change.prepare if isinstance(step, plan.CreateImage)]
    finish: list[Step] = []
    if quiesce:  # before the guest is paused: its agent could do nothing then
        prepare.append(plan.QuiesceGuest())
        finish.append(plan.WakeGuest())
    copies = _copies(session, present, with_memory=with_memory)
    if copies and state is State.RUNNING:
        prepare.append(plan.Suspend())
        finish.insert(0, plan.Resume())
    switch = plan.SwitchDisks(children=tuple(children.items()), memory=str(memory(layout)) if with_memory else None)
    return Plan(
        plan_id=change_id,
        vm_id=session.home.vm_id,
        operation="export",
        subject=f"freezing of the disks of {present.name}",
        prepare=(*prepare, *copies),
        switch=switch,
        finish=(
            *finish,
            plan.Define(xml=after.to_xml()),
            *freezes,
            plan.WritePresent(),
            plan.RecordFrozen(paths=tuple(step.path for step in freezes)),
        ),
    )


def _copies(session: Session, present: Configuration, *, with_memory: bool) -> list[Step]:
    nvram, tpm = firmware(session, present, memory=with_memory)
    steps: list[Step] = []
    if nvram is not None:
        steps.append(plan.CopyFile(source=str(present.nvram), target=str(nvram)))
    if tpm is not None:
        folder = session.connection.tpm_folder(session.home.vm_id)
        steps.append(plan.CopyFolder(source=str(folder), target=str(tpm)))
    return steps
