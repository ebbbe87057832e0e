"""The heart: snapshots form a tree, images form a forest, and every operation is a plan over the two.

A snapshot names one frozen image per disk, the present names one working image per disk, and the undo slot the
working images that the last apply put away. The users of an image are its children, the snapshots that name it, the
present, the undo slot and other VMs. From their number everything follows:

- a base (an image without parent) is never removed, whatever the number says, and a differencing image that others
  made only when the user names it (``outside_images``);
- a differencing image of ours that a plan leaves without users is removed;
- an image that no snapshot and neither present nor undo slot names, and that has exactly one child, is merged with it;
- with two or more children it stays as an unnamed image until one is left;
- what another VM reads, also as a parent of the image that it uses, stays as it is until that VM is gone.

Pure: planners take a ``Tree`` and return the image steps and the ``Tree`` that is true afterwards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import PurePath
from typing import TYPE_CHECKING

from hvmgr.errors import Conflict, Corrupt, NotFound

if TYPE_CHECKING:
    from hvmgr.model.plan import Step  # the planners import the steps that they make: who only reads does without

WARN_DEPTH = 30  # images in a chain; each costs start time: 100 images 1.8 s, 180 images 6 s
MAX_DEPTH = 190  # libvirt fails at 200


class Keeper(StrEnum):
    """Who an image belongs to."""

    IMAGES = "images"  # made by hvmgr in the home's folder of differencing images
    BASES = "bases"  # a base in the home: created or copied in by hvmgr
    OUTSIDE = "outside"  # in place, adopted, linked, another VM's: never written once frozen, never removed


@dataclass(frozen=True, slots=True)
class Image:
    """One file of a disk. ``size`` is what the guest sees, ``data`` what the file takes; both in bytes."""

    path: str
    parent: str | None
    format: str
    size: int
    data: int
    keeper: Keeper


@dataclass(frozen=True, slots=True)
class Node:
    """The place of a snapshot in the tree, and the images that it froze, by slot."""

    snapshot_id: str
    parent: str | None
    disks: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Leaf:
    """A present: the snapshot below which it is, and its working images by slot."""

    parent: str | None
    disks: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Tree:
    """Everything that planning needs of one VM. ``strangers`` are users outside this VM, by image path."""

    images: Mapping[str, Image]
    nodes: Mapping[str, Node]
    present: Leaf
    undo: Leaf | None = None
    strangers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def children(self) -> dict[str, list[str]]:
        """The children of every image that has some."""
        below: dict[str, list[str]] = {}
        for image in self.images.values():
            if image.parent is not None:
                below.setdefault(image.parent, []).append(image.path)
        return below

    def named(self) -> dict[str, list[str]]:
        """Who names an image: snapshot ids, ``now`` and ``undo``."""
        names: dict[str, list[str]] = {}
        for node in self.nodes.values():
            for path in node.disks.values():
                names.setdefault(path, []).append(node.snapshot_id)
        for path in self.present.disks.values():
            names.setdefault(path, []).append("now")
        if self.undo is not None:
            for path in self.undo.disks.values():
                names.setdefault(path, []).append("undo")
        return names

    def chain(self, path: str) -> list[Image]:
        """The image and its parents down to the base; raises Corrupt when a parent is missing or a cycle closes."""
        chain: list[Image] = []
        seen: set[str] = set()
        step: str | None = path
        while step is not None:
            if step in seen:
                raise Corrupt(f"the chain of {path} runs in a circle at {step}")
            if step not in self.images:
                raise Corrupt(f"the image {step} is missing", hint="put the file back where it was", path=step)
            seen.add(step)
            chain.append(self.images[step])
            step = self.images[step].parent
        return chain

    def depth(self) -> int:
        """How many images the deepest disk of the present stands on, itself included."""
        return max((len(self.chain(path)) for path in self.present.disks.values()), default=0)

    def lent(self) -> set[str]:
        """What strangers read: the images that they use and everything below them."""
        read: set[str] = set()
        for top, strangers in self.strangers.items():
            step = self.images.get(top) if strangers else None
            while step is not None and step.path not in read:
                read.add(step.path)
                step = None if step.parent is None else self.images.get(step.parent)
        return read

    def subtree(self, snapshot_id: str) -> list[str]:
        """The snapshot and everything below it, parents first."""
        below: dict[str | None, list[str]] = {}
        for node in self.nodes.values():
            below.setdefault(node.parent, []).append(node.snapshot_id)
        found = [snapshot_id]
        for one in found:
            found.extend(below.get(one, ()))
        return found


@dataclass(frozen=True, slots=True)
class Change:
    """What a planner decided: steps before the switch, steps after it, and the tree that is then true."""

    after: Tree
    prepare: tuple[Step, ...] = ()
    finish: tuple[Step, ...] = ()


def plan_create(tree: Tree, snapshot_id: str, children: Mapping[str, str]) -> Change:
    """The present is frozen under ``snapshot_id`` and goes on in new ``children`` (slot to path)."""
    _require_fitting(tree, tree.present.disks, children)
    if snapshot_id in tree.nodes:
        raise Conflict(f"there is a snapshot with the id {snapshot_id} already")
    emptied = _empty_undo(tree)
    created, freeze, images = _children_of(emptied.after, tree.present.disks, children)
    after = dataclasses.replace(
        emptied.after,
        images=images,
        nodes={
            **tree.nodes,
            snapshot_id: Node(snapshot_id=snapshot_id, parent=tree.present.parent, disks=dict(tree.present.disks)),
        },
        present=Leaf(parent=snapshot_id, disks=dict(children)),
    )
    return Change(after=after, prepare=(*created, *freeze), finish=emptied.finish)


def plan_go_on(tree: Tree, children: Mapping[str, str]) -> Change:
    """The present goes on in new ``children`` (slot to path); what it wrote so far is frozen, and no snapshot names it."""
    _require_fitting(tree, tree.present.disks, children)
    created, freeze, images = _children_of(tree, tree.present.disks, children)
    after = dataclasses.replace(tree, images=images, present=Leaf(parent=tree.present.parent, disks=dict(children)))
    return Change(after=after, prepare=created + freeze)


def plan_apply(tree: Tree, snapshot_id: str, children: Mapping[str, str], *, keep_undo: bool = True) -> Change:
    """The present becomes new ``children`` of a snapshot's images; the old present goes into the undo slot."""
    node = require_node(tree, snapshot_id)
    _require_fitting(tree, node.disks, children)
    created, _, images = _children_of(tree, node.disks, children)
    away = [] if tree.undo is None else list(tree.undo.disks.values())
    if not keep_undo:
        away.extend(tree.present.disks.values())
    after = dataclasses.replace(
        tree,
        images=images,
        present=Leaf(parent=snapshot_id, disks=dict(children)),
        undo=tree.present if keep_undo else None,
    )
    removed = remove_userless(after, away)
    return Change(after=removed.after, prepare=created, finish=removed.finish)


