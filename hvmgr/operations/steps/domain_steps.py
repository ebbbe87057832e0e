"""How the steps that concern libvirt's domain are done, undone, and, for switches, looked at afterwards."""

from __future__ import annotations

import hashlib
from pathlib import Path

from hvmgr import errors
from hvmgr.host import libvirt_snapshots, saved_state
from hvmgr.host.domain import Domain, State
from hvmgr.model import configuration, plan
from hvmgr.model.metadata import NAMESPACE
from hvmgr.operations.session import Session
from hvmgr.operations.steps import memory_steps
from hvmgr.storage import durable, images, index, journal, start_guard, vm_home


def define(session: Session, step: plan.Define | plan.ReleaseDomain) -> None:
    """libvirt's inactive configuration is the new one; after the switch what others changed meanwhile stays in it."""
    domain = session.find_domain() if session.finishing else None
    session.connection.define(step.xml if domain is None else _with_edits(session, domain.xml(live=False), step.xml))


def _with_edits(session: Session, now: str, wanted: str) -> str:
    """libvirt's configuration of this moment with the disks and the facts of the plan."""
    merged = configuration.parse(now, source="libvirt")
    target = configuration.parse(wanted, source="the journal")
    facts = target.metadata()
    if facts is None or configuration.same(now, wanted):
        return wanted
    merged.set_metadata(facts)
    merged.strip_backing_chains()
    for disk in target.disks():
        mine = merged.find_disk(disk.slot)
        if mine is not None and mine.takes_part and disk.source is not None and mine.source != disk.source:
            merged.set_disk_source(disk.slot, Path(disk.source), disk.format or images.RAW)
    if target.nvram is not None and merged.nvram is not None and merged.nvram != target.nvram:
        merged.set_nvram(target.nvram)
    if not configuration.same(merged.to_xml(), wanted):
        session.say("kept a change that was made to the VM outside hvmgr in the meantime")
    return merged.to_xml()


def require_unedited(session: Session) -> None:
    """Nobody changed libvirt's configuration since the plan was made: defining the new one would lose that."""
    domain = session.find_domain()
    if domain is None or session.known_xml is None:
        return
    if not configuration.same(domain.xml(live=False), session.known_xml):
        raise errors.Conflict(
            f"the configuration of {domain.name} was changed outside hvmgr in the meantime",
            hint="run the command again",
        )


def is_defined(session: Session, step: plan.Define) -> bool:
    """Whether libvirt has this plan's configuration."""
    domain = session.find_domain()
    if domain is None:
        return False
    have = configuration.parse(domain.xml(live=False), source="libvirt").metadata()
    want = configuration.parse(step.xml, source="the journal").metadata()
    return have is not None and want is not None and have.change == want.change


def write_present(session: Session, _step: plan.WritePresent) -> None:
    """The home says what libvirt says, and the index what the home says."""
    xml = session.domain().xml(live=False)
    durable.write_file(session.layout.configuration, xml.encode())
    session.known_xml = xml
    session.forget_uses()
    note_in_index(session)


def note_in_index(session: Session) -> None:
    """The host-wide index knows this VM and the images outside its home that it needs."""
    present = session.home.present()
    tree = session.home.present_tree()
    outside = tuple(path for path in tree.images if not session.layout.owns(path))
    known = {entry.vm_id: entry for entry in index.entries()}.get(session.home.vm_id)
    if known is not None:  # a snapshot may still need what the present does not
        outside = tuple(dict.fromkeys((*outside, *known.outside)))
    index.record(index.Entry(session.home.vm_id, present.name, session.home.path, session.connection.uri, outside))


def switch_disks(session: Session, step: plan.SwitchDisks) -> None:
    """The running VM writes to its new images."""
    domain = session.domain()
    children = {slot: Path(path) for slot, path in step.children}
    live = configuration.parse(domain.xml(live=True), source=f"libvirt's live XML of {domain.name}")
    others = [disk.slot for disk in live.disks() if disk.slot not in children]
    _require_parents(domain, live, children)
    if step.background:
        memory_steps.switch(session, domain, step, children, others)
    else:
        _switch_and_save(session, domain, step, children, others)
    if not is_switched(session, step):
        raise errors.OutcomeUnknown("libvirt says that the disks were switched, QEMU does not write to the new ones")
    name_true_parents(session, domain, children)


