"""Differencing images that others made (virsh, a backup tool): merged only when the user names them.

hvmgr never removes or writes such an image on its own. One that is named is treated as hvmgr's own by that one merge: it
is merged into its only child and removed when nothing names it, and it is written when its own parent is merged into it.
The present's working image need not be named beside its parent: its guest writes it anyway. A base is never merged away.

Pure, as ``tree`` is.
"""

from __future__ import annotations

from collections.abc import Collection

from hvmgr.errors import Conflict, NotFound, UsageError
from hvmgr.model import tree as trees
from hvmgr.model.tree import Image, Keeper, Tree


def names_needed(tree: Tree) -> dict[str, tuple[str, ...]]:
    """Unnamed images with one child that only a merge by name ends: each with the images that have to be named."""
    waiting = {parent for parent, _ in trees.pending(tree)}
    below, closed = tree.children(), tree.lent()
    found = {}
    for path in trees.unnamed(tree):
        parent = tree.images[path]
        if path in waiting or parent.parent is None or len(below[path]) != 1:
            continue
        child = tree.images[below[path][0]]
        needed = _needed(tree, parent, child)
        if needed and not closed & {parent.path, child.path} and trees.is_whole(tree, child.path):
            found[path] = needed
    return found


def require_named(tree: Tree, named: Collection[str]) -> None:
    """Raises the reason, when a merge would leave one of these images as it is."""
    needed = names_needed(tree)
    useful = {one for names in needed.values() if set(names) <= set(named) for one in names}
    for path in sorted(set(named) - useful):
        raise _reason(tree, path, needed)


def _needed(tree: Tree, parent: Image, child: Image) -> tuple[str, ...]:
    names = () if parent.keeper is Keeper.IMAGES else (parent.path,)
    if trees.may_be_written(tree, parent, child, names):
        return names
    return (*names, child.path)


def _reason(tree: Tree, path: str, needed: dict[str, tuple[str, ...]]) -> Exception:
    image = tree.images.get(path)
    if image is None:
        known = ", ".join(sorted({one for names in needed.values() for one in names}))
        hint = f"it can merge {known}" if known else "no image made outside hvmgr waits to be merged"
        return NotFound(f"{path} is no image of this VM", hint=hint, path=path)
    if image.keeper is Keeper.IMAGES:
        return UsageError(f"{path} is hvmgr's own", hint="snapshot merge takes such images without --image", path=path)
    if image.parent is None:
        return Conflict(
            f"{path} is a base: everything else of the disk stands on it, and it is never merged away",
            hint="name a differencing image that stands between others",
            path=path,
        )
    if path in tree.lent():
        users = _strangers(tree, path)
        return Conflict(
            f"{path} is needed by {', '.join(users)}",
            hint="delete those VMs first, or give them a copy of the image; what libvirt keeps of its own can be forgotten: "
            "virsh snapshot-delete VM SNAPSHOT --metadata, virsh checkpoint-delete VM CHECKPOINT --metadata",
            path=path,
            users=users,
        )
    return _reason_of_users(tree, path, needed)


def _strangers(tree: Tree, path: str) -> list[str]:
    """Who reads an image, itself or as a parent of another one."""
    found: list[str] = []
    for top, names in tree.strangers.items():
        chain: set[str] = set()
        step: str | None = top
        while step is not None and step in tree.images and step not in chain:
            chain.add(step)
            step = tree.images[step].parent
        found += names if path in chain else ()
    return sorted(set(found))


def _reason_of_users(tree: Tree, path: str, needed: dict[str, tuple[str, ...]]) -> Exception:
    if path in needed:
        more = " ".join(f"--image {one}" for one in needed[path])
        return Conflict(
            f"{path} would be merged into {needed[path][-1]}, which was made outside hvmgr as well",
            hint=f"name both: {more}",
            path=path,
        )
    users = tree.named().get(path, [])
    if users:
        what = {"now": "the present", "undo": "the undo slot"}.get(users[0], f"snapshot {users[0]}")
        return Conflict(
            f"{path} is needed by {what}, and nothing waits to be merged into it",
            hint="merge it after the snapshot above it is deleted" if what.startswith("snapshot") else None,
            path=path,
        )
    count = len(tree.children().get(path, []))
    if count == 0:
        return Conflict(f"{path} is a detached disk: nothing stands on it that it could be merged into", path=path)
    return Conflict(
        f"{count} images stand on {path}" if count > 1 else f"the image that stands on {path} cannot be written",
        hint="it can be merged when one is left" if count > 1 else "another VM needs it",
        path=path,
    )
