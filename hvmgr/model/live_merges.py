"""Merges of images that a running VM has open, by what libvirt's block jobs can do.

libvirt streams into the image that the guest writes and into no other; it commits an image into the one below it. So:

- the image that the guest writes takes what its unnamed parent holds (``StreamLive``): nothing is renamed;
- where that cannot be, because the parent is a base or hides a part of a longer image below it, where the child holds
  less, and between two images that nobody writes, the parent takes what the child holds and takes its place
  (``CommitLive``). The parent has no other user then, and was made by hvmgr; the child is what goes.

Pure, like ``tree``, whose planner this is a part of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from hvmgr.model.tree import Image, Keeper, Tree

if TYPE_CHECKING:
    from hvmgr.model.plan import Step


def fits(tree: Tree, parent: Image, child: Image) -> bool:
    """Whether a running VM can merge an unnamed image with its only child."""
    return _can_stream(tree, parent, child) or _can_commit(tree, parent, child)


def merge(tree: Tree, parent: Image, child: Image) -> tuple[list[Step], Tree]:
    """The steps that merge the two, and the tree that is then true."""
    from hvmgr.model.plan import CommitLive, RemoveImage, StreamLive

    images = dict(tree.images)
    data = parent.data + child.data
    if _can_stream(tree, parent, child) and not (_can_commit(tree, parent, child) and child.data < parent.data):
        assert parent.parent is not None
        below = images[parent.parent]
        del images[parent.path]
        images[child.path] = dataclasses.replace(child, parent=below.path, data=data)
        stream = StreamLive(child=child.path, parent=parent.path, below=below.path, below_format=below.format)
        return [stream, RemoveImage(path=parent.path)], dataclasses.replace(tree, images=images)
    del images[child.path]
    images = {
        path: dataclasses.replace(one, parent=parent.path) if one.parent == child.path else one
        for path, one in images.items()
    }
    images[parent.path] = dataclasses.replace(parent, data=data)
    writes = child.path in tree.present.disks.values()
    commit = CommitLive(child=child.path, parent=parent.path, writes=writes)
    return [commit, RemoveImage(path=child.path)], _renamed(
        dataclasses.replace(tree, images=images), child.path, parent.path
    )


def _can_stream(tree: Tree, parent: Image, child: Image) -> bool:
    """A parent that is shorter than what is below it hides old data there, which would come back."""
    if parent.keeper is not Keeper.IMAGES or parent.parent is None or child.keeper is not Keeper.IMAGES:
        return False
    return child.path in tree.present.disks.values() and tree.images[parent.parent].size <= parent.size


def _can_commit(tree: Tree, parent: Image, child: Image) -> bool:
    """QEMU would make the parent longer before the child's data is in it, and never makes it shorter.

    What stands on the child has to name the parent afterwards: an image that others made is not written for that.
    """
    above = [one for one in tree.images.values() if one.parent == child.path]
    return (
        all(one.keeper is Keeper.IMAGES for one in above)
        and parent.keeper is not Keeper.OUTSIDE
        and child.keeper is Keeper.IMAGES
        and parent.format == child.format == "qcow2"
        and parent.size == child.size
    )


def _renamed(tree: Tree, old: str, new: str) -> Tree:
    """Whoever names the one image names the other. The undo slot names none that a running VM has open."""

    def disks(held: Mapping[str, str]) -> dict[str, str]:
        return {slot: new if path == old else path for slot, path in held.items()}

    return dataclasses.replace(
        tree,
        nodes={key: dataclasses.replace(node, disks=disks(node.disks)) for key, node in tree.nodes.items()},
        present=dataclasses.replace(tree.present, disks=disks(tree.present.disks)),
    )
