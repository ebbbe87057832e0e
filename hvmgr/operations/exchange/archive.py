"""An export as one file: tar, compressed with zstd, as a stream. Only what is no plain copy is made beside it first.

``export.yaml`` and ``SHA256SUMS`` come last, because the hashes are made while the files go by. An archive that was
interrupted is made anew.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hvmgr import errors
from hvmgr.host import process
from hvmgr.model import export_plan
from hvmgr.model.export_options import ExportOptions
from hvmgr.model.plan import Plan, Step
from hvmgr.operations import occasions
from hvmgr.operations.exchange import export_
from hvmgr.operations.exchange.export_place import PUBLISHED_MODE, Place
from hvmgr.operations.exchange.export_planning import Planner
from hvmgr.operations.exchange.export_steps import FILE_MODE, Exporter, files_of
from hvmgr.operations.session import Session
from hvmgr.storage import durable, images, tar
from hvmgr.storage.finished import Made

# -T0: all processors. The level is zstd's own default: a disk's data is either compressible or not.
_ZSTD = ("zstd", "-q", "-T0", "-3", "-c")
_LAST = (export_plan.WriteManifest, export_plan.WriteSums)
_NOT_HERE = (export_plan.ProtectExport,)
_PRIVATE = 0o600  # while it is made


@dataclass(frozen=True, slots=True)
class Target:
    """Where the archive goes: a new ``file``, or an open ``descriptor`` (stdout)."""

    file: Path | None = None
    descriptor: int | None = None


def export(session: Session, target: Target, options: ExportOptions) -> None:
    """The archive is complete: under its name and on disk, or handed to the descriptor."""
    options.check()
    if not options.checksums:
        raise errors.UsageError("--no-checksums and --archive exclude each other", hint="give one of them")
    place = _place(session, target)
    planner = Planner(session, place, options)
    one = planner.plan()
    session.require_approval(one)
    export_.require_space(place, one, copied=False)
    about = planner.about()
    try:
        with (
            occasions.operation(session, one, snapshots=about, path=target.file, is_approved=True),
            place.opened(wait_s=session.wait_s),
            _compressed(target) as sink,
        ):
            export_.run(session, one, options, lambda held: _Archiver(session, place, one, sink, held).run())
    finally:
        if place.folder.is_dir():
            durable.remove_folder(place.folder)


def _place(session: Session, target: Target) -> Place:
    name = session.home.name
    if target.file is None:
        # Nobody else, who may write there too, knows the name before the folder is there.
        folder = Path(tempfile.gettempdir()) / f".{name}-{secrets.token_hex(8)}.hvmgr-export"
        return Place(Path("/") / name, folder)
    if os.path.lexists(target.file):
        raise errors.Conflict(
            f"{target.file} exists already, and an export replaces nothing",
            hint="choose another name, or remove it",
            path=str(target.file),
        )
    if not target.file.parent.is_dir():
        raise errors.NotFound(f"there is no folder {target.file.parent}", hint="make it, or choose another place")
    return Place(target.file.parent / name, target.file.parent / f".{target.file.name}.hvmgr-export")


@contextmanager
def _compressed(target: Target) -> Iterator[tar.Sink]:
    """What is put in goes through zstd to the target."""
    if target.file is None:
        assert target.descriptor is not None
        with process.filtered(_ZSTD, to=target.descriptor) as sink:
            yield sink
        return
    with durable.appearing(target.file, mode=FILE_MODE) as part, part.open("xb", buffering=0) as file:
        os.fchmod(file.fileno(), _PRIVATE)
        try:
            with process.filtered(_ZSTD, to=file.fileno()) as sink:
                yield sink
        except errors.HostFailed as error:
            if "No space left" in str(error):
                raise errors.NoSpace(f"no space left for {target.file}", hint="free space there") from error
            raise


class _Archiver(Exporter):
    """Makes what is no plain copy beside the archive, then lets every file go by once."""

    def __init__(self, session: Session, place: Place, one: Plan, sink: tar.Sink, held: Sequence[str]) -> None:
        super().__init__(session, place, one, hashed=True, shared=held)
        self._tar = tar.Writer(sink)
        self._top = place.target.name
        self._sources: dict[str, Path] = {}  # by name in the export: files that go by without a copy

    def run(self) -> None:
        """The archive is complete."""
        self._do([step for step in self._plan.prepare if not isinstance(step, (*_LAST, *_NOT_HERE))])
        home = self._place.home
        self._tar.folder(self._top, mode=PUBLISHED_MODE)
        for folder in sorted(Path(place) / name for place, names, _ in os.walk(home) for name in names):
            self._tar.folder(f"{self._top}/{self._name(folder)}", mode=PUBLISHED_MODE)
        for path in files_of(home):
            self._sources.setdefault(self._name(path), path)
        for name in sorted(self._sources):
            self._go_by(name)
        for step in self._plan.prepare:
            if isinstance(step, _LAST):
                self._do([step])
                self._go_by(self._name(Path(step.target)))
        self._tar.end()

    def _copy(self, steps: Sequence[Step]) -> None:
        """Nothing is copied: the files go by later."""
        for step in steps:
            if isinstance(step, export_plan.ExportFile):
                self._sources[self._name(Path(step.target))] = Path(step.source)
        super()._copy([step for step in steps if not isinstance(step, export_plan.ExportFile)])

    def _go_by(self, name: str) -> None:
        source = self._sources.get(name, self._place.home / name)
        made = self._made.get(name)

        def report(count: int) -> None:
            if made is None:
                self._done += count
            self._tell(0)

        digest = self._tar.file(f"{self._top}/{name}", source, mode=FILE_MODE, on_read=report)
        self._made[name] = Made(source, images.length(source), digest)

    def _names(self) -> set[str]:
        return super()._names() | set(self._sources)
