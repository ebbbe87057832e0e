"""The steps of ``model/image_plan``, done. Each may be done again, and each leaves whole images behind.

What writes an image in place keeps every QEMU from it: by QEMU's own locks where our codec writes, else because QEMU
itself has it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from hvmgr import errors, vhd
from hvmgr.host import image_locks, nbd_client, qemu_errors, qemu_img, storage_daemon
from hvmgr.model import image_plan
from hvmgr.model.image_format import ImageFormat
from hvmgr.model.plan import Step
from hvmgr.model.progress import Progress
from hvmgr.operations.images import disks, recognition
from hvmgr.storage import allocation, durable, images, partitions, vhdx
from hvmgr.vhd.source import RawSource

Report = Callable[[Progress], None]

_PART = re.compile(re.escape(durable.TEMPORARY) + "[0-9a-f]{16}")  # as the codec alone names what it has not finished
_TORN = ("F4", "F5", "F7")  # what a death between the writing of two footers leaves


class Worker:
    """Does steps, and tells how far it is; ``report`` raises where the user wants to stop."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.is_untouched = False  # whether the step that failed has changed nothing yet

    def act(self, step: Step) -> None:
        """One step, whatever it is."""
        self._ACTS[type(step)](self, step)

    def merge(self, step: image_plan.MergeChain) -> None:
        """All images but the last go into the last."""
        if not Path(step.images[0]).exists():
            return  # done, and the merged images are on their way out
        if step.formats[0] == "vhd":
            self._merge_vhd([Path(one) for one in step.images])
        else:
            self._merge_qcow2(step)

    def _merge_vhd(self, chain: Sequence[Path]) -> None:
        with contextlib.ExitStack() as stack:
            for path in chain:
                stack.enter_context(image_locks.held(path))
            folders = list(dict.fromkeys(path.parent for path in chain))
            disk = stack.enter_context(vhd.open_chain(chain[0], folders=folders, any_size=True))
            if not all(map(Path.samefile, chain, (image.path for image in disk.images))):
                raise errors.Conflict(f"{chain[0]} stands on other files than it did", hint="run the command again")
            vhd.merge(disk, into=len(chain) - 1, on_progress=self._counted(f"merge into {chain[-1].name}"))

    def _merge_qcow2(self, step: image_plan.MergeChain) -> None:
        with storage_daemon.started(on_progress=self.report) as daemon:
            node = None
            opened = []
            for path, fmt in reversed(list(zip(step.images, step.formats, strict=True))):
                ends = path in (step.images[0], step.images[-1])
                node = daemon.open(Path(path), fmt, writable=ends, backing=node)
                opened.append(node)
            daemon.commit(opened[-1], opened[0])
            if step.formats[-1] == "qcow2":
                daemon.drop_bitmaps(opened[0])
        durable.sync_file(Path(step.images[-1]))

    def grow(self, step: image_plan.GrowImage) -> None:
        """The image is at least that large."""
        path = Path(step.path)
        if recognition.look(path).size < step.size:
            _resize(path, step.format, step.size, shrink=False)

    def point(self, step: image_plan.PointChild) -> None:
        """The child's header names the parent."""
        child, parent = Path(step.child), Path(step.parent)
        if step.format == "vhd":
            with image_locks.held(child):
                vhd.reparent(child, parent, ignore_id=True, any_size=True, folders=[parent.parent])
        else:
            name = relative_name(child, parent)
            qemu_img.name_parent(child, name, step.parent_format)
            durable.sync_file(child)

    def remove(self, step: image_plan.RemoveMerged) -> None:
        """The file is gone."""
        durable.remove(Path(step.path))

    def fit(self, step: image_plan.FitPartitions) -> None:
        """The second copy of a GPT stands before the new end; an image that has been cut already needs nothing."""
        path = Path(step.path)
        found = recognition.look(path)
        if found.size <= step.size:
            return
        with disks.opened(found) as disk:
            writes = partitions.fitted(disk, step.size)
        if writes:
            _write(path, step.format, writes)

    def resize(self, step: image_plan.SetSize) -> None:
        """The disk has that size."""
        path = Path(step.path)
        if recognition.look(path).size != step.size:
            _resize(path, step.format, step.size, shrink=step.shrink)

    def compact(self, step: image_plan.CompactImage) -> None:
        """Blocks of zeros take no space."""
        path = Path(step.path)
        if step.format == "vhd":
            _sweep(path.parent)
            with image_locks.held(path):
                vhd.compact(path, on_progress=self._counted(f"compact {path.name}"))
        elif step.format == "raw":
            with image_locks.held(path):
                self._dig(path)
        else:
            self._rewrite(path, step.format)

    def _dig(self, path: Path) -> None:
        what = f"compact {path.name}"
        with disks.opened(recognition.look(path, ImageFormat.RAW)) as disk:
            allocation.dig_holes(
                path,
                (
                    (offset + start, end - start)
                    for offset, piece in disks.pieces(disk, what, self.report)
                    for start, end, is_zero in disks.runs(piece)
                    if is_zero
                ),
            )

    def _rewrite(self, path: Path, fmt: str) -> None:
        """A copy without the zeros takes the image's name where it takes less; QEMU keeps others out of the image."""
        found = recognition.look(path)
        above = None
        if found.is_differencing:
            header = images.read(path, fmt)
            assert header.backing is not None
            above = (header.backing, header.backing_format or "")
        taken = path.stat().st_blocks * 512
        what = f"compact {path.name}"
        with durable.rewriting(path) as part:
            qemu_img.flatten(
                path, fmt, part, target_fmt=fmt, options=_shape(path, fmt), above=above,
                on_progress=lambda done: self.report(Progress(min(done, taken), taken, what)),
            )  # fmt: skip
            if part.stat().st_blocks * 512 >= taken:  # compressed clusters, above all
                durable.remove(part)

    def repair(self, step: image_plan.RepairImage) -> None:
        """What is repairable is right."""
        path = Path(step.path)
        if step.format == "vhd":
            with image_locks.held(path):
                vhd.repair(path)
        else:
            qemu_img.check(path, step.format, repair_leaks=True)
            durable.sync_file(path)

    def write_work(self, step: image_plan.WriteWork) -> None:
        """What was made beside the image is in it; nobody else opens the image meanwhile."""
        path, work, going = Path(step.path), Path(step.work), Path(step.going)
        if not work.exists() and not going.exists():
            return
        self.is_untouched = work.exists()
        with disks.written(path, step.format) as disk:
            if work.exists():
                require_same(path, step.stamp)
                durable.rename(work, going)
            self.is_untouched = False
            with RawSource(going) as source:
                disks.write_part(disk, source, step.offset, what=f"write {path.name}", report=self.report)
        durable.sync_file(path)
        durable.remove(going)

    def remove_work(self, step: image_plan.RemoveWork) -> None:
        """The folder is gone."""
        durable.remove_folder(Path(step.folder))

    def _counted(self, what: str) -> Callable[[int, int], None]:
        return lambda done, total: self.report(Progress(done, total, what))

    _ACTS: ClassVar[Mapping[type[Step], Callable[[Worker, Any], None]]] = {
        image_plan.MergeChain: merge,
        image_plan.GrowImage: grow,
        image_plan.PointChild: point,
        image_plan.RemoveMerged: remove,
        image_plan.FitPartitions: fit,
        image_plan.SetSize: resize,
        image_plan.CompactImage: compact,
        image_plan.RepairImage: repair,
        image_plan.WriteWork: write_work,
        image_plan.RemoveWork: remove_work,
    }