def _switch_and_save(
    session: Session, domain: Domain, step: plan.SwitchDisks, children: dict[str, Path], others: list[str]
) -> None:
    """With memory the guest stands still until it is written."""
    memory_steps.bring_up(session, step.copies)
    memory = None if step.memory is None else Path(step.memory)

    def report(done: int, total: int) -> None:
        from hvmgr.model.progress import Progress

        session.progress(Progress(done, total, "save the memory"))

    domain.switch_disks(children, others=others, memory=memory, progress=report)


def _require_parents(domain: Domain, live: configuration.Configuration, children: dict[str, Path]) -> None:
    """The VM still writes to the images on which the new ones were put."""
    running = vm_home.disks_of(live)
    for slot, child in children.items():
        if running.get(slot) != str(images.read(child, images.QCOW2).parent):
            raise errors.Conflict(
                f"disk {slot} of {domain.name} was switched to {running.get(slot)} in the meantime",
                hint="run the command again",
            )


def name_true_parents(session: Session, domain: Domain, children: dict[str, Path]) -> None:
    """The headers name what the images of a running VM really stand on.

    Somebody may have switched the disks just before we did, onto an image that our new ones know nothing of.
    """
    live = configuration.parse(domain.xml(live=True), source=f"libvirt's live XML of {domain.name}")
    running = vm_home.disks_of(live)
    for slot, child in children.items():
        below = live.backing_file(slot) if running.get(slot) == str(child) else None
        if below is None or not Path(below).exists():
            continue
        header = images.read(child, images.QCOW2)
        if header.parent is not None and images.identity(header.parent) != images.identity(Path(below)):
            domain.name_parent(child, Path(below))
            session.say(f"disk {slot} was switched to {below} by somebody else at the same time; it goes on above that")


def is_switched(session: Session, step: plan.SwitchDisks) -> bool:
    """Whether the VM went on in its new images. QEMU is asked, because libvirt's view may be late.

    When the VM is gone, data in a new image proves it; without any, going back loses nothing. A VM without disks has
    nothing but its memory to show.
    """
    if not step.children:
        return step.memory is None or saved_state.has_begun(Path(step.memory))
    children = {vm_home.canonical(path) for _, path in step.children}
    domain = session.find_domain()
    if domain is not None and domain.is_active():
        return bool(children & {vm_home.canonical(str(path)) for path in domain.writable_files()})
    if domain is not None:
        inactive = configuration.parse(domain.xml(live=False), source="libvirt")
        if children & set(vm_home.disks_of(inactive).values()):
            return True
    return any(holds_data(path) for path in children)


def has_gone_on(session: Session, images_made: set[str]) -> bool:
    """Whether a VM goes on, or went on, in differencing images whose configuration libvirt was not given yet.

    Its memory, restored by a command that then died or from a managed save, started it there.
    """
    domain = session.find_domain()
    if domain is not None and domain.is_active():
        writing = {vm_home.canonical(str(path)) for path in domain.writable_files()}
        return domain.state() is State.RUNNING and bool(images_made & writing)
    return any(holds_data(path) for path in images_made)


def holds_data(path: str) -> bool:
    """Whether something was written to a differencing image since it was made."""
    from hvmgr.host import qemu_img

    return _is_complete(Path(path)) and any(
        extent.depth == 0 and extent.present for extent in qemu_img.map(Path(path), images.QCOW2)
    )


def _is_complete(child: Path) -> bool:
    """Whether QEMU came to the end of making a differencing image: the parent's name is what it writes last."""
    if not child.exists() or images.probe(child) != images.QCOW2:
        return False
    return images.read(child, images.QCOW2).backing is not None


def suspend(session: Session, _step: plan.Suspend) -> None:
    """The guest stands still."""
    session.domain().suspend()


def resume(session: Session, _step: plan.Suspend | plan.Resume) -> None:
    """The guest runs."""
    domain = session.domain()
    if domain.state() is State.PAUSED:
        domain.resume()


