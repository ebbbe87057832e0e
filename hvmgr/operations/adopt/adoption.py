"""A libvirt domain that becomes a VM of hvmgr's: its disks stay where they are, its snapshots come along.

What the guest sees is never touched, and so it may run. The switch is one definition of the domain with hvmgr's facts in
it; what libvirt knows of snapshots is forgotten at the very end, when every one of them is a file in the home.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvmgr import errors, units
from hvmgr.host.domain import Domain, State
from hvmgr.host.hypervisor import Connection
from hvmgr.model import adoptee, configuration, names, plan
from hvmgr.model.adoptee import Internal
from hvmgr.model.configuration import Configuration
from hvmgr.model.metadata import DiskRecord, Metadata, SnapshotRecord
from hvmgr.model.plan import Plan, Step
from hvmgr.model.tree import Leaf, Node, Tree
from hvmgr.operations import snapshots, vhd_bases
from hvmgr.operations.adopt import adoption_checks, internal_snapshots, libvirt_history
from hvmgr.operations.adopt.libvirt_history import Past, Wishes
from hvmgr.operations.session import Session
from hvmgr.operations.steps import domain_steps
from hvmgr.storage import access, images, vm_home

_ID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


@dataclass(frozen=True, slots=True)
class AdoptOptions:
    """How a domain is adopted: where its home is made, and the slots of disks that snapshots do not concern.

    ``internal`` says what becomes of snapshots inside the images: each an image of its own, or removed.
    """

    home: Path | None = None
    exclude_disks: tuple[str, ...] = ()
    internal: Internal = Internal.REFUSE

    def __post_init__(self) -> None:
        object.__setattr__(self, "internal", Internal(self.internal))  # the plain word is as good


def find(connection: Connection, name: str) -> Domain:
    """The domain of this name or id; NotFound offers near names."""
    found = connection.find_domain_by_name(name)
    if found is None and _ID.fullmatch(name):
        found = connection.find_domain(name)
    if found is None:
        known = [domain.name for domain in connection.domains()]
        raise names.not_found("VM", name, known, where=f"in libvirt ({connection.uri})")
    return found


def folder_name(domain: Domain) -> str:
    """What the home is called below the root: the VM's name, where that can be the name of a folder."""
    plain = domain.name.isprintable() and not domain.name.startswith(".") and domain.name == domain.name.strip()
    return domain.name if plain and "/" not in domain.name else domain.uuid


def require_adoptable(domain: Domain, root: Path) -> None:
    """Refuses what is managed already, and what does not last or is being worked on; nothing is made before that."""
    adoption_checks.require_unmanaged(domain, root)
    adoption_checks.require_steady(domain)


def image_paths(session: Session, domain: Domain, options: AdoptOptions) -> list[Path]:
    """Every image that the VM would bring along, so that nobody else changes its users meanwhile."""
    wishes = _wishes(session, domain, options)
    pasts = libvirt_history.read(session, domain, wishes, internal=options.internal)
    return [Path(path) for path in session.home.load_images(_formats(wishes.present, pasts))]


