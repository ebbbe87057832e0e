"""Large files copied: blocks shared where the file system can, else only what is data, hashed in the same pass.

What ``copy_files`` promises:

- A target has its name when it is complete and on disk, never before; a copy that was stopped leaves no file.
- Holes of the source are holes of the target, and so are blocks that hold nothing but zeros where a hash is made.
- The hash is that of the bytes that were read from the source, as ``sha256sum`` tells it.
- A source that changes meanwhile is a Conflict.
- With ``notes`` what is complete and large is noted; the same call later takes such a target as it is, as long as source
  and target have the same inode, size and time.
- Memory does not grow with the size or the number of the files.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import fcntl
import hashlib
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from hvmgr import errors
from hvmgr.storage import durable, holes
from hvmgr.storage.finished import Made, Notes
from hvmgr.write_behind import WriteBehind

# linux/fs.h: _IOW(0x94, 9, int)
_FICLONE = 0x40049409
_PIECE = 256 << 10  # what a processor's own cache holds: half the time of 1 MiB
_BLOCK = 64 << 10  # what is looked at for zeros; a qcow2 cluster
_BUFFERS = 16
_SMALL = 8 << 20  # below that a thread of its own for the hash costs more than it gives
_REPORT_S = 0.1
_KERNEL_PIECE = 8 << 20
_ZEROS = bytes(_PIECE)

WORKERS = 4
HOW = "copy"  # what the notes say of how such a file was made


@dataclass(frozen=True, slots=True)
class Job:
    """One file to be copied."""

    source: Path
    target: Path
    hashed: bool = True
    mode: int = 0o600
    owner: tuple[int, int] | None = None
    plain: bool = False  # no link may lead to the source, not even one above it


def copy_files(
    jobs: Sequence[Job],
    *,
    workers: int = WORKERS,
    notes: Notes | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[Path, Made]:
    """All targets are complete and on disk; by target.

    ``on_progress`` is called with bytes done and bytes in all, in the caller's thread; when it raises, the copies under
    way are stopped, and what is complete stays. The first failure stops the others too.
    """
    meter = _Meter()
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(workers, "hvmgr-copy"))
        stack.callback(meter.stop)  # runs before the pool waits for its threads
        for job in jobs:
            meter.total += _work(job)
        running = [pool.submit(_copy, job, notes, meter) for job in jobs]
        _await(running, meter, on_progress)
        copied = [one.result() for one in running]
    for folder in {job.target.parent for job in jobs}:
        durable.sync_folder(folder)
    return {one.target: one for one in copied}


def sha256(path: Path, *, on_read: Callable[[int], None] | None = None) -> str:
    """The hash of one file, as ``sha256sum`` tells it; holes are not read. ``on_read`` gets each number of bytes."""
    with durable.explained(path), path.open("rb", buffering=0) as reader:
        size, digest = length_of(reader.fileno()), Digest()
        for start, piece in pieces(reader.fileno(), size):
            digest.update(start, piece)
            if on_read is not None:
                on_read(len(piece))
        return digest.finish(size)


def hash_files(
    paths: Sequence[Path], *, workers: int = WORKERS, on_progress: Callable[[int, int], None] | None = None
) -> dict[Path, str]:
    """The hashes of several files, at once; ``on_progress`` as in ``copy_files``."""
    meter = _Meter()
    meter.total = sum(_allocated(path) for path in paths)
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(workers, "hvmgr-hash"))
        stack.callback(meter.stop)
        running = {path: pool.submit(sha256, path, on_read=meter.add) for path in paths}
        _await(list(running.values()), meter, on_progress)
        return {path: one.result() for path, one in running.items()}


class _Stopped(Exception):
    """Another copy failed, or the caller wants to stop."""


class _Meter:
    """How far all copies together are, and whether they are to go on."""

    def __init__(self) -> None:
        self.total = 0
        self.done = 0
        self._lock = threading.Lock()
        self._stopped = False

    def add(self, count: int) -> None:
        with self._lock:
            self.done += count
        if self._stopped:
            raise _Stopped

    def stop(self) -> None:
        self._stopped = True


def _await(
    running: Sequence[concurrent.futures.Future[Any]],
    meter: _Meter,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    """All have ended well; else the first failure, and the others are told to stop."""
    waiting = set(running)
    try:
        while waiting:
            if on_progress is not None:
                on_progress(min(meter.done, meter.total), meter.total)
            ended, waiting = concurrent.futures.wait(waiting, _REPORT_S, concurrent.futures.FIRST_EXCEPTION)
            for one in ended:
                one.result()
        if on_progress is not None:
            on_progress(meter.total, meter.total)
    except BaseException:
        meter.stop()
        for one in waiting:
            one.cancel()
        raise


# --- one file -------------------------------------------------------------------------------------------------------


def _copy(job: Job, notes: Notes | None, meter: _Meter) -> Made:
    if notes is not None and (known := notes.find(job.target, [job.source], HOW, hashed=job.hashed)) is not None:
        meter.add(_work(job))
        return known
    with durable.explained(job.source):
        reader = os.open(job.source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        before = os.fstat(reader)
        if job.plain:
            durable.require_plain(reader, job.source)
        size = length_of(reader)
        with durable.explained(job.target), durable.replacing(job.target, job.mode, job.owner, named=False) as writer:
            shared = _share(reader, writer)
            if not shared:
                os.ftruncate(writer, size)
            digest = _copy_bytes(reader, writer, size, job, meter, shared=shared)
            require_same(job.source, before, os.fstat(reader))
    finally:
        os.close(reader)
    made = Made(job.target, size, digest, shared)
    if notes is not None and size >= _SMALL:
        notes.write(made, [before], HOW)  # a small file is copied again as soon as a note is written
    return made


def _copy_bytes(reader: int, writer: int, size: int, job: Job, meter: _Meter, *, shared: bool) -> str | None:
    behind = WriteBehind(writer)
    if not job.hashed:
        for start, end in () if shared else holes.data_ranges(reader, size):
            for offset in range(start, end, _KERNEL_PIECE):
                count = min(_KERNEL_PIECE, end - offset)
                holes.copy_range(reader, writer, offset, offset + count)
                behind.wrote(offset, count)
                meter.add(count)
        return None

    def write(start: int, piece: memoryview) -> None:
        if not shared:
            write_data(writer, start, piece)
            behind.wrote(start, len(piece))
        meter.add(len(piece))

    if size < _SMALL:
        digest = Digest()
        for start, piece in pieces(reader, size):
            digest.update(start, piece)
            write(start, piece)
        return digest.finish(size)
    with _Hasher() as hasher:
        for start, piece in pieces(reader, size, hasher.free):
            hasher.put(start, piece)
            write(start, piece)
        return hasher.finish(size)


def _share(reader: int, writer: int) -> bool:
    """Whether the target now shares all blocks of the source."""
    try:
        fcntl.ioctl(writer, _FICLONE, reader)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        return False  # another file system, or one that cannot
    return True


def pieces(reader: int, size: int, buffer: Callable[[], bytearray] | None = None) -> Iterator[tuple[int, memoryview]]:
    """The data of a file in order, in pieces: where each starts, and its bytes, valid until the buffer is used again."""
    own = bytearray(_PIECE)
    buffer = buffer or (lambda: own)
    for start, end in holes.data_ranges(reader, size):
        offset = start
        while offset < end:
            view = memoryview(buffer())[: min(_PIECE, end - offset)]
            count = os.preadv(reader, [view], offset)
            if count == 0:
                raise errors.Conflict("the file became shorter while it was read")
            yield offset, view[:count]
            offset += count


def write_data(writer: int, start: int, piece: memoryview) -> None:
    """Everything but blocks of zeros, which are holes of the new file already."""
    offset, length, run = 0, len(piece), 0
    while offset < length:
        end = min(offset + _BLOCK, length)
        if not piece[offset] and piece[offset:end].tobytes() == _ZEROS[: end - offset]:
            _write(writer, piece[run:offset], start + run)
            run = end
        offset = end
    _write(writer, piece[run:], start + run)


def _write(writer: int, view: memoryview, offset: int) -> None:
    while view:
        count = os.pwrite(writer, view, offset)
        view, offset = view[count:], offset + count


def length_of(descriptor: int) -> int:
    """A block device has no length in its inode."""
    return os.fstat(descriptor).st_size or os.lseek(descriptor, 0, os.SEEK_END)


def _work(job: Job) -> int:
    return _allocated(job.source)


def _allocated(path: Path) -> int:
    """About how many bytes have to be read."""
    with durable.explained(path):
        facts = path.stat()
    return min(facts.st_blocks * 512, facts.st_size) if facts.st_size else facts.st_blocks * 512


def require_same(source: Path, before: os.stat_result, after: os.stat_result) -> None:
    """Raises Conflict when somebody wrote to the file in between."""
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise errors.Conflict(
            f"{source} was changed while it was copied", hint="run the command again when nothing writes to it"
        )


# --- hashes ---------------------------------------------------------------------------------------------------------


class Digest:
    """SHA-256 of a file of which only the data is given; everything else is zeros."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._end = 0

    def update(self, start: int, piece: memoryview) -> None:
        """The next piece, which begins at ``start``."""
        self._zeros_to(start)
        self._hash.update(piece)
        self._end = start + len(piece)

    def finish(self, size: int) -> str:
        """The hash of the whole file of this size."""
        self._zeros_to(size)
        return self._hash.hexdigest()

    def _zeros_to(self, start: int) -> None:
        zeros = memoryview(_ZEROS)
        while self._end < start:
            count = min(len(zeros), start - self._end)
            self._hash.update(zeros[:count])
            self._end += count