def save_present(session: Session, step: plan.SavePresent) -> None:
    """The VM is off, its memory in the file."""
    from hvmgr.model.progress import Progress

    session.domain().save(
        Path(step.memory), progress=lambda done, total: session.progress(Progress(done, total, "save the present"))
    )
    durable.sync_file(Path(step.memory))


def unsave_present(session: Session, step: plan.SavePresent) -> None:
    """The VM runs on from where it was saved."""
    memory, domain = Path(step.memory), session.domain()
    if domain.is_active():  # the save itself did not come through
        if not step.paused and domain.state() is State.PAUSED:
            domain.resume()
    elif saved_state.is_complete(memory) and not _is_outdated(session, memory):
        _start(session, memory, saved_state.read(memory).xml, running=not step.paused)
    durable.remove(memory)


def take_managed_save(session: Session, step: plan.TakeManagedSave) -> None:
    """libvirt would start the VM cold; its saved memory is in the file."""
    domain = session.domain()
    durable.copy_file(managed_save_file(session), Path(step.memory), owner=session.owner)
    domain.remove_managed_save()


def untake_managed_save(session: Session, step: plan.TakeManagedSave) -> None:
    """libvirt would start the VM from its saved memory again."""
    memory, domain = Path(step.memory), session.domain()
    gone = memory.exists() and not domain.is_active() and not domain.has_managed_save()
    if gone and not _is_outdated(session, memory):
        # libvirt looks for the file at each start; only its listing learns of it after its next restart.
        durable.copy_file(memory, session.connection.managed_save_path(domain.name))
    durable.remove(memory)


def _is_outdated(session: Session, memory: Path) -> bool:
    """Whether somebody started the VM and stopped it again since its memory was saved.

    Only after a command's death: a living one holds QEMU's locks on the images until the memory is back. QEMU writes
    nothing to an image once its memory is complete.
    """
    if not session.recovering:
        return False
    saved = memory.stat().st_mtime_ns
    disks = vm_home.disks_of(session.home.present()).values()
    newer = any(Path(path).stat().st_mtime_ns > saved for path in disks)
    if newer:
        session.say("the VM has run since its memory was put away: its disks are newer and stay, the memory goes")
    return newer


def managed_save_file(session: Session) -> Path:
    """libvirt's file with the managed save; Unsupported when this libvirt keeps it somewhere else."""
    path = session.connection.managed_save_path(session.domain().name)
    if not path.exists():
        raise errors.Unsupported(
            f"the VM's saved state is not at {path}", hint="start the VM, then run the command again"
        )
    return path


def point_managed_save(session: Session, step: plan.PointManagedSave) -> None:
    """The saved state goes on in the new images."""
    _point(session, {slot: new for slot, _, new in step.disks})


def unpoint_managed_save(session: Session, step: plan.PointManagedSave) -> None:
    """The saved state goes on in the old images."""
    _point(session, {slot: old for slot, old, _ in step.disks})


def _point(session: Session, disks: dict[str, str]) -> None:
    domain = session.domain()
    if not domain.has_managed_save():
        return
    saved = configuration.parse(domain.managed_save_xml(), source="the managed save")
    saved.strip_backing_chains()
    for slot, path in disks.items():
        fmt = images.probe(Path(path)) if not Path(path).is_relative_to(session.layout.images) else images.QCOW2
        saved.set_disk_source(slot, Path(path), fmt)
    domain.define_managed_save_xml(saved.to_xml())


def discard_present(session: Session, _step: plan.DiscardPresent) -> None:
    """The VM is off, without any saved memory."""
    domain = session.domain()
    domain.destroy()
    domain.remove_managed_save()


def start_from(session: Session, step: plan.StartFrom) -> None:
    """The VM goes on from the saved memory."""
    try:
        _restore(session, step)
    except errors.OutcomeUnknown:
        raise
    except errors.HvmgrError as error:
        error.hint = error.hint or "apply it with --without-state: its disks are whole"
        raise


def _restore(session: Session, step: plan.StartFrom) -> None:
    unpacked = memory_steps.unpacked_file(session.layout)
    try:
        _restore_from(session, step, memory_steps.unpacked(Path(step.memory), unpacked))
    finally:
        durable.remove(unpacked)


