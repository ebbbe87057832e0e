"""``image prepare``: a partition table and file systems on a blank image, or a new image that has them. No root, no device."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors
from hvmgr.host import formatting
from hvmgr.model import disk_layout, image_plan
from hvmgr.model.disk_layout import FileSystem, Layout, LayoutWish, TableKind, Volume
from hvmgr.model.image_format import ImageFormat
from hvmgr.model.image_info import ImageOptions
from hvmgr.model.plan import Step
from hvmgr.operations import image_users
from hvmgr.operations.images import changes, disks, making, recognition, volumes
from hvmgr.operations.images.recognition import Recognised
from hvmgr.storage import allocation, durable, holes, index

if TYPE_CHECKING:
    from hvmgr.operations.host import Host

# Puts what it is about onto the main volume, which lies in a file of its own; without one it is formatted empty.
Fill = Callable[[Path, Volume], None]


def default_file_system(fmt: ImageFormat) -> FileSystem:
    """What systems read that use images of the format."""
    return FileSystem.NTFS if fmt in (ImageFormat.VHD, ImageFormat.VHDX) else FileSystem.EXT4


def prepare(host: Host, path: Path, wish: LayoutWish, *, force: bool) -> Layout:
    """The blank image has the layout; with ``force`` whatever it holds is lost."""
    changes.complete(host, [path])
    found = recognition.look(path)
    volumes.require_writable(found)
    layout = disk_layout.laid_out(wish, found.size)
    formatting.require(layout)
    with changes.locked(host, [path], seen=[found]):
        require_free(host, path, found, force=force)
        if not force:
            _require_blank(host, found)
        with volumes.changing(host, path, found, f"image prepare of {path}") as work:
            work.approve(*steps_of(layout))
            work.write(build(work.place, found.size, layout), 0)
    return layout


def make_new(
    host: Host, path: Path, size: int, options: ImageOptions, wish: LayoutWish, *,
    subject: str, steps: list[Step] | None = None, fill: Fill | None = None,
) -> Layout:  # fmt: skip
    """A new image with the layout, complete or absent; ``fill`` makes its main volume, ``steps`` say how."""
    fmt = recognition.format_of(path, options.format)
    making.require_size(fmt, size)
    layout = disk_layout.laid_out(wish, size)
    formatting.require(layout)
    making.require_new(path)
    make = image_plan.MakeImage(str(path), fmt.value, "fixed" if options.fixed else "dynamic", size, None, None, None)
    plan = changes.plan_of(subject.partition(" of ")[0], subject, [*steps_of(layout), *(steps or []), make])
    changes.require_approval(host, plan)
    with index.making(path, wait_s=host.wait_s), volumes.working(path) as place:
        work = build(place, size, layout, fill=fill)
        with volumes.stoppable(host) as report, making.named(path) as part:
            making.convert_raw(work, part, path, fmt, fixed=options.fixed, report=report)
    return layout


def steps_of(layout: Layout) -> list[Step]:
    """What is done, in words."""
    found: list[Step] = []
    if layout.table is not TableKind.NONE:
        found.append(image_plan.PrepareWork(f"write a partition table ({layout.table.value.upper()})"))
    for one in layout.volumes:
        where = "the whole disk" if one.number == 0 else f"partition {one.number}"
        found.append(image_plan.PrepareWork(f"{where}: {one.describe()}"))
    return found


def build(place: Path, size: int, layout: Layout, *, fill: Fill | None = None) -> Path:
    """A file with the whole disk: its table, and each volume formatted or filled."""
    disk = place / "disk"
    allocation.make_sized(disk, size, filled=False)
    if layout.table is not TableKind.NONE:
        formatting.write_table(disk, layout)
    for one in layout.volumes:
        if one.file_system is None:
            continue
        file = place / f"volume{one.number}"
        allocation.make_sized(file, one.size, filled=False)
        if fill is not None and one is layout.main:
            fill(file, one)
        else:
            formatting.make(file, one)
        _put(file, disk, one.start)
        durable.remove(file)
    return disk


def _put(file: Path, disk: Path, offset: int) -> None:
    """The data of a volume's file stands at its place in the disk's; the kernel moves it, holes stay."""
    with durable.explained(disk), file.open("rb") as source, disk.open("r+b") as target:
        size = os.fstat(source.fileno()).st_size
        for start, end in holes.data_ranges(source.fileno(), size):
            holes.copy_range(source.fileno(), target.fileno(), start, end, offset + start)


def require_free(host: Host, path: Path, found: Recognised, *, force: bool) -> None:
    """Conflict when anybody needs the image; where its data is going to be lost, a VM that is off does, too."""
    if found.is_differencing:
        raise errors.Conflict(
            f"{path} is a differencing image: what it shows is its parent's, too",
            hint="prepare the base, or make an image of its own: hvmgr image create",
        )
    if force:
        for user in image_users.of(host, path):
            raise changes.needed(path, user, {entry.name for entry in index.entries()})
    changes.require_unused(host, path)


def _require_blank(host: Host, found: Recognised) -> None:
    with volumes.stoppable(host) as report, disks.opened(found) as disk:
        if volumes.is_blank(disk, report):
            return
        held = [one.describe() for one in volumes.volumes_of(disk) if one.file_system is not None]
    what = f": {', '.join(held)}" if held else ""
    raise errors.Conflict(
        f"{found.path} holds data{what}",
        hint=f"--force prepares it all the same, and its data is lost; look at it first: hvmgr image attach --read-only "
        f"{shlex.quote(str(found.path))}",
    )
