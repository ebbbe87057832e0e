"""A VM of hvmgr's that becomes a plain domain of libvirt's again: the way out.

No image is merged and nothing that holds data is removed: hvmgr's facts leave libvirt's XML, its own files leave the
folder, frozen images get their mode back. What libvirt's external snapshots can say of the tree they say; the rest is
named before, and its files stay. The VM may run, unless its disks are to be made complete.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hvmgr import errors, units
from hvmgr.host import libvirt_snapshots
from hvmgr.host.domain import State
from hvmgr.model import libvirt_snapshot, linear_history, plan
from hvmgr.model.configuration import Configuration
from hvmgr.model.libvirt_snapshot import Kind, LibvirtSnapshot, Moment, SnapshotDisk
from hvmgr.model.linear_history import History, Link
from hvmgr.model.metadata import SavedState, SnapshotRecord, SnapshotType
from hvmgr.model.plan import Plan, Step
from hvmgr.model.tree import Keeper, Tree
from hvmgr.operations import snapshots
from hvmgr.operations.session import Session
from hvmgr.storage import images, vm_home
from hvmgr.storage.vm_home import VmHome


@dataclass(frozen=True, slots=True)
class Release:
    """What a release makes of a VM.

    ``snapshots`` are those that libvirt has afterwards, oldest first, by hvmgr's name and by libvirt's. ``lost`` says in
    sentences what is not in libvirt's words. ``left`` are the files in the folder that no domain names: path, what it is.
    """

    snapshots: tuple[tuple[str, str], ...]
    lost: tuple[str, ...]
    left: tuple[tuple[str, str], ...]


def foresee(home: VmHome, *, flatten: bool) -> Release:
    """What a release would make of the VM, by its home alone."""
    return _release(home, home.tree(), (), flatten=flatten)


def of(session: Session, *, flatten: bool) -> Release:
    """What a release makes of the VM, by all that is known on this host."""
    taken = tuple(libvirt_snapshots.names(session.domain()))
    return _release(session.home, snapshots.whole_tree(session, with_libvirts=False), taken, flatten=flatten)


def _release(home: VmHome, forest: Tree, taken: tuple[str, ...], *, flatten: bool) -> Release:
    """``taken`` are names that libvirt uses already."""
    history = _history(forest, flatten=flatten)
    records = {one.record.id: one.record for one in home.snapshots()}
    names = _libvirt_names(history, records, taken)
    needed = _needed(home, forest, history, flatten=flatten)
    return Release(
        snapshots=tuple((records[link.snapshot_id].name, names[link.snapshot_id]) for link in history.links),
        lost=tuple(_lost(home, forest, history, records, names)),
        left=tuple(_left(home, forest, records, needed)),
    )


def plan_release(session: Session, *, flatten: bool) -> Plan:
    """libvirt keeps the VM, hvmgr forgets it; with ``flatten`` the present is one complete image per disk."""
    home = session.home
    before = snapshots.whole_tree(session, with_libvirts=False)
    for path in before.present.disks.values():
        before.chain(path)  # names a missing image: the present has to be usable
    present = home.present().without_metadata()
    notes = [] if flatten else _notes(session, before)
    copies = _complete_copies(session, before) if flatten else {}
    for slot, copy in copies.items():
        present.set_disk_source(slot, Path(copy.target), images.QCOW2)
    lent = before.lent()
    return Plan(
        plan_id=session.new_id(),
        vm_id=home.vm_id,
        operation="vm release",
        subject=f"release of {home.name}",
        prepare=(*copies.values(), *notes),
        switch=plan.ReleaseDomain(xml=present.to_xml()),
        finish=(
            plan.ForgetMetadata(),
            *(plan.ThawImage(path=path) for path in before.images if path not in lent),
            *(plan.RemoveFile(path=copy.source) for copy in copies.values() if _is_spent(before, copy.source)),
            plan.LeaveHome(),
        ),
        hold=snapshots.working(before) if flatten else (),
    )


# --- the disks ------------------------------------------------------------------------------------------------------


def _complete_copies(session: Session, before: Tree) -> dict[str, plan.CompleteImage]:
    """One for each disk of the present that stands on others."""
    name, state = session.home.name, session.state()
    if state is not State.OFF:
        hint = f"stop it first: hvmgr vm stop {name}"
        if state is State.SAVED:
            hint = f"start and stop it, or drop its saved memory: virsh managedsave-remove {name}"
        raise errors.Conflict(f"{name} is {state}: its disks cannot be made complete", hint=hint)
    copies: dict[str, plan.CompleteImage] = {}
    for slot, path in before.present.disks.items():
        image = before.chain(path)[0]
        if image.parent is not None:
            _require_nothing_inside(session, path, image.format)
            target = _free_name(session, f"{name}-{slot}", {one.target for one in copies.values()})
            copies[slot] = plan.CompleteImage(source=path, target=target, size=image.size)
    _require_space(session, before, copies)
    return copies


def _require_nothing_inside(session: Session, path: str, fmt: str) -> None:
    """A complete image holds what the guest sees, and no snapshots that virsh or qemu-img made inside the old one."""
    if images.read(Path(path), fmt).has_internal_snapshots:
        inside = [one.name for one in images.internal_snapshots(Path(path))]
        raise errors.Conflict(
            f"{path} has internal snapshots, which a complete image would not hold: {', '.join(inside)}",
            hint=f"delete those that nobody needs (virsh snapshot-delete {session.home.name} NAME; qemu-img snapshot -d"
            f" NAME '{path}'), or release it without --flatten",
            path=path,
            snapshots=inside,
        )


def _free_name(session: Session, stem: str, taken: set[str]) -> str:
    target, number = session.layout.bases / f"{stem}.qcow2", 1
    while target.exists() or str(target) in taken:
        number += 1
        target = session.layout.bases / f"{stem}-{number}.qcow2"
    return str(target)


def _require_space(session: Session, before: Tree, copies: Mapping[str, plan.CompleteImage]) -> None:
    needed = sum(min(sum(one.data for one in before.chain(copy.source)), copy.size) for copy in copies.values())
    facts = os.statvfs(session.layout.bases)
    free = facts.f_bavail * facts.f_frsize
    if needed > free:
        raise errors.NoSpace(
            f"complete images of {session.home.name} need up to {units.format_size(needed)}, there are "
            f"{units.format_size(free)} free in {session.layout.bases}",
            hint="free space there, or release it without --flatten",
            needed=needed,
            free=free,
        )


def _is_spent(before: Tree, path: str) -> bool:
    """Whether a differencing image holds nothing any more that its complete copy does not hold, and nobody needs it."""
    mine = before.images[path].keeper is Keeper.IMAGES and before.named().get(path) == ["now"]
    return mine and not before.children().get(path) and not before.strangers.get(path)


# --- the snapshots --------------------------------------------------------------------------------------------------


def _history(forest: Tree, *, flatten: bool) -> History:
    if not flatten:
        return linear_history.of(forest)
    return History((), dict.fromkeys(forest.nodes, "the present is made complete, and stands on no snapshot any more"))


def _libvirt_names(
    history: History, records: Mapping[str, SnapshotRecord], taken: tuple[str, ...]
) -> Mapping[str, str]:
    ids = [link.snapshot_id for link in history.links]
    return linear_history.fitting_names([(one, records[one].name) for one in ids], taken)


def _notes(session: Session, forest: Tree) -> list[Step]:
    history = linear_history.of(forest)
    records = {one.record.id: one.record for one in session.home.snapshots()}
    names = _libvirt_names(history, records, tuple(libvirt_snapshots.names(session.domain())))
    spelled = _spelled(session.home, forest)
    last = history.links[-1].snapshot_id if history.links else None
    return [
        plan.NoteLibvirtSnapshot(
            name=names[link.snapshot_id],
            xml=libvirt_snapshot.build(_as_libvirt_has_it(session, forest, link, records, names, spelled)),
            is_current=link.snapshot_id == last,
        )
        for link in history.links
    ]


def _as_libvirt_has_it(
    session: Session,
    forest: Tree,
    link: Link,
    records: Mapping[str, SnapshotRecord],
    names: Mapping[str, str],
    spelled: Mapping[str, str],
) -> LibvirtSnapshot:
    record = records[link.snapshot_id]
    name, has_memory = names[link.snapshot_id], record.state is not SavedState.NONE
    configuration = _configuration(session, link, forest, spelled)
    return LibvirtSnapshot(
        name=name,
        created=record.created,
        state=_moment(record),
        description=record.notes if name == record.name else f"{record.name}\n{record.notes}".strip(),
        parent=None if link.parent is None else names[link.parent],
        memory=Kind.EXTERNAL if has_memory else Kind.NO,
        memory_file=str(session.layout.memory(link.snapshot_id)) if has_memory else None,
        disks=tuple(_disk(forest, link, disk.slot, spelled) for disk in configuration.disks()),
        configuration=configuration,
    )


def _configuration(session: Session, link: Link, forest: Tree, spelled: Mapping[str, str]) -> Configuration:
    """The VM as it was; its firmware variables are the snapshot's own copy, when there is one."""
    present = session.home.present()
    found = session.home.snapshot(link.snapshot_id).without_metadata()
    found.set_name(present.name)
    found.strip_backing_chains()
    for slot, path in forest.nodes[link.snapshot_id].disks.items():
        disk = found.find_disk(slot)
        if disk is not None and disk.type == "file":
            found.set_disk_source(slot, Path(spelled[path]), forest.images[path].format)
    if found.nvram is not None and not found.nvram.exists() and present.nvram is not None:
        found.set_nvram(present.nvram)
    return found


