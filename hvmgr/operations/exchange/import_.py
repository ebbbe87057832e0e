"""Imports as plans: a copy of a source, a linked VM on it, or the source's folder itself as the home.

``compare`` has looked before; what is checked here again is what can change in between.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from hvmgr import errors
from hvmgr.host import qemu_errors
from hvmgr.host.domain import State
from hvmgr.host.hypervisor import Connection
from hvmgr.model import configuration, identity, plan, specification
from hvmgr.model.identity import Identity
from hvmgr.model.import_options import ImportOptions, Mode
from hvmgr.model.layout import Layout
from hvmgr.model.maps import Maps, Used
from hvmgr.model.plan import Plan, Step
from hvmgr.operations.exchange import gold, intake
from hvmgr.operations.exchange.intake import Intake
from hvmgr.operations.session import Session
from hvmgr.storage import images, vm_home
from hvmgr.storage.source_home import SourceHome


def choose_identity(connection: Connection, source: SourceHome, options: ImportOptions, vm_id: str) -> Identity:
    """Who the VM will be; ``vm_id`` is used where a new one is wanted."""
    if not options.makes_new_id:
        return identity.kept(source.present, name=options.name, genid=Session.new_id())
    return identity.renewed(
        source.present,
        source.configurations(),
        name=options.name,
        vm_id=vm_id,
        new_id=Session.new_id,
        new_tail=lambda: secrets.token_bytes(3),
        taken=macs_of_host(connection),
        keep_macs=options.keep_macs,
    )


def macs_of_host(connection: Connection) -> dict[str, str]:
    """The addresses that the domains of this host have, each with its domain's name."""
    found: dict[str, str] = {}
    for domain in connection.domains():
        parsed = configuration.parse(domain.xml(live=False), source=f"libvirt's XML of {domain.name}")
        found |= {nic.mac: domain.name for nic in parsed.nics() if nic.mac}
    return found


def target_layout(root: Path, source: SourceHome, options: ImportOptions, vm_id: str) -> Layout:
    """Where the VM will lie: below the root or ``--vm-path``, with folders elsewhere as the other two roots say.

    UsageError for a source whose VM has a name that no folder there can have, or that leads out of it.
    """
    if options.mode is Mode.REGISTER:
        return vm_home.layout_of(source.folder, vm_id)
    name = options.name or source.present.name
    if not options.replace:
        try:
            specification.require_name(name)
        except errors.UsageError as error:
            error.hint = "give it another one: --name NEW"
            raise
    home = Path(os.path.realpath((options.vm_path or root) / name))
    snapshots_at = options.snapshot_path and Path(os.path.realpath(options.snapshot_path)) / name / "Snapshots"
    bases_at = options.disk_path and Path(os.path.realpath(options.disk_path)) / name / "Virtual Hard Disks"
    for place in (home, snapshots_at, bases_at):
        if place:
            qemu_errors.require_utf8(place)
    return Layout(home=home, vm_id=vm_id, snapshots_at=snapshots_at or None, bases_at=bases_at or None)


def take_in(
    session: Session, source: SourceHome, options: ImportOptions, who: Identity, maps: Maps, used: Used
) -> Intake:
    """The source as the VM that it will be, with a place for every image."""
    snapshots = intake.kept_snapshots(source, options)
    targets = {one.old: one.new for one in maps.disk_targets}
    converted = intake.to_convert(source, snapshots, options, left_out=options.mode is Mode.LINK)
    places = intake.place_images(session.layout, source, snapshots, targets, session.new_id, converted=converted)
    if options.mode is not Mode.COPY:
        places |= {one.path: one.path for one in intake.needed_images(source, snapshots, left_out=False)}
    return Intake(
        source=source,
        options=options,
        origin=source.as_origin(options.mode),
        maps=maps,
        used=used,
        identity=who,
        layout=session.layout,
        uri=session.connection.uri,
        now=session.now(),
        new_id=session.new_id,
        snapshots=snapshots,
        places=places,
        converted=converted,
        emulators=session.connection.capabilities().emulators,
        present_memory=None if options.replace else _place_of_memory(session, source, who, options),
    )


def _place_of_memory(session: Session, source: SourceHome, who: Identity, options: ImportOptions) -> Path | None:
    """Where libvirt looks at the next start for the saved memory of the present."""
    if source.memory is None or source.saved is None or options.without_state:
        return None
    target = session.connection.managed_save_path(who.name)
    if target.exists():
        raise errors.Conflict(f"{target} exists already", hint="remove it: it belongs to no VM", path=str(target))
    return target


# --- copy and link --------------------------------------------------------------------------------------------------


