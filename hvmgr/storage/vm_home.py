"""One VM home: the truth about a VM's snapshots, read from its files (docs/format.md).

Reading needs no lock and no libvirt: every file here is replaced as a whole. Whoever changes something holds
``locked`` first.
"""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hvmgr import errors
from hvmgr.model import configuration
from hvmgr.model.configuration import Configuration
from hvmgr.model.layout import BASES, CONFIGURATIONS, PRIVATE, SNAPSHOTS, Layout
from hvmgr.model.metadata import Metadata, SnapshotRecord
from hvmgr.model.tree import Image, Keeper, Leaf, Node, Tree
from hvmgr.storage import durable, images, locks

# The name of a differencing image that hvmgr made: slot, image id. Others put files beside them (virsh does).
_OURS = re.compile(r"[^/]+_[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\.qcow2")


@dataclass(frozen=True, slots=True)
class SnapshotFile:
    """One snapshot as its XML tells it: the record, and its disks by slot."""

    record: SnapshotRecord
    disks: Mapping[str, str]
    formats: Mapping[str, str]  # by path


@dataclass(frozen=True, slots=True)
class VmHome:
    """A home that exists; nothing of it is cached, each call reads the files anew."""

    layout: Layout

    @property
    def path(self) -> Path:
        """The folder."""
        return self.layout.home

    @property
    def vm_id(self) -> str:
        """The VM's id: the same as libvirt's uuid."""
        return self.layout.vm_id

    @property
    def name(self) -> str:
        """The VM's present name."""
        return self.present().name

    def present(self) -> Configuration:
        """The present configuration."""
        return _parse(self.layout.configuration)

    def facts(self) -> Metadata:
        """hvmgr's own facts of the present."""
        return require_facts(self.present())

    def undo(self) -> Configuration | None:
        """The configuration in the undo slot."""
        try:
            return _parse(self.layout.undo)
        except errors.NotFound:
            return None

    def snapshot(self, snapshot_id: str) -> Configuration:
        """The configuration of one snapshot."""
        return _parse(self.layout.snapshot(snapshot_id))

    def snapshots(self) -> list[SnapshotFile]:
        """All snapshots, oldest first."""
        found = []
        for entry in os.scandir(self.layout.snapshots):
            if entry.name.endswith(".xml") and not entry.name.startswith(durable.TEMPORARY):
                try:
                    found.append(_read_snapshot(Path(entry.path)))
                except errors.NotFound:
                    continue  # removed while we read
        return sorted(found, key=lambda one: (one.record.created, one.record.id))

    @contextlib.contextmanager
    def locked(self, *, wait_s: float) -> Iterator[None]:
        """Exclusive for one command; leftovers of dead commands are swept first."""
        with locks.held(self.layout.lock, wait_s=wait_s, what=f"the VM in {self.path}"):
            for folder in (
                self.layout.configuration.parent,
                self.layout.vm_folder,
                self.layout.snapshots,
                self.layout.images,
                self.layout.bases,
                self.layout.private,
                self.layout.frozen,
            ):
                durable.sweep(folder)
            yield

    def tree(self, *, strangers: Mapping[str, tuple[str, ...]] | None = None) -> Tree:
        """Both graphs, complete."""
        snapshots, present, undo = self.snapshots(), self.present(), self.undo()
        stated = {path: images.QCOW2 for path in _files(self.layout.images) if _OURS.fullmatch(Path(path).name)}
        for one in snapshots:
            stated.update(one.formats)
        stated.update(_formats(present, *([] if undo is None else [undo])))
        found = self.load_images(stated)
        unstated = [path for path in _files(self.layout.bases) if path not in found]
        found |= self.load_images({path: images.probe(Path(path)) for path in unstated})
        nodes = {one.record.id: to_node(one) for one in snapshots}
        leaf = None if undo is None else to_leaf(undo)
        return Tree(images=found, nodes=nodes, present=to_leaf(present), undo=leaf, strangers=strangers or {})

    def present_tree(self) -> Tree:
        """Only the chains of the present: enough to create a snapshot, whatever the size of the tree."""
        present = self.present()
        return Tree(images=self.load_images(_formats(present)), nodes={}, present=to_leaf(present))

    def load_images(self, roots: Mapping[str, str]) -> dict[str, Image]:
        """The images (path to format) and all their parents. A format is what the configuration or the child states.

        An image that is missing is left out: ``Tree.chain`` names it when it is needed.
        """
        found: dict[str, Image] = {}
        todo = list(roots.items())
        while todo:
            path, fmt = todo.pop()
            if path in found:
                continue
            try:
                header = images.read(Path(path), fmt)
            except errors.NotFound:
                continue
            parent = None if header.parent is None else str(header.parent)
            if parent is not None:
                if header.backing_format is None:
                    raise errors.Unsupported(
                        f"{path} does not state the format of its parent",
                        hint=f"state it: qemu-img rebase -u -b '{header.backing}' -F FORMAT '{path}'",
                    )
                todo.append((parent, header.backing_format))
            found[path] = Image(path, parent, header.format, header.size, header.data, self.keeper(path))
        return found

    def keeper(self, path: str) -> Keeper:
        """Who an image belongs to."""
        folder = Path(path).parent
        if folder == self.layout.images and _OURS.fullmatch(Path(path).name):
            return Keeper.IMAGES
        return Keeper.BASES if folder == self.layout.bases else Keeper.OUTSIDE


