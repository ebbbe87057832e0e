"""What stands already where a disk would be exported to: whether it is, byte for byte, what would be written.

Streams of a point are always the same, so that nothing has to be noted anywhere. Only the VHD of a present says when it was
made: it is compared with one of that time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from hvmgr import errors
from hvmgr.model.image_format import ImageFormat
from hvmgr.model.progress import Progress
from hvmgr.operations import working
from hvmgr.operations.transfer import outgoing, sending
from hvmgr.operations.transfer.outgoing import Outgoing
from hvmgr.operations.transfer.points import Point
from hvmgr.os_errors import explained

if TYPE_CHECKING:
    from hvmgr.operations.vm import VM


@dataclass(frozen=True, slots=True)
class FoundDisk:
    """A file in the place of an export, and the point (its uuid, the base's, its size) that would be exported.

    ``is_same`` is None where that was not asked for.
    """

    uuid: str
    format: ImageFormat
    base: str | None
    size: int
    length: int
    is_same: bool | None = None


def find(
    vm: VM,
    file: Path,
    find_point: Callable[[], Point],
    find_base: Callable[[], Point] | None,
    fmt: ImageFormat,
    *,
    compare: bool,
) -> FoundDisk | None:
    """None when nothing is there; else what it is. To compare reads all of both, and writes nothing.

    Conflict where the disk is that of a running VM: it changes while one looks.
    """
    if not os.path.lexists(file):
        return None
    with working.on(vm) as session:
        point, base = find_point(), None if find_base is None else find_base()
        outgoing.check(point, base, fmt)
        found = FoundDisk(point.uuid, fmt, None if base is None else base.uuid, point.size, _length(file))
        if not compare:
            return found
        if not point.is_frozen and session.state() in sending.ACTIVE:
            raise errors.Conflict(
                f"{file} exists already, and {vm.name} runs: whether that is what {point.name} holds cannot be told",
                hint="give the new one another name, export a snapshot, or keep that one with --if-exists keep",
                path=str(file),
            )
        if not file.is_file():  # a folder, a pipe, a device, a link to nowhere
            return replace(found, is_same=False)
        stream = outgoing.opened(point, base, fmt, report=session.progress, time=_made(file, fmt))
    with stream:
        return replace(found, is_same=_is_same(stream, file, session.progress))


def _length(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def _made(file: Path, fmt: ImageFormat) -> datetime | None:
    """When a VHD was made, as it says itself; None where it is none."""
    if fmt is not ImageFormat.VHD:
        return None
    from hvmgr import vhd
    from hvmgr.vhd import format

    try:
        with vhd.open_image(file) as image:
            return format.from_stamp(image.footer.time)
    except (errors.HvmgrError, OSError):
        return None


def _is_same(stream: Outgoing, file: Path, report: Callable[[Progress], None]) -> bool:
    with explained(file), file.open("rb", buffering=0) as held:
        if os.fstat(held.fileno()).st_size != stream.length:
            return False
        return _holds(held, stream, lambda done: report(Progress(done, stream.length, f"compare {file.name}")))


def _holds(held: BinaryIO, stream: Outgoing, tell: Callable[[int], None]) -> bool:
    done = 0
    for piece in stream.chunks():
        if os.pread(held.fileno(), len(piece), done) != piece:
            return False
        done += len(piece)
        tell(done)
    return done == stream.length
