"""How the memory of a running VM is saved in the background, step by step.

| cut off                         | what is true                                   | what follows                                 |
|---------------------------------|------------------------------------------------|----------------------------------------------|
| before the disks are switched   | the guest may stand still, QEMU may know a file| that is taken back; no snapshot              |
| between switch and stream       | the guest stands still; the file holds a head  | it goes on; the snapshot has its disks alone |
| while the stream runs           | the guest goes on                              | the next command waits for the end           |
| QEMU ends during it             | the disks are whole                            | the snapshot has its disks alone             |
| at the end, before it is marked | QEMU says so, and the stream's end is there    | it is marked: the snapshot has its memory    |
"""

from __future__ import annotations

import filecmp
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from hvmgr import errors, units
from hvmgr.host import background_snapshot, saved_state, userfault
from hvmgr.host.background_snapshot import Phase, Stream
from hvmgr.host.domain import Domain, State
from hvmgr.host.saved_state import Compression
from hvmgr.model import configuration, memory_plan, plan
from hvmgr.model.layout import Layout
from hvmgr.model.progress import Progress
from hvmgr.operations import stuck_memory
from hvmgr.operations.session import Session
from hvmgr.storage import allocation, durable, images

_POLL_S = 0.05
_WRITE_BACK = 64 * units.MIB  # so much more of the stream is sent to disk each time
_WRITE_ROUNDS = 3
_SHORT_S = 0.02  # what a round may take that leaves little behind
_ENDS_S = 5.0
_SAVING = "save the memory"
STANDS_STILL = "the guest stands still while its memory is saved: "


def say_why_paused(session: Session, obstacle: userfault.Obstacle) -> None:
    """The one line for a snapshot that has to do without the background."""
    session.say(f"{STANDS_STILL}{obstacle.reason}; what it needs: {obstacle.remedy}")


# --- before the switch ------------------------------------------------------------------------------------------------


def reserve(_session: Session, step: memory_plan.ReserveMemory) -> None:
    """The space is ours."""
    allocation.reserve_file(Path(step.path), step.size)


def unreserve(session: Session, step: memory_plan.ReserveMemory) -> None:
    """The file is gone, QEMU knows nothing of it, and a guest that a dead command stopped for it runs on."""
    memory, domain = Path(step.path), session.find_domain()
    if session.recovering and domain is not None and domain.is_active():
        background_snapshot.dismiss(domain)
        if _may_be_stopped(memory) and domain.state() is State.PAUSED:
            domain.resume()
    durable.remove(memory)


def _may_be_stopped(memory: Path) -> bool:
    """Just before the guest is stopped, the file gets its head, or makes place for libvirt's."""
    return not memory.exists() or memory.stat().st_size > 0


# --- the switch -------------------------------------------------------------------------------------------------------


def switch(
    session: Session, domain: Domain, step: plan.SwitchDisks, children: Mapping[str, Path], others: Sequence[str]
) -> None:
    """The disks are switched, and the memory of that instant is on its way; the guest goes on.

    Where the kernel or a security module keeps QEMU from it after all, libvirt saves the memory at this instant while
    the guest stands still.
    """
    assert step.memory is not None
    memory = Path(step.memory)
    with durable.explained(memory), memory.open("r+b", buffering=0) as file:
        _write_back(children)
        head = _head(domain)
        try:
            background_snapshot.arrange(domain, file.fileno())
        except errors.HostFailed as error:
            _stand_still(session, domain, step, children, others, error)
            return
        try:
            file.write(head)
            _stop_guest(domain)
            bring_up(session, step.copies)
            domain.switch_disks(children, others=others)
            background_snapshot.start(domain)
        except BaseException:
            _let_go(domain)
            raise


def _head(domain: Domain) -> bytes:
    """All that stands before the stream, as libvirt would write it; chains in it would hide the disks at a restore."""
    saved = configuration.parse(domain.migratable_xml(), source=f"libvirt's migratable XML of {domain.name}")
    saved.strip_backing_chains()
    return saved_state.head(saved.to_xml(), complete=False, was_running=True, cookie=domain.save_cookie())


def _write_back(children: Mapping[str, Path]) -> None:
    """What the guest wrote to its disks lately goes to disk now: QEMU waits for all of it while the guest stands still.

    What it writes meanwhile goes in another round, which is shorter.
    """
    parents = [images.read(child, images.QCOW2).parent for child in children.values()]
    for _ in range(_WRITE_ROUNDS):
        start = time.monotonic()
        for parent in parents:
            if parent is not None:
                durable.sync_file(parent)
        if time.monotonic() - start < _SHORT_S:
            return


def _stop_guest(domain: Domain) -> None:
    if domain.state() is not State.RUNNING:
        raise errors.Conflict(f"{domain.name} was paused in the meantime", hint="run the command again")
    domain.suspend()


def bring_up(session: Session, copies: Sequence[tuple[str, str]]) -> None:
    """NVRAM and TPM state that changed since they were copied, which is rare, are copied again; the guest stands still."""
    for source, target in ((Path(source), Path(target)) for source, target in copies):
        with durable.explained(source):
            is_same = _is_same_folder(source, target) if source.is_dir() else filecmp.cmp(source, target, shallow=False)
        if is_same:
            continue
        if source.is_dir():
            durable.copy_folder(source, target)
        else:
            durable.copy_file(source, target, owner=session.owner)


def _is_same_folder(one: Path, other: Path) -> bool:
    """Whether all files in the folder of a TPM's state, some KiB, are the same; not when one goes meanwhile."""
    names = _files(one)
    try:
        return names == _files(other) and all(filecmp.cmp(one / name, other / name, shallow=False) for name in names)
    except FileNotFoundError:
        return False


