"""What doctor says of a home and libvirt together: the domain, its configuration, and who else needs the images."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from hvmgr import errors
from hvmgr.host.domain import State
from hvmgr.model import configuration, diagnosis, metadata
from hvmgr.model.diagnosis import Code, finding
from hvmgr.model.finding import Finding
from hvmgr.operations import running_qemu, strangers, stuck_memory
from hvmgr.operations.doctor import image_checks, surroundings
from hvmgr.operations.doctor.surroundings import Known, Surroundings
from hvmgr.operations.session import open_images
from hvmgr.storage import images, locks, start_guard, survey, vm_home
from hvmgr.storage.survey import Part, Survey

# What the start guard of the hook finds and no other check here does.
_GUARDED = {str(Code.IMAGE_SWAPPED), str(Code.IMAGE_FROZEN), str(Code.HOME_FOREIGN)}


def place(seen: Survey, around: Surroundings) -> Iterator[Finding]:
    """Whether the home lies where it says, on the connection that it says, and is the only one of its id."""
    home = seen.home.path
    others = [folder for folder in around.homes.get(seen.home.vm_id, ()) if folder != home]
    if others:
        names = ", ".join(map(str, others))
        sentence = f"{home} and {names} claim the same VM, {seen.home.vm_id}: one is a copy"
        yield finding(Code.ID_TWICE, sentence, home, repair="move the copy away; a VM's folder cannot be copied alone")
    if seen.present is None:
        return
    facts = seen.present.facts
    if vm_home.canonical(str(facts.home)) != str(home) and not others:
        if is_home_of(facts.home, seen.home.vm_id):
            sentence = f"{home} is a copy of {facts.home}, which is still there: both claim the VM {seen.home.vm_id}"
            yield finding(Code.ID_TWICE, sentence, home, repair=f"use {facts.home}, or move one of the two away")
        else:
            sentence = f"{home} was at {facts.home} when it was written: its paths lead to where nothing is"
            yield finding(Code.HOME_MOVED, sentence, home, repair=f"move it back to {facts.home}, or doctor --repair")
    if facts.uri != around.uri:
        sentence = f"{seen.name} belongs to the connection {facts.uri}, not to {around.uri}"
        repair = f"hvmgr -c {shlex.quote(facts.uri)} doctor; doctor --repair '{seen.name}' takes it to this connection"
        yield finding(Code.OTHER_CONNECTION, sentence, home, repair=repair)


def is_home_of(folder: Path, vm_id: str) -> bool:
    """Whether a folder is, or claims to be, the home of this VM."""
    try:
        return any(file.stem == vm_id for file in survey.configurations(folder))
    except errors.HvmgrError:
        return True  # nobody may look: it cannot be ruled out


def guard(seen: Survey, known: Known | None) -> Iterator[Finding]:
    """What speaks against a start, by the start guard that the hook uses as well."""
    present = known.configuration if known is not None and known.facts is not None else None
    if present is None and seen.present is not None:
        present = seen.present.configuration
    if present is None:
        return
    closed = set(seen.headers) - image_checks.frozen_images(seen.tree())  # by its mode alone: that is another finding
    for one in start_guard.examine(present):
        if one.code in _GUARDED and not (one.code == Code.IMAGE_FROZEN and one.where in closed):
            yield finding(Code(one.code), one.sentence, one.where, repair="doctor --repair")


def memory(seen: Survey) -> Iterator[Finding]:
    """Whether the VM's QEMU has lost the ability to save its memory, and whether its guest may stand still."""
    if stuck_memory.is_noted(seen.home.layout):
        sentence = f"QEMU failed to save the memory of {seen.name} in the background, and cannot save it any more"
        repair = "restart the VM: hvmgr vm stop, then vm start; until then: snapshot create --type disk-only"
        yield finding(Code.MEMORY_STUCK, sentence, seen.home.path, repair=repair)
    if running_qemu.is_noted(seen.home.layout.guest_at_rest) and not _is_meant(seen):
        sentence = (
            f"the file systems of {seen.name}'s guest may be at rest: its agent stayed silent when it was to wake them"
        )
        repair = f"see to its agent; every command on the VM asks it again; virsh destroy {seen.name} ends the guest"
        yield finding(Code.GUEST_AT_REST, sentence, seen.home.path, repair=repair)


def _is_meant(seen: Survey) -> bool:
    """Whether another command, which is there to wake the guest, has put it to rest."""
    return locks.holder(seen.home.layout.lock) not in {None, os.getpid()}


