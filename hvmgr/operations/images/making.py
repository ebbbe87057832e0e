"""New image files: empty ones, and those that show the disk of another. Complete or absent, and never in another's place."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors, units, vhd
from hvmgr.host import image_locks, qemu_img
from hvmgr.model import image_plan
from hvmgr.model.image_format import ImageFormat
from hvmgr.model.image_info import ImageOptions, ImageType, Use
from hvmgr.model.plan import Plan
from hvmgr.model.progress import Progress
from hvmgr.operations import image_users
from hvmgr.operations.images import acts, changes, disks, recognition
from hvmgr.operations.images.recognition import Recognised
from hvmgr.storage import allocation, durable, images, index
from hvmgr.vhd.creation import describe_parent

if TYPE_CHECKING:
    from hvmgr.operations.host import Host

VHD_MAX = 2040 * units.GIB
VHDX_MAX = 64 * units.TIB
_SECTOR = 512
# What Windows takes for a VHD is 512 KiB and 2 MiB; the format knows any power of two from a sector on.
_VHD_BLOCKS = (512 * units.KIB, 256 * units.MIB)
_VHDX_BLOCKS = (units.MIB, 256 * units.MIB)
_QCOW2_CLUSTERS = (512, 2 * units.MIB)
_VHD_DEFAULT_BLOCK = 2 * units.MIB
_VHDX_DEFAULT_BLOCK = 32 * units.MIB


def create(host: Host, path: Path, size: int | None, wish: ImageOptions) -> None:
    """An empty image; with a parent a differencing one of the parent's size."""
    fmt = recognition.format_of(path, wish.format)
    parent = None if wish.parent is None else _parent(host, wish.parent, fmt, wish)
    if parent is not None and size is not None and size != parent.size:
        if fmt is ImageFormat.VHD or size < parent.size:
            raise errors.UsageError(
                f"a differencing image of {parent.path} has its size, {parent.size} bytes", hint="leave --size out"
            )
    elif parent is not None:
        size = parent.size
    if size is None:
        raise errors.UsageError("an image without a parent needs a size", hint="give it with --size, as in --size 10G")
    require_size(fmt, size)
    _require_block_size(fmt, wish)
    step = image_plan.MakeImage(
        path=str(path), format=fmt.value, type=_type(wish).value, size=size,
        parent=None if parent is None else str(parent.path), parent_format=None if parent is None else parent.driver,
        block_size=wish.block_size,
    )  # fmt: skip
    plan = changes.plan_of("image create", f"creation of {path}", [step])
    with _approved(host, plan, path, parent) as part:
        make(part, path, step)


def convert(host: Host, source: Path, path: Path, wish: ImageOptions) -> None:
    """An image that shows the same bytes in a disk of the same size."""
    fmt = recognition.format_of(path, wish.format)
    stated = wish.source_format
    if stated is not ImageFormat.RAW:
        changes.complete(host, recognition.known_chain(source, wish.folders))
    found = recognition.look(source, stated, folders=wish.folders)
    if found.format is ImageFormat.VHDX and found.is_differencing:
        images.require_usable(source)
    _tell_of_parents(host, found)
    parent = None if wish.parent is None else _parent(host, wish.parent, fmt, wish)
    if parent is not None and parent.size != found.size:
        raise errors.Conflict(
            f"{parent.path} has another size than {source}: {parent.size} and {found.size} bytes",
            hint="only a disk of the same size can be its parent",
        )
    require_size(fmt, found.size)
    _require_block_size(fmt, wish)
    if wish.keep_id and (fmt is not ImageFormat.VHD or found.format is not ImageFormat.VHD):
        raise errors.UsageError("--keep-id is for a VHD that is made of a VHD: nothing else has such an id")
    step = image_plan.ConvertImage(
        source=str(source), source_format=found.format.value, path=str(path), format=fmt.value,
        type=_type(wish).value, parent=None if parent is None else str(parent.path),
        parent_format=None if parent is None else parent.driver, keep_id=wish.keep_id, block_size=wish.block_size,
    )  # fmt: skip
    plan = changes.plan_of("image convert", f"conversion of {source} into {path}", [step])
    with _approved(host, plan, path, parent, found) as part:
        _convert(found, parent, part, path, step, host.reporter.progress)


