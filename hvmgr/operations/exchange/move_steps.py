"""How the steps that give a VM another home, or its disks independence, are done and undone."""

from __future__ import annotations

from pathlib import Path

from hvmgr import errors
from hvmgr.model import plan
from hvmgr.model.progress import Progress
from hvmgr.operations.session import Session
from hvmgr.storage import durable, frozen, images, index, vm_home
from hvmgr.storage.vm_home import VmHome


def make_folders(_session: Session, step: plan.MakeFolders) -> None:
    """All of them are there."""
    for folder in step.folders:
        durable.make_folder(Path(folder))


def unmake_folders(_session: Session, step: plan.MakeFolders) -> None:
    """Those that are empty but for what a death leaves are gone."""
    for folder in reversed(step.folders):
        durable.sweep(Path(folder))
        durable.remove_empty_folder(Path(folder))


def write_file(_session: Session, step: plan.WriteFile) -> None:
    """The file is there."""
    durable.write_file(Path(step.path), step.text.encode())


def unwrite_file(_session: Session, step: plan.WriteFile) -> None:
    """The file is not there."""
    durable.remove(Path(step.path))


def change_managed_save(session: Session, step: plan.ChangeManagedSave) -> None:
    """A start goes on in the new place."""
    _put_managed_save(session, step.after)


def unchange_managed_save(session: Session, step: plan.ChangeManagedSave) -> None:
    """A start goes on in the old place."""
    _put_managed_save(session, step.before)


def _put_managed_save(session: Session, xml: str) -> None:
    domain = session.domain()
    if domain.has_managed_save():
        domain.define_managed_save_xml(xml)


def settle_home(session: Session, step: plan.SettleHome) -> None:
    """The new home says what libvirt says, and the index names it."""
    layout = vm_home.layout_of(Path(step.home), session.home.vm_id)
    durable.write_file(layout.configuration, session.domain().xml(live=False).encode())
    present, tree = VmHome(layout).present(), VmHome(layout).present_tree()
    known = {entry.vm_id: entry for entry in index.entries()}.get(layout.vm_id)
    outside = [path for path in tree.images if not layout.owns(path)]
    outside += [path for path in (known.outside if known is not None else ()) if not session.layout.owns(path)]
    uri = session.connection.uri
    index.record(index.Entry(layout.vm_id, present.name, layout.home, uri, tuple(dict.fromkeys(outside))))
    for path in step.frozen:
        frozen.record(layout, Path(path))


def pull_disk(session: Session, step: plan.PullDisk) -> None:
    """The working image needs nothing below it any more."""
    domain, path = session.domain(), Path(step.path)
    if images.read(path, images.QCOW2).backing is None:
        return

    def report(done: int, total: int) -> None:
        session.progress(Progress(done, total, f"pull the data of disk {step.slot}"))

    domain.pull(step.slot, progress=report)
    if images.read(path, images.QCOW2).backing is not None:
        raise errors.HostFailed(
            f"libvirt did not pull the data of disk {step.slot} completely", hint="see its log, then run it again"
        )
