"""A stream becomes a file: when all of it has arrived and is right, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hvmgr import errors
from hvmgr.vhd import creation, format
from hvmgr.vhd.creation import OnProgress
from hvmgr.vhd.file import File, created
from hvmgr.vhd.format import Kind
from hvmgr.vhd.layout import Parentage
from hvmgr.vhd.source import Stretch
from hvmgr.vhd.stream_reader import StreamReader


def receive(
    reader: StreamReader, path: Path | str, *, raw: bool = False, on_progress: OnProgress | None = None
) -> None:
    """The disk of the stream as a new file: a VHD of the same kind, with its id, time and parent, or its bytes alone.

    Whatever the stream's own order and padding were, the file is laid out for a disk to run on. Conflict when ``path``
    exists; Corrupt when the stream is damaged: then there is no file. ``on_progress`` gets where the last bytes lie on the
    disk, and its size.
    """
    if raw and reader.kind is Kind.DIFFERENCING:
        raise errors.UsageError("a differencing disk is no whole disk", hint="receive it as a VHD, beside its parent")
    if raw or reader.kind is Kind.FIXED:
        with created(Path(path)) as file:
            _write_flat(file, reader, on_progress)
            file.set_length(reader.size)
            if not raw and reader.footer is not None:
                file.write(reader.size, reader.footer.pack())
        return
    assert reader.footer is not None
    assert reader.header is not None
    creation.write_image(
        path,
        _Arriving(reader),
        kind=reader.kind,
        block_size=reader.header.block_size,
        parent=_parent(reader),
        uid=reader.footer.uid,
        time=format.from_stamp(reader.footer.time),
        on_progress=on_progress,
    )


def _write_flat(file: File, reader: StreamReader, on_progress: OnProgress | None) -> None:
    for offset, piece in reader:
        creation.write_sparse(file, offset, piece)
        if on_progress is not None:
            on_progress(offset + len(piece), reader.size)


def _parent(reader: StreamReader) -> Parentage | None:
    header = reader.header
    if reader.kind is not Kind.DIFFERENCING or header is None:
        return None
    name = header.name.replace("\\", "/").rpartition("/")[2]
    return Parentage(header.parent_uid, name, f".\\{name}", time=header.parent_time)


class _Arriving:
    """The stream as a source that is read once, in the order in which it comes."""

    def __init__(self, reader: StreamReader) -> None:
        self.size = reader.size
        self._reader = reader
        self._offset, self._piece = 0, memoryview(b"")

    def stretches(self, _offset: int = 0, _length: int | None = None) -> Iterator[Stretch]:
        """What arrives; the pieces of a block come together."""
        for offset, piece in self._reader:
            self._offset, self._piece = offset, piece
            yield Stretch(offset, len(piece), data=True)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Bytes of the piece that arrived last."""
        start = offset - self._offset
        buffer[:] = self._piece[start : start + len(buffer)]
