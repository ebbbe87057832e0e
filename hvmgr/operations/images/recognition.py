"""What an image file is, by its content or as the user states it; and the file that it stands on.

QEMU is never asked to guess, and never shown a differencing VHD.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hvmgr import errors
from hvmgr.model.image_format import ImageFormat
from hvmgr.model.image_info import ImageType
from hvmgr.storage import images, vhdx

_SUFFIXES = {
    ".vhd": ImageFormat.VHD,
    ".avhd": ImageFormat.VHD,
    ".vhdx": ImageFormat.VHDX,
    ".qcow2": ImageFormat.QCOW2,
    ".raw": ImageFormat.RAW,
    ".img": ImageFormat.RAW,
}
# Formats that commands make; others are read where somebody states them.
MADE = (ImageFormat.VHD, ImageFormat.VHDX, ImageFormat.QCOW2, ImageFormat.RAW)


@dataclass(frozen=True, slots=True)
class Recognised:
    """One image: its format, how it keeps its data, and the size of its disk in bytes.

    ``folders`` are where parents are looked for besides their children; ``faults`` what is wrong and was read over.
    """

    path: Path
    format: ImageFormat
    type: ImageType
    size: int
    folders: tuple[Path, ...] = ()
    faults: tuple[str, ...] = ()

    @property
    def driver(self) -> str:
        """QEMU's word for the format."""
        return images.VPC if self.format is ImageFormat.VHD else self.format.value

    @property
    def is_differencing(self) -> bool:
        """Whether it shows its disk only together with a parent."""
        return self.type is ImageType.DIFFERENCING


def look(
    path: Path, stated: ImageFormat | None = None, *, folders: Sequence[Path] = (), tolerant: bool = False
) -> Recognised:
    """The image at ``path``; raises NotFound, Corrupt, or Unsupported for a format that is not known here.

    ``tolerant`` reads over what is wrong with a VHD as long as the rest can be believed.
    """
    if path.is_dir():
        raise errors.UsageError(f"{path} is a folder, not an image")
    known = stated or _by_content(path)
    if known is ImageFormat.VHD:
        return _vhd(path, tuple(folders), tolerant=tolerant)
    if known is ImageFormat.VHDX:
        return _vhdx(path)
    if known is ImageFormat.QCOW2:
        header = images.read(path, images.QCOW2)
        kind = ImageType.DYNAMIC if header.backing is None else ImageType.DIFFERENCING
        return Recognised(path, known, kind, header.size)
    if known is ImageFormat.RAW:
        length = images.length(path)
        return Recognised(path, known, ImageType.FIXED, length)
    if stated is None:
        raise errors.Unsupported(
            f"{path} is a {known.value.upper()} image",
            hint=f"only converting it is possible, and only when you say that you trust the file: --source-format {known.value}",
        )
    return Recognised(path, known, ImageType.DYNAMIC, _asked_size(path, known))


def _by_content(path: Path) -> ImageFormat:
    found = images.identify(path).format
    try:
        return ImageFormat(found)
    except ValueError:
        raise errors.Unsupported(
            f"{path} is a {found.upper()} image",
            hint=f"convert it: qemu-img convert -f {found} -O qcow2 {shlex.quote(str(path))} NEW.qcow2",
        ) from None


def _vhd(path: Path, folders: tuple[Path, ...], *, tolerant: bool) -> Recognised:
    from hvmgr import vhd

    with vhd.open_image(path, tolerant=tolerant) as image:
        faults = tuple(one.describe() for one in image.structure.faults)
        return Recognised(path, ImageFormat.VHD, ImageType(image.kind.value), image.size, folders, faults)


def _vhdx(path: Path) -> Recognised:
    facts = vhdx.read(path)
    if facts.is_differencing:
        return Recognised(path, ImageFormat.VHDX, ImageType.DIFFERENCING, facts.size)
    return Recognised(path, ImageFormat.VHDX, ImageType.FIXED if facts.is_fixed else ImageType.DYNAMIC, facts.size)


def _asked_size(path: Path, known: ImageFormat) -> int:
    from hvmgr.host import qemu_img

    return qemu_img.info(path, known.value).size


