"""What one export takes: which images, under which names, and every configuration as it is to be in there.

Nothing is made here, and everything that can be refused is.
"""

from __future__ import annotations

import dataclasses
import secrets
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvmgr import errors, units
from hvmgr.host import saved_state
from hvmgr.host.domain import State
from hvmgr.model import export_plan, identity, manifest, names
from hvmgr.model.configuration import Configuration
from hvmgr.model.export_options import ExportOptions
from hvmgr.model.export_plan import Exported
from hvmgr.model.image_format import ImageFormat
from hvmgr.model.layout import BASES, SNAPSHOTS, Layout
from hvmgr.model.manifest import Extent
from hvmgr.model.metadata import Metadata, SavedState, SnapshotRecord
from hvmgr.model.plan import Plan, Step
from hvmgr.model.tree import Tree
from hvmgr.operations import quiescing, snapshots
from hvmgr.operations.exchange import export_manifest, freezing
from hvmgr.operations.exchange.export_place import Place
from hvmgr.operations.session import Session
from hvmgr.storage import durable, frozen, images, vm_home

_VHD_MAX = 2040 * units.GIB
_ACTIVE = (State.RUNNING, State.PAUSED)


@dataclass(frozen=True, slots=True)
class _Memory:
    """Where the saved memory of the export's present comes from."""

    source: Path
    state: SavedState


