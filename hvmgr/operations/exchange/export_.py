"""A VM, or one snapshot of it, as a folder that is complete in itself. The source is never written.

``export_planning`` reads everything and decides; ``export_steps`` makes it, in a place beside its later name. A running
VM is frozen first (``freezing``): the export then reads images that nothing writes any more.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from hvmgr import errors, units
from hvmgr.host import qemu_errors
from hvmgr.host.domain import State
from hvmgr.model import export_plan
from hvmgr.model.export_options import ExportOptions
from hvmgr.model.plan import Plan
from hvmgr.operations import occasions
from hvmgr.operations.exchange import freezing
from hvmgr.operations.exchange.export_place import Place
from hvmgr.operations.exchange.export_planning import Planner
from hvmgr.operations.exchange.export_steps import Exporter
from hvmgr.operations.session import Session
from hvmgr.storage import copy, durable, vm_home

_SHARED = (export_plan.ExportFile, export_plan.ExportImage, export_plan.ExportMemory)


def export(session: Session, dest: Path, options: ExportOptions) -> Path:
    """The export's folder, complete. An error, or Ctrl-C, leaves what is finished to the same command run again."""
    options.check()
    place = _place(session, dest)
    if not session.dry_run and place.complete():
        session.say(f"completed the interrupted export {place.target}")
        subject = f"export of {session.home.name} to {place.target}"
        done = Plan(session.new_id(), session.home.vm_id, "export", subject)
        occasions.completed(session, done, path=place.target)
        return place.target
    place.require_free()
    planner = Planner(session, place, options)
    one = planner.plan()
    session.require_approval(one)
    require_space(place, one)
    about = planner.about()
    try:
        with (
            occasions.operation(session, one, snapshots=about, path=place.target, is_approved=True),
            place.opened(wait_s=session.wait_s),
        ):
            run(
                session,
                one,
                options,
                lambda held: Exporter(session, place, one, hashed=options.checksums, shared=held).run(),
            )
    except (errors.Cancelled, errors.NoSpace) as error:
        if place.folder.is_dir():
            error.hint = f"run the same command again to go on, or remove '{place.folder}'"
        raise
    return place.target


def run(session: Session, one: Plan, options: ExportOptions, act: Callable[[list[str]], None]) -> None:
    """Carry a plan out while nothing writes to its sources; ``act`` gets the images that are held meanwhile."""
    froze, held = False, list[str]()
    try:
        if freezing.is_needed(session.state(), options):
            freezing.freeze(session, with_memory=options.with_state, quiesce=options.quiesce)
            froze = True
        elif one.hold:
            held = _hold(session, one)
        act(held)
    finally:
        session.release()
        durable.remove_folder(session.layout.export)
    if froze:
        freezing.end(session)


def _hold(session: Session, one: Plan) -> list[str]:
    """Nobody can start the VM while its working images are read; which those are."""
    for path, fmt in one.hold:
        session.hold(path, fmt)
    if session.state() not in (State.OFF, State.SAVED):
        raise errors.Conflict("the VM was started in the meantime", hint="run the command again")
    return [path for path, _ in one.hold]


def _place(session: Session, dest: Path) -> Place:
    folder = Path(os.path.realpath(dest))
    qemu_errors.require_utf8(folder)
    if folder.is_relative_to(session.home.path):
        raise errors.UsageError(
            f"{folder} is in the VM's own home, and an export would copy itself", hint="choose a folder outside it"
        )
    if (home := vm_home.around(folder / session.home.name)) is not None:
        raise errors.UsageError(
            f"{folder} lies in {home}, which is a VM's home or an export", hint="choose a folder outside it"
        )
    above = next(one for one in (folder, *folder.parents) if one.exists())
    if not above.is_dir():
        raise errors.UsageError(f"{above} is no folder", hint="name the folder that is to hold the export")
    if folder == session.home.path.parent:
        raise errors.UsageError(
            f"{folder} holds the home itself, and an export in there would be taken for a VM's home",
            hint="choose another folder",
        )
    return Place(folder / session.home.name)


def require_space(place: Place, one: Plan, *, copied: bool = True) -> None:
    """Everything that is not there yet fits, unless the file system can share the blocks of the source.

    Without ``copied`` plain copies are not made at all.
    """
    folder = next(one for one in (place.folder, *place.folder.parents) if one.is_dir())
    missing = 0
    for step in one.prepare:
        skipped = isinstance(step, export_plan.HashSource) or (not copied and isinstance(step, export_plan.ExportFile))
        size = 0 if skipped else int(getattr(step, "size", 0))
        if size and not (isinstance(step, _SHARED) and copy.can_share(Path(step.source), folder)):
            missing += size
    needed = missing - _finished(place)
    facts = os.statvfs(folder)
    free = facts.f_bavail * facts.f_frsize
    if needed > free:
        raise errors.NoSpace(
            f"the export needs {units.format_size(needed)}, {folder} has {units.format_size(free)} free",
            hint="free space there, or export to another file system",
            needed=needed,
            free=free,
        )


def _finished(place: Place) -> int:
    if not place.home.is_dir():
        return 0
    return sum(path.stat().st_blocks * 512 for path in place.home.rglob("*") if path.is_file())
