"""Random lives of a VM: planner and simulated images on one side, plain copies of disk contents on the other.

``World`` holds images with QEMU's rules for chains and lets the planner's steps work on them. ``Reference`` knows
nothing of images: for each snapshot, the present and the undo slot it keeps what the guest sees, as lists of blocks.
A block is one byte here, so that sizes, offsets and ``hide`` ranges are small numbers.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hvmgr.errors import HvmgrError, NotFound
from hvmgr.model import live_merges, outside_images
from hvmgr.model import tree as real_planner
from hvmgr.model.plan import (
    CommitLive,
    CommitTogether,
    CreateImage,
    FreezeImage,
    MergeDown,
    MergeUp,
    RemoveImage,
    Step,
    StreamLive,
)
from hvmgr.model.tree import Image, Keeper, Leaf, Tree

Content = list[int]
Disks = dict[str, Content]

LIVES = 4000 if os.environ.get("HVMGR_CRASH") == "all" else 400
MAX_SIZE = 6
SLOTS = ("vda", "vdb", "vdc")
DIFFERENCING = "/home/Snapshots/vm"
BASES = "/home/Virtual Hard Disks"


@dataclass
class File:
    """An image as QEMU has it: ``own`` are its allocated blocks, a 0 among them is an explicit zero."""

    size: int
    parent: str | None
    format: str
    keeper: Keeper
    own: dict[int, int] = field(default_factory=dict)
    frozen: bool = False


@dataclass
class Reference:
    """What the guest would see, kept by plain copying."""

    present: Disks = field(default_factory=dict)
    undo: Disks | None = None
    snapshots: dict[str, Disks] = field(default_factory=dict)
    parents: dict[str, str | None] = field(default_factory=dict)
    now_below: str | None = None
    undo_below: str | None = None

    def create(self, snapshot_id: str) -> None:
        self.snapshots[snapshot_id] = copy.deepcopy(self.present)
        self.parents[snapshot_id] = self.now_below
        self.now_below = snapshot_id
        self.undo, self.undo_below = None, None

    def apply(self, snapshot_id: str, *, keep_undo: bool) -> None:
        self.undo, self.undo_below = (self.present, self.now_below) if keep_undo else (None, None)
        self.present, self.now_below = copy.deepcopy(self.snapshots[snapshot_id]), snapshot_id

    def swap(self) -> None:
        assert self.undo is not None
        self.present, self.undo = self.undo, self.present
        self.now_below, self.undo_below = self.undo_below, self.now_below

    def delete(self, snapshot_ids: list[str]) -> None:
        self.undo, self.undo_below = None, None
        for snapshot_id in snapshot_ids:
            del self.snapshots[snapshot_id]
            above = self.parents.pop(snapshot_id)
            self.parents = {one: above if parent == snapshot_id else parent for one, parent in self.parents.items()}
            if self.now_below == snapshot_id:
                self.now_below = above

    def below(self, snapshot_id: str) -> list[str]:
        children = [one for one, parent in self.parents.items() if parent == snapshot_id]
        return [snapshot_id, *(deeper for child in children for deeper in self.below(child))]


class World:
    """One VM: its images, the planner's view of it, and the reference beside it."""

    def __init__(self, planner: ModuleType = real_planner) -> None:
        self.planner: Any = planner
        self.files: dict[str, File] = {}
        self.nodes: dict[str, Any] = {}
        self.present: Any = Leaf(parent=None, disks={})
        self.undo: Any = None
        self.strangers: dict[str, tuple[str, ...]] = {}
        self.running = False
        self.reference = Reference()
        self.seen: Counter[str] = Counter()
        self.serial = 0
        self.cut: random.Random | None = None
        self.waiting: set[str] = set()
        self.half_written: set[str] = set()
        self.named: set[str] = set()  # what the user names for one merge
        self.written: set[str] = set()  # what that merge has written for it
        self.live = False  # whether that merge is the running VM's
        self.appear("vda", kind="own", size=4)

    # --- what the images say ---

    def read(self, path: str, block: int) -> int:
        """QEMU's rule: beyond an image's end there are zeros, whatever a longer image below it holds."""
        step: str | None = path
        while step is not None:
            file = self.files[step]
            if block >= file.size:
                return 0
            if block in file.own:
                return file.own[block]
            step = file.parent
        return 0

    def visible(self, path: str) -> Content:
        return [self.read(path, block) for block in range(self.files[path].size)]

    def chain(self, path: str) -> Iterator[str]:
        step: str | None = path
        while step is not None:
            yield step
            step = self.files[step].parent

    def children(self, path: str) -> list[str]:
        return [one for one, file in self.files.items() if file.parent == path]

    def names(self, path: str) -> list[str]:
        leaves = [("now", self.present.disks)] + ([] if self.undo is None else [("undo", self.undo.disks)])
        holders = leaves + [(one, node.disks) for one, node in self.nodes.items()]
        return [name for name, disks in holders for used in disks.values() if used == path]

    def users(self, path: str) -> list[str]:
        return self.children(path) + self.names(path) + list(self.strangers.get(path, ()))

    def used(self) -> set[str]:
        """The images that have a user, all at once."""
        holders = [self.present, *self.nodes.values(), *([] if self.undo is None else [self.undo])]
        named = {path for one in holders for path in one.disks.values()}
        return (
            {file.parent or "" for file in self.files.values()}
            | named
            | {one for one, by in self.strangers.items() if by}
        )

    def busy(self) -> set[str]:
        return {path for top in self.present.disks.values() for path in self.chain(top)} if self.running else set()

    def lent(self) -> set[str]:
        """What another VM reads: the images that it uses and everything below them."""
        return {path for top in self.strangers for path in self.chain(top)}

    def tree(self) -> Tree:
        images = {
            path: Image(path, file.parent, file.format, file.size, len(file.own), file.keeper)
            for path, file in self.files.items()
        }
        return self.planner.Tree(images, dict(self.nodes), self.present, self.undo, dict(self.strangers))

    def new(self, folder: str = DIFFERENCING, suffix: str = "qcow2") -> str:
        self.serial += 1
        return f"{folder}/{self.serial}.{suffix}"

    def new_children(self, slots: Any) -> dict[str, str]:
        return {slot: self.new() for slot in slots}

    # --- what guests and other people do ---

    def write(self, slot: str, block: int, value: int) -> None:
        path = self.present.disks[slot]
        file = self.files[path]
        assert not file.frozen, f"the guest writes to the frozen image {path}"
        assert self.users(path) == ["now"], f"the guest writes to {path}, used by {self.users(path)}"
        file.own[block % file.size] = value
        self.reference.present[slot][block % file.size] = value

    def resize(self, slot: str, size: int) -> None:
        """Growing over a longer parent writes explicit zeros, as bdrv_co_truncate does."""
        file = self.files[self.present.disks[slot]]
        old = file.size
        if file.parent is not None and self.files[file.parent].size > old:
            file.own.update(dict.fromkeys(range(old, size), 0))
        file.own = {block: value for block, value in file.own.items() if block < size}
        file.size = size
        content = self.reference.present[slot]
        self.reference.present[slot] = (content + [0] * size)[:size]
        self.seen["grown" if size > old else "shrunk"] += size != old

    def appear(self, slot: str, *, kind: str, size: int) -> None:
        """A new disk: an own base, one in place, a linked one on a base of others, an adopted chain, another format."""
        working = self.new(*(("/elsewhere",) if kind in ("outside", "linked") else (BASES,)))
        self.files[working] = File(size, None, "vpc" if kind == "vhd" else "qcow2", Keeper.BASES)
        if kind in ("outside", "linked"):
            self.files[working].keeper = Keeper.OUTSIDE
        self.files[working].own = {block: 1000 + self.serial * 10 + block for block in range(0, size, 2)}
        if kind in ("linked", "chain"):
            self.files[working].frozen = True
            base, working = working, self.new(DIFFERENCING if kind == "linked" else BASES)
            keeper = Keeper.IMAGES if kind == "linked" else Keeper.BASES
            self.files[working] = File(size, base, "qcow2", keeper)
            if kind == "linked":
                self.strangers[base] = ("another VM",)
        self._attach(slot, working)

    def vanish(self, slot: str) -> None:
        self.present = Leaf(self.present.parent, {k: v for k, v in self.present.disks.items() if k != slot})
        del self.reference.present[slot]
        self.seen["vanished"] += 1

    def attach_detached(self, slot: str, pick: int) -> None:
        """A disk that nobody uses comes back by an edit."""
        free = [path for path in self.planner.detached(self.tree()) if not self.files[path].frozen]
        if free:
            self._attach(slot, free[pick % len(free)])
            self.seen["attached again"] += 1

    def overlay(self, slot: str) -> None:
        """Somebody else puts an overlay on a working image (virsh snapshot-create-as, a backup tool)."""
        below = self.present.disks[slot]
        path = self.new("/elsewhere")
        self.files[path] = File(self.files[below].size, below, "qcow2", Keeper.OUTSIDE)
        self.files[below].frozen = True
        self.present = Leaf(self.present.parent, {**self.present.disks, slot: path})
        self.seen["foreign overlay"] += 1

    def stranger_comes(self, pick: int) -> None:
        """Another VM links to something frozen, named or not."""
        frozen = [path for path, file in self.files.items() if file.frozen]
        if frozen:
            path = frozen[pick % len(frozen)]
            self.strangers[path] = (*self.strangers.get(path, ()), f"VM {self.serial}")

    def stranger_goes(self, pick: int) -> None:
        if self.strangers:
            path = list(self.strangers)[pick % len(self.strangers)]
            self.strangers[path] = self.strangers[path][1:]
            if not self.strangers[path]:
                del self.strangers[path]

    def _attach(self, slot: str, path: str) -> None:
        self.present = Leaf(self.present.parent, {**self.present.disks, slot: path})
        self.reference.present[slot] = self.visible(path)

    # --- what hvmgr does ---

    def create(self) -> None:
        snapshot_id = f"s{self.serial}"
        self.serial += 1
        before = self.tree()
        change = self.planner.plan_create(before, snapshot_id, self.new_children(self.present.disks))
        self.reference.create(snapshot_id)
        self.run(before, change)

    def apply(self, pick: int, *, keep_undo: bool) -> None:
        snapshot_id = list(self.nodes)[pick % len(self.nodes)]
        self.running = False
        before = self.tree()
        children = self.new_children(self.nodes[snapshot_id].disks)
        change = self.planner.plan_apply(before, snapshot_id, children, keep_undo=keep_undo)
        self.reference.apply(snapshot_id, keep_undo=keep_undo)
        self.run(before, change)

    def go_on(self) -> None:
        """A running VM is exported: it goes on in new images, and what it wrote until then waits without a name."""
        assert self.running
        before, old = self.tree(), [*self.present.disks.values()]
        self.run(before, self.planner.plan_go_on(before, self.new_children(self.present.disks)))
        for path in old:
            assert self.files[path].frozen, f"the export reads {path}, which may still be written"
            assert self.children(path) == self.users(path) != []
        assert all(self.files[path].own == {} for path in self.present.disks.values())
        self.seen["went on for an export"] += bool(old)

    def swap(self) -> None:
        before = self.tree()
        if self.undo is None:
            with pytest.raises(NotFound):
                self.planner.plan_undo(before)
            return
        self.running = False
        change = self.planner.plan_undo(before)
        self.reference.swap()
        self.run(before, change)
        self.seen["undone"] += 1

    def delete(self, picks: list[int], cut: random.Random | None = None) -> None:
        names = list(self.nodes)
        self.cut = cut
        self._delete(list(dict.fromkeys(names[pick % len(names)] for pick in picks)))

    def delete_subtree(self, pick: int) -> None:
        names = list(self.nodes)
        snapshot_id = names[pick % len(names)]
        found = self.tree().subtree(snapshot_id)
        assert sorted(found) == sorted(self.reference.below(snapshot_id))
        self._delete(found)

    def merge(
        self, cut: random.Random | None = None, names: random.Random | None = None, *, live: bool = False
    ) -> None:
        """``names`` chooses images that others made and that are named; ``live`` has a running VM merge what it has open."""
        self.cut, self.live = cut, live
        foreign = [path for path, file in self.files.items() if file.keeper is not Keeper.IMAGES]
        self.named = set() if names is None else {path for path in foreign if names.random() < 0.7}
        before = self.tree()
        self.check_names_needed(before)
        opened = self.busy()
        closed, live_ones = (set(), opened) if live else (opened, set())
        self._finish(before, self.planner.plan_merge(before, busy=closed, named=self.named, live=live_ones))
        self.named, self.written, self.live = set(), set(), False

    def _delete(self, snapshot_ids: list[str]) -> None:
        before = self.tree()
        change = self.planner.plan_delete(before, snapshot_ids, busy=self.busy())
        self.reference.delete(snapshot_ids)
        self._finish(before, change)

    def _finish(self, before: Tree, change: Any) -> None:
        self.run(before, change)
        if self.cut is None:
            self.check_nothing_left_to_merge()
        self.cut = None

    # --- steps ---

    def cut_off(self) -> None:
        """hvmgr died here; before its plan is completed the VM may have run, and its disks may have been resized."""
        if self.cut is None or self.running or self.cut.random() < 0.5:
            return
        for slot in self.present.disks:
            self.write(slot, self.cut.randrange(MAX_SIZE), self.cut.randrange(99))
            self.resize(slot, self.cut.randint(1, MAX_SIZE))
        self.check_contents()
        self.seen["cut off"] += 1

    def run(self, before: Tree, change: Any) -> None:
        """Each step in order; what anybody can see has to be right between any two of them."""
        contents = {path: self.visible(path) for path in self.files}
        used = {path for path in self.files if self.users(path)}
        old = (self.nodes, self.present, self.undo)
        for step in change.prepare:
            self.step(step, used)
            assert old == (self.nodes, self.present, self.undo)
            assert contents == {path: self.visible(path) for path in contents}, "preparing changed something"
        renamed = [step.parent for step in change.finish if isinstance(step, CommitLive)]
        if not renamed:
            self.nodes, self.present, self.undo = dict(change.after.nodes), change.after.present, change.after.undo
        used |= {step.path for step in change.prepare if isinstance(step, CreateImage)}
        for step in change.finish:
            self.cut_off()
            done = self.step(step, used)
            self.check_contents()
            if not done:
                break
        for path, content in contents.items():
            written = self.cut is not None and path in {*self.present.disks.values(), *self.half_written}
            written = written or path in renamed  # nobody but what it takes the place of has seen it
            assert written or path not in self.files or self.visible(path) == content, f"{path} changed its content"
        assert (self.nodes, self.present, self.undo) == (change.after.nodes, change.after.present, change.after.undo)
        if self.cut is None:
            self.check_after(before, change.after, used)
        self.check_state()

    def step(self, step: Step, used: set[str]) -> bool:
        match step:
            case CreateImage():
                self._create_image(step)
            case FreezeImage(path=path):
                self.files[path].frozen = True
            case MergeUp():
                self._merge_up(step)
            case MergeDown():
                return self._merge_down(step)
            case StreamLive():
                self._stream_live(step)
            case CommitLive():
                self._commit_live(step)
            case CommitTogether(pairs=pairs):
                assert len({child for child, _ in pairs}) > 1
                assert {child for child, _ in pairs} <= {*self.present.disks.values()}
                self.seen["left together"] += 1
            case RemoveImage(path=path):
                self._remove_image(path, used)
            case _:
                raise AssertionError(f"an unexpected step: {step}")
        return True

    def _create_image(self, step: CreateImage) -> None:
        assert step.path not in self.files
        assert step.parent is not None
        below = self.files[step.parent]
        assert (step.size, step.parent_format) == (below.size, below.format)
        self.files[step.path] = File(step.size, step.parent, "qcow2", Keeper.IMAGES)

    def _require_mergeable(self, parent: str, child: str) -> None:
        assert self.files[child].parent == parent
        assert self.users(parent) == [child], f"{parent} is used by {self.users(parent)}"
        assert not {parent, child} & self.busy(), "a running VM has them open"
        assert not {parent, child} & self.lent(), "another VM reads them"
        assert self._is_open_to_merges(parent, child)
        assert self.files[parent].keeper is not Keeper.OUTSIDE or parent in self.named

    def _merge_up(self, step: MergeUp) -> None:
        self._require_mergeable(step.parent, step.child)
        parent, child = self.files[step.parent], self.files[step.child]
        assert step.below == parent.parent is not None
        assert parent.keeper is Keeper.IMAGES or step.parent in self.named
        assert step.below_format == (None if parent.parent is None else self.files[parent.parent].format)
        self._copy_up(step, [*parent.own][::2])
        self.cut_off()
        content = self.visible(step.child)
        self._copy_up(step, [*parent.own])
        child.parent = step.below
        assert self.visible(step.child) == content, f"merging {step.parent} up changed {step.child}"
        self.written |= {step.child} if step.parent in self.named else set()
        self._count_merge("up", step.parent, step.child)
        self.seen["hidden range"] += step.hide is not None

    def _copy_up(self, step: MergeUp, blocks: list[int]) -> None:
        parent, child = self.files[step.parent], self.files[step.child]
        offset, length = step.hide or (0, 0)
        for block in range(offset, min(offset + length, child.size)):
            child.own.setdefault(block, 0)
        for block in blocks:
            if block < child.size:
                child.own.setdefault(block, parent.own[block])

    def _merge_down(self, step: MergeDown) -> bool:
        """False when the sizes are no longer equal: it is given up, and so are the merges that were to follow."""
        self._require_mergeable(step.parent, step.child)
        parent, child = self.files[step.parent], self.files[step.child]
        assert parent.format == child.format == "qcow2"
        assert parent.keeper is not Keeper.OUTSIDE
        assert child.keeper is Keeper.IMAGES
        if parent.parent is not None:  # a relative name in its header has to stay true
            assert PurePosixPath(step.parent).parent == PurePosixPath(step.child).parent
        parent.own.update([*child.own.items()][::2])
        self.cut_off()
        content = self.visible(step.child)
        if self.cut is not None and parent.size != child.size:
            self.half_written.add(step.parent)  # harmless: only the child sees it, and what it sees is its own
            self.seen["given up"] += 1
            return False
        parent.size = max(parent.size, child.size)
        parent.own.update(child.own)
        assert self.visible(step.child) == content
        self.seen["own base merged down"] += parent.keeper is Keeper.BASES
        self.files[step.child] = parent
        parent.keeper, parent.frozen = child.keeper, child.frozen
        del self.files[step.parent]
        assert self.visible(step.child) == content, f"merging {step.child} down changed it"
        self._count_merge("down", step.parent, step.child)
        return True

    def _require_open(self, parent: str, child: str) -> None:
        assert self.files[child].parent == parent
        assert self.users(parent) == [child], f"{parent} is used by {self.users(parent)}"
        assert {parent, child} <= self.busy(), "the running VM does not have them open"
        assert not {parent, child} & self.lent(), "another VM reads them"

    def _stream_live(self, step: StreamLive) -> None:
        """libvirt streams into the image that the guest writes and into no other."""
        self._require_open(step.parent, step.child)
        parent, child = self.files[step.parent], self.files[step.child]
        assert step.child in self.present.disks.values()
        assert step.below == parent.parent
        assert step.below_format == self.files[step.below].format
        assert parent.keeper is child.keeper is Keeper.IMAGES
        content = self.visible(step.child)
        for block in parent.own:
            if block < child.size:
                child.own.setdefault(block, parent.own[block])
        child.parent = step.below
        assert self.visible(step.child) == content, f"streaming {step.parent} changed {step.child}"
        self._count_merge("up live", step.parent, step.child)

    def _commit_live(self, step: CommitLive) -> None:
        """The parent grows into what the child is; then everybody names the parent."""
        self._require_open(step.parent, step.child)
        parent, child = self.files[step.parent], self.files[step.child]
        assert parent.size <= child.size, "QEMU never makes the parent shorter"
        assert parent.format == child.format == "qcow2"
        assert parent.keeper is not Keeper.OUTSIDE
        assert child.keeper is Keeper.IMAGES
        assert step.writes == (step.child in self.present.disks.values())
        assert all(self.files[one].keeper is Keeper.IMAGES for one in self.children(step.child))
        if parent.size < child.size:  # QEMU makes it longer first, and hides what is below it there
            below = 0 if parent.parent is None else self.files[parent.parent].size
            parent.own.update(dict.fromkeys(range(parent.size, min(below, child.size)), 0))
            parent.size = child.size
            self.seen["grown by a live commit"] += 1
            self.check_contents()
        parent.own.update([*child.own.items()][::2])
        self.check_contents()
        parent.own.update(child.own)
        assert self.visible(step.parent) == self.visible(step.child)
        self._count_merge("down live", step.parent, step.child)
        for file in self.files.values():
            file.parent = step.parent if file.parent == step.child else file.parent
        parent.frozen = not step.writes

        def leaf(one: Any) -> Any:
            if one is None:
                return None
            disks = {slot: step.parent if path == step.child else path for slot, path in one.disks.items()}
            return dataclasses.replace(one, disks=disks)

        self.nodes = {key: leaf(node) for key, node in self.nodes.items()}
        self.present, self.undo = leaf(self.present), leaf(self.undo)

    def _remove_image(self, path: str, used: set[str]) -> None:
        assert not self.users(path), f"{path} is removed, used by {self.users(path)}"
        assert path in used, f"{path} had no user before: an edit made it a detached disk"
        assert self.files[path].keeper is Keeper.IMAGES or path in self.named
        assert self.files[path].parent is not None, f"{path} is a base"
        self.seen["removed by name"] += path in self.named
        assert path not in self.busy()
        del self.files[path]
        self.seen["removed"] += 1

    def _count_merge(self, direction: str, parent: str, child: str) -> None:
        self.seen[f"merged {direction}"] += 1
        self.seen["foreign image written by name"] += self.files[child].keeper is not Keeper.IMAGES
        self.seen[f"merged {direction} into a working image"] += child in self.present.disks.values()
        self.seen["merged after waiting"] += parent in self.waiting
        self.waiting.discard(parent)

    # --- promises ---

    def check_contents(self) -> None:
        """Every snapshot, the present and the undo slot show what the reference kept."""
        for one, node in self.nodes.items():
            assert self.contents(node) == self.reference.snapshots[one], f"snapshot {one}"
        assert self.contents(self.present) == self.reference.present, "the present"
        assert (None if self.undo is None else self.contents(self.undo)) == self.reference.undo, "the undo slot"

    def contents(self, holder: Any) -> Disks:
        return {slot: self.visible(path) for slot, path in holder.disks.items()}

    def check_after(self, before: Tree, after: Tree, used: set[str]) -> None:
        """The planner's picture is the truth, and what it made userless is gone."""
        told = {one.path: (one.parent, one.format, one.size, one.keeper) for one in after.images.values()}
        true = {path: (one.parent, one.format, one.size, one.keeper) for path, one in self.files.items()}
        assert told == true
        assert after.strangers == before.strangers
        for path, file in self.files.items():
            left_over = path in used and not self.users(path) and file.keeper is Keeper.IMAGES
            assert not left_over or file.parent is None, f"{path} lost its last user and stays"
        assert {one: node.parent for one, node in self.nodes.items()} == self.reference.parents
        assert self.present.parent == self.reference.now_below
        assert self.undo is None or self.undo.parent == self.reference.undo_below

    def check_nothing_left_to_merge(self) -> None:
        closed = self.busy() | self.lent()
        for path, file in self.files.items():
            children = self.children(path)
            ours = file.keeper is Keeper.IMAGES or path in self.named
            if not ours or file.parent is None or self.users(path) != children:
                continue
            self.seen["unnamed with two children"] += len(children) > 1
            if len(children) == 1 and self._is_open_to_merges(path, children[0]):
                assert {path, children[0]} & closed, f"{path} should be merged with {children[0]}"
                if self.live and {path, children[0]} <= self.busy() - self.lent():
                    self.check_cannot_be_merged_live(file, children[0])
                if path in self.busy():
                    self.waiting.add(path)
                    self.seen["waits for the VM"] += 1
                    if not self.named and not {path, children[0]} & self.lent():
                        assert (path, children[0]) in self.planner.pending(self.tree())

    def check_cannot_be_merged_live(self, parent: File, path: str) -> None:
        """Images of the home wait for the VM's end only because of their sizes."""
        child = self.files[path]
        if parent.keeper is child.keeper is Keeper.IMAGES and parent.parent is not None:
            above = [self.files[one].keeper for one in self.children(path)]
            assert parent.size > child.size or set(above) - {Keeper.IMAGES}
            assert path not in self.present.disks.values() or self.files[parent.parent].size > parent.size
            self.seen["waits for its size"] += 1

    def check_names_needed(self, before: Tree) -> None:
        """What people are told to name is exactly what the planner then merges."""
        for path, names in outside_images.names_needed(before).items():
            outside_images.require_named(before, names)
            assert path in self._merged_away(before, names), f"{names} do not suffice"
            for name in names:
                assert path not in self._merged_away(before, {*names} - {name}), f"{name} is not needed"

    def _merged_away(self, before: Tree, names: Collection[str]) -> set[str]:
        steps = self.planner.plan_merge(before, named=names).finish
        return {step.parent for step in steps if isinstance(step, MergeUp | MergeDown)}

    def _is_open_to_merges(self, parent: str, child: str) -> bool:
        written_anyway = parent in self.named and child in self.present.disks.values()
        return self.files[child].keeper is Keeper.IMAGES or child in self.named | self.written or written_anyway

    def check_state(self) -> None:
        """What holds after every step of a life, whoever did it."""
        self.check_contents()
        for node in self.nodes.values():
            assert all(self.files[path].frozen for path in node.disks.values())
        for path in self.present.disks.values():
            assert self.users(path) == ["now"]
            assert not self.files[path].frozen
        lonely = set(self.files) - self.used()
        assert set(self.planner.detached(self.tree())) == {
            path for path in lonely if self.files[path].keeper is not Keeper.OUTSIDE
        }
        self.seen["detached"] += bool(lonely)