class Planner:
    """Everything that one export takes, decided before anything is made."""

    def __init__(self, session: Session, place: Place, options: ExportOptions) -> None:
        self.session, self.place, self.options = session, place, options
        self.source = session.layout
        self.state = session.state()
        self.freezes = freezing.is_needed(self.state, options)
        self.present = session.home.present()
        self.records = {one.record.id: one.record for one in session.home.snapshots()}
        self.one = None if options.snapshot is None else self._find(options.snapshot)
        self.kept = self._kept()
        self.origin = self.present if self.one is None else session.home.snapshot(self.one.id)
        self.who = identity.kept(self.present, name=None, genid=None)
        if self.one is not None:
            self.who = identity.renewed(
                self.origin, [self.origin], name=self.present.name, vm_id=session.new_id(),
                new_id=session.new_id, new_tail=lambda: secrets.token_bytes(3),
            )  # fmt: skip
        self.target = Layout(home=place.home, vm_id=self.who.vm_id)
        self.final = Layout(home=place.target, vm_id=self.who.vm_id)
        self.forest = self._forest()
        self._check()
        self.images = {} if options.config_only else self._images()
        if self.as_vhd:
            self._check_sizes()

    # -- what is asked for -----------------------------------------------------------------------------------------

    def about(self) -> list[str]:
        """The snapshot that alone is exported, if it is one."""
        return [] if self.one is None else [self.one.id]

    def _find(self, reference: str) -> SnapshotRecord:
        return names.find_snapshot(reference, self.records.values(), where=f"in {self.present.name}")

    def _kept(self) -> dict[str, SnapshotRecord]:
        """The snapshots of the export, with their parents in it."""
        extent = self.options.extent
        if extent in (Extent.ONE, Extent.NONE):
            return {}
        wanted = set(self.records) if extent is Extent.ALL else {self._find(one).id for one in self.options.keep}
        gone = set(self.records) - wanted
        return {
            one.id: dataclasses.replace(one, parent=self._heir(one.parent, gone), state=self._state_of(one))
            for one in self.records.values()
            if one.id in wanted
        }

    def _heir(self, snapshot_id: str | None, gone: set[str]) -> str | None:
        seen = set[str]()
        while snapshot_id is not None and snapshot_id in gone and snapshot_id not in seen:
            seen.add(snapshot_id)
            snapshot_id = self.records[snapshot_id].parent
        return snapshot_id

    def _state_of(self, record: SnapshotRecord) -> SavedState:
        return SavedState.NONE if self.options.without_state else record.state

    def _check(self) -> None:
        options, name = self.options, self.present.name
        active = self.state in _ACTIVE
        if self.state in (State.SLEEPING, State.CRASHED) and self.one is None and not options.config_only:
            raise errors.Conflict(f"{name} is {self.state}", hint="wake it up or stop it, then run the command again")
        if options.with_state and not active:
            more = "; its saved state is exported anyway" if self.state is State.SAVED else ""
            raise errors.Conflict(f"{name} is {self.state}: there is no running memory to keep{more}",
                                  hint="leave out --with-state")  # fmt: skip
        if options.quiesce and not active:
            raise errors.Conflict(f"{name} is {self.state}: its file systems are at rest", hint="leave out --quiesce")
        if options.quiesce and (obstacle := quiescing.find_obstacle(self.session, self.state)) is not None:
            raise errors.Conflict(f"nobody can put the guest's file systems to rest: {obstacle.reason}",
                                  hint=f"{obstacle.remedy}, or leave out --quiesce")  # fmt: skip
        self._check_excluded()
        if self.as_vhd and options.flattens and self._memory() is not None:
            raise errors.UsageError(
                "a VM does not go on from saved memory on VHD disks", hint="give --without-state with it"
            )
        for one in self._configurations():
            for disk in one.disks():
                self._check_disk(one, disk.slot)

    def _check_sizes(self) -> None:
        """A VHD has the size of its parent, and an end."""
        for one in self.images.values():
            if one.source.size > _VHD_MAX:
                raise errors.Unsupported(
                    f"{one.source.path} is a disk of {units.format_size(one.source.size)}; a VHD has at most 2040 GiB",
                    hint="export it as qcow2 or raw",
                )
            if one.parent is not None and any(image.size != one.source.size for image in one.chain):
                raise errors.Unsupported(
                    f"a disk was resized between snapshots, and a differencing VHD has its parent's size ({one.name})",
                    hint="export the tree without --format, or one snapshot: --snapshot SNAP --format vhd",
                )

    def _check_excluded(self) -> None:
        known = {disk.slot for one in self._configurations() for disk in one.disks()}
        for slot in self.options.exclude:
            if slot not in known:
                hint = f"it has {', '.join(sorted(known))}" if known else "it has no disks"
                raise errors.NotFound(f"{self.present.name} has no disk {slot}", hint=hint, slot=slot)
        has_state = self._memory() is not None or any(one.state is not SavedState.NONE for one in self.kept.values())
        if self.options.exclude and has_state:
            raise errors.UsageError(
                "saved memory goes on only with all the disks that it was saved with",
                hint="give --without-state with --exclude-disk",
            )

    def _check_disk(self, one: Configuration, slot: str) -> None:
        """What is neither an image file nor left out has to stay where it is, and be said."""
        disk = one.find_disk(slot)
        assert disk is not None
        if disk.device not in ("disk", "lun") or slot in self.options.exclude:
            return
        if disk.type not in {"file", "block"} or disk.source is None:
            self.session.say(f"disk {slot} is no file or device of this host ({disk.type}): the export only names it")
        elif not disk.takes_part and not disk.readonly and self.freezes:
            raise errors.Conflict(
                f"disk {slot} is written by the running VM and takes no part in snapshots",
                hint=f"leave it out with --exclude-disk {slot}, or stop the VM first",
                slot=slot,
            )

    def _configurations(self) -> list[Configuration]:
        """The origin of every configuration of the export."""
        return [self.origin, *(self.session.home.snapshot(one) for one in self.kept)]

    # -- images ----------------------------------------------------------------------------------------------------

    def _forest(self) -> Tree:
        """Both graphs of the source, and the disks that take no part in snapshots."""
        forest = self.session.home.tree()
        more = {path: fmt for one in self._configurations() for _, path, fmt in self._disks(one)}
        return dataclasses.replace(forest, images={**self.session.home.load_images(more), **forest.images})

    def _disks(self, one: Configuration) -> Iterable[tuple[str, str, str]]:
        """The hard disks of a configuration that the export copies: slot, path, format."""
        for disk in one.disks():
            if disk.device not in ("disk", "lun") or disk.slot in self.options.exclude:
                continue
            if disk.type in {"file", "block"} and disk.source is not None:
                yield disk.slot, vm_home.canonical(disk.source), disk.format or images.RAW

    def _images(self) -> dict[str, Exported]:
        if self.options.flattens:
            fmt = images.VPC if self.as_vhd else self.options.format
            return export_plan.as_disks(self.forest, {slot: path for slot, path, _ in self._disks(self.origin)}, fmt)
        tops: dict[str, str] = {}
        for one in self._configurations():
            for slot, path, _ in self._disks(one):
                tops.setdefault(path, slot)
        merge = self.options.extent is Extent.KEPT
        return export_plan.as_tree(self.forest, tops, self.source.vm_id, merge=merge, vhd=self.as_vhd)

    @property
    def as_vhd(self) -> bool:
        """Whether every image becomes a VHD."""
        return self.options.format == ImageFormat.VHD

    def _image_steps(self) -> list[Step]:
        plain: list[Step] = []
        others: list[Step] = []
        for one in self.images.values():
            for image in (one.source, *one.merged, *one.chain):
                frozen.require_unchanged(self.source, Path(image.path))
            step = self._image_step(one)
            (plain if isinstance(step, export_plan.ExportFile) else others).append(step)
        return [*plain, *others]

    def _vhd_step(self, one: Exported) -> Step:
        """An image that a snapshot froze has the same id in every export; one that is still written, a new one each time."""
        path, data = one.source.path, sum(image.data for image in (one.source, *one.merged))
        is_frozen = path not in self.forest.present.disks.values()
        uid = uuid.uuid5(uuid.NAMESPACE_URL, f"{self.source.vm_id}/{path}") if is_frozen else uuid.uuid4()
        return export_plan.ExportVhd(
            source=path,
            chain=tuple((image.path, image.format) for image in one.chain),
            target=str(self.place.home / one.name),
            parent=None if one.parent is None else str(self.place.home / one.parent.name),
            own=1 + len(one.merged),
            uid=uid.hex,
            size=min(data if one.parent else sum(image.data for image in one.chain), one.source.size),
        )

    def _image_step(self, one: Exported) -> Step:
        if self.as_vhd and (one.flat or not self.options.flattens):
            return self._vhd_step(one)
        source, target, data = one.source.path, str(self.place.home / one.name), one.source.data
        if one.flat:
            size = min(sum(image.data for image in one.chain), one.source.size)
            chain = tuple(image.path for image in one.chain)
            return export_plan.ExportFlat(source, one.source.format, chain, target, one.format, size)
        if one.parent is None or one.parent_name is None:
            return export_plan.ExportFile(source, target, data)
        parent = str(self.place.home / one.parent.name)
        if one.merged:
            below = self.forest.images[str(one.merged[-1].parent)]
            return export_plan.ExportMerged(
                source=source, target=target, merged=tuple(image.path for image in one.merged),
                below=below.path, below_format=below.format, parent=parent,
                size=data + sum(image.data for image in one.merged),
            )  # fmt: skip
        if images.read(Path(source), one.format).backing in (one.parent_name, f"./{one.parent_name}"):
            return export_plan.ExportFile(source, target, data)
        return export_plan.ExportImage(source, target, parent, one.parent.format, data)

    # -- configurations ----------------------------------------------------------------------------------------------

    def _relocated(self, origin: Configuration, facts: Metadata, nvram: Path | None) -> Configuration:
        """The configuration as if its home were the export, with the facts that are true there."""
        one = origin.copy()
        one.strip_backing_chains()
        for slot in self.options.exclude:
            if one.find_disk(slot) is not None:
                one.remove_disk(slot)
        for slot, path, _ in self._disks(one):
            made = self.images.get(path)
            if made is not None:
                one.set_disk_source(slot, self.final.home / made.name, made.format)
        if nvram is not None:
            one.set_nvram(nvram)
        self.who.impress(one)
        known = tuple(record for record in facts.disks if record.slot not in self.options.exclude)
        facts = dataclasses.replace(facts, disks=known)
        one.set_metadata(self.who.facts(facts, home=self.final.home, uri=facts.uri))
        return one

    def _present_facts(self) -> Metadata:
        facts = vm_home.require_facts(self.origin)
        if self.one is not None:
            return dataclasses.replace(
                facts, parent=None, snapshot=None, created=self.session.now(), change=self.session.new_id()
            )
        gone = set(self.records) - set(self.kept)
        return dataclasses.replace(facts, parent=self._heir(facts.parent, gone))

    def _memory(self) -> _Memory | None:
        """The saved memory that the export's present goes on from."""
        if self.options.without_state:
            return None
        if self.one is not None:
            if self.one.state is SavedState.NONE:
                return None
            return _Memory(self.source.memory(self.one.id), self.one.state)
        if self.state is State.SAVED and not self.options.config_only:
            path = self.session.connection.managed_save_path(self.present.name)
            return _Memory(path, _state_in(path))
        if self.options.with_state:
            running = self.state is State.RUNNING
            return _Memory(freezing.memory(self.source), SavedState.RUNNING if running else SavedState.PAUSED)
        return None

    def _state_steps(self, memory: _Memory | None, present: Configuration) -> list[Step]:
        """Memory, NVRAM and TPM state of the export's present."""
        steps: list[Step] = []
        if memory is not None:
            size = memory.source.stat().st_size if memory.source.exists() else self.present.memory
            steps.append(
                export_plan.ExportMemory(str(memory.source), str(self.target.present_memory), present.to_xml(), size)
            )
        nvram, tpm = self._firmware_sources()
        if nvram is not None:
            assert present.nvram is not None
            target = self.place.home / present.nvram.relative_to(self.final.home)
            steps.append(export_plan.ExportFile(str(nvram), str(target), 0))
        if tpm is not None:
            steps.append(export_plan.ExportFolder(str(tpm), str(self.target.present_tpm)))
        return steps

    def _firmware_sources(self) -> tuple[Path | None, Path | None]:
        if self.one is not None:
            nvram, tpm = self.source.snapshot_nvram(self.one.id), self.source.snapshot_tpm(self.one.id)
        elif self.freezes:
            return freezing.firmware(self.session, self.present)
        else:
            nvram = self.present.nvram or Path()
            tpm = self.session.connection.tpm_folder(self.session.home.vm_id)
        wants = self.origin.nvram is not None
        return nvram if wants and nvram.is_file() else None, tpm if self.origin.has_tpm and tpm.is_dir() else None

    def _snapshot_steps(self, record: SnapshotRecord) -> list[Step]:
        origin = self.session.home.snapshot(record.id)
        facts = dataclasses.replace(vm_home.require_facts(origin), snapshot=record, parent=record.parent)
        nvram = None if origin.nvram is None else self.final.snapshot_nvram(record.id)
        one = self._relocated(origin, facts, nvram)
        steps: list[Step] = [export_plan.WriteConfiguration(str(self.target.snapshot(record.id)), one.to_xml())]
        memory = self.source.memory(record.id)
        if record.state is not SavedState.NONE:
            steps.append(export_plan.ExportFile(str(memory), str(self.target.memory(record.id)), _data(memory)))
        if self.source.snapshot_nvram(record.id).is_file():
            source, target = self.source.snapshot_nvram(record.id), self.target.snapshot_nvram(record.id)
            steps.append(export_plan.ExportFile(str(source), str(target), 0))
        if self.source.snapshot_tpm(record.id).is_dir():
            source, target = self.source.snapshot_tpm(record.id), self.target.snapshot_tpm(record.id)
            steps.append(export_plan.ExportFolder(str(source), str(target)))
        return steps

    # -- the whole -----------------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """Every step, in an order in which the large files come together."""
        facts = self._present_facts()
        nvram = None if self.origin.nvram is None else self.final.nvram(self.final.vm_id)
        present = self._relocated(self.origin, facts, nvram)
        memory = self._memory()
        steps = [*self._image_steps(), *self._hash_steps()]
        small: list[Step] = self._state_steps(memory, present)
        for record in self.kept.values():
            small += self._snapshot_steps(record)
        steps += [one for one in small if isinstance(one, export_plan.ExportFile)]
        steps += [one for one in small if not isinstance(one, export_plan.ExportFile)]
        steps.append(export_plan.WriteConfiguration(str(self.target.configuration), present.to_xml()))
        told = self._told(present, SavedState.NONE if memory is None else memory.state)
        home = self.place.home
        steps.append(export_plan.WriteManifest(str(home / manifest.FILE), told.to_yaml()))
        if self.options.checksums:
            steps.append(export_plan.WriteSums(str(home / manifest.SUMS)))
        what = "snapshot '" + self.one.name + "' of " if self.one is not None else ""
        return Plan(
            plan_id=self.session.new_id(),
            vm_id=self.source.vm_id,
            operation="export",
            subject=f"export of {what}{self.present.name}",
            prepare=(self._make(steps), *steps, export_plan.ProtectExport(str(home))),
            switch=export_plan.PublishExport(str(home), str(self.place.target)),
            finish=(export_plan.ClosePlace(str(self.place.folder)),),
            hold=self._hold(),
        )

    def _hash_steps(self) -> list[Step]:
        """Of a configuration alone the manifest says which images it belongs to; those that a VM writes change."""
        if not self.options.config_only:
            return []
        writing = set(vm_home.disks_of(self.present).values()) if self.state in _ACTIVE else set[str]()
        return [
            export_plan.HashSource(one.source.path, one.name, one.source.data)
            for one in self._listed().values()
            if one.source.path not in writing
        ]

    def _listed(self) -> dict[str, Exported]:
        """The source's images, under the names that they would have in the export."""
        tops = {path: slot for one in self._configurations() for slot, path, _ in self._disks(one)}
        return export_plan.as_tree(self.forest, tops, self.source.vm_id, merge=False)

    def _told(self, present: Configuration, state: SavedState) -> manifest.Manifest:
        content = export_manifest.Content(
            present=present,
            state=state,
            images=self.images or self._listed(),
            origin=self._slots(self.origin),
            snapshots=[(one, self._slots(self.session.home.snapshot(one.id))) for one in self.kept.values()],
        )
        return export_manifest.build(
            content,
            home=self.session.home.path,
            connection=self.session.connection,
            options=self.options,
            snapshot_id=None if self.one is None else self.one.id,
            moment=self.session.now(),
        )

    def _slots(self, one: Configuration) -> dict[str, str]:
        return {slot: path for slot, path, _ in self._disks(one)}

    def _make(self, steps: Sequence[Step]) -> export_plan.MakeExport:
        home = self.place.home
        files = [str(Path(one.target).relative_to(home)) for one in steps if hasattr(one, "target")]
        folders = {SNAPSHOTS, BASES, str(self.target.configuration.parent.relative_to(home))}
        for name in files:
            folders |= {str(one) for one in Path(name).parents if str(one) != "."}
        copied = [one for one in files if not one.endswith("/tpm")]
        return export_plan.MakeExport(str(home), tuple(sorted(folders)), tuple(sorted(copied)))

    def _hold(self) -> tuple[tuple[str, str], ...]:
        """The working images of a VM that is off: nobody may start it while they are read."""
        if self.one is not None or self.state in _ACTIVE:
            return ()
        return snapshots.working(self.forest)


def _data(path: Path) -> int:
    with durable.explained(path):
        return path.stat().st_blocks * 512


def _state_in(memory: Path) -> SavedState:
    return SavedState.RUNNING if saved_state.read(memory).was_running else SavedState.PAUSED
