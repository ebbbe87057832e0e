"""``image check``: VHD by our own codec with every rule of its format, everything else by QEMU. And the repair of both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors
from hvmgr.host import qemu_img
from hvmgr.model import image_plan
from hvmgr.model.image_format import ImageFormat
from hvmgr.model.image_info import FaultSeverity, ImageCheck, ImageFault, Use
from hvmgr.operations.images import changes, recognition
from hvmgr.storage import images

if TYPE_CHECKING:
    from hvmgr.operations.host import Host
    from hvmgr.vhd.rules import Fault

_LEAKS = "leaks"  # a matter of space, yet put right when somebody asks


def check(host: Host, path: Path, *, chain: bool, repair: bool, folders: Sequence[Path] = ()) -> ImageCheck:
    """What is wrong with the image, and with its chain; with ``repair`` also what was put right, and what is left."""
    fmt = _format(path)
    found = _faults(path, fmt, folders, chain=chain)
    mended = [one for one in found if one.path == path and _is_repairable(one)]
    if not repair or not mended:
        return ImageCheck(path, fmt.value, tuple(found))
    with changes.locked(host, [path]):
        changes.require_unused(host, path, but=(Use.PARENT,))
        plan = changes.plan_of("image check", f"repair of {path}", [image_plan.RepairImage(str(path), fmt.value)])
        changes.require_approval(host, plan)
        changes.run(host, plan, path)
    left = _faults(path, fmt, folders, chain=chain)
    return ImageCheck(path, fmt.value, tuple(left), tuple(one for one in mended if one not in left))


def _is_repairable(one: ImageFault) -> bool:
    return one.severity is FaultSeverity.REPAIRABLE or one.code == _LEAKS


def _format(path: Path) -> ImageFormat:
    """By content alone: what is damaged is to be checked, too."""
    word = images.identify(path).format
    if word not in recognition.MADE:
        raise errors.Unsupported(f"{path} is a {word.upper()} image, which is not checked here")
    return ImageFormat(word)


def _faults(path: Path, fmt: ImageFormat, folders: Sequence[Path], *, chain: bool) -> list[ImageFault]:
    if fmt is ImageFormat.VHD:
        return _vhd_faults(path, folders, chain=chain)
    found = _qemu_faults(path, fmt)
    if chain and fmt is ImageFormat.QCOW2:
        below = images.read(path, images.QCOW2).parent
        if below is not None and not below.exists():
            found.append(ImageFault(path, "parent-missing", FaultSeverity.ERROR, f"its parent {below} is missing"))
        elif below is not None:
            found += _faults(below, _format(below), folders, chain=True)
    return found


def _vhd_faults(path: Path, folders: Sequence[Path], *, chain: bool) -> list[ImageFault]:
    from hvmgr import vhd

    return [_of_codec(path, one) for one in vhd.check(path, chain=chain, folders=folders)]


def _of_codec(path: Path, one: Fault) -> ImageFault:
    return ImageFault(one.path or path, one.code, FaultSeverity(one.severity.value), one.text, one.offset)


def _raw_faults(path: Path) -> list[ImageFault]:
    """Any bytes are a raw disk; yet a fixed VHD whose end is lost, or a file that was emptied, looks like one as well."""
    wanted = recognition.named_format(path)
    if wanted in (None, ImageFormat.RAW):
        return []
    sentence = f"its name says {wanted}, and nothing in it does: it is read as a raw disk"
    return [ImageFault(path, "other-format", FaultSeverity.ERROR, sentence)]


def _qemu_faults(path: Path, fmt: ImageFormat) -> list[ImageFault]:
    if fmt is ImageFormat.RAW:
        return _raw_faults(path)
    if fmt is ImageFormat.VHDX:
        images.require_usable(path)
    elif fmt is ImageFormat.QCOW2:
        images.read(path, images.QCOW2)
    try:
        result = qemu_img.check(path, fmt.value)
    except errors.Corrupt as error:
        return [ImageFault(path, "corrupt", FaultSeverity.ERROR, str(error))]
    found = []
    if not result.is_sound:
        sentence = f"{result.corruptions} corruptions, {result.check_errors} places that could not be checked"
        found.append(ImageFault(path, "corruptions", FaultSeverity.ERROR, sentence))
    if result.leaks:
        sentence = f"{result.leaks} clusters that nothing uses; they cost space, nothing else"
        found.append(ImageFault(path, _LEAKS, FaultSeverity.WARNING, sentence))
    return found
