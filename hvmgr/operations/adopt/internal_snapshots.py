"""Snapshots inside the images of a domain that is adopted: made into images of their own, or removed with them.

One is whatever bears the same name inside the images of the VM's disks; libvirt's note of it, where there is one, says the
rest. What it held becomes a differencing image on what the image itself stands on (on a blank base, where that is nothing),
and is compared with the original, byte by byte through QEMU, before that goes. Saved memory inside an image cannot become a
libvirt save file: such a snapshot keeps its disks alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from hvmgr import errors, units
from hvmgr.host import internal_snapshots
from hvmgr.host.domain import Domain, State
from hvmgr.model import configuration, plan
from hvmgr.model.configuration import Configuration
from hvmgr.model.libvirt_snapshot import LibvirtSnapshot, Moment
from hvmgr.model.metadata import SavedState, SnapshotType
from hvmgr.model.plan import Step
from hvmgr.model.tree import Image, Keeper, Tree
from hvmgr.operations import strangers
from hvmgr.operations.adopt import libvirt_history
from hvmgr.operations.adopt.libvirt_history import Past, Wishes
from hvmgr.operations.session import Session
from hvmgr.storage import images, vm_home
from hvmgr.storage.images import InternalSnapshot
from hvmgr.storage.vm_home import VmHome

# Behind the end of a shorter parent there are zeros; of another size, nothing is ever merged down into it.
_BLANK_SIZE = 512
_NANO = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Inside:
    """One snapshot as the images hold it: by slot the image and its entry there. ``noted`` is what libvirt says of it."""

    name: str
    created: datetime
    places: Mapping[str, tuple[str, InternalSnapshot]]
    noted: LibvirtSnapshot | None
    is_current: bool

    @property
    def has_memory(self) -> bool:
        """Whether the memory of the VM is in there as well."""
        return any(entry.state_size for _, entry in self.places.values())


@dataclass(frozen=True, slots=True)
class Conversion:
    """What becomes of them: new snapshots with their images, and the steps before and after the switch."""

    pasts: tuple[Past, ...] = ()
    images: tuple[Image, ...] = ()
    prepare: tuple[Step, ...] = ()
    finish: tuple[Step, ...] = ()


def find(domain: Domain, forest: Tree) -> tuple[Inside, ...]:
    """Every snapshot inside the images that the VM wrote or libvirt's snapshots froze, oldest first."""
    noted = {snapshot.name: (snapshot, current) for snapshot, current in libvirt_history.noted(domain)}
    found: dict[str, dict[str, tuple[str, InternalSnapshot]]] = {
        name: {} for name, (one, _) in noted.items() if one.is_internal
    }
    for slot, path in _written(forest):
        for entry in images.internal_snapshots(Path(path)):
            before = found.setdefault(entry.name, {}).setdefault(slot, (path, entry))
            if before != (path, entry):
                raise errors.Unsupported(
                    f"disk {slot} of {domain.name} has two internal snapshots '{entry.name}', in {before[0]} and {path}",
                    hint=f"delete one of them: qemu-img snapshot -d '{entry.name}' IMAGE",
                )
    inside = [_inside(name, places, *noted.get(name, (None, False))) for name, places in found.items()]
    return tuple(sorted(inside, key=lambda one: one.created))


def names(domain: Domain, home: VmHome) -> list[str]:
    """What is inside the images of the domain, by libvirt's notes and by its present disks."""
    present = configuration.parse(domain.xml(live=False), source=f"libvirt's XML of {domain.name}")
    formats = {
        vm_home.canonical(disk.source): disk.format or images.RAW
        for disk in present.disks()
        if disk.takes_part and disk.source is not None and Path(disk.source).exists()
    }
    found = [snapshot.name for snapshot, _ in libvirt_history.noted(domain) if snapshot.is_internal]
    for path in home.load_images(formats):
        found += [entry.name for entry in images.internal_snapshots(Path(path))]
    return list(dict.fromkeys(found))


def convert(session: Session, domain: Domain, wishes: Wishes, forest: Tree, inside: Sequence[Inside]) -> Conversion:
    """Each of them becomes a snapshot with images of its own; refused by name when one cannot."""
    _require_ready(session, domain, inside)
    pasts: list[Past] = []
    made: list[Image] = []
    steps: list[Step] = []
    parent: str | None = None
    blanks: dict[str, Image] = {}
    for number, one in enumerate(inside):
        was = _configuration(session, one, wishes)
        _require_whole(domain, was, one, forest)
        targets = {slot: str(session.layout.image(slot, session.new_id())) for slot in one.places}
        for slot, (path, entry) in one.places.items():
            below = _below(session, forest, slot, path, blanks)
            target = Image(targets[slot], below.path, images.QCOW2, forest.images[path].size, 0, Keeper.IMAGES)
            made.append(target)
            steps.append(
                plan.ConvertInternal(
                    source=path,
                    snapshot_id=entry.id,
                    name=one.name,
                    target=target.path,
                    parent=below.path,
                    parent_format=below.format,
                )
            )
            was.set_disk_source(slot, Path(target.path), images.QCOW2)
        if one.has_memory:
            session.say(
                f"internal snapshot '{one.name}' holds the memory of {domain.name}, which cannot become a save file of"
                " libvirt's: it has its disks alone"
            )
        is_last = number == len(inside) - 1 and not any(other.is_current for other in inside)
        pasts.append(_past(session, one, was, targets, parent, is_last=is_last))
        parent = one.name
    _require_space(session, inside)
    bases = [
        plan.CreateImage(path=image.path, size=image.size, parent=None, parent_format=None) for image in blanks.values()
    ]
    return Conversion(tuple(pasts), (*blanks.values(), *made), (*bases, *steps), _removals(inside))


