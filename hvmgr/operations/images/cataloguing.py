"""The public API of image catalogs: ``Host.catalog(folder)``. The commands ``catalog …`` are built on it.

catalog = host.catalog("/srv/catalog")
catalog.add("debian.qcow2", group="Linux")
catalog.deploy("debian", Path("/srv/vms"))
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors, units
from hvmgr.host import wimlib
from hvmgr.model import image_plan
from hvmgr.model.image_format import ImageFormat
from hvmgr.model.progress import Progress
from hvmgr.model.specification import DiskSpecification, Specification
from hvmgr.model.wim_options import WimApplyOptions
from hvmgr.operations import image_users
from hvmgr.operations.images import answers, catalog_links, changes, disks, making, recognition, sysprep, volumes
from hvmgr.operations.images.recognition import Recognised
from hvmgr.storage import copy, durable, index
from hvmgr.storage.catalog import WIM, Answer, AnswerKind, Catalog, Entry, require_group, require_name

if TYPE_CHECKING:
    from hvmgr.model.netboot import NetbootOptions
    from hvmgr.operations.boot.netboot import Published
    from hvmgr.operations.host import Host
    from hvmgr.operations.vm import VM

_READABLE = 0o444


class Images:
    """The images of a catalog, and what is made of them."""

    def __init__(self, host: Host, folder: Path) -> None:
        self._host = host
        self._catalog = Catalog(Path(os.path.realpath(folder)))

    @property
    def folder(self) -> Path:
        """Where the catalog lies."""
        return self._catalog.folder

    def entries(self, group: str | None = None) -> list[Entry]:
        """All images, or those of a group."""
        return [one for one in self._catalog.entries() if group in (None, one.group)]

    def verify(self) -> list[str]:
        """What is wrong with the catalog's files, by their checksums; empty when nothing is."""
        found = []
        with volumes.stoppable(self._host) as report:
            for one in self._catalog.entries():
                answer = () if one.answer is None else ((one.answer.file, one.answer.sha256),)
                for relative, wanted in ((one.file, one.sha256), *answer):
                    path = self._catalog.path(relative)
                    if not path.exists():
                        found.append(f"{relative} of '{one.name}' is missing")
                    elif _hashed(path, report) != wanted:
                        found.append(f"{relative} of '{one.name}' was changed")
        return found

    def add(
        self, source: Path | str, *, name: str | None = None, group: str = "Default", description: str = "",
        answer: Path | str | None = None,
    ) -> Entry:  # fmt: skip
        """A copy of an image or a WIM is in the catalog; the source is only read."""
        path = Path(os.path.realpath(source))
        if not path.exists():
            raise errors.NotFound(f"there is no {source}", path=str(source))
        wanted = path.stem if name is None else name
        require_name(wanted)
        require_group(group)
        told = None if answer is None else answers.kind_of(Path(answer))
        kind, disk, parts = self._looked_at(path)
        self._require_new(wanted)
        self._approve("catalog add", f"copy {path} into {self.folder} as '{wanted}', group '{group}'")
        target = f"images/{wanted}.{kind}"
        with self._catalog.changing(self._host.wait_s), volumes.stoppable(self._host) as report:
            self._require_new(wanted)
            volumes.require_room(self.folder, path.stat().st_blocks * 512, f"a copy of {path.name}")
            with self._unwritten(path, kind):
                _copy(path, self._catalog.path(target), report, mode=_READABLE)
            kept = None
            if told is not None and answer is not None:
                file = f"answers/{wanted}.{'xml' if told is AnswerKind.UNATTEND else 'yaml'}"
                data = Path(answer).read_bytes()
                durable.write_file(self._catalog.path(file), data, mode=0o644)
                kept = Answer(told, file, copy.sha256(self._catalog.path(file)))
            entry = Entry(
                name=wanted, group=group, kind=kind, file=target, size=self._catalog.path(target).stat().st_size,
                sha256=_hashed(self._catalog.path(target), report), disk=disk, description=description,
                added=units.to_rfc3339(datetime.now(UTC)), parts=parts, answer=kept,
            )  # fmt: skip
            self._catalog.put(entry)
        return entry

    def move(self, names: Sequence[str], group: str) -> list[Entry]:
        """The images are in that group."""
        require_group(group)
        known = [self._catalog.entry(name) for name in names]
        self._approve("catalog group", *(f"put '{one.name}' into the group '{group}'" for one in known))
        with self._catalog.changing(self._host.wait_s):
            known = [self._catalog.entry(one.name) for one in known]
            for one in known:
                self._catalog.move(one.name, group)
        return [self._catalog.entry(name) for name in names]

    def remove(self, name: str, *, gone: Sequence[Path | str] = ()) -> Entry:
        """The image is not in the catalog any more; Conflict while a VM or another image stands on it.

        One that was made on it and is not at its place may have been moved: the caller says which of these are ``gone``, each
        place as often as there are images that were made there. So may the home of a VM on it, which is named by its folder.
        """
        entry = self._catalog.entry(name)
        path = self._catalog.path(entry.file)
        removed = catalog_links.gone(self._catalog, name, path, gone)
        if path.exists():
            changes.complete(self._host, [path])
        self._require_unneeded(name, path, removed)
        self._approve("catalog remove", f"remove '{name}' ({entry.file}) from {self.folder}")
        with self._standing(entry):
            changes.require_settled([path])
            self._require_unneeded(name, path, removed)
            self._catalog.drop(name)
            durable.remove(path)
            if entry.answer is not None:
                durable.remove(self._catalog.path(entry.answer.file))
        return entry

    def deploy(
        self,
        name: str,
        folder: Path,
        *,
        linked: bool = False,
        answered: bool = True,
        wim: WimApplyOptions | None = None,
    ) -> Path:
        """A disk image in the folder, a copy or a differencing image, that nobody uses yet; of a WIM a new disk."""
        entry = self._catalog.entry(name)
        if not folder.is_dir():
            raise errors.NotFound(f"there is no folder {folder}", path=str(folder))
        if entry.kind == WIM:
            return self._deploy_wim(entry, folder, wim, linked=linked)
        target = Path(os.path.realpath(folder)) / Path(entry.file).name
        making.require_new(target)
        what = f"a differencing image on '{name}'" if linked else f"a copy of '{name}'"
        self._approve("catalog deploy", f"make {target}, {what}")
        with (
            self._standing(entry) if linked else contextlib.nullcontext(),
            index.making(target, wait_s=self._host.wait_s),
            volumes.stoppable(self._host) as report,
        ):
            self._make(entry, target, report, linked=linked, answered=answered)
        return target

    def deploy_vm(self, name: str, spec: Specification, *, linked: bool = False, answered: bool = True) -> VM:
        """A new VM with the image as its first disk: a copy, or a differencing image on the catalog's own."""
        entry = self._catalog.entry(name)
        if entry.kind == WIM:
            raise errors.Unsupported(
                f"'{name}' is a WIM, which brings nothing that starts it",
                hint="deploy it to a folder with --to ./DIR --size S, and make it boot",
            )
        path = self._catalog.path(entry.file)
        answer = entry.answer if answered else None
        if linked and answer is not None:
            raise errors.Unsupported(
                f"'{name}' has an answer file, which cannot be put into a linked VM",
                hint="deploy it without --linked, or without the answer: --without-answer",
            )
        if linked:
            # Until the index of the host knows that the VM stands on the image, nobody may take it away. The lock of the image
            # is the VM's own to take.
            with contextlib.nullcontext() if self._host.reporter.dry_run else self._kept(entry):
                self._require_unchanged(entry)
                return self._host.create_vm(_with_disk(spec, DiskSpecification(path=path, linked=True)))
        if answer is None:
            self._require_unchanged(entry, thoroughly=not self._host.reporter.dry_run)
            return self._host.create_vm(_with_disk(spec, DiskSpecification(path=path)))
        if self._host.reporter.dry_run:
            return self._host.create_vm(_with_disk(spec, DiskSpecification(path=path)))
        with self._catalog.changing(self._host.wait_s), volumes.working(path) as place:
            target = place / path.name
            with volumes.stoppable(self._host) as report:
                self._make(entry, target, report, linked=False, answered=True)
            return self._host.create_vm(_with_disk(spec, DiskSpecification(path=target)))

    def netboot(self, options: NetbootOptions) -> Published:
        """Machines that start over the network can get the images onto their disks, as long as a web server serves the folder."""
        from hvmgr.operations.boot import netboot

        return netboot.publish(self._host, self._catalog, options)

    def _require_new(self, name: str) -> None:
        if any(one.name == name for one in self._catalog.entries()):
            raise errors.Conflict(
                f"the catalog has an image '{name}' already", hint="give another --name, or remove that one"
            )

    @contextlib.contextmanager
    def _standing(self, entry: Entry) -> Iterator[None]:
        """The image is still in the catalog, and no other command takes it away or puts anything on it meanwhile."""
        path = self._catalog.path(entry.file)
        with self._kept(entry), index.locked([path], wait_s=self._host.wait_s):
            yield

    @contextlib.contextmanager
    def _kept(self, entry: Entry) -> Iterator[None]:
        """The image is still in the catalog, and stays there meanwhile."""
        with self._catalog.changing(self._host.wait_s):
            now = self._catalog.entry(entry.name)
            if (now.file, now.sha256) != (entry.file, entry.sha256):
                raise changes.changed_meanwhile(self._catalog.path(entry.file))
            yield

    def _require_unneeded(self, name: str, path: Path, gone: Counter[Path]) -> None:
        """Conflict while a VM or another image stands on it."""
        if not path.exists():
            return
        catalog_links.require_none(self._catalog, name, path, gone)
        managed = {one.name for one in index.entries()}
        for user in image_users.of(self._host, path, gone=gone):
            raise changes.needed(path, user, managed)

    def _deploy_wim(self, entry: Entry, folder: Path, wim: WimApplyOptions | None, *, linked: bool) -> Path:
        if linked:
            raise errors.UsageError(f"'{entry.name}' is a WIM: nothing can stand on it", hint="leave --linked out")
        if wim is None or wim.size is None:
            raise errors.UsageError(
                f"'{entry.name}' is a WIM, of which a disk is made", hint="give its size with --size"
            )
        target = Path(os.path.realpath(folder)) / f"{entry.name}.{(wim.new.format or ImageFormat.VHD).value}"
        return self._host.wims.apply(self._catalog.path(entry.file), target, wim).path

    def _make(self, entry: Entry, target: Path, report: disks.Report, *, linked: bool, answered: bool) -> None:
        """The new image is there, complete and with its answer file, or not at all."""
        source = self._catalog.path(entry.file)
        fmt = ImageFormat(entry.kind)
        if linked:
            self._link(entry, source, target, fmt)
        else:
            with durable.appearing(target) as part:
                _copy(source, part, report)
                if _hashed(part, report) != entry.sha256:
                    raise _changed(entry)
                if entry.answer is not None and answered:
                    self._answer(entry.answer, recognition.look(part, fmt), target, report)
            return
        try:
            if entry.answer is not None and answered:
                found = recognition.look(target, folders=[source.parent])
                self._answer(entry.answer, found, target, report)
        except BaseException:
            durable.remove(target)
            raise

    def _answer(self, answer: Answer, found: Recognised, target: Path, report: disks.Report) -> None:
        with volumes.working(target) as place:
            answers.put(found, answer.kind, self._catalog.path(answer.file), place, report)

    def _link(self, entry: Entry, source: Path, target: Path, fmt: ImageFormat) -> None:
        self._require_unchanged(entry)
        if fmt is ImageFormat.VHDX:
            raise errors.Unsupported("nothing here makes a differencing VHDX", hint="leave --linked out")
        step = image_plan.MakeImage(
            path=str(target), format=(ImageFormat.VHD if fmt is ImageFormat.VHD else ImageFormat.QCOW2).value,
            type="differencing", size=entry.disk or 0, parent=str(source), parent_format=_driver(fmt), block_size=None,
        )  # fmt: skip
        with catalog_links.noted(self._catalog, entry.name, target), making.named(target) as part:
            making.make(part, target, step)

    def _require_unchanged(self, entry: Entry, *, thoroughly: bool = False) -> None:
        path = self._catalog.path(entry.file)
        if not path.exists():
            raise errors.Corrupt(f"{path} is missing", path=str(path))
        if path.stat().st_size != entry.size:
            raise _changed(entry)
        if thoroughly:
            with volumes.stoppable(self._host) as report:
                if _hashed(path, report) != entry.sha256:
                    raise _changed(entry)

    def _looked_at(self, path: Path) -> tuple[str, int | None, tuple[tuple[int, str], ...]]:
        with path.open("rb") if path.is_file() else contextlib.nullcontext() as file:
            is_wim = file is not None and file.read(8) == b"MSWIM\0\0\0"
        if is_wim:
            info = wimlib.info(path)
            for one in info.images:
                windows = sysprep.in_wim(path, one.index)
                if windows is not None and (warning := windows.warning(f"image {one.index} of {path}")):
                    self._host.reporter.notice(warning)
            return WIM, None, tuple((one.index, one.name) for one in info.images)
        changes.complete(self._host, recognition.known_chain(path))
        found = recognition.look(path)
        if found.is_differencing:
            raise errors.Unsupported(
                f"{path} is a differencing image: a catalog holds complete ones",
                hint=f"make one of it: hvmgr image convert {shlex.quote(str(path))} NEW.{found.format.value}",
            )
        return found.format.value, found.size, ()

    @contextlib.contextmanager
    def _unwritten(self, path: Path, kind: str) -> Iterator[None]:
        if kind == WIM:
            yield
            return
        with making.kept_still(self._host, recognition.look(path, ImageFormat(kind))):
            yield

    def _approve(self, operation: str, *what: str) -> None:
        steps = [image_plan.PrepareWork(one) for one in what]
        changes.require_approval(self._host, changes.plan_of(operation, f"{operation} in {self.folder}", steps))


def _with_disk(spec: Specification, disk: DiskSpecification) -> Specification:
    return replace(spec, disks=(disk, *spec.disks))


def _copy(source: Path, target: Path, report: disks.Report, *, mode: int = 0o600) -> None:
    report(Progress(0, 0, f"copy {source.name}"))
    durable.copy_file(source, target, mode=mode)
    report(Progress(1, 1, f"copy {source.name}"))


def _hashed(path: Path, report: disks.Report) -> str:
    size, done = path.stat().st_size, 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        report(Progress(min(done, size), size, f"check {path.name}"))

    return copy.sha256(path, on_read=add)


def _changed(entry: Entry) -> errors.Corrupt:
    return errors.Corrupt(
        f"'{entry.name}' is not what was put into the catalog: its checksum is another",
        hint="add it again",
        file=entry.file,
    )


def _driver(fmt: ImageFormat) -> str:
    return "vpc" if fmt is ImageFormat.VHD else fmt.value
