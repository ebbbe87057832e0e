"""libvirt's block jobs, from their begin, or from where a dead command left them, to an end that is proved.

A job's counters are for people. That it has ended is believed when neither libvirt nor QEMU knows the image any more, and an
error before that ends the job: nobody would know of it once the journal is closed. After that an error closes no journal.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvmgr import errors, units
from hvmgr.host.domain import Domain
from hvmgr.model import live_chain
from hvmgr.model.progress import Progress
from hvmgr.operations.session import Session
from hvmgr.operations.steps import live_images
from hvmgr.operations.steps.live_images import POLL_S, SETTLES_S
from hvmgr.storage import durable, images

_SYNC_S = 5.0
_SOON_S = 0.01  # small ones are at their end by then; later they are asked less and less often
_LITTLE = 16 * units.MIB  # with so little left, a job that ended early had no space


@dataclass(frozen=True, slots=True)
class Job:
    """A block job of a disk: what it takes away, the image that it writes, and how it is begun.

    ``begin`` takes ``relative``, whether names in headers are to stay relative, and ``bandwidth``.
    """

    slot: str
    source: str
    written: Path
    relative: bool
    begin: Callable[..., None]


def left_over(session: Session, domain: Domain, slots: Iterable[str]) -> list[str]:
    """Of these disks those with a job that a dead command of ours began."""
    if not session.recovering:
        return []
    there = [slot for slot in slots if domain.block_job(slot) is not None]
    live = live_images.live(domain) if there else None
    return [slot for slot in there if live is not None and live_chain.mirror(live, slot) in (None, "active-commit")]


def run(session: Session, domain: Domain, jobs: Sequence[Job], ours: list[str]) -> None:
    """Until one of the jobs is gone, or all are ready to end. ``ours`` are disks that have theirs; it learns of others."""
    for job in jobs:
        if job.slot not in ours and domain.block_job(job.slot) is not None:
            raise errors.Busy(
                f"libvirt works on disk {job.slot} of {domain.name}", hint="run it again when that is done"
            )
    share = session.bandwidth and max(1, session.bandwidth // len(jobs))
    for job in jobs:
        if job.slot not in ours:
            _begin(job, share)
            ours.append(job.slot)
        elif share:
            domain.throttle_block_job(job.slot, share)
    follow(session, domain, jobs)


def _begin(job: Job, bandwidth: int) -> None:
    """libvirt keeps names relative only where all of them are; the one that counts is written afterwards."""
    try:
        job.begin(relative=job.relative, bandwidth=bandwidth)
    except errors.HvmgrError as error:
        if not job.relative or "relative" not in str(error):
            raise
        job.begin(relative=False, bandwidth=bandwidth)


def follow(session: Session, domain: Domain, jobs: Sequence[Job]) -> None:
    """Until one of the jobs is gone, or all are ready to end.

    What they have written is brought to the disk now and then: the last act of one is a header, which should not come first.
    """
    synced, pause = time.monotonic(), _SOON_S
    what = f"merge {Path(jobs[0].source).name}" if len(jobs) == 1 else f"merge images of {len(jobs)} disks"
    while far := _far(domain, jobs):
        live = live_images.live(domain)
        if all(live_chain.is_ready(live, job.slot) for job in jobs):
            return
        session.progress(Progress(sum(done for done, _ in far), sum(total for _, total in far), what))
        if time.monotonic() - synced > _SYNC_S:
            for job in jobs:
                durable.sync_file(job.written)
            synced = time.monotonic()
        time.sleep(pause)
        pause = min(2 * pause, POLL_S)


def _far(domain: Domain, jobs: Sequence[Job]) -> list[tuple[int, int]]:
    """How far each job is; nothing when one is gone."""
    found = [far for job in jobs if (far := domain.block_job(job.slot)) is not None]
    return found if len(found) == len(jobs) else []


@contextlib.contextmanager
def ending(domain: Domain, slots: Iterable[str]) -> Iterator[None]:
    """Whatever goes wrong in here ends these disks' jobs; OutcomeUnknown where that cannot be done."""
    try:
        yield
    except errors.OutcomeUnknown:
        raise
    except errors.HvmgrError as error:
        if error.facts.get("lost"):
            raise
        for slot in slots:
            _end(domain, slot, error)
        raise


def _end(domain: Domain, slot: str, error: errors.HvmgrError) -> None:
    try:
        domain.end_block_job(slot)
    except errors.HvmgrError as second:  # or it came to its end by itself, or with the VM
        if live_images.lives(domain) and domain.block_job(slot) is not None:
            raise errors.OutcomeUnknown(
                f"{error}; and the merge of disk {slot} of {domain.name} could not be ended ({second})"
            ) from error


@contextlib.contextmanager
def ended(domain: Domain) -> Iterator[None]:
    """The jobs have done their work. An error in here is no reason to take their images for what they were before.

    Unless QEMU is gone: then they are merged as those of a VM that is off.
    """
    try:
        yield
    except errors.OutcomeUnknown:
        raise
    except errors.HvmgrError as error:
        if error.facts.get("lost") or not live_images.lives(domain):
            raise
        raise errors.OutcomeUnknown(
            f"images of {domain.name} are merged, but not all of that could be written down: {error}"
        ) from error


@contextlib.contextmanager
def contact(domain: Domain) -> Iterator[None]:
    """Not being able to ask how a merge went is a state of its own."""
    try:
        yield
    except errors.HostFailed as error:
        if error.facts.get("lost"):
            raise errors.OutcomeUnknown(f"lost contact with libvirt while {domain.name} merges images") from error
        raise


def require_gone(domain: Domain, slot: str, path: str) -> None:
    """Neither libvirt's live configuration nor QEMU knows the image any more, and nothing copies the disk."""
    deadline = time.monotonic() + SETTLES_S
    while True:
        in_chain = any(live_images.is_same(one.path, path) for one in live_images.links(domain, slot))
        is_open = any(live_images.is_same(str(one), path) for one in domain.open_files())
        if not in_chain and not is_open and live_chain.mirror(live_images.live(domain), slot) is None:
            return
        if in_chain and domain.block_job(slot) is None and not domain.has_block_job():
            raise_early_end(path)
        if time.monotonic() > deadline:
            if in_chain:
                raise errors.OutcomeUnknown(f"the merge of {path} does not come to its end")
            raise errors.OutcomeUnknown(f"QEMU still has {path} open although its merge has ended")
        time.sleep(POLL_S)


def raise_early_end(path: str) -> None:
    """A job that is gone has not done what it was to do."""
    facts = os.statvfs(Path(path).parent)
    if facts.f_bavail * facts.f_frsize < _LITTLE:
        raise errors.NoSpace(f"there was no space left in {Path(path).parent} to merge {path}")
    raise errors.HostFailed(f"the merge of {path} ended early: QEMU, or somebody else, stopped it")


def write_name(domain: Domain, child: Path, name: str) -> None:
    """The header names the parent as the home does."""
    if images.read(child, images.QCOW2).backing != name:
        domain.name_parent(child, name)