def _files(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def _let_go(domain: Domain) -> None:
    """After an error: as far as QEMU can be asked, it has no file of ours, and the guest runs."""
    try:
        if background_snapshot.look(domain).phase is Phase.ACTIVE:
            return  # it goes on by itself, and must not be disturbed
        background_snapshot.dismiss(domain)
        if domain.state() is State.PAUSED:
            domain.resume()
    except errors.HvmgrError:
        return  # the next command does it


def _stand_still(
    session: Session,
    domain: Domain,
    step: plan.SwitchDisks,
    children: Mapping[str, Path],
    others: Sequence[str],
    error: errors.HostFailed,
) -> None:
    obstacle = userfault.explain(str(error.facts.get("words", error)))
    if not step.fallback:
        raise errors.Unsupported(
            f"the memory cannot be saved in the background: {obstacle.reason}", hint=obstacle.remedy
        )
    say_why_paused(session, obstacle)
    assert step.memory is not None
    memory = Path(step.memory)
    durable.remove(memory)  # libvirt makes its own
    _stop_guest(domain)
    try:
        bring_up(session, step.copies)
        domain.switch_disks(
            children,
            others=others,
            memory=memory,
            progress=lambda done, total: session.progress(Progress(done, total, _SAVING)),
        )
    finally:
        if domain.state() is State.PAUSED:
            domain.resume()


# --- afterwards -------------------------------------------------------------------------------------------------------


def await_memory(session: Session, step: memory_plan.AwaitMemory) -> None:
    """The save file is complete, or whoever writes the snapshot sees that it is not; QEMU is as it was before."""
    memory, domain = Path(step.path), session.find_domain()
    if domain is None or not domain.is_active():
        return
    if not saved_state.is_complete(memory):
        try:
            _complete(session, domain, memory)
        except (errors.HostFailed, errors.Conflict):
            if not _ends(domain):
                raise
            session.say(f"{domain.name} ended while its memory was being saved")
            return
    if session.recovering or not saved_state.has_begun(memory):  # without a stream the guest may still be stopped
        background_snapshot.dismiss(domain)
        if domain.state() is State.PAUSED:
            domain.resume()


def _complete(session: Session, domain: Domain, memory: Path) -> None:
    stream = _followed(session, domain, memory)
    if stream.phase is not Phase.ACTIVE and not session.recovering:
        background_snapshot.dismiss(domain)
    if not saved_state.has_begun(memory):
        return  # its death came before the stream: what QEMU says is about an older one
    if stream.phase is Phase.COMPLETED and (not session.recovering or saved_state.holds_whole_stream(memory)):
        allocation.settle_file(memory)
        saved_state.mark_complete(memory)
        durable.sync_file(memory)
    elif stream.phase is Phase.FAILED:
        stuck_memory.note(session)
        why = f" ({stream.words})" if stream.words else ""
        session.say(
            f"QEMU failed to save the memory of {domain.name} in the background{why}; it runs on, but its memory cannot be"
            " saved again until the VM is restarted; snapshots with --type disk-only work as before"
        )


def _ends(domain: Domain) -> bool:
    """Whether its QEMU is gone; libvirt may hear of that later than of its silence."""
    deadline = time.monotonic() + _ENDS_S
    while domain.is_active():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def _followed(session: Session, domain: Domain, memory: Path) -> Stream:
    """The stream when it has ended: nothing stops it before. Meanwhile it goes to disk, so that little is left to wait for."""
    told, sent = False, 0
    while (stream := background_snapshot.look(domain)).phase is Phase.ACTIVE:
        session.progress(Progress(stream.done, stream.total, _SAVING))
        if stream.done - sent > _WRITE_BACK:
            allocation.start_writing(memory)
            sent = stream.done
        if session.interrupts.wanted and not told:
            session.say(
                "QEMU must not be stopped in the middle of it: the memory is saved, and the snapshot then removed"
            )
            told = True
        time.sleep(_POLL_S)  # each question takes processor time and libvirt's lock from the guest
    return stream


def compress(session: Session, step: memory_plan.CompressMemory) -> None:
    """The stream is compressed, if it is complete and was not; where that fails it stays as it is."""
    memory = Path(step.path)
    if session.recovering:
        durable.sweep(memory.parent)  # what a command had written of it that died before it was whole
    if session.interrupts.wanted or not saved_state.is_complete(memory):
        return
    if saved_state.read(memory).compression is not Compression.RAW:
        return
    facts = memory.stat()
    owner = (facts.st_uid, facts.st_gid)
    try:
        with durable.explained(memory), durable.replacing(memory, facts.st_mode & 0o777, owner) as descriptor:
            saved_state.transcoded(memory, descriptor, Compression.ZSTD)
    except (errors.HostFailed, errors.NoSpace, errors.Unsupported) as error:
        session.say(f"the saved memory was not compressed: {error}")


def unpacked_file(layout: Layout) -> Path:
    """Where a raw copy of compressed memory lies as long as it is needed."""
    return layout.private / "unpacked-memory.save"


def unpacked(memory: Path, target: Path) -> Path:
    """The save file itself, or ``target``, a raw copy of a compressed one, which the caller removes."""
    if saved_state.read(memory).compression is not Compression.ZSTD:
        return memory
    with durable.explained(target), durable.replacing(target, 0o600, None) as descriptor:
        saved_state.transcoded(memory, descriptor, Compression.RAW)
    return target
