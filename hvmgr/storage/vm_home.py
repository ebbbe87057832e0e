"""One VM home: the truth about a VM's snapshots, read from its files (docs/format.md).

Reading needs no lock and no libvirt: every file here is replaced as a whole. Whoever changes something holds
``locked`` first. What was read is never believed without a look: only a snapshot's file that is still the same inode
with the same size and time is not parsed again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from hvmgr import errors
from hvmgr.model import configuration
from hvmgr.model.configuration import Configuration
from hvmgr.model.layout import BASES, CONFIGURATIONS, PRIVATE, SNAPSHOTS, Layout
from hvmgr.model.metadata import Metadata, SnapshotRecord
from hvmgr.model.tree import Image, Keeper, Leaf, Node, Tree
from hvmgr.storage import disk_snapshots, durable, images, locks

T = TypeVar("T")

# Slot, path as the XML has it, format.
_Disk = tuple[str, str, str]

# Deleting one of 1,000 snapshots looks at the tree twice, and parsing is four fifths of a look. Two versions of a file
# that are written within one tick of the file system's clock (4 ms) could look the same: a young file is not kept.
_parsed: dict[str, tuple[tuple[int, int, int], tuple[SnapshotRecord, tuple[_Disk, ...]]]] = {}
_PARSED_MAX = 10_000
_SETTLED_NS = 3_000_000_000

# The name of a differencing image that hvmgr made: slot, image id. Others put files beside them (virsh does).
_OURS = re.compile(r"[^/]+_[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\.qcow2")
_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True, slots=True)
class SnapshotFile:
    """One snapshot as its XML tells it: the record, and its disks by slot."""

    record: SnapshotRecord
    disks: Mapping[str, str]
    formats: Mapping[str, str]  # by path


@dataclass(frozen=True, slots=True)
class SnapshotEntry:
    """One snapshot of a list: the record, and the text of its file, of which the rest is read when it is asked for."""

    record: SnapshotRecord
    source: str
    text: bytes = field(repr=False)

    @property
    def disks(self) -> dict[str, str]:
        """Its images by slot, as they were when the file was read."""
        return disks_of(configuration.parse(self.text, source=self.source))


@dataclass(frozen=True, slots=True)
class VmHome:
    """A home that exists; each call says what its files say now."""

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
        return parse_file(self.layout.configuration)

    def facts(self) -> Metadata:
        """hvmgr's own facts of the present."""
        return require_facts(self.present())

    def undo(self) -> Configuration | None:
        """The configuration in the undo slot."""
        try:
            return parse_file(self.layout.undo)
        except errors.NotFound:
            return None

    def snapshot(self, snapshot_id: str) -> Configuration:
        """The configuration of one snapshot."""
        return parse_file(self.layout.snapshot(snapshot_id))

    def snapshots(self) -> list[SnapshotFile]:
        """All snapshots with their disks, oldest first."""
        resolve = resolver()
        found = self._each_snapshot(lambda file: _read_snapshot(file, resolve))
        return sorted(found, key=lambda one: (one.record.created, one.record.id))

    def entries(self) -> list[SnapshotEntry]:
        """All snapshots for a list, oldest first: a third of the work of ``snapshots``."""
        return sorted(self._each_snapshot(_read_entry), key=lambda one: (one.record.created, one.record.id))

    def entry(self, snapshot_id: str) -> SnapshotEntry:
        """One snapshot as ``entries`` has it."""
        return _read_entry(str(self.layout.snapshot(snapshot_id)))

    def _each_snapshot(self, read: Callable[[str], T]) -> Iterator[T]:
        if not self.layout.snapshots.is_dir():
            return
        with os.scandir(self.layout.snapshots) as entries:
            paths = [entry.path for entry in entries if entry.name.endswith(".xml") and is_id(entry.name[:-4])]
        for path in paths:
            with contextlib.suppress(errors.NotFound):  # removed while we read
                yield read(path)

    @contextlib.contextmanager
    def locked(self, *, wait_s: float) -> Iterator[None]:
        """Exclusive for one command; leftovers of dead commands are swept first."""
        if self.layout.configuration.exists():
            durable.make_folder(self.layout.private)  # a home that was moved may have come without hvmgr's own files
        what = f"the VM in {self.path}"
        with locks.held(self.layout.lock, wait_s=wait_s, what=what, on_wait=self.ask_to_give_way):
            durable.remove(self.layout.give_way)
            if self.layout.configuration.exists():
                for folder in self.layout.folders():
                    durable.make_folder(folder)
            for folder in self.layout.folders()[1:]:
                durable.sweep(folder)
            yield

    def ask_to_give_way(self) -> None:
        """A merge that nobody waits for lets go of this home soon; all else goes on to its end.

        A home that is being deleted has no configuration any more, and gets nothing new.
        """
        with contextlib.suppress(OSError):
            if self.layout.configuration.exists():
                self.layout.give_way.touch(mode=0o600)

    def tree(self, *, strangers: Mapping[str, tuple[str, ...]] | None = None) -> Tree:
        """Both graphs, complete."""
        snapshots, present, undo = self.snapshots(), self.present(), self.undo()
        stated = {path: images.QCOW2 for path in _files(self.layout.images) if is_ours(os.path.basename(path))}
        for one in snapshots:
            stated.update(one.formats)
        stated.update(formats_of(present, *([] if undo is None else [undo])))
        found, others = self._load(stated)
        unstated = [path for path in _files(self.layout.bases) if path not in found]
        found |= self.load_images({path: images.probe(Path(path)) for path in unstated})
        nodes = {one.record.id: to_node(one) for one in snapshots}
        leaf = None if undo is None else to_leaf(undo)
        users = {**disk_snapshots.users(self.layout), **(strangers or {})}
        forest = Tree(images=found, nodes=nodes, present=to_leaf(present), undo=leaf, strangers=users)
        return with_own_names(forest, others) if others else forest

    def present_tree(self) -> Tree:
        """Only the chains of the present: enough to create a snapshot, whatever the size of the tree."""
        present = self.present()
        found, others = self._load(formats_of(present))
        forest = Tree(images=found, nodes={}, present=to_leaf(present))
        return with_own_names(forest, others) if others else forest

    def load_images(self, roots: Mapping[str, str]) -> dict[str, Image]:
        """The images (path to format) and all their parents. A format is what the configuration or the child states.

        An image that is missing is left out: ``Tree.chain`` names it when it is needed. A file that is met under
        several names (hard links, bind mounts) is one image, by its name in the home where it has one there.
        """
        return self._load(roots)[0]

    def _load(self, roots: Mapping[str, str]) -> tuple[dict[str, Image], dict[str, str]]:
        """The images, and the other names of those that were met under several, each with the one that counts."""
        found: dict[str, Image] = {}
        by_identity: dict[tuple[int, int], list[str]] = {}
        keeper, resolve = self.keepers(), resolver()
        todo = list(roots.items())
        while todo:
            path, fmt = todo.pop()
            if path in found:
                continue
            try:
                header = images.read(Path(path), fmt)
            except errors.NotFound:
                continue
            parent = None
            if header.backing is not None:
                parent = resolve(os.path.join(os.path.dirname(path), header.backing))
                if header.backing_format is None:
                    raise errors.Unsupported(
                        f"{path} does not state the format of its parent",
                        hint=f"state it: qemu-img rebase -u -b '{header.backing}' -F FORMAT '{path}'",
                    )
                todo.append((parent, header.backing_format))
            found[path] = Image(path, parent, header.format, header.size, header.data, keeper(path))
            by_identity.setdefault(header.identity, []).append(path)
        others = other_names(by_identity.values(), keeper) if len(by_identity) < len(found) else {}
        if others:
            found = {
                path: dataclasses.replace(image, parent=others.get(image.parent or "", image.parent))
                for path, image in found.items()
                if path not in others
            }
        return found, others

    def keepers(self) -> Callable[[str], Keeper]:
        """Who an image belongs to, by its path."""
        ours, bases = str(self.layout.images), str(self.layout.bases)

        def keeper(path: str) -> Keeper:
            folder, name = os.path.split(path)
            if folder == ours and is_ours(name):
                return Keeper.IMAGES
            return Keeper.BASES if folder == bases else Keeper.OUTSIDE

        return keeper