def _disk(forest: Tree, link: Link, slot: str, spelled: Mapping[str, str]) -> SnapshotDisk:
    if slot not in link.went_on:
        return SnapshotDisk(slot=slot, kind=Kind.NO)
    path = link.went_on[slot]
    return SnapshotDisk(slot=slot, kind=Kind.EXTERNAL, source=spelled[path], format=forest.images[path].format)


def _spelled(home: VmHome, forest: Tree) -> dict[str, str]:
    """The images of the present's chains as libvirt calls them, by path.

    libvirt compares names as text when it deletes a snapshot: the configuration's own spelling, and below it what the
    headers say, put behind the folder of the image above ("…/Snapshots/ID/../../Virtual Hard Disks/hda.qcow2").
    """
    found: dict[str, str] = {}
    for disk in home.present().disks():
        name = disk.source if disk.takes_part else None
        while name is not None:
            path = vm_home.canonical(name)
            found[path] = name
            backing = images.read(Path(path), forest.images[path].format).backing
            name = None if backing is None else os.path.join(os.path.dirname(name), backing)  # noqa: PTH118, PTH120
    return found


def _moment(record: SnapshotRecord) -> Moment:
    if record.state is SavedState.RUNNING:
        return Moment.RUNNING
    if record.state is SavedState.PAUSED:
        return Moment.PAUSED
    return Moment.OFF if record.type is SnapshotType.STANDARD else Moment.DISKS_ONLY


