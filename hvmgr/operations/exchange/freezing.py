"""A running VM is exported from images that nothing writes any more: it goes on in new ones.

What it wrote until then becomes unnamed images below the new ones: a state that needs no repair whenever the command
dies, and which ends when they are merged, by the VM itself after the export, or later.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from hvmgr import errors
from hvmgr.host import saved_state
from hvmgr.host.domain import State
from hvmgr.model import plan, tree
from hvmgr.model.configuration import Configuration
from hvmgr.model.export_options import ExportOptions
from hvmgr.model.layout import Layout
from hvmgr.model.plan import Plan
from hvmgr.operations import background, merge, snapshots
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


def firmware(session: Session, present: Configuration) -> tuple[Path | None, Path | None]:
    """Where NVRAM and TPM state of that moment lie while they are exported; None for what there is not."""
    nvram, tpm = session.layout.export / "nvram", session.layout.export / "tpm"
    made = {Path(one.target) for one in snapshots.copies_of_firmware(session, present, nvram, tpm)}
    return nvram if nvram in made else None, tpm if tpm in made else None


def freeze(session: Session, *, with_memory: bool, quiesce: bool, outcome: str = "nothing was exported") -> None:
    """The VM runs on in new images; its disks of this moment, and ``with_memory`` its memory, are frozen.

    ``outcome`` says what it means to people that this was stopped. HostFailed when the memory did not come through.
    """
    durable.make_folder(session.layout.export)
    try:
        execution.run(session, _plan(session, with_memory=with_memory, quiesce=quiesce))
    except errors.Cancelled as error:
        if not error.facts.get("complete"):
            raise
        session.forget_uses()
        end(session, outcome=outcome)
        raise errors.Cancelled(f"stopped; {outcome}") from error
    session.forget_uses()
    if with_memory and not saved_state.is_complete(memory(session.layout)):
        end(session, outcome=outcome)
        raise errors.HostFailed(
            f"the memory of {session.home.name} was not saved completely, so that {outcome}",
            hint="export it without --with-state",
        )


def end(session: Session, *, outcome: str = "the export is complete") -> None:
    """What was frozen for the export is merged again; what keeps that from being done now is no failure of the export."""
    try:
        one = merge.plan_merge(session)
        if one.finish:
            execution.run(session, one)
    except (errors.NoSpace, errors.HostFailed, errors.OutcomeUnknown, errors.Conflict, errors.Cancelled) as error:
        session.say(f"{outcome}; {error}")
        return
    if tree.pending(session.home.tree()):
        session.say(
            f"images of {session.home.name} that were frozen for this wait as unnamed images, and the next"
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
    creates = [step for step in change.prepare if isinstance(step, plan.CreateImage)]
    copies = snapshots.copies_of_firmware(session, present, layout.export / "nvram", layout.export / "tpm")
    to = memory(layout) if with_memory else None
    going_on = background.plan_switch(session, state, children, to, copies, background.USUAL, quiesce=quiesce)
    return Plan(
        plan_id=change_id,
        vm_id=session.home.vm_id,
        operation="export",
        subject=f"freezing of the disks of {present.name}",
        prepare=(*creates, *going_on.prepare),
        switch=going_on.switch,
        finish=(
            *going_on.resume,
            plan.Define(xml=after.to_xml()),
            *freezes,
            *going_on.memory,
            plan.WritePresent(),
            plan.RecordFrozen(paths=tuple(step.path for step in freezes)),
        ),
    )
