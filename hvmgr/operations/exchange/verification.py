"""Whether an export is what its manifest says: every file, every chain, every configuration. Nothing is written.

Who sent the export may not wish us well: names that lead out of it and links are findings, and are not followed.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hvmgr import errors
from hvmgr.host import qemu_img, schema
from hvmgr.model import compatibility, manifest
from hvmgr.model.finding import Finding, Severity
from hvmgr.model.manifest import Manifest
from hvmgr.model.metadata import SavedState
from hvmgr.model.progress import Progress
from hvmgr.storage import archives, copy, durable, images, source_home
from hvmgr.storage.source_home import SourceHome

_MANIFEST_MAX = 64 << 20

# Code -> how much it stands in the way, and what it means; docs/commands.md has the same table (a test compares them).
CODES: Mapping[str, tuple[Severity, str]] = {
    "manifest-damaged": (Severity.ERROR, "export.yaml cannot be understood"),
    "manifest-disagrees": (Severity.ERROR, "export.yaml says something else than the files"),
    "sums-damaged": (Severity.ERROR, "SHA256SUMS cannot be understood"),
    "missing-file": (Severity.ERROR, "a file of the export is not there"),
    "unknown-file": (Severity.WARNING, "a file is there that the export does not list"),
    "wrong-size": (Severity.ERROR, "a file or disk has another size than was recorded"),
    "wrong-hash": (Severity.ERROR, "a file holds other bytes than were recorded"),
    "wrong-parent": (Severity.ERROR, "an image stands on another one than was recorded"),
    "invalid-configuration": (Severity.WARNING, "a configuration does not pass libvirt's schema on this host"),
    "no-checksums": (Severity.INFO, "the export was made without checksums: bytes cannot be compared"),
    **{
        code: (compatibility.KINDS[code].severity, compatibility.KINDS[code].meaning)
        for code in (
            "damaged", "name-escapes", "link", "double-slot", "cycle", "missing-snapshot", "missing-disk",
            "saved-state-damaged", "newer-format", "format-unsupported", "vhd-differencing", "image-outside",
        )
    },
}  # fmt: skip


def verify(folder: Path, *, on_progress: Callable[[Progress], None] | None = None) -> list[Finding]:
    """Everything that is wrong with the export in ``folder`` (or the only one in a folder below), the worst first.

    An archive of an export is read once, from one end to the other. NotFound when there is none, Unsupported for one of a
    newer hvmgr.
    """

    def report(done: int, total: int) -> None:
        if on_progress is not None:
            on_progress(Progress(done, total, f"verify {folder.name}"))

    archive = archives.find(folder, hashed=True, report=report)
    if archive is None:
        return compatibility.worst_first(_Verification(find_export(folder), on_progress).run())
    with archive.naming():
        found = _Verification(find_export(archive.folder), None, archive=archive).run()
        return compatibility.worst_first(map(archive.named, found))


def find_export(folder: Path) -> Path:
    """The folder of the export that is meant."""
    place = Path(os.path.realpath(folder))
    with durable.explained(place):
        if (place / manifest.FILE).is_file():
            return place
        if not place.is_dir():
            what = f"{folder} is neither a folder nor an archive" if place.exists() else f"there is no folder {folder}"
            raise errors.NotFound(what, hint="name the folder of an export")
        below = sorted(one for one in place.iterdir() if (one / manifest.FILE).is_file())
    if len(below) == 1:
        return below[0]
    if below:
        names = ", ".join(one.name for one in below)
        raise errors.UsageError(f"{folder} holds {len(below)} exports: {names}", hint="name one of them")
    raise errors.NotFound(
        f"{folder} holds no export: there is no {manifest.FILE} in it",
        hint="an export that was interrupted goes on when 'hvmgr export' is run again",
    )


@dataclass(slots=True)
class _Verification:
    """One look at one export; collects what it finds."""

    folder: Path
    on_progress: Callable[[Progress], None] | None
    archive: archives.Archive | None = None
    found: list[Finding] = field(default_factory=list)
    files: dict[str, os.stat_result] = field(default_factory=dict)

    def run(self) -> list[Finding]:
        self.files = dict(self._plain_files())
        told = self._manifest()
        known = set(self.files)
        if (told is not None and any(one.sha256 for one in told.images)) or manifest.SUMS in known:
            self._sums()
        else:
            self._add("no-checksums", f"{self.folder} was exported without checksums", self.folder)
        source = self._source(told)
        if source is not None:
            self._configurations(source)
            if told is not None:
                self._compare(told, source)
        return self.found

    def _add(self, code: str, sentence: str, where: object, repair: str | None = None) -> None:
        self.found.append(Finding(code, CODES[code][0], sentence, str(where), repair))

    def _tell(self, done: int, total: int) -> None:
        if self.on_progress is not None:
            self.on_progress(Progress(done, total, f"verify {self.folder.name}"))

    # -- files -----------------------------------------------------------------------------------------------------

    def _plain_files(self) -> Iterator[tuple[str, os.stat_result]]:
        for place, folders, names in os.walk(self.folder):
            for name in (*folders, *names):
                path = Path(place) / name
                facts = path.lstat()
                if stat.S_ISREG(facts.st_mode):
                    yield str(path.relative_to(self.folder)), facts
                elif not stat.S_ISDIR(facts.st_mode):
                    self._add("link", f"{path} is no plain file", path)

    def _manifest(self) -> Manifest | None:
        path = self.folder / manifest.FILE
        try:
            if manifest.FILE not in self.files or self.files[manifest.FILE].st_size > _MANIFEST_MAX:
                raise errors.Corrupt(f"{path} is no manifest")
            return manifest.parse(path.read_text("utf-8"), source=str(path))
        except errors.Unsupported:
            raise
        except (errors.HvmgrError, UnicodeDecodeError) as error:
            self._add("manifest-damaged", str(error), path, "get a whole copy of the export")
            return None

    def _sums(self) -> None:
        sums = self._read_sums()
        if sums is None:
            return
        wanted = {name: digest for name, digest in sums.items() if self._is_there(name)}
        paths = {self.folder / name: name for name in wanted}
        for path, digest in self._hashes(list(paths)).items():
            if digest != wanted[paths[path]]:
                self._add("wrong-hash", f"{path} is not what was exported", path, "get a whole copy of the file")
        for name in sorted(set(self.files) - set(sums) - {manifest.SUMS}):
            self._add("unknown-file", f"{self.folder / name} is no part of the export", self.folder / name)

    def _hashes(self, paths: list[Path]) -> Mapping[Path, str | None]:
        if self.archive is not None:
            return {path: self.archive.sha256(path) for path in paths}
        return copy.hash_files(paths, on_progress=self._tell)

    def _is_there(self, name: str) -> bool:
        if name in self.files:
            return True
        path = self.folder / name
        self._add("missing-file", f"{path} is missing", path, "get a whole copy of the export")
        return False

    def _read_sums(self) -> dict[str, str] | None:
        path, sums = self.folder / manifest.SUMS, dict[str, str]()
        if manifest.SUMS not in self.files:
            self._add("missing-file", f"{path} is missing", path, "get a whole copy of the export")
            return None
        for number, line in enumerate(path.read_bytes().decode(errors="surrogateescape").splitlines(), 1):
            try:
                name, digest = manifest.read_sum(line)
                sums[name] = digest
            except ValueError as error:
                self._add("sums-damaged", f"{path}, line {number}: {error}", path)
                return None
        return sums

    # -- what is in them -------------------------------------------------------------------------------------------

    def _source(self, told: Manifest | None) -> SourceHome | None:
        try:
            source = source_home.open_source(self.folder)
        except errors.HvmgrError as error:
            self._add("damaged", str(error), self.folder, error.hint)
            return None
        has_disks = told is None or told.options.disks
        for problem in source.problems:
            if has_disks or problem.code != "image-outside":
                self.found.append(problem)
        for one in source.missing if has_disks else ():
            self._add("missing-disk", f"the image {one.looked} of disk {one.slot} is missing", one.looked)
        return source

    def _configurations(self, source: SourceHome) -> None:
        for one in (source.present, *(snapshot.configuration for snapshot in source.snapshots)):
            if words := schema.complaint(one.root):
                self._add("invalid-configuration", f"{one.source}: {words}", one.source)

    def _compare(self, told: Manifest, source: SourceHome) -> None:
        place = self.folder / manifest.FILE
        if told.vm_id != source.vm_id:
            self._add(
                "manifest-disagrees", f"{place} is of the VM {told.vm_id}, the files are of {source.vm_id}", place
            )
        recorded, there = {one.id for one in told.snapshots}, {one.record.id for one in source.snapshots}
        for one in sorted(recorded - there):
            self._add("missing-snapshot", f"the snapshot {one} is not there", self.folder / "Snapshots")
        for one in sorted(there - recorded):
            self._add("manifest-disagrees", f"{place} does not list the snapshot {one}", place)
        for snapshot in told.snapshots:
            self._compare_state(snapshot, source)
        if (told.state is not SavedState.NONE) != (source.memory is not None):
            self._add("saved-state-damaged", "the saved state of the present is not as the manifest says", place)
        if told.options.disks:
            for image in told.images:
                self._compare_image(image, source)

    def _compare_state(self, told: manifest.Snapshot, source: SourceHome) -> None:
        record = next((one.record for one in source.snapshots if one.record.id == told.id), None)
        if record is not None and (record.parent, record.state) != (told.parent, told.state):
            place = self.folder / manifest.FILE
            self._add("manifest-disagrees", f"{place} says something else of snapshot '{record.name}'", place)

    def _compare_image(self, told: manifest.Image, source: SourceHome) -> None:
        path = self.folder / told.file
        if told.file not in self.files:
            self._add("missing-disk", f"the image {path} is missing", path, "get a whole copy of the export")
            return
        if self.files[told.file].st_size != told.bytes:
            sizes = f"{self.files[told.file].st_size} bytes instead of {told.bytes}"
            self._add("wrong-size", f"{path} has {sizes}", path, "get a whole copy of the file")
        there = source.images.get(str(path))
        if there is None:
            if str(path) not in self._left_out(source):
                self._add("manifest-disagrees", f"no disk of the export stands on {path}", path)
            return
        if (there.format, there.size) != (told.format, told.size):
            self._add("wrong-size", f"{path} is no {told.format} image of {told.size} bytes", path)
        parent = None if told.parent is None else str(self.folder / told.parent)
        if there.parent != parent:
            self._add("wrong-parent", f"{path} stands on {there.parent}, not on {parent}", path)
        if (
            self.archive is None
            and told.sha256 is None
            and there.format == images.QCOW2
            and not qemu_img.check(path, images.QCOW2).is_sound
        ):
            self._add("damaged", f"the tables of {path} contradict each other", path)

    def _left_out(self, source: SourceHome) -> set[str]:
        """The images of disks that take no part in snapshots, with the parents that the manifest knows."""
        facts = source.facts
        home = str(self.folder if facts is None else facts.home)
        named = {disk.source for one in source.configurations() for disk in one.disks() if disk.source is not None}
        return {f"{self.folder}{path.removeprefix(home)}" for path in named if path.startswith(f"{home}/")}
