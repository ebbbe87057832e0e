"""Cures for homes as a whole: interrupted operations, configurations, places, libvirt's definition, the index.

The home is the truth for the tree; libvirt's configuration stands in for the home's only where that one cannot be read
and nothing that libvirt writes to is needed unchanged.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors
from hvmgr.host import hypervisor, qemu_img
from hvmgr.model import plan, relocation
from hvmgr.model.configuration import Configuration
from hvmgr.model.diagnosis import Code
from hvmgr.model.finding import Finding
from hvmgr.model.layout import Layout
from hvmgr.model.plan import Plan
from hvmgr.operations import attaching, chains, mounting, reconcile
from hvmgr.operations.chains import Deed
from hvmgr.operations.doctor import domain_checks, image_checks, surroundings
from hvmgr.operations.doctor.cure import Case, Cure, keep_copy, set_aside
from hvmgr.operations.doctor.surroundings import Known
from hvmgr.operations.steps import execution
from hvmgr.storage import attachments, durable, images, index, journal, survey, vm_home
from hvmgr.storage.survey import Part, Survey
from hvmgr.storage.vm_home import VmHome

if TYPE_CHECKING:
    from hvmgr.operations.host import Host

# --- what commands left -----------------------------------------------------------------------------------------------


def interrupted(case: Case) -> Iterator[Cure]:
    """What a dead command left open is completed or undone, as the next command would."""
    if _lies_elsewhere(case) or case.folder not in case.around.folders:
        return  # the plan's paths lead to where the home was; or nobody knows who wrote it
    for one in (*case.of(Code.OPERATION_OPEN), *case.of(Code.DAEMON_LEFT)):
        yield Cure(one, f"complete or undo what was interrupted in {case.folder}", partial(_recover, case))
        return
    for one in (*case.of(Code.REMAINS), *case.of(Code.FOLDER_MISSING)):
        yield Cure(one, f"sweep {case.folder} and make the folders that it lacks", partial(_sweep, case))
        return


def _recover(case: Case) -> None:
    entry = journal.read(case.layout.journal)
    vm_id = entry.plan.vm_id if entry is not None else case.layout.vm_id
    with case.host.session(VmHome(Layout(case.folder, vm_id))) as session:
        execution.recover(session)


def _sweep(case: Case) -> None:
    assert case.seen is not None
    with case.seen.home.locked(wait_s=case.host.wait_s):
        if not journal.is_open(case.layout.journal):
            for file in case.layout.trash.iterdir():
                durable.remove(file)  # a finished plan proved that nothing needs it


def _lies_elsewhere(case: Case) -> bool:
    present = None if case.seen is None else case.seen.present
    return present is not None and vm_home.canonical(str(present.facts.home)) != str(case.folder)


def unreadable_journal(case: Case) -> Iterator[Cure]:
    """A journal that is not even JSON is set aside where everything is whole and libvirt and home agree without it."""
    for one in case.of(Code.JOURNAL_DAMAGED):
        if _is_garbage(case.layout.journal) and _is_whole(case):
            yield Cure(one, f"set {one.where} aside", partial(_set_aside, case, Path(one.where), one.sentence))


def _is_garbage(file: Path) -> bool:
    """What a newer hvmgr wrote is none."""
    try:
        return not isinstance(json.loads(file.read_bytes().partition(b"\n")[0]), dict)
    except ValueError:
        return True


def _is_whole(case: Case) -> bool:
    seen, known = case.seen, case.known
    if seen is None or seen.present is None or known is None or case.is_active or case.layout.put_away.exists():
        return False
    if seen.faults or seen.missing or known.text.encode() != seen.present.file.read_bytes():
        return False
    sound = all(
        qemu_img.check(Path(path), header.format).is_sound
        for path, header in seen.headers.items()
        if header.format == images.QCOW2
    )
    return sound and not any(case.of(code) for code in (Code.IMAGE_CHANGED, Code.IMAGE_SWAPPED, Code.CHAIN_CIRCLE))


def _set_aside(case: Case, file: Path, why: str) -> None:
    with case.locked():
        set_aside(case.layout, file, why)


def half_made(case: Case) -> Iterator[Cure]:
    """A folder with nothing in it but a lock goes away."""
    for one in case.of(Code.HOME_HALF_MADE):
        yield Cure(one, f"remove the empty folders of {case.folder}", partial(vm_home.remove_remains, case.folder))


# --- configurations ---------------------------------------------------------------------------------------------------


def ambiguous(case: Case) -> Iterator[Cure]:
    """Of several configurations the one stays whose images and whose own words say that this is its home."""
    for one in case.of(Code.HOME_AMBIGUOUS):
        files = survey.configurations(case.folder)
        right = [file for file in files if _is_at_home(case.folder, file)]
        if len(right) == 1:
            others = [file for file in files if file != right[0]]
            names = ", ".join(map(str, others))
            yield Cure(one, f"set {names} aside: {right[0].name} is the home's own", partial(_keep, case, others))


def _is_at_home(folder: Path, file: Path) -> bool:
    layout = Layout(folder, file.stem)
    try:
        parsed = vm_home.parse_file(file)
        facts = parsed.metadata()
    except errors.HvmgrError:
        # Damaged, and yet perhaps the one that the images belong to: then nothing is certain.
        return layout.images.is_dir()
    if facts is None or parsed.uuid != file.stem:
        return False
    return vm_home.canonical(str(facts.home)) == str(folder) and layout.images.is_dir()


def _keep(case: Case, others: list[Path]) -> None:
    with case.locked():
        for file in others:
            set_aside(case.layout, file, "the home held more than one configuration")


def configuration(case: Case) -> Iterator[Cure]:
    """A configuration that is gone or damaged is what libvirt has, when that is provably this home's."""
    for one in case.of(Code.CONFIGURATION_MISSING):
        known = next((known for known in case.around.domains.values() if known.home == case.folder), None)
        if known is not None and _may_stand_in(case.folder, known):
            yield Cure(one, f"take libvirt's configuration of {known.domain.name}", partial(_take, case, known, None))
    for one in case.of(Code.CONFIGURATION_DAMAGED):
        known = case.known
        if known is not None and known.home == case.folder and _may_stand_in(case.folder, known):
            sentence = f"take libvirt's configuration of {known.domain.name}, and keep a copy of {one.where}"
            yield Cure(one, sentence, partial(_take, case, known, Path(one.where)))