def plan_adopt(session: Session, domain: Domain, options: AdoptOptions) -> Plan:
    """The home of a domain that libvirt has, with a snapshot for each one of libvirt's."""
    layout, name = session.layout, domain.name
    as_read = domain_steps.state_for_plan(domain)  # first: whatever is read below is this or later
    access.require_way(layout.home, session.owner)
    wishes = _wishes(session, domain, options)
    present = wishes.present
    pasts = libvirt_history.read(session, domain, wishes, internal=options.internal)
    forest = _forest(session, present, pasts)
    _check(session, domain, wishes, pasts, forest, internal=options.internal)
    made = _of_internal(session, domain, wishes, forest, options.internal)
    pasts = libvirt_history.in_order((*pasts, *made.pasts))
    forest = _with(forest, pasts, made)
    _say_what_is_special(session, domain, present, pasts, options)
    parents = libvirt_history.place(pasts, forest)
    libvirt_history.say_what_differs(session, pasts, parents)
    for path, past in libvirt_history.abandoned(pasts, forest):
        session.say(f"{path} holds what {name} wrote after '{past.name}' and then left; no snapshot names it, it stays")
    change = session.new_id()
    ids = {slot: session.new_id() for slot in _slots(present, pasts)}
    facts = Metadata(
        home=layout.home,
        uri=session.connection.uri,
        created=session.now(),
        parent=libvirt_history.place_of_present(pasts, forest),
        disks=_records(ids, vm_home.disks_of(present)),
        change=change,
    )
    present.strip_backing_chains()  # compared with the headers, which say the same; kept, it would be wrong after a merge
    present.set_metadata(facts)
    written = [
        plan.WriteSnapshot(snapshot_id=past.id, xml=_snapshot_xml(session, past, facts, parents[past.id], ids))
        for past in pasts
    ]
    frozen = tuple(dict.fromkeys([*(path for past in pasts for path in past.images.values()), *_blanks(made)]))
    is_off = session.state() in (State.OFF, State.SAVED)
    return Plan(
        plan_id=change,
        vm_id=layout.vm_id,
        operation="vm adopt",
        subject=f"adoption of {name}",
        prepare=(
            plan.NoteUses(name=name, paths=tuple(path for path in forest.images if not layout.owns(path))),
            plan.MakeHome(home=str(layout.home), vm_id=layout.vm_id),
            *made.prepare,
            *_states(session, present, pasts),
            as_read,
        ),
        switch=plan.Define(xml=present.to_xml()),
        finish=(
            *written,
            *made.finish,
            *(plan.FreezeImage(path=path) for path in frozen if _can_be_frozen(path, made)),
            plan.WritePresent(),
            plan.RecordFrozen(paths=frozen),
            *(plan.ForgetLibvirtSnapshot(name=past.libvirt_name) for past in reversed(pasts) if not past.is_internal),
            *_drop_old_names(session, pasts),
        ),
        hold=snapshots.working(forest) if is_off else (),
    )


# --- what there is --------------------------------------------------------------------------------------------------


def _wishes(session: Session, domain: Domain, options: AdoptOptions) -> Wishes:
    """The configuration as it will be, but for hvmgr's facts."""
    excluded = frozenset(options.exclude_disks)
    present = configuration.parse(domain.xml(live=False), source=f"libvirt's XML of {domain.name}")
    libvirt_history.resolve_volumes(session, present, excluded=excluded)
    adoption_checks.require_disks(domain.name, present, excluded)
    for slot in excluded:
        adoptee.leave_out(present, slot)
    return Wishes(present, excluded)


def _formats(present: Configuration, pasts: Sequence[Past]) -> dict[str, str]:
    """The images that are named, with the format that the oldest who names them states."""
    formats: dict[str, str] = {}
    for past in pasts:
        formats = {**past.formats, **formats}
    for disk in present.disks():
        if disk.takes_part and disk.source is not None:
            formats.setdefault(vm_home.canonical(disk.source), disk.format or images.RAW)
    return formats


def _forest(session: Session, present: Configuration, pasts: Sequence[Past]) -> Tree:
    return Tree(
        images=session.home.load_images(_formats(present, pasts)),
        nodes={past.id: Node(snapshot_id=past.id, parent=None, disks=past.images) for past in pasts},
        present=Leaf(parent=None, disks=vm_home.disks_of(present)),
    )


def _of_internal(
    session: Session, domain: Domain, wishes: Wishes, forest: Tree, internal: Internal
) -> internal_snapshots.Conversion:
    if internal is Internal.REFUSE:
        return internal_snapshots.Conversion()
    inside = internal_snapshots.find(domain, forest)
    if internal is Internal.DROP:
        return internal_snapshots.drop(session, domain, inside)
    return internal_snapshots.convert(session, domain, wishes, forest, inside)


def _with(forest: Tree, pasts: Sequence[Past], made: internal_snapshots.Conversion) -> Tree:
    """The forest with the images that are yet to be made."""
    nodes = {past.id: Node(snapshot_id=past.id, parent=None, disks=past.images) for past in pasts}
    return dataclasses.replace(forest, images={**forest.images, **{one.path: one for one in made.images}}, nodes=nodes)


