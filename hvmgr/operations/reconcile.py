"""Home and libvirt brought together, as the first thing of every operation.

The home is the truth for the tree, libvirt for the VM. What others did to the VM in between is taken over where that
provably loses nothing; anything else is a Conflict that names the file. Nothing is removed here, ever.

| libvirt shows for a slot                    | what it means                                                    |
|---------------------------------------------|------------------------------------------------------------------|
| the known working image                     | nothing happened, if its chain is what it was (see ``chains``)   |
| the same file by another name               | the same image: it gets its own name back                        |
| a known frozen image, unchanged             | somebody went back by hand: a fresh child is put on it           |
| a known frozen image, changed               | the VM went on in it (virsh blockcommit): a fresh child is put   |
|                                             | on it, and the snapshots that need it are marked as damaged      |
| an unknown overlay on the working image     | it is the working image now, all below it is frozen              |
| an image of the home that nobody needs      | the disk went back to it (virsh snapshot-delete)                 |
| another image on the same snapshot's image  | the disk was moved or copied: it goes on there                   |
| something unrelated                         | a new disk; the old one is detached, and kept                    |
| a file that is not there                    | a Conflict                                                       |
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from hvmgr import errors
from hvmgr.host.domain import Domain
from hvmgr.model import configuration, plan
from hvmgr.model.configuration import Configuration
from hvmgr.model.plan import Plan, Step
from hvmgr.operations import chains, resting_guest, takeover
from hvmgr.operations.chains import Deed
from hvmgr.operations.session import Session
from hvmgr.operations.steps import domain_steps, execution, live_pivot
from hvmgr.storage import attachments, durable, journal, vm_home


def bring_together(session: Session, *, needs_present: bool = True) -> None:
    """Nothing is left open, libvirt knows the VM, and the home says what libvirt says.

    Without ``needs_present`` a present that others made doubtful stands in nobody's way: it is put away as it is.
    """
    if session.dry_run and journal.is_open(session.layout.journal):
        raise _needs_a_real_run("an interrupted operation is open")
    execution.recover(session)
    live_pivot.forget_stale(session)
    resting_guest.try_again(session)
    if not session.dry_run:
        durable.remove_folder(session.layout.export)  # of an export that died
    if not session.layout.configuration.exists():
        raise errors.NotFound(f"there is no VM in {session.home.path} any more")
    domain = _require_domain(session)
    text = domain.xml(live=False)
    present = session.home.present()
    if text.encode() != session.layout.configuration.read_bytes():
        edited = configuration.parse(text, source=f"libvirt's XML of {domain.name}")
        _bring_over(session, domain, present, edited, text)
        present = session.home.present()
    session.known_xml = session.domain().xml(live=False)
    _look_at_chains(session, present)
    if session.doubt is not None and needs_present:
        raise session.doubt
    if needs_present:
        attachments.require_free(vm_home.disks_of(present).values())


def accept_present(session: Session) -> list[str]:
    """The disks whose chains nobody can explain are the present as they are; their slots.

    For somebody who has looked at them. From then on the images that they no longer stand on count as not needed by
    the present, and go when no snapshot needs them.
    """
    present = session.home.present()
    slots = [one.slot for one in chains.iter_changes(session, present) if one.deed is Deed.UNKNOWN]
    if slots:
        _set_apart(session, present, slots, [])
    session.doubt = None
    return slots


def _bring_over(session: Session, domain: Domain, present: Configuration, edited: Configuration, text: str) -> None:
    renamed = takeover.use_own_names(session, present, edited)
    facts_kept = edited.metadata() == present.metadata()
    if facts_kept and not renamed and vm_home.disks_of(edited) == vm_home.disks_of(present):
        if session.dry_run:
            return
        domain_steps.write_present(session, plan.WritePresent())
        if not configuration.same(text, present.to_xml()):
            session.say("took over a change that was made to the VM outside hvmgr")
        return
    try:
        takeover.require_files(session, present, edited)
    except errors.Conflict as error:
        session.doubt = error
        return
    if session.dry_run:
        raise _needs_a_real_run("the VM's disks were changed outside hvmgr")
    execution.run(session, takeover.plan_take_over(session, domain, present, edited))
    session.forget_uses()


def _needs_a_real_run(what: str) -> errors.Conflict:
    return errors.Conflict(
        f"{what}: a dry run cannot tell what would follow",
        hint="run a command without --dry-run, such as snapshot merge",
    )


def _require_domain(session: Session) -> Domain:
    """libvirt's domain, persistent; what libvirt has forgotten, its home has not."""
    domain = session.find_domain()
    if domain is not None and domain.is_persistent():
        return domain
    if session.dry_run:
        raise _needs_a_real_run("libvirt does not know the VM")
    return _define_again(session, domain)


