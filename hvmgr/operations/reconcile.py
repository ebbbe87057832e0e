"""Home and libvirt brought together, as the first thing of every operation.

The home is the truth for the tree, libvirt for the VM. What others did to the VM in between is taken over where that
provably loses nothing; anything else is a Conflict that names the file.

| libvirt shows for a slot                    | what it means                                                    |
|---------------------------------------------|------------------------------------------------------------------|
| the known working image                     | nothing happened                                                 |
| a known frozen image, unchanged             | somebody went back by hand: a fresh child is put on it           |
| a known frozen image, changed               | the snapshots on it are damaged: Corrupt                         |
| an unknown overlay on the working image     | it is the working image now, the old one is frozen below it      |
| something unrelated                         | a new disk; the old one is detached, and kept                    |
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from hvmgr import errors
from hvmgr.host.domain import Domain
from hvmgr.model import configuration, plan
from hvmgr.model.configuration import Configuration
from hvmgr.model.metadata import DiskRecord, Metadata
from hvmgr.model.plan import Plan, Step
from hvmgr.operations import domain_steps, execution
from hvmgr.operations.session import Session
from hvmgr.storage import durable, frozen, images, journal, vm_home


def bring_together(session: Session) -> None:
    """Nothing is left open, libvirt knows the VM, and the home says what libvirt says."""
    if session.dry_run and journal.is_open(session.layout.journal):
        raise _needs_a_real_run("an interrupted operation is open")
    execution.recover(session)
    if not session.dry_run:
        durable.remove_folder(session.layout.export)  # of an export that died
    if not session.layout.configuration.exists():
        raise errors.NotFound(f"there is no VM in {session.home.path} any more")
    found = session.find_domain()
    if session.dry_run and found is None:
        raise _needs_a_real_run("libvirt does not know the VM")
    domain = found or _define_again(session)
    text = domain.xml(live=False)
    if text.encode() == session.layout.configuration.read_bytes():
        return
    present = session.home.present()
    edited = configuration.parse(text, source=f"libvirt's XML of {domain.name}")
    if edited.metadata() == present.metadata() and vm_home.disks_of(edited) == vm_home.disks_of(present):
        if session.dry_run:
            return
        domain_steps.write_present(session, plan.WritePresent())
        if not configuration.same(text, present.to_xml()):
            session.say("took over a change that was made to the VM outside hvmgr")
        return
    if session.dry_run:
        raise _needs_a_real_run("the VM's disks were changed outside hvmgr")
    _take_over(session, domain, present, edited)


def _needs_a_real_run(what: str) -> errors.Conflict:
    return errors.Conflict(
        f"{what}: a dry run cannot tell what would follow",
        hint="run a command without --dry-run, such as snapshot merge",
    )


def _define_again(session: Session) -> Domain:
    """libvirt has forgotten the VM: its home has not."""
    present = session.home.present()
    facts = vm_home.require_facts(present)
    if facts.uri != session.connection.uri:
        raise errors.Conflict(
            f"{present.name} belongs to the connection {facts.uri}, not to {session.connection.uri}",
            hint=f"run the command with -c '{facts.uri}'",
        )
    domain = session.connection.define(present.to_xml())
    session.say(f"libvirt did not know {present.name}; it was defined again from its home")
    return domain


def _take_over(session: Session, domain: Domain, present: Configuration, edited: Configuration) -> None:
    """Disks were changed, or hvmgr's own facts are gone from libvirt's XML."""
    known = vm_home.disks_of(present)
    steps: list[Step] = []
    finish: list[Step] = []
    for slot, path in vm_home.disks_of(edited).items():
        if path in known.values():
            continue
        if session.uses.is_frozen(path):
            steps.append(_fresh_child(session, domain, edited, slot, path))
            continue
        below = [image for image in _chain(session, edited, slot) if image in known.values()]
        if below:
            finish += [plan.FreezeImage(path=below[0]), plan.RecordFrozen(paths=(below[0],))]
            session.say(f"disk {slot} has a new image {path}, made outside hvmgr; it is taken over")
        else:
            session.say(f"disk {slot} is {path} now")
    gone = set(known.values()) - _still_there(session, edited)
    for path in sorted(gone):
        session.say(f"{path} is no longer used by the VM; it is kept as a detached disk")
    steps += _own_nvram(session, edited)
    facts = vm_home.require_facts(present)  # whatever the edit made of them: virsh define SNAPSHOT.xml, say
    change = session.new_id()
    records = _records(session, facts, known, vm_home.disks_of(edited))
    edited.set_metadata(dataclasses.replace(facts, change=change, disks=records))
    execution.run(
        session,
        Plan(
            plan_id=change,
            vm_id=session.home.vm_id,
            operation="take over",
            subject=f"take-over of a change made to {present.name} outside hvmgr",
            prepare=tuple(steps),
            switch=plan.Define(xml=edited.to_xml()),
            finish=(*finish, plan.WritePresent()),
        ),
    )


def _fresh_child(session: Session, domain: Domain, edited: Configuration, slot: str, path: str) -> plan.CreateImage:
    frozen.require_unchanged(session.layout, Path(path))
    if domain.is_active():
        raise errors.Conflict(
            f"{domain.name} runs on {path}, which its snapshots need unchanged",
            hint=f"stop it at once: virsh destroy {domain.name}",
            path=path,
        )
    disk = edited.find_disk(slot)
    fmt = (disk.format if disk is not None else None) or images.RAW
    child = session.layout.image(slot, session.new_id())
    edited.set_disk_source(slot, child, images.QCOW2)
    session.say(f"disk {slot} was pointed to the frozen image {path}; it goes on in a fresh child of it")
    return plan.CreateImage(path=str(child), size=images.read(Path(path), fmt).size, parent=path, parent_format=fmt)


def _own_nvram(session: Session, edited: Configuration) -> list[Step]:
    """A VM that somebody defined from a snapshot's XML leaves the snapshot its firmware variables."""
    theirs = edited.nvram
    if theirs is None or not theirs.is_relative_to(session.layout.snapshots):
        return []
    nvram = session.layout.nvram(session.new_id())
    edited.set_nvram(nvram)
    return [plan.CopyFile(source=str(theirs), target=str(nvram))] if theirs.exists() else []


def _chain(session: Session, edited: Configuration, slot: str) -> list[str]:
    disk = edited.find_disk(slot)
    if disk is None or disk.source is None:
        return []
    path = vm_home.canonical(disk.source)
    return [one for one in session.home.load_images({path: disk.format or images.RAW}) if one != path]


def _still_there(session: Session, edited: Configuration) -> set[str]:
    formats = {
        vm_home.canonical(disk.source): disk.format or images.RAW
        for disk in edited.disks()
        if disk.takes_part and disk.source is not None
    }
    return set(session.home.load_images(formats)) | set(formats)


def _records(session: Session, facts: Metadata, known: dict[str, str], disks: dict[str, str]) -> tuple[DiskRecord, ...]:
    """Disks keep their ids: a disk that only moved to another slot, or goes on in the same slot, is the same disk."""
    by_path = {known[record.slot]: record for record in facts.disks if record.slot in known}
    by_slot = {record.slot: record for record in facts.disks}
    records = []
    for slot, path in disks.items():
        old = by_path.get(path) or by_slot.get(slot)
        records.append(DiskRecord(slot=slot, id=old.id if old is not None else session.new_id()))
    return tuple(records)