def _blanks(made: internal_snapshots.Conversion) -> list[str]:
    return [image.path for image in made.images if image.parent is None]


def _can_be_frozen(path: str, made: internal_snapshots.Conversion) -> bool:
    return path in {image.path for image in made.images} or adoption_checks.can_change_mode(path)


def _check(
    session: Session, domain: Domain, wishes: Wishes, pasts: Sequence[Past], forest: Tree, *, internal: Internal
) -> None:
    name, present = domain.name, wishes.present
    adoption_checks.require_chains(name, present, forest)
    adoption_checks.require_distinct(name, forest.present.disks)
    adoption_checks.require_pasts(name, pasts, forest)
    if internal is Internal.REFUSE:
        adoption_checks.require_plain_images(forest.named(), forest)
    adoption_checks.require_writable(name, forest.present.disks)
    adoption_checks.require_own(name, forest.named())
    adoption_checks.require_sole_writer(session, name, forest)
    state = domain.state()
    if domain.is_active():
        _require_running_as_stored(session, domain, wishes, forest)
    elif state is State.SAVED:
        _require_saved_as_stored(session, domain, wishes, forest)
    _require_space(session, pasts)
    snapshots.warn_of_depth(session, forest)


def _require_running_as_stored(session: Session, domain: Domain, wishes: Wishes, forest: Tree) -> None:
    live = configuration.parse(domain.xml(live=True), source=f"libvirt's live XML of {domain.name}")
    running = _stored(session, live, wishes)
    writing = {vm_home.canonical(str(path)) for path in domain.writable_files()}
    adoption_checks.require_same_running(domain.name, running, forest.present.disks, writing)
    adoption_checks.require_chains(domain.name, live, forest)


def _require_saved_as_stored(session: Session, domain: Domain, wishes: Wishes, forest: Tree) -> None:
    saved = configuration.parse(domain.managed_save_xml(), source=f"the managed save of {domain.name}")
    if _stored(session, saved, wishes) != dict(forest.present.disks):
        raise errors.Conflict(
            f"the managed save of {domain.name} has other disks than its configuration",
            hint=f"start it and stop it again, or drop the saved memory: virsh managedsave-remove {domain.name}",
        )


def _stored(session: Session, one: Configuration, wishes: Wishes) -> dict[str, str]:
    """The disks of another configuration of the same VM, without those that are left out."""
    libvirt_history.resolve_volumes(session, one, excluded=wishes.excluded)
    left_out = {disk.slot for disk in wishes.present.disks() if not disk.takes_part}
    for slot in left_out & {disk.slot for disk in one.disks()}:
        adoptee.leave_out(one, slot)
    return vm_home.disks_of(one)


def _require_space(session: Session, pasts: Sequence[Past]) -> None:
    """Memory on another file system has to be copied."""
    folder = next(one for one in (session.layout.home, *session.layout.home.parents) if one.is_dir())
    device = folder.stat().st_dev
    memories = [past.memory.stat() for past in pasts if past.memory is not None]
    needed = sum(facts.st_blocks * 512 for facts in memories if facts.st_dev != device)
    there = os.statvfs(folder)
    free = there.f_bavail * there.f_frsize
    if needed > free:
        raise errors.NoSpace(
            f"the memory of the snapshots needs {units.format_size(needed)}, {folder} has {units.format_size(free)} free",
            hint="choose a place on the same file system with --home: nothing is copied there",
        )