def plan_undo(tree: Tree) -> Change:
    """Present and undo slot change places."""
    if tree.undo is None:
        raise NotFound("there is nothing to undo", hint="only the last apply or revert can be undone")
    return Change(after=dataclasses.replace(tree, present=tree.undo, undo=tree.present))


def plan_delete(tree: Tree, snapshot_ids: Collection[str], *, busy: Collection[str] = ()) -> Change:
    """Snapshots go; children take the parent's place; images that this leaves without users go, single children merge.

    ``busy`` names images that a running VM has open: they wait as unnamed images, for a merge of their own.
    """
    for snapshot_id in snapshot_ids:
        require_node(tree, snapshot_id)
    gone = set(snapshot_ids)
    emptied = _empty_undo(tree, busy=busy)
    nodes = {
        node.snapshot_id: dataclasses.replace(node, parent=heir(tree, node.parent, gone))
        for node in tree.nodes.values()
        if node.snapshot_id not in gone
    }
    present = dataclasses.replace(tree.present, parent=heir(tree, tree.present.parent, gone))
    after = dataclasses.replace(emptied.after, nodes=nodes, present=present)
    freed = [
        path for snapshot_id in tree.nodes if snapshot_id in gone for path in tree.nodes[snapshot_id].disks.values()
    ]
    removed = remove_userless(after, freed, busy=busy)
    merged = plan_merge(removed.after, busy=busy)
    return Change(after=merged.after, finish=(*emptied.finish, *removed.finish, *merged.finish))