def _restore_from(session: Session, step: plan.StartFrom, memory: Path) -> None:
    saved = saved_state.read(memory)
    wanted = configuration.parse(step.xml, source="the plan")
    if configuration.parse(saved.xml, source=str(memory)).name != wanted.name:
        # The VM was renamed since: libvirt refuses another name in the call but takes it from the file.
        renamed = session.layout.private / "renamed.save"
        saved_state.rewritten(memory, renamed, step.xml)
        try:
            _start(session, renamed, step.xml, running=not step.paused)
        finally:
            durable.remove(renamed)
        return
    _start(session, memory, step.xml, running=not step.paused)


def _start(session: Session, memory: Path, xml: str, *, running: bool) -> None:
    """The start guard lets this one through, although the journal is open: the journal names it."""
    written = start_guard.written_by(configuration.parse(xml, source=str(memory)))
    with journal.start_named(session.layout.journal, written):
        session.connection.restore(memory, xml, running=running)


def unstart(session: Session, step: plan.StartFrom) -> None:
    """The VM that was started from the saved memory is gone."""
    domain = session.domain()
    if not domain.is_active():
        return
    wanted = set(vm_home.disks_of(configuration.parse(step.xml, source="the plan")).values())
    live = configuration.parse(domain.xml(live=True), source="libvirt")
    if wanted & set(vm_home.disks_of(live).values()):
        domain.destroy()


def rename(session: Session, step: plan.RenameDomain) -> None:
    """libvirt has the new name."""
    domain = session.domain()
    if domain.name != step.name:
        domain.rename(step.name)


def is_renamed(session: Session, step: plan.RenameDomain) -> bool:
    """Whether libvirt has the new name."""
    domain = session.find_domain()
    return domain is not None and domain.name == step.name


def state_for_plan(domain: Domain) -> plan.RequireUnchanged:
    """The step that finds the domain as it is now, or ends the plan."""
    digest = hashlib.sha256(domain.xml(live=False).encode()).hexdigest()
    return plan.RequireUnchanged(configuration=digest, snapshots=tuple(libvirt_snapshots.names(domain)))


def require_unchanged(session: Session, step: plan.RequireUnchanged) -> None:
    """The domain is what the plan was made from."""
    domain = session.domain()
    if state_for_plan(domain) != step:
        raise errors.Conflict(f"{domain.name} was changed by somebody else meanwhile", hint="run the command again")


def note_libvirt_snapshot(session: Session, step: plan.NoteLibvirtSnapshot) -> None:
    """libvirt knows the snapshot."""
    libvirt_snapshots.redefine(session.domain(), step.xml, current=step.is_current)


def is_released(session: Session, _step: plan.ReleaseDomain) -> bool:
    """Whether libvirt's configuration of the VM holds nothing of hvmgr's any more."""
    domain = session.find_domain()
    return domain is not None and configuration.parse(domain.xml(live=False), source="libvirt").metadata() is None


def forget_metadata(session: Session, _step: plan.ForgetMetadata) -> None:
    """What runs, and what libvirt saved of it, holds nothing of hvmgr's either."""
    domain = session.find_domain()
    if domain is None:
        return  # somebody has undefined it since
    if domain.is_active():
        domain.forget_live_metadata(NAMESPACE)
    elif domain.has_managed_save():
        saved = configuration.parse(domain.managed_save_xml(), source="the managed save")
        if saved.metadata() is not None:
            domain.define_managed_save_xml(saved.without_metadata().to_xml())


def forget_libvirt_snapshot(session: Session, step: plan.ForgetLibvirtSnapshot | plan.NoteLibvirtSnapshot) -> None:
    """libvirt does not know its snapshot."""
    libvirt_snapshots.forget(session.domain(), step.name)


def undefine(session: Session, _step: plan.UndefineDomain) -> None:
    """libvirt does not know the VM; Conflict when it runs, because libvirt would let it run on."""
    domain = session.find_domain()
    if domain is None:
        return
    if domain.is_active():
        raise errors.Conflict(f"{domain.name} was started in the meantime", hint="stop it, then run the command again")
    domain.undefine(keep_nvram=True, keep_tpm=False)


def is_undefined(session: Session, _step: plan.UndefineDomain) -> bool:
    """Whether libvirt does not know the VM."""
    return session.find_domain() is None