def open_home(path: Path) -> VmHome:
    """The home in a folder; NotFound when it is none, Corrupt when it is more than one."""
    path = Path(os.path.realpath(path))
    configurations = path / CONFIGURATIONS
    found = [file for file in configurations.glob("*.xml") if is_id(file.stem)] if configurations.is_dir() else []
    if not found:
        raise errors.NotFound(f"{path} is no VM home: there is no configuration in '{CONFIGURATIONS}'")
    if len(found) > 1:
        raise errors.Corrupt(
            f"{path} holds {len(found)} configurations; a home has one",
            hint=f"see which one is the VM's: hvmgr doctor '{path}'",
            path=str(path),
        )
    return VmHome(layout_of(path, found[0].stem))


def around(path: Path) -> Path | None:
    """The home, or the export, that a place lies in: nothing else may be made there; None when it lies in none."""
    for above in path.parents:
        if any(is_id(one.stem) for one in (above / CONFIGURATIONS).glob("*.xml")):
            return above
    return None


def layout_of(path: Path, vm_id: str) -> Layout:
    """The folders of a home, of which snapshots and bases may lie elsewhere behind a link."""
    places = [path / SNAPSHOTS, path / BASES]
    snapshots, bases = (Path(os.path.realpath(place)) if place.is_symlink() else None for place in places)
    return Layout(home=path, vm_id=vm_id, snapshots_at=snapshots, bases_at=bases)


