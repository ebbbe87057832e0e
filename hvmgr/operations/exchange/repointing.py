"""Images whose place others with the same content take: whatever names the old ones names the new ones.

``places`` says for each old image where the new one lies, ``formats`` of what format the new one is. What the guest sees of
any state does not change.
"""

from __future__ import annotations

import stat
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from hvmgr.model import plan
from hvmgr.model.configuration import Configuration
from hvmgr.model.layout import Layout
from hvmgr.model.plan import Step
from hvmgr.model.tree import Image, Tree
from hvmgr.operations.exchange import gold
from hvmgr.operations.session import Session
from hvmgr.storage import frozen, images

SUFFIXES = {images.QCOW2: ".qcow2", images.VPC: ".vhd", images.RAW: ".img"}


def images_of(before: Tree, slot: str) -> dict[str, Image]:
    """The images that any state of the disk stands on, bases first."""
    found: dict[str, Image] = {}
    for disks in _states(before):
        for image in reversed(before.chain(disks[slot])) if slot in disks else ():
            found.setdefault(image.path, image)
    return found


def _states(before: Tree) -> list[Mapping[str, str]]:
    states = [before.present.disks, *(node.disks for node in before.nodes.values())]
    return states if before.undo is None else [*states, before.undo.disks]


def place_for_base(layout: Layout, slot: str, fmt: str, taken: Collection[str]) -> str:
    """A name among the bases of the home that nothing has yet."""
    target, number = layout.bases / f"{slot}{SUFFIXES[fmt]}", 1
    while target.exists() or str(target) in taken:
        number += 1
        target = layout.bases / f"{slot}-{number}{SUFFIXES[fmt]}"
    return str(target)


def named(
    session: Session, path: str, image: Image, places: Mapping[str, str], formats: Mapping[str, str]
) -> plan.NameParent:
    """The header of ``image``, or of its copy at ``path``, names what took its parent's place."""
    assert image.parent is not None
    header = images.read(Path(image.path), images.QCOW2)
    assert header.backing is not None
    assert header.backing_format is not None
    return plan.NameParent(
        path=path,
        parent=session.layout.parent_name(Path(path), places[image.parent]),
        parent_format=formats[image.parent],
        before=header.backing,
        mode=frozen.WORKING_MODE if path != image.path else stat.S_IMODE(Path(path).stat().st_mode),
        before_format=header.backing_format,
    )


def texts(session: Session, before: Tree, places: Mapping[str, str], formats: Mapping[str, str]) -> Iterator[Step]:
    """Configurations of snapshots and of the undo slot that name an old image."""
    for node in before.nodes.values():
        if set(node.disks.values()) & places.keys():
            file = session.layout.snapshot(node.snapshot_id)
            yield _changed(file, session.home.snapshot(node.snapshot_id), node.disks, places, formats)
    undo = session.home.undo()
    if undo is not None and before.undo is not None and set(before.undo.disks.values()) & places.keys():
        yield _changed(session.layout.undo, undo, before.undo.disks, places, formats)


def _changed(
    file: Path, one: Configuration, disks: Mapping[str, str], places: Mapping[str, str], formats: Mapping[str, str]
) -> plan.ChangeFile:
    text = file.read_text("utf-8")
    point(one, disks, places, formats)
    return plan.ChangeFile(path=str(file), before=text, after=one.to_xml())


def point(one: Configuration, disks: Mapping[str, str], places: Mapping[str, str], formats: Mapping[str, str]) -> None:
    """The configuration, which has these disks, names the new images."""
    for slot, path in disks.items():
        if path in places:
            one.set_disk_source(slot, Path(places[path]), formats[path])


def forget_use(before: Tree, vm_id: str, slot: str, gone: Collection[str]) -> Iterator[Step]:
    """The note beside a gold, whose images ``gone`` the disk needs no more, goes; unless another disk needs it still."""
    others = {one for disks in _states(before) for one in disks} - {slot}
    still = gold.notes_of(vm_id, (path for one in others for path in images_of(before, one)))
    for note in sorted(gold.notes_of(vm_id, gone) - still):
        yield plan.RemoveFile(path=str(note))
