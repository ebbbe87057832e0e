"""How the steps of an export are done. Each may be done again: what is finished is noted, and taken as it is.

The source is only read. Large files are copied several at once, with one progress for the whole export.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from hvmgr import errors, vhd
from hvmgr.host import qemu_img, saved_state
from hvmgr.host.storage_daemon import Node
from hvmgr.model import export_plan, manifest
from hvmgr.model.manifest import Image
from hvmgr.model.plan import Plan, Step
from hvmgr.model.progress import Progress
from hvmgr.operations.exchange import mapped_disk
from hvmgr.operations.exchange.export_place import PUBLISHED_MODE, Place
from hvmgr.operations.session import Session
from hvmgr.storage import copy, durable, images
from hvmgr.storage.copy import Job
from hvmgr.storage.finished import Made
from hvmgr.vhd import creation

FILE_MODE = 0o440
_FOLDER_MODE = 0o700  # while it is made
# See image_steps: pulling ranges costs less than a walk through the whole disk when there is little to pull.
_SPARSE = 400

_PARALLEL = (export_plan.ExportFile, export_plan.HashSource)
_HASHED_AFTERWARDS = (
    export_plan.ExportImage,
    export_plan.ExportMerged,
    export_plan.ExportFlat,
    export_plan.ExportVhd,
    export_plan.ExportMemory,
)


class Exporter:
    """Runs one plan in one place. ``shared`` names sources that a process of ours holds, so that QEMU may look twice."""

    def __init__(self, session: Session, place: Place, one: Plan, *, hashed: bool, shared: Iterable[str] = ()) -> None:
        self._session = session
        self._place = place
        self._plan = one
        self._hashed = hashed
        self._shared = set(shared)
        self._made: dict[str, Made] = {}  # by name in the export
        self._written: list[Path] = []  # not yet on disk
        self._done = 0
        self._total = sum(self._weight(step) for step in one.steps())

    def run(self) -> None:
        """Everything is done; an error, or Ctrl-C, leaves what is finished to the next attempt."""
        self._place.begin(self._plan)
        self._do(self._plan.prepare)
        with self._session.interrupts.held_back():
            self._place.publish()
            self._place.close()

    @property
    def _owner(self) -> tuple[int, int] | None:
        """Us, and QEMU's group."""
        theirs = self._session.owner
        return None if theirs is None else (os.geteuid(), theirs[1])

    def _do(self, steps: Sequence[Step]) -> None:
        for parallel, group in itertools.groupby(steps, lambda step: isinstance(step, _PARALLEL)):
            if parallel:
                self._copy(list(group))
                continue
            for step in group:
                self._session.interrupts.check()
                self._acts[type(step)](self, step)

    def _weight(self, step: Step) -> int:
        size = int(getattr(step, "size", 0))
        return 2 * size if self._hashed and isinstance(step, _HASHED_AFTERWARDS) else size

    # -- progress ------------------------------------------------------------------------------------------------

    def _tell(self, done: int) -> None:
        self._session.progress(Progress(min(self._done + done, self._total), self._total, self._plan.subject))

    def _part_done(self, size: int) -> None:
        self._done += size
        self._tell(0)

    # -- large files ---------------------------------------------------------------------------------------------

    def _copy(self, steps: Sequence[Step]) -> None:
        files = [step for step in steps if isinstance(step, export_plan.ExportFile)]
        sources = [step for step in steps if isinstance(step, export_plan.HashSource)]
        jobs = [
            Job(Path(step.source), Path(step.target), hashed=self._hashed, mode=FILE_MODE, owner=self._owner)
            for step in files
        ]
        whole = sum(step.size for step in files)

        def report(done: int, total: int) -> None:
            self._tell(done * whole // total if total else 0)

        for target, made in copy.copy_files(jobs, notes=self._place.notes, on_progress=report).items():
            self._made[self._name(target)] = made
        self._done += whole
        hashes = self._hashes([Path(step.source) for step in sources], sum(step.size for step in sources))
        for step in sources:
            source = Path(step.source)
            self._made[step.name] = Made(source, images.length(source), hashes.get(source))

    def _hashes(self, paths: Sequence[Path], size: int) -> dict[Path, str]:
        """The hash of each, where hashes are wanted; ``size`` is what that adds to the whole work."""
        if not self._hashed:
            return {}
        found = copy.hash_files(paths, on_progress=lambda done, total: self._tell(done * size // total if total else 0))
        self._done += size
        return found

    def _make(self, step: Any, sources: Sequence[str], how: str, act: Callable[[Path], None]) -> None:
        """A file that is more than a copy: made by ``act`` under its name, then hashed, then noted as finished."""
        target, notes = Path(step.target), self._place.notes
        made = notes.find(target, [Path(one) for one in sources], how, hashed=self._hashed)
        if made is None:
            seen = [Path(one).stat() for one in sources]
            durable.remove(target)
            act(target)
            durable.set_owner(target, self._owner)
            target.chmod(FILE_MODE)
            durable.sync_file(target)
            self._done += step.size
            digest = self._hashes([target], step.size).get(target)
            made = Made(target, target.stat().st_size, digest)
            notes.write(made, seen, how)
        else:
            self._part_done(self._weight(step))
        self._made[self._name(target)] = made

    def _copy_plainly(self, source: str, target: Path, size: int) -> None:
        job = Job(Path(source), target, hashed=False)
        copy.copy_files([job], on_progress=lambda done, total: self._tell(done * size // total if total else 0))

    def _image(self, step: export_plan.ExportImage) -> None:
        parent = _relative(step.parent, step.target)

        def act(target: Path) -> None:
            self._copy_plainly(step.source, target, step.size)
            qemu_img.name_parent(target, parent, step.parent_format)

        self._make(step, [step.source], f"on {step.parent_format} {parent}", act)

    def _flat(self, step: export_plan.ExportFlat) -> None:
        def act(target: Path) -> None:
            qemu_img.flatten(
                Path(step.source),
                step.source_format,
                target,
                target_fmt=step.format,
                force_share=bool(self._shared.intersection(step.chain)),
                on_progress=lambda taken: self._tell(min(taken, step.size)),
            )

        self._make(step, step.chain, f"flat {step.format}", act)

    def _vhd(self, step: export_plan.ExportVhd) -> None:
        chain = [(Path(path), fmt) for path, fmt in step.chain]
        origin, how = None, "VHD"
        if step.parent is not None:
            origin = creation.describe_parent(Path(step.target), Path(step.parent))
            how = f"VHD of {step.own} on {origin.uid.hex()} {origin.relative}"

        def act(target: Path) -> None:
            shared = bool(self._shared.intersection(path for path, _ in step.chain))
            own = None if origin is None else step.own
            with mapped_disk.opened(chain, own=own, beside=target, force_share=shared) as disk:
                vhd.write_image(
                    target,
                    disk,
                    kind=vhd.Kind.DYNAMIC if origin is None else vhd.Kind.DIFFERENCING,
                    parent=origin,
                    uid=bytes.fromhex(step.uid),
                    on_progress=lambda done, total: self._tell(done * step.size // total),
                )

        self._make(step, [path for path, _ in step.chain], how, act)

    def _merged(self, step: export_plan.ExportMerged) -> None:
        parent = _relative(step.parent, step.target)

        def act(target: Path) -> None:
            self._copy_plainly(step.source, target, step.size)
            self._merge(step, target, parent)

        self._make(step, [step.source, *step.merged], f"merged on {step.below_format} {parent}", act)

    def _merge(self, step: export_plan.ExportMerged, target: Path, parent: str) -> None:
        """The copy takes what it is missing out of the source's images, which stay as they are."""
        depth = len(step.merged)
        extents = qemu_img.map(Path(step.source), images.QCOW2, force_share=step.source in self._shared)
        inherited = [(one.start, one.length) for one in extents if one.present and 1 <= one.depth <= depth]
        zeros = _hidden(step, extents)
        daemon, nodes = self._session.daemon, list[Node]()
        try:
            nodes.append(daemon.open(Path(step.below), step.below_format, writable=False))
            for path in reversed(step.merged):
                nodes.append(daemon.open(Path(path), images.QCOW2, writable=False, backing=nodes[-1]))
            nodes.append(daemon.open(target, images.QCOW2, writable=True, backing=nodes[-1]))
            if zeros:
                daemon.write_zeroes(nodes[-1], zeros)
            top, lowest, below = nodes[-1], nodes[1], nodes[0]
            if below.fmt == images.QCOW2 and sum(length for _, length in inherited) * _SPARSE < top.size:
                daemon.pull(top, lowest, base=below, backing_file=parent, ranges=inherited)
            else:
                daemon.stream(top, base=below, backing_file=parent)
        finally:
            for node in reversed(nodes):
                daemon.close(node)

    def _memory(self, step: export_plan.ExportMemory) -> None:
        def act(target: Path) -> None:
            self._copy_plainly(step.source, target, step.size)
            try:
                saved_state.replace_xml(target, step.xml)
            except errors.Conflict:  # no room for it
                durable.remove(target)
                saved_state.rewritten(Path(step.source), target, step.xml)

        how = f"memory {hashlib.sha256(step.xml.encode()).hexdigest()}"
        self._make(step, [step.source], how, act)

    # -- small files ---------------------------------------------------------------------------------------------

    def _folders(self, step: export_plan.MakeExport) -> None:
        home = self._place.home
        for name in ("", *step.folders):
            durable.make_folder(home / name, mode=_FOLDER_MODE, synced=False)
            durable.set_folder_mode(home / name, _FOLDER_MODE, synced=False)
        wanted = {home / name for name in step.files}
        for folder, names, files in os.walk(home):
            for name in list(names):
                path = Path(folder) / name
                if str(path.relative_to(home)) not in step.folders:
                    durable.remove_folder(path)
                    names.remove(name)
            for name in files:
                if Path(folder) / name not in wanted:
                    durable.remove(Path(folder) / name)

    def _folder(self, step: export_plan.ExportFolder) -> None:
        durable.copy_folder(Path(step.source), Path(step.target))

    def _configuration(self, step: export_plan.WriteConfiguration) -> None:
        self._write(step.target, step.xml)

    def _manifest(self, step: export_plan.WriteManifest) -> None:
        told = manifest.parse(step.text, source=manifest.FILE)
        whole = dataclasses.replace(told, images=tuple(self._told(one) for one in told.images))
        self._write(step.target, whole.to_yaml())

    def _told(self, image: Image) -> Image:
        made = self._made.get(image.file)
        return image if made is None else dataclasses.replace(image, bytes=made.size, sha256=made.sha256)

    def _sums(self, step: export_plan.WriteSums) -> None:
        lines = []
        own = self._name(Path(step.target))
        for name in sorted(self._names()):
            made = self._made.get(name)
            if name != own:
                digest = made.sha256 if made is not None else None
                lines.append(f"{digest or copy.sha256(self._place.home / name)}  {name}\n")
        self._write(step.target, "".join(lines))

    def _write(self, target: str, text: str) -> None:
        """As it will stay; it is on disk when all is, at the end."""
        durable.write_file(Path(target), text.encode(), mode=FILE_MODE, owner=self._owner, synced=False)
        self._written.append(Path(target))

    def _names(self) -> set[str]:
        """Every file of the export so far."""
        return {self._name(path) for path in files_of(self._place.home)}

    def _protect(self, _step: export_plan.ProtectExport) -> None:
        home, owner = self._place.home, self._owner
        durable.sync_files(self._written)
        for path in files_of(home):
            durable.set_owner(path, owner)
            durable.set_mode(path, FILE_MODE)
        for folder, _, _ in os.walk(home, topdown=False):
            # The export's own folder is closed last: who is not root may not move one that is closed.
            mode = _FOLDER_MODE if Path(folder) == home else PUBLISHED_MODE
            durable.set_folder_mode(Path(folder), mode, owner)

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self._place.home))

    _acts: ClassVar[dict[type[Step], Callable[[Exporter, Any], None]]] = {
        export_plan.MakeExport: _folders,
        export_plan.ExportImage: _image,
        export_plan.ExportMerged: _merged,
        export_plan.ExportVhd: _vhd,
        export_plan.ExportFlat: _flat,
        export_plan.ExportMemory: _memory,
        export_plan.ExportFolder: _folder,
        export_plan.WriteConfiguration: _configuration,
        export_plan.WriteManifest: _manifest,
        export_plan.WriteSums: _sums,
        export_plan.ProtectExport: _protect,
    }


def files_of(folder: Path) -> list[Path]:
    """Every file below a folder, in the order of their names."""
    return sorted(Path(place) / name for place, _, names in os.walk(folder) for name in names)


def _relative(parent: str, child: str) -> str:
    return os.path.relpath(parent, Path(child).parent)


def _hidden(step: export_plan.ExportMerged, extents: Sequence[qemu_img.Extent]) -> list[tuple[int, int]]:
    """What reads as zeros only because an image in between is shorter, where the parent has data again.

    The merged image has to hold zeros there itself (QEMU 7.2 would let the parent's data through).
    """
    shortest = min(images.read(Path(path), images.QCOW2).size for path in step.merged)
    end = images.read(Path(step.below), step.below_format).size
    ranges = []
    for one in extents:
        start, stop = max(one.start, shortest), min(one.start + one.length, end)
        if start < stop and not one.data and not (one.depth == 0 and one.present):
            ranges.append((start, stop - start))
    return ranges
