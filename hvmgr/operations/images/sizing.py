"""``image resize`` and ``image compact``: the disk becomes larger or smaller, or its file does and the disk stays."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors, units
from hvmgr.host import qemu_img
from hvmgr.model import image_plan
from hvmgr.model.image_format import ImageFormat
from hvmgr.model.image_info import ImageType, Use
from hvmgr.model.plan import Step
from hvmgr.operations.images import changes, disks, making, recognition
from hvmgr.operations.images.recognition import Recognised
from hvmgr.storage import images, partitions

if TYPE_CHECKING:
    from hvmgr.operations.host import Host

_SHRINK_HINT = "make the partitions smaller inside the guest first, the last one last"


def resize(host: Host, path: Path, size: int, *, shrink: bool) -> bool:
    """The disk has ``size`` bytes; whether that is a change."""
    changes.complete(host, [path])
    found = recognition.look(path)
    making.require_size(found.format, size)
    _require_resizable(found)
    if size == found.size:
        return False
    with changes.locked(host, [path], seen=[found]):
        changes.require_unused(host, path)
        steps: list[Step] = []
        if size < found.size:
            steps += _shrinking(found, size, shrink=shrink)
        steps.append(image_plan.SetSize(str(path), found.format.value, size, shrink=size < found.size))
        plan = changes.plan_of("image resize", f"resize of {path}", steps)
        changes.require_approval(host, plan)
        changes.run(host, plan, path)
    return True


def _require_resizable(found: Recognised) -> None:
    if found.format is ImageFormat.VHDX:
        raise errors.Unsupported(
            f"{found.path} is a VHDX, which nothing here can resize",
            hint=f"convert it, resize that: hvmgr image convert {shlex.quote(str(found.path))} NEW.qcow2",
        )
    if found.format is ImageFormat.VHD and found.is_differencing:
        raise errors.Unsupported(
            f"{found.path} is a differencing VHD: its size is that of its parent",
            hint=f"merge it, or convert it and resize that: hvmgr image convert {shlex.quote(str(found.path))} NEW.vhd",
        )
    if found.format is ImageFormat.QCOW2:
        recognition.require_no_differencing_below(found.path)


def _shrinking(found: Recognised, size: int, *, shrink: bool) -> list[Step]:
    """What has to come before the cut; refused where a partition would lose its end."""
    with disks.opened(found) as disk:
        table, least = partitions.read(disk), partitions.least_size(disk)
    if size < least:
        if table is None:
            why = "it has no partition table, so that nobody can tell where its data ends"
        elif table.fault is not None:
            why = f"its partition table is damaged: {table.fault}"
        else:
            why = f"its last partition ends at {units.format_size(table.end)}; {least} bytes are the least"
        raise errors.Conflict(f"{found.path} cannot be cut to {size} bytes: {why}", hint=_SHRINK_HINT, least=least)
    if not shrink:
        raise errors.UsageError(
            f"{size} bytes are less than the {found.size} that {found.path} has; what lies behind is lost",
            hint="give --shrink if that is meant",
        )
    if table is not None and table.scheme is partitions.Scheme.GPT:
        return [image_plan.FitPartitions(str(found.path), found.format.value, size)]
    return []


def compact(host: Host, path: Path) -> int:
    """Blocks of zeros take no space any more; how many bytes that gave back."""
    changes.complete(host, [path])
    found = recognition.look(path)
    _require_compactable(found)
    before = path.stat().st_blocks * 512
    with changes.locked(host, [path], seen=[found]):
        changes.require_unused(host, path, but=(Use.PARENT,))
        steps = [image_plan.CompactImage(str(path), found.format.value)]
        plan = changes.plan_of("image compact", f"compaction of {path}", steps)
        changes.require_approval(host, plan)
        changes.run(host, plan, path)
    return max(0, before - path.stat().st_blocks * 512)


def _require_compactable(found: Recognised) -> None:
    if found.format is ImageFormat.VHD and found.type is ImageType.FIXED:
        raise errors.Unsupported(
            f"{found.path} is fixed: all its blocks are there, and stay",
            hint=f"make a dynamic one: hvmgr image convert {shlex.quote(str(found.path))} NEW.vhd --dynamic",
        )
    if found.format is ImageFormat.VHDX:
        images.require_usable(found.path)
    if found.format is ImageFormat.QCOW2:
        facts = qemu_img.info(found.path, "qcow2")
        if facts.internal_snapshots or facts.bitmaps:
            raise errors.Unsupported(
                f"{found.path} holds internal snapshots or bitmaps, which a compaction would lose",
                hint="remove them first: qemu-img snapshot -d, qemu-img bitmap --remove",
            )
        recognition.require_no_differencing_below(found.path)
