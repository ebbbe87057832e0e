"""What is to be put into a file system: files and folders of this host, or out of another moment of a disk.

Either way everything is walked first, so that what would be refused is known before anything is written. A content is opened
when it is needed, and has to be what was seen then: one that changes meanwhile is a Conflict.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from hvmgr import errors
from hvmgr.operations.inside import browsing
from hvmgr.operations.inside.browsing import Browser, Found, shown
from hvmgr.os_errors import explained
from hvmgr.storage.filesystems.reader import Content, Type

Report = Callable[[int], None]  # hears of bytes that are written

SPECIAL = "device nodes, pipes and sockets"
STREAMS = "named streams"


class Source(Protocol):
    """A content that can be had as an open file."""

    def opened(self, spool: Path) -> contextlib.AbstractContextManager[int]:
        """A descriptor of a file with all of it; ``spool`` is a folder with room for a copy."""

    def pieces(self, at_once: int) -> Iterator[bytes]:
        """All of it in order, holes as zeros, in pieces that are no larger than that; no copy is made."""

    def data_size(self) -> int:
        """How many bytes of it are not holes, roughly."""


@dataclass(frozen=True, slots=True)
class Item:
    """One file, folder or link that is to be there. ``parts``: its place below the target; times are nanoseconds.

    ``extras`` are extended attributes by their Linux names.
    """

    parts: tuple[bytes, ...]
    type: Type
    size: int
    mode: int
    uid: int | None
    gid: int | None
    modified: int | None
    target: bytes = b""
    extras: Mapping[str, bytes] = field(default_factory=dict)
    source: Source | None = None
    origin: str = ""


@dataclass(slots=True)
class Gathered:
    """All that is to be put; what cannot be is counted by the reason."""

    items: list[Item]
    left_out: dict[str, int]

    @property
    def size(self) -> int:
        """Bytes of all contents."""
        return sum(one.size for one in self.items if one.type is Type.FILE)

    def leave_out(self, why: str, count: int = 1) -> None:
        """So many things more that are not put."""
        self.left_out[why] = self.left_out.get(why, 0) + count


# --- this host's files ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _HostFile:
    """``names`` lead from ``top``, which was named, to the file: no link among them is followed, then or later."""

    top: Path
    names: tuple[bytes, ...]
    seen: os.stat_result

    @contextlib.contextmanager
    def opened(self, spool: Path) -> Iterator[int]:  # noqa: ARG002 - it is a file already
        descriptor = self._open()
        try:
            self._require_seen(descriptor)
            self._require_whole(descriptor)
            yield descriptor
            self._require_seen(descriptor)
        finally:
            os.close(descriptor)

    def pieces(self, at_once: int) -> Iterator[bytes]:
        with self.opened(self.top) as descriptor:
            for at in range(0, self.seen.st_size, at_once):
                yield os.pread(descriptor, at_once, at)

    def data_size(self) -> int:
        return min(self.seen.st_size, self.seen.st_blocks * 512)

    def _open(self) -> int:
        with explained(self._path):
            descriptor = os.open(self.top, _READ | (os.O_DIRECTORY if self.names else 0))
            for number, name in enumerate(self.names, 1):
                above = descriptor
                try:
                    flags = os.O_NOFOLLOW | (os.O_DIRECTORY if number < len(self.names) else 0)
                    descriptor = os.open(name, _READ | flags, dir_fd=above)
                except OSError as error:
                    if error.errno in _SWAPPED:
                        raise self._changed() from error
                    raise
                finally:
                    os.close(above)
        return descriptor

    def _require_seen(self, descriptor: int) -> None:
        if _stamp(os.fstat(descriptor)) != _stamp(self.seen):
            raise self._changed()

    def _require_whole(self, descriptor: int) -> None:
        """Files of /proc and /sys say another size than they have; what has none would land empty."""
        size = self.seen.st_size
        with explained(self._path):
            is_whole = not os.pread(descriptor, 1, size) and (size == 0 or len(os.pread(descriptor, 1, size - 1)) == 1)
        if not is_whole:
            raise errors.Conflict(
                f"{self._path} does not hold the {size} bytes that it says it has",
                hint="put a copy of it: cp it to a disk first",
            )

    def _changed(self) -> errors.Conflict:
        return errors.Conflict(
            f"{self._path} was changed while it was read", hint="put a copy of it, or run the command again"
        )

    @property
    def _path(self) -> Path:
        return self.top.joinpath(*map(os.fsdecode, self.names))


def of_host(paths: Sequence[Path]) -> Gathered:
    """Files, and folders with all in them, by the last part of their names. A link that is named itself is followed.

    NotFound for one that is not there; UsageError when two would have one name.
    """
    gathered = Gathered([], {})
    names: dict[bytes, Path] = {}
    for path in paths:
        name = os.fsencode(Path(os.path.abspath(path)).name)  # noqa: PTH100 - what a link is called is its own name
        if not name:
            raise errors.UsageError(f"{path} has no name", hint="name a file or folder in it")
        if name in names:
            raise errors.UsageError(f"{names[name]} and {path} would both be '{shown(name)}'")
        names[name] = path
        _HostWalk(gathered, path, name).gather()
    return gathered


class _HostWalk:
    """One SRC and all below it, by open folders: nobody who may write in one can lead the walk out of it by a link."""

    def __init__(self, gathered: Gathered, top: Path, name: bytes) -> None:
        self._gathered, self._top, self._name = gathered, top, name

    def gather(self) -> None:
        with explained(self._top):
            facts = self._top.stat()
        if _TYPES.get(stat.S_IFMT(facts.st_mode)) is not Type.FOLDER:
            self._add(facts, ())
            return
        with explained(self._top):
            folder = os.open(self._top, _READ | os.O_DIRECTORY)
        opened: list[int] = [folder]
        try:
            self._gather_below(opened)
        finally:
            for one in opened:
                os.close(one)

    def _gather_below(self, opened: list[int]) -> None:
        """``opened``: the folders on the way, each in the one before."""
        pending: list[tuple[tuple[bytes, ...], Iterator[bytes]]] = [((), self._names_in(opened[0], ()))]
        while pending:
            names, below = pending[-1]
            if (name := next(below, None)) is None:
                pending.pop()
                os.close(opened.pop())
            elif (folder := self._entry(opened[-1], (*names, name))) is not None:
                opened.append(folder)
                pending.append(((*names, name), self._names_in(folder, (*names, name))))

    def _names_in(self, folder: int, names: tuple[bytes, ...]) -> Iterator[bytes]:
        """The folder is taken; what is in it."""
        self._add(os.fstat(folder), names)
        with explained(self._path(names)):
            return iter(sorted(os.fsencode(one) for one in os.listdir(folder)))

    def _entry(self, above: int, names: tuple[bytes, ...]) -> int | None:
        """A folder is opened, anything else is taken."""
        name, path = names[-1], self._path(names)
        with explained(path):
            facts = os.stat(name, dir_fd=above, follow_symlinks=False)
            kind = _TYPES.get(stat.S_IFMT(facts.st_mode))
            try:
                if kind is Type.FOLDER:
                    return os.open(name, _READ | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=above)
                target = os.readlink(name, dir_fd=above) if kind is Type.LINK else b""
            except OSError as error:
                if error.errno not in {*_SWAPPED, errno.EINVAL}:
                    raise
                raise errors.Conflict(
                    f"{path} was changed while it was looked at", hint="run the command again"
                ) from error
        self._add(facts, names, target)
        return None

    def _add(self, facts: os.stat_result, names: tuple[bytes, ...], target: bytes = b"") -> None:
        kind = _TYPES.get(stat.S_IFMT(facts.st_mode))
        if kind is None:
            self._gathered.leave_out(SPECIAL)
            return
        source = _HostFile(self._top, names, facts) if kind is Type.FILE else None
        self._gathered.items.append(
            Item(
                (self._name, *names), kind, facts.st_size if source is not None else 0, stat.S_IMODE(facts.st_mode),
                None, None, facts.st_mtime_ns, target, source=source, origin=str(self._path(names)),
            )
        )  # fmt: skip

    def _path(self, names: tuple[bytes, ...]) -> Path:
        return self._top.joinpath(*map(os.fsdecode, names))


_TYPES = {stat.S_IFREG: Type.FILE, stat.S_IFDIR: Type.FOLDER, stat.S_IFLNK: Type.LINK}
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
_SWAPPED = (errno.ELOOP, errno.ENOTDIR)  # a link, or another thing, has the name by now


def _stamp(facts: os.stat_result) -> tuple[int, int, int, int]:
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


# --- what another moment holds ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _InsideFile:
    browser: Browser
    found: Found

    @contextlib.contextmanager
    def opened(self, spool: Path) -> Iterator[int]:
        content = self.browser.content(self.found)
        with explained(spool):
            file = tempfile.TemporaryFile(dir=spool)  # noqa: SIM115 - closed below; without a name nothing stays of it
        with file:
            with explained(spool):
                _fill(file.fileno(), content)
                if self.found.node.modified is not None:
                    os.utime(file.fileno(), ns=(self.found.node.modified, self.found.node.modified))
            yield file.fileno()

    def pieces(self, at_once: int) -> Iterator[bytes]:
        content, at = self.browser.content(self.found), 0
        for offset, piece in content.pieces():
            yield from _zeros(offset - at, at_once)
            for start in range(0, len(piece), at_once):
                yield bytes(piece[start : start + at_once])
            at = offset + len(piece)
        yield from _zeros(content.size - at, at_once)

    def data_size(self) -> int:
        return sum(end - start for start, end in self.browser.content(self.found).ranges())


def _zeros(count: int, at_once: int) -> Iterator[bytes]:
    for at in range(0, count, at_once):
        yield bytes(min(at_once, count - at))


def of_browser(wanted: Sequence[tuple[Browser, Found]], *, whole_path: bool) -> Gathered:
    """Each file, or folder with all in it, with owners, modes and attributes; by its whole path, or by its last name."""
    gathered = Gathered([], {})
    seen: set[tuple[bytes, ...]] = set()
    for browser, top in wanted:
        trail = tuple(part for part in top.path.split(b"/") if part)
        if not trail:
            raise errors.UsageError(
                "the root of a file system cannot be put back as a whole", hint="name what is in it"
            )
        skipped = 0 if whole_path else len(trail) - 1
        if trail[skipped:] in seen:
            raise errors.UsageError(f"two things would both be '{shown(trail[-1])}'")
        seen.add(trail[skipped:])
        if whole_path:
            _add_folders_above(gathered, browser, trail, seen)
        for _, one in browser.walk(top):
            _add(gathered, browser, one, tuple(part for part in one.path.split(b"/") if part)[skipped:])
    for why, count in browsing.left_out([browser for browser, _ in wanted]).items():
        gathered.leave_out(why, count)
    return gathered


def _add_folders_above(
    gathered: Gathered, browser: Browser, trail: tuple[bytes, ...], seen: set[tuple[bytes, ...]]
) -> None:
    """Where they are missing at the target, they are made as they were."""
    for depth in range(1, len(trail)):
        if trail[:depth] not in seen:
            seen.add(trail[:depth])
            _add(gathered, browser, browser.find(b"/" + b"/".join(trail[:depth])), trail[:depth])


def _add(gathered: Gathered, browser: Browser, one: Found, parts: tuple[bytes, ...]) -> None:
    node = one.node
    if node.type not in {Type.FILE, Type.FOLDER, Type.LINK}:
        gathered.leave_out(SPECIAL)
        return
    if node.streams:
        gathered.leave_out(STREAMS)
    mode = node.mode if node.mode is not None else 0o755 if node.is_folder else 0o644
    source = _InsideFile(browser, one) if node.type is Type.FILE else None
    size = node.size if source is not None else 0
    extras = dict(browser.reader.extras(node))
    gathered.items.append(
        Item(
            parts, node.type, size, mode, node.uid, node.gid, node.modified, node.target or b"", extras, source,
            shown(one.path),
        )
    )  # fmt: skip


def _fill(descriptor: int, content: Content) -> None:
    for offset, piece in content.pieces():
        view, at = memoryview(piece), offset
        while view:
            count = os.pwrite(descriptor, view, at)
            view, at = view[count:], at + count
    os.ftruncate(descriptor, content.size)