# --- what is lost, what is left -------------------------------------------------------------------------------------


def _lost(
    home: VmHome, forest: Tree, history: History, records: Mapping[str, SnapshotRecord], names: Mapping[str, str]
) -> Iterator[str]:
    for one, record in records.items():
        if one in history.unfit:
            yield f"snapshot '{record.name}' is no snapshot any more: {history.unfit[one]}"
        elif record.damaged:
            yield f"snapshot '{record.name}' is damaged, its disk {', '.join(record.damaged)} was written: libvirt knows no word of it"
        if one not in history.unfit and names[one] != record.name:
            yield f"snapshot '{record.name}' is called '{names[one]}' in libvirt"
    kept = [link.snapshot_id for link in history.links]
    if variables := [f"'{records[one].name}'" for one in kept if home.layout.snapshot_nvram(one).exists()]:
        yield f"firmware variables of snapshot {', '.join(variables)}: libvirt would go on in that file, not in a copy"
    if states := [f"'{records[one].name}'" for one in kept if home.layout.snapshot_tpm(one).exists()]:
        yield f"TPM state of snapshot {', '.join(states)}: libvirt's snapshots have none, it stays as files"
    if forest.undo is not None:
        yield "the undo slot: nothing can be undone any more, its images stay as files"
    for path, users in forest.strangers.items():
        yield f"{path} is needed by {', '.join(users)}: it stays read-only"


def _needed(home: VmHome, forest: Tree, history: History, *, flatten: bool) -> set[str]:
    """The files in the home that libvirt's domain and its snapshots name."""
    found: set[str] = set()
    for path in forest.present.disks.values():
        chain = [image.path for image in forest.chain(path)]
        if flatten and len(chain) > 1:
            found |= {path} if _is_spent(forest, path) else set()  # it goes
        else:
            found |= set(chain)
    present = home.present()
    if present.nvram is not None:
        found.add(str(present.nvram))
    for link in history.links:
        found |= {str(home.layout.memory(link.snapshot_id)), str(home.layout.snapshot_nvram(link.snapshot_id))}
    return found


def _left(
    home: VmHome, forest: Tree, records: Mapping[str, SnapshotRecord], needed: set[str]
) -> Iterator[tuple[str, str]]:
    layout, names = home.layout, forest.named()
    ours = {layout.configuration, layout.undo, *(layout.snapshot(one) for one in records)}
    for file in sorted(home.path.rglob("*")):
        path = str(file)
        if path in needed or file in ours or file.is_relative_to(layout.private) or not file.is_file():
            continue
        yield path, _what(home, forest, records, file, names.get(path, []))


def _what(home: VmHome, forest: Tree, records: Mapping[str, SnapshotRecord], file: Path, users: list[str]) -> str:
    """A file that stays, in words."""
    if users:
        return "image of " + ", ".join(_user(user, records) for user in users)
    if str(file) in forest.images:
        return "unnamed image" if forest.children().get(str(file)) else "detached disk"
    for one, record in records.items():
        folder = home.layout.snapshot_folder(one)
        if file.is_relative_to(folder):
            part = file.relative_to(folder).parts[0]
            what = {"memory.save": "saved memory", "nvram": "firmware variables", "tpm": "TPM state"}.get(part, "file")
            return f"{what} of snapshot '{record.name}'"
    return "state of the undo slot" if file.is_relative_to(home.layout.vm_folder) else "unknown file"


def _user(user: str, records: Mapping[str, SnapshotRecord]) -> str:
    others = {"now": "the present", "undo": "the undo slot"}
    return others.get(user) or f"snapshot '{records[user].name}'"
