"""A home read as far as it goes: what its files say, and for each that says nothing why not.

``VmHome.tree`` stops at the first file that is damaged; who looks for damage wants all of it. Nothing is changed here,
and neither libvirt nor a lock is needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hvmgr import errors
from hvmgr.model.configuration import Configuration
from hvmgr.model.layout import CONFIGURATIONS, Layout
from hvmgr.model.metadata import Metadata
from hvmgr.model.tree import Image, Leaf, Node, Tree
from hvmgr.storage import disk_snapshots, durable, images, vm_home
from hvmgr.storage.images import Header
from hvmgr.storage.vm_home import VmHome


@dataclass(frozen=True, slots=True)
class Fault:
    """A file that says nothing of use, and why."""

    file: Path
    error: errors.HvmgrError


@dataclass(frozen=True, slots=True)
class Missing:
    """An image that is not there: the format that is stated of it, and who needs it."""

    format: str
    needed_by: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """One configuration of a home: the present, the undo slot's, or a snapshot's. ``who`` says it to people."""

    who: str
    file: Path
    configuration: Configuration = field(repr=False)
    facts: Metadata

    @property
    def disks(self) -> dict[str, str]:
        """The disks that take part in snapshots: slot to image path."""
        return vm_home.disks_of(self.configuration)


@dataclass(frozen=True, slots=True)
class Survey:
    """Everything that could be read of one home.

    ``headers`` are the images by path, ``missing`` those that are not there; ``faults`` are the files that are damaged,
    images among them.
    """

    home: VmHome
    present: Part | None
    undo: Part | None
    snapshots: tuple[Part, ...]
    headers: Mapping[str, Header]
    missing: Mapping[str, Missing]
    faults: tuple[Fault, ...]

    @property
    def name(self) -> str:
        """The VM's name; its folder's where nobody can read it."""
        return self.home.path.name if self.present is None else self.present.configuration.name

    def parts(self) -> list[Part]:
        """Every configuration that could be read."""
        leaves = [one for one in (self.present, self.undo) if one is not None]
        return [*leaves, *self.snapshots]

    def needs(self, path: str) -> list[str]:
        """Who stands on an image or names it, in the words of people."""
        named = [one.who for one in self.parts() if path in one.disks.values()]
        below = [Path(one).name for one, header in self.headers.items() if str(header.parent) == path]
        return [*named, *below]

    def tree(self) -> Tree:
        """Both graphs as far as they could be read; a missing image is left out."""
        keeper = self.home.keepers()
        by_identity: dict[tuple[int, int], list[str]] = {}
        for path, header in self.headers.items():
            by_identity.setdefault(header.identity, []).append(path)
        others = vm_home.other_names(by_identity.values(), keeper)
        forest = {}
        for path, header in self.headers.items():
            if path not in others:
                parent = None if header.parent is None else others.get(str(header.parent), str(header.parent))
                forest[path] = Image(path, parent, header.format, header.size, header.data, keeper(path))
        nodes = {}
        for one in self.snapshots:
            assert one.facts.snapshot is not None
            nodes[one.facts.snapshot.id] = Node(one.facts.snapshot.id, one.facts.snapshot.parent, one.disks)
        present = Leaf(None, {}) if self.present is None else Leaf(self.present.facts.parent, self.present.disks)
        undo = None if self.undo is None else Leaf(self.undo.facts.parent, self.undo.disks)
        users: dict[str, tuple[str, ...]] = {}
        with contextlib.suppress(errors.HvmgrError):  # whoever needs it says so
            users = disk_snapshots.users(self.home.layout)
        found = Tree(images=forest, nodes=nodes, present=present, undo=undo, strangers=users)
        return vm_home.with_own_names(found, others)


def configurations(folder: Path) -> list[Path]:
    """The files that could be the configuration of a home."""
    place = folder / CONFIGURATIONS
    with durable.explained(place):
        return sorted(file for file in place.glob("*.xml") if vm_home.is_id(file.stem)) if place.is_dir() else []


def take(home: VmHome) -> Survey:
    """What the files of a home say now."""
    faults: list[Fault] = []
    layout = home.layout
    present = _part(layout, layout.configuration, "the present", faults)
    undo = _part(layout, layout.undo, "the undo slot", faults) if layout.undo.exists() else None
    snapshots = tuple(_snapshots(layout, faults))
    parts = [one for one in (present, undo) if one is not None] + list(snapshots)
    headers, missing = _images(layout, parts, faults)
    return Survey(home, present, undo, snapshots, headers, missing, tuple(faults))


def identities(path: str, fmt: str) -> set[tuple[int, int]]:
    """Device and inode of an image and of all below it, as far as headers can be read."""
    found: set[tuple[int, int]] = set()
    step: str | None = path
    stated: str | None = fmt
    while step is not None and stated is not None:
        try:
            header = images.read(Path(step), stated)
        except errors.HvmgrError:
            with contextlib.suppress(OSError):
                found.add(images.identity(Path(step)))
            break
        if header.identity in found:
            break
        found.add(header.identity)
        step, stated = (None if header.parent is None else str(header.parent)), header.backing_format
    return found


def _part(layout: Layout, file: Path, who: str, faults: list[Fault]) -> Part | None:
    try:
        parsed = vm_home.parse_file(file)
        if parsed.uuid != layout.vm_id:
            raise errors.Corrupt(f"{file} is the configuration of another VM: {parsed.uuid}", path=str(file))
        facts = vm_home.require_facts(parsed)
        part = Part(who, file, parsed, facts)
        _ = parsed.name, part.disks  # read now what everybody wants to know, so that a fault is seen here
    except errors.HvmgrError as error:
        faults.append(Fault(file, error))
        return None
    return part


def _snapshots(layout: Layout, faults: list[Fault]) -> Iterator[Part]:
    if not layout.snapshots.is_dir():
        return
    for file in sorted(layout.snapshots.glob("*.xml")):
        if not vm_home.is_id(file.stem):
            continue
        part = _part(layout, file, "", faults)
        if part is None:
            continue
        record = part.facts.snapshot
        if record is None or record.id != file.stem:
            faults.append(Fault(file, errors.Corrupt(f"{file} is no snapshot of that id", path=str(file))))
            continue
        yield Part(f"snapshot '{record.name}'", file, part.configuration, part.facts)


def _images(layout: Layout, parts: Iterable[Part], faults: list[Fault]) -> tuple[dict[str, Header], dict[str, Missing]]:
    """Every image that a configuration or a child names, and those that lie in the home's folders."""
    headers: dict[str, Header] = {}
    missing: dict[str, Missing] = {}
    broken: set[str] = set()
    todo = [*_stated(parts), *_lying(layout, faults)]
    while todo:
        path, fmt, who = todo.pop(0)
        if path in headers or path in broken:
            continue
        try:
            headers[path] = header = images.read(Path(path), fmt)
            if header.parent is None:
                continue
            if header.backing_format is None:
                raise errors.Unsupported(
                    f"{path} does not state the format of its parent",
                    hint=f"state it: qemu-img rebase -u -b '{header.backing}' -F FORMAT '{path}'",
                )
            todo.append((str(header.parent), header.backing_format, Path(path).name))
        except errors.NotFound:
            needed_by = missing[path].needed_by if path in missing else ()
            missing[path] = Missing(fmt, tuple(dict.fromkeys((*needed_by, who))))
        except errors.HvmgrError as error:
            broken.add(path)
            faults.append(Fault(Path(path), error))
    return headers, missing


def _stated(parts: Iterable[Part]) -> Iterator[tuple[str, str, str]]:
    for part in parts:
        formats = vm_home.formats_of(part.configuration)
        for path in part.disks.values():
            yield path, formats[path], part.who


def _lying(layout: Layout, faults: list[Fault]) -> list[tuple[str, str, str]]:
    found = []
    for file in _files(layout.images):
        if vm_home.is_ours(file.name):
            found.append((str(file), images.QCOW2, ""))
    for file in _files(layout.bases):
        try:
            found.append((str(file), images.probe(file), ""))
        except errors.HvmgrError as error:
            faults.append(Fault(file, error))
    return found


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    with durable.explained(folder):
        return sorted(one for one in folder.iterdir() if one.is_file() and not one.name.startswith("."))
