"""One import from the comparison to the VM: which locks are held, and which plan is run.

Opening the source is repeated under the locks, so that what was compared is what is imported.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors
from hvmgr.model import configuration
from hvmgr.model.import_options import ImportOptions, Mode
from hvmgr.operations import homes, occasions, reconcile
from hvmgr.operations.exchange import compare, import_, intake
from hvmgr.operations.exchange.compare import Comparison
from hvmgr.operations.steps import execution
from hvmgr.operations.vm import VM
from hvmgr.storage import index, source_configurations, source_home, vm_home
from hvmgr.storage.source_home import SourceHome
from hvmgr.storage.vm_home import VmHome

if TYPE_CHECKING:
    from hvmgr.operations.host import Host
    from hvmgr.operations.session import Session


def run(host: Host, source: Path, options: ImportOptions) -> VM:
    """The VM; nothing was changed when it raises."""
    folder, _ = source_configurations.find(source, options.vm)
    _complete_target(host, source, options)
    with host.occasions.gathered(), _source_locked(host, folder, options):
        comparison = compare.examine(host.connection, host.root, source, options)
        return carry_out(host, comparison)


def carry_out(host: Host, comparison: Comparison) -> VM:
    """The import that was compared; the source is locked already."""
    for finding in comparison.findings:
        if finding.severity == "warning" or finding.code in ("default-map", "host-path"):
            host.reporter.notice(f"{finding.code}: {finding.sentence}")
    if (error := comparison.error()) is not None:
        raise error
    if comparison.options.replace:
        from hvmgr.operations.exchange import restoring

        return restoring.run(host, comparison)
    if comparison.options.mode is Mode.REGISTER:
        from hvmgr.operations.exchange import registering

        return registering.run(host, comparison)
    return _make(host, comparison)


def _make(host: Host, comparison: Comparison) -> VM:
    """A new home for a copy or a link."""
    home = VmHome(comparison.layout)
    shared = []
    if comparison.options.mode is Mode.LINK:
        needed = intake.needed_images(comparison.source, comparison.snapshots)
        shared = [Path(image.path) for image in needed]
    with _shared(host, comparison.source, shared), homes.new(host, home) as session:
        taken = import_.take_in(
            session, comparison.source, comparison.options, comparison.identity, comparison.maps, comparison.used
        )
        plan = import_.plan_new(session, taken)
        who = comparison.identity.name
        with occasions.operation(session, plan, name=who, path=comparison.source.origin):
            note_home(session, comparison)
            execution.run(session, plan)
    return VM(host, home)


def note_home(session: Session, comparison: Comparison) -> None:
    """A home that is not below the root is found by the next command even when this one dies at once."""
    layout = session.layout
    for entry in index.entries():
        if entry.home == layout.home:
            index.forget(entry.vm_id)  # of an import that died before it began
    index.record(index.Entry(layout.vm_id, comparison.identity.name, layout.home, session.connection.uri, ()))


@contextlib.contextmanager
def _shared(host: Host, source: SourceHome, paths: list[Path]) -> Iterator[None]:
    """Users of shared images are added under their locks; the source's own home is locked already."""
    if source.trusted:
        with index.locked(paths, wait_s=host.wait_s):
            yield
    else:
        with homes.sharing(host, paths):
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
    if options.mode is Mode.REGISTER and not opened.is_known:
        return  # a journal that came with the folder is its maker's
    if layout.home.is_dir() and layout.journal.exists():
        homes.complete(host, layout.home)


@dataclasses.dataclass(frozen=True, slots=True)
class CloneOptions:
    """How a VM is cloned: from its present or from ``snapshot``; ``linked`` shares the snapshot's images."""

    snapshot: str | None = None
    linked: bool = False
    without_snapshots: bool = False
    without_state: bool = False
    keep_macs: bool = False
    networks: Mapping[str, str] = dataclasses.field(default_factory=dict)
    vm_path: Path | None = None
    owner: str | None = None
    tags: tuple[str, ...] = ()


def clone(vm: VM, name: str, how: CloneOptions) -> VM:
    """Another VM like this one; it goes on from the snapshot's saved state when that has one."""
    if how.linked and how.snapshot is None:
        raise errors.UsageError(
            "a linked clone shares the images of a snapshot",
            hint=f"take one, and name it: hvmgr snapshot create '{vm.name}'; then --snapshot SNAP",
        )
    options = ImportOptions(
        name=name,
        mode=Mode.LINK if how.linked else Mode.COPY,
        keep_macs=how.keep_macs,
        without_state=how.without_state,
        without_snapshots=how.without_snapshots,
        networks=how.networks,
        vm_path=how.vm_path,
        owner=how.owner,
        tags=how.tags,
    )
    snapshot_id = None if how.snapshot is None else vm.snapshot(how.snapshot).id
    host = vm.host
    if host.connection.find_domain_by_name(name) is not None:
        raise errors.Conflict(f"libvirt has a VM '{name}' already", hint="choose another name")
    with host.session(vm.home) as session:
        reconcile.bring_together(session)  # what others changed is cloned too
        if session.doubt is not None and snapshot_id is None:
            raise session.doubt
    with host.occasions.gathered(), vm.home.locked(wait_s=host.wait_s):
        source = source_home.open_source(vm.path, own=True)
        if snapshot_id is not None:
            one = next(each for each in source.snapshots if each.record.id == snapshot_id)
            source = source_home.at_snapshot(source, one)
        else:
            source = _with_managed_save(host, source)
        comparison = compare.examine(host.connection, host.root, source, options)
        return carry_out(host, comparison)


def _with_managed_save(host: Host, source: SourceHome) -> SourceHome:
    """A VM that is saved is cloned with its saved memory."""
    domain = host.connection.find_domain(source.vm_id)
    if domain is None or domain.is_active() or not domain.has_managed_save():
        return source
    saved = configuration.parse(domain.managed_save_xml(), source="the managed save")
    return dataclasses.replace(source, memory=host.connection.managed_save_path(domain.name), saved=saved)