def _may_stand_in(folder: Path, known: Known) -> bool:
    """Whether every image that libvirt would write to is there, and needed unchanged by nobody."""
    seen = survey.take(VmHome(Layout(folder, known.domain.uuid)))
    held = image_checks.frozen_images(seen.tree())
    return all(Path(path).exists() and path not in held for path in vm_home.disks_of(known.configuration).values())


def _take(case: Case, known: Known, damaged: Path | None) -> None:
    layout = Layout(case.folder, known.domain.uuid)
    with case.locked():
        if damaged is not None:
            keep_copy(layout, damaged, "it could not be read; libvirt's own was taken")
        durable.make_folder(layout.configuration.parent)
        durable.write_file(layout.configuration, known.text.encode())


def undo(case: Case) -> Iterator[Cure]:
    """An undo slot that cannot be read is set aside; its images stay as detached disks."""
    for one in case.of(Code.UNDO_DAMAGED):
        yield Cure(one, f"set {one.where} aside", partial(_set_aside, case, Path(one.where), one.sentence))


# --- places -----------------------------------------------------------------------------------------------------------


def resettle(case: Case) -> Iterator[Cure]:
    """A home that was moved, or that came from another libvirt, is at home where it is now."""
    seen = case.seen
    findings = [*case.of(Code.HOME_MOVED), *case.of(Code.OTHER_CONNECTION)]
    if seen is None or seen.present is None or not findings or not _may_settle(case, seen.present):
        return
    old, new = seen.present.facts.home, case.folder
    what = f"rewrite the paths of {seen.name} from {old} to {new}" if case.of(Code.HOME_MOVED) else ""
    if case.of(Code.OTHER_CONNECTION):
        what = f"{what}{' and ' if what else ''}take {seen.name} to the connection {case.around.uri}"
    yield Cure(findings[0], what, partial(_resettle, case, seen, seen.present))


def _may_settle(case: Case, present: Part) -> bool:
    """Whether nobody else claims the VM: no other home, no running QEMU, no other libvirt that would start it."""
    xml_faults = [fault for fault in case.seen.faults if fault.file.suffix == ".xml"] if case.seen is not None else []
    if (
        case.of(Code.ID_TWICE)
        or case.of(Code.OPERATION_OPEN)
        or case.is_active
        or case.around.connection is None
        or xml_faults
    ):
        return False
    uri = present.facts.uri
    if uri == case.around.uri:
        return True
    try:
        return case.named and not hypervisor.has_definition(uri, case.layout.vm_id)
    except errors.HvmgrError:
        return False


def _resettle(case: Case, seen: Survey, present: Part) -> None:
    new = case.folder
    with case.session() as session:
        if session.is_active() or journal.is_open(case.layout.journal):
            raise errors.Conflict(f"{seen.name} is in use meanwhile", hint="run doctor again")
        if (domain := session.find_domain()) is not None and domain.has_managed_save():
            raise errors.Conflict(
                f"{seen.name} has a managed save, which leads to where its home was",
                hint=f"move the home back to {present.facts.home} and start the VM, or give its memory up: "
                f"virsh managedsave-remove '{seen.name}'",
            )
        change = session.new_id()
        text = _settled(present, new, case.around.uri, change=change).to_xml()
        rest = [one for one in (seen.undo, *seen.snapshots) if one is not None]
        execution.run(
            session,
            Plan(
                plan_id=change,
                vm_id=case.layout.vm_id,
                operation="doctor",
                subject=f"settling of {seen.name} in {new}",
                switch=plan.Define(xml=text),
                finish=(
                    *(plan.ReplaceFile(str(one.file), _settled(one, new, case.around.uri).to_xml()) for one in rest),
                    plan.WritePresent(),
                ),
            ),
        )


