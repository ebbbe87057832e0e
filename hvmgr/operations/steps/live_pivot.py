"""The guest leaves images for the ones below them, which show the same: of all its disks at one moment.

It stands still from before the first pivot until libvirt's configuration says where it goes on: what it wrote before would
hide what it writes then. The first pivot that is refused leaves all disks where they were.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hvmgr import errors
from hvmgr.host.domain import Domain, State
from hvmgr.model import configuration
from hvmgr.operations import running_qemu
from hvmgr.operations.session import Session
from hvmgr.operations.steps import live_images, live_jobs
from hvmgr.operations.steps.live_images import POLL_S, SETTLES_S
from hvmgr.storage import durable, vm_home

_UNSEEN = b""  # what the note says of a QEMU that hides from us


@dataclass(frozen=True, slots=True)
class Pivot:
    """A disk whose guest goes on in ``parent``, where everything is that ``child`` holds."""

    slot: str
    child: Path
    parent: Path


def go_on(session: Session, domain: Domain, pivots: Sequence[Pivot]) -> None:
    """The guest writes to the parents from now on; raises what keeps the disks that are left from that."""
    done: list[Pivot] = []
    with session.interrupts.held_back():
        try:
            _pivot(session, domain, pivots, done)
        except errors.HvmgrError:
            if done:
                _settle(session, domain, done)
            raise
        _settle(session, domain, done)


def _pivot(session: Session, domain: Domain, pivots: Sequence[Pivot], done: list[Pivot]) -> None:
    left = [one.slot for one in pivots]
    with live_jobs.ending(domain, left):  # refused: the guest goes on where it was
        if domain.state() is State.RUNNING:
            _note(session)
            domain.suspend()
        for one in pivots:
            try:
                domain.end_block_job(one.slot, pivot=True)
            except (errors.HostFailed, errors.Conflict):
                if not live_images.lives(domain) or live_images.find(session, one.child, one.parent) is not None:
                    raise  # otherwise it was done all the same
            left.remove(one.slot)
            done.append(one)


def _note(session: Session) -> None:
    running_qemu.note(session, stopped(session))
    if not running_qemu.is_noted(stopped(session)):
        durable.write_file(stopped(session), _UNSEEN)


def _settle(session: Session, domain: Domain, done: Sequence[Pivot]) -> None:
    with live_jobs.ended(domain):
        for one in done:
            require_path(domain, one.slot, one.parent)
            durable.sync_file(one.parent)
        let_go_on(session)


def require_path(domain: Domain, slot: str, parent: Path) -> None:
    """QEMU, libvirt's live and its inactive configuration agree."""
    deadline = time.monotonic() + SETTLES_S
    while True:
        texts = [domain.xml(live=live) for live in (True, False)]
        said = {vm_home.disks_of(configuration.parse(text, source="libvirt")).get(slot) for text in texts}
        writing = {vm_home.canonical(str(path)) for path in domain.writable_files()}
        if said == {str(parent)} and str(parent) in writing:
            return
        if time.monotonic() > deadline:
            raise errors.OutcomeUnknown(f"nobody can say whether disk {slot} of {domain.name} goes on in {parent}")
        time.sleep(POLL_S)


def let_go_on(session: Session) -> None:
    """A guest that was stopped for this goes on; OutcomeUnknown, which keeps the journal open, when it could not be asked to.

    Without the note it stays as it is, for its user has paused it; so does one that was started paused since.
    """
    if not stopped(session).exists():
        return
    if is_held(session):
        try:
            _resume(session)
        except errors.HvmgrError as error:
            name = session.home.name
            raise errors.OutcomeUnknown(
                f"{name} stands still for a merge and could not go on yet: {error}",
                hint=f"the next command on this VM has it go on; or do so yourself: virsh resume {name}",
            ) from error
    durable.remove(stopped(session))


def _resume(session: Session) -> None:
    domain = session.find_domain()
    if domain is None or not domain.is_active() or domain.state() is not State.PAUSED:
        return
    try:
        domain.resume()
    except errors.HvmgrError:
        if live_images.lives(domain) and domain.state() is State.PAUSED:  # otherwise it ended, or went on all the same
            raise


def is_held(session: Session) -> bool:
    """Whether we have stopped the guest that runs now. Where its QEMU could not be seen, the open journal vouches for it."""
    note = stopped(session)
    return note.exists() and (running_qemu.is_noted(note) or note.read_bytes() == _UNSEEN)


def forget_stale(session: Session) -> None:
    """Without an open journal nobody stands still for us: who is paused then, was paused by its user."""
    if not session.dry_run and stopped(session).exists():
        durable.remove(stopped(session))


def stopped(session: Session) -> Path:
    """The note that we stopped the guest, and of which QEMU; there only while the journal is open."""
    return session.layout.private / "stopped"
