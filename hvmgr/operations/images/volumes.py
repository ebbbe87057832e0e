"""The volumes of a disk, and work on one of them beside the image: made in a file of its own, then written in.

What programs do to a volume (format it, apply a WIM, edit it) they do in a sparse file beside the image, in the folder
``.hvmgr-part-NAME.work``. The image is not touched until all of that has gone well; then a journal says that the file is
to be written in, and does it. A dead command's folder without a journal means nothing, and the next one removes it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors, units
from hvmgr.host import image_locks
from hvmgr.model import image_plan
from hvmgr.model.image_format import ImageFormat
from hvmgr.model.image_info import ImageType
from hvmgr.model.plan import Step
from hvmgr.model.progress import Progress
from hvmgr.operations.images import acts, changes, disks, recognition
from hvmgr.operations.images.recognition import Recognised
from hvmgr.storage import durable, holes, images, journal, partitions
from hvmgr.vhd.source import Source, read

if TYPE_CHECKING:
    from hvmgr.operations.host import Host

_SECTOR = 512
_WORK = ".work"
# Where a file system says that it is one: (offset, bytes, name).
_MAGICS = (
    (3, b"NTFS    ", "ntfs"), (3, b"EXFAT   ", "exfat"), (3, b"-FVE-FS-", "bitlocker"), (0, b"LUKS\xba\xbe", "luks"),
    (0, b"XFSB", "xfs"), (0x438, b"\x53\xef", "ext"), (0x10040, b"_BHRfS_M", "btrfs"), (4086, b"SWAPSPACE2", "swap"),
    (82, b"FAT32   ", "fat"), (54, b"FAT", "fat"), (536, b"LVM2 001", "lvm"),
)  # fmt: skip
# What a written byte may cost in space: whole blocks of the format.
_BLOCKS = {ImageFormat.VHD: 2 * units.MIB, ImageFormat.VHDX: 32 * units.MIB, ImageFormat.QCOW2: 64 * units.KIB}


@dataclass(frozen=True, slots=True)
class Found:
    """A volume of a disk: its partition's number (0: the whole disk), its place, and the file system in it, if any."""

    number: int
    offset: int
    size: int
    file_system: str | None

    def describe(self) -> str:
        where = "the whole disk" if self.number == 0 else f"partition {self.number}"
        return f"{where} ({self.file_system or 'nothing known'}, {units.format_size(self.size)})"


def volumes_of(disk: Source) -> list[Found]:
    """The partitions of a disk with what is in them; the whole disk where it has no table."""
    table = partitions.read(disk)
    if table is None:
        return [Found(0, 0, disk.size, file_system_at(disk, 0, disk.size))]
    found = [one for one in table.partitions if not one.is_extended and one.end <= disk.size]
    return [Found(one.number, one.start, one.size, file_system_at(disk, one.start, one.size)) for one in found]


def file_system_at(disk: Source, offset: int, size: int) -> str | None:
    """The file system that begins there, by its own mark."""
    head = read(disk, offset, min(size, 0x10100))
    for at, magic, name in _MAGICS:
        if head[at : at + len(magic)] == magic:
            return name
    return None


def chosen(path: Path, found: Sequence[Found], file_system: str, number: int | None) -> Found:
    """The one volume with this file system, or the partition of that number; NotFound and Conflict with what there is."""
    told = ", ".join(one.describe() for one in found) or "no partition"
    if number is not None:
        one = next((one for one in found if one.number == number), None)
        if one is None:
            raise errors.NotFound(f"{path} has no partition {number}", hint=f"it has {told}")
        if one.file_system != file_system:
            raise errors.Conflict(
                f"partition {number} of {path} holds no {file_system}: {one.file_system or 'nothing known'}",
                hint=f"{path.name} has {told}",
            )
        return one
    fitting = [one for one in found if one.file_system == file_system]
    if not fitting:
        raise errors.NotFound(f"{path} has no volume with {file_system}", hint=f"it has {told}")
    if len(fitting) > 1:
        raise errors.Conflict(
            f"{path} has {len(fitting)} volumes with {file_system}",
            hint=f"say which with --partition: {', '.join(one.describe() for one in fitting)}",
        )
    return fitting[0]


def is_blank(disk: Source, report: disks.Report) -> bool:
    """Whether all of a disk reads as zeros."""
    found = disks.pieces(disk, "look for data", report)
    return all(is_zero for _, piece in found for _, _, is_zero in disks.runs(piece))


# --- work beside the image ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def stoppable(host: Host) -> Iterator[disks.Report]:
    """Work that touches no image yet: Ctrl-C ends it where it says how far it is, and nothing is left."""
    from hvmgr.operations.session import Interrupts

    interrupts = Interrupts()

    def report(progress: Progress) -> None:
        interrupts.check()
        host.reporter.progress(progress)

    try:
        yield report
    finally:
        interrupts.close()