def plan_merge(
    tree: Tree,
    *,
    busy: Collection[str] = (),
    named: Collection[str] = (),
    live: Collection[str] = (),
    commits: bool = True,
) -> Change:
    """Every unnamed image with exactly one child is merged with it, as far as none of them is ``busy``.

    Of several in a row the one nearest to the disk is merged first, so that no block is copied twice. ``named`` are
    differencing images that others made: this once they are written and removed as if they were ours. ``live`` are images
    that the running VM has open: they are merged by it, where that can be (``live_merges``), without ``commits`` only
    upwards.
    """
    from hvmgr.model import live_merges
    from hvmgr.model.plan import MergeUp, RemoveImage

    steps: list[Step] = []
    while pairs := list(_mergeable(tree, busy, named, live, commits=commits)):
        parents = {parent.path for parent, _ in pairs}
        parent, child = next(pair for pair in pairs if pair[1].path not in parents)
        if child.path in live:
            done, tree = live_merges.merge(tree, parent, child, commits=commits)
            steps += done
            continue
        step, tree = _merge(tree, parent, child, named)
        steps.append(step)
        if isinstance(step, MergeUp):
            steps.append(RemoveImage(path=step.parent))
            if step.parent in named and tree.images[step.child].keeper is not Keeper.IMAGES:
                named = {*named, step.child}  # written once on request, it takes what is below as well
    return Change(after=tree, finish=tuple(live_merges.together(steps) if live else steps))


def pending(tree: Tree) -> list[tuple[str, str]]:
    """Unnamed images that wait to be merged, each with its only child."""
    return [(parent.path, child.path) for parent, child in _mergeable(tree, (), (), ())]


def unnamed(tree: Tree) -> list[str]:
    """Images that nothing names but that have children: hidden nodes of the forest."""
    names, below = tree.named(), tree.children()
    return [path for path in tree.images if path not in names and below.get(path)]


def detached(tree: Tree) -> list[str]:
    """Images of this home that nothing uses: disks that an edit left behind; kept until somebody asks."""
    names, below = tree.named(), tree.children()
    return [
        image.path
        for image in tree.images.values()
        if image.path not in names
        and not below.get(image.path)
        and image.keeper is not Keeper.OUTSIDE
        and not tree.strangers.get(image.path)
    ]


def remove_userless(tree: Tree, freed: Iterable[str], *, busy: Collection[str] = ()) -> Change:
    """Of the images that a plan freed, those of ours without users are removed, and so are parents that this frees.

    An image that a running VM has open although nothing names it stays: somebody's edit is not the whole truth yet.
    """
    from hvmgr.model.plan import RemoveImage

    images = dict(tree.images)
    names = tree.named()
    child_count: dict[str, int] = {path: len(paths) for path, paths in tree.children().items()}
    steps: list[Step] = []
    worklist = list(dict.fromkeys(freed))
    for path in worklist:
        image = images.get(path)
        if image is None or names.get(path) or child_count.get(path) or tree.strangers.get(path):
            continue
        if image.keeper is not Keeper.IMAGES or image.parent is None or path in busy:
            continue
        del images[path]
        steps.append(RemoveImage(path=path))
        child_count[image.parent] -= 1
        worklist.append(image.parent)
    return Change(after=dataclasses.replace(tree, images=images), finish=tuple(steps))


def heir(tree: Tree, snapshot_id: str | None, gone: Collection[str]) -> str | None:
    """The nearest snapshot at or above ``snapshot_id`` that stays."""
    while snapshot_id is not None and snapshot_id in gone:
        snapshot_id = tree.nodes[snapshot_id].parent
    return snapshot_id


def require_node(tree: Tree, snapshot_id: str) -> Node:
    """The node, or NotFound."""
    node = tree.nodes.get(snapshot_id)
    if node is None:
        raise NotFound(f"there is no snapshot with the id {snapshot_id}")
    return node


def _require_fitting(tree: Tree, disks: Mapping[str, str], children: Mapping[str, str]) -> None:
    if set(disks) != set(children):
        raise Conflict(f"new images are planned for {sorted(children)}, the disks are {sorted(disks)}")
    new = list(children.values())
    for path in new:
        if path in tree.images or new.count(path) > 1:
            raise Conflict(f"the name of the new image {path} is taken already", path=path)