def _tell_of_parents(host: Host, found: Recognised) -> None:
    """Who made an image says what it stands on, and that may be any file of this host: it would be in the result."""
    folder = Path(os.path.realpath(found.path)).parent
    for parent in recognition.known_chain(found.path, found.folders)[1:] if found.is_differencing else ():
        if not parent.is_relative_to(folder):
            host.reporter.notice(f"{found.path} stands on {parent}, whose content becomes a part of the new image")


@contextlib.contextmanager
def _approved(
    host: Host, plan: Plan, path: Path, parent: Recognised | None, source: Recognised | None = None
) -> Iterator[Path]:
    """The place of the new file, once its plan is wanted; nobody writes what it is made of meanwhile."""
    require_new(path)
    if parent is not None:
        _warn_of_users(host, parent)
    changes.require_approval(host, plan)
    with index.making(path, wait_s=host.wait_s), kept_still(host, source, parent), named(path) as part:
        yield part


def _parent(host: Host, path: Path, fmt: ImageFormat, wish: ImageOptions) -> Recognised:
    """The parent of a new image, which has to be one that a child of this format can have."""
    changes.complete(host, recognition.known_chain(path, wish.folders))
    if wish.fixed:
        raise errors.UsageError("a differencing image is neither fixed nor dynamic", hint="leave --fixed out")
    found = recognition.look(path, folders=wish.folders)
    if fmt is ImageFormat.VHD and found.format is not ImageFormat.VHD:
        raise errors.Unsupported(
            f"{path} is a {found.format.value} image; the parent of a differencing VHD is a VHD",
            hint="convert it first: hvmgr image convert, or make a qcow2 child with --format qcow2",
        )
    if fmt is ImageFormat.QCOW2 and found.format not in (ImageFormat.QCOW2, ImageFormat.RAW, ImageFormat.VHD):
        raise errors.Unsupported(
            f"{path} is a {found.format.value} image, on which libvirt runs no qcow2 image",
            hint="convert it first: hvmgr image convert",
        )
    if fmt is ImageFormat.QCOW2:
        images.read(path, found.driver)  # refuses what QEMU would read wrongly: a differencing VHD above all
        if found.format is ImageFormat.VHD and not vhd.qemu_reads_alike(path):
            raise errors.Unsupported(
                f"QEMU would read {path} in another way than its format says",
                hint=f"see hvmgr image check {shlex.quote(str(path))}, or convert it: hvmgr image convert",
            )
    elif fmt is not ImageFormat.VHD:
        raise errors.Unsupported(
            f"a {fmt.value} image has no parent here", hint="differencing images are VHD (.vhd, .avhd) or qcow2"
        )
    return found


def _type(wish: ImageOptions) -> ImageType:
    if wish.parent is not None:
        return ImageType.DIFFERENCING
    return ImageType.FIXED if wish.fixed else ImageType.DYNAMIC


def require_new(path: Path) -> None:
    """Refuses a name that is taken, or whose folder is not there."""
    with durable.explained(path):
        if os.path.lexists(path):
            raise errors.Conflict(f"{path} exists already", hint="choose another name: nothing is ever replaced")
        if not path.parent.is_dir():
            raise errors.NotFound(f"there is no folder {path.parent}")


def require_size(fmt: ImageFormat, size: int) -> None:
    """Refuses a size that no image of the format can have."""
    if size <= 0:
        raise errors.UsageError("a disk of 0 bytes is none", hint="give a size such as 10G")
    if size % _SECTOR and fmt is not ImageFormat.RAW:
        raise errors.UsageError(
            f"{size} bytes are no whole number of sectors of 512 bytes",
            hint=f"the next larger size is {-(-size // _SECTOR) * _SECTOR}",
        )
    largest = {ImageFormat.VHD: VHD_MAX, ImageFormat.VHDX: VHDX_MAX}.get(fmt)
    if largest is not None and size > largest:
        raise errors.Unsupported(
            f"a {fmt.value.upper()} has at most {units.format_size(largest)} ({largest} bytes), not {size}",
            hint="qcow2 and raw can be larger" + ("; so can vhdx" if fmt is ImageFormat.VHD else ""),
        )


