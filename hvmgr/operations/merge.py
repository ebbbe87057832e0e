"""Deleting snapshots, and merging the images that this leaves unnamed. Guest-visible content never changes here.

What a running VM has open is merged by a plan of its own after the deletion (``merge_live``): from then on nothing else is
open, and whatever ends that merge leaves images that wait, as unnamed ones always do.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from hvmgr import errors, units
from hvmgr.host.domain import State
from hvmgr.model import outside_images, plan, tree
from hvmgr.model.configuration import Configuration
from hvmgr.model.metadata import SavedState
from hvmgr.model.plan import Plan, Step
from hvmgr.model.tree import Change, Tree
from hvmgr.operations import chains, snapshots, undo_slot
from hvmgr.operations.session import Session
from hvmgr.operations.steps import execution
from hvmgr.storage import attachments, frozen, images, transfers, vm_home

_MERGES = (plan.MergeUp, plan.MergeDown, plan.StreamLive, plan.CommitLive)


def plan_delete(session: Session, snapshot_ids: Sequence[str], *, merging: bool = True) -> Plan:
    """The snapshots go; their images go or are merged as far as nothing else needs them.

    Without ``merging`` what can be merged waits for a plan of its own, and needs no space now.
    """
    home, layout = session.home, session.layout
    before = snapshots.whole_tree(session)
    _require_not_sent(before, snapshot_ids)
    _require_not_mounted(session, before, snapshot_ids)
    live = session.busy_images()
    change = _merging_whole_images(session, lambda unfit: tree.plan_delete(before, snapshot_ids, busy=live | unfit))
    if not merging:
        kept = tuple(step for step in change.finish if not isinstance(step, plan.MergeUp | plan.MergeDown))
        change = dataclasses.replace(change, finish=kept)
    _require_space(before, change.finish)
    change_id = session.new_id()
    present = home.present()
    facts = vm_home.require_facts(present)
    finish: list[Step] = [*_free_managed_save(session, before), *undo_slot.emptied(session, home.undo())]
    finish += [
        _new_parent(session, node.snapshot_id, node.parent)
        for node in change.after.nodes.values()
        if node.parent != before.nodes[node.snapshot_id].parent
    ]
    states_chain = bool(change.finish) and _states_chain(session, present)
    if states_chain or change.after.present.parent != before.present.parent:
        present.strip_backing_chains()
        disks = chains.set_apart(facts.disks, _apart_above(session, before, change.after.present.parent))
        present.set_metadata(dataclasses.replace(facts, parent=change.after.present.parent, disks=disks))
        finish += [plan.Define(xml=present.to_xml()), plan.WritePresent()]
    finish += [plan.RemoveSnapshot(snapshot_id=one) for one in snapshot_ids]
    finish += [*change.finish, *(_merging_live(change.after, live) if session.dry_run else ())]
    names = ", ".join(f"'{home.entry(one).record.name}'" for one in snapshot_ids[:3])
    more = f" and {len(snapshot_ids) - 3} more" if len(snapshot_ids) > 3 else ""
    return Plan(
        plan_id=change_id,
        vm_id=layout.vm_id,
        operation="snapshot delete",
        subject=f"deletion of snapshot {names}{more} of {present.name}",
        finish=tuple(finish),
    )


def _require_not_sent(before: Tree, snapshot_ids: Sequence[str]) -> None:
    """An image that nothing else stands on would be left over when the transfer that reads it ends."""
    children = before.children()
    named = [path for one in snapshot_ids if one in before.nodes for path in before.nodes[one].disks.values()]
    transfers.require_none(path for path in named if not children.get(path))


def _require_not_mounted(session: Session, before: Tree, snapshot_ids: Sequence[str]) -> None:
    """What is mounted of a snapshot that goes: Conflict. What is mounted above it only keeps its images, which is said."""
    named = [path for one in snapshot_ids if one in before.nodes for path in before.nodes[one].disks.values()]
    for path, users in attachments.users(named).items():
        for one in (user for user in users if user.mount is not None):
            sentence, hint = attachments.use_of(one)
            if (
                one.mount is not None
                and one.mount.kept is None
                and one.is_in_place
                and vm_home.canonical(one.path) == path
            ):
                raise errors.Conflict(f"{path} is {sentence}", hint=hint, path=path)
            if session.layout.owns(path):
                session.say(
                    f"{path} stays as it is: {attachments.name_of(one)} needs it; afterwards: hvmgr snapshot merge"
                )


def merge_live(session: Session, deletion: Plan) -> None:
    """What a running VM has open of the images that a deletion left unnamed is merged, too, where there is space for it."""
    if not session.is_active():
        return
    session.forget_uses()
    try:
        one = plan_merge(session, deletion=deletion)
    except errors.NoSpace as error:  # what was asked for is done
        session.say(f"images of {session.home.name} wait for a later 'hvmgr snapshot merge': {error}")
        return
    if one.finish:
        execution.run(session, one)
    merge_upwards(session, one)


def merge_upwards(session: Session, merged: Plan) -> None:
    """Where a security module kept QEMU from writing below its image, that image takes in what it can, which is said."""
    error, session.denied = session.denied, None
    if error is None:
        return
    session.waiting.clear()
    session.forget_uses()
    one = plan_merge(session, deletion=merged, denied=error)
    if one.finish:
        session.say(f"{error}: images are merged upwards instead, where that can be")
        execution.run(session, one)


def plan_delete_state(session: Session, snapshot_id: str) -> Plan:
    """Only the saved memory of a snapshot goes; applied afterwards, the VM is off."""
    snapshot = session.home.snapshot(snapshot_id)
    facts = vm_home.require_facts(snapshot)
    assert facts.snapshot is not None
    if facts.snapshot.state is SavedState.NONE:
        raise errors.Conflict(f"snapshot '{facts.snapshot.name}' has no saved state")
    record = dataclasses.replace(facts.snapshot, state=SavedState.NONE)
    snapshot.set_metadata(dataclasses.replace(facts, snapshot=record))
    return Plan(
        plan_id=session.new_id(),
        vm_id=session.home.vm_id,
        operation="snapshot delete",
        subject=f"deletion of the saved state of snapshot '{record.name}'",
        finish=(
            plan.ReplaceFile(path=str(session.layout.snapshot(snapshot_id)), text=snapshot.to_xml()),
            plan.RemoveFile(path=str(session.layout.memory(snapshot_id))),
        ),
    )


def plan_merge(
    session: Session,
    names: Sequence[Path] = (),
    *,
    deletion: Plan | None = None,
    denied: errors.HvmgrError | None = None,
) -> Plan:
    """Unnamed images that were left waiting are merged, and with them those of others that the user ``names``.

    After a ``deletion``, which has merged what is open nowhere and said what waits, only by the running VM. Why QEMU was
    ``denied`` to write below the image that its guest writes, where it was: it merges upwards only.
    """
    before = snapshots.whole_tree(session, outside=bool(names))
    named = _named(session, before, names)
    busy = session.busy_images()
    live = busy if _may_merge_live(session, before, busy) else set()
    closed = (busy if deletion is None else {*before.images}) - live
    change = _merging_whole_images(
        session,
        lambda unfit: tree.plan_merge(
            before, busy=closed | unfit, named=named, live=live - unfit, commits=denied is None
        ),
        quiet=deletion is not None,
    )
    _require_space(before, change.finish)
    _say_what_waits_for_the_end(session, change.after, live, denied)
    return Plan(
        plan_id=session.new_id(),
        vm_id=session.home.vm_id,
        operation="snapshot merge",
        subject=f"merge of unnamed images of {session.home.name}" if deletion is None else deletion.subject,
        finish=_freed(session, before, change.finish),
    )


def plan_forget(session: Session, record: Path, path: str, user: str, subject: str) -> Plan:
    """The ``record`` of a user goes that needed the image ``path``; what nothing needs without it is removed or merged."""
    before = snapshots.whole_tree(session)
    left = tuple(one for one in before.strangers.get(path, ()) if one != user)
    before = dataclasses.replace(before, strangers={**before.strangers, path: left})

    live = session.busy_images()

    def planned(unfit: set[str]) -> Change:
        busy = live | unfit
        removed = tree.remove_userless(before, [path], busy=busy)
        merged = tree.plan_merge(removed.after, busy=busy)
        return Change(after=merged.after, finish=(*removed.finish, *merged.finish))

    change = _merging_whole_images(session, planned)
    _require_space(before, change.finish)
    return Plan(
        plan_id=session.new_id(),
        vm_id=session.home.vm_id,
        operation="vdi-destroy",
        subject=subject,
        finish=(plan.RemoveFile(path=str(record)), *_freed(session, before, change.finish)),
    )


def steps_after(session: Session, after: Tree) -> tuple[Step, ...]:
    """What merges the unnamed images of a tree that another plan makes true, for the end of that plan."""
    live = session.busy_images()
    change = _merging_whole_images(session, lambda unfit: tree.plan_merge(after, busy=live | unfit))
    _require_space(after, change.finish)
    return change.finish


def _merging_live(after: Tree, live: set[str]) -> tuple[Step, ...]:
    """How a running VM would merge what a deletion leaves."""
    others = set(after.images) - live
    return tree.plan_merge(after, busy=others, live=live).finish if live else ()


def _may_merge_live(session: Session, before: Tree, live: set[str]) -> bool:
    """Whether the running VM may be asked for a merge; what keeps it from one is said when there is something to merge."""
    if not live or not session.domain().has_job():
        return bool(live)
    if _merging_live(before, live):
        session.say(f"libvirt or QEMU works on {session.home.name}: images wait for a later 'hvmgr snapshot merge'")
    return False


def _named(session: Session, before: Tree, names: Sequence[Path]) -> set[str]:
    """The images that the user names, as the tree calls them; raises the reason against the first that cannot go."""
    if not names:
        return set()
    by_identity = {images.identity(Path(path)): path for path in before.images}
    named = set()
    for name in names:
        path = vm_home.canonical(str(name))
        named.add(by_identity.get(images.identity(Path(path)), path) if Path(path).exists() else path)
    outside_images.require_named(before, named)
    for path in sorted(named & session.busy_images()):
        session.say(f"{path} is open in the running VM: it waits; run the command again when the VM is off")
    return named


def _states_chain(session: Session, present: Configuration) -> bool:
    return present.has_backing_chains and not session.is_active()


def _freed(session: Session, before: Tree, steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """Merges, and before them what takes the names of their images out of libvirt's memory."""
    return (*_free_managed_save(session, before), *_free_present(session), *steps) if steps else ()


