"""Changes that others made to a VM's disks, planned to become part of its home. See the table of ``reconcile``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hvmgr import errors
from hvmgr.host.domain import Domain, State
from hvmgr.model import configuration, plan
from hvmgr.model.configuration import Configuration
from hvmgr.model.plan import Plan, Step
from hvmgr.model.tree import Tree
from hvmgr.operations import chains
from hvmgr.operations.session import Session
from hvmgr.storage import frozen, images, vm_home


@dataclass(slots=True)
class _Draft:
    """A plan that grows disk by disk. ``new`` names slots with something unrelated, ``live`` what QEMU switches to."""

    edited: Configuration
    running: Mapping[str, str]
    known: Mapping[str, str]
    forest: Tree
    prepare: list[Step] = field(default_factory=list)
    finish: list[Step] = field(default_factory=list)
    new: set[str] = field(default_factory=set)
    live: list[tuple[str, str]] = field(default_factory=list)


def use_own_names(session: Session, present: Configuration, edited: Configuration) -> bool:
    """Disks that name a known image by another path (hard link, bind mount) name it as the home does."""
    known, asked = vm_home.disks_of(present).values(), vm_home.disks_of(edited)
    if all(path in known for path in asked.values()):
        return False
    forest = session.home.tree().images
    own = {images.identity(Path(path)): path for path in (*forest, *known) if Path(path).exists()}
    changed = False
    for slot, path in asked.items():
        mine = own.get(images.identity(Path(path))) if Path(path).exists() else None
        if mine is not None and mine != path:
            disk = edited.find_disk(slot)
            edited.set_disk_source(slot, Path(mine), (disk.format if disk is not None else None) or images.RAW)
            session.say(f"disk {slot}: {path} is another name of {mine}, which the configuration names again")
            changed = True
    return changed


def require_files(session: Session, present: Configuration, edited: Configuration) -> None:
    """A disk that was pointed to nothing is not taken over; Conflict names it."""
    known = vm_home.disks_of(present).values()
    for slot, path in vm_home.disks_of(edited).items():
        if path not in known and not Path(path).exists():
            raise errors.Conflict(
                f"disk {slot} was pointed to {path}, which is not there",
                hint=f"put the file there, or correct the path: virsh edit {session.domain().name}",
                path=path,
            )


def plan_take_over(session: Session, domain: Domain, present: Configuration, edited: Configuration) -> Plan:
    """Disks were changed, or hvmgr's own facts are gone from libvirt's XML."""
    known = vm_home.disks_of(present)
    draft = _Draft(edited, _running(domain), known, session.home.tree())
    if domain.is_active() and domain.has_job():
        raise errors.Busy(f"libvirt or QEMU works on {domain.name}", hint="wait until that is done, then run it again")
    asked = vm_home.disks_of(edited)
    chains_asked = {slot: _chain(session, edited, slot) for slot in asked}
    for slot, path in asked.items():
        if path not in known.values():
            _take_disk(session, domain, draft, slot, path)
    _say_what_is_detached(session, edited, set(known.values()))
    draft.prepare += _own_nvram(session, edited)
    facts = vm_home.require_facts(present)  # whatever the edit made of them: virsh define SNAPSHOT.xml, say
    change = session.new_id()
    records = chains.records(session, facts.disks, dict(known), vm_home.disks_of(edited), draft.new)
    parent = _gone_back_to(draft, asked) or facts.parent
    if parent == facts.parent:
        records = chains.set_apart(records, _apart(session, draft, present, chains_asked))
    edited.set_metadata(dataclasses.replace(facts, change=change, parent=parent, disks=records))
    define = plan.Define(xml=edited.to_xml())
    live = bool(draft.live)
    return Plan(
        plan_id=change,
        vm_id=session.home.vm_id,
        operation="take over",
        subject=f"take-over of a change made to {present.name} outside hvmgr",
        prepare=tuple(draft.prepare),
        switch=plan.SwitchDisks(children=tuple(draft.live), memory=None) if live else define,
        finish=(*((define,) if live else ()), *draft.finish, plan.WritePresent()),
    )


def marks(session: Session, damaged: Mapping[str, Sequence[str]], path: str) -> list[Step]:
    """Steps that mark these snapshots (id to slots) as damaged, because ``path`` was written; each is said."""
    steps: list[Step] = []
    for snapshot_id, slots in damaged.items():
        snapshot = session.home.snapshot(snapshot_id)
        facts = vm_home.require_facts(snapshot)
        assert facts.snapshot is not None
        record = facts.snapshot
        session.say(
            f"snapshot '{record.name}' is damaged: {path}, which its disk {', '.join(slots)} needs unchanged, "
            "was written outside hvmgr"
        )
        record = dataclasses.replace(record, damaged=tuple(dict.fromkeys((*record.damaged, *slots))))
        snapshot.set_metadata(dataclasses.replace(facts, snapshot=record))
        steps.append(plan.ReplaceFile(path=str(session.layout.snapshot(snapshot_id)), text=snapshot.to_xml()))
    return steps


def _gone_back_to(draft: _Draft, asked: Mapping[str, str]) -> str | None:
    """The one snapshot whose images all disks were pointed to by hand."""
    found = [node.snapshot_id for node in draft.forest.nodes.values() if dict(node.disks) == dict(asked)]
    return found[0] if len(found) == 1 and asked else None


def _apart(session: Session, draft: _Draft, present: Configuration, chains_asked: Mapping[str, list[str]]) -> set[str]:
    """Disks that were pointed to images that do not stand on those of the snapshot above the present."""
    expected = chains.expected_below(session, present)
    return {
        slot
        for slot, chain in chains_asked.items()
        if chain and chain[0] not in draft.known.values() and expected.get(slot, chain[0]) not in chain
    }


def _running(domain: Domain) -> Mapping[str, str]:
    if not domain.is_active():
        return {}
    return vm_home.disks_of(configuration.parse(domain.xml(live=True), source=f"libvirt's live XML of {domain.name}"))


def _take_disk(session: Session, domain: Domain, draft: _Draft, slot: str, path: str) -> None:
    if session.uses.is_frozen(path):
        _go_on_above(session, domain, draft, slot, path)
        return
    above = _above(session, draft, slot, path)
    if above is not None:
        draft.finish += [plan.FreezeImage(path=one) for one in above]
        draft.finish.append(plan.RecordFrozen(paths=tuple(above)))
        session.say(f"disk {slot} has a new image {path}, made outside hvmgr; it is taken over")
        return
    session.say(f"disk {slot} is {path} now")
    old = draft.known.get(slot)
    if session.layout.owns(path):
        draft.finish.append(plan.ThawImage(path=path))  # frozen once, needed by nobody else now
    elif old is None or not _stand_on_the_same(draft, old, _chain(session, draft.edited, slot)):
        draft.new.add(slot)


def _above(session: Session, draft: _Draft, slot: str, path: str) -> list[str] | None:
    """The images from the old working image up to the new one, which is not among them; None when it is not above."""
    chain = _chain(session, draft.edited, slot)
    for position, one in enumerate(chain):
        if one in draft.known.values():
            return chain[1 : position + 1] if chain[0] == path else None
    return None


def _stand_on_the_same(draft: _Draft, old: str, chain: list[str]) -> bool:
    """Whether the new image goes on where the old one did: on the image of the same snapshot."""
    below = draft.forest.images[old].parent if old in draft.forest.images else None
    if below is not None:
        return below in chain
    frozen_below = {path for node in draft.forest.nodes.values() for path in node.disks.values()}
    return old not in draft.forest.images and bool(frozen_below & set(chain))


def _go_on_above(session: Session, domain: Domain, draft: _Draft, slot: str, path: str) -> None:
    """The disk goes on in a fresh child of a frozen image; what was written to the image itself damages snapshots."""
    runs_on_it = draft.running.get(slot) == path
    written = frozen.is_changed(session.layout, Path(path))
    if written or (runs_on_it and domain.state() is not State.PAUSED):
        draft.finish += marks(session, chains.damaged_by(draft.forest, path, None), path)
        written = True
    disk = draft.edited.find_disk(slot)
    fmt = (disk.format if disk is not None else None) or images.RAW
    child = session.layout.image(slot, session.new_id())
    draft.edited.set_disk_source(slot, child, images.QCOW2)
    size = images.read(Path(path), fmt).size
    draft.prepare.append(plan.CreateImage(path=str(child), size=size, parent=path, parent_format=fmt))
    if runs_on_it:
        draft.live.append((slot, str(child)))
    draft.finish.append(plan.FreezeImage(path=path))
    if written or runs_on_it:
        draft.finish.append(plan.RecordFrozen(paths=(path,)))
    session.say(f"disk {slot} was pointed to the frozen image {path}; it goes on in a fresh child of it")


def _say_what_is_detached(session: Session, edited: Configuration, known: set[str]) -> None:
    formats = {
        vm_home.canonical(disk.source): disk.format or images.RAW
        for disk in edited.disks()
        if disk.takes_part and disk.source is not None
    }
    still = set(session.home.load_images(formats)) | set(formats)
    for path in sorted(known - still):
        if Path(path).exists():
            session.say(f"{path} is no longer used by the VM; it is kept as a detached disk")
        else:
            session.say(f"{path} is no longer used by the VM, and is not there any more")


def _own_nvram(session: Session, edited: Configuration) -> list[Step]:
    """A VM that somebody defined from a snapshot's XML leaves the snapshot its firmware variables."""
    theirs = edited.nvram
    if theirs is None or not theirs.is_relative_to(session.layout.snapshots):
        return []
    nvram = session.layout.nvram(session.new_id())
    edited.set_nvram(nvram)
    return [plan.CopyFile(source=str(theirs), target=str(nvram))] if theirs.exists() else []


def _chain(session: Session, edited: Configuration, slot: str) -> list[str]:
    """The image of a disk and its parents, top first."""
    disk = edited.find_disk(slot)
    if disk is None or disk.source is None:
        return []
    path = vm_home.canonical(disk.source)
    found = session.home.load_images({path: disk.format or images.RAW})
    chain: list[str] = []
    step: str | None = path
    while step is not None and step in found and step not in chain:
        chain.append(step)
        step = found[step].parent
    return chain