class _Hasher(threading.Thread):
    """Hashes what another thread reads, beside it, in a handful of buffers that go round."""

    def __init__(self) -> None:
        super().__init__(name="hvmgr-hash", daemon=True)
        self._digest = Digest()
        self._free: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
        self._full: queue.SimpleQueue[tuple[int, memoryview] | None] = queue.SimpleQueue()
        for _ in range(_BUFFERS):
            self._free.put(bytearray(_PIECE))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._full.put(None)
        self.join()

    def free(self) -> bytearray:
        """A buffer that nobody reads any more."""
        return self._free.get()

    def put(self, start: int, piece: memoryview) -> None:
        """Hash this piece; its buffer must not be written before ``free`` gives it again."""
        self._full.put((start, piece))

    def finish(self, size: int) -> str:
        """The hash of the whole file."""
        self._full.put(None)
        self.join()
        return self._digest.finish(size)

    def run(self) -> None:
        while (work := self._full.get()) is not None:
            start, piece = work
            self._digest.update(start, piece)
            buffer = piece.obj
            assert isinstance(buffer, bytearray)
            self._free.put(buffer)


def can_share(source: Path, folder: Path) -> bool:
    """Whether a copy of the file in this folder would share its blocks: it then takes no space and no time."""
    try:
        if source.stat().st_dev != folder.stat().st_dev:
            return False
        reader = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        try:
            trial = os.open(folder, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
            try:
                return _share(reader, trial)
            finally:
                os.close(trial)
        finally:
            os.close(reader)
    except OSError:
        return False
