"""How the steps that bring a VM in from elsewhere are done and undone. Every one can see that it is done already."""

from __future__ import annotations

import contextlib
from pathlib import Path

from hvmgr import errors
from hvmgr.host import qemu_img, saved_state
from hvmgr.host.saved_state import Compression
from hvmgr.model import configuration, plan
from hvmgr.model.progress import Progress
from hvmgr.operations.exchange import gold
from hvmgr.operations.session import Session
from hvmgr.operations.steps import memory_steps
from hvmgr.storage import archives, copy, durable, frozen, images, index, vm_home


def make_roots(_session: Session, step: plan.MakeRoots) -> None:
    """Each folder is there, and the home's name for it leads to it."""
    for name, folder in step.places:
        place = Path(folder)
        with durable.explained(place):
            place.parent.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
        durable.make_folder(place.parent)
        durable.make_folder(place)
        durable.link(Path(name), place)


def unmake_roots(_session: Session, step: plan.MakeRoots) -> None:
    """The names and the empty folders are gone."""
    for name, folder in step.places:
        if Path(name).is_symlink():
            durable.remove(Path(name))
        durable.remove_empty_folder(Path(folder))
        durable.remove_empty_folder(Path(folder).parent)


def take_home(_session: Session, step: plan.TakeHome) -> None:
    """No folder of a home is missing."""
    for folder in step.made:
        durable.make_folder(Path(folder))


def untake_home(_session: Session, step: plan.TakeHome) -> None:
    """The folders that were made are gone."""
    for folder in reversed(step.made):
        durable.remove_empty_folder(Path(folder))


# --- images ---------------------------------------------------------------------------------------------------------


def copy_images(session: Session, step: plan.CopyImages) -> None:
    """Every copy is complete, on disk, and the bytes are those that were recorded."""
    for path in step.hold:
        session.hold(path, images.RAW)  # QEMU's lock; as raw, so that not even a header is written
    jobs = [
        copy.Job(Path(one), Path(target), hashed=bool(sha256), owner=session.owner, plain=step.plain)
        for one, target, sha256 in step.files
    ]
    made = copy.copy_files(
        jobs, on_progress=lambda done, total: session.progress(Progress(done, total, "copy the disks"))
    )
    for source, target, sha256 in step.files:
        if sha256 and made[Path(target)].sha256 != sha256:
            raise errors.Corrupt(
                f"{source} holds other bytes than were recorded", hint="get a whole copy of the file", path=source
            )


def uncopy_images(_session: Session, step: plan.CopyImages) -> None:
    """No copy is there."""
    for _, target, _ in step.files:
        durable.remove(Path(target))


def require_images(_session: Session, step: plan.RequireImages) -> None:
    """No header says anything else than when the plan was made: who owns the source could change it in between."""
    for path, fmt, size, backing in step.images:
        found = images.read(Path(path), fmt)
        if (found.size, found.backing or "") != (size, backing):
            raise errors.Conflict(
                f"what was copied to {path} was changed while it was read", hint="run the command again", path=path
            )


def unpack_files(session: Session, step: plan.UnpackFiles) -> None:
    """Every file is complete, on disk, and the bytes are those that were recorded."""
    archives.unpack(
        Path(step.archive),
        (step.size, step.mtime_ns),
        {name: (Path(target), sha256) for name, target, sha256 in step.files},
        owner=session.owner,
        report=lambda done, total: session.progress(Progress(done, total, "unpack the archive")),
    )


def pack_files_away(_session: Session, step: plan.UnpackFiles) -> None:
    """None of the files is there."""
    for _, target, _ in step.files:
        durable.remove(durable.part_of(Path(target)))
        durable.remove(Path(target))


def name_parent(session: Session, step: plan.NameParent) -> None:
    """The header names the parent."""
    _name(session, step, step.parent, step.parent_format)


def unname_parent(session: Session, step: plan.NameParent) -> None:
    """The header names what it named before, where the image is still there."""
    if Path(step.path).exists():
        _name(session, step, step.before, step.before_format or step.parent_format)


