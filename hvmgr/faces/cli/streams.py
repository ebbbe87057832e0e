"""Disks on their way into files and pipes, and out of them: what ``disk export``, ``vdi-export`` and their counterparts share."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from hvmgr import errors, units
from hvmgr.faces.cli import arguments, render
from hvmgr.model.image_format import ImageFormat
from hvmgr.model.progress import Progress

if TYPE_CHECKING:
    from hvmgr.faces.cli.request import Request
    from hvmgr.operations.transfer.outgoing import Outgoing

FORMATS = ("vhd", "raw", "qcow2")
STANDARD = "-"


def path_of(target: str) -> Path | None:
    """The file that is meant; None for stdout."""
    return None if target == STANDARD else arguments.absolute(target)


def require_target(request: Request, target: str, if_exists: str = "fail") -> None:
    """Stdout takes the stream and nothing else; a file is never replaced."""
    if target == STANDARD and if_exists != "fail":
        raise errors.UsageError("nothing is there already in stdout", hint="leave out --if-exists, or name a file")
    if target != STANDARD:
        if os.path.lexists(target):
            if if_exists != "fail":
                return
            raise errors.Conflict(f"{target} exists already, and nothing is replaced", hint="give it another name")
        if not arguments.absolute(target).parent.is_dir():
            raise errors.NotFound(f"there is no folder {arguments.absolute(target).parent}", hint="make it first")
        return
    if request.dry_run:
        return
    if request.json:
        raise errors.UsageError("--json and the disk would both go to stdout", hint="write the disk into a file")
    if sys.stdout.isatty():
        raise errors.UsageError("a disk is nothing for a terminal", hint="pipe it on, or name a file")


def write(request: Request, stream: Outgoing, target: str, report: Report) -> None:
    """All of the stream into a new file, complete or not there, or to stdout."""
    from hvmgr.os_errors import explained

    if target == STANDARD:
        sys.stdout.flush()
        with explained(Path("stdout")):
            try:
                stream.send(sys.stdout.fileno(), report.sending(stream))
            except BrokenPipeError as error:
                raise errors.Cancelled("whoever was to read the disk has gone") from error
        return
    from hvmgr.vhd import file

    path = arguments.absolute(target)
    with file.created(path, mode=0o600) as made, explained(path):
        stream.send(made.descriptor, report.sending(stream), sparse=True)


@contextlib.contextmanager
def source(target: str) -> Iterator[tuple[BinaryIO, int | None]]:
    """What is to be read, and its length where that is known."""
    if target == STANDARD:
        if sys.stdin.isatty():
            raise errors.UsageError("a terminal holds no disk", hint="pipe it in, or name a file")
        with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as file:
            yield file, _length(file)
        return
    from hvmgr.storage import durable

    path = arguments.absolute(target)
    with durable.explained(path):
        if path.is_dir():
            raise errors.UsageError(f"{path} is a folder, not a disk", hint="name the file that holds it")
        file = path.open("rb", buffering=0)
    with file:
        yield file, _length(file)


def _length(file: BinaryIO) -> int | None:
    facts = os.fstat(file.fileno())
    if not stat.S_ISREG(facts.st_mode):
        return None
    return max(0, facts.st_size - os.lseek(file.fileno(), 0, os.SEEK_CUR))


def format_of(stated: str | None, target: str) -> ImageFormat:
    """As stated, else as the file's name says, else VHD."""
    if stated is not None:
        return ImageFormat(stated)
    from hvmgr.operations.images import recognition

    return (None if target == STANDARD else recognition.named_format(Path(target))) or ImageFormat.VHD


class Report:
    """How far a stream is: bars on a terminal; where there is none, with ``--progress`` a line for each tenth."""

    def __init__(self, request: Request, *, wanted: bool) -> None:
        self._request = request
        self._wanted = wanted
        if wanted and not sys.stderr.isatty():
            request.listener = self._line
        self._what, self._tenth = "", 0
        self._began = time.monotonic()

    def sending(self, stream: Outgoing) -> SendProgress:
        """What the sending of a stream calls."""
        return SendProgress(self, f"export {stream.name}")

    def __call__(self, progress: Progress) -> None:
        """So far."""
        self._request.report(progress)

    def _line(self, progress: Progress) -> None:
        if not progress.total:
            return
        tenth = 10 * progress.done // progress.total
        if progress.what != self._what:
            self._what, self._tenth = progress.what, 0
        if tenth > self._tenth:
            self._tenth = tenth
            spent = time.monotonic() - self._began
            left = spent * (progress.total - progress.done) / max(progress.done, 1)
            render.notice(f"{progress.what}: {10 * tenth} %, {left:.0f} s left")

    def end(self) -> None:
        """All is done."""
        if self._wanted:
            render.notice(f"Total time: {time.monotonic() - self._began:.1f} s")


class SendProgress:
    """Bytes done and in all, as the codec tells them."""

    def __init__(self, report: Report, what: str) -> None:
        self._report = report
        self._what = what

    def __call__(self, done: int, total: int) -> None:
        """So far."""
        self._report(Progress(done, total, self._what))


def size(stream: Outgoing) -> str:
    """The length of a stream for people."""
    return units.format_size(stream.length)
