"""What libvirt's own external snapshots can say of a snapshot tree: the line from its root to the present.

One of libvirt's snapshots names, for each disk, the image in which the VM went on; libvirt can do something with it while
these images are in the present's chain. So of the snapshots above the present those fit whose every disk the present
still stands on, in the same slot. The rest of the tree has no words there.

Pure, as ``tree`` is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from hvmgr.errors import Corrupt
from hvmgr.model.tree import Leaf, Node, Tree

NAME_BYTES = 200  # libvirt makes a file of it, with a suffix, and file names end at 255 bytes


@dataclass(frozen=True, slots=True)
class Link:
    """A snapshot that libvirt can have: ``went_on`` is the image above the frozen one, by slot."""

    snapshot_id: str
    parent: str | None
    went_on: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class History:
    """``links`` oldest first; of the other snapshots, by id, the reason why libvirt cannot have them."""

    links: tuple[Link, ...]
    unfit: Mapping[str, str]


def of(tree: Tree) -> History:
    """The line above the present, and what is not in it."""
    line, unfit = _above_the_present(tree), dict[str, str]()
    found: list[tuple[str, Mapping[str, str]]] = []
    after: Node | Leaf = tree.present
    for node in line:
        try:
            went_on = _went_on(tree, node, after)
        except Corrupt as error:
            unfit[node.snapshot_id] = error.message
            continue
        missing = sorted(node.disks.keys() - went_on.keys())
        if not node.disks:
            unfit[node.snapshot_id] = "it holds no disk"
        elif missing:
            unfit[node.snapshot_id] = f"the present does not stand on its disk {', '.join(missing)}"
        else:
            found.append((node.snapshot_id, went_on))
            after = node
    above = {node.snapshot_id for node in line}
    unfit |= {one: "it is on another branch than the present" for one in tree.nodes if one not in above}
    ids = [one for one, _ in found]
    parents: dict[str, str | None] = {**dict(pairwise(ids)), **dict.fromkeys(ids[-1:])}
    links = (Link(one, parents[one], went_on) for one, went_on in reversed(found))
    return History(tuple(links), unfit)


def fitting_names(names: Iterable[tuple[str, str]], taken: Collection[str]) -> dict[str, str]:
    """A name that libvirt takes for each id: no ``/``, no ``.`` in front, short enough for a file, and its own."""
    used, found = set(taken), dict[str, str]()
    for one, name in names:
        plain = _cut(name.replace("/", "-").lstrip(".") or "snapshot", NAME_BYTES)
        unique, number = plain, 1
        while unique in used:
            number += 1
            unique = f"{plain} ({number})"
        used.add(unique)
        found[one] = unique
    return found


def _above_the_present(tree: Tree) -> list[Node]:
    """The snapshots above the present, nearest first."""
    line: list[Node] = []
    step = tree.present.parent
    while step is not None and step in tree.nodes and tree.nodes[step] not in line:
        line.append(tree.nodes[step])
        step = tree.nodes[step].parent
    return line


def _went_on(tree: Tree, node: Node, after: Node | Leaf) -> dict[str, str]:
    found = {}
    for slot, path in node.disks.items():
        chain = [image.path for image in tree.chain(after.disks[slot])] if slot in after.disks else []
        if path in chain[1:]:
            found[slot] = chain[chain.index(path) - 1]
    return found


def _cut(name: str, size: int) -> str:
    return name.encode()[:size].decode(errors="ignore").rstrip()