def _free_present(session: Session) -> list[Step]:
    """A chain that libvirt was told explicitly would name images that a merge removes; QEMU's headers say it as well."""
    present = session.home.present()
    if not _states_chain(session, present):
        return []
    present.strip_backing_chains()
    return [plan.Define(xml=present.to_xml()), plan.WritePresent()]


def _free_managed_save(session: Session, before: Tree) -> list[Step]:
    """A managed save names every image of its chains; without these names the chains may change below it."""
    if session.state() is not State.SAVED:
        return []
    return [plan.PointManagedSave(disks=tuple((slot, path, path) for slot, path in before.present.disks.items()))]


def _new_parent(session: Session, snapshot_id: str, parent: str | None) -> plan.ReplaceFile:
    snapshot = session.home.snapshot(snapshot_id)
    facts = vm_home.require_facts(snapshot)
    assert facts.snapshot is not None
    record = dataclasses.replace(facts.snapshot, parent=parent)
    snapshot.set_metadata(dataclasses.replace(facts, parent=parent, snapshot=record))
    return plan.ReplaceFile(path=str(session.layout.snapshot(snapshot_id)), text=snapshot.to_xml())


def _merging_whole_images(session: Session, planned: Callable[[set[str]], Change], *, quiet: bool = False) -> Change:
    """A plan that leaves alone what a merge would make worse; unless ``quiet``, what others need is said."""
    closed = set[str]()
    while True:
        change = planned(closed)
        merges = [step for step in change.finish if isinstance(step, _MERGES)]
        touched = {path for step in merges for path in (step.parent, step.child, *_above(session, step))} - closed
        reasons = {path: _reason_against_merging(session, Path(path)) for path in sorted(touched)}
        unfit = {path: reason for path, reason in reasons.items() if reason is not None}
        if not unfit:
            if not quiet:
                _say_what_is_lent(session, change.after)
            return change
        closed |= unfit.keys() | {step.child for step in merges if unfit.keys() & set(_above(session, step))}
        for path, reason in unfit.items():
            session.say(f"{path} {reason}: it is not merged")


