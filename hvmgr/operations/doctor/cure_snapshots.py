"""A snapshot whose file cannot be read, made again from its saved state.

A save file holds the domain XML of the instant in which it was taken, with the disks that the snapshot froze and hvmgr's
facts of that present. Name, notes and parent are taken from the damaged file, where its hvmgr element is whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from hvmgr import errors
from hvmgr.host import saved_state
from hvmgr.model import configuration, relocation
from hvmgr.model.configuration import Configuration
from hvmgr.model.diagnosis import Code
from hvmgr.model.metadata import Metadata, SavedState, SnapshotRecord
from hvmgr.operations.doctor.cure import Case, Cure, keep_copy
from hvmgr.storage import durable, vm_home
from hvmgr.storage.survey import Survey


def rebuild(case: Case) -> Iterator[Cure]:
    """Snapshots with a damaged file and a complete saved state, whose frozen images are all there."""
    if case.seen is None:
        return
    for one in case.of(Code.SNAPSHOT_DAMAGED):
        file = Path(one.where)
        made = _from_memory(case.seen, file)
        if made is not None:
            sentence = f"make {file} again from the snapshot's saved state, and keep a copy of it as it is"
            yield Cure(one, sentence, partial(_write, case, file, made))


def _from_memory(seen: Survey, file: Path) -> Configuration | None:
    memory = seen.home.layout.memory(file.stem)
    try:
        saved = saved_state.read(memory)
        made = configuration.parse(saved.xml, source=str(memory))
        facts = made.metadata()
    except errors.HvmgrError:
        return None
    if not saved.complete or facts is None or made.uuid != seen.home.vm_id:
        return None
    made = relocation.moved(made, facts.home, seen.home.path)  # the home may have been moved since
    disks = vm_home.disks_of(made)
    if any(path not in seen.headers for path in disks.values()):
        return None
    made.strip_backing_chains()
    made.set_name(seen.name)
    nvram = seen.home.layout.snapshot_nvram(file.stem)
    if made.nvram is not None:
        made.set_nvram(nvram)
    record = _record(seen, file, facts, was_running=saved.was_running)
    made.set_metadata(dataclasses.replace(facts, home=seen.home.path, snapshot=record))
    return made


def _record(seen: Survey, file: Path, facts: Metadata, *, was_running: bool) -> SnapshotRecord:
    """What the snapshot was called, as far as its file still says it."""
    old = configuration.salvage_metadata(file.read_bytes())
    if old is not None and old.snapshot is not None and old.snapshot.id == file.stem:
        return old.snapshot
    taken = datetime.fromtimestamp(seen.home.layout.memory(file.stem).stat().st_mtime, UTC)
    return SnapshotRecord(
        id=file.stem,
        name=f"recovered {taken.astimezone():%Y-%m-%d %H.%M.%S}",
        created=taken,
        state=SavedState.RUNNING if was_running else SavedState.PAUSED,
        parent=facts.parent,
        notes="made again by hvmgr doctor from the saved state; the file with its name was damaged",
    )


def _write(case: Case, file: Path, made: Configuration) -> None:
    with case.locked():
        keep_copy(case.layout, file, "it could not be read; it was made again from the saved state")
        durable.write_file(file, made.to_xml().encode())
