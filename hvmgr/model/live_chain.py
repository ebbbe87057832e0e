"""The chain of a running VM's disk, as libvirt resolved it in its live XML, and the name that block jobs want of each image.

Numbers are never used again: whoever starts a job reads the XML anew.
"""

from __future__ import annotations

from dataclasses import dataclass

from lxml import etree

from hvmgr.model.configuration import Configuration


@dataclass(frozen=True, slots=True)
class Link:
    """One image of a chain: its file, and libvirt's name for it, such as ``vda[3]``."""

    path: str
    name: str


def links(live: Configuration, slot: str) -> tuple[Link, ...]:
    """The image of a disk and its parents, top first; nothing when there is no such disk."""
    step = _disk(live, slot)
    found: list[Link] = []
    while step is not None:
        source = step.find("source")
        path = None if source is None else source.get("file") or source.get("dev")
        if source is None or path is None:
            break
        number = source.get("index") or step.get("index") or "0"
        found.append(Link(path, f"{slot}[{number}]"))
        step = step.find("backingStore")
    return tuple(found)


def mirror(live: Configuration, slot: str) -> str | None:
    """The kind of job that copies what the guest writes to a disk, such as ``active-commit``; None when none does."""
    found = _mirror(live, slot)
    return None if found is None else found.get("job", "")


def is_ready(live: Configuration, slot: str) -> bool:
    """Whether a commit of the image that the guest writes has come so far that the guest may go on in the other."""
    found = _mirror(live, slot)
    return found is not None and found.get("job") == "active-commit" and found.get("ready") == "yes"


def _mirror(live: Configuration, slot: str) -> etree._Element | None:
    disk = _disk(live, slot)
    return None if disk is None else disk.find("mirror")


def _disk(live: Configuration, slot: str) -> etree._Element | None:
    for disk in live.root.findall("devices/disk"):
        target = disk.find("target")
        if target is not None and target.get("dev") == slot:
            return disk
    return None