def find_homes(root: Path, *, left_out: Callable[[errors.HvmgrError], None] | None = None) -> list[VmHome]:
    """Every home directly below a root, in the order of the folders' names.

    ``left_out`` is told of one that cannot be opened, and why; without it that is raised.
    """
    if not root.is_dir():
        return []
    homes = []
    for folder in sorted(root.iterdir()):
        try:
            with durable.explained(folder):
                if (folder / CONFIGURATIONS).is_dir():
                    homes.append(open_home(folder))
        except errors.NotFound:
            continue  # no home
        except errors.HvmgrError as error:
            if left_out is None:
                raise
            left_out(error)
    return homes


def snapshot_files(layout: Layout) -> list[Path]:
    """The configurations of all snapshots, readable or not."""
    return [file for file in sorted(layout.snapshots.glob("*.xml")) if is_id(file.stem)]


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
    return file.parent.name == PRIVATE and (
        file.name in {"lock", "give-way", "reserve"} or file.name.startswith(durable.TEMPORARY)
    )


def require_facts(present: Configuration) -> Metadata:
    """hvmgr's facts in a configuration; Corrupt when they are gone."""
    facts = present.metadata()
    if facts is None:
        raise errors.Corrupt(f"{present.source} holds nothing of hvmgr's", path=present.source)
    return facts


def disks_of(present: Configuration) -> dict[str, str]:
    """The disks that take part in snapshots: slot to image path, links resolved."""
    return {slot: canonical(source) for slot, source, _ in _iter_disks(present)}


def is_id(text: str) -> bool:
    """Whether a text is an id as file names have them."""
    return _ID.fullmatch(text) is not None


def is_ours(name: str) -> bool:
    """Whether a file has the name of a differencing image that hvmgr made."""
    return _OURS.fullmatch(name) is not None


def to_leaf(present: Configuration) -> Leaf:
    """The place of a present in the tree, and its working images."""
    return Leaf(parent=require_facts(present).parent, disks=disks_of(present))


def to_node(one: SnapshotFile) -> Node:
    """The place of a snapshot in the tree, and its images."""
    return Node(snapshot_id=one.record.id, parent=one.record.parent, disks=one.disks)


def canonical(path: str) -> str:
    """One spelling for each file, so that paths can be compared."""
    return os.path.realpath(path)


def resolver() -> Callable[[str], str]:
    """``canonical`` for many paths in few folders: the links in a folder's own path are followed once for all."""
    folders: dict[str, str] = {}

    def resolve(path: str) -> str:
        folder, name = os.path.split(path)
        if name in {"", ".", ".."}:
            return canonical(path)
        if folder not in folders:
            folders[folder] = canonical(folder)
        resolved = os.path.join(folders[folder], name)
        return canonical(resolved) if os.path.islink(resolved) else resolved

    return resolve


