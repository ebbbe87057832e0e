"""How VHDs that come in become images that QEMU runs on: each VHD one image, on that of its parent.

Only what the file itself holds is written, so that the tree is kept and the cost is that of the data. QEMU copies the rest
of a cluster from the parent where a VHD holds a part of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors
from hvmgr.host import nbd_client, qemu_img
from hvmgr.model import plan
from hvmgr.model.progress import Progress
from hvmgr.operations.session import Session
from hvmgr.storage import copy, durable, images

if TYPE_CHECKING:
    from hvmgr.vhd import Image

_PIECE = 4 << 20
_CLUSTER = 64 << 10  # of qcow2: what is looked at for zeros
_ZEROS = bytes(_CLUSTER)


def convert(session: Session, step: plan.ConvertVhd) -> None:
    """The image is complete and on disk; the VHD is the one that was recorded."""
    from hvmgr import vhd

    source, target = Path(step.source), Path(step.target)
    if step.sha256 and copy.sha256(source) != step.sha256:
        raise errors.Corrupt(
            f"{source} holds other bytes than were recorded", hint="get a whole copy of the file", path=str(source)
        )
    backing = None if step.parent is None or step.parent_format is None else (step.parent, step.parent_format)
    if backing is None and vhd.qemu_reads_alike(source):  # it is faster than we are
        qemu_img.flatten(
            source,
            images.VPC,
            target,
            target_fmt=images.QCOW2,
            on_progress=lambda done: session.progress(_progress(source, min(done, step.size), step.size)),
        )
    else:
        _write_image(session, step, backing)
    durable.set_mode(target, 0o600)
    durable.set_owner(target, session.owner)
    durable.sync_file(target)


def _write_image(session: Session, step: plan.ConvertVhd, backing: tuple[str, str] | None) -> None:
    from hvmgr import vhd

    source, target, daemon = Path(step.source), Path(step.target), session.daemon
    daemon.create_qcow2(target, size=step.size, backing=backing)
    node = daemon.open(target, images.QCOW2, writable=True)
    try:
        with (
            durable.explained(target),
            daemon.exported(node, writable=True) as uri,
            nbd_client.connected(uri) as client,
            vhd.open_image(source) as image,
        ):
            for offset, piece in _held(image):
                _write(client, offset, piece, explicit=backing is not None)
                session.progress(_progress(source, offset + len(piece), step.size))
            client.flush()
    finally:
        daemon.close(node)


def _progress(source: Path, done: int, total: int) -> Progress:
    return Progress(done, total, f"convert {source.name}")


def unconvert(_session: Session, step: plan.ConvertVhd) -> None:
    """The image is not there."""
    durable.remove(Path(step.target))


def _held(image: Image) -> Iterator[tuple[int, memoryview]]:
    """What the file holds, in pieces that begin where clusters begin as far as that can be."""
    buffer = memoryview(bytearray(_PIECE))
    for stretch in _stretches(image):
        offset, end = stretch
        while offset < end:
            length = min(_PIECE - offset % _PIECE, end - offset)
            image.read_into(offset, buffer[:length])
            yield offset, buffer[:length]
            offset += length


def _stretches(image: Image) -> Iterator[tuple[int, int]]:
    if image.block_size == 0:  # a fixed disk: holes of the file are zeros
        yield from image.file.data_ranges(0, image.size)
        return
    start = end = 0
    for one in image.stretches():
        if one.data and one.offset == end:
            end += one.length
        elif one.data:
            yield start, end
            start, end = one.offset, one.offset + one.length
    yield start, end


def _write(client: nbd_client.Client, offset: int, piece: memoryview, *, explicit: bool) -> None:
    """Runs of data; ``explicit``: and zeros, for they hide what the parent has."""
    length, run = len(piece), 0
    before: bool | None = None
    for start in [*range(0, length, _CLUSTER), length]:
        part = piece[start : start + _CLUSTER]
        is_zero = None if start == length else part.tobytes() == _ZEROS[: len(part)]
        if is_zero is before:
            continue
        if before is False:
            client.write(offset + run, piece[run:start])
        elif before and explicit:
            client.write_zeroes(offset + run, start - run)
        run, before = start, is_zero
