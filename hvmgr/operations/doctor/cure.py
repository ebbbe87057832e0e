"""What a repair works with: the home as it was found, and one cure, which says what it does before it does it.

A cure never deletes. It is one durable act, or a plan that runs through the journal; whatever ends it in the middle
leaves the state before it or the state after it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors
from hvmgr.model.diagnosis import Code
from hvmgr.model.finding import Finding
from hvmgr.model.layout import Layout
from hvmgr.operations.doctor.home_checks import QUARANTINE
from hvmgr.operations.doctor.surroundings import Known, Surroundings
from hvmgr.storage import access, durable, locks
from hvmgr.storage.survey import Survey

if TYPE_CHECKING:
    from hvmgr.operations.host import Host
    from hvmgr.operations.session import Session


@dataclass(frozen=True, slots=True)
class Cure:
    """One thing that puts one finding right; ``sentence`` says what it does, ``act`` does it."""

    finding: Finding
    sentence: str
    act: Callable[[], None] = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Case:
    """One home to be put right. ``seen`` is None where no configuration says which VM's home it is.

    ``named``: the user named this very VM. ``accept_touched``: the user vouches for frozen images whose time alone
    differs; ``accept_present``: for working images that no longer stand on what their snapshot froze.
    """

    host: Host
    around: Surroundings
    folder: Path
    seen: Survey | None
    found: tuple[Finding, ...]
    named: bool
    accept_touched: bool
    accept_present: bool

    @property
    def layout(self) -> Layout:
        """Where everything of the home is; without a configuration only what does not depend on the VM's id."""
        return Layout(self.folder, "") if self.seen is None else self.seen.home.layout

    @property
    def known(self) -> Known | None:
        """libvirt's domain of the VM."""
        return None if self.seen is None else self.around.domains.get(self.seen.home.vm_id)

    @property
    def is_active(self) -> bool:
        """Whether a QEMU runs the VM, as far as libvirt can be asked."""
        return self.known is not None and self.known.domain.is_active()

    def of(self, code: Code) -> list[Finding]:
        """The findings with one code."""
        return [one for one in self.found if one.code == code]

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else works on the home; libvirt is not needed for it."""
        durable.make_folder(self.layout.private)
        with locks.held(self.layout.lock, wait_s=self.host.wait_s, what=f"the VM in {self.folder}"):
            yield

    @contextlib.contextmanager
    def session(self) -> Iterator[Session]:
        """Exclusive work on the home, with libvirt."""
        assert self.seen is not None
        with self.host.session(self.seen.home) as session:
            yield session


def set_aside(layout: Layout, file: Path, why: str) -> Path:
    """The file lies in the home's quarantine, with a note that says where it was and why; its new path."""
    target = _noted(layout, file, why)
    move(file, target)
    if (mode := access.right_file_mode(target)) is not None:
        durable.set_mode(target, mode)
    return target


def keep_copy(layout: Layout, file: Path, why: str) -> Path:
    """A copy of the file, which is about to be written anew, lies in the quarantine with such a note."""
    target = _noted(layout, file, why)
    durable.copy_file(file, target)
    return target


def _noted(layout: Layout, file: Path, why: str) -> Path:
    folder = layout.private / QUARANTINE
    durable.make_folder(layout.private)
    durable.make_folder(folder)
    target, number = folder / file.name, 1
    while target.exists():
        number += 1
        target = folder / f"{file.name}.{number}"
    note = f"was: {file}\nwhy: {why}\nback: mv '{target}' '{file}'\n"
    durable.write_file(target.with_name(f"{target.name}.txt"), note.encode(errors="surrogateescape"))
    return target


def move(source: Path, target: Path) -> None:
    """The file has another name; Conflict when that one is taken, HostFailed when it is on another file system."""
    if target.exists() or target.is_symlink():
        raise errors.Conflict(f"{target} exists already", hint="run doctor again", path=str(target))
    durable.rename(source, target)
