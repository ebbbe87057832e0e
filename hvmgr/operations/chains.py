"""What others did to the images below a disk, and what of that provably lost nothing.

The present of a snapshot stands on the images that the snapshot froze. Whoever pulls, commits, rebases or replaces
images outside hvmgr breaks that. Two ways of doing so can be proved to be harmless for the present:

| what is found                                                          | what it was                              |
|------------------------------------------------------------------------|------------------------------------------|
| the image stands on less than before and holds itself what it left out | pulled (virsh blockpull): nothing is lost |
| a frozen image changed and now shows all that stood between it and the | committed (qemu-img commit, virsh        |
| present                                                                | blockcommit): its snapshots are damaged  |
| anything else                                                          | nobody can tell: a Conflict              |

Reads headers alone as long as nothing happened.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from hvmgr import errors
from hvmgr.host import qemu_img
from hvmgr.model.configuration import Configuration
from hvmgr.model.metadata import DiskRecord
from hvmgr.model.tree import Image, Tree
from hvmgr.operations.session import Session
from hvmgr.storage import frozen, images, vm_home


class Deed(StrEnum):
    """What somebody did to a chain."""

    PULLED = "pulled"
    COMMITTED = "committed"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Change:
    """One disk's chain that is not what it was.

    ``image`` is the working image. ``base`` is the image that it stands on now (PULLED), or that was written
    (COMMITTED); ``top`` is what was committed into it. ``missed`` is the frozen image that it no longer stands on.
    """

    deed: Deed
    slot: str
    image: str
    base: str | None = None
    top: str | None = None
    missed: str | None = None


def iter_changes(session: Session, present: Configuration) -> Iterator[Change]:
    """The disks of the present whose chains others changed, since they were last looked at."""
    forest = session.home.present_tree()
    expected = expected_below(session, present)
    for slot, path in forest.present.disks.items():
        chain = links(forest, path)
        if not chain or chain[-1].parent is not None:
            continue  # a missing image is named by whoever needs it
        below = expected.get(slot)
        if below is None or _is_among(below, chain):
            change = _commit_below(session, slot, chain)
        else:
            change = _explained(session, slot, chain, below)
        if change is not None:
            yield change


def damaged_by(forest: Tree, base: str, top: str | None) -> dict[str, list[str]]:
    """The snapshots, each with its slots, that needed ``base`` as it was; those that stand on ``top`` did not."""
    found: dict[str, list[str]] = {}
    for node in forest.nodes.values():
        for slot, path in node.disks.items():
            chain = {image.path for image in links(forest, path)}
            if base in chain and top not in chain:
                found.setdefault(node.snapshot_id, []).append(slot)
    return found


def links(forest: Tree, path: str) -> list[Image]:
    """The image and its parents, as far as they are there."""
    chain: list[Image] = []
    step: str | None = path
    while step is not None and step in forest.images and forest.images[step] not in chain:
        chain.append(forest.images[step])
        step = chain[-1].parent
    return chain


def _is_among(path: str, chain: list[Image]) -> bool:
    """Whether a chain goes over an image, by whatever path it is named there."""
    if any(image.path == path for image in chain):
        return True
    return Path(path).exists() and images.identity(Path(path)) in {images.identity(Path(image.path)) for image in chain}


def expected_below(session: Session, present: Configuration) -> dict[str, str]:
    """The image of the snapshot above the present that each disk should stand on, by the disk's slot of today."""
    facts = vm_home.require_facts(present)
    if facts.parent is None or not session.layout.snapshot(facts.parent).exists():
        return {}
    snapshot = session.home.snapshot(facts.parent)
    then, paths = vm_home.require_facts(snapshot).disks, vm_home.disks_of(snapshot)
    by_id = {record.id: paths[record.slot] for record in then if record.slot in paths}
    return {record.slot: by_id[record.id] for record in facts.disks if record.id in by_id and not record.apart}


