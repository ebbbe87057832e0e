"""Any home as the source of an import: an export, a copy, a moved home, a plain one. Nothing is believed or written.

Paths in the configurations are those of the place where the home was written (metadata ``home``); they are looked for
where the folder lies now, or where maps say. What does not fit is a finding, so that a report can name all of it at
once; only a folder that is no source at all is an error.

Who made the source may not wish us well. A name that leads out of the folder is followed only when the user mapped it,
or when the home is one that hvmgr itself has on this host (``trusted``): else an import would copy any file of the host
into a guest's disk.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from hvmgr import errors
from hvmgr.host import saved_state
from hvmgr.model import configuration, manifest
from hvmgr.model.configuration import Configuration
from hvmgr.model.finding import Finding
from hvmgr.model.layout import CONFIGURATIONS, Layout
from hvmgr.model.manifest import Image as Listed
from hvmgr.model.manifest import Manifest
from hvmgr.model.maps import Entry, Used
from hvmgr.model.metadata import ImportOrigin, Metadata, SavedState, SnapshotRecord
from hvmgr.storage import archives, durable, index, source_configurations, vm_home
from hvmgr.storage.archives import Archive
from hvmgr.storage.source_images import Finder, Missing, SourceImage


@dataclass(frozen=True, slots=True)
class SourceSnapshot:
    """One snapshot: its record, its images' places now, and its files as far as they are there."""

    record: SnapshotRecord
    configuration: Configuration
    file: Path
    disks: dict[str, str]
    left_out: dict[str, str]  # disks that the snapshot does not freeze: slot, and the image's place now
    memory: Path | None = None
    saved: Configuration | None = None  # the XML inside the memory
    nvram: Path | None = None
    tpm: Path | None = None


@dataclass(frozen=True, slots=True)
class SourceHome:
    """All that can be brought along, and what was found on the way."""

    folder: Path
    file: Path
    present: Configuration
    facts: Metadata | None
    disks: Mapping[str, str]
    left_out: Mapping[str, str]  # hard disks that snapshots do not freeze
    named: Mapping[str, str]  # such disks of all configurations: the name there, and the image's place now
    nvram: Path | None
    tpm: Path | None
    memory: Path | None
    saved: Configuration | None
    snapshots: tuple[SourceSnapshot, ...]
    images: Mapping[str, SourceImage]
    missing: tuple[Missing, ...]
    problems: tuple[Finding, ...]
    undo: Configuration | None
    undo_disks: Mapping[str, str]
    manifest: Manifest | None
    expected: Mapping[str, Listed]  # what the manifest says of images, by their place now
    sums: Mapping[str, str]  # what an archive's own list says of its files
    is_export: bool
    is_home: bool
    trusted: bool
    is_present: bool = True  # False: seen as it was at a snapshot
    archive: Archive | None = None  # the folder shows what it holds; images and saved memory are only begun there

    @property
    def origin(self) -> Path:
        """What people call the source: its folder, or the archive."""
        return self.folder if self.archive is None else self.archive.path

    def data_of(self, path: Path) -> int:
        """About how many bytes a copy of a file takes."""
        name = None if self.archive is None else self.archive.name_of(path)
        return path.stat().st_blocks * 512 if self.archive is None or name is None else self.archive.members[name].data

    def hash_of(self, path: Path | str) -> str:
        """The SHA-256 that the export records for a file; '' when it records none."""
        listed = self.expected.get(str(path))
        if listed is not None:
            return listed.sha256 or ""
        return self.sums.get(str(Path(path).relative_to(self.folder)), "")

    @property
    def is_known(self) -> bool:
        """Whether the index of this host has a home there, be it half-way."""
        return any(one.home == self.folder for one in index.entries())

    @property
    def vm_id(self) -> str:
        """The id that it was written with."""
        return self.present.uuid

    def as_origin(self, mode: str) -> ImportOrigin:
        """What a VM that is made of it remembers; only an export never changes, and is known by what it says of itself."""
        described = self.folder / manifest.FILE
        digest = hashlib.sha256(described.read_bytes()).hexdigest() if self.is_export else None
        return ImportOrigin(vm=self.vm_id, mode=mode, digest=digest)

    @property
    def layout(self) -> Layout:
        """Where its files lie now."""
        return Layout(home=self.folder, vm_id=self.vm_id)

    @property
    def recorded_home(self) -> Path:
        """The folder that its configurations speak of."""
        return self.folder if self.facts is None else self.facts.home

    def configurations(self) -> Iterator[Configuration]:
        """Every configuration in it: the present's, the snapshots', and those inside saved states."""
        yield self.present
        if self.saved is not None:
            yield self.saved
        for one in self.snapshots:
            yield one.configuration
            if one.saved is not None:
                yield one.saved

    def chain(self, path: str) -> list[SourceImage]:
        """An image and its parents, as far as they are there."""
        chain: list[SourceImage] = []
        step: str | None = path
        while step is not None and step in self.images and self.images[step] not in chain:
            chain.append(self.images[step])
            step = self.images[step].parent
        return chain


