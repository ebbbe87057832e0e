"""One open file and the system calls on it: the only place of the codec that touches the file system."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from hvmgr import errors
from hvmgr.os_errors import TEMPORARY
from hvmgr.os_errors import explained as explained  # noqa: PLC0414 - part of what this module gives
from hvmgr.write_behind import WriteBehind

_KERNEL_PIECE = 16 << 20  # moved inside the kernel: the fewer calls, the less each byte costs
_PIECE = 1 << 20


class File:
    """An open file or block device. Reads and writes are at offsets and always complete."""

    def __init__(self, path: Path, *, writable: bool = False) -> None:
        self.path = Path(path)
        self._behind: WriteBehind | None = None
        with explained(self.path):
            access = os.O_RDWR if writable else os.O_RDONLY
            self.descriptor = os.open(self.path, access | os.O_CLOEXEC | os.O_NONBLOCK)  # no pipe makes it wait
            mode = os.fstat(self.descriptor).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            self.close()
            raise errors.UsageError(f"{self.path} is neither a file nor a block device")

    @classmethod
    def adopt(cls, path: Path, descriptor: int, *, new: bool = False) -> Self:
        """A file that somebody opened; from now on it is closed here.

        A new one goes to the disk while it is written, so that little is left to wait for at the end.
        """
        self = cls.__new__(cls)
        self.path, self.descriptor, self._behind = path, descriptor, WriteBehind(descriptor) if new else None
        return self

    def close(self) -> None:
        """Nothing of the file is held any more; a second call does nothing."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def length(self) -> int:
        """Bytes; a block device has no length in its inode."""
        with explained(self.path):
            return os.fstat(self.descriptor).st_size or os.lseek(self.descriptor, 0, os.SEEK_END)

    def identity(self) -> tuple[int, int]:
        """Device and inode: the same for two names of one file."""
        facts = os.fstat(self.descriptor)
        return facts.st_dev, facts.st_ino

    def changed(self) -> float:
        """When the file was last written, in seconds since 1970."""
        return os.fstat(self.descriptor).st_mtime

    def read(self, offset: int, length: int) -> bytes:
        """Up to ``length`` bytes; fewer only at the end of the file."""
        with explained(self.path):
            data = os.pread(self.descriptor, length, offset)
            while len(data) < length and (more := os.pread(self.descriptor, length - len(data), offset + len(data))):
                data += more
        return data

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills the whole buffer; Corrupt when the file ends before."""
        with explained(self.path):
            while buffer:
                count = os.preadv(self.descriptor, [buffer], offset)
                if count == 0:
                    raise errors.Corrupt(f"{self.path} ends at byte {offset}, in the middle of its data", offset=offset)
                buffer, offset = buffer[count:], offset + count

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """All bytes stand in the file, though not yet on the disk below."""
        view = memoryview(data)
        with explained(self.path):
            while view:
                count = os.pwrite(self.descriptor, view, offset)
                self._push(offset, count)
                view, offset = view[count:], offset + count

    def _push(self, offset: int, length: int) -> None:
        if self._behind is not None:
            self._behind.wrote(offset, length)

    def sync(self) -> None:
        """What was written is on the disk."""
        with explained(self.path):
            os.fdatasync(self.descriptor)

    def set_length(self, length: int) -> None:
        """The file ends there; what it grows by is a hole."""
        with explained(self.path):
            os.ftruncate(self.descriptor, length)

    def data_ranges(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Where the file has data between two offsets; all of it where the file system knows no holes."""
        offset = start
        while offset < end:
            with explained(self.path):
                try:
                    low = os.lseek(self.descriptor, offset, os.SEEK_DATA)
                    high = os.lseek(self.descriptor, low, os.SEEK_HOLE)
                except OSError as error:
                    if error.errno == errno.ENXIO:
                        return
                    if error.errno != errno.EINVAL:
                        raise
                    low, high = offset, end
            if low >= end:
                return
            yield low, min(high, end)
            offset = high

    def copy_from(self, other: File, source: int, target: int, length: int) -> None:
        """The same bytes as in another file, moved by the kernel where it can."""
        with explained(self.path):
            while length:
                count = _copy_piece(other.descriptor, self.descriptor, source, target, min(length, _KERNEL_PIECE))
                if count == 0:
                    raise errors.Conflict(f"{other.path} became shorter while it was read")
                self._push(target, count)
                source, target, length = source + count, target + count, length - count


def _copy_piece(reader: int, writer: int, source: int, target: int, length: int) -> int:
    try:
        return os.copy_file_range(reader, writer, length, source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
            raise
    return os.pwrite(writer, os.pread(reader, min(length, _PIECE), source), target)


@contextlib.contextmanager
def created(path: Path, *, mode: int = 0o600) -> Iterator[File]:
    """A new file that gets its name when the block ends well: complete and on the disk, or not there at all.

    Conflict when something has the name, at the start or at the end.
    """
    with explained(path):
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        part, descriptor = _open_nameless(path, mode)
    file = File.adopt(path, descriptor, new=True)
    try:
        yield file
        with explained(path):
            os.fsync(file.descriptor)
            if part is None:
                _give_name(file.descriptor, path)
            else:
                os.link(part, path)
            _sync_folder(path.parent)
    finally:
        file.close()
        if part is not None:
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[File]:
    """A new file that takes the place of ``path`` when the block ends well, with its mode and owner."""
    facts = path.stat()
    part = _part(path)
    with explained(path):
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    file = File.adopt(path, descriptor, new=True)
    try:
        yield file
        with explained(path):
            if os.geteuid() == 0:
                os.fchown(descriptor, facts.st_uid, facts.st_gid)
            os.fchmod(descriptor, stat.S_IMODE(facts.st_mode))
            os.fsync(descriptor)
            os.replace(part, path)
            _sync_folder(path.parent)
    finally:
        file.close()
        part.unlink(missing_ok=True)


def _open_nameless(path: Path, mode: int) -> tuple[Path | None, int]:
    """A file without a name, which a dead process leaves no trace of; with one where the file system wants it."""
    try:
        return None, os.open(path.parent, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, mode)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOSYS):
            raise
    part = _part(path)
    return part, os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)


def _give_name(descriptor: int, path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:  # only with a folder does Python call linkat, which follows the link in /proc
        os.link(f"/proc/self/fd/{descriptor}", path, src_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


def _part(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY}{os.urandom(8).hex()}")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)
