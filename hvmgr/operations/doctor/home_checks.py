"""What doctor says of one home from its files alone: no libvirt, no lock, nothing changed.

A file that a check needs and cannot read ends that check, never the examination.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from hvmgr import errors, units
from hvmgr.host import saved_state
from hvmgr.model.diagnosis import Code, finding
from hvmgr.model.finding import Finding
from hvmgr.model.layout import PRIVATE, Layout
from hvmgr.model.metadata import SavedState
from hvmgr.model.plan import Plan
from hvmgr.storage import access, durable, journal, locks, start_guard, survey, vm_home
from hvmgr.storage.access import Owner
from hvmgr.storage.survey import Survey

QUARANTINE = "quarantine"
_BY_ITSELF = "doctor --repair, or the next command that changes the VM"


def whole(folder: Path) -> Iterator[Finding]:
    """Whether a folder is one home: exactly one configuration, and a way in."""
    try:
        found = survey.configurations(folder)
        with durable.explained(folder):
            entries = list(folder.iterdir())
    except errors.HvmgrError as error:
        yield finding(Code.HOME_UNREADABLE, str(error), folder, repair=error.hint)
        return
    if not access.is_writable(folder):
        sentence = f"{folder} cannot be written by this user, or lies on a read-only file system"
        yield finding(Code.HOME_UNWRITABLE, sentence, folder, repair="mount it writable, or run as its owner or root")
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        sentence = f"{folder} holds {len(found)} configurations ({names}); a home has one"
        yield finding(Code.HOME_AMBIGUOUS, sentence, folder, repair="move the one away that is not this VM's")
    if found:
        return
    if vm_home.is_abandoned(folder):
        sentence = f"{folder} is what a command left that died before it made a VM there"
        yield finding(Code.HOME_HALF_MADE, sentence, folder, repair=_BY_ITSELF)
    elif not journal.is_open(Layout(folder, "").journal) and entries:
        sentence = f"{folder} holds parts of a VM, but no configuration"
        repair = "put 'Virtual Machines/<id>.xml' back from a backup; libvirt's own is taken if it knows the VM"
        yield finding(Code.CONFIGURATION_MISSING, sentence, folder, repair=repair)


def operation(layout: Layout) -> Iterator[Finding]:
    """Whether a command works on the home, or died while it did."""
    private = layout.private
    if (process := locks.holder(layout.lock)) is not None:
        sentence = f"another command works on the VM in {layout.home} (process {process}): look again when it is done"
        yield finding(Code.OPERATION_RUNNING, sentence, layout.home)
        return
    try:
        entry = journal.read(layout.journal)
        if entry is not None:
            sentence = f"the {entry.plan.subject} was interrupted and is still open"
            yield finding(Code.OPERATION_OPEN, sentence, layout.journal, repair=_BY_ITSELF)
    except errors.HvmgrError as error:
        repair = "doctor --repair sets it aside if all images are whole and nothing is half-way; else ask for help"
        yield finding(Code.JOURNAL_DAMAGED, str(error), layout.journal, repair=repair)
    if (private / "daemon").exists():
        sentence = f"a command that worked on {layout.home} died, and may have left its storage daemon"
        yield finding(Code.DAEMON_LEFT, sentence, private / "daemon", repair=_BY_ITSELF)


def named_by(layout: Layout) -> frozenset[str]:
    """Every path that an open operation names: what the files say of these means nothing now."""
    try:
        entry = journal.read(layout.journal)
    except errors.HvmgrError:
        return frozenset()
    return frozenset() if entry is None else frozenset(_paths(entry.plan))


def _paths(plan: Plan) -> Iterator[str]:
    todo: list[object] = [plan.to_json()]
    while todo:
        one = todo.pop()
        if isinstance(one, str) and one.startswith("/"):
            yield one
        elif isinstance(one, dict):
            todo += one.values()
        elif isinstance(one, list):
            todo += one


def files(seen: Survey) -> Iterator[Finding]:
    """Configurations, folders and left-overs of a home."""
    layout = seen.home.layout
    yield from damaged(seen)
    for folder in layout.folders() if seen.present is not None else ():
        if not folder.is_dir():
            yield finding(Code.FOLDER_MISSING, f"the folder {folder} is missing", folder, repair=_BY_ITSELF)
    yield from _written(seen)
    yield from _parents(seen)
    yield from _memory(seen)
    yield from _remains(layout)
    yield from _orphans(seen)
    if start_guard.is_allowed(layout):
        sentence = f"the next start of {seen.name} passes the hook, whatever is wrong ('hvmgr hook allow')"
        yield finding(Code.START_ALLOWED, sentence, layout.allowed_start, repair="the start uses it up")
    quarantine = layout.private / QUARANTINE
    for file in sorted(quarantine.iterdir()) if quarantine.is_dir() else ():
        if file.suffix != ".txt":
            sentence = f"{file} was set aside by an earlier repair; {file.name}.txt says why"
            yield finding(Code.QUARANTINED, sentence, file, repair="remove it when nobody misses it")


def damaged(seen: Survey) -> Iterator[Finding]:
    """Configurations that cannot be read."""
    for fault in seen.faults:
        if fault.file.suffix == ".xml":
            yield _damaged(seen.home.layout, fault)


def _damaged(layout: Layout, fault: survey.Fault) -> Finding:
    file, words = fault.file, str(fault.error)
    if isinstance(fault.error, errors.Unsupported):
        return finding(Code.HOME_NEWER, words, file, repair=fault.error.hint or "use the newer hvmgr")
    if isinstance(fault.error, errors.HostFailed):
        return finding(Code.HOME_UNREADABLE, words, file, repair=fault.error.hint)
    if file == layout.configuration:
        repair = "doctor --repair takes libvirt's own, if it knows the VM; else put the file back from a backup"
        return finding(Code.CONFIGURATION_DAMAGED, words, file, repair=repair)
    if file == layout.undo:
        sentence = f"{words}; what the undo slot holds cannot come back"
        return finding(Code.UNDO_DAMAGED, sentence, file, repair="doctor --repair sets it aside; its images stay")
    repair = "doctor --repair makes it again from the snapshot's saved state, if it has one; else put the file back"
    return finding(Code.SNAPSHOT_DAMAGED, words, file, repair=repair)


def _written(seen: Survey) -> Iterator[Finding]:
    for part in seen.snapshots:
        record = part.facts.snapshot
        if record is not None and record.damaged:
            sentence = (
                f"{part.who} is damaged for good: others wrote to an image of its disk {', '.join(record.damaged)}"
            )
            repair = f"hvmgr snapshot delete '{seen.name}' '{record.name}'; what does not need it is whole"
            yield finding(Code.SNAPSHOT_WRITTEN, sentence, part.file, repair=repair)


def _parents(seen: Survey) -> Iterator[Finding]:
    known = {one.file.stem for one in seen.snapshots}
    known |= {fault.file.stem for fault in seen.faults}
    for part in seen.parts():
        record = part.facts.snapshot
        parent = part.facts.parent if record is None else record.parent
        if parent is not None and parent not in known:
            sentence = f"the snapshot {parent} above {part.who} is gone; {part.who} is whole and counts as a root"
            yield finding(Code.SNAPSHOT_MISSING, sentence, part.file, repair="put its file back, or leave it so")


def _memory(seen: Survey) -> Iterator[Finding]:
    for part in seen.snapshots:
        record = part.facts.snapshot
        if record is None or record.state is SavedState.NONE:
            continue
        memory = seen.home.layout.memory(record.id)
        try:
            whole = saved_state.is_complete(memory)
        except errors.HvmgrError:
            whole = False
        if not whole:
            sentence = f"the saved memory of {part.who} is missing or not complete: {memory}"
            repair = f"apply it with --without-state: its disks are whole; or hvmgr snapshot delete … '{record.name}'"
            yield finding(Code.MEMORY_MISSING, sentence, memory, repair=repair)


def _remains(layout: Layout) -> Iterator[Finding]:
    for folder in layout.folders()[1:]:
        parts = list(folder.glob(f"{durable.TEMPORARY}*")) if folder.is_dir() else []
        if folder == layout.trash and folder.is_dir() and not journal.is_open(layout.journal):
            parts = list(folder.iterdir())
        if parts:
            sentence = f"a command that died left {len(parts)} files in {folder} that nothing needs"
            yield finding(Code.REMAINS, sentence, folder, repair=_BY_ITSELF)


# --- files that nobody knows ------------------------------------------------------------------------------------------


def _orphans(seen: Survey) -> Iterator[Finding]:
    """Whatever the home's configurations, chains and format do not explain; images are the images' own matter."""
    home, expected = seen.home.path, _expected(seen)
    for folder, names, found in os.walk(home):
        here = Path(folder)
        names[:] = sorted(name for name in names if here / name not in expected and not _is_private(here, name, home))
        for name in sorted(found):
            file = here / name
            if file in expected or name.startswith(durable.TEMPORARY):
                continue
            size = units.format_size(file.lstat().st_blocks * 512)
            sentence = f"{file} ({size}) belongs to nothing that hvmgr knows; it is kept{_stands_on(file)}"
            repair = "move it away if nobody needs it"
            yield finding(Code.ORPHAN, sentence, file, repair=repair)


def _expected(seen: Survey) -> set[Path]:
    """Files that are accounted for, and folders whose content is not looked at."""
    layout = seen.home.layout
    known = {layout.configuration, layout.undo, *(Path(path) for path in seen.headers)}
    known |= {fault.file for fault in seen.faults}
    for part in seen.parts():
        known.add(part.file)
        known |= {Path(disk.source) for disk in part.configuration.disks() if disk.source is not None}
        if part.configuration.nvram is not None:
            known.add(part.configuration.nvram)
        if part.facts.snapshot is not None:
            known |= {layout.memory(part.file.stem), layout.snapshot_nvram(part.file.stem)}
            known.add(layout.snapshot_tpm(part.file.stem))
    known |= {layout.snapshot_folder(fault.file.stem) for fault in seen.faults if fault.file.suffix == ".xml"}
    known |= set(layout.vm_folder.glob("tpm_*"))
    return known


def _is_private(here: Path, name: str, home: Path) -> bool:
    return here == home and name == PRIVATE


def _stands_on(file: Path) -> str:
    """That an image nobody knows needs one that somebody may merge or remove."""
    from hvmgr.storage import images

    try:
        parent = images.read(file, images.QCOW2).parent if images.probe(file) == images.QCOW2 else None
    except errors.HvmgrError:
        return ""
    return "" if parent is None else f", and it stands on {parent}"


# --- modes and owners -------------------------------------------------------------------------------------------------


def modes(seen: Survey, owner: Owner) -> Iterator[Finding]:
    """The way to the home, and what may be read by whom; modes of images are the images' own matter."""
    home = seen.home.path
    if (closed := access.closed_folder(home, owner)) is not None and owner is not None:
        name = access.name_of(owner[0])
        sentence = f"QEMU's user ({name}) may not pass through {closed}: no VM below it can start"
        yield finding(Code.WAY_CLOSED, sentence, closed, repair=f"chmod o+x '{closed}'")
    for path, mode in wrong_modes(seen):
        sentence = f"{path} has the mode {path.stat().st_mode & 0o7777:04o}; it should be {mode:04o}"
        yield finding(Code.MODE_WRONG, sentence, path, repair=f"chmod {mode:o} '{path}'")


def wrong_modes(seen: Survey) -> Iterator[tuple[Path, int]]:
    """Folders that are closed to QEMU's user or open to all, and files that everybody may read; with the right mode."""
    for folder, names, found in os.walk(seen.home.path):
        here = Path(folder)
        names[:] = [name for name in names if not name.startswith("tpm")]  # swtpm's own
        if (mode := access.right_folder_mode(here)) is not None:
            yield here, mode
        for name in found:
            file = here / name
            is_note = here == seen.home.layout.private and not name.endswith(".save")  # pids and plans: no secrets
            if is_note or file.is_symlink() or not file.is_file() or str(file) in seen.headers:
                continue
            if (mode := access.right_file_mode(file)) is not None:
                yield file, mode