@contextlib.contextmanager
def working(path: Path) -> Iterator[Path]:
    """A folder beside ``path`` for what is made before that is touched; it stays only when a journal needs it.

    The caller holds the locks that keep other commands away from ``path``.
    """
    place = _folder_beside(path)
    with durable.explained(path):
        durable.remove_folder(place)
        durable.make_folder(place, mode=0o700)
        try:
            yield place
        finally:
            if not journal.is_open(journal.beside(path)):
                durable.remove_folder(place)


def _folder_beside(path: Path) -> Path:
    part = durable.part_of(path)
    return part.with_name(f"{part.name}{_WORK}")


class Work:
    """A change of one image that is being made beside it: first ``approve``, then files in ``place``, at last ``write``."""

    def __init__(self, host: Host, path: Path, found: Recognised, subject: str, stack: contextlib.ExitStack) -> None:
        self._host, self._path, self._found, self._subject = host, path, found, subject
        self._stack = stack
        self._plan = changes.plan_of(subject.partition(" of ")[0], subject, [])
        self._lock = contextlib.ExitStack()
        stack.enter_context(self._lock)
        self._lock.enter_context(image_locks.held(path, writable=False))
        self._stamp = acts.stamp_of(path)

    @functools.cached_property
    def place(self) -> Path:
        """The folder for the work; gone at the end."""
        return self._stack.enter_context(working(self._path))

    def approve(self, *steps: Step) -> None:
        """The caller wants these steps, and what follows from them; Declined otherwise."""
        closing = [image_plan.WriteWork(str(self._path), self._found.format.value, "", 0, ()), self._closing]
        self._plan = replace(self._plan, finish=(*steps, *closing))
        changes.require_approval(self._host, self._plan)

    def write(self, work: Path, offset: int) -> None:
        """The disk has the bytes of the file from ``offset`` on. Conflict when somebody wrote the image meanwhile."""
        require_space(self._path, self._found, work, offset)
        durable.sync_file(work)
        acts.require_same(self._path, self._stamp)
        self._lock.close()
        writing = image_plan.WriteWork(str(self._path), self._found.format.value, str(work), offset, self._stamp)
        changes.run(self._host, replace(self._plan, finish=(writing, self._closing)), self._path)

    @property
    def _closing(self) -> image_plan.RemoveWork:
        return image_plan.RemoveWork(str(_folder_beside(self._path)))


@contextlib.contextmanager
def changing(host: Host, path: Path, found: Recognised, subject: str) -> Iterator[Work]:
    """An image, locked by the caller, whose disk is about to be changed; nobody else writes it meanwhile."""
    with contextlib.ExitStack() as stack:
        yield Work(host, path, found, subject, stack)


def require_space(path: Path, found: Recognised, work: Path, offset: int) -> None:
    """NoSpace when what is new in the work has no room in the image's file system."""
    if found.type is ImageType.FIXED and found.format is not ImageFormat.RAW:
        return
    block = _BLOCKS.get(found.format, 4096)
    with work.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        blocks = 0
        after = -1
        for start, end in holes.data_ranges(file.fileno(), size):
            first, last = (offset + start) // block, (offset + end - 1) // block
            blocks += last - max(first, after + 1) + 1
            after = max(after, last)
    with disks.opened(found) as disk:
        there = sum(one.length for one in disk.stretches(offset, min(size, disk.size - offset)) if one.data)
    require_room(path.parent, max(0, blocks * block - there), f"what is written into {path}")


def require_room(folder: Path, size: int, what: str) -> None:
    """NoSpace when a folder has less room than that."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise errors.NoSpace(
            f"{what} takes {units.format_size(size)} in {folder}, and {units.format_size(free)} are free",
            hint="free space there and run it again",
        )


def copied_out(found: Recognised, volume: Found, target: Path, report: disks.Report) -> None:
    """The bytes of a volume are in a sparse file."""
    with disks.opened(found) as disk:
        part = disks.Part(disk, volume.offset, volume.size)
        data = sum(one.length for one in part.stretches() if one.data)
        require_room(target.parent, data, f"a copy of {volume.describe()} of {found.path.name}")
        disks.copy_out(part, target, what=f"read {found.path.name}", report=report)


def require_writable(found: Recognised) -> None:
    """Refuses what cannot be written in place as it is shown."""
    if found.format is ImageFormat.VHDX and found.is_differencing:
        images.require_usable(found.path)
    if found.format is ImageFormat.QCOW2:
        recognition.require_no_differencing_below(found.path)
    if found.size < _SECTOR:
        raise errors.UsageError(f"{found.path} is empty: there is no disk in it", hint="make one: hvmgr image create")
