"""One import from the comparison to the VM: which locks are held, and which plan is run.

Opening the source is repeated under the locks, so that what was compared is what is imported.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors
from hvmgr.model.import_options import ImportOptions, Mode
from hvmgr.operations import compare, execution, import_, intake
from hvmgr.operations.compare import Comparison
from hvmgr.operations.vm import VM
from hvmgr.storage import index, source_home, vm_home
from hvmgr.storage.source_home import SourceHome
from hvmgr.storage.vm_home import VmHome

if TYPE_CHECKING:
    from hvmgr.model.plan import Plan
    from hvmgr.operations.host import Host
    from hvmgr.operations.session import Session


def run(host: Host, source: Path, options: ImportOptions) -> VM:
    """The VM; nothing was changed when it raises."""
    folder, _ = source_home.find_configuration(source, options.vm)
    _complete_target(host, source, options)
    with _source_locked(host, folder, options):
        comparison = compare.examine(host.connection, host.root, source, options)
        return carry_out(host, comparison)


def carry_out(host: Host, comparison: Comparison) -> VM:
    """The import that was compared; the source is locked already."""
    for finding in comparison.findings:
        if finding.severity == "warning":
            host.reporter.notice(f"{finding.code}: {finding.sentence}")
    if (error := comparison.error()) is not None:
        raise error
    if comparison.options.replace:
        from hvmgr.operations import restoring

        return restoring.run(host, comparison)
    if comparison.options.mode is Mode.REGISTER:
        from hvmgr.operations import registering

        return registering.run(host, comparison)
    return _make(host, comparison)


def _make(host: Host, comparison: Comparison) -> VM:
    """A new home for a copy or a link."""
    home = VmHome(comparison.layout)
    shared = []
    if comparison.options.mode is Mode.LINK:
        needed = intake.needed_images(comparison.source, comparison.snapshots)
        shared = [Path(image.path) for image in needed]
    with _shared(host, comparison.source, shared), host._new_home(home) as session:  # noqa: SLF001 - the host as it makes any home
        taken = import_.take_in(
            session, comparison.source, comparison.options, comparison.identity, comparison.maps, comparison.used
        )
        plan = import_.plan_new(session, taken)
        session.require_approval(plan)
        _note_home(session, comparison)
        _run(session, plan)
    return VM(host, home)


def _run(session: Session, plan: Plan) -> None:
    execution.run(session, plan)


def _note_home(session: Session, comparison: Comparison) -> None:
    """A home that is not below the root is found by the next command even when this one dies at once."""
    layout = session.layout
    index.record(index.Entry(layout.vm_id, comparison.identity.name, layout.home, session.connection.uri, ()))


@contextlib.contextmanager
def _shared(host: Host, source: SourceHome, paths: list[Path]) -> Iterator[None]:
    """Users of shared images are added under their locks; the source's own home is locked already."""
    if source.trusted:
        with index.locked(paths, wait_s=host.wait_s):
            yield
    else:
        with host._shared(paths):  # noqa: SLF001 - as above
            yield


@contextlib.contextmanager
def _source_locked(host: Host, folder: Path, options: ImportOptions) -> Iterator[None]:
    """A home of this host stands still while it is read; what a dead command left in it is set right first."""
    known = any(one.home == folder for one in index.entries())
    if not known or options.mode is Mode.REGISTER:
        yield
        return
    home = vm_home.open_home(folder)
    VM(host, home).now()  # sets right what a dead command left
    if options.replace:
        raise errors.UsageError(f"{folder} is the home of a VM, not an export of it")
    with home.locked(wait_s=host.wait_s):
        yield


def _complete_target(host: Host, source: Path, options: ImportOptions) -> None:
    """What a dead import left at the same place is gone before anybody compares."""
    opened, _, _ = compare.read(source, options)
    layout = import_.target_layout(host.root, opened, options, opened.vm_id)
    if layout.home.is_dir() and layout.journal.exists():
        host._complete(layout.home)  # noqa: SLF001 - as above
