"""Merges of images that a running VM has open, by what libvirt's block jobs can do.

libvirt streams into the image that the guest writes and into no other; it commits an image into the one below it. So:

- the image that the guest writes takes what its unnamed parent holds (``StreamLive``): nothing is renamed;
- where that cannot be, because the parent is a base or hides a part of a longer image below it, where the child holds
  less, and between two images that nobody writes, the parent takes what the child holds and takes its place
  (``CommitLive``). The parent has no other user then, and was made by hvmgr; the child is what goes. A parent that is
  shorter grows first, and QEMU hides what is below it with zeros then; it is never made shorter.

Where a security module keeps QEMU from writing below the guest's image, ``commits`` is false, and streams are all there is.

Pure, like ``tree``, whose planner this is a part of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hvmgr.model.tree import Image, Keeper, Tree

if TYPE_CHECKING:
    from hvmgr.model.plan import Step


_PATHS = ("child", "parent", "below", "path")  # what steps of merges call the images that they concern


def fits(tree: Tree, parent: Image, child: Image, *, commits: bool = True) -> bool:
    """Whether a running VM can merge an unnamed image with its only child."""
    return _can_stream(tree, parent, child) or (commits and _can_commit(tree, parent, child))


def merge(tree: Tree, parent: Image, child: Image, *, commits: bool = True) -> tuple[list[Step], Tree]:
    """The steps that merge the two, and the tree that is then true."""
    from hvmgr.model.plan import CommitLive, RemoveImage, StreamLive

    images = dict(tree.images)
    data = parent.data + child.data
    is_less = commits and child.data < parent.data and _can_commit(tree, parent, child)
    if _can_stream(tree, parent, child) and not is_less:
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
    images[parent.path] = dataclasses.replace(parent, data=data, size=child.size)
    writes = child.path in tree.present.disks.values()
    commit = CommitLive(child=child.path, parent=parent.path, writes=writes)
    return [commit, RemoveImage(path=child.path)], _renamed(
        dataclasses.replace(tree, images=images), child.path, parent.path
    )


def together(steps: Sequence[Step]) -> list[Step]:
    """The steps in an order in which guests leave images of several disks at the same moment.

    What concerns one disk stays in its order. Before each round of the last parts stands the step that does them at once.
    """
    from hvmgr.model.plan import CommitLive, CommitTogether

    queues = _by_disk(steps)
    ordered: list[Step] = []
    while queues:
        for queue in queues:
            while queue and not _is_pivot(queue[0]):
                ordered.append(queue.pop(0))
        queues = [queue for queue in queues if queue]
        heads = [queue.pop(0) for queue in queues]
        pairs = tuple((step.child, step.parent) for step in heads if isinstance(step, CommitLive))
        ordered += [CommitTogether(pairs)] if len(pairs) > 1 else []
        ordered += heads
    return ordered


def _is_pivot(step: Step) -> bool:
    from hvmgr.model.plan import CommitLive

    return isinstance(step, CommitLive) and step.writes


def _by_disk(steps: Sequence[Step]) -> list[list[Step]]:
    """The steps, those that have an image in common in one list."""
    groups: list[tuple[set[str], list[Step]]] = []
    for step in steps:
        paths = {str(getattr(step, name)) for name in _PATHS if getattr(step, name, None) is not None}
        mine = [group for group in groups if group[0] & paths]
        others = [group for group in groups if not group[0] & paths]
        joined = sorted((one for _, group in mine for one in group), key=steps.index)
        groups = [*others, (paths.union(*(found for found, _ in mine)), [*joined, step])]
    return [group for _, group in groups]


def _can_stream(tree: Tree, parent: Image, child: Image) -> bool:
    """A parent that is shorter than what is below it hides old data there, which would come back."""
    if parent.keeper is not Keeper.IMAGES or parent.parent is None or child.keeper is not Keeper.IMAGES:
        return False
    return child.path in tree.present.disks.values() and tree.images[parent.parent].size <= parent.size


def _can_commit(tree: Tree, parent: Image, child: Image) -> bool:
    """What stands on the child has to name the parent afterwards: an image that others made is not written for that."""
    above = [one for one in tree.images.values() if one.parent == child.path]
    return (
        all(one.keeper is Keeper.IMAGES for one in above)
        and parent.keeper is not Keeper.OUTSIDE
        and child.keeper is Keeper.IMAGES
        and parent.format == child.format == "qcow2"
        and parent.size <= child.size
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