def other_names(same: Iterable[list[str]], keeper: Callable[[str], Keeper]) -> dict[str, str]:
    """Of files that were met under several names: every other name, with the one that counts, in the home if there is."""
    others: dict[str, str] = {}
    for paths in same:
        first, *rest = sorted(paths, key=lambda one: (keeper(one) is Keeper.OUTSIDE, one))
        others.update(dict.fromkeys(rest, first))
    return others


def with_own_names(forest: Tree, others: Mapping[str, str]) -> Tree:
    """Snapshots and presents name each image as the forest does; ``others`` are other names for the same files."""

    def own(disks: Mapping[str, str]) -> dict[str, str]:
        return {slot: others.get(path, path) for slot, path in disks.items()}

    return dataclasses.replace(
        forest,
        nodes={key: dataclasses.replace(node, disks=own(node.disks)) for key, node in forest.nodes.items()},
        present=dataclasses.replace(forest.present, disks=own(forest.present.disks)),
        undo=None if forest.undo is None else dataclasses.replace(forest.undo, disks=own(forest.undo.disks)),
    )


def _read_snapshot(file: str, resolve: Callable[[str], str]) -> SnapshotFile:
    record, disks = _parsed_snapshot(file)
    paths = [(slot, resolve(source), fmt) for slot, source, fmt in disks]
    return SnapshotFile(
        record=record,
        disks={slot: path for slot, path, _ in paths},
        formats={path: fmt for _, path, fmt in paths},
    )


def _parsed_snapshot(file: str) -> tuple[SnapshotRecord, tuple[_Disk, ...]]:
    with durable.explained(Path(file)):
        facts = os.stat(file)
    stamp = (facts.st_ino, facts.st_size, facts.st_mtime_ns)
    known = _parsed.get(file)
    if known is not None and known[0] == stamp:
        return known[1]
    with _examined():
        parsed = configuration.parse(_read(file), source=file)
        found = _require_record(require_facts(parsed), file), tuple(_iter_disks(parsed))
    if time.time_ns() - facts.st_mtime_ns > _SETTLED_NS:
        if len(_parsed) >= _PARSED_MAX:
            _parsed.clear()
        _parsed[file] = stamp, found
    return found


def _read_entry(file: str) -> SnapshotEntry:
    text = _read(file)
    with _examined():
        return SnapshotEntry(_require_record(configuration.metadata_of(text, source=file), file), file, text)


def _require_record(facts: Metadata | None, file: str) -> SnapshotRecord:
    if facts is None or facts.snapshot is None:
        raise errors.Corrupt(f"{file} is no snapshot", path=file)
    return facts.snapshot


def _read(file: str) -> bytes:
    with durable.explained(Path(file)), open(file, "rb", buffering=0) as reader:
        return reader.read()


def parse_file(file: Path) -> Configuration:
    """The configuration in a file; NotFound, or Corrupt with line and column."""
    with _examined():
        return configuration.parse(_read(str(file)), source=str(file))


@contextlib.contextmanager
def _examined() -> Iterator[None]:
    """Whoever meets a damaged file of a home hears who knows what can be done."""
    try:
        yield
    except errors.Corrupt as error:
        error.hint = error.hint or "hvmgr doctor says what can be put right"
        raise


def _iter_disks(one: Configuration) -> Iterator[_Disk]:
    """The disks that take part in snapshots."""
    for disk in one.disks():
        if disk.takes_part and disk.source is not None:
            yield disk.slot, disk.source, disk.format or images.RAW


def require_usable_disks(one: Configuration) -> None:
    """Unsupported when any drive, also one that snapshots leave out, holds a differencing VHD or VHDX."""
    for disk in one.disks():
        if disk.source is not None and disk.type in {"file", "block"}:
            images.require_usable(Path(canonical(disk.source)))


def formats_of(*configurations: Configuration) -> dict[str, str]:
    """The formats that configurations state for the images of their disks."""
    return {canonical(source): fmt for one in configurations for _, source, fmt in _iter_disks(one)}


def _files(folder: Path) -> Iterable[str]:
    if not folder.is_dir():
        return []
    return sorted(entry.path for entry in os.scandir(folder) if entry.is_file() and not entry.name.startswith("."))