def domain(seen: Survey, present: Part, around: Surroundings) -> Iterator[Finding]:
    """What libvirt has of the VM, compared with its home."""
    known = around.domain(seen.home)
    if present.facts.uri != around.uri:
        return  # another libvirt's matter
    if known is None:
        yield from _unknown(seen, present, around)
        return
    name = known.domain.name
    if known.facts is None:
        sentence = f"libvirt's configuration of {name} lost what hvmgr keeps in it"
        yield finding(Code.DOMAIN_FOREIGN, sentence, name, repair="doctor --repair, or the next command, puts it back")
    elif known.home is not None and known.home != seen.home.path:
        yield from _elsewhere(seen, known)
    elif known.text.encode() != present.file.read_bytes():
        yield from _edited(present, known)
    yield from _libvirts_own(known)
    yield from _managed_save(seen, known)


def _unknown(seen: Survey, present: Part, around: Surroundings) -> Iterator[Finding]:
    name = present.configuration.name
    taken = next((one for one in around.domains.values() if one.domain.name == name), None)
    if taken is not None:
        sentence = f"libvirt has another VM called '{name}' ({taken.domain.uuid}), so that this one cannot be defined"
        repair = f"give that one another name: virsh domrename '{name}' NEW"
        yield finding(Code.NAME_TAKEN, sentence, seen.home.path, repair=repair)
        return
    sentence = f"libvirt ({around.uri}) does not know {name}"
    repair = "doctor --repair, or the next command on it, defines it from its home"
    yield finding(Code.DOMAIN_UNKNOWN, sentence, seen.home.path, repair=repair)


def _elsewhere(seen: Survey, known: Known) -> Iterator[Finding]:
    assert known.facts is not None
    if is_home_of(known.facts.home, seen.home.vm_id):
        sentence = f"libvirt's {known.domain.name} names the home {known.facts.home}, not {seen.home.path}"
        repair = "move one of the two homes away"
        yield finding(Code.ID_TWICE, sentence, seen.home.path, repair=repair)
    else:
        sentence = f"libvirt's {known.domain.name} names the home {known.facts.home}, which is not there"
        yield finding(Code.HOME_MOVED, sentence, seen.home.path, repair="doctor --repair")


def _edited(present: Part, known: Known) -> Iterator[Finding]:
    name = known.domain.name
    theirs, ours = vm_home.disks_of(known.configuration), present.disks
    if theirs != ours:
        changed = sorted(slot for slot in theirs.keys() | ours.keys() if theirs.get(slot) != ours.get(slot))
        sentence = f"the disks of {name} ({', '.join(changed)}) were changed outside hvmgr"
        repair = "doctor --repair, or the next command, takes the change over or says why not"
        yield finding(Code.DISKS_CHANGED, sentence, name, repair=repair)
    elif not configuration.same(known.text, present.configuration.to_xml()):
        sentence = f"the configuration of {name} was changed outside hvmgr"
        yield finding(Code.DOMAIN_EDITED, sentence, name, repair="the next command takes the change over")


def _libvirts_own(known: Known) -> Iterator[Finding]:
    counts = []
    try:
        if number := known.domain.snapshot_count():
            counts.append(f"{number} snapshots")
        if number := known.domain.bitmap_count():
            counts.append(f"{number} checkpoints (dirty bitmaps)")
    except errors.HvmgrError:
        return  # a driver that cannot count has none
    if counts:
        name = known.domain.name
        sentence = f"libvirt keeps {' and '.join(counts)} of its own for {name}; hvmgr merges nothing that these need"
        repair = f"see them: virsh snapshot-list '{name}', virsh checkpoint-list '{name}'"
        yield finding(Code.LIBVIRT_SNAPSHOTS, sentence, name, repair=repair)


def _managed_save(seen: Survey, known: Known) -> Iterator[Finding]:
    try:
        if known.domain.state() is not State.SAVED:
            return
        saved = configuration.parse(known.domain.managed_save_xml(), source="the managed save")
        theirs = set(vm_home.disks_of(saved).values())
    except errors.HvmgrError as error:
        words = f"the managed save of {known.domain.name} cannot be read: {error}"
        theirs, stale = set(), True
    else:
        held = image_checks.frozen_images(seen.tree())
        words = f"the managed save of {known.domain.name} goes on in {', '.join(sorted(theirs & held))}: frozen images"
        stale = bool(theirs & held)
    if stale:
        name = known.domain.name
        repair = f"its memory belongs to an older moment; give it up: virsh managedsave-remove '{name}'"
        yield finding(Code.SAVE_STALE, words, name, repair=repair)


# --- others -----------------------------------------------------------------------------------------------------------