def _say_what_waits_for_the_end(
    session: Session, after: Tree, live: set[str], denied: errors.HvmgrError | None
) -> None:
    """Images that can be merged, but not by the running VM."""
    for parent, child in tree.pending(after):
        if {parent, child} <= live:
            shorter = after.images[child].size < after.images[parent].size
            why = str(denied or ("the latter is shorter" if shorter else "what stands on them was made outside hvmgr"))
            session.say(
                f"{parent} is merged with {child} when {session.home.name} is off, by 'hvmgr snapshot merge': {why}"
            )


def _above(session: Session, step: Step) -> list[str]:
    """The images whose headers this merge changes, besides its own two."""
    return session.home.tree().children().get(step.child, []) if isinstance(step, plan.CommitLive) else []


def _say_what_is_lent(session: Session, after: Tree) -> None:
    """Images that would be merged if nobody else needed them, with the names of those who do."""
    lent = {path: after.strangers[path] for path in after.strangers if after.strangers[path]}
    if not lent:
        return
    alone = dataclasses.replace(after, strangers={})
    for parent, child in tree.pending(alone):
        users = [name for top, names in lent.items() if {parent, child} & _below(after, top) for name in names]
        if users:
            session.say(f"{parent} is not merged: it is needed by {', '.join(dict.fromkeys(users))}")