def open_home(path: Path) -> VmHome:
    """The home in a folder; NotFound when it is none, Corrupt when it is more than one."""
    path = Path(os.path.realpath(path))
    configurations = path / CONFIGURATIONS
    found = [file for file in configurations.glob("*.xml") if _is_id(file.stem)] if configurations.is_dir() else []
    if not found:
        raise errors.NotFound(f"{path} is no VM home: there is no configuration in '{CONFIGURATIONS}'")
    if len(found) > 1:
        raise errors.Corrupt(f"{path} holds {len(found)} configurations; a home has one", path=str(path))
    return VmHome(Layout(home=path, vm_id=found[0].stem))


def find_homes(root: Path) -> list[VmHome]:
    """Every home directly below a root, in the order of the folders' names."""
    if not root.is_dir():
        return []
    homes = []
    for folder in sorted(root.iterdir()):
        if (folder / CONFIGURATIONS).is_dir():
            with contextlib.suppress(errors.NotFound):
                homes.append(open_home(folder))
    return homes


def holds_nothing(path: Path) -> bool:
    """Whether a folder is empty but for the empty folders of a home, and for what dies with a command before its plan."""
    known = {PRIVATE, CONFIGURATIONS, SNAPSHOTS, BASES}
    return all(
        entry.name in known and not any(one.is_file() and not _is_nothing(one) for one in entry.rglob("*"))
        for entry in path.iterdir()
    )


def is_abandoned(path: Path) -> bool:
    """Whether a folder is what a command leaves that dies just before its plan is complete, or just after its end."""
    private = path / PRIVATE
    return (
        private.is_dir()
        and not any((path / CONFIGURATIONS).glob("*.xml"))
        and all(_is_nothing(entry) for entry in private.iterdir())
    )


def remove_remains(path: Path) -> None:
    """The private folder of an abandoned home is gone, and the home when nothing else is in it; Busy when in use."""
    layout = Layout(home=path, vm_id="")
    with locks.held(layout.lock, wait_s=0, what=f"the VM in {path}"):
        if is_abandoned(path):
            durable.remove_folder(layout.private)
            durable.remove_empty_folder(path)


def _is_nothing(file: Path) -> bool:
    return file.parent.name == PRIVATE and (file.name == "lock" or file.name.startswith(durable.TEMPORARY))


def require_facts(present: Configuration) -> Metadata:
    """hvmgr's facts in a configuration; Corrupt when they are gone."""
    facts = present.metadata()
    if facts is None:
        raise errors.Corrupt(f"{present.source} holds nothing of hvmgr's", path=present.source)
    return facts


def disks_of(present: Configuration) -> dict[str, str]:
    """The disks that take part in snapshots: slot to image path, links resolved."""
    return {
        disk.slot: canonical(disk.source) for disk in present.disks() if disk.takes_part and disk.source is not None
    }


def to_leaf(present: Configuration) -> Leaf:
    """The place of a present in the tree, and its working images."""
    return Leaf(parent=require_facts(present).parent, disks=disks_of(present))


def to_node(one: SnapshotFile) -> Node:
    """The place of a snapshot in the tree, and its images."""
    return Node(snapshot_id=one.record.id, parent=one.record.parent, disks=one.disks)


def canonical(path: str) -> str:
    """One spelling for each file, so that paths can be compared."""
    return os.path.realpath(path)


def _read_snapshot(file: Path) -> SnapshotFile:
    parsed = _parse(file)
    record = require_facts(parsed).snapshot
    if record is None:
        raise errors.Corrupt(f"{file} is no snapshot", path=str(file))
    return SnapshotFile(record=record, disks=disks_of(parsed), formats=_formats(parsed))


def _parse(file: Path) -> Configuration:
    with durable.explained(file):
        data = file.read_bytes()
    return configuration.parse(data, source=str(file))


def _formats(*configurations: Configuration) -> dict[str, str]:
    return {
        canonical(disk.source): disk.format or images.RAW
        for one in configurations
        for disk in one.disks()
        if disk.takes_part and disk.source is not None
    }


def _files(folder: Path) -> Iterable[str]:
    if not folder.is_dir():
        return []
    return sorted(entry.path for entry in os.scandir(folder) if entry.is_file() and not entry.name.startswith("."))


def _is_id(text: str) -> bool:
    try:
        return str(uuid.UUID(text)) == text
    except ValueError:
        return False
