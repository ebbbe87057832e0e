"""What a VM's owner wants of its snapshots, and of the VM after a crash: set, and put into words."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime

from hvmgr import errors, keeping, settings
from hvmgr.keeping import Keep
from hvmgr.model import metadata, plan, policy
from hvmgr.model.metadata import Metadata, SnapshotType
from hvmgr.model.plan import Plan
from hvmgr.model.policy import Policy, Recovery, SnapshotDefault
from hvmgr.operations.session import Session
from hvmgr.storage import vm_home

NONE = "none"
DEFAULT = "default"
_REVERT = "revert"


@dataclass(frozen=True, slots=True)
class Wishes:
    """What ``vm set`` is asked for, in the words of the command line; None leaves a setting as it is."""

    snapshot_type: str | None = None
    automatic_snapshots: bool | None = None
    keep: str | None = None
    schedule: str | None = None
    recovery: str | None = None
    owner: str | None = None  # empty: nobody
    tags: tuple[str, ...] = ()
    untags: tuple[str, ...] = ()

    def check(self) -> None:
        """UsageError where owner and tags make no sense."""
        metadata.require_labels(self.owner or None, *self.tags)
        for tag in self.tags:
            if tag in self.untags:
                raise errors.UsageError(f"'{tag}' is to be added and to be taken away", hint="leave one of them out")

    @property
    def is_about_snapshots(self) -> bool:
        """Whether anything but owner and tags is wished."""
        return any(
            one is not None
            for one in (self.snapshot_type, self.automatic_snapshots, self.keep, self.schedule, self.recovery)
        )

    def labelled(self, old: Metadata) -> Metadata:
        """The facts with the owner and the tags that are wished."""
        tags = (tag for tag in dict.fromkeys((*old.tags, *self.tags)) if tag not in self.untags)
        owner = old.owner if self.owner is None else self.owner or None
        return dataclasses.replace(old, owner=owner, tags=tuple(tags))

    def applied(self, old: Policy, now: datetime, find: Callable[[str], str]) -> Policy:
        """The policy with these wishes; ``find`` gives the id of a snapshot that is named. UsageError before all else."""
        new = old if old.understood else policy.DEFAULT
        if self.snapshot_type is not None:
            new = dataclasses.replace(new, type=_type(self.snapshot_type))
        if self.automatic_snapshots is not None:
            new = dataclasses.replace(new, automatic=self.automatic_snapshots)
        if self.keep is not None:
            new = dataclasses.replace(new, keep=None if self.keep == DEFAULT else keeping.parse(self.keep))
        if self.schedule is not None:
            wanted = None if self.schedule == NONE else policy.parse_schedule(self.schedule)
            if wanted != new.schedule:
                new = dataclasses.replace(new, schedule=wanted, since=None if wanted is None else now)
        if self.recovery is not None:
            new = dataclasses.replace(new, recovery=_recovery(self.recovery, find))
        return new


def plan_set(session: Session, wishes: Wishes, find: Callable[[str], str]) -> Plan | None:
    """The configuration says what is wanted; None when it does already."""
    present = session.home.present()
    facts = vm_home.require_facts(present)
    wanted = facts
    if wishes.is_about_snapshots:
        wanted = dataclasses.replace(facts, policy=wishes.applied(facts.policy, session.now(), find))
        _say_what_is_idle(session, wanted.policy)
    wanted = wishes.labelled(wanted)
    if wanted == facts:
        return None
    present.set_metadata(wanted)
    return Plan(
        plan_id=session.new_id(),
        vm_id=session.home.vm_id,
        operation="vm set",
        subject=f"new settings of {present.name}",
        finish=(plan.Define(xml=present.to_xml()), plan.WritePresent()),
    )


def kept(wanted: Policy) -> tuple[Keep, str]:
    """How many scheduled snapshots are kept, and who says so: ``vm``, a line of a configuration file, or hvmgr itself."""
    if wanted.keep is not None:
        return wanted.keep, "vm"
    return settings.retention(), settings.origin("retention")


def default_type(wanted: Policy, name: str) -> SnapshotType:
    """What a snapshot is when nobody says it; Conflict where snapshots are switched off."""
    if wanted.type is SnapshotDefault.DISABLED:
        raise errors.Conflict(
            f"snapshots of {name} are disabled",
            hint=f"say which one you want all the same, such as --type standard, or: hvmgr vm set {name} "
            "--snapshot-type standard",
        )
    return SnapshotType(wanted.type.value)


def say_lost_target(session: Session, gone: Collection[str]) -> None:
    """A snapshot that was to bring the VM back after a crash is deleted."""
    recovery = session.home.facts().policy.recovery
    if recovery is not None and recovery.snapshot in gone:
        session.say(
            f"{session.home.name} was to go back to that snapshot after a crash, and will now stay off: "
            f"hvmgr vm set {session.home.name} --recovery revert"
        )


def _say_what_is_idle(session: Session, wanted: Policy) -> None:
    if wanted.automatic and wanted.type is SnapshotDefault.DISABLED:
        session.say("snapshots are disabled for this VM: none is taken automatically either")
    elif wanted.schedule is not None and not wanted.automatic:
        session.say("the schedule rests as long as automatic snapshots are off: --automatic-snapshots on")


def _type(text: str) -> SnapshotDefault:
    try:
        return SnapshotDefault(text)
    except ValueError:
        raise errors.UsageError(
            f"'{text}' is no type of snapshots", hint=f"one of {', '.join(SnapshotDefault)}"
        ) from None


def _recovery(text: str, find: Callable[[str], str]) -> Recovery | None:
    word, colon, reference = text.partition(":")
    if text == NONE:
        return None
    if word != _REVERT or (colon and not reference):
        raise errors.UsageError(
            f"'{text}' is nothing to do after a crash", hint="write none, revert, or revert:SNAPSHOT"
        )
    return Recovery(find(reference) if colon else None)
