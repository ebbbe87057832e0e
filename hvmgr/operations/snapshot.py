"""One snapshot of a VM, as the public API has it; ``vm`` gives them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Self

from hvmgr.model.metadata import SavedState, SnapshotType
from hvmgr.model.policy import Origin
from hvmgr.operations import working
from hvmgr.storage.vm_home import SnapshotEntry

if TYPE_CHECKING:
    from hvmgr.operations.vm import VM

# What changes a VM is imported by the methods that do it.


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One snapshot as it was when it was asked for."""

    vm: VM = dataclasses.field(repr=False)
    id: str
    name: str
    notes: str
    created: datetime
    parent: str | None
    type: SnapshotType
    state: SavedState
    damaged: tuple[str, ...]
    automatic: Origin | None
    entry: SnapshotEntry = dataclasses.field(repr=False, compare=False)

    @classmethod
    def of(cls, vm: VM, entry: SnapshotEntry) -> Self:
        """The snapshot of an entry in the VM's home."""
        record = entry.record
        return cls(
            vm=vm,
            id=record.id,
            name=record.name,
            notes=record.notes,
            created=record.created,
            parent=record.parent,
            type=record.type,
            state=record.state,
            damaged=record.damaged,
            automatic=record.automatic,
            entry=entry,
        )

    @property
    def disks(self) -> Mapping[str, str]:
        """The frozen images by slot."""
        return self.entry.disks

    @property
    def has_state(self) -> bool:
        """Whether applying it brings the VM back running or paused."""
        return self.state is not SavedState.NONE

    def apply(
        self,
        *,
        snapshot_first: bool = False,
        without_state: bool = False,
        keep_undo: bool = True,
        discard_state: bool = False,
    ) -> Snapshot | None:
        """The VM becomes what it was here; with ``snapshot_first`` the snapshot of the old present is returned."""
        from hvmgr.operations import background, replacement, snapshots

        still = background.How(in_background=False)  # it is stopped anyway: what it did meanwhile would be lost
        how = replacement.Replacement(without_state=without_state, keep_undo=keep_undo, discard_state=discard_state)
        first = None
        with working.on(self.vm, needs_present=snapshot_first) as session:
            replacement.plan_apply(session, self.id, how)  # refuses before anything is done
            if snapshot_first:
                plan = snapshots.plan_create(session, snapshots.Wish(how=still))
                working.carry_out(session, plan)
                first = snapshots.snapshot_of(plan)
                session.forget_uses()
            working.carry_out(session, replacement.plan_apply(session, self.id, how), [self.id])
        return None if first is None else self.vm.snapshot(first)

    def is_still_present(self, *, without_state: bool = False) -> bool:
        """Whether applying it would change nothing: the VM is off, and provably what it was here."""
        from hvmgr.operations import untouched

        with working.on(self.vm, needs_present=False) as session:
            return untouched.is_still(session, self.id, without_state=without_state)

    def delete(self, *, subtree: bool = False, state_only: bool = False, bandwidth: int | None = None) -> list[str]:
        """The snapshot is gone (with ``subtree`` all below it too); the ids of what was deleted.

        A running VM merges what it has open, at most ``bandwidth`` bytes a second.
        """
        from hvmgr.operations import merge, policies

        with working.on(self.vm, bandwidth=bandwidth) as session:
            if state_only:
                working.carry_out(session, merge.plan_delete_state(session, self.id), [self.id])
                return []
            gone = self.vm.home.tree().subtree(self.id) if subtree else [self.id]
            plan = merge.plan_delete(session, gone)
            working.carry_out(session, plan, gone)
            policies.say_lost_target(session, gone)
            merge.merge_live(session, plan)
        return gone

    def rename(self, name: str) -> None:
        """The snapshot has another name."""
        from hvmgr.operations import snapshots

        with working.on(self.vm, needs_present=False) as session:
            snapshots.describe(session, self.id, name=name)

    def set_notes(self, notes: str) -> None:
        """The snapshot has other notes."""
        from hvmgr.operations import snapshots

        with working.on(self.vm, needs_present=False) as session:
            snapshots.describe(session, self.id, notes=notes)
