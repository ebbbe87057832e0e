"""``wim apply``: an image of a WIM onto an NTFS volume of a disk, or a Linux tree onto an ext4 one.

Everything is done in a file beside the disk's image, and written into it when all has gone well (``volumes``): a damaged
WIM, a full volume, Ctrl-C leave the image as it was. wimlib fills such a file many times faster than an image, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors, units
from hvmgr.host import e2fsprogs, formatting, ntfs, wimlib
from hvmgr.model import disk_layout, image_plan
from hvmgr.model.disk_layout import FileSystem, Role, Volume
from hvmgr.model.wim_options import Applied, WimApplyOptions
from hvmgr.operations.images import changes, disks, linux_tree, preparing, recognition, sysprep, volumes, wims
from hvmgr.storage import allocation, durable
from hvmgr.vhd.source import Source

if TYPE_CHECKING:
    from hvmgr.host.wimlib import WimImage
    from hvmgr.operations.host import Host
    from hvmgr.operations.images.volumes import Found

# What Windows makes on every volume by itself.
_OF_NOBODY = {"System Volume Information", "$RECYCLE.BIN", "RECYCLER"}
_SAVED = "lost+found"
# Fills the volume in a file, which is formatted already unless it is ext4.
Fill = Callable[[Path, Volume, disks.Report], None]


def apply(host: Host, source: Path, path: Path, wish: WimApplyOptions) -> Applied:
    """The image of the WIM ``source``, or the tree, is on a volume of ``path``."""
    if path.is_dir():
        raise errors.UsageError(
            f"{path} is a folder: security descriptors, streams and attributes of Windows would be lost there",
            hint="name a disk image; without those, wimlib-imagex apply fills a folder",
        )
    warnings: list[str] = []
    if wish.rootfs:
        return _apply_tree(host, source, path, wish)
    found = wimlib.info(source)
    if found.part[1] > 1:
        raise errors.Unsupported(
            f"{source} is one part of a split WIM", hint="join the parts first: wimlib-imagex join"
        )
    image = wims.picked(found, wish.image)
    windows = sysprep.in_wim(source, image.index)
    if windows is not None and (warning := windows.warning(f"image {image.index} of {source}")):
        host.reporter.notice(warning)

    def fill(file: Path, volume: Volume, report: disks.Report) -> None:
        require_fits(image, volume.size)
        warnings.extend(wimlib.apply(source, image.index, file, report))

    title = f"apply image {image.index} ('{image.name}') of {source}"
    done = _apply(host, path, wish, FileSystem.NTFS, title, fill)
    for one in warnings:
        host.reporter.notice(one)
    return replace(done, source=image.name or str(image.index), warnings=tuple(warnings))


def require_fits(image: WimImage, size: int) -> None:
    """NoSpace when the files of an image are more than a volume can hold."""
    if image.total > size:
        raise errors.NoSpace(
            f"image {image.index} has {units.format_size(image.total)} of files, the volume {units.format_size(size)}",
            hint="use a larger disk: hvmgr image resize, or --size",
        )


def _apply_tree(host: Host, source: Path, path: Path, wish: WimApplyOptions) -> Applied:
    if wish.image is not None:
        raise errors.UsageError("a Linux tree has no images to choose from", hint="leave --image out")
    e2fsprogs.require()
    tree = linux_tree.opened(source)

    def fill(file: Path, volume: Volume, report: disks.Report) -> None:
        tree.fill(file, volume, report)

    done = _apply(host, path, wish, FileSystem.EXT4, f"apply the tree {source}", fill)
    return replace(done, source=str(source))


def _apply(host: Host, path: Path, wish: WimApplyOptions, fs: FileSystem, title: str, fill: Fill) -> Applied:
    if wish.size is not None:
        return _apply_to_new(host, path, wish, fs, title, fill)
    changes.complete(host, [path])
    found = recognition.look(path)
    volumes.require_writable(found)
    kind = "ext" if fs is FileSystem.EXT4 else "ntfs"
    with changes.locked(host, [path], seen=[found]):
        changes.require_unused(host, path)
        with disks.opened(found) as disk:
            volume = _chosen(path, volumes.volumes_of(disk), kind, wish)
            label = wish.layout.label or _label_of(disk, volume)
        disk_layout.require_label(fs, label)
        goal = Volume(volume.number, Role.MAIN, volume.offset, volume.size, fs, label)
        steps = [
            *([image_plan.PrepareWork(f"format {volume.describe()} anew")] if wish.reformat else []),
            image_plan.PrepareWork(f"{title} to {volume.describe()}"),
        ]
        with (
            volumes.changing(host, path, found, f"wim apply of {path}") as work,
            volumes.stoppable(host) as report,
        ):
            work.approve(*steps)
            file = work.place / "volume"
            if wish.reformat:
                allocation.make_sized(file, volume.size, filled=False)
            else:
                volumes.copied_out(found, volume, file, report)
                _require_empty(file, path, volume, kind)
            if fs is FileSystem.EXT4 and not wish.reformat:  # mke2fs makes the volume with all that is in it
                durable.remove(file)
                allocation.make_sized(file, volume.size, filled=False)
            elif wish.reformat and fs is FileSystem.NTFS:
                formatting.make(file, goal)
            fill(file, goal, report)
            work.write(file, volume.offset)
    return Applied(path, volume.number, is_new=False, source="")


def _apply_to_new(host: Host, path: Path, wish: WimApplyOptions, fs: FileSystem, title: str, fill: Fill) -> Applied:
    if wish.partition is not None or wish.reformat:
        raise errors.UsageError("a new disk has no partitions yet", hint="leave --partition and --reformat out")
    assert wish.size is not None

    def make(file: Path, volume: Volume) -> None:
        if fs is FileSystem.NTFS:
            formatting.make(file, volume)
        with volumes.stoppable(host) as report:
            fill(file, volume, report)

    layout = preparing.make_new(
        host, path, wish.size, wish.new, replace(wish.layout, file_system=fs),
        subject=f"wim apply of {path}", steps=[image_plan.PrepareWork(title)], fill=make,
    )  # fmt: skip
    return Applied(path, layout.main.number, is_new=True, source="")


def _chosen(path: Path, found: list[Found], kind: str, wish: WimApplyOptions) -> Found:
    """The volume with that file system; one that is to be formatted, and is named, may hold none that is known."""
    if wish.reformat and wish.partition is not None:
        one = next((one for one in found if one.number == wish.partition), None)
        if one is not None and one.file_system is None:
            return one
    try:
        return volumes.chosen(path, found, kind, wish.partition)
    except errors.NotFound as error:
        if wish.partition is None:
            error.hint = f"{error.hint}; make one: hvmgr image prepare"
        raise


def _label_of(disk: Source, volume: Found) -> str:
    """The label that a volume of ext has now."""
    if volume.file_system != "ext":
        return ""
    part = disks.Part(disk, volume.offset, volume.size)
    raw = bytearray(16)
    part.read_into(1024 + 120, memoryview(raw))
    return bytes(raw).partition(b"\0")[0].decode("utf-8", "replace")


def _require_empty(file: Path, path: Path, volume: Found, kind: str) -> None:
    if kind == "ext":
        e2fsprogs.replay(file)  # what a system wrote last may be in its journal only
        held = list(_held(file))
    else:
        held = [one for one in ntfs.names(file) if one not in _OF_NOBODY]
    if held:
        raise errors.Conflict(
            f"{volume.describe()} of {path} holds files: {', '.join(held[:5])}{', …' if len(held) > 5 else ''}",
            hint="--reformat formats it anew, and they are lost",
        )


def _held(file: Path) -> Iterator[str]:
    """What is on an ext volume; e2fsck makes the folder lost+found, and what it saved there is somebody's."""
    for one in e2fsprogs.entries(file, "/"):
        if one.name == _SAVED and one.is_folder:
            yield from (f"{_SAVED}/{inner.name}" for inner in e2fsprogs.entries(file, f"/{_SAVED}"))
        else:
            yield one.name
