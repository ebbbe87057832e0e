"""Puts right what doctor found, as far as that is safe: it completes, defines, renames and notes, and never deletes.

Each home is examined anew after each kind of cure, because one often makes the next possible: an image that is set
aside may be found again under another name. What no cure is certain of stays a finding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors
from hvmgr.model.diagnosis import Code
from hvmgr.model.finding import Finding
from hvmgr.operations.doctor import (
    cure_homes,
    cure_host,
    cure_images,
    cure_snapshots,
    examination,
    host_checks,
    surroundings,
)
from hvmgr.operations.doctor.cure import Case, Cure
from hvmgr.operations.doctor.surroundings import Surroundings

if TYPE_CHECKING:
    from hvmgr.operations.host import Host

# In this order: first what is needed to open the home at all, then its files, then libvirt, at last the index.
CURES: tuple[Callable[[Case], Iterator[Cure]], ...] = (
    cure_homes.half_made,
    cure_homes.ambiguous,
    cure_homes.configuration,
    cure_homes.resettle,
    cure_homes.undo,
    cure_snapshots.rebuild,
    cure_images.exchange,
    cure_images.exchange_working,
    cure_images.quarantine,
    cure_images.reattach,
    cure_images.modes,
    cure_images.owners,
    cure_homes.interrupted,
    cure_homes.unreadable_journal,
    cure_homes.together,
    cure_homes.explained,
    cure_images.records,
    cure_images.leaks,
    cure_homes.noted,
)


@dataclass(frozen=True, slots=True)
class Repaired:
    """One thing that was put right, or with a dry run would be; ``failure`` says why it was not, ``hint`` what to do."""

    finding: Finding
    done: str
    failure: str | None = None
    hint: str | None = None


def never(_sentence: str) -> bool:
    """Nobody was asked."""
    return False


@dataclass(frozen=True, slots=True)
class Wish:
    """What the user allows beyond what is certain; ``thorough`` as for doctor; ``change_host`` asks for each setting."""

    accept_touched: bool = False
    accept_present: bool = False
    thorough: bool = False
    change_host: Callable[[str], bool] = never


def repair(host: Host, vm: str | None, wish: Wish) -> list[Repaired]:
    """Everything that was done, in order; with the reporter's ``dry_run`` what would be done first, and nothing is."""
    around = surroundings.look(host)
    if vm is not None:
        return list(_home(host, around, surroundings.find_folder(around, vm), wish, named=True))
    done = list(_host(host, around, wish))
    for folder in around.folders:
        done += _home(host, around, folder, wish, named=False)
    return done


def _host(host: Host, around: Surroundings, wish: Wish) -> Iterator[Repaired]:
    found = tuple(host_checks.examine(around))
    cures = (
        *cure_homes.index_notes(around, found),
        *cure_homes.attachments_left(host, found),
        *cure_homes.mounts_left(host, found),
        *cure_host.userfaultfd(found, wish.change_host),
    )
    for cure in cures:
        yield _carried_out(host, cure)


def _home(host: Host, around: Surroundings, folder: Path, wish: Wish, *, named: bool) -> Iterator[Repaired]:
    tried: set[tuple[str, str]] = set()
    while cures := _next_cures(_case(host, around, folder, wish, named=named), tried):
        for cure in cures:
            tried.add((cure.finding.code, cure.finding.where))
            yield _carried_out(host, cure)
        around = surroundings.look(host)


def _next_cures(case: Case, tried: set[tuple[str, str]]) -> list[Cure]:
    """The cures of the first kind that has some; in a dry run, which changes nothing in between, those of all kinds."""
    chosen: list[Cure] = []
    for find in CURES:
        cures = [one for one in find(case) if (one.finding.code, one.finding.where) not in tried]
        if cures and not case.host.reporter.dry_run:
            return cures
        chosen += cures
    return chosen


def _case(host: Host, around: Surroundings, folder: Path, wish: Wish, *, named: bool) -> Case:
    found = examination.home(folder, around, thorough=wish.thorough) if folder.is_dir() else []
    if Code.OPERATION_RUNNING in {one.code for one in found}:
        found = []  # whoever works on it knows what he does
    try:
        seen = surroundings.take(folder)
    except errors.HvmgrError:
        seen = None
    return Case(
        host,
        around,
        folder,
        seen,
        tuple(found),
        named=named,
        accept_touched=wish.accept_touched,
        accept_present=wish.accept_present,
    )


def _carried_out(host: Host, cure: Cure) -> Repaired:
    if host.reporter.dry_run:
        return Repaired(cure.finding, cure.sentence)
    try:
        cure.act()
    except errors.Cancelled:
        raise
    except errors.HvmgrError as error:
        return Repaired(cure.finding, cure.sentence, failure=str(error), hint=error.hint)
    return Repaired(cure.finding, cure.sentence)