def _name(session: Session, step: plan.NameParent, parent: str, fmt: str) -> None:
    path = Path(step.path)
    if images.read(path, images.QCOW2).backing != parent:
        durable.set_mode(path, frozen.WORKING_MODE)
        with session.lent(step.path):
            qemu_img.name_parent(path, parent, fmt)
        durable.sync_file(path)
    durable.set_mode(path, step.mode)
    frozen.refresh(session.layout, path)  # whoever planned this has seen that the image was what it should be


# --- saved states, texts, modes -------------------------------------------------------------------------------------


def copy_memory(session: Session, step: plan.CopyMemory) -> None:
    """The copy is complete and on disk, with its own configuration in it; one for libvirt itself is not compressed."""
    source, target = Path(step.source), Path(step.target)
    raw = memory_steps.unpacked_file(session.layout)
    part = target.with_name(f"{durable.TEMPORARY}{target.name}")
    durable.remove(part)
    try:
        if _is_for_libvirt(session, target):
            source = memory_steps.unpacked(source, raw)
        saved_state.rewritten(source, part, step.xml)
    finally:
        durable.remove(raw)
    durable.set_owner(part, session.owner)
    durable.sync_file(part)
    durable.rename(part, target)


def _is_for_libvirt(session: Session, target: Path) -> bool:
    """Whether libvirt will restore the file: not every libvirt knows zstd."""
    return target.parent == session.connection.managed_save_path("any").parent or target == session.layout.taken_in


def uncopy_memory(session: Session, step: plan.CopyMemory) -> None:
    """The copy is not there."""
    target = Path(step.target)
    part = target.with_name(f"{durable.TEMPORARY}{target.name}")
    for path in (memory_steps.unpacked_file(session.layout), part, target):
        durable.remove(path)


def put_managed_save(session: Session, step: plan.PutManagedSave) -> None:
    """libvirt finds the saved memory at the next start."""
    kept, target = Path(step.kept), session.connection.managed_save_path(session.domain().name)
    copy_memory(session, plan.CopyMemory(source=step.source, target=step.kept, xml=step.xml))
    durable.link_or_copy(kept, target, owner=session.owner)
    if not durable.is_same_or_copy(kept, target):
        raise errors.Conflict(f"{target} was made by somebody else meanwhile", hint="run the command again")


def unput_managed_save(session: Session, step: plan.PutManagedSave) -> None:
    """libvirt does not find it; what others have put in its place stays."""
    domain = session.domain()
    target = session.connection.managed_save_path(domain.name)
    with contextlib.suppress(errors.Corrupt):
        if target.exists() and saved_state.read(target).xml == step.xml:
            domain.remove_managed_save()
    uncopy_memory(session, plan.CopyMemory(source=step.source, target=step.kept, xml=step.xml))


def has_gone_on(session: Session, step: plan.PutManagedSave) -> bool:
    """Whether somebody started the VM from the memory that was put there, before libvirt had its configuration."""
    domain, kept = session.find_domain(), Path(step.kept)
    written = set(vm_home.disks_of(configuration.parse(step.xml, source="the plan")).values())
    if domain is None:
        return False
    if domain.is_active():
        return bool(written & {vm_home.canonical(str(path)) for path in domain.writable_files()})
    if not kept.exists() or domain.has_managed_save():
        return False
    return any(Path(path).stat().st_mtime_ns > kept.stat().st_mtime_ns for path in written)


def change_memory(session: Session, step: plan.ChangeMemory) -> None:
    """The saved state holds the new configuration; for libvirt's sake it is not compressed."""
    path = Path(step.path)
    if _is_for_libvirt(session, path) and saved_state.read(path).compression is Compression.ZSTD:
        copy_memory(session, plan.CopyMemory(source=step.path, target=step.path, xml=step.after))
    else:
        _put_xml(session, path, step.after)


