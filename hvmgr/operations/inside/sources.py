"""What is to be put into a file system: files and folders of this host, or out of another moment of a disk.

Either way everything is walked first, so that what would be refused is known before anything is written. A content is opened
when it is needed, and has to be what was seen then: one that changes meanwhile is a Conflict.
"""

from __future__ import annotations

import contextlib
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

    def leave_out(self, why: str) -> None:
        """One thing more that is not put."""
        self.left_out[why] = self.left_out.get(why, 0) + 1


# --- this host's files ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _HostFile:
    path: Path
    seen: tuple[int, int, int, int]

    @contextlib.contextmanager
    def opened(self, spool: Path) -> Iterator[int]:  # noqa: ARG002 - it is a file already
        with explained(self.path):
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            self._require_seen(descriptor)
            yield descriptor
            self._require_seen(descriptor)
        finally:
            os.close(descriptor)

    def _require_seen(self, descriptor: int) -> None:
        if _stamp(os.fstat(descriptor)) != self.seen:
            raise errors.Conflict(
                f"{self.path} was changed while it was read", hint="put a copy of it, or run the command again"
            )


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
        _walk(gathered, path, (name,), follow=True)
    return gathered


def _walk(gathered: Gathered, top: Path, parts: tuple[bytes, ...], *, follow: bool) -> None:
    pending = [(top, parts, follow)]
    while pending:
        path, parts, follow = pending.pop()
        with explained(path):
            facts = path.stat() if follow else path.lstat()
            kind = _TYPES.get(stat.S_IFMT(facts.st_mode))
            target = os.fsencode(path.readlink()) if kind is Type.LINK else b""
            below = sorted(path.iterdir()) if kind is Type.FOLDER else []
        if kind is None:
            gathered.leave_out(SPECIAL)
            continue
        source = _HostFile(path, _stamp(facts)) if kind is Type.FILE else None
        gathered.items.append(
            Item(
                parts, kind, facts.st_size if source is not None else 0, stat.S_IMODE(facts.st_mode), None, None,
                facts.st_mtime_ns, target, source=source, origin=str(path),
            )
        )  # fmt: skip
        pending += [(one, (*parts, os.fsencode(one.name)), False) for one in reversed(below)]


_TYPES = {stat.S_IFREG: Type.FILE, stat.S_IFDIR: Type.FOLDER, stat.S_IFLNK: Type.LINK}


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


def of_browser(wanted: Sequence[tuple[Browser, Found]], *, whole_path: bool) -> Gathered:
    """Each file, or folder with all in it, with owners, modes and attributes; by its whole path, or by its last name."""
    gathered = Gathered([], browsing.left_out([browser for browser, _ in wanted]))
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
