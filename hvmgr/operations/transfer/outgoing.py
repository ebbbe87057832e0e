"""A point of a disk as a stream: everything that can be refused is refused before the first byte.

    with vm.export_disk("vda", snapshot="monday", format=ImageFormat.VHD) as stream:
        print(stream.length)
        stream.send(descriptor)

As long as an ``Outgoing`` is open its images are held: by QEMU's own locks of a reader, so that nobody starts the VM on
what is read, and by a record in the host's index, so that nothing merges or removes it. A running VM goes on in new
images first, which are merged when the stream is closed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Self

from hvmgr import errors
from hvmgr.host import image_locks, nbd_client, qemu_img, storage_daemon
from hvmgr.host.qemu_img import Extent
from hvmgr.model.image_format import ImageFormat
from hvmgr.model.progress import Progress
from hvmgr.operations.exchange.mapped_disk import MappedDisk
from hvmgr.operations.images import disks
from hvmgr.operations.transfer import changes
from hvmgr.operations.transfer.points import Point
from hvmgr.storage import transfers
from hvmgr.storage.qcow2_stream import Qcow2Stream
from hvmgr.storage.raw_stream import RawStream

if TYPE_CHECKING:
    from hvmgr.vhd import StreamWriter

FORMATS = (ImageFormat.VHD, ImageFormat.RAW, ImageFormat.QCOW2)
_SECTOR = 512
_MAX_VHD = 2040 << 30
_TYPES = {
    ImageFormat.RAW: "application/octet-stream",
    ImageFormat.VHD: "application/vhd",
    ImageFormat.QCOW2: "application/x-qemu-disk",
}

OnProgress = Callable[[int, int], None]
Report = Callable[[Progress], None]


class Outgoing:
    """One stream that is ready to be sent, as often as wanted, until it is closed.

    ``length`` is that of the whole stream in bytes, ``base`` the uuid of the point that a delta starts from. What is sent
    goes through the kernel alone where files hold it as it is.
    """

    def __init__(
        self,
        point: Point,
        fmt: ImageFormat,
        writer: StreamWriter | RawStream | Qcow2Stream,
        stack: contextlib.ExitStack,
    ) -> None:
        self.uuid, self.name, self.size = point.uuid, point.name, point.size
        self.format = fmt
        self.base: str | None = None
        self.length = writer.length
        self.tell: Callable[[BaseException | None], None] | None = None  # called at the end with what went wrong
        self._writer = writer
        self._stack = stack
        self._is_sent = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self._end(error)

    def close(self) -> None:
        """The disk is let go; a second call does nothing."""
        self._end(None)

    def _end(self, error: BaseException | None) -> None:
        tell, self.tell = self.tell, None
        try:
            self._stack.close()
        finally:
            if tell is not None:
                tell(self._outcome(error))

    def _outcome(self, error: BaseException | None) -> BaseException | None:
        """What ended it too early; of whoever takes the bytes only that he did not take them all."""
        if isinstance(error, errors.HvmgrError) or (error is not None and not isinstance(error, Exception)):
            return error
        if error is None and self._is_sent:
            return None
        return errors.Cancelled(f"{self.name} was let go before all of it was sent")

    @property
    def content_type(self) -> str:
        """The media type, as xapi calls it."""
        return _TYPES[self.format]

    @property
    def file_name(self) -> str:
        """What xapi calls the file."""
        return f"{self.uuid}.{self.format.value}"

    @property
    def has_ranges(self) -> bool:
        """Whether any range can be asked for."""
        return isinstance(self._writer, RawStream)

    def chunks(self, start: int = 0, length: int | None = None) -> Iterator[bytes | memoryview]:
        """The bytes, in pieces of about 2 MiB; each is valid until the next one is asked for. Ranges of raw alone."""
        if isinstance(self._writer, RawStream):
            return self._noted(self._writer.chunks(start, length))
        self._require_whole(start, length)
        return self._noted(self._writer.chunks())

    def _noted(self, pieces: Iterator[bytes | memoryview]) -> Iterator[bytes | memoryview]:
        yield from pieces
        self._is_sent = True

    def send(
        self,
        descriptor: int,
        on_progress: OnProgress | None = None,
        *,
        start: int = 0,
        length: int | None = None,
        sparse: bool = False,
    ) -> None:
        """The bytes into a pipe, a socket or a file, whose own failure is the caller's (OSError).

        ``on_progress`` gets bytes done and bytes in all; what it raises ends the sending. ``sparse`` is for a new file.
        """
        if isinstance(self._writer, RawStream):
            self._writer.send(descriptor, on_progress, start=start, length=length, sparse=sparse)
        else:
            self._require_whole(start, length)
            self._writer.send(descriptor, on_progress)
        self._is_sent = True

    def _require_whole(self, start: int, length: int | None) -> None:
        if start or length not in {None, self.length}:
            raise errors.UsageError(
                f"a range of a {self.format.value} stream cannot be sent", hint="ask for format raw"
            )


def check(point: Point, base: Point | None, fmt: ImageFormat) -> None:
    """Raises for what could never be sent; nothing is opened for that."""
    if fmt not in FORMATS:
        raise errors.UsageError(f"a disk is not sent as {fmt.value}", hint="vhd, raw and qcow2 are possible")
    if fmt is ImageFormat.VHD and rounded(point.size) > _MAX_VHD:
        raise errors.UsageError(
            f"{point.name} has {point.size} bytes, and a VHD holds 2040 GiB at most",
            hint="send it as qcow2 or raw",
            size=point.size,
            most=_MAX_VHD,
        )
    if base is None:
        return
    if fmt is not ImageFormat.VHD:
        raise errors.UsageError(
            f"a delta is sent as a differencing VHD, not as {fmt.value}", hint="leave the base out, or send it as vhd"
        )
    if base.disk != point.disk:
        raise errors.UsageError(
            f"{base.name} is a point of another disk than {point.name}", hint="name a snapshot of the same disk as base"
        )
    if base.uuid == point.uuid:
        raise errors.UsageError(f"{point.name} is its own base", hint="name another snapshot of the disk as base")
    if not base.is_frozen:
        raise errors.UsageError(
            f"{base.name} still changes, and is no base", hint="name a snapshot of the disk as base"
        )


def opened(
    point: Point,
    base: Point | None,
    fmt: ImageFormat,
    *,
    report: Report,
    at_end: Callable[[], None] | None = None,
    time: datetime | None = None,
) -> Outgoing:
    """The stream of a point that was checked; ``at_end`` is called when all of it is let go again; not when this raises.

    ``time`` is what the VHD of a present says of when it was made, if not now.
    """
    with contextlib.ExitStack() as stack:
        for path in _files(point, base):
            stack.callback(os.close, image_locks.take(path, writable=False))
        stack.callback(transfers.end, transfers.begin(point.name, _files(point, base)))
        disk = _disk(stack, point)
        writer = _writer(stack, point, base, disk, fmt, report, time)
        everything = contextlib.ExitStack()
        if at_end is not None:
            everything.callback(at_end)  # not before it is open: the caller still holds what this would wait for
        everything.push(stack.pop_all())
        made = Outgoing(point, fmt, writer, everything)
    made.base = None if base is None else base.uuid
    return made


def rounded(size: int) -> int:
    """A disk's size in whole sectors, as QEMU shows it to a guest."""
    return -(-size // _SECTOR) * _SECTOR


def _files(point: Point, base: Point | None) -> list[Path]:
    chains = [*point.chain, *(() if base is None else base.chain)]
    return list(dict.fromkeys(path for path, _ in chains))


def _writer(
    stack: contextlib.ExitStack,
    point: Point,
    base: Point | None,
    disk: MappedDisk,
    fmt: ImageFormat,
    report: Report,
    time: datetime | None,
) -> StreamWriter | RawStream | Qcow2Stream:
    if fmt is ImageFormat.RAW:
        return RawStream(disk)
    if fmt is ImageFormat.QCOW2:
        return Qcow2Stream(disk)
    from hvmgr import vhd

    time = point.created or time or datetime.now(UTC)
    if base is None:
        return vhd.StreamWriter(disk, uid=point.uid, time=time)
    name = f"{base.uuid}.vhd"
    return vhd.StreamWriter(
        disk,
        parent=vhd.Parentage(base.uid, name, f".\\{name}"),
        changed=_changed(stack, point, base, disk, report),
        uid=point.uid,
        time=time,
    )


def _disk(stack: contextlib.ExitStack, point: Point) -> MappedDisk:
    extents = _map(point)
    reader = None
    if any(one.data and not one.zero and one.offset is None for one in extents):
        reader = _served(stack, point)
    paths = [path for path, _ in point.chain]
    return stack.enter_context(MappedDisk(paths, extents, size=rounded(point.size), reader=reader))


def _map(point: Point) -> list[Extent]:
    return qemu_img.map(*point.top)


def _served(stack: contextlib.ExitStack, point: Point) -> Callable[[int, memoryview], None]:
    """What is compressed or encrypted is read by QEMU itself."""
    daemon = stack.enter_context(storage_daemon.started())
    node = daemon.open(*point.top, writable=False)
    uri = stack.enter_context(daemon.exported(node))
    return stack.enter_context(nbd_client.connected(uri)).read_into


def _changed(
    stack: contextlib.ExitStack, point: Point, base: Point, disk: MappedDisk, report: Report
) -> Iterator[changes.Range]:
    mine, theirs = [path for path, _ in point.chain], [path for path, _ in base.chain]
    shared = 0
    while shared < min(len(mine), len(theirs)) and mine[-1 - shared] == theirs[-1 - shared]:
        shared += 1
    if not shared:  # their images have nothing in common any more: the bytes say it
        older, what = _disk(stack, base), f"compare {point.name} with its base"
        found = disks.differences(disk, older, what=what, report=report)
        return ((offset, len(piece)) for offset, piece in found)
    return changes.between(
        disk.extents,
        len(mine) - shared,
        _map(base),
        len(theirs) - shared,
        size=rounded(point.size),
        their_size=rounded(base.size),
    )
