"""libvirt's external snapshots as hvmgr's: which images each one froze, and where it stands in the tree.

libvirt's list of snapshots says what somebody called them and when; which image stands on which, only the images say.
Where the two differ (somebody went back with ``virsh define`` and took another snapshot, which libvirt then hangs on the
last one it knew) the images are believed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from hvmgr import errors
from hvmgr.host import libvirt_snapshots, saved_state
from hvmgr.host.domain import Domain
from hvmgr.model import adoptee, libvirt_snapshot
from hvmgr.model.adoptee import Internal
from hvmgr.model.configuration import Configuration, Disk
from hvmgr.model.libvirt_snapshot import Kind, LibvirtSnapshot, Moment
from hvmgr.model.metadata import SavedState, SnapshotType
from hvmgr.model.tree import Tree
from hvmgr.operations import volumes
from hvmgr.operations.session import Session
from hvmgr.operations.snapshots import NAME_LENGTH
from hvmgr.storage import images, vm_home


@dataclass(frozen=True, slots=True)
class Past:
    """One of libvirt's snapshots: what its file in the home will hold, and the images that it needs unchanged.

    ``images`` maps slots to paths, ``formats`` paths to formats, ``went_on`` slots to where the VM wrote afterwards.
    ``parent`` is libvirt's word for it, a name.
    """

    id: str
    libvirt_name: str
    name: str
    notes: str
    created: datetime
    type: SnapshotType
    state: SavedState
    parent: str | None
    is_current: bool
    memory: Path | None
    configuration: Configuration
    images: Mapping[str, str]
    formats: Mapping[str, str]
    went_on: Mapping[str, str]
    is_internal: bool = False  # its images were made of what lay inside others: nothing stands on them


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the user leaves out, and the present without it."""

    present: Configuration
    excluded: frozenset[str]


def read(session: Session, domain: Domain, wishes: Wishes, *, internal: Internal = Internal.REFUSE) -> tuple[Past, ...]:
    """Every external snapshot that libvirt has of the domain, oldest first; what cannot become one of hvmgr's is refused.

    So are internal ones, by name, unless something else is to become of them.
    """
    listed = noted(domain)
    if internal is Internal.REFUSE:
        require_no_internal(domain, [snapshot for snapshot, _ in listed])
    found = [
        _past(session, domain, snapshot, wishes, is_current=is_current)
        for snapshot, is_current in listed
        if not snapshot.is_internal
    ]
    return in_order(found)


def noted(domain: Domain) -> list[tuple[LibvirtSnapshot, bool]]:
    """All that libvirt says of snapshots, parents first; and whether it is the current one."""
    return [
        (libvirt_snapshot.parse(one.xml, source=f"libvirt's snapshot '{one.name}'"), one.is_current)
        for one in libvirt_snapshots.list_all(domain)
    ]


def in_order(pasts: Iterable[Past]) -> tuple[Past, ...]:
    """Oldest first; of one second, which is all that libvirt knows, parents before their children."""
    found = list(pasts)
    known = {past.libvirt_name: past for past in found}

    def depth(past: Past) -> int:
        above: set[str] = set()
        while past.parent in known and past.parent not in above:
            above.add(past.parent)
            past = known[past.parent]
        return len(above)

    return _in_order(sorted(found, key=lambda past: (int(past.created.timestamp()), depth(past), past.created)))


def configuration_of(session: Session, snapshot: LibvirtSnapshot, wishes: Wishes) -> Configuration:
    """The VM's configuration at a snapshot, as its next start would have taken it."""
    assert snapshot.configuration is not None
    live = snapshot.configuration.copy()
    resolve_volumes(session, live, excluded=wishes.excluded)
    _leave_out(live, wishes)
    return _at_rest(session, snapshot, live, wishes)


def require_no_internal(domain: Domain, parsed: Iterable[LibvirtSnapshot]) -> None:
    """Refuses snapshots that lie inside the images, and says their names."""
    if internal := [snapshot.name for snapshot in parsed if snapshot.is_internal]:
        raise errors.Unsupported(
            f"{domain.name} has internal snapshots, inside its images: {', '.join(internal)}",
            hint="--convert-internal makes an image of each, --drop-internal deletes them",
            snapshots=internal,
        )