def stamp_of(path: Path) -> tuple[int, ...]:
    """By what a file is known to be unchanged: which one it is, its length, its time of change."""
    facts = path.stat()
    return (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)


def require_same(path: Path, stamp: tuple[int, ...]) -> None:
    """Conflict when somebody has written the image since."""
    if stamp_of(path) != tuple(stamp):
        raise errors.Conflict(
            f"{path} was changed by another program meanwhile; nothing was written", hint="run the command again"
        )


def _shape(path: Path, fmt: str) -> list[str]:
    """What a copy of an image has to have like the image itself: its blocks."""
    if fmt == "vhdx":
        return ["subformat=dynamic", f"block_size={vhdx.read(path).block_size}"]
    return [f"cluster_size={qemu_img.info(path, fmt).cluster_size}"]


def _sweep(folder: Path) -> None:
    """What dead compactions left is gone; whoever is alive has its file open."""
    for part in folder.glob(f"{durable.TEMPORARY}*"):
        if _PART.fullmatch(part.name) and not qemu_errors.holders_of(part):
            durable.remove(part)


def heal(paths: Sequence[Path]) -> None:
    """A VHD whose two footers a dead command left different says one thing again: the one at the end is written first."""
    for path in paths:
        if not path.exists() or images.identify(path).format != "vhd":
            continue
        try:
            vhd.open_image(path).close()
        except errors.Corrupt as error:
            if error.facts.get("fault") in _TORN:
                with image_locks.held(path):
                    vhd.repair(path, keep=vhd.Keep.END)


def relative_name(child: Path, parent: Path) -> str:
    """A parent's name as it is written into a child: relative where both lie in one folder, never read as a protocol."""
    if child.parent != parent.parent:
        return str(parent)
    return f"./{parent.name}" if ":" in parent.name else parent.name


def _resize(path: Path, fmt: str, size: int, *, shrink: bool) -> None:
    if fmt == "vhd":
        with image_locks.held(path):
            vhd.resize(path, size, allow_shrink=shrink)
    elif fmt == "raw":
        with image_locks.held(path):
            allocation.set_length(path, size)
    else:
        qemu_img.resize(path, fmt, size=size, shrink=shrink)
        durable.sync_file(path)


def _write(path: Path, fmt: str, writes: Sequence[tuple[int, bytes]]) -> None:
    """Bytes of the disk, each on disk before the next."""
    if fmt == "vhd":
        with image_locks.held(path), vhd.open_image(path, writable=True) as image:
            for offset, data in writes:
                image.write(offset, data)
                image.flush()
        return
    with storage_daemon.started() as daemon:
        node = daemon.open(path, fmt, writable=True)
        with daemon.exported(node, writable=True) as uri, nbd_client.connected(uri) as client:
            for offset, data in writes:
                client.write(offset, memoryview(data))
                client.flush()