def at_snapshot(source: SourceHome, snapshot: SourceSnapshot) -> SourceHome:
    """The source as if it had been written at a snapshot of it: a VM without any, that goes on from there."""
    facts = snapshot.configuration.metadata()
    present = snapshot.configuration.copy()
    if facts is not None:
        facts = replace(facts, snapshot=None, parent=None)
        present.set_metadata(facts)
    return replace(
        source,
        present=present,
        facts=facts,
        disks=snapshot.disks,
        left_out=snapshot.left_out,
        nvram=snapshot.nvram,
        tpm=snapshot.tpm,
        memory=snapshot.memory,
        saved=snapshot.saved,
        snapshots=(),
        undo=None,
        undo_disks={},
        missing=(),
        is_present=False,
    )


def open_source(
    source: Path,
    *,
    vm: str | None = None,
    paths: tuple[Entry, ...] = (),
    disks: tuple[Entry, ...] = (),
    used: Used | None = None,
    snapshots_from: Path | None = None,
    own: bool = False,
) -> SourceHome:
    """Everything that the source holds, as far as it can be read; ``used`` learns which lines of maps were followed.

    A home of this host is believed: one that the index knows, or that the caller works on (``own``).
    ``snapshots_from`` is a second folder in which snapshots that the source itself lacks are looked for.
    """
    if (archive := archives.find(source)) is not None:
        with archive.naming():
            opened = open_source(
                archive.folder, vm=vm, paths=paths, disks=disks, used=used, snapshots_from=snapshots_from
            )
            return _as_archive(opened, archive)
    folder, file = source_configurations.find(source, vm)
    present = source_configurations.read(file)
    facts = present.metadata()
    finder = Finder(
        folder=folder,
        home=folder if facts is None else facts.home,
        paths=paths,
        by_slot=disks,
        used=used or Used(),
        trusted=own or (not (folder / manifest.FILE).is_file() and any(one.home == folder for one in index.entries())),
    )
    with durable.explained(folder):
        second = None if snapshots_from is None else Path(os.path.realpath(snapshots_from))
        return _Reader(folder, file, present, finder, second).read()


def _as_archive(opened: SourceHome, archive: Archive) -> SourceHome:
    """What the folder cannot say: how much data there is in the images that it only begins to show."""
    images = {
        path: image if (name := archive.name_of(path)) is None else replace(image, data=archive.members[name].data)
        for path, image in opened.images.items()
    }
    return replace(opened, images=images, archive=archive, sums=archives.recorded(opened.folder))