def _define_again(session: Session, running: Domain | None) -> Domain:
    present = session.home.present()
    facts = vm_home.require_facts(present)
    if facts.uri != session.connection.uri:
        raise errors.Conflict(
            f"{present.name} belongs to the connection {facts.uri}, not to {session.connection.uri}",
            hint=f"run the command with -c '{facts.uri}'",
        )
    xml = present.to_xml()
    if running is not None:
        now = configuration.parse(running.xml(live=False), source=f"libvirt's XML of {running.name}")
        if vm_home.disks_of(now) != vm_home.disks_of(present) or now.name != present.name:
            xml = now.to_xml()  # its images changed since: what runs is the present
        domain = session.connection.define(xml)
        session.say(f"{present.name} was undefined while it runs; it was defined again from its home")
        return domain
    _require_free_name(session, present)
    domain = session.connection.define(xml)
    session.say(f"libvirt did not know {present.name}; it was defined again from its home")
    return domain


def _require_free_name(session: Session, present: Configuration) -> None:
    other = session.connection.find_domain_by_name(present.name)
    if other is None:
        return
    theirs = vm_home.disks_of(configuration.parse(other.xml(live=False), source="libvirt")).values()
    shared = sorted(set(theirs) & set(vm_home.disks_of(present).values()))
    uses = f" and uses {', '.join(shared)}" if shared else ""
    raise errors.Conflict(
        f"libvirt has another VM '{present.name}' with the id {other.uuid}{uses}, and does not know "
        f"{session.home.vm_id}, whose home is {session.home.path}",
        hint=f"undefine that one (virsh undefine {present.name}) or rename it (virsh domrename {present.name} NEW), "
        "then run the command again: the VM is defined again from its home",
        users=[other.name],
    )


def _look_at_chains(session: Session, present: Configuration) -> None:
    """What others did below the disks of the present is taken over, or a doubt."""
    domain = session.domain()
    if domain.is_active() and not session.dry_run and not domain.has_job():
        working = {slot: Path(path) for slot, path in vm_home.disks_of(present).items() if session.layout.owns(path)}
        domain_steps.name_true_parents(session, domain, working)
    for change in list(chains.iter_changes(session, present)):
        if change.deed is Deed.UNKNOWN:
            session.doubt = chains.doubt(session, change, present.name)
        elif session.dry_run:
            raise _needs_a_real_run(f"the images of disk {change.slot} were changed outside hvmgr")
        else:
            _take_over_below(session, change)


def _take_over_below(session: Session, change: chains.Change) -> None:
    """The home says what became of the disk's chain; snapshots that this hurt are marked."""
    steps: list[Step] = []
    if change.deed is Deed.PULLED:
        session.say(
            f"disk {change.slot}: the data of {change.missed} was pulled into {change.image} outside hvmgr, "
            "which no longer stands on it; nothing is lost"
        )
    else:
        assert change.base is not None
        session.say(f"disk {change.slot}: {change.top} was committed into {change.base} outside hvmgr")
        steps += takeover.marks(session, chains.damaged_by(session.home.tree(), change.base, change.top), change.base)
        steps += [plan.FreezeImage(path=change.base), plan.RecordFrozen(paths=(change.base,))]
    _set_apart(session, session.home.present(), [] if change.missed is None else [change.slot], steps)


def _set_apart(session: Session, present: Configuration, slots: list[str], steps: list[Step]) -> None:
    if slots:
        facts = vm_home.require_facts(present)
        present.set_metadata(dataclasses.replace(facts, disks=chains.set_apart(facts.disks, slots)))
        steps = [*steps, plan.Define(xml=present.to_xml()), plan.WritePresent()]
    execution.run(
        session,
        Plan(
            plan_id=session.new_id(),
            vm_id=session.home.vm_id,
            operation="take over",
            subject=f"take-over of what was done to the images of {present.name} outside hvmgr",
            finish=tuple(steps),
        ),
    )
    session.forget_uses()