def _children_of(
    tree: Tree, disks: Mapping[str, str], children: Mapping[str, str]
) -> tuple[tuple[Step, ...], tuple[Step, ...], dict[str, Image]]:
    from hvmgr.model.plan import CreateImage, FreezeImage

    images = dict(tree.images)
    created: list[Step] = []
    freeze: list[Step] = []
    for slot, path in disks.items():
        chain = tree.chain(path)
        if len(chain) >= MAX_DEPTH:
            raise Conflict(
                f"the disk {slot} already stands on {len(chain)} images",
                hint="delete snapshots, so that their images are merged",
                slot=slot,
                depth=len(chain),
            )
        parent, child = chain[0], children[slot]
        created.append(CreateImage(path=child, size=parent.size, parent=path, parent_format=parent.format))
        freeze.append(FreezeImage(path=path))
        images[child] = Image(path=child, parent=path, format="qcow2", size=parent.size, data=0, keeper=Keeper.IMAGES)
    return tuple(created), tuple(freeze), images


def _empty_undo(tree: Tree, *, busy: Collection[str] = ()) -> Change:
    if tree.undo is None:
        return Change(after=tree)
    return remove_userless(dataclasses.replace(tree, undo=None), tree.undo.disks.values(), busy=busy)


def may_be_written(tree: Tree, parent: Image, child: Image, named: Collection[str]) -> bool:
    """Whether a merge may write the child: one that others made is named, or the guest writes it and its parent is."""
    if child.keeper is Keeper.IMAGES or child.path in named:
        return True
    return parent.path in named and child.path in tree.present.disks.values()


def _mergeable(
    tree: Tree, busy: Collection[str], named: Collection[str], live: Collection[str], *, commits: bool = True
) -> Iterator[tuple[Image, Image]]:
    """Pairs (unnamed image, its only child) that may be merged, in the order of the images."""
    from hvmgr.model import live_merges

    names, below = tree.named(), tree.children()
    closed = {*busy, *tree.lent()}
    for image in tree.images.values():
        children = below.get(image.path, [])
        if image.path in names or len(children) != 1:
            continue
        child = tree.images[children[0]]
        if image.path in closed or child.path in closed:
            continue
        if image.path in live or child.path in live:
            fits = {image.path, child.path} <= {*live} and live_merges.fits(tree, image, child, commits=commits)
        else:
            fits = _can_merge_up(image, named) or _can_merge_down(image, child)
        if fits and may_be_written(tree, image, child, named) and is_whole(tree, child.path):
            yield image, child


def is_whole(tree: Tree, path: str) -> bool:
    """Whether the chain ends in a base: of a damaged one everything that is left stays as it is."""
    try:
        tree.chain(path)
    except Corrupt:
        return False
    return True


def _can_merge_up(parent: Image, named: Collection[str]) -> bool:
    return (parent.keeper is Keeper.IMAGES or parent.path in named) and parent.parent is not None


def _can_merge_down(parent: Image, child: Image) -> bool:
    """Same format and size, ours, and the parent's own header still true under the child's name."""
    return (
        parent.keeper is not Keeper.OUTSIDE
        and child.keeper is Keeper.IMAGES
        and parent.format == child.format == "qcow2"
        and parent.size == child.size
        and (parent.parent is None or PurePath(parent.path).parent == PurePath(child.path).parent)
    )


def _merge(tree: Tree, parent: Image, child: Image, named: Collection[str]) -> tuple[Step, Tree]:
    from hvmgr.model.plan import MergeDown, MergeUp

    down = _can_merge_down(parent, child) and (not _can_merge_up(parent, named) or child.data < parent.data)
    images = dict(tree.images)
    del images[parent.path]
    images[child.path] = dataclasses.replace(child, parent=parent.parent, data=parent.data + child.data)
    step: Step
    if down:
        step = MergeDown(child=child.path, parent=parent.path)
    else:
        below = None if parent.parent is None else tree.images[parent.parent]
        step = MergeUp(
            child=child.path,
            parent=parent.path,
            below=None if below is None else below.path,
            below_format=None if below is None else below.format,
            hide=_hidden(parent, below),
        )
    return step, dataclasses.replace(tree, images=images)


def _hidden(parent: Image, below: Image | None) -> tuple[int, int] | None:
    """The range of ``below`` that the shorter ``parent`` keeps out of sight.

    Both are frozen, so that it stays true until the step runs. The child's size does not: a VM that starts between
    the parts of a merge may be grown, and what a shorter child had no need to hide would come back.
    """
    if below is None or below.size <= parent.size:
        return None
    return parent.size, below.size - parent.size
