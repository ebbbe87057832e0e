"""What of a source comes along, and under which names: the part that copying, linking and replacing share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from hvmgr.model import maps, names, plan
from hvmgr.model.configuration import Configuration
from hvmgr.model.identity import Identity
from hvmgr.model.import_options import ImportOptions
from hvmgr.model.layout import Layout
from hvmgr.model.maps import Maps, Used
from hvmgr.model.metadata import DiskRecord, ImportOrigin, Metadata, SavedState
from hvmgr.model.plan import Step
from hvmgr.storage import frozen, images, vm_home
from hvmgr.storage.source_home import SourceHome, SourceSnapshot
from hvmgr.storage.source_images import SourceImage

_SUFFIXES = {images.QCOW2: ".qcow2", images.VPC: ".vhd", images.RAW: ".img"}


@dataclass(frozen=True, slots=True)
class Intake:
    """A source seen as a VM of this host: ``places`` says where each image of it will be."""

    source: SourceHome
    options: ImportOptions
    maps: Maps
    used: Used
    identity: Identity
    layout: Layout
    uri: str
    now: datetime
    new_id: Callable[[], str]
    snapshots: tuple[SourceSnapshot, ...]
    places: Mapping[str, str]
    known: frozenset[str] = frozenset()  # snapshots that are at the target already
    shared: Mapping[str, str] = field(
        default_factory=dict
    )  # images of those that stand for the source's: their formats
    emulators: Mapping[str, Path] = field(default_factory=dict)  # this host's, by architecture
    converted: frozenset[str] = frozenset()  # VHDs that become qcow2
    origin: ImportOrigin | None = None  # None: what the source itself was made of stays
    present_memory: Path | None = None  # where libvirt looks for the saved memory of the present, when it comes along

    # -- configurations ------------------------------------------------------------------------------------------------

    def present(self, *, change: str, nvram: Path | None, disks: Mapping[str, tuple[str, str]]) -> Configuration:
        """The present as it will be defined; ``disks`` are (path, format) by slot."""
        changed = self._changed(self.source.present, disks, nvram)
        _eject_missing(changed)  # an apply does the same with a snapshot's
        facts = self._facts(self.source.present)
        changed.set_metadata(dataclasses.replace(facts, change=change, snapshot=None))
        return changed

    def undo(self, one: Configuration, disks: Mapping[str, tuple[str, str]], nvram: Path | None) -> Configuration:
        """The undo slot, of a home that is registered where it lies."""
        changed = self._changed(one, disks, nvram)
        changed.set_metadata(self._facts(one))
        return changed

    def snapshot(self, one: SourceSnapshot) -> Configuration:
        """The configuration of a snapshot as it will be written."""
        disks = self.placed(one.disks)
        new_id = self.identity.snapshot(one.record.id)
        assert new_id is not None
        changed = self._changed(one.configuration, disks, self.layout.snapshot_nvram(new_id))
        facts = self._facts(one.configuration)
        assert facts.snapshot is not None
        if not self.keeps_state(one):
            facts = dataclasses.replace(facts, snapshot=dataclasses.replace(facts.snapshot, state=SavedState.NONE))
        changed.set_metadata(facts)
        return changed

    def saved(
        self, live: Configuration, facts_of: Configuration, disks: Mapping[str, tuple[str, str]], nvram: Path | None
    ) -> str:
        """The configuration inside a saved state."""
        changed = self._changed(live, disks, nvram)
        for source in changed.root.findall("devices/channel[@type='unix']/source"):
            parent = source.getparent()
            if parent is not None and maps.OWN_SOCKET.search(source.get("path", "")):
                parent.remove(source)
        changed.set_metadata(dataclasses.replace(self._facts(facts_of), snapshot=None))
        return changed.to_xml()

    def format_of(self, path: str) -> str:
        """The format of an image of the source at its place."""
        return images.QCOW2 if path in self.converted else self.source.images[path].format

    def placed(self, disks: Mapping[str, str]) -> dict[str, tuple[str, str]]:
        """Disks by slot as (path, format), at their places."""
        return {slot: (self.places[path], self.format_of(path)) for slot, path in disks.items()}

    def keeps_state(self, one: SourceSnapshot) -> bool:
        return one.memory is not None and one.saved is not None and not self.options.without_state

    def _changed(self, one: Configuration, disks: Mapping[str, tuple[str, str]], nvram: Path | None) -> Configuration:
        changed = one.copy()
        changed.strip_backing_chains()
        maps.rewrite(changed, self.maps, self.used)
        for slot, (path, fmt) in {**self._left_out(one), **disks}.items():
            changed.set_disk_source(slot, Path(path), fmt)
        self.identity.impress(changed)
        self._set_emulator(changed)
        if one.nvram is not None and nvram is not None:
            changed.set_nvram(nvram)
        return changed

    def _left_out(self, one: Configuration) -> dict[str, tuple[str, str]]:
        """The disks that snapshots do not freeze: two VMs must never write to one, and a source is never written."""
        found: dict[str, tuple[str, str]] = {}
        for disk in one.disks():
            path = self.source.named.get(disk.source or "", "") if disk.is_left_out else ""
            if path in self.places and path in self.source.images and self.places[path] != disk.source:
                found[disk.slot] = (self.places[path], self.format_of(path))
        return found

    def _set_emulator(self, changed: Configuration) -> None:
        """Distributions put QEMU into different places: where the source's is not, this host's own is.

        libvirt runs it as soon as the VM is defined: no stranger says which program that is.
        """
        element = changed.root.find("devices/emulator")
        own = self.emulators.get(changed.arch or "")
        if element is None or own is None:
            return
        if not self.source.trusted or not Path((element.text or "").strip()).exists():
            element.text = str(own)

    def _facts(self, one: Configuration) -> Metadata:
        old = one.metadata()
        if old is None:
            slots = vm_home.disks_of(one)
            records = tuple(DiskRecord(slot=slot, id=self.new_id()) for slot in slots)
            facts = Metadata(home=self.layout.home, uri=self.uri, created=self.now, disks=records)
        else:
            facts = self.identity.facts(self._without_dropped(old), home=self.layout.home, uri=self.uri)
        facts = dataclasses.replace(facts, origin=self.origin or facts.origin)
        return dataclasses.replace(
            facts, owner=self.options.owner or facts.owner, tags=tuple(dict.fromkeys((*facts.tags, *self.options.tags)))
        )

    def _without_dropped(self, facts: Metadata) -> Metadata:
        """Snapshots that stay away leave their place in the tree to the one above."""
        snapshot = facts.snapshot
        if snapshot is not None:
            snapshot = dataclasses.replace(snapshot, parent=self.heir(snapshot.parent))
        wanted = facts.policy
        target = None if wanted.recovery is None else wanted.recovery.snapshot
        if target is not None and self.heir(target) != target:
            wanted = dataclasses.replace(wanted, recovery=None)  # to go back to another one is not what was asked for
        return dataclasses.replace(facts, parent=self.heir(facts.parent), snapshot=snapshot, policy=wanted)

    def heir(self, snapshot_id: str | None) -> str | None:
        """The nearest snapshot at or above this one that comes along."""
        parents = {one.record.id: one.record.parent for one in self.source.snapshots}
        kept = {one.record.id for one in self.snapshots} | self.known
        while snapshot_id is not None and snapshot_id not in kept:
            snapshot_id = parents.get(snapshot_id)
        return snapshot_id

    # -- steps ---------------------------------------------------------------------------------------------------------

    def needed(self) -> list[SourceImage]:
        """Every image that the present and the snapshots that come along stand on, bases first."""
        return needed_images(self.source, self.snapshots, shared=self.shared)

    def left_out(self) -> list[SourceImage]:
        """The images of disks that snapshots do not freeze, with what they stand on, bases first."""
        shared = {one.path for one in needed_images(self.source, self.snapshots, left_out=False)}
        return [one for one in self.needed() if one.path not in shared]

    def steps_for_images(self, *, hold: tuple[str, ...], only: Sequence[SourceImage] | None = None) -> list[Step]:
        """The images are copied, name each other under their new names, and are frozen where they have to be."""
        needed = self.needed() if only is None else only
        if not needed and self.source.archive is None:
            return []
        parents = {image.parent for image in needed if image.parent is not None}
        frozen = parents | {path for one in self.snapshots for path in one.disks.values()}
        steps = self._steps_for_bytes(needed, hold)
        copied = [one for one in needed if one.path not in self.converted]
        steps += [self._require(copied)] if copied else []
        steps += [step for image in needed if (step := self._rename_parent(image)) is not None]
        steps += [plan.FreezeImage(path=self.places[image.path]) for image in needed if image.path in frozen]
        return steps

    def _steps_for_bytes(self, needed: Sequence[SourceImage], hold: tuple[str, ...]) -> list[Step]:
        """The images' bytes; out of an archive everything that is large, in one pass through it."""
        as_they_are = [one for one in needed if one.path not in self.converted]
        files = [(one.path, self.places[one.path], self._digest(one)) for one in as_they_are]
        files += [(one.path, str(self._waiting(one)), self._digest(one)) for one in needed if self._is_packed_vhd(one)]
        steps = self._steps_for_files(files, hold)
        return [*steps, *(self._convert(one) for one in needed if one.path in self.converted)]

    def _require(self, copied: Sequence[SourceImage]) -> plan.RequireImages:
        return plan.RequireImages(
            images=tuple((self.places[one.path], one.format, one.size, one.backing or "") for one in copied)
        )

    def _digest(self, image: SourceImage) -> str:
        listed = self.source.expected.get(image.path)
        return (listed.sha256 if listed is not None and listed.bytes == image.length else None) or ""

    def _is_packed_vhd(self, image: SourceImage) -> bool:
        """Whether a VHD has to be unpacked before it can be converted."""
        archive = self.source.archive
        return image.path in self.converted and archive is not None and archive.name_of(image.path) is not None

    def _waiting(self, image: SourceImage) -> Path:
        """Where a VHD out of an archive waits to be converted."""
        return self.unpacked / Path(self.places[image.path]).with_suffix(".vhd").name

    @property
    def unpacked(self) -> Path:
        """A folder for what is needed only as long as the import takes."""
        return self.layout.private / "unpacked"

    def _convert(self, image: SourceImage) -> plan.ConvertVhd:
        target, packed = self.places[image.path], self._is_packed_vhd(image)
        parent = None if image.parent is None else self.layout.parent_name(Path(target), self.places[image.parent])
        return plan.ConvertVhd(
            source=str(self._waiting(image)) if packed else image.path,
            target=target,
            size=image.size,
            parent=parent,
            parent_format=None if image.parent is None else self.shared.get(image.parent, self.format_of(image.parent)),
            sha256="" if packed else self._digest(image),
        )

    def _steps_for_files(self, files: Sequence[tuple[str, str, str]], hold: tuple[str, ...]) -> list[Step]:
        archive = self.source.archive
        if archive is None:
            return [plan.CopyImages(tuple(files), hold, plain=not self.source.trusted)] if files else []
        packed, others, steps = list[tuple[str, str, str]](), list[tuple[str, str, str]](), list[Step]()
        for path, target, digest in files:
            name = archive.name_of(path)
            if name is None:
                others.append((path, target, digest))  # one that the user named by a map
            else:
                packed.append((name, target, digest))
        for memory, place in self._memories():
            name = archive.name_of(memory)
            assert name is not None
            packed.append((name, str(place), self.source.hash_of(memory)))
            if place.is_relative_to(self.layout.snapshots):
                steps.append(plan.MakeSnapshotFolder(snapshot_id=place.parent.name))
        if any(Path(target).is_relative_to(self.unpacked) for _, target, _ in packed):
            steps.append(plan.MakeFolders(folders=(str(self.unpacked),)))
        steps += [plan.CopyImages(tuple(others), hold, plain=True)] if others else []
        if packed:
            _, _, size, mtime_ns = archive.state
            steps.append(plan.UnpackFiles(str(archive.path), size, mtime_ns, tuple(packed)))
        return steps

    def _memories(self) -> Iterator[tuple[Path, Path]]:
        """Saved memory that comes along, and where to."""
        for one in self.snapshots:
            if self.keeps_state(one) and one.memory is not None:
                yield one.memory, self.layout.memory(self.identity.snapshot(one.record.id) or one.record.id)
        if self.present_memory is not None and self.source.memory is not None:
            yield self.source.memory, self.present_memory

    def step_for_nvram(self, source: Path, target: Path) -> Step:
        """The variables of the firmware are at their place."""
        return plan.CopyFile(source=str(source), target=str(target), plain=not self.source.trusted)

    def step_for_memory(self, source: Path, target: Path, before: Configuration, xml: str) -> Step:
        """The saved state is at its place, with this configuration in it."""
        if self.source.archive is not None:
            return plan.ChangeMemory(path=str(target), before=before.to_xml(), after=xml)
        return plan.CopyMemory(source=str(source), target=str(target), xml=xml)

    def steps_after(self) -> list[Step]:
        """What was needed on the way is gone."""
        is_used = any(self._is_packed_vhd(one) for one in self.needed())
        return [plan.RemoveFolder(path=str(self.unpacked))] if is_used else []

    def frozen(self) -> tuple[str, ...]:
        """The copies that are frozen, for their records."""
        needed = self.needed()
        frozen = {image.parent for image in needed} | {path for one in self.snapshots for path in one.disks.values()}
        return tuple(self.places[image.path] for image in needed if image.path in frozen)

    def _rename_parent(self, image: SourceImage) -> plan.NameParent | None:
        if image.parent is None or image.backing is None or image.path in self.converted:
            return None
        child, parent = Path(self.places[image.path]), self.places[image.parent]
        name = self.layout.parent_name(child, parent)
        if name == image.backing and image.parent not in self.shared and image.parent not in self.converted:
            return None
        fmt = self.shared.get(image.parent, images.QCOW2 if image.parent in self.converted else image.parent_format)
        assert fmt is not None
        return plan.NameParent(
            path=str(child), parent=name, parent_format=fmt, before=image.backing, mode=frozen.WORKING_MODE
        )

    def steps_for_snapshots(self) -> list[Step]:
        """Each snapshot is in the tree, with all that it consists of; parents need not come first."""
        steps: list[Step] = []
        for one in self.snapshots:
            new_id = self.identity.snapshot(one.record.id)
            assert new_id is not None
            steps.append(plan.MakeSnapshotFolder(snapshot_id=new_id))
            if one.nvram is not None:
                steps.append(self.step_for_nvram(one.nvram, self.layout.snapshot_nvram(new_id)))
            if one.tpm is not None:
                steps.append(plan.CopyFolder(source=str(one.tpm), target=str(self.layout.snapshot_tpm(new_id))))
            if self.keeps_state(one):
                assert one.memory is not None
                assert one.saved is not None
                disks = self.placed(one.disks)
                xml = self.saved(one.saved, one.configuration, disks, self.layout.snapshot_nvram(new_id))
                steps.append(self.step_for_memory(one.memory, self.layout.memory(new_id), one.saved, xml))
            steps.append(plan.WriteSnapshot(snapshot_id=new_id, xml=self.snapshot(one).to_xml()))
        return steps