def parent_of(path: Path, folders: Sequence[Path] = ()) -> Path | None:
    """The file that a differencing image stands on, without opening it further; None for any other image.

    NotFound and Conflict as the parent of a VHD is searched for: by its names and by id, always proved by its id. Conflict
    where a qcow2 image states another format than its parent's content has.
    """
    found = images.identify(path)
    if found.format == images.QCOW2:
        header = images.read(path, images.QCOW2)
        _require_as_stated(header)
        return header.parent
    if found.format != "vhd" or not found.is_differencing:
        return None
    from hvmgr import vhd

    with vhd.open_image(path, tolerant=True) as image:
        return Path(os.path.realpath(vhd.find_parent(image, folders=folders)))


def _require_as_stated(child: images.Header) -> None:
    """A guest may write what looks like a header into its raw disk: what the child states and the content must agree."""
    if child.parent is None or child.backing_format is None or not child.parent.exists():
        return
    truth = images.identify(child.parent).format
    truth = images.VPC if truth == "vhd" else truth
    if child.backing_format != truth:
        raise errors.Conflict(
            f"{child.path} states that its parent {child.parent} is {child.backing_format}, and its content is {truth}",
            hint=f"a guest may have written that; if it is right, state it: {_restating(child, truth)}",
            path=str(child.parent),
        )


def chain_of(path: Path, folders: Sequence[Path] = ()) -> list[Path]:
    """The image and everything that it stands on, highest first; Corrupt for a circle, NotFound for a gap."""
    found = [Path(os.path.realpath(path))]
    while (parent := parent_of(found[-1], folders)) is not None:
        if parent in found:
            raise errors.Corrupt(f"the chain of {path} runs in a circle at {parent}", path=str(parent))
        if not parent.exists():
            raise errors.NotFound(f"there is no {parent}, on which {found[-1]} stands", path=str(parent))
        found.append(parent)
    return found


def known_chain(path: Path, folders: Sequence[Path] = ()) -> list[Path]:
    """As much of a chain as can be found, without a word about the rest."""
    found = [path]
    with contextlib.suppress(errors.HvmgrError, OSError):
        while (parent := parent_of(found[-1], folders)) is not None and parent not in found and parent.exists():
            found.append(parent)
    return found


def require_whole(found: Recognised) -> None:
    """Refuses what QEMU would not show as it is: a differencing VHD or VHDX, here or anywhere below a qcow2 image."""
    if found.format is ImageFormat.QCOW2:
        require_no_differencing_below(found.path)
    elif found.format is not ImageFormat.RAW:
        images.require_usable(found.path)


def require_no_differencing_below(path: Path) -> None:
    """Refuses a qcow2 image whose chain QEMU would have to guess, or in which it would meet a differencing VHD."""
    step: Path | None = Path(os.path.realpath(path))
    seen = set()
    while step is not None:
        if step in seen:  # qemu-img would go round for ever
            raise errors.Corrupt(f"the chain of {path} runs in a circle at {step}", path=str(step))
        seen.add(step)
        header = images.read(step, images.QCOW2)
        parent, stated = header.parent, header.backing_format
        if parent is None:
            return
        images.require_usable(parent)
        truth = images.identify(parent).format
        if stated is None and truth != images.QCOW2:
            raise unstated(header)
        if (stated or truth) != images.QCOW2:
            images.read(parent, stated or truth)
            return
        step = parent


def unstated(child: images.Header) -> errors.Unsupported:
    """The refusal of an image that does not say what its parent is."""
    return errors.Unsupported(
        f"{child.path} does not state the format of its parent, and QEMU would guess",
        hint=f"state it: {_restating(child, 'FORMAT')}",
    )


def _restating(child: images.Header, fmt: str) -> str:
    return f"qemu-img rebase -u -F {fmt} -b {shlex.quote(child.backing or '')} {shlex.quote(str(child.path))}"


def format_of(path: Path, stated: ImageFormat | None) -> ImageFormat:
    """The format that a new file is to have: as stated, else by its name."""
    if stated is not None:
        if stated not in MADE:
            raise errors.Unsupported(f"images of the format {stated.value} are not made here", hint=_choice())
        return stated
    found = named_format(path)
    if found is None:
        raise errors.UsageError(f"the name of {path} says no format", hint=f"state it with --format: {_choice()}")
    return found


def named_format(path: Path) -> ImageFormat | None:
    """The format that a file's name promises; None when it says none."""
    return _SUFFIXES.get(path.suffix.lower())


def _choice() -> str:
    return ", ".join(one.value for one in MADE)