# --- two drivers: hypothesis, which shrinks, and plain random lives, which are many ---

KINDS = ("own", "own", "outside", "linked", "chain", "vhd")
picks = st.integers(min_value=0, max_value=1000)
cuts = st.none() | st.integers(min_value=0, max_value=1000).map(random.Random)
sizes = st.integers(min_value=1, max_value=MAX_SIZE)


class Life(RuleBasedStateMachine):
    """Hypothesis chooses what happens to one VM."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()

    def _slot(self, pick: int) -> str:
        disks = list(self.world.present.disks)
        return disks[pick % len(disks)]

    def _free_slot(self) -> str:
        return next(slot for slot in SLOTS if slot not in self.world.present.disks)

    has_disks = precondition(lambda self: self.world.present.disks)
    has_room = precondition(lambda self: len(self.world.present.disks) < len(SLOTS))
    has_snapshots = precondition(lambda self: self.world.nodes)

    @has_disks
    @rule(pick=picks, block=picks, value=st.integers(0, 99))
    def write(self, pick: int, block: int, value: int) -> None:
        self.world.write(self._slot(pick), block, value)

    @has_disks
    @rule(pick=picks, size=sizes)
    def resize(self, pick: int, size: int) -> None:
        self.world.resize(self._slot(pick), size)

    @has_room
    @rule(kind=st.sampled_from(KINDS), size=sizes)
    def appear(self, kind: str, size: int) -> None:
        self.world.appear(self._free_slot(), kind=kind, size=size)

    @has_disks
    @rule(pick=picks)
    def vanish(self, pick: int) -> None:
        self.world.vanish(self._slot(pick))

    @has_room
    @rule(pick=picks)
    def attach_detached(self, pick: int) -> None:
        self.world.attach_detached(self._free_slot(), pick)

    @has_disks
    @rule(pick=picks)
    def overlay(self, pick: int) -> None:
        self.world.overlay(self._slot(pick))

    @rule(pick=picks)
    def stranger_comes(self, pick: int) -> None:
        self.world.stranger_comes(pick)

    @rule(pick=picks)
    def stranger_goes(self, pick: int) -> None:
        self.world.stranger_goes(pick)

    @rule(running=st.booleans())
    def start_or_stop(self, running: bool) -> None:
        self.world.running = running

    @precondition(lambda self: len(self.world.nodes) < 12)
    @rule()
    def create(self) -> None:
        self.world.create()

    @has_snapshots
    @rule(pick=picks, keep_undo=st.booleans())
    def apply(self, pick: int, *, keep_undo: bool) -> None:
        self.world.apply(pick, keep_undo=keep_undo)

    @precondition(lambda self: self.world.running)
    @rule()
    def go_on(self) -> None:
        self.world.go_on()

    @rule()
    def undo(self) -> None:
        self.world.swap()

    @has_snapshots
    @rule(picked=st.lists(picks, min_size=1, max_size=3), cut=cuts)
    def delete(self, picked: list[int], cut: random.Random | None) -> None:
        self.world.delete(picked, cut)

    @has_snapshots
    @rule(pick=picks)
    def delete_subtree(self, pick: int) -> None:
        self.world.delete_subtree(pick)

    @rule(cut=cuts, names=cuts, live=st.booleans())
    def merge(self, cut: random.Random | None, names: random.Random | None, live: bool) -> None:
        self.world.merge(cut, names, live=live)

    @invariant()
    def all_promises_hold(self) -> None:
        self.world.check_state()

    def teardown(self) -> None:
        for what in self.world.seen:
            event(what)


Life.TestCase.settings = settings(
    max_examples=LIVES // 5,
    stateful_step_count=40,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestLife = Life.TestCase


def one_act(world: World, chance: random.Random) -> None:
    disks, slots = list(world.present.disks), [one for one in SLOTS if one not in world.present.disks]
    some = chance.randrange(99)
    cut = random.Random(some) if chance.random() < 0.3 else None
    acts: list[tuple[int, bool, Callable[[], None]]] = [
        (14, bool(disks), lambda: world.write(chance.choice(disks), some, chance.randrange(99))),
        (9, bool(disks), lambda: world.resize(chance.choice(disks), chance.randint(1, MAX_SIZE))),
        (2, bool(slots), lambda: world.appear(slots[0], kind=chance.choice(KINDS), size=chance.randint(1, MAX_SIZE))),
        (1, bool(disks), lambda: world.vanish(chance.choice(disks))),
        (1, bool(slots), lambda: world.attach_detached(slots[0], some)),
        (1, bool(disks), lambda: world.overlay(chance.choice(disks))),
        (1, True, lambda: world.stranger_comes(some)),
        (3, True, lambda: world.stranger_goes(some)),
        (3, True, lambda: setattr(world, "running", not world.running)),
        (9, len(world.nodes) < 12, world.create),
        (6, bool(world.nodes), lambda: world.apply(some, keep_undo=chance.random() < 0.7)),
        (3, world.running, world.go_on),
        (3, True, world.swap),
        (6, bool(world.nodes), lambda: world.delete([chance.randrange(99) for _ in range(chance.randint(1, 3))], cut)),
        (1, bool(world.nodes), lambda: world.delete_subtree(some)),
        (2, True, lambda: world.merge(cut, live=some % 2 == 0)),
        (3, True, lambda: world.merge(cut, random.Random(some), live=some % 2 == 0)),
    ]
    possible = [(weight, act) for weight, can, act in acts if can]
    chance.choices([act for _, act in possible], [weight for weight, _ in possible])[0]()


def live(seed: int, planner: ModuleType = real_planner, length: int = 60) -> World:
    """One random life; the same seed lives the same life in every process."""
    chance = random.Random(seed)
    world = World(planner)
    for _ in range(length):
        one_act(world, chance)
        world.check_state()
    return world


def live_all(count: int, planner: ModuleType = real_planner) -> None:
    for seed in range(count):
        live(seed, planner)


INTERESTING = {
    "merged up": 100,
    "merged down": 100,
    "merged up into a working image": 10,
    "merged down into a working image": 10,
    "merged up live": 20,
    "merged down live": 20,
    "merged down live into a working image": 5,
    "waits for its size": 1,
    "grown by a live commit": 5,
    "left together": 5,
    "own base merged down": 20,
    "hidden range": 20,
    "waits for the VM": 20,
    "merged after waiting": 5,
    "unnamed with two children": 20,
    "detached": 100,
    "attached again": 5,
    "foreign overlay": 20,
    "removed by name": 20,
    "foreign image written by name": 20,
    "removed": 100,
    "undone": 50,
    "went on for an export": 50,
    "cut off": 50,
    "grown": 50,
    "shrunk": 50,
}


MUTATIONS = {
    "hide nothing": ("hide=_hidden(parent, below)", "hide=None"),
    "hide only what the child has when it plans": ("hide=_hidden(parent, below)", "hide=None if parent.size >= child.size else _hidden(parent, below)"),
    "hide too little": ("parent.size, below.size - parent.size", "parent.size, below.size - parent.size - 1"),
    "remove images that strangers use": (" or tree.strangers.get(path):", ":"),
    "remove images with children": (" or child_count.get(path)", ""),
    "remove images that are named": (" or names.get(path)", ""),
    "remove bases": ("image.keeper is not Keeper.IMAGES or image.parent is None or path in busy:\n            continue", "False:\n            continue"),
    "remove the parent of a base merged down": ("is not Keeper.IMAGES or image.parent is None or path", "is not Keeper.IMAGES or path"),
    "keep what becomes userless by a removal": ("        worklist.append(image.parent)\n", ""),
    "merge one of several children": ("len(children) != 1", "len(children) < 1"),
    "merge named images": ("image.path in names or len", "len"),
    "merge busy images": ("closed = {*busy, *tree.lent()}", "closed = tree.lent()"),
    "merge what others read": ("closed = {*busy, *tree.lent()}", "closed = {*busy, *tree.strangers}"),
    "merge into images of others": ("parent.keeper is not Keeper.OUTSIDE\n        and ", ""),
    "merge down what others made": ("        and child.keeper is Keeper.IMAGES\n", ""),
    "merge away what others made": ("(parent.keeper is Keeper.IMAGES or parent.path in named)", "True"),
    "merge away a base that is named": (" and parent.parent is not None\n", "\n"),
    "forget the names": ("_mergeable(tree, busy, named, live, commits=", "_mergeable(tree, busy, (), live, commits="),
    "write what others made because its parent is named": ("parent.path in named and child.path in", "parent.path in named or child.path in"),
    "merge down into another format": ('parent.format == child.format == "qcow2"', "True"),
    "merge down whatever the size": ("        and parent.size == child.size\n", ""),
    "merge down across folders": ("PurePath(parent.path).parent == PurePath(child.path).parent", "True"),
    "merge up into a foreign overlay": ("child.keeper is Keeper.IMAGES or child.path in named:", "True:"),
    "keep the merged parent": ("steps.append(RemoveImage(path=step.parent))", "pass"),
    "do not merge": ("*removed.finish, *merged.finish", "*removed.finish"),
    "children of the parent's size forgotten": ("CreateImage(path=child, size=parent.size", "CreateImage(path=child, size=1"),
    "do not freeze what an export reads": ("prepare=created + freeze", "prepare=created"),
    "go on below no snapshot": ("present=Leaf(parent=tree.present.parent, disks=dict(children)))", "present=Leaf(parent=None, disks=dict(children)))"),
    "go on without an undo slot": ("after = dataclasses.replace(tree, images=images, present=Leaf(parent=tree", "after = dataclasses.replace(tree, images=images, undo=None, present=Leaf(parent=tree"),
    "do not freeze": ("prepare=(*created, *freeze)", "prepare=created"),
    "keep the undo slot at create": ("emptied = _empty_undo(tree)\n    created", "emptied = Change(after=tree)\n    created"),
    "snapshots below keep their parent": ("parent=heir(tree, node.parent, gone)", "parent=node.parent"),
    "the present keeps its parent": ("parent=heir(tree, tree.present.parent, gone)", "parent=tree.present.parent"),
    "undo forgets the present": ("present=tree.undo, undo=tree.present", "present=tree.undo, undo=None"),
}  # fmt: skip


@contextlib.contextmanager
def changed_planner(right: str, wrong: str) -> Iterator[ModuleType]:
    """The planner with one text in it replaced; its values are those of the real one."""
    source = Path(real_planner.__file__).read_text()
    assert source.count(right) == 1, "the planner changed: mutate its new text"
    planner = ModuleType("changed_planner")
    sys.modules[planner.__name__] = planner  # dataclasses look there for the types of their fields
    try:
        exec(compile(source.replace(right, wrong), planner.__name__, "exec"), planner.__dict__)
        for name in ("Keeper", "Image", "Node", "Leaf"):
            setattr(planner, name, getattr(real_planner, name))
        yield planner
    finally:
        del sys.modules[planner.__name__]


@pytest.mark.parametrize("name", MUTATIONS)
def test_random_lives_notice_a_planner_that_would(name: str) -> None:
    with changed_planner(*MUTATIONS[name]) as planner, pytest.raises((AssertionError, HvmgrError, LookupError)):
        live_all(600, planner)


LIVE_MUTATIONS = {
    "stream into any image": ("return child.path in tree.present.disks.values() and ", "return "),
    "stream what was hidden": (".size <= parent.size", ".size <= parent.size + 9"),
    "never stream": ("return _can_stream(tree, parent, child) or ", "return "),
    "never commit": (" or (commits and _can_commit(tree, parent, child))", ""),
    "write the names into images of others": ("all(one.keeper is Keeper.IMAGES for one in above)", "True"),
    "commit whatever the size": ("        and parent.size <= child.size\n", ""),
    "forget that a parent grows": (", size=child.size)", ")"),
    "forget one of those that go together": ("ordered += heads", "ordered += heads[:1]"),
    "commit into images of others": ("and parent.keeper is not Keeper.OUTSIDE\n", "\n"),
    "commit into another format": ('parent.format == child.format == "qcow2"', "True"),
    "keep what was committed": ("[commit, RemoveImage(path=child.path)]", "[commit]"),
    "keep what was streamed": ("[stream, RemoveImage(path=parent.path)]", "[stream]"),
    "let snapshots name what goes": ("nodes={key: dataclasses.replace(node, disks=disks(node.disks))", "nodes={key: node"),
    "let the present name what goes": ("present=dataclasses.replace(tree.present, disks=disks(tree.present.disks))", "present=tree.present"),
    "let children stand on what goes": ("if one.parent == child.path else one", "if False else one"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIVE_MUTATIONS)
def test_random_lives_notice_a_running_vm_that_would(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong = LIVE_MUTATIONS[name]
    source = Path(live_merges.__file__).read_text()
    assert source.count(right) == 1, "the planner changed: mutate its new text"
    changed = ModuleType("changed_live_merges")
    exec(compile(source.replace(right, wrong), changed.__name__, "exec"), changed.__dict__)
    monkeypatch.setattr("hvmgr.model.live_merges", changed)
    with pytest.raises((AssertionError, HvmgrError, LookupError)):
        live_all(600)


def test_random_lives_accept_an_unchanged_copy_of_the_planner() -> None:
    with changed_planner("def plan_create", "def plan_create") as planner:
        live_all(20, planner)


def test_many_random_lives_keep_every_promise_and_reach_the_interesting_states() -> None:
    seen: Counter[str] = Counter()
    for seed in range(LIVES):
        seen += live(seed).seen
    assert {what: seen[what] for what, least in INTERESTING.items() if seen[what] * 200 < least * LIVES} == {}
