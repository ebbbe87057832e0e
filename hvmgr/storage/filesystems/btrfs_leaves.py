"""Which leaves of the trees of a Btrfs are not in their place any more.

A leaf is never written again: what changes in it goes into another one, and so does the way to it. The same leaf, between the
same two others, holds for every key from its first one to the next leaf's the same items, or the same absence of any.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hvmgr.model.ranges import Range

Key = tuple[int, ...]


class Leaf(NamedTuple):
    """A leaf of a tree: the first key that leads to it, where it is on the volume, and when it was written."""

    tree: int
    key: Key
    places: tuple[Range, ...]
    generation: int


@dataclass(frozen=True, slots=True)
class Standing:
    """All leaves in order, and what else says where things are: the subvolume that is shown, and the chunks.

    ``is_whole``: nothing was put over them in memory.
    """

    start: int
    chunks: frozenset[object]
    leaves: Sequence[Leaf]
    is_whole: bool


def departed(one: Standing, other: Standing) -> list[Range] | None:
    """Where the leaves of one moment are that are not among those of another, each with the same keys.

    None where nothing can be said.
    """
    if not (one.is_whole and other.is_whole):
        return None
    if one.start != other.start or not (one.chunks <= other.chunks or other.chunks <= one.chunks):
        return None
    there = dict(_placed(other.leaves))
    return [place for key, facts in _placed(one.leaves) if there.get(key) != facts for place in facts[0].places]


def _placed(leaves: Sequence[Leaf]) -> Iterator[tuple[tuple[int, Key], tuple[Leaf, Key | None]]]:
    """Each leaf by its tree and its first key, with the key at which the next one begins."""
    for one, following in itertools.zip_longest(leaves, leaves[1:]):
        is_last = following is None or following.tree != one.tree
        yield (one.tree, one.key), (one, None if is_last else following.key)