def kept_snapshots(source: SourceHome, options: ImportOptions) -> tuple[SourceSnapshot, ...]:
    """The snapshots that come along; NotFound for one that is to be dropped and that nobody has ever named."""
    if options.without_snapshots:
        return ()
    known = {one.record.id for one in source.snapshots} | {one.record.name for one in source.snapshots}
    named = {one.record.parent for one in source.snapshots} | {source.facts.parent if source.facts else None}
    for one in options.drop_snapshots:
        if one not in known and one not in named:
            raise names.not_found(
                "snapshot", one, [each.record.name for each in source.snapshots], where=f"in {source.folder}"
            )
    gone = set(options.drop_snapshots)
    return tuple(one for one in source.snapshots if not gone & {one.record.id, one.record.name})


def needed_images(
    source: SourceHome,
    snapshots: Iterable[SourceSnapshot],
    *,
    shared: Container[str] = (),
    left_out: bool = True,
) -> list[SourceImage]:
    """The images of the present and of these snapshots with all their parents, bases first; none at or below ``shared``.

    ``left_out``: those of disks that snapshots do not freeze are among them.
    """
    found: dict[str, SourceImage] = {}
    tops = (top for disks in disks_of(source, snapshots, left_out=left_out) for top in disks.values())
    for top in tops:
        chain = source.chain(top)
        count = next((number for number, image in enumerate(chain) if image.path in shared), len(chain))
        for image in reversed(chain[:count]):
            found.setdefault(image.path, image)
    return list(found.values())