def _commit_below(session: Session, slot: str, chain: list[Image]) -> Change | None:
    """The working image was committed into a frozen one below it: it adds nothing to it any more."""
    top = chain[0]
    written = [image for image in chain[1:] if frozen.is_changed(session.layout, Path(image.path))]
    if not written or session.is_active():
        return None
    for base in written:
        if top.size == base.size and qemu_img.same(_file(top), _file(base)):
            return Change(Deed.COMMITTED, slot, top.path, base=base.path, top=top.path)
    return None


def _explained(session: Session, slot: str, chain: list[Image], below: str) -> Change:
    """Why the working image no longer stands on the image that it stood on."""
    top, now = chain[0], chain[1] if len(chain) > 1 else None
    before = links(session.home.tree(), below)
    paths = [image.path for image in before]
    change = Change(Deed.UNKNOWN, slot, top.path, missed=below)
    if not before or before[-1].parent is not None or (now is not None and now.path not in paths):
        return change
    if session.is_active():
        session.domain().flush_disks()
    left_out = before if now is None else before[: paths.index(now.path)]
    if holds_all(top, left_out, is_base=now is None):
        return Change(Deed.PULLED, slot, top.path, base=None if now is None else now.path, missed=below)
    if now is None or not frozen.is_changed(session.layout, Path(now.path)):
        return change
    if now.size == before[0].size and qemu_img.same(_file(before[0]), _file(now), force_share=True):
        return Change(Deed.COMMITTED, slot, top.path, base=now.path, top=below, missed=below)
    return change


def holds_all(top: Image, left_out: list[Image], *, is_base: bool) -> bool:
    """Whether an image itself says something of every byte of which the images that it left out say something.

    Zeros of theirs need no word of it when nothing is below it.
    """
    if top.format != images.QCOW2:
        return False
    own = (
        (one.start, one.start + one.length)
        for one in qemu_img.map(Path(top.path), top.format, force_share=True)
        if one.depth == 0 and one.present
    )
    first, last = 0, 0  # one run of what the image says itself
    for one in qemu_img.map(Path(left_out[0].path), left_out[0].format, force_share=True):
        if not one.present or one.depth >= len(left_out) or (one.zero and is_base) or one.start >= top.size:
            continue
        while last < min(one.start + one.length, top.size):
            start, end = next(own, (-1, -1))
            if start < 0:
                return False
            first, last = (first, end) if start == last else (start, end)
        if first > one.start:
            return False
    return True


def _file(image: Image) -> tuple[Path, str]:
    return Path(image.path), image.format


def doubt(session: Session, change: Change, vm: str) -> errors.Conflict:
    """What is said of a chain that nobody can explain."""
    missed = change.missed or ""
    images_known = session.home.tree().images
    fmt = images_known[missed].format if missed in images_known else images.QCOW2
    return errors.Conflict(
        f"disk {change.slot}: {change.image} no longer stands on {missed}, which the snapshot above needs below it, "
        "and does not hold its data: somebody rebased, wrote or replaced it outside hvmgr",
        hint=f"put the file back, or join it again: qemu-img rebase -u -F {fmt} -b '{missed}' '{change.image}'; "
        f"or run: hvmgr doctor --repair {vm}; snapshots can be applied meanwhile, which keeps the file",
        path=change.image,
    )


def records(
    session: Session, old: tuple[DiskRecord, ...], known: dict[str, str], disks: dict[str, str], new: set[str]
) -> tuple[DiskRecord, ...]:
    """Disks keep their ids: a disk that only moved to another slot, or goes on in its slot, is the same disk.

    ``new`` names the slots that hold something unrelated.
    """
    by_path = {known[record.slot]: record for record in old if record.slot in known}
    by_slot = {record.slot: record for record in old}
    found = []
    for slot, path in disks.items():
        record = by_path.get(path) or (None if slot in new else by_slot.get(slot))
        found.append(
            DiskRecord(slot=slot, id=session.new_id())
            if record is None
            else DiskRecord(slot=slot, id=record.id, apart=record.apart)
        )
    return tuple(found)


def set_apart(disks: Iterable[DiskRecord], slots: Collection[str]) -> tuple[DiskRecord, ...]:
    """The same records; the disks of these slots have chains of their own."""
    return tuple(dataclasses.replace(one, apart=one.apart or one.slot in slots) for one in disks)