def _require_block_size(fmt: ImageFormat, wish: ImageOptions) -> None:
    block = wish.block_size
    if block is None:
        return
    ranges = {ImageFormat.VHD: _VHD_BLOCKS, ImageFormat.VHDX: _VHDX_BLOCKS, ImageFormat.QCOW2: _QCOW2_CLUSTERS}
    if fmt not in ranges or (fmt is ImageFormat.VHD and wish.fixed):
        raise errors.UsageError("such an image has no blocks", hint="leave --block-size out")
    least, most = ranges[fmt]
    if not least <= block <= most or block & (block - 1):
        raise errors.UsageError(
            f"{block} bytes are no block size of {fmt.value}",
            hint=f"a power of two from {units.format_size(least)} to {units.format_size(most)}",
        )


@contextlib.contextmanager
def kept_still(host: Host, *read: Recognised | None) -> Iterator[None]:
    """Nobody writes the images that are read, nor what they stand on: no command of hvmgr's, and no QEMU."""
    chains = [recognition.known_chain(one.path, one.folders) for one in read if one is not None]
    paths = list(dict.fromkeys(path for chain in chains for path in chain))
    with index.locked(paths, wait_s=host.wait_s), contextlib.ExitStack() as stack:
        for path in paths:
            stack.enter_context(image_locks.held(path, writable=False))
        changes.require_settled(paths)
        yield


@contextlib.contextmanager
def named(path: Path) -> Iterator[Path]:
    """Where the new file is made; what goes wrong there is said of the name that the user gave."""
    try:
        with durable.appearing(path) as part:
            yield part
    except errors.NoSpace as error:
        raise errors.NoSpace(f"no space left for {path}", hint="free space there and run it again") from error
    except errors.HvmgrError as error:
        error.message = error.message.replace(str(durable.part_of(path)), str(path))
        raise


def _warn_of_users(host: Host, parent: Recognised) -> None:
    """A parent must stay as it is; a VM to which it belongs does not know of the new image."""
    for user in image_users.of(host, parent.path):
        if user.use in (Use.OFF, Use.SAVED):
            host.reporter.notice(
                f"{user.name} writes to {parent.path} when it runs: the new image is wrong from then on"
            )
        elif user.vm is not None:
            host.reporter.notice(
                f"{parent.path} belongs to {user.name}, whose commands may merge or remove it: the new image is lost then"
            )


# --- the bytes ------------------------------------------------------------------------------------------------------


def make(part: Path, path: Path, step: image_plan.MakeImage) -> None:
    """The new image of a step, at ``part``, which is going to be ``path``."""
    fmt = ImageFormat(step.format)
    if fmt is ImageFormat.VHD:
        parent = None if step.parent is None else Path(step.parent)
        vhd.create(part, step.size, kind=vhd.Kind(step.type), parent=parent, block_size=step.block_size)
        if step.type == ImageType.FIXED:
            allocation.fill(part)
    elif fmt is ImageFormat.RAW:
        allocation.make_sized(part, step.size, filled=step.type == ImageType.FIXED)
    else:
        backing = None
        if step.parent is not None:
            backing = (acts.relative_name(path, Path(step.parent)), step.parent_format or "")
        qemu_img.create(part, fmt.value, size=step.size, options=_options(fmt, step), backing=backing)


def _options(fmt: ImageFormat, step: image_plan.MakeImage | image_plan.ConvertImage) -> list[str]:
    if fmt is ImageFormat.VHDX:
        return [f"subformat={step.type}", f"block_size={step.block_size or _VHDX_DEFAULT_BLOCK}"]
    if fmt is ImageFormat.RAW:
        return []
    found = [] if step.block_size is None else [f"cluster_size={step.block_size}"]
    return [*found, "preallocation=falloc"] if step.type == ImageType.FIXED else found


