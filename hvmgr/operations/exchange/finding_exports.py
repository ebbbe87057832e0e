"""What stands already where an export would go: whether it is one of this VM, and whether it still is what the VM is."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from hvmgr import errors
from hvmgr.host.domain import State
from hvmgr.model import manifest, names
from hvmgr.model.export_options import ExportOptions
from hvmgr.model.manifest import Extent, Manifest
from hvmgr.operations.exchange.export_place import Place
from hvmgr.operations.session import Session
from hvmgr.storage import durable

_MANIFEST_MAX = 64 << 20


@dataclass(frozen=True, slots=True)
class Found:
    """An export of the VM, made with these options. ``is_current``: provably nothing of the VM has changed since."""

    folder: Path
    is_current: bool


def find(session: Session, dest: Path, options: ExportOptions) -> Found | None:
    """None when nothing is there, when it is not complete, and when it is something else: ``export`` says what."""
    options.check()
    place = Place(Path(os.path.realpath(dest)) / session.home.name)
    if place.folder.exists() or not place.target.is_dir():
        return None
    told = _read(place.target)
    if told is None or not _is_wanted(session, told, options):
        return None
    return Found(place.target, is_current=options.snapshot is not None or _is_current(session, told, options))


def _read(folder: Path) -> Manifest | None:
    file = folder / manifest.FILE
    try:
        if file.is_symlink() or file.stat().st_size > _MANIFEST_MAX:
            return None
        with durable.explained(file):
            return manifest.parse(file.read_text("utf-8"), source=str(file))
    except (errors.HvmgrError, OSError, UnicodeDecodeError):
        return None


def _is_wanted(session: Session, told: Manifest, options: ExportOptions) -> bool:
    """Whether it is an export of this VM, or of the one snapshot, that the same options made."""
    made = told.options
    if (made.snapshots, made.disks, made.state) != (
        options.extent,
        not options.config_only,
        not options.without_state,
    ) or set(made.excluded) != set(options.exclude):
        return False
    if options.format is not None and made.format != options.format:
        return False
    if options.snapshot is not None:
        return made.snapshot in _ids(session, (options.snapshot,))
    if options.extent is Extent.KEPT and {one.id for one in told.snapshots} != _ids(session, options.keep):
        return False
    return told.vm_id == session.home.vm_id


def _ids(session: Session, references: tuple[str, ...]) -> set[str]:
    """The snapshots that are named; a name that is unknown or ambiguous finds what no export has, and is refused later."""
    records = [one.record for one in session.home.snapshots()]
    try:
        return {names.find_snapshot(one, records, where=f"in {session.home.name}").id for one in references}
    except errors.HvmgrError:
        return set()


def _is_current(session: Session, told: Manifest, options: ExportOptions) -> bool:
    """The VM is off, has the snapshots that it had, and no file of its present was written since the export began."""
    tree, present = session.home.tree(), session.home.present()
    if session.state() is not State.OFF or session.doubt is not None or told.state != "none":
        return False
    if options.extent is Extent.ALL and {one.id for one in told.snapshots} != set(tree.nodes):
        return False
    if {one.slot: one.path for one in told.disks} != {
        slot: path for slot, path in tree.present.disks.items() if slot not in options.exclude
    }:
        return False
    files = [session.layout.configuration, *map(Path, tree.present.disks.values())]
    files += [file for one in session.home.snapshots() if (file := session.layout.snapshot(one.record.id)).exists()]
    if present.nvram is not None and present.nvram.exists():
        files.append(present.nvram)
    return all(one.stat().st_mtime < told.created.timestamp() for one in files)
