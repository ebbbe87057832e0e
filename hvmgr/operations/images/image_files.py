"""The public API of image files, each named by its path: ``Host.images``. The commands ``image …`` are built on it.

    with hvmgr.Host.open() as host:
        host.images.create("base.vhd", size=10 << 30)
        host.images.create("child.vhd", parent="base.vhd")
        host.images.merge("child.vhd")

An image is known by its content. What changes one in place is refused while anybody else needs it, is journaled, and is
completed by the next call on that image when the process died. Sizes are bytes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors
from hvmgr.model.image_info import ImageCheck, ImageInfo
from hvmgr.model.specification import ImageFormat

if TYPE_CHECKING:
    from hvmgr.operations.host import Host
    from hvmgr.operations.images.making import Wish
    from hvmgr.operations.images.reparenting import Proof

AnyPath = Path | str


class Images:
    """What can be done with image files. libvirt is only asked who uses an image, and need not be there."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def create(
        self,
        path: AnyPath,
        *,
        size: int | None = None,
        format: ImageFormat | None = None,
        fixed: bool = False,
        parent: AnyPath | None = None,
        block_size: int | None = None,
    ) -> ImageInfo:
        """A new, empty image; with ``parent`` a differencing VHD or qcow2 image of the parent's size.

        ``format`` is that of the name without it. Conflict when ``path`` exists; a failure leaves no file.
        """
        from hvmgr.operations.images import making

        made = _new(path)
        making.create(self._host, made, size, _wish(format, parent, block_size, fixed=fixed))
        return self.info(made)

    def info(self, path: AnyPath) -> ImageInfo:
        """What the image is and who uses it; parents that are missing or wrong are part of the answer."""
        return self._inspected(path, chain=False)[0]

    def chain(self, path: AnyPath) -> list[ImageInfo]:
        """The image and all that it stands on, highest first, as far as parents can be found."""
        return self._inspected(path, chain=True)

    def check(self, path: AnyPath, *, chain: bool = False, repair: bool = False) -> ImageCheck:
        """What is wrong with the image, and with its parents (``chain``); ``repair`` puts right what needs no guess."""
        from hvmgr.operations.images import changes, checks

        found = _there(path)
        if repair:
            changes.complete(self._host, [found])
        return checks.check(self._host, found, chain=chain, repair=repair)

    def convert(
        self,
        source: AnyPath,
        path: AnyPath,
        *,
        format: ImageFormat | None = None,
        fixed: bool = False,
        keep_id: bool = False,
        parent: AnyPath | None = None,
        block_size: int | None = None,
        source_format: ImageFormat | None = None,
    ) -> ImageInfo:
        """A new image whose disk has the size and the bytes of the source's, chain and all; the source is only read.

        With ``parent`` it holds only what differs from that. ``source_format`` says what the source is, where its content
        would be taken for something else. Conflict when ``path`` exists; a failure leaves no file.
        """
        import dataclasses

        from hvmgr.operations.images import making

        made = _new(path)
        wish = dataclasses.replace(_wish(format, parent, block_size, fixed=fixed), keep_id=keep_id)
        making.convert(self._host, _there(source), made, wish, stated=source_format)
        return self.info(made)

    def merge(self, child: AnyPath, *, into: AnyPath | None = None, keep: bool = False) -> ImageInfo:
        """The child's data goes into its parent, or the ancestor ``into``, which keeps its name and id, and is returned.

        Images that stand on the child stand on the ancestor afterwards. The child and what lies between are removed, or
        left as they are with ``keep``. Conflict while anybody else needs one of them.
        """
        from hvmgr.operations.images import merging

        return self.info(merging.merge(self._host, _there(child), None if into is None else _there(into), keep=keep))

    def resize(self, path: AnyPath, size: int, *, shrink: bool = False) -> bool:
        """The disk has ``size`` bytes; whether that was a change. A smaller one needs ``shrink``, and no data behind."""
        from hvmgr.operations.images import sizing

        return sizing.resize(self._host, _there(path), size, shrink=shrink)

    def compact(self, path: AnyPath) -> int:
        """Blocks that hold zeros only are given back; how many bytes of disk space that freed."""
        from hvmgr.operations.images import sizing

        return sizing.compact(self._host, _there(path))

    def reparent(self, child: AnyPath, parent: AnyPath, *, ignore_id: bool = False) -> Proof:
        """A differencing image names another file as its parent; what proved that its disk stays the same.

        Conflict when it does not, or when only ``ignore_id`` could say so.
        """
        from hvmgr.operations.images import reparenting

        return reparenting.reparent(self._host, _there(child), _there(parent), ignore_id=ignore_id)

    def _inspected(self, path: AnyPath, *, chain: bool) -> list[ImageInfo]:
        from hvmgr.operations.images import inspection
        from hvmgr.operations.images.users import Users

        found, users = _there(path), Users(self._host)
        return inspection.chain(found, users) if chain else [inspection.info(found, users)]


def _wish(format: ImageFormat | None, parent: AnyPath | None, block_size: int | None, *, fixed: bool) -> Wish:
    from hvmgr.operations.images.making import Wish

    return Wish(format, fixed=fixed, parent=None if parent is None else _there(parent), block_size=block_size)


def _there(path: AnyPath) -> Path:
    """The image's own path, links followed."""
    found = Path(os.path.realpath(path))
    if not found.exists():
        raise errors.NotFound(f"there is no {path}", path=str(path))
    return found


def _new(path: AnyPath) -> Path:
    """The path that a new image gets: the links of its folder followed, its own name never."""
    wanted = Path(path)
    return Path(os.path.realpath(wanted.parent)) / wanted.name