def _convert(
    found: Recognised,
    parent: Recognised | None,
    part: Path,
    path: Path,
    step: image_plan.ConvertImage,
    report: disks.Report,
) -> None:
    fmt, what = ImageFormat(step.format), f"write {path.name}"
    if fmt is ImageFormat.VHD:
        _convert_to_vhd(found, parent, part, path, step, what, report)
    elif parent is not None:
        _convert_to_child(found, parent, part, path, step, what, report)
    elif not _is_for_qemu(found, fmt):
        with disks.opened(found) as disk:
            if fmt is ImageFormat.RAW:
                vhd.write_raw(part, disk, on_progress=_counted(what, report))
            else:
                qemu_img.create(part, fmt.value, size=disk.size, options=_options(fmt, step))
                disks.write_qemu(part, fmt.value, disk, what=what, report=report)
    else:
        recognition.require_whole(found)
        qemu_img.flatten(
            found.path, found.driver, part, target_fmt=fmt.value, options=_options(fmt, step),
            on_progress=lambda done: report(Progress(min(done, found.size), found.size, what)),
        )  # fmt: skip
    if fmt is ImageFormat.RAW and step.type == ImageType.FIXED:
        allocation.fill(part)


def _convert_to_child(
    found: Recognised,
    parent: Recognised,
    part: Path,
    path: Path,
    step: image_plan.ConvertImage,
    what: str,
    report: disks.Report,
) -> None:
    backing = (acts.relative_name(path, parent.path), parent.driver)
    with disks.opened(found) as disk, disks.opened(parent) as below:
        qemu_img.create(part, "qcow2", size=disk.size, options=_options(ImageFormat.QCOW2, step), backing=backing)
        disks.write_difference(part, disk, below, what=what, report=report)


def convert_raw(work: Path, part: Path, path: Path, fmt: ImageFormat, *, fixed: bool, report: disks.Report) -> None:
    """The disk in the raw file ``work`` becomes a new image at ``part``, which is going to be ``path``."""
    found = recognition.look(work, ImageFormat.RAW)
    kind = ImageType.FIXED if fixed else ImageType.DYNAMIC
    step = image_plan.ConvertImage(
        source=str(work), source_format=found.format.value, path=str(path), format=fmt.value, type=kind.value,
        parent=None, parent_format=None, keep_id=False, block_size=None,
    )  # fmt: skip
    _convert(found, None, part, path, step, report)


def _is_for_qemu(found: Recognised, fmt: ImageFormat) -> bool:
    """Whether QEMU converts it, where the result is not raw: all that it reads as the codec does."""
    if found.format is ImageFormat.VHD:
        return fmt is not ImageFormat.RAW and vhd.qemu_reads_alike(found.path)
    return not found.format is fmt is ImageFormat.RAW


def _convert_to_vhd(
    found: Recognised,
    parent: Recognised | None,
    part: Path,
    path: Path,
    step: image_plan.ConvertImage,
    what: str,
    report: disks.Report,
) -> None:
    uid = None
    if step.keep_id:
        with vhd.open_image(found.path) as image:
            uid = image.uid

    size = step.block_size or _VHD_DEFAULT_BLOCK
    with disks.opened(found) as disk, contextlib.ExitStack() as stack:
        if parent is None:
            vhd.write_image(
                part, disk, kind=vhd.Kind(step.type), block_size=size, uid=uid, on_progress=_counted(what, report)
            )
            return
        below = stack.enter_context(disks.opened(parent))
        origin = describe_parent(path, parent.path)
        difference = disks.Difference(disk, below, what, report)
        vhd.write_image(part, difference, kind=vhd.Kind.DIFFERENCING, block_size=size, parent=origin, uid=uid)


def _counted(what: str, report: disks.Report) -> Callable[[int, int], None]:
    return lambda done, total: report(Progress(done, total, what))
