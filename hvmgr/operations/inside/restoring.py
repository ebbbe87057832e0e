"""``file restore``: files out of a snapshot are back in the present, of a VM that is off or of one that runs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from hvmgr import errors
from hvmgr.model.put_options import FilesWanted, PutOptions
from hvmgr.operations.inside import looking, putting, sources, views
from hvmgr.operations.inside.browsing import Browser, shown
from hvmgr.operations.inside.putting import Put, Target
from hvmgr.operations.inside.sources import Gathered
from hvmgr.operations.inside.unlocking import Key

if TYPE_CHECKING:
    from hvmgr.operations.session import Session
    from hvmgr.operations.vm import VM


def restore(
    session: Session, vm: VM, wanted: FilesWanted, manner: PutOptions, *, name: str | None, keys: Sequence[Key]
) -> Put:
    """The files are in the present of the VM, which is off, as they were at the snapshot."""
    putting.require_off(session, hint="put them into the running guest: --to running; or stop it first")
    with opened(vm, wanted, keys) as (browser, gathered):
        volume = browser.volume
        number = volume.logical or (None if volume.number is None else str(volume.number))
        place = Target(wanted.into or b"/", volume.disk.slot, number, keys)
        how = dataclasses.replace(manner, as_before=True)
        return putting.put(session, vm, gathered, place, how, owner=None, name=name, operation="file restore")


@contextlib.contextmanager
def opened(vm: VM, wanted: FilesWanted, keys: Sequence[Key]) -> Iterator[tuple[Browser, Gathered]]:
    """The files at the snapshot, and the one file system that all of them are on, open during the block."""
    disks = views.of_vm(vm, snapshot=wanted.snapshot, slot=wanted.slot)
    with looking.opened(disks, partition=wanted.partition, keys=keys) as inside:
        found = [(inside.choose(path), path) for path in wanted.paths]
        browsers = list(dict.fromkeys(browser for browser, _ in found))
        if len(browsers) != 1:
            where = ", ".join(f"{shown(path)} on {browser.volume.title}" for browser, path in found)
            raise errors.UsageError(
                f"these are on {len(browsers)} file systems: {where}",
                hint="restore those of each one in a command of its own",
            )
        expanded = [(browser, one) for browser, path in found for one in browser.expand(path, follow=False)]
        yield browsers[0], sources.of_browser(expanded, whole_path=wanted.into is None)
