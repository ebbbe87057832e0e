"""Where a running VM has its images: by libvirt's live and inactive XML, by QEMU, and by the images' headers."""

from __future__ import annotations

import contextlib
import itertools
import time
from dataclasses import dataclass
from pathlib import Path

from hvmgr import errors
from hvmgr.host.domain import Domain
from hvmgr.model import configuration, live_chain
from hvmgr.model.configuration import Configuration
from hvmgr.operations.session import Session
from hvmgr.storage import images, vm_home

POLL_S = 0.1
SETTLES_S = 20.0  # from the end of a job until libvirt's view and QEMU's files say so


@dataclass(frozen=True, slots=True)
class Place:
    """Where a pair of images is in the running VM: the disk, the names for block jobs, and what stands on the child."""

    slot: str
    child: str
    parent: str
    above: str | None


def find(session: Session, child: Path, parent: Path) -> Place | None:
    """Where the running VM has the child on the parent; None when it has not, or is off."""
    domain = session.find_domain()
    if domain is None or not domain.is_active():
        return None
    now = live(domain)
    for slot in vm_home.disks_of(now):
        found = live_chain.links(now, slot)
        for number, (upper, lower) in enumerate(itertools.pairwise(found)):
            if is_same(upper.path, str(child)) and is_same(lower.path, str(parent)):
                above = vm_home.canonical(found[number - 1].path) if number else None
                return Place(slot, upper.name, lower.name, above)
    return None


def links(domain: Domain, slot: str) -> tuple[live_chain.Link, ...]:
    """The chain of a disk, as libvirt has it."""
    return live_chain.links(live(domain), slot)


def is_same(one: str, other: str) -> bool:
    """Whether two paths lead to the same file."""
    if one == other:
        return True
    return Path(one).exists() and Path(other).exists() and images.identity(Path(one)) == images.identity(Path(other))


def stands_on(child: Path, parent: Path) -> bool:
    """Whether the child's header names the parent."""
    below = images.read(child, images.QCOW2).parent
    return below is not None and is_same(str(below), str(parent))


def goes_on_in(session: Session, child: Path, parent: Path) -> bool:
    """Whether the guest's disk has left the child for the parent: by QEMU where it runs, else by what libvirt starts next."""
    domain = session.find_domain()
    if domain is None or find(session, child, parent) is not None:
        return False
    if domain.is_active():
        with contextlib.suppress(errors.HostFailed, errors.Conflict):
            if _writes(domain, parent):
                return True
        if lives(domain):  # otherwise it ended meanwhile, and had nothing open any more
            return _writes(domain, parent)
    return str(parent) in vm_home.disks_of(inactive(session)).values()


def _writes(domain: Domain, path: Path) -> bool:
    return str(path) in {vm_home.canonical(str(one)) for one in domain.writable_files()}


def live(domain: Domain) -> Configuration:
    """The configuration that runs, with its chains."""
    return configuration.parse(domain.xml(live=True), source=f"libvirt's live XML of {domain.name}")


def inactive(session: Session) -> Configuration:
    """The configuration that libvirt starts next."""
    domain = session.domain()
    return configuration.parse(domain.xml(live=False), source=f"libvirt's XML of {domain.name}")


def lives(domain: Domain) -> bool:
    """Whether its QEMU is there; libvirt may hear of its end a little later."""
    deadline = time.monotonic() + SETTLES_S
    while domain.is_active():
        with contextlib.suppress(errors.HvmgrError):
            domain.monitor("query-status")
            return True
        if time.monotonic() > deadline:
            return True
        time.sleep(POLL_S)
    return False