@dataclass(slots=True)
class _Reader:
    """One reading of one source: collects what is there, and every problem."""

    folder: Path
    file: Path
    present: Configuration
    finder: Finder
    snapshots_from: Path | None

    def read(self) -> SourceHome:
        present, facts = self.present, self.present.metadata()
        is_home = self.file.parent.name == CONFIGURATIONS
        self.finder.is_plain(self.file)  # what a link leads to may be another VM's
        told = self._manifest()
        if told is not None:
            here = {str(self.folder / one.file): one for one in told.images}
            self.finder.listed = {one.path: one for one in told.images} | here
        if not vm_home.is_id(present.uuid):  # names of files are made of it
            raise errors.Corrupt(
                f"{self.file}: '{present.uuid}' is no id of a VM",
                hint="write it as 8-4-4-4-12 digits",
                path=str(self.file),
            )
        if is_home and present.uuid != self.file.stem:
            self._problem("damaged", f"{self.file} is the configuration of {present.uuid}", self.file)
        layout = Layout(home=self.folder, vm_id=present.uuid)
        snapshots = self._snapshots(layout) if is_home and facts is not None else ()
        disks, left_out = self.finder.disks(present), self.finder.disks_left_out(present)
        others = [left_out, *(each for one in snapshots for each in (one.disks, one.left_out))]
        self.finder.replace_by_slot(present, disks, others)
        self._check_tree(facts, snapshots)
        self.finder.check_cycles()
        self.finder.check_vhds()
        undo = self._undo(layout) if is_home else None
        undo_disks = {} if undo is None else self.finder.disks(undo)
        if undo is not None:
            self.finder.disks_left_out(undo)
            self._named_file(undo.nvram)
        memory = self._file(layout.present_memory)
        change = None if facts is None else facts.change
        tpm = self._folder(layout.present_tpm) or (change and self._folder(layout.tpm_copy(change))) or None
        return SourceHome(
            folder=self.folder,
            file=self.file,
            present=present,
            facts=facts,
            disks=disks,
            left_out=left_out,
            named=self.finder.left_out,
            nvram=self._named_file(present.nvram),
            tpm=tpm,
            memory=memory,
            saved=None if memory is None else self._saved(memory, "the present", present),
            snapshots=snapshots,
            images=self.finder.images,
            missing=tuple(dict.fromkeys(self.finder.missing)),
            problems=tuple(dict.fromkeys(self.finder.problems)),
            undo=undo,
            undo_disks=undo_disks,
            manifest=told,
            expected=self.finder.expected,
            sums={},
            is_export=(self.folder / manifest.FILE).is_file(),
            is_home=is_home,
            trusted=self.finder.trusted,
        )

    def _problem(self, code: str, sentence: str, where: object, repair: str | None = None) -> None:
        self.finder.problem(code, sentence, where, repair)

    def _manifest(self) -> Manifest | None:
        file = self.folder / manifest.FILE
        if not os.path.lexists(file) or not self.finder.is_plain(file):
            return None
        try:
            if file.stat().st_size > source_configurations.LARGEST:
                raise errors.Corrupt(f"{file} is too long for what it is")
            return manifest.parse(file.read_text("utf-8"), source=str(file))
        except errors.Unsupported as error:
            self._problem("newer-format", str(error), file, error.hint)
        except errors.HvmgrError as error:
            self._problem("damaged", str(error), file, error.hint)
        except (OSError, UnicodeDecodeError) as error:
            self._problem("damaged", f"{file} cannot be read: {error}", file)
        return None

    # -- snapshots ---------------------------------------------------------------------------------------------------

    def _snapshots(self, layout: Layout) -> tuple[SourceSnapshot, ...]:
        files = {file.stem: file for file in source_configurations.in_folder(layout.snapshots)}
        if self.snapshots_from is not None:
            for file in source_configurations.in_folder(self.snapshots_from):
                files.setdefault(file.stem, file)
        read = [one for file in files.values() if (one := self._snapshot(file)) is not None]
        return tuple(sorted(read, key=lambda one: (one.record.created, one.record.id)))

    def _snapshot(self, file: Path) -> SourceSnapshot | None:
        if not self.finder.is_plain(file):
            return None
        try:
            parsed = source_configurations.read(file)
            facts = parsed.metadata()
        except errors.Unsupported as error:
            self._problem("newer-format", str(error), file)
            return None
        except errors.HvmgrError as error:
            self._problem("damaged", str(error), file)
            return None
        record = None if facts is None else facts.snapshot
        if record is None or record.id != file.stem:
            self._problem("damaged", f"{file} is not the snapshot that its name says", file)
            return None
        folder = file.with_suffix("")
        memory = self._file(folder / "memory.save")
        saved = None
        if record.state is not SavedState.NONE:
            saved = None if memory is None else self._saved(memory, f"snapshot '{record.name}'", parsed)
            if memory is None:
                self._problem(
                    "saved-state-damaged", f"the saved state of snapshot '{record.name}' is missing", folder,
                    "leave it out with --without-state",
                )  # fmt: skip
        return SourceSnapshot(
            record=record,
            configuration=parsed,
            file=file,
            disks=self.finder.disks(parsed),
            left_out=self.finder.disks_left_out(parsed),
            memory=memory if record.state is not SavedState.NONE else None,
            saved=saved,
            nvram=self._file(folder / "nvram"),
            tpm=self._folder(folder / "tpm"),
        )

    def _saved(self, memory: Path, whose: str, of: Configuration) -> Configuration | None:
        repair = "leave it out with --without-state"
        try:
            state = saved_state.read(memory)
            if not state.complete:
                self._problem("saved-state-damaged", f"the saved state of {whose} is not complete", memory, repair)
                return None
            if len(state.xml) > source_configurations.LARGEST:
                raise errors.Corrupt(f"the configuration in {memory} is too long")
            saved = configuration.parse(state.xml, source=str(memory))
            self._require_alike(saved, of)
        except errors.HvmgrError as error:
            self._problem("saved-state-damaged", f"the saved state of {whose} cannot be used: {error}", memory, repair)
            return None
        return saved

    def _require_alike(self, saved: Configuration, of: Configuration) -> None:
        """What only the saved state has would be opened without a look at its file."""
        if self.finder.trusted:
            return
        known = {disk.slot for disk in of.disks() if not disk.is_removable}
        more = [f"a disk {one.slot}" for one in saved.disks() if not one.is_removable and one.slot not in known]
        more += ["NVRAM"] if saved.nvram is not None and of.nvram is None else []
        if more:
            raise errors.Corrupt(f"it has {more[0]}, and its configuration has none")

    def _undo(self, layout: Layout) -> Configuration | None:
        if not layout.undo.is_file():
            return None
        try:
            return source_configurations.read(layout.undo)
        except errors.HvmgrError as error:
            self._problem("damaged", str(error), layout.undo)
            return None

    def _check_tree(self, facts: Metadata | None, snapshots: tuple[SourceSnapshot, ...]) -> None:
        parents = {one.record.id: one.record.parent for one in snapshots}
        named = [(facts.parent, "the present")] if facts is not None else []
        named += [(one.record.parent, f"snapshot '{one.record.name}'") for one in snapshots]
        for parent, whose in named:
            if parent is not None and parent not in parents:
                self._problem(
                    "missing-snapshot", f"the snapshot {parent}, above {whose}, is not there", parent,
                    f"drop it with --drop-snapshot {parent}, or say where it is with --snapshot-source DIR",
                )  # fmt: skip
        for start in parents:
            seen, step = set[str](), start
            while step in parents and step not in seen:
                seen.add(step)
                step = parents[step] or ""
            if step in seen:
                self._problem("cycle", f"the parents of snapshot {start} form a circle", start)
                return

    # -- files beside the images -------------------------------------------------------------------------------------

    def _file(self, path: Path) -> Path | None:
        return path if os.path.lexists(path) and self.finder.is_plain(path) else None

    def _named_file(self, recorded: Path | None) -> Path | None:
        """A file that a configuration names, such as the NVRAM; one that no start has made yet is none."""
        if recorded is None:
            return None
        path = Path(self.finder.locate(str(recorded)))
        if not path.exists():
            return None
        return path if self.finder.may_read(str(path), str(recorded)) else None

    def _folder(self, path: Path) -> Path | None:
        """A folder of state files, free of links and special files, as every folder above it in the source is."""
        if not os.path.lexists(path):
            return None
        if not self.finder.trusted and os.path.realpath(path) != str(path):
            self._problem("link", f"{path} leads to {os.path.realpath(path)}", path)
            return None
        for entry in (path, *path.rglob("*")):
            if entry.is_symlink() or not (entry.is_file() or entry.is_dir()):
                self._problem("link", f"{entry} is no plain file", entry)
                return None
        return path if path.is_dir() else None