def disks_of(
    source: SourceHome, snapshots: Iterable[SourceSnapshot], *, left_out: bool = True
) -> Iterator[Mapping[str, str]]:
    """The disks of the present and of these snapshots: slot and the image's place now."""
    yield source.disks
    if left_out:
        yield source.left_out
    for one in snapshots:
        yield one.disks
        if left_out:
            yield one.left_out


def place_images(
    layout: Layout,
    source: SourceHome,
    snapshots: tuple[SourceSnapshot, ...],
    targets: Mapping[str, str],
    new_id: Callable[[], str],
    *,
    shared: Container[str] = (),
    converted: Container[str] = (),
) -> dict[str, str]:
    """Where the copy of each image goes: names stay as far as they are free; ``targets`` are places for bases by slot."""
    slots = slots_of(source, snapshots)
    places: dict[str, str] = {}
    taken: set[str] = set()
    for image in needed_images(source, snapshots, shared=shared):
        slot = slots.get(image.path, "disk")
        name = Path(image.path).name if image.inside or image.parent is not None else f"{slot}{_SUFFIXES[image.format]}"
        if image.path in converted:
            name = str(Path(name).with_suffix(_SUFFIXES[images.QCOW2]))
        if image.parent is None:
            target = _place_base(layout, name, targets.get(slot), taken)
        else:
            target = _place_child(layout, name, slot, taken, new_id)
        places[image.path] = target
        taken.add(target)
    return places