def place(pasts: Sequence[Past], forest: Tree) -> dict[str, str | None]:
    """The parent of each snapshot, ids; a parent is always older.

    Of the older snapshots on whose images this one stands in every disk that both have, the nearest; of several at the
    same distance the one that libvirt names. With no disk in common libvirt's word counts.
    """
    known = {past.libvirt_name: past for past in pasts}
    found: dict[str, str | None] = {}
    for number, past in enumerate(pasts):
        said = known.get(past.parent or "")
        if said is not None and said in pasts[:number] and (past.is_internal or said.is_internal):
            found[past.id] = said.id  # images that were made of what lay inside others tell nothing
        else:
            found[past.id] = _nearest(forest, past.images, pasts[:number], None if said is None else said.id)
    return found


def place_of_present(pasts: Sequence[Past], forest: Tree) -> str | None:
    """The snapshot below which the present is."""
    current = next((past for past in pasts if past.is_current), None)
    if current is not None and current.is_internal:
        return current.id
    return _nearest(forest, forest.present.disks, pasts, None if current is None else current.id)


def abandoned(pasts: Sequence[Past], forest: Tree) -> list[tuple[str, Past]]:
    """Images in which the VM went on after a snapshot and which neither a snapshot nor the present needs any more."""
    named, below = forest.named(), forest.children()
    return [
        (path, past)
        for past in pasts
        for path in past.went_on.values()
        if path not in named and not below.get(path) and Path(path).exists()
    ]


def resolve_volumes(session: Session, one: Configuration, *, excluded: frozenset[str] = frozenset()) -> None:
    """Disks that are named by storage pool and volume name the file or device behind it.

    libvirt itself takes no snapshots of such disks when the VM is off, and images that hvmgr makes are files anyway.
    """
    for disk in one.disks():
        if disk.device == "disk" and disk.slot not in excluded:
            volumes.resolve(session.connection, one, disk)


def _in_order(found: Sequence[Past]) -> tuple[Past, ...]:
    """libvirt knows seconds alone: what it has of one second, parents first, stays in that order by microseconds."""
    ordered: list[Past] = []
    for past in found:
        earliest = ordered[-1].created + timedelta(microseconds=1) if ordered else past.created
        ordered.append(dataclasses.replace(past, created=max(past.created, earliest)))
    return tuple(ordered)


def _past(session: Session, domain: Domain, snapshot: LibvirtSnapshot, wishes: Wishes, *, is_current: bool) -> Past:
    if snapshot.configuration is None:
        raise _unusable(domain, snapshot, "holds no configuration of the VM", None)
    live = snapshot.configuration.copy()
    resolve_volumes(session, live, excluded=wishes.excluded)
    _leave_out(live, wishes)
    for disk in live.disks():
        _require_whole(domain, snapshot, disk, wishes)
    paths, formats = _disks(live)
    memory = _memory(domain, snapshot)
    name, notes = fitting(session, snapshot.name, snapshot.description)
    return Past(
        id=session.new_id(),
        libvirt_name=snapshot.name,
        name=name,
        notes=notes,
        created=snapshot.created,
        type=SnapshotType.DISK_ONLY if snapshot.state is Moment.DISKS_ONLY else SnapshotType.STANDARD,
        state=_state(memory),
        parent=snapshot.parent,
        is_current=is_current,
        memory=memory,
        configuration=_at_rest(session, snapshot, live, wishes),
        images=paths,
        formats=formats,
        went_on={slot: vm_home.canonical(path) for slot, path in snapshot.went_on().items() if slot in paths},
    )


def _at_rest(session: Session, snapshot: LibvirtSnapshot, live: Configuration, wishes: Wishes) -> Configuration:
    """The configuration for the next start, where it is known and has the same disks; else what ran, without its chains."""
    chosen = live
    if snapshot.inactive is not None:
        inactive = snapshot.inactive.copy()
        resolve_volumes(session, inactive, excluded=wishes.excluded)
        _leave_out(inactive, wishes)
        if _disks(inactive) == _disks(live):
            chosen = inactive
    chosen.strip_backing_chains()
    return chosen


def _leave_out(one: Configuration, wishes: Wishes) -> None:
    """Disks that are left out are what they are at present: an old path of one may be an image that must not change."""
    for disk in one.disks():
        now = wishes.present.find_disk(disk.slot)
        mine = disk.slot in wishes.excluded or (disk.snapshot == "no" and now is not None and now.snapshot == "no")
        if mine and now is not None and not disk.is_removable:
            adoptee.take_disk(one, disk.slot, wishes.present)


def _require_whole(domain: Domain, snapshot: LibvirtSnapshot, disk: Disk, wishes: Wishes) -> None:
    if disk.device not in ("disk", "lun") or disk.readonly:
        return
    if disk.slot in wishes.excluded or _is_left_out(wishes.present, disk):
        if snapshot.memory is Kind.EXTERNAL:
            raise _unusable(
                domain, snapshot, f"holds the memory of the VM, which would not fit disk {disk.slot} as it is", None
            )
        return
    kinds = {one.slot: one.kind for one in snapshot.disks}
    if not disk.takes_part or disk.source is None or kinds.get(disk.slot) is not Kind.EXTERNAL:
        raise _unusable(domain, snapshot, f"does not hold disk {disk.slot}", disk.slot)