def _say_what_is_special(
    session: Session, domain: Domain, present: Configuration, pasts: Sequence[Past], options: AdoptOptions
) -> None:
    if what := adoptee.unsaveable(present):
        session.say(f"{domain.name} has {' and '.join(what)}: its memory cannot be saved, only its disks")
    vhd_bases.say_what_it_costs(session, domain.name, _base_formats(session, present))
    written = [disk.slot for disk in present.disks() if disk.snapshot == "no" and disk.device == "disk"]
    written = [slot for slot in written if not _is_readonly(present, slot)]
    if written:
        session.say(f"disk {', '.join(written)} takes no part in snapshots: they hold disks alone, no memory")
    if pasts and (present.nvram is not None or present.has_tpm):
        session.say("libvirt's snapshots hold no firmware variables and no TPM state: each gets a copy of today's")
    if options.home is None:
        folder = next(one for one in session.layout.home.parents if one.is_dir())
        far = [path for path in vm_home.disks_of(present).values() if Path(path).stat().st_dev != folder.stat().st_dev]
        if far:
            session.say(
                f"new images go to {session.layout.home}, on another file system than {far[0]};"
                " --home DIR chooses another place"
            )


def _base_formats(session: Session, present: Configuration) -> Iterator[tuple[str, str]]:
    """The format of what each disk stands on in the end."""
    formats = vm_home.formats_of(present)
    for slot, path in vm_home.disks_of(present).items():
        found = session.home.load_images({path: formats[path]})
        yield from ((slot, one.format) for one in found.values() if one.parent is None)


def _is_readonly(present: Configuration, slot: str) -> bool:
    disk = present.find_disk(slot)
    return disk is not None and disk.readonly


# --- what it becomes ------------------------------------------------------------------------------------------------


def _states(session: Session, present: Configuration, pasts: Sequence[Past]) -> list[Step]:
    """What each snapshot keeps beside its disks: its memory, and firmware variables and TPM state of today."""
    layout, steps = session.layout, list[Step]()
    variables: dict[Path, Path] = {}
    tpm = session.connection.tpm_folder(layout.vm_id)
    for past in pasts:
        steps.append(plan.MakeSnapshotFolder(snapshot_id=past.id))
        if past.memory is not None:
            steps.append(plan.TakeFile(source=str(past.memory), target=str(layout.memory(past.id))))
        source = _existing(past.configuration.nvram) or _existing(present.nvram)
        if past.configuration.nvram is not None and source is not None:
            target, first = layout.snapshot_nvram(past.id), variables.get(source)
            if first is None:
                steps.append(plan.CopyFile(source=str(source), target=str(target)))
            else:  # one copy for all: nothing ever writes to it
                steps.append(plan.TakeFile(source=str(first), target=str(target)))
            variables.setdefault(source, target)
        if past.configuration.has_tpm and past.memory is None and tpm.is_dir():
            steps.append(plan.CopyFolder(source=str(tpm), target=str(layout.snapshot_tpm(past.id))))
    return steps


def _drop_old_names(session: Session, pasts: Sequence[Past]) -> list[Step]:
    steps: list[Step] = []
    for past in pasts:
        if past.memory is None:
            continue
        if os.access(past.memory.parent, os.W_OK):
            steps.append(plan.DropOldName(path=str(past.memory), kept=str(session.layout.memory(past.id))))
        else:
            session.say(f"{past.memory} is in the home as well now; its old name stays: the folder cannot be written")
    return steps


def _existing(path: Path | None) -> Path | None:
    return path if path is not None and path.is_file() else None


def _snapshot_xml(session: Session, past: Past, facts: Metadata, parent: str | None, ids: Mapping[str, str]) -> str:
    one = past.configuration.copy()
    if one.nvram is not None:
        one.set_nvram(session.layout.snapshot_nvram(past.id))
    one.set_metadata(
        Metadata(
            home=facts.home,
            uri=facts.uri,
            created=facts.created,
            parent=parent,
            disks=_records(ids, past.images),
            snapshot=SnapshotRecord(
                id=past.id,
                name=past.name,
                created=past.created,
                type=past.type,
                state=past.state,
                parent=parent,
                notes=past.notes,
            ),
        )
    )
    return one.to_xml()


def _slots(present: Configuration, pasts: Sequence[Past]) -> list[str]:
    return list(dict.fromkeys([*vm_home.disks_of(present), *(slot for past in pasts for slot in past.images)]))


def _records(ids: Mapping[str, str], disks: Mapping[str, str]) -> tuple[DiskRecord, ...]:
    return tuple(DiskRecord(slot=slot, id=ids[slot]) for slot in disks)