def unchange_memory(session: Session, step: plan.ChangeMemory) -> None:
    """The saved state holds the old configuration; one that has its old name still was not reached."""
    if Path(step.path).exists():
        _put_xml(session, Path(step.path), step.before)


def _put_xml(session: Session, path: Path, xml: str) -> None:
    with contextlib.suppress(errors.Corrupt):  # torn by a death
        if saved_state.read(path).xml == xml:
            return
    try:
        saved_state.replace_xml(path, xml)
    except errors.Conflict:  # no room: a larger one takes its place
        copy_memory(session, plan.CopyMemory(source=str(path), target=str(path), xml=xml))
    durable.sync_file(path)


def change_file(session: Session, step: plan.ChangeFile) -> None:
    """The file has the new content."""
    durable.write_file(Path(step.path), step.after.encode())
    session.forget_uses()


def unchange_file(session: Session, step: plan.ChangeFile) -> None:
    """The file has its old content; one that has its old name still was not reached."""
    if Path(step.path).exists():
        durable.write_file(Path(step.path), step.before.encode())
    session.forget_uses()


def rename_file(session: Session, step: plan.RenameFile) -> None:
    """It has its new name."""
    _rename(Path(step.source), Path(step.target))
    session.forget_uses()


def unrename_file(session: Session, step: plan.RenameFile) -> None:
    """It has its old name again."""
    _rename(Path(step.target), Path(step.source))
    session.forget_uses()


def _rename(source: Path, target: Path) -> None:
    """Whoever takes the lock of a home makes the folders that it lacks: an empty one is in nobody's way."""
    if not source.exists():
        return
    if target.is_dir():
        durable.remove_empty_folder(target)
    if target.exists() and source.is_dir():
        durable.remove_empty_folder(source)  # the renaming that is undone had not been reached
    else:
        durable.rename(source, target)


def set_modes(session: Session, step: plan.SetModes) -> None:
    """What lies in the folder is as in a home."""
    for name, mode, _, uid, _ in step.modes:
        path = Path(name)
        if path.is_dir():
            durable.set_folder_mode(path, mode)
        elif path.exists():
            if uid >= 0:
                durable.set_owner(path, session.owner)
            durable.set_mode(path, mode)


def unset_modes(_session: Session, step: plan.SetModes) -> None:
    """Modes and owners are as they were."""
    for name, _, mode, uid, gid in reversed(step.modes):
        path = Path(name)
        if path.is_dir():
            durable.set_folder_mode(path, mode)
        elif path.exists():
            durable.set_owner(path, (uid, gid) if uid >= 0 else None)
            durable.set_mode(path, mode)


# --- shared images --------------------------------------------------------------------------------------------------


def note_use(session: Session, step: plan.NoteUse) -> None:
    """Whoever counts the users of these images finds the VM, from before it is there."""
    layout = session.layout
    index.record(index.Entry(layout.vm_id, step.name, layout.home, session.connection.uri, step.outside))
    if step.beside is None:
        return
    text = gold.text_of(layout.vm_id, step.name, layout.home)
    try:
        durable.make_folder(Path(step.beside), mode=0o755)
        durable.write_file(_beside(session, step), text.encode(), mode=0o644)
    except errors.HvmgrError as error:  # a share that is read-only after all; this host's index has it
        session.say(f"the use could not be noted beside the source: {error}")


def unnote_use(session: Session, step: plan.NoteUse) -> None:
    """Nothing is beside the source; the index forgets the VM with its home, which it leads to until then."""
    if step.beside is not None and Path(step.beside).is_dir():
        durable.remove(_beside(session, step))
        durable.remove_empty_folder(Path(step.beside))


def _beside(session: Session, step: plan.NoteUse) -> Path:
    assert step.beside is not None
    return Path(step.beside) / f"{session.layout.vm_id}.json"


def record_gold(session: Session, step: plan.RecordGold) -> None:
    """A later change of these shared images will be seen."""
    for path, sha256 in step.images:
        frozen.record(session.layout, Path(path))
        if sha256:
            frozen.record_hash(session.layout, Path(path), sha256)
