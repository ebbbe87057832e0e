"""Where files have data, and copies of that alone."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from hvmgr import errors

_COPY_PIECE = 128 << 20  # in the kernel: the fewer calls, the less each byte costs
_READ_PIECE = 1 << 20


def data_ranges(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """Where a file has data: (start, end) of each run; the whole file where the file system knows no holes."""
    end = 0
    while end < size:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
            end = os.lseek(descriptor, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            if error.errno != errno.EINVAL:
                raise
            start, end = end, size  # no hole information here
        yield start, min(end, size)


def copy_range(reader: int, writer: int, start: int, end: int, target: int | None = None) -> None:
    """The bytes from ``start`` to ``end`` stand at ``target`` (the same place by default), moved by the kernel where it can."""
    offset, shift = start, 0 if target is None else target - start
    while offset < end:
        try:
            count = os.copy_file_range(reader, writer, min(end - offset, _COPY_PIECE), offset, offset + shift)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            piece = os.pread(reader, min(end - offset, _READ_PIECE), offset)
            count = os.pwrite(writer, piece, offset + shift)
        if count == 0:
            raise errors.Conflict("the file became shorter while it was copied")
        offset += count
