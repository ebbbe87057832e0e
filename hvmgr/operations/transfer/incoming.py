"""A disk that arrives as a stream: what it is, what it stands on, and its bytes, whichever of the formats it has.

Whatever is not among its pieces is zeros in a full image, and what the disk held before in a delta. A stream that is
damaged or too short raises while it is read, at its very end at the latest: whoever wrote its data somewhere undoes that.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol, Self, TypeVar, cast

from hvmgr import errors
from hvmgr.host import nbd_client, qemu_img, storage_daemon
from hvmgr.host.nbd_client import Client
from hvmgr.model.image_format import ImageFormat
from hvmgr.model.progress import Progress
from hvmgr.operations.images import disks
from hvmgr.storage import durable, images
from hvmgr.vhd.inlet import Inlet, Readable

if TYPE_CHECKING:
    from hvmgr.vhd import StreamReader

FORMATS = (ImageFormat.VHD, ImageFormat.RAW, ImageFormat.QCOW2)
_PIECE = 4 << 20
_SECTOR = 512
_IDLE_MS = 300
_MAGIC = {b"conectix": ImageFormat.VHD, b"QFI\xfb": ImageFormat.QCOW2}

Report = Callable[[Progress], None]
T = TypeVar("T")


class Arriving(Protocol):
    """One stream of which the beginning was read. ``size`` is that of its disk; None when only the target says it.

    ``uuid`` is the point that it holds when it is complete, ``parent`` the one that a delta starts from.
    """

    @property
    def size(self) -> int | None:
        """Bytes of the disk."""
        ...

    @property
    def uuid(self) -> str | None:
        """The point that it holds, where it says one."""
        ...

    @property
    def parent(self) -> str | None:
        """The point that must be there already; None for a full image."""
        ...

    def pieces(self, size: int) -> Iterator[tuple[int, memoryview]]:
        """Offset and bytes, each valid until the next; ``size`` is that of the disk that takes it."""
        ...

    def close(self) -> None:
        """What was spooled is gone."""
        ...


class Incoming:
    """A stream of a stated format; its first bytes are read when this is made.

    ``length`` is that of the whole stream where it is known for sure beforehand (not what a client announces that cannot
    know it): a fixed VHD needs it, and a raw disk is held against it. ``spool`` is a folder for
    streams that cannot be read forward. ``to_end=False`` is for transports that stay open behind a VHD or a raw disk.
    """

    def __init__(
        self,
        file: Readable,
        fmt: ImageFormat,
        *,
        spool: Path,
        length: int | None = None,
        to_end: bool = True,
        name: str = "the stream",
    ) -> None:
        if fmt not in FORMATS:
            raise errors.UsageError(f"a disk is not taken in as {fmt.value}", hint="vhd, raw and qcow2 are possible")
        self.format = fmt
        self.name = name
        self._idle = _Idle()
        file = _Patient(file, self._idle) if isinstance(file, io.FileIO) else file
        self._arriving: Arriving
        if fmt is ImageFormat.VHD:
            self._arriving = _Vhd(file, length=length, spool=spool, to_end=to_end, name=name)
        elif fmt is ImageFormat.RAW:
            self._arriving = _Raw(file, length=length, to_end=to_end, name=name)
        else:
            self._arriving = _Qcow2(file, length=length, spool=spool, name=name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._arriving.close()

    @property
    def size(self) -> int | None:
        """Bytes of the disk; None when only the disk that takes it says them."""
        return self._arriving.size

    @property
    def uuid(self) -> str | None:
        """The point that it holds when it is complete, where it says one."""
        return self._arriving.uuid

    @property
    def parent(self) -> str | None:
        """The point that must be there already; None for a full image."""
        return self._arriving.parent

    def require_fitting(self, size: int, what: str, hint: str | None = None, *, force: bool) -> None:
        """Conflict when a disk of ``size`` bytes is too small for it, or raw bytes are fewer, which ``force`` lets through."""
        if self.format is ImageFormat.RAW and self.size is not None and self.size < size and not force:
            raise errors.Conflict(
                f"{self.name} has {self.size} bytes, {what} has {size}: a part of it may be missing",
                hint="--force takes it as it is, with zeros behind it",
                held=self.size,
                size=size,
            )
        if self.size is not None and self.size > size:
            raise errors.Conflict(
                f"{self.name} is a disk of {self.size} bytes, {what} has {size}", hint=hint, needed=self.size, size=size
            )

    def require_meant(self, *, force: bool) -> None:
        """UsageError when raw bytes begin like an image of another format."""
        if isinstance(self._arriving, _Raw) and self._arriving.looks_like is not None and not force:
            found = self._arriving.looks_like.value
            raise errors.UsageError(
                f"{self.name} begins like a {found} image, and would be taken for the bytes of the disk",
                hint=f"state the format: {found}; --force takes it as it is",
            )

    def require_held(self, held: Sequence[str], what: str, *, force: bool) -> None:
        """Conflict when a delta starts from something that the disk does not hold now."""
        if self.parent is None or force or self.parent in held:
            return
        now = f"it holds {', '.join(held)}" if held else "nobody can tell what it holds now"
        raise errors.Conflict(
            f"{self.name} is a delta on {self.parent}, and that is not what {what} holds: {now}",
            hint="import what it is based on first; --force applies it all the same",
            parent=self.parent,
            held=list(held),
        )

    def write(self, client: Client, size: int, below: Sequence[tuple[int, int]], report: Report) -> None:
        """The disk into an empty child of what it is to replace; ``below`` is where that holds data (offset, length)."""
        end = min(self.size or size, size)
        self._idle.act = lambda: report(Progress(0, end, f"import {self.name}"))
        for start, length in below:  # old data that the stream does not speak of
            first = start if self.parent is None else max(start, end)
            if first < start + length:
                client.write_zeroes(first, start + length - first)
        for offset, piece in self._arriving.pieces(size):
            for first, last, is_zero in disks.runs(piece):
                if not is_zero:
                    client.write(offset + first, piece[first:last])
                elif self.parent is not None:
                    client.write_zeroes(offset + first, last - first)
            report(Progress(min(offset + len(piece), end), end, f"import {self.name}"))
        client.flush()
        report(Progress(end, end, f"import {self.name}"))


def recognise(head: bytes) -> ImageFormat | None:
    """The format that a stream begins like; None for anything else, which may be a raw disk."""
    return next((fmt for magic, fmt in _MAGIC.items() if head.startswith(magic)), None)


class _Idle:
    """What is done now and then while nothing arrives."""

    act: Callable[[], None] = staticmethod(lambda: None)


class _Patient:
    """A pipe, or what else the kernel reads by itself: whoever wants to stop need not wait for the next byte."""

    def __init__(self, file: io.FileIO, idle: _Idle) -> None:
        self._file = file
        self._idle = idle
        self._poll = select.poll()
        self._poll.register(file.fileno(), select.POLLIN)

    def fileno(self) -> int:
        return self._file.fileno()

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, view: memoryview) -> int | None:
        while not self._poll.poll(_IDLE_MS):
            self._idle.act()
        return self._file.readinto(view)

    def read(self, size: int) -> bytes | None:
        while not self._poll.poll(_IDLE_MS):
            self._idle.act()
        return self._file.read(size)


class _Vhd:
    def __init__(self, file: Readable, *, length: int | None, spool: Path, to_end: bool, name: str) -> None:
        from hvmgr import vhd

        self._reader: StreamReader = vhd.StreamReader(file, length=length, spool=spool, to_end=to_end, name=name)
        self.size: int | None = self._reader.size
        header, footer = self._reader.header, self._reader.footer
        self.uuid = None if footer is None else str(uuid.UUID(bytes=footer.uid))
        is_delta = header is not None and self._reader.kind is vhd.Kind.DIFFERENCING
        self.parent = str(uuid.UUID(bytes=header.parent_uid)) if is_delta and header is not None else None

    def pieces(self, _size: int) -> Iterator[tuple[int, memoryview]]:
        return iter(self._reader)

    def close(self) -> None:
        self._reader.close()


class _Raw:
    """Complete when the disk is, or what was announced; anything shorter is cut off."""

    uuid: str | None = None
    parent: str | None = None

    def __init__(self, file: Readable, *, length: int | None, to_end: bool, name: str) -> None:
        self.size = length
        self._inlet = Inlet(file, name)
        self._name = name
        self._to_end = to_end
        self._head = self._begin(_SECTOR if length is None else min(length, _SECTOR))
        self.looks_like = recognise(self._head)

    def _begin(self, wanted: int) -> bytes:
        head = bytearray(wanted)
        self._fill(memoryview(head), None)
        return bytes(head)

    def pieces(self, size: int) -> Iterator[tuple[int, memoryview]]:
        wanted = min(size, self.size if self.size is not None else size)
        buffer = memoryview(bytearray(min(_PIECE, max(wanted, _SECTOR))))
        buffer[: len(self._head)] = self._head
        at, have = 0, len(self._head)
        while at < wanted:
            piece = buffer[: wanted - at]
            self._fill(piece[have:], wanted)
            yield at, piece
            at, have = at + len(piece), 0
        if self._to_end and not self._inlet.is_at_end():
            raise errors.Corrupt(
                f"{self._name} goes on behind byte {wanted}, where the disk ends", hint="state the right format"
            )

    def _fill(self, piece: memoryview, wanted: int | None) -> None:
        try:
            self._inlet.fill(piece)
        except errors.Corrupt as error:
            more = "" if wanted is None else f", and the disk has {wanted}"
            raise errors.Corrupt(
                f"{self._name} ends at byte {self._inlet.at}{more}",
                hint="send all of it; a disk that is smaller on purpose comes as a file, or as vhd or qcow2",
                offset=self._inlet.at,
                needed=wanted,
            ) from error

    def close(self) -> None:
        pass


class _Qcow2:
    """Tables may lie anywhere: the whole image is spooled into a file without a name, and read by QEMU."""

    uuid: str | None = None
    parent: str | None = None

    def __init__(self, file: Readable, *, length: int | None, spool: Path, name: str) -> None:
        self._stack = contextlib.ExitStack()
        self._name = name
        with contextlib.ExitStack() as stack, durable.explained(spool):
            spooled = cast("BinaryIO", stack.enter_context(tempfile.TemporaryFile(dir=spool, buffering=0)))
            inlet = Inlet(file, name)
            inlet.pour(spooled, length)
            if length is not None and inlet.at < length:
                raise inlet.fault("F51", at=inlet.at, total=length)
            self._path = Path(f"/proc/{os.getpid()}/fd/{spooled.fileno()}")
            self.size: int | None = self._checked(inlet.at if length is None else None)
            self._stack = stack.pop_all()

    def _checked(self, arrived: int | None) -> int:
        """The size of its disk; refused is what is no image on its own, and what is damaged.

        Of ``arrived`` bytes nobody knows whether they are all: then the last cluster has to be whole.
        """
        self._require_alone()
        found = _explained(self._name, lambda: qemu_img.info(self._path, images.QCOW2))
        result = _explained(self._name, lambda: qemu_img.check(self._path, images.QCOW2))
        if not result.is_sound or found.is_corrupt:
            raise errors.Corrupt(f"{self._name} is a damaged qcow2 image", hint="send it again")
        if arrived is not None and result.end_offset is not None and arrived < result.end_offset:
            raise errors.Corrupt(
                f"{self._name} ends at byte {arrived}, within its last cluster",
                hint="send all of it, or as a file, whose length is known",
                offset=arrived,
            )
        return found.size

    def _require_alone(self) -> None:
        """It names no other file. Looked up in its header, before QEMU sees it, which might open what a stranger named."""
        try:
            what = "stands on another image" if images.read(self._path, images.QCOW2).backing is not None else None
        except (errors.Unsupported, errors.Corrupt) as error:
            if isinstance(error, errors.Corrupt) or "version" in error.facts:
                raise errors.Corrupt(f"{self._name} is no sound qcow2 image", hint="send it again") from error
            what = "keeps its data or its parent elsewhere, or is encrypted"
        if what is not None:
            raise errors.Unsupported(f"{self._name} {what}, so that it is no whole disk", hint="send a complete image")

    def pieces(self, _size: int) -> Iterator[tuple[int, memoryview]]:
        extents = [(one.start, one.length, one.data and not one.zero) for one in qemu_img.map(self._path, images.QCOW2)]
        with storage_daemon.started() as daemon:
            node = daemon.open(self._path, images.QCOW2, writable=False)
            with daemon.exported(node) as uri, nbd_client.connected(uri) as client:
                yield from disks.pieces(disks.QemuSource(client, extents), self._name, lambda _: None)

    def close(self) -> None:
        self._stack.close()


def _explained(name: str, act: Callable[[], T]) -> T:
    """What QEMU finds wrong with a file without a name is wrong with the stream."""
    try:
        return act()
    except (errors.Corrupt, errors.HostFailed, errors.Unsupported) as error:
        raise errors.Corrupt(f"{name} is no sound qcow2 image", hint="send it again", words=str(error)) from error
