"""Snapshots with memory that do not stop the guest for longer than it takes to switch its disks: when, and how.

Everything that can be refused is asked before anything is done. Where the host or the guest cannot, libvirt saves the
memory while the guest stands still, and one line says why; nothing is lost but time.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvmgr import errors, units
from hvmgr.host import background_snapshot, userfault
from hvmgr.host.domain import State
from hvmgr.host.userfault import Obstacle
from hvmgr.model import memory_plan, plan
from hvmgr.model.plan import Plan, Step
from hvmgr.operations.session import Session
from hvmgr.operations.steps import memory_steps
from hvmgr.storage import allocation

# A page takes 8 bytes more in the stream, and the devices take a few MiB.
_PAGE = 4096
_PAGE_HEAD = 8
_DEVICES = 64 * units.MIB


@dataclass(frozen=True, slots=True)
class How:
    """How memory is saved: ``in_background`` where that can be, else, with ``fallback``, while the guest stands still."""

    in_background: bool = True
    fallback: bool = True
    compress: bool = False


USUAL = How()


@dataclass(frozen=True, slots=True)
class Switch:
    """The switch to new images with what belongs to it: steps before it, right after it, and when the new state is safe.

    The guest's file systems rest, and the guest stands still, as shortly as can be: copies of state files are made before
    that, and brought up to the instant of the switch where they changed.
    """

    prepare: tuple[Step, ...]
    switch: plan.SwitchDisks
    resume: tuple[Step, ...]
    memory: tuple[Step, ...]


def plan_switch(
    session: Session,
    state: State,
    children: Mapping[str, str],
    memory: Path | None,
    copies: Sequence[Step],
    how: How,
    *,
    quiesce: bool = False,
) -> Switch:
    """A running or paused VM goes on in its ``children``; ``copies`` are of state files that have to be of that instant.

    With ``quiesce`` the guest's file systems are at rest then, for which its agent must not be paused yet.
    """
    disks = tuple(children.items())
    pairs = tuple((one.source, one.target) for one in copies if isinstance(one, plan.CopyFile | plan.CopyFolder))
    size = None
    if memory is not None and how.in_background:
        size = _size_to_reserve(session, state, memory.parent, fallback=how.fallback)
    if size is None:
        stops = state is State.RUNNING and bool(copies)
        rest: tuple[Step, ...] = (plan.QuiesceGuest(),) if quiesce else ()
        wake: tuple[Step, ...] = (plan.WakeGuest(),) if quiesce else ()
        return Switch(
            prepare=(*copies, *rest, *((plan.Suspend(),) if stops else ())),
            switch=plan.SwitchDisks(disks, None if memory is None else str(memory), copies=pairs),
            resume=(*((plan.Resume(),) if stops else ()), *wake),
            memory=compression(memory, how),
        )
    return Switch(
        prepare=(memory_plan.ReserveMemory(path=str(memory), size=size), *copies),
        switch=plan.SwitchDisks(disks, str(memory), background=True, copies=pairs, fallback=how.fallback),
        resume=(),
        memory=(memory_plan.AwaitMemory(path=str(memory)), *compression(memory, how)),
    )


def compression(memory: Path | None, how: How) -> tuple[Step, ...]:
    """The step that compresses saved memory, where there is some and that is wanted."""
    return (memory_plan.CompressMemory(path=str(memory)),) if memory is not None and how.compress else ()


def _size_to_reserve(session: Session, state: State, folder: Path, *, fallback: bool) -> int | None:
    """How much memory saved in the background may take in ``folder``; None when the guest has to stand still for it.

    A paused guest stands still anyway. Unsupported when there is no ``fallback`` and it is in the way.
    """
    if state is not State.RUNNING:
        return None
    size = _needed(session)
    obstacle = userfault.find_obstacle(session.domain()) or _find_obstacle_to_space(folder, size)
    if obstacle is None:
        return size
    if not fallback:
        raise errors.Unsupported(
            f"the memory of {session.home.name} cannot be saved while it goes on: {obstacle.reason}",
            hint=f"what it needs: {obstacle.remedy}; or leave out --no-fallback: it then stands still meanwhile",
        )
    memory_steps.say_why_paused(session, obstacle)
    return None


def _needed(session: Session) -> int:
    memory = background_snapshot.memory_size(session.domain())
    return memory + memory // _PAGE * _PAGE_HEAD + _DEVICES


def _find_obstacle_to_space(place: Path, size: int) -> Obstacle | None:
    """QEMU must not meet a full disk, so that all it may need is reserved."""
    folder = next(one for one in (place, *place.parents) if one.is_dir())
    facts = os.statvfs(folder)
    free = facts.f_bavail * facts.f_frsize
    if free < size:
        wanted, there = units.format_size(size), units.format_size(free)
        return Obstacle(f"{wanted} cannot be reserved in {folder}, where {there} are free", f"{wanted} of free space")
    if not allocation.can_reserve(folder):
        return Obstacle(f"the file system of {folder} cannot reserve space", "a file system such as ext4, XFS or btrfs")
    return None


def is_in_background(one: Plan) -> bool:
    """Whether the guest goes on while this plan saves its memory."""
    return isinstance(one.switch, plan.SwitchDisks) and one.switch.background


def take_back(session: Session, snapshot_id: str) -> None:
    """Somebody wanted to stop while the memory was saved: the snapshot goes, and its children are merged back."""
    from hvmgr.operations import merge
    from hvmgr.operations.steps import execution

    session.forget_uses()
    name = session.home.entry(snapshot_id).record.name
    try:
        deletion = merge.plan_delete(session, [snapshot_id])
        execution.run(session, deletion)
        merge.merge_live(session, deletion)
    except errors.Cancelled as error:
        raise errors.Cancelled(
            f"stopped; snapshot '{name}' was removed, images wait to be merged", hint=error.hint
        ) from error
    raise errors.Cancelled(f"stopped; snapshot '{name}' was removed again")