def to_convert(
    source: SourceHome, snapshots: Sequence[SourceSnapshot], options: ImportOptions, *, left_out: bool
) -> frozenset[str]:
    """The VHDs that become qcow2: all of a source where one is differencing, or where saved memory is to go on.

    QEMU runs on a VHD that has no parent; but it saves no memory then. ``left_out``: of disks that snapshots leave out only.
    """
    needed = needed_images(source, snapshots)
    if left_out:
        shared = {one.path for one in needed_images(source, snapshots, left_out=False)}
        needed = [one for one in needed if one.path not in shared]
    saved = [source.saved, *(one.saved for one in snapshots)]
    has_memory = not options.without_state and any(one is not None for one in saved)
    if has_memory or any(one.is_foreign for one in needed):
        return frozenset(one.path for one in needed if one.format == images.VPC)
    return frozenset()


def slots_of(source: SourceHome, snapshots: Iterable[SourceSnapshot]) -> dict[str, str]:
    """The slot of the disk that each image belongs to."""
    slots: dict[str, str] = {}
    for disks in disks_of(source, snapshots):
        for slot, top in disks.items():
            for image in source.chain(top):
                slots.setdefault(image.path, slot)
    return slots


def _place_base(layout: Layout, name: str, target: str | None, taken: set[str]) -> str:
    if target is not None:
        return str(Path(target) / name) if Path(target).is_dir() else target
    return _free(layout.bases, Path(name), taken)


def _place_child(layout: Layout, name: str, slot: str, taken: set[str], new_id: Callable[[], str]) -> str:
    target = layout.images / name
    ours = vm_home.is_ours(target.name)
    while not ours or str(target) in taken or target.exists():
        target, ours = layout.image(slot, new_id()), True
    return str(target)


def _free(folder: Path, name: Path, taken: set[str]) -> str:
    target, number = folder / name.name, 1
    while str(target) in taken or target.exists():
        number += 1
        target = folder / f"{name.stem}-{number}{name.suffix}"
    return str(target)


def _eject_missing(changed: Configuration) -> None:
    for disk in changed.disks():
        is_local = disk.is_removable and disk.source is not None and disk.type in {"file", "block"}
        if is_local and disk.source is not None and not Path(disk.source).exists():
            changed.eject(disk.slot)
