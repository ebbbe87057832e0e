"""``image reparent``: a differencing image names another file as its parent, as Set-VHD -ParentPath does.

What the child shows depends on every byte of its parent, and an equal id proves a possible parent, not an unchanged one.
So both parents are compared byte by byte where both are there. Where they are not, the id of a VHD decides.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors
from hvmgr.model import image_plan
from hvmgr.model.image_format import ImageFormat
from hvmgr.model.image_info import Use
from hvmgr.operations.images import changes, disks, recognition
from hvmgr.operations.images.recognition import Recognised
from hvmgr.storage import images

if TYPE_CHECKING:
    from hvmgr.operations.host import Host


class Proof(StrEnum):
    """What says that the new parent is the right one."""

    BYTES = "bytes"  # both parents show the same disk
    ID = "id"  # the new one has the id that the child wants
    NONE = "none"  # the user says so


def reparent(host: Host, child: Path, parent: Path, folders: Sequence[Path] = (), *, ignore_id: bool) -> Proof:
    """The child stands on ``parent``; what proved that it may."""
    changes.complete(host, [child, parent])
    searched = (*folders, parent.parent)
    found = recognition.look(child, folders=searched)
    below = recognition.look(parent, folders=searched)
    _require_fit(found, below)
    with changes.locked(host, [child], seen=[found]):
        changes.require_unused(host, child, but=(Use.PARENT,))
        proof = _proof(host, found, below, ignore_id=ignore_id)
        step = image_plan.PointChild(str(child), found.format.value, str(parent), below.driver)
        plan = changes.plan_of("image reparent", f"new parent of {child}", [step])
        changes.require_approval(host, plan)
        changes.run(host, plan, child)
    return proof


def _require_fit(child: Recognised, parent: Recognised) -> None:
    if not child.is_differencing:
        raise errors.UsageError(f"{child.path} is no differencing image: it has no parent")
    if child.format is ImageFormat.VHDX:
        images.require_usable(child.path)
    if child.path.samefile(parent.path) or _stands_on(parent, child.path):
        raise errors.Conflict(f"{parent.path} stands on {child.path}: the chain would run in a circle")
    if child.format is ImageFormat.VHD and parent.format is not ImageFormat.VHD:
        raise errors.Unsupported(
            f"{parent.path} is a {parent.format.value} image; the parent of a differencing VHD is a VHD",
            hint="convert it first: hvmgr image convert",
        )
    if child.format is ImageFormat.QCOW2:
        images.read(parent.path, parent.driver)
    if child.format is ImageFormat.VHD and child.size != parent.size:
        raise errors.Conflict(
            f"{parent.path} has another size than {child.path}: {parent.size} and {child.size} bytes",
            hint="it is not the parent that the child was made on",
        )


def _stands_on(path: Recognised, other: Path) -> bool:
    return Path(os.path.realpath(other)) in recognition.known_chain(path.path, path.folders)


def _proof(host: Host, child: Recognised, parent: Recognised, *, ignore_id: bool) -> Proof:
    before = _parent_before(child)
    if before is not None and not before.samefile(parent.path):
        if _is_same(host, before, parent):
            return Proof.BYTES
        if not ignore_id:
            raise errors.Conflict(
                f"{parent.path} shows other bytes than {before}, on which {child.path} stands",
                hint="--ignore-id names it all the same: then the child's disk is a mix of both",
            )
        return Proof.NONE
    if before is not None and child.format is not ImageFormat.VHD:
        return Proof.BYTES  # it is the file that the child names already
    if child.format is ImageFormat.VHD and _has_wanted_id(child.path, parent.path):
        host.reporter.notice(f"{parent.path} has the right id; whether it was changed since cannot be proved")
        return Proof.ID
    if ignore_id:
        return Proof.NONE
    what = "has another id than" if child.format is ImageFormat.VHD else "cannot be proved to be"
    raise errors.Conflict(
        f"{parent.path} {what} the parent that {child.path} was made on, and that one is not there to compare",
        hint="put the old parent back, or give --ignore-id if you know that its bytes are the same",
    )


def _parent_before(child: Recognised) -> Path | None:
    try:
        found = recognition.parent_of(child.path, child.folders)
    except (errors.NotFound, errors.Conflict):
        return None
    return found if found is not None and found.exists() else None


def _is_same(host: Host, before: Path, parent: Recognised) -> bool:
    old = recognition.look(before, folders=parent.folders)
    with disks.opened(old) as one, disks.opened(parent) as other:
        what = f"compare {parent.path.name} with {before.name}"
        return disks.is_same(one, other, what=what, report=host.reporter.progress)


def _has_wanted_id(child: Path, parent: Path) -> bool:
    from hvmgr import vhd

    with vhd.open_image(child) as upper, vhd.open_image(parent) as lower:
        return bool(upper.parent_uid == lower.uid)
