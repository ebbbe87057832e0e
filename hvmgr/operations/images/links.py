"""Chains as ``host/image_export`` takes them: every file with its format, and what QEMU would not read right left to our codec."""

from __future__ import annotations

import stat
from pathlib import Path

from hvmgr import errors
from hvmgr.host import image_export
from hvmgr.host.image_export import Link
from hvmgr.operations.images import recognition
from hvmgr.storage import images

VHDX = "vhdx"
_CHAIN_MAX = 200


def require_image(path: Path) -> None:
    """The path is that of a file or a block device."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise errors.NotFound(f"there is no {path}", path=str(path)) from error
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise errors.UsageError(f"{path} is no image file", hint="name an image file, or a block device")
    if images.length(path) == 0:
        raise errors.UsageError(f"{path} is empty: there is no disk in it")


def probe(path: Path) -> str:
    """The format by content."""
    found = images.identify(path)
    return VHDX if found.format == VHDX and not found.is_differencing else images.probe(path)


def chain_of(path: Path, fmt: str) -> list[Link]:
    """An image and its parents, top first. What QEMU does not read right is left to our own codec, with all below it."""
    links: list[Link] = []
    step: tuple[Path, str] | None = (path, fmt)
    while step is not None:
        here, stated = step
        if any(images.identity(here) == images.identity(link.path) for link in links) or len(links) > _CHAIN_MAX:
            raise errors.Corrupt(f"the chain of {path} runs in a circle at {here}", path=str(path))
        step = None
        if stated == VHDX:
            images.require_usable(here)
            links.append(Link(here, VHDX))
            continue
        if stated == images.VPC and not _qemu_reads(here):
            return [*links, *_vhd_links(here)]
        header = images.read(here, stated)
        links.append(Link(here, header.format))
        if header.parent is not None:
            if header.backing_format is None:
                raise recognition.unstated(header)
            step = (header.parent, header.backing_format)
    return links


def _qemu_reads(path: Path) -> bool:
    """Whether QEMU shows a VHD as Windows would.

    It reads zeros in place of a differencing one's parent, old data where a bitmap says that there is none, and takes the
    size of some from their geometry. What is left are fixed ones.
    """
    from hvmgr import vhd

    if vhd.identify(path) is not vhd.Kind.FIXED:
        return False
    try:
        images.read(path, images.VPC)
    except (errors.Unsupported, errors.Corrupt):  # our codec says more exactly what is wrong
        return False
    return True


def _vhd_links(path: Path) -> list[Link]:
    """A VHD that our own codec serves, and its parents, which count as in use with it."""
    from hvmgr import vhd

    with vhd.open_chain(path) as chain:
        return [Link(image.path, image_export.CODEC) for image in chain.images]