def drop(session: Session, domain: Domain, inside: Sequence[Inside]) -> Conversion:
    """All of them go, with what they held."""
    _require_ready(session, domain, inside)
    return Conversion(finish=_removals(inside))


def _written(forest: Tree) -> Iterable[tuple[str, str]]:
    seen: set[tuple[str, str]] = set()
    for disks in (forest.present.disks, *(node.disks for node in forest.nodes.values())):
        for slot, path in disks.items():
            if (slot, path) not in seen and forest.images[path].format == images.QCOW2:
                seen.add((slot, path))
                yield slot, path


def _inside(
    name: str,
    places: Mapping[str, tuple[str, InternalSnapshot]],
    noted: LibvirtSnapshot | None,
    is_current: bool,  # noqa: FBT001 - comes as a pair
) -> Inside:
    if noted is not None:
        created = noted.created
    else:
        created = datetime.fromtimestamp(max(entry.created_ns for _, entry in places.values()) / _NANO, UTC)
    return Inside(name, created, places, noted, is_current)


def _removals(inside: Sequence[Inside]) -> tuple[Step, ...]:
    notes = [plan.ForgetLibvirtSnapshot(name=one.name) for one in reversed(inside) if one.noted is not None]
    inner = [plan.DropInternal(path=path, name=one.name) for one in inside for path, _ in one.places.values()]
    return (*notes, *inner)


def _require_ready(session: Session, domain: Domain, inside: Sequence[Inside]) -> None:
    if not inside:
        return
    state = domain.state()
    if state is not State.OFF:
        hint = f"stop it first: virsh shutdown {domain.name}"
        if state is State.SAVED:
            hint = f"start and stop it, or drop its saved memory: virsh managedsave-remove {domain.name}"
        raise errors.Conflict(
            f"{domain.name} is {state}: its internal snapshots cannot be converted or dropped", hint=hint
        )
    for path, names in strangers.of(session, {path for one in inside for path, _ in one.places.values()}).items():
        raise errors.Conflict(
            f"{path} has internal snapshots and is needed by {', '.join(names)}: it is not written",
            hint="delete those VMs first, or give them a copy of the image",
            path=path,
            users=list(names),
        )


def _configuration(session: Session, one: Inside, wishes: Wishes) -> Configuration:
    if one.noted is not None and one.noted.configuration is not None:
        return libvirt_history.configuration_of(session, one.noted, wishes)
    found = wishes.present.copy()
    found.strip_backing_chains()
    return found


def _require_whole(domain: Domain, was: Configuration, one: Inside, forest: Tree) -> None:
    hint = "leave it out with --exclude-disk, or drop the snapshot with --drop-internal"
    for disk in was.disks():
        if disk.takes_part and disk.slot not in one.places:
            raise errors.Unsupported(
                f"internal snapshot '{one.name}' of {domain.name} does not hold disk {disk.slot}", hint=hint
            )
    for slot, (path, entry) in one.places.items():
        if was.find_disk(slot) is None:
            raise errors.Unsupported(
                f"internal snapshot '{one.name}' of {domain.name} holds a disk {slot}, which the VM did not have",
                hint=hint,
            )
        size = forest.images[path].size
        if entry.disk_size is not None and entry.disk_size != size:
            raise errors.Unsupported(
                f"internal snapshot '{one.name}' of {domain.name}: disk {slot} had {units.format_size(entry.disk_size)} then, "
                f"it has {units.format_size(size)} now, and QEMU reads it with its present size only",
                hint=f"resize {path} back for the conversion, or drop the snapshot with --drop-internal",
                path=path,
            )


def _below(session: Session, forest: Tree, slot: str, path: str, blanks: dict[str, Image]) -> Image:
    """What the converted image stands on: the parent of the original, or a blank base, so that it can go again."""
    parent = forest.images[path].parent
    if parent is not None:
        return forest.images[parent]
    if path not in blanks:
        number = len(blanks) + 1  # the home is new: nothing else is there
        blank = session.layout.bases / f"{slot}_blank{number}.qcow2"
        blanks[path] = Image(str(blank), None, images.QCOW2, _BLANK_SIZE, 0, Keeper.BASES)
    return blanks[path]


def _past(
    session: Session,
    one: Inside,
    was: Configuration,
    targets: Mapping[str, str],
    before: str | None,
    *,
    is_last: bool,
) -> Past:
    ran = one.has_memory or (one.noted is not None and one.noted.state is not Moment.OFF)
    name, notes = libvirt_history.fitting(session, one.name, "" if one.noted is None else one.noted.description)
    return Past(
        id=session.new_id(),
        libvirt_name=one.name,
        name=name,
        notes=notes,
        created=one.created,
        type=SnapshotType.DISK_ONLY if ran else SnapshotType.STANDARD,
        state=SavedState.NONE,
        parent=before if one.noted is None else one.noted.parent,
        is_current=one.is_current or (is_last and one.noted is None),
        memory=None,
        configuration=was,
        images=dict(targets),
        formats=dict.fromkeys(targets.values(), images.QCOW2),
        went_on={},
        is_internal=True,
    )


def _require_space(session: Session, inside: Sequence[Inside]) -> None:
    needed = sum(
        internal_snapshots.required_space(Path(path), entry.id) for one in inside for path, entry in one.places.values()
    )
    folder = next(one for one in (session.layout.home, *session.layout.home.parents) if one.is_dir())
    facts = os.statvfs(folder)
    free = facts.f_bavail * facts.f_frsize
    if needed > free:
        raise errors.NoSpace(
            f"images of the internal snapshots need up to {units.format_size(needed)}, {folder} has "
            f"{units.format_size(free)} free",
            hint="choose another place with --home, or drop the snapshots with --drop-internal",
            needed=needed,
            free=free,
        )