def _settled(part: Part, home: Path, uri: str, *, change: str | None = None) -> Configuration:
    result = relocation.moved(part.configuration, part.facts.home, home)
    facts = dataclasses.replace(part.facts, home=home, uri=uri)
    result.set_metadata(facts if change is None else dataclasses.replace(facts, change=change))
    return result


# --- libvirt and the index --------------------------------------------------------------------------------------------


def together(case: Case) -> Iterator[Cure]:
    """Home and libvirt are brought together, as the next command would: defined again, or a change taken over."""
    codes = (
        Code.DOMAIN_UNKNOWN,
        Code.IMAGE_FROZEN,
        Code.DISKS_CHANGED,
        Code.DOMAIN_FOREIGN,
        Code.DOMAIN_EDITED,
    )
    sentences = {Code.DOMAIN_UNKNOWN: "define {} in libvirt from its home"}
    for code in codes:
        for one in case.of(code)[:1]:
            assert case.seen is not None
            sentence = sentences.get(code, "bring {} and libvirt together").format(case.seen.name)
            yield Cure(one, sentence, partial(_together, case))
            return


def _together(case: Case) -> None:
    with case.session() as session:
        reconcile.bring_together(session)


def explained(case: Case) -> Iterator[Cure]:
    """What others did below the present (pulled, committed) is taken over where it can be proved; else on the user's word."""
    present = None if case.seen is None else case.seen.present
    findings = [*case.of(Code.IMAGE_SWAPPED), *case.of(Code.IMAGE_CHANGED)]
    if case.seen is None or present is None or not findings or case.around.connection is None:
        return
    with surroundings.looking(case.seen.home, case.around.connection) as session:
        try:
            deeds = {one.deed for one in chains.iter_changes(session, present.configuration)}
        except errors.HvmgrError:
            return  # a chain that is not whole cannot be compared
    if Deed.UNKNOWN not in deeds and deeds:
        yield Cure(findings[0], f"take over what was done to the images of {case.seen.name}", partial(_together, case))
    elif deeds and case.accept_present:
        yield Cure(findings[0], f"take the disks of {case.seen.name} as they are now", partial(_accept, case))


def _accept(case: Case) -> None:
    with case.session() as session:
        reconcile.bring_together(session, needs_present=False)
        reconcile.accept_present(session)


def noted(case: Case) -> Iterator[Cure]:
    """The index knows the home and everything outside it that it needs."""
    for one in case.of(Code.INDEX_MISSING):
        assert case.seen is not None
        yield Cure(one, f"note {case.seen.name} in the index", partial(_note, case, case.seen))


def _note(case: Case, seen: Survey) -> None:
    assert seen.present is not None
    with case.locked():
        old = {entry.vm_id: entry for entry in index.entries()}.get(seen.home.vm_id)
        known = () if old is None or old.home != seen.home.path else old.outside
        outside = tuple(dict.fromkeys((*domain_checks.outside(seen), *known)))
        uri = seen.present.facts.uri
        index.record(index.Entry(seen.home.vm_id, seen.name, seen.home.path, uri, outside))


def index_notes(around: surroundings.Surroundings, found: tuple[Finding, ...]) -> Iterator[Cure]:
    """Entries that are damaged, or whose home is gone while libvirt does not know the VM either, are set aside."""
    notes = {str(note.file): note for note in around.notes}
    for one in found:
        note = notes.get(one.where)
        if note is None:
            continue
        is_forgotten = (
            one.code == Code.INDEX_STALE
            and around.connection is not None
            and note.file.stem not in around.domains
            and note.entry is not None
            and note.entry.uri == around.uri  # another libvirt was not asked
        )
        if one.code == Code.INDEX_DAMAGED or is_forgotten:
            yield Cure(one, f"set {note.file} aside", partial(_forget, note))


def _forget(note: index.Note) -> None:
    index.set_aside(note)


def attachments_left(host: Host, found: tuple[Finding, ...]) -> Iterator[Cure]:
    """What broken off attachments left over is taken down."""
    for one in found:
        if one.code == Code.ATTACHMENT_LEFT:
            yield Cure(one, f"clean up the attachment of {one.where}", partial(_take_down, host, one.where))


def mounts_left(host: Host, found: tuple[Finding, ...]) -> Iterator[Cure]:
    """What broken off mounts left over is cleaned up, unless a user wrote to one: what becomes of that he says himself."""
    worthless = {
        one.mount.directory for one in mounting.left_over() if one.mount and not mounting.is_worth_keeping(one)
    }
    for one in found:
        if one.code == Code.MOUNT_LEFT and one.where in worthless:
            yield Cure(one, f"clean up the mount at {one.where}", partial(_clean_up, host, one.where))


def _clean_up(host: Host, directory: str) -> None:
    with attachments.locked(wait_s=host.wait_s):
        for one in mounting.left_over():
            if one.mount is not None and one.mount.directory == directory:
                mounting.clean_up(one)


def _take_down(host: Host, path: str) -> None:
    with attachments.locked(wait_s=host.wait_s):
        for one in attaching.left_over():
            if one.path == path:
                attaching.take_down(one)