def _is_left_out(present: Configuration, disk: Disk) -> bool:
    now = present.find_disk(disk.slot)
    return disk.snapshot == "no" and now is not None and now.snapshot == "no"


def _unusable(domain: Domain, snapshot: LibvirtSnapshot, why: str, slot: str | None) -> errors.Unsupported:
    forget = f"let libvirt forget it, its images stay: virsh snapshot-delete {domain.name} {snapshot.name} --metadata"
    return errors.Unsupported(
        f"libvirt's snapshot '{snapshot.name}' of {domain.name} {why}, so that there is no way back to it",
        hint=forget if slot is None else f"leave the disk out with --exclude-disk {slot}, or {forget}",
        snapshot=snapshot.name,
    )


def _disks(one: Configuration) -> tuple[dict[str, str], dict[str, str]]:
    paths, formats = dict[str, str](), dict[str, str]()
    for disk in one.disks():
        if disk.takes_part and disk.source is not None:
            path = vm_home.canonical(disk.source)
            paths[disk.slot], formats[path] = path, disk.format or images.RAW
    return paths, formats


def _memory(domain: Domain, snapshot: LibvirtSnapshot) -> Path | None:
    if snapshot.memory is not Kind.EXTERNAL or snapshot.memory_file is None:
        return None
    path = Path(snapshot.memory_file)
    forget = f"virsh snapshot-delete {domain.name} {snapshot.name} --metadata"
    try:
        saved = saved_state.read(path)
    except errors.HvmgrError as error:
        raise errors.Corrupt(
            f"the memory of libvirt's snapshot '{snapshot.name}' of {domain.name} cannot be used: {error}",
            hint=f"put the file back, or let libvirt forget the snapshot: {forget}",
            path=str(path),
        ) from error
    if not saved.complete:
        raise errors.Corrupt(
            f"the memory of libvirt's snapshot '{snapshot.name}' of {domain.name} was not saved completely: {path}",
            hint=f"let libvirt forget the snapshot: {forget}",
            path=str(path),
        )
    return path


def _state(memory: Path | None) -> SavedState:
    if memory is None:
        return SavedState.NONE
    return SavedState.RUNNING if saved_state.read(memory).was_running else SavedState.PAUSED


def fitting(session: Session, libvirt_name: str, notes: str) -> tuple[str, str]:
    """The name as hvmgr allows it, and the notes, which keep libvirt's name where it is another one."""
    name = _fitting(libvirt_name)
    if name == libvirt_name:
        return name, notes
    session.say(f"libvirt's snapshot '{libvirt_name}' has a name that is no name here: it becomes '{name}'")
    return name, f"{libvirt_name}\n{notes}".strip()


def _fitting(name: str) -> str:
    """The name as hvmgr allows it: 1 to 100 printable characters."""
    printable = "".join(letter if letter.isprintable() else " " for letter in name).strip() or "unnamed"
    return printable if len(printable) <= NAME_LENGTH else printable[:NAME_LENGTH].rstrip()


def _nearest(forest: Tree, disks: Mapping[str, str], older: Sequence[Past], said: str | None) -> str | None:
    chains = {slot: [image.path for image in forest.chain(path)] for slot, path in disks.items()}
    best: tuple[int, bool, int] | None = None
    found: str | None = None
    for number, past in enumerate(older):
        common = chains.keys() & past.images.keys()
        if not common:
            if past.id == said and best is None:
                found = said
            continue
        if not all(past.images[slot] in chains[slot] for slot in common):
            continue
        distance = sum(chains[slot].index(past.images[slot]) for slot in common)
        rank = (-distance, past.id == said, number)
        if best is None or rank > best:
            best, found = rank, past.id
    return found


def say_what_differs(session: Session, pasts: Sequence[Past], parents: Mapping[str, str | None]) -> None:
    """Where the images tell another tree than libvirt, people get to know."""
    ids = {past.libvirt_name: past.id for past in pasts}
    names = {past.id: past.name for past in pasts}
    for past in pasts:
        said, here = ids.get(past.parent or ""), parents[past.id]
        if said != here:
            one, other = (f"below '{names[each]}'" if each else "at the root" for each in (said, here))
            session.say(f"libvirt has snapshot '{past.name}' {one}; by its images it is {other}")