def _below(forest: Tree, path: str) -> set[str]:
    return dataclasses.replace(forest, strangers={path: ("it",)}).lent()


def _apart_above(session: Session, before: Tree, heir: str | None) -> set[str]:
    """Disks of the present whose chains were changed by others since the snapshot that now comes above it."""
    apart: set[str] = set()
    step = before.present.parent
    while step is not None and step != heir:
        apart |= {one.id for one in vm_home.require_facts(session.home.snapshot(step)).disks if one.apart}
        step = before.nodes[step].parent
    return {one.slot for one in session.home.facts().disks if one.id in apart}


def _reason_against_merging(session: Session, path: Path) -> str | None:
    if frozen.is_changed(session.layout, path):
        return "was changed after it was frozen"
    if path.exists() and images.read(path, images.QCOW2).has_internal_snapshots:
        return "holds snapshots of its own, made outside hvmgr, which would be lost"
    return None


def _require_space(before: Tree, steps: Sequence[Step]) -> None:
    """A merge writes at most what the side that goes away holds, before that side's file is removed."""
    for step in steps:
        if not isinstance(step, _MERGES):
            continue
        source = step.parent if isinstance(step, plan.MergeUp | plan.StreamLive) else step.child
        if source not in before.images:
            continue
        needed = before.images[source].data
        facts = os.statvfs(Path(step.child).parent)
        free = facts.f_bavail * facts.f_frsize
        if needed > free:
            raise errors.NoSpace(
                f"merging {Path(source).name} needs up to {units.format_size(needed)}, "
                f"there are {units.format_size(free)} free in {Path(step.child).parent}",
                hint="free space there; a snapshot that nothing stands on, and saved memory (--state-only), go without any",
                needed=needed,
                free=free,
            )
