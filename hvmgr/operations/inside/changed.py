"""Where two moments of a disk may differ, from what their images say alone: none of the data is read.

What both stand on shows both of them the same. They differ at most where an image says something that only one of them stands
on, behind the end of one that is shorter, and, when they have no image in common, wherever one of them holds data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from hvmgr.host import image_export, qemu_img
from hvmgr.host.image_export import Link
from hvmgr.model.ranges import Range, Ranges
from hvmgr.storage import images

if TYPE_CHECKING:
    from hvmgr.operations.inside.views import Frozen


def between(old: Frozen, new: Frozen) -> Ranges:
    """Every byte of the disk that may not be the same at both moments."""
    shared = _shared(old.links, new.links)
    mine, theirs = (one.links[: len(one.links) - shared] for one in (old, new))
    if not mine and not theirs:
        return Ranges()
    sizes = [_size(one.links[0]) for one in (old, new)]
    found = Ranges(one for own in (mine, theirs) if own for one in _said(own, whole=not shared))
    # An image that is shorter than what stands on it hides what is below it, from its end on.
    ends = [*sizes, *(_size(one) for one in (*mine, *theirs))]
    return found.joined([(min(ends), max(ends))])


def _shared(old: Sequence[Link], new: Sequence[Link]) -> int:
    """How many images, from the bottom, both stand on."""
    count = 0
    for one, other in zip(reversed(old), reversed(new), strict=False):
        if one.format != other.format or images.identity(one.path) != images.identity(other.path):
            break
        count += 1
    return count


def _said(own: Sequence[Link], *, whole: bool) -> Iterator[Range]:
    """Where these images say something; where they hold data, when there is nothing below them."""
    if own[0].format == image_export.CODEC:
        yield from _said_by_vhds(own)
        return
    for one in qemu_img.said([(link.path, link.format) for link in own]):
        if (one.data and not one.zero) if whole else one.present:
            yield one.start, one.start + one.length


def _said_by_vhds(own: Sequence[Link]) -> Iterator[Range]:
    from hvmgr import vhd
    from hvmgr.vhd.image import ABSENT

    for link in own:
        with vhd.open_image(link.path) as image:
            for extent in image.extents():
                if extent.position != ABSENT:
                    yield extent.offset, extent.offset + extent.length


def _size(link: Link) -> int:
    if link.format == image_export.CODEC:
        from hvmgr import vhd

        with vhd.open_image(link.path) as image:
            return image.size
    if link.format == "vhdx":
        from hvmgr.storage import vhdx

        return vhdx.read(link.path).size
    return images.read(link.path, link.format).size


_SECTOR_MAX = 4096  # of LUKS: with some ciphers a byte on the disk decides about more than one byte in clear

# --- volumes --------------------------------------------------------------------------------------------------------


Placed = tuple[str, "tuple[object, int, int]"]  # a part of a volume, with the slot of the disk that it lies on


def of_volume(
    old: Sequence[Placed], new: Sequence[Placed], changed: dict[str, Ranges], *, encrypted: bool = False
) -> Ranges:
    """The same for a volume, in its own bytes: ``old`` and ``new`` say where its parts lie, each with the slot of the disk.

    What lies elsewhere than before may all be different; of what is ``encrypted`` all that one sector of it has.
    """
    found = Ranges(_of_parts(_placed(old), _placed(new), changed))
    if not encrypted:
        return found
    return Ranges((max(0, start - _SECTOR_MAX), end + _SECTOR_MAX) for start, end in found)


_Stretch = tuple[int, int, str, int | None]  # from where to where in the volume, which disk, where there


def _placed(parts: Sequence[Placed]) -> list[_Stretch]:
    found: list[_Stretch] = []
    at = 0
    for name, (disk, start, length) in parts:
        found.append((at, at + length, name, None if disk is None else start))
        at += length
    return found


def _of_parts(old: Sequence[_Stretch], new: Sequence[_Stretch], changed: dict[str, Ranges]) -> Iterator[Range]:
    index = 0
    for first, last, name, place in new:
        at = first
        while at < last and index < len(old):
            start, end, other, before = old[index]
            stop = min(last, end)
            if at < stop:
                if (name, None if place is None else place - first) != (
                    other,
                    None if before is None else before - start,
                ):
                    yield at, stop
                elif place is not None:
                    yield from changed[name].moved(place + at - first, place + stop - first, at)
                at = stop
            if end <= at:
                index += 1
        if at < last:
            yield at, last
    ends = [parts[-1][1] if parts else 0 for parts in (old, new)]
    yield min(ends), max(ends)