def others(seen: Survey, around: Surroundings) -> Iterator[Finding]:
    """Other VMs that need or write images of this one; counted in full only where there is something in common."""
    if around.connection is None or not _has_something_in_common(seen, around):
        return
    connection = around.connection
    with surroundings.looking(seen.home, connection) as session:
        held = image_checks.frozen_images(seen.tree())
        writers = strangers.writers(session, held)
        users = strangers.of(session, seen.headers)
    for path, name in writers.items():
        sentence = f"the VM '{name}' writes to {path}, which {', '.join(seen.needs(path))} needs unchanged"
        yield finding(Code.IMAGE_WRITTEN, sentence, path, repair=f"give '{name}' a copy of it before it is started")
    for path, names in users.items():
        sentence = f"{path} is shared with {', '.join(names)}; it is not merged or removed as long as they need it"
        yield finding(Code.IMAGE_SHARED, sentence, path)


def _has_something_in_common(seen: Survey, around: Surroundings) -> bool:
    mine = {header.identity for header in seen.headers.values()}
    for note in around.notes:
        if note.entry is None or note.entry.vm_id == seen.home.vm_id:
            continue
        outside = (Path(path) for path in note.entry.outside)
        if any(images.identity(path) in mine for path in outside if path.exists()):
            return True
        if any(Path(path).is_relative_to(note.entry.home) for path in seen.headers):
            return True
    return around.users.others(seen.home.vm_id, mine)


def busy_images(seen: Survey, known: Known | None) -> set[str]:
    """Images that the running VM has open."""
    try:
        return set() if known is None or not known.domain.is_active() else open_images(seen.home, known.domain)
    except errors.HvmgrError:
        return set(seen.headers)


# --- domains without a home, and the index ----------------------------------------------------------------------------


def homeless(around: Surroundings) -> Iterator[Finding]:
    """Domains with hvmgr's facts whose home is not there, or is another VM's."""
    claimed = {one for folders in around.homes.values() for one in folders}
    for known in around.domains.values():
        home, name = known.home, known.domain.name
        if home is None or is_home_of(home, known.domain.uuid) or around.homes.get(known.domain.uuid):
            continue
        if home in claimed:
            yield from diagnosis.about(name, _copies(home, known))
        elif home not in around.folders:  # else it lost its configuration, and says so itself
            sentence = f"the home of {name}, {home}, is not there"
            repair = f"mount or put back the folder; without it, see what is left: virsh domblklist '{name}'"
            yield finding(Code.HOME_MISSING, sentence, home, repair=repair, vm=name)


def _copies(home: Path, known: Known) -> Iterator[Finding]:
    """A copy of a VM (``virt-clone``) still names the home of the one that it was copied from."""
    name = known.domain.name
    writes = [one for one in start_guard.examine(known.configuration) if one.code == Code.HOME_FOREIGN]
    for one in writes:
        repair = f"give '{name}' disks of its own: its start would damage the other VM"
        yield finding(
            Code.HOME_FOREIGN, f"'{name}' writes to another VM's disk: {one.sentence}", one.where, repair=repair
        )
    if not writes:
        sentence = (
            f"libvirt's '{name}' names the home {home}, which is another VM's: it is a copy that hvmgr does not manage"
        )
        repair = f"virsh metadata '{name}' {metadata.NAMESPACE} --remove --config"
        yield finding(Code.DOMAIN_FOREIGN, sentence, name, repair=repair)


def index(seen: Survey, present: Part, around: Surroundings) -> Iterator[Finding]:
    """Whether the host-wide index knows the home and all that it needs outside."""
    entry = next((one.entry for one in around.notes if one.entry and one.entry.vm_id == seen.home.vm_id), None)
    name = present.configuration.name
    if entry is not None and entry.home == seen.home.path and entry.name == name and entry.uri == present.facts.uri:
        lacking = sorted(set(outside(seen)) - set(entry.outside))
        if not lacking:
            return
        sentence = f"the index does not know that {name} needs {', '.join(lacking)}"
    elif entry is None:
        sentence = f"the index does not know {name}: other VMs do not count what it needs"
    else:
        sentence = f"the index knows {name} as '{entry.name}' in {entry.home} on {entry.uri}"
    yield finding(Code.INDEX_MISSING, sentence, seen.home.path, repair="doctor --repair, or the next command on it")


def outside(seen: Survey) -> tuple[str, ...]:
    """Images outside the home that anything in it needs."""
    return tuple(sorted(path for path in {*seen.headers, *seen.missing} if not seen.home.layout.owns(path)))