def plan_new(session: Session, taken: Intake) -> Plan:
    """A VM in a home of its own, off or saved: its images are copied, or stand on those of the source."""
    layout, source, change = session.layout, taken.source, session.new_id()
    linked = taken.options.mode is Mode.LINK
    disks, children = _working_images(session, taken) if linked else (taken.placed(source.disks), [])
    prepare: list[Step] = []
    if layout.links():
        prepare.append(plan.MakeRoots(places=tuple((str(name), str(place)) for name, place in layout.links())))
    prepare.append(plan.MakeHome(home=str(layout.home), vm_id=layout.vm_id))
    prepare.append(_note_use(session, taken, linked=linked))
    prepare += children
    prepare += taken.steps_for_images(hold=_to_hold(session, source), only=taken.left_out() if linked else None)
    prepare += taken.steps_for_snapshots()
    nvram = layout.nvram(session.new_id()) if source.present.nvram is not None else None
    prepare += _firmware(session, taken, nvram)
    prepare += _managed_save(taken, disks, nvram)
    frozen = () if linked else taken.frozen()
    shared = intake.needed_images(source, taken.snapshots, left_out=False) if linked else []
    gold = tuple((one.path, _digest(source, one.path)) for one in shared)
    finish: list[Step] = [plan.WritePresent()]
    finish += [plan.RecordFrozen(paths=frozen)] if frozen else []
    finish += [plan.RecordGold(images=gold)] if gold else []
    finish += taken.steps_after()
    return Plan(
        plan_id=change,
        vm_id=layout.vm_id,
        operation="import",
        subject=f"import of {taken.identity.name} from {source.origin}",
        prepare=tuple(prepare),
        switch=plan.Define(xml=taken.present(change=change, nvram=nvram, disks=disks).to_xml()),
        finish=tuple(finish),
    )


def _working_images(session: Session, taken: Intake) -> tuple[dict[str, tuple[str, str]], list[Step]]:
    """A differencing image on each image of the source's present."""
    disks: dict[str, tuple[str, str]] = {}
    steps: list[Step] = []
    for slot, path in taken.source.disks.items():
        below = taken.source.images[path]
        child = str(session.layout.image(slot, session.new_id()))
        steps.append(plan.CreateImage(path=child, size=below.size, parent=path, parent_format=below.format))
        disks[slot] = (child, images.QCOW2)
    return disks, steps


def _digest(source: SourceHome, path: str) -> str:
    listed = source.expected.get(path)
    return (listed.sha256 if listed is not None else None) or ""


def _note_use(session: Session, taken: Intake, *, linked: bool) -> plan.NoteUse:
    outside = tuple(place for one in taken.needed() if not session.layout.owns(place := taken.places[one.path]))
    folder = taken.source.folder
    beside = None
    if linked and taken.source.is_export and os.access(folder.parent, os.W_OK):
        notes = gold.place_of(folder)
        beside = None if notes.is_symlink() else str(notes)  # root writes by no link that others have put there
    return plan.NoteUse(name=taken.identity.name, outside=outside, beside=beside)


def _to_hold(session: Session, source: SourceHome) -> tuple[str, ...]:
    """The working images of a VM that is defined here: nobody may start it while they are copied."""
    domain = session.connection.find_domain(source.vm_id)
    if not source.trusted or domain is None:
        return ()
    parsed = configuration.parse(domain.xml(live=False), source="libvirt")
    present = {vm_home.canonical(disk.source) for disk in parsed.disks() if disk.source is not None}
    return tuple(path for path in (*source.disks.values(), *source.left_out.values()) if path in present)


def _firmware(session: Session, taken: Intake, nvram: Path | None) -> list[Step]:
    source, steps = taken.source, list[Step]()
    if source.nvram is not None and nvram is not None:
        steps.append(taken.step_for_nvram(source.nvram, nvram))
    if (tpm := tpm_of(session.connection, source)) is not None:
        folder = session.connection.tpm_folder(session.layout.vm_id)
        steps.append(plan.CopyFolder(source=str(tpm), target=str(folder)))
    return steps


def tpm_of(connection: Connection, source: SourceHome) -> Path | None:
    """The TPM state of the present: in the source, or where libvirt keeps it for a VM of this host."""
    if not source.present.has_tpm:
        return None
    if source.tpm is not None:
        return source.tpm
    folder = connection.tpm_folder(source.vm_id)
    return folder if source.trusted and source.is_present and folder.is_dir() else None


def _managed_save(taken: Intake, disks: dict[str, tuple[str, str]], nvram: Path | None) -> list[Step]:
    """A present with saved memory goes on from it: libvirt looks for the file at the next start."""
    source, target = taken.source, taken.present_memory
    if source.memory is None or source.saved is None or target is None:
        return []
    xml = taken.saved(source.saved, source.present, disks, nvram)
    return [taken.step_for_memory(source.memory, target, source.saved, xml)]


# --- in place of a VM -----------------------------------------------------------------------------------------------


def written_by(connection: Connection, paths: Iterable[str]) -> dict[str, str]:
    """Of these images the ones that a running VM writes, each with its name."""
    mine = {images.identity(Path(path)): path for path in paths if Path(path).exists()}
    found: dict[str, str] = {}
    for domain in connection.domains():
        if domain.state() not in (State.OFF, State.SAVED):
            for file in domain.writable_files():
                if file.exists() and (path := mine.get(images.identity(file))) is not None:
                    found[path] = domain.name
    return found
