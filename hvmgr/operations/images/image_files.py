"""The public API of image files, each named by its path: ``Host.images``. The commands ``image …`` are built on it.

    with hvmgr.Host.open() as host:
        host.images.create("base.vhd", 10 << 30)
        host.images.create("child.vhd", options=hvmgr.ImageOptions(parent=Path("base.vhd")))
        host.images.merge("child.vhd")

An image is known by its content. What changes one in place is refused while anybody else needs it, is journaled, and is
completed by the next call on that image when the process died. Sizes are bytes. ``folders`` are where the parents of a VHD
are looked for besides its own folder; a file's own words never lead out of these.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors
from hvmgr.model.disk_layout import FileSystem, Layout, LayoutWish
from hvmgr.model.image_info import ImageCheck, ImageInfo, ImageOptions

if TYPE_CHECKING:
    from hvmgr.operations.host import Host
    from hvmgr.operations.images.generalizing import Generalisation
    from hvmgr.operations.images.reparenting import Proof

AnyPath = Path | str


class Images:
    """What can be done with image files. libvirt is only asked who uses an image, and need not be there."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def create(self, path: AnyPath, size: int | None = None, options: ImageOptions | None = None) -> ImageInfo:
        """A new, empty image; with a parent a differencing VHD or qcow2 image of the parent's size.

        Conflict when ``path`` exists; a failure leaves no file.
        """
        from hvmgr.operations.images import making

        made, wish = _new(path), self._resolved(options)
        making.create(self._host, made, size, wish)
        return self._made(made, wish)

    def info(self, path: AnyPath, *, folders: Sequence[AnyPath] = ()) -> ImageInfo:
        """What the image is and who uses it; parents that are missing or wrong are part of the answer."""
        return self._inspected(path, folders, chain=False)[0]

    def chain(self, path: AnyPath, *, folders: Sequence[AnyPath] = ()) -> list[ImageInfo]:
        """The image and all that it stands on, highest first, as far as parents can be found."""
        return self._inspected(path, folders, chain=True)

    def check(
        self, path: AnyPath, *, chain: bool = False, repair: bool = False, folders: Sequence[AnyPath] = ()
    ) -> ImageCheck:
        """What is wrong with the image, and with its parents (``chain``); ``repair`` puts right what needs no guess."""
        from hvmgr.operations.images import changes, checks

        found = self._there(path)
        if repair:
            changes.complete(self._host, [found])
        return checks.check(self._host, found, chain=chain, repair=repair, folders=_paths(folders))

    def convert(self, source: AnyPath, path: AnyPath, options: ImageOptions | None = None) -> ImageInfo:
        """A new image whose disk has the size and the bytes of the source's, chain and all; the source is only read.

        With a parent it holds only what differs from that. Conflict when ``path`` exists; a failure leaves no file.
        """
        from hvmgr.operations.images import making

        made, wish = _new(path), self._resolved(options)
        making.convert(self._host, self._there(source), made, wish)
        return self._made(made, wish)

    def merge(
        self, child: AnyPath, *, into: AnyPath | None = None, keep: bool = False, folders: Sequence[AnyPath] = ()
    ) -> ImageInfo:
        """The child's data goes into its parent, or the ancestor ``into``, which keeps its name and id, and is returned.

        Images that stand on the child stand on the ancestor afterwards. The child and what lies between are removed, or
        left as they are with ``keep``. Conflict while anybody else needs one of them.
        """
        from hvmgr.operations.images import merging

        upper, lower = self._there(child), None if into is None else self._there(into)
        return self.info(merging.merge(self._host, upper, lower, _paths(folders), keep=keep), folders=folders)

    def prepare(
        self,
        path: AnyPath,
        wish: LayoutWish | None = None,
        *,
        size: int | None = None,
        options: ImageOptions | None = None,
        force: bool = False,
    ) -> Layout:
        """The image, which is blank, has a partition table and file systems; without a wish one volume and a GPT.

        With ``size`` a new image is made, as ``options`` want it, complete or absent. Conflict when the image holds data
        and ``force`` does not give that up, or when anybody uses it.
        """
        from hvmgr.operations.images import preparing

        image = (options or ImageOptions()) if size is not None else None
        layout = wish or LayoutWish(self.usual_file_system(path, new=image))
        if size is None:
            return preparing.prepare(self._host, self._there(path), layout, force=force)
        made = _new(path)
        subject = f"image prepare of {made}"
        return preparing.make_new(self._host, made, size, self._resolved(options), layout, subject=subject)

    def usual_file_system(self, path: AnyPath, *, new: ImageOptions | None = None) -> FileSystem:
        """What a volume in the image is formatted with unless it is said: NTFS on VHD and VHDX, ext4 elsewhere."""
        from hvmgr.operations.images import preparing, recognition

        if new is not None:
            return preparing.default_file_system(recognition.format_of(_new(path), new.format))
        return preparing.default_file_system(recognition.look(self._there(path)).format)

    def generalize(self, path: AnyPath, *, partition: int | None = None) -> Generalisation:
        """The Linux in the image has nothing left that makes it the one that it is; of a Windows only that is looked up.

        Conflict when a VM, a child or anybody else uses the image.
        """
        from hvmgr.operations.images import generalizing

        return generalizing.generalize(self._host, self._there(path), partition)

    def resize(self, path: AnyPath, size: int, *, shrink: bool = False) -> bool:
        """The disk has ``size`` bytes; whether that was a change. A smaller one needs ``shrink``, and no data behind."""
        from hvmgr.operations.images import sizing

        return sizing.resize(self._host, self._there(path), size, shrink=shrink)

    def compact(self, path: AnyPath) -> int:
        """Blocks that hold zeros only are given back; how many bytes of disk space that freed."""
        from hvmgr.operations.images import sizing

        return sizing.compact(self._host, self._there(path))

    def reparent(
        self, child: AnyPath, parent: AnyPath, *, ignore_id: bool = False, folders: Sequence[AnyPath] = ()
    ) -> Proof:
        """A differencing image names another file as its parent; what proved that its disk stays the same.

        Conflict when it does not, or when only ``ignore_id`` could say so.
        """
        from hvmgr.operations.images import reparenting

        upper, lower = self._there(child), self._there(parent)
        return reparenting.reparent(self._host, upper, lower, _paths(folders), ignore_id=ignore_id)

    def _inspected(self, path: AnyPath, folders: Sequence[AnyPath], *, chain: bool) -> list[ImageInfo]:
        from hvmgr.operations.images import inspection

        found = self._there(path)
        if chain:
            return inspection.chain(self._host, found, _paths(folders))
        return [inspection.info(self._host, found, _paths(folders))]

    def _made(self, path: Path, wish: ImageOptions) -> ImageInfo:
        """What was made, as the format that it was made in: a raw disk may look like anything."""
        from hvmgr.operations.images import inspection, recognition

        return inspection.info(self._host, path, wish.folders, stated=recognition.format_of(path, wish.format))

    def _resolved(self, options: ImageOptions | None) -> ImageOptions:
        wish = options or ImageOptions()
        parent = None if wish.parent is None else self._there(wish.parent)
        searched = (*_paths(wish.folders), *(() if parent is None else (parent.parent,)))
        return dataclasses.replace(wish, parent=parent, folders=searched)

    def _there(self, path: AnyPath) -> Path:
        """The image's own path, links followed."""
        found = Path(os.path.realpath(path))
        if not found.exists():
            from hvmgr.operations.images import changes

            changes.complete_about(self._host, found)
            raise errors.NotFound(f"there is no {path}", path=str(path))
        return found


def _paths(folders: Sequence[AnyPath]) -> tuple[Path, ...]:
    return tuple(Path(os.path.realpath(one)) for one in folders)


def _new(path: AnyPath) -> Path:
    """The path that a new image gets: the links of its folder followed, its own name never."""
    wanted = Path(path)
    return Path(os.path.realpath(wanted.parent)) / wanted.name
