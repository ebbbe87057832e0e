"""Files and whole folders out of a file system: into a folder of the host, into a tar archive, or as plain bytes.

``gather`` walks first, so that everything is known that would be refused, and how much there is to do; then ``into_folder``
or ``into_archive`` writes. What could not be taken along is counted by its reason and told; it stops nothing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hvmgr import errors, units
from hvmgr.model.progress import Progress
from hvmgr.operations.inside import browsing
from hvmgr.operations.inside.browsing import DAMAGED, Browser, Found, shown
from hvmgr.storage import extraction, tar
from hvmgr.storage.extraction import Target
from hvmgr.storage.filesystems.reader import Content, Type

Report = Callable[[Progress], None]

_NAMES = {Type.BLOCK: tarfile.BLKTYPE, Type.CHARACTER: tarfile.CHRTYPE, Type.PIPE: tarfile.FIFOTYPE}
_SPACE_LEFT = 16 << 20  # what a copy leaves free at least; a small one as much as it takes itself
_BLOCK = 4096  # what the smallest file and a folder take


@dataclass(frozen=True, slots=True)
class _Item:
    """One thing to take along, and where it goes below the target."""

    browser: Browser
    found: Found
    parts: tuple[bytes, ...]
    named: bool = False  # on its own, not as one of many in a folder


@dataclass(slots=True)
class Gathered:
    """All that is to be taken along. ``size``: bytes of all contents, holes included."""

    items: list[_Item]
    size: int
    left_out: dict[str, int]
    damaged: list[bytes] = field(default_factory=list)

    @property
    def files(self) -> int:
        """How many names."""
        return len(self.items)


@dataclass(slots=True)
class Outcome:
    """What was taken along, and what was not: how many, by the reason, and the paths of what is ``damaged``."""

    files: int = 0
    size: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    damaged: list[bytes] = field(default_factory=list)

    def leave_out(self, why: str, count: int = 1) -> None:
        """So many things more that were not taken along."""
        self.left_out[why] = self.left_out.get(why, 0) + count

    def note(self, one: Found, error: errors.HvmgrError) -> None:
        """It was left out because of the error, and is named if it is damaged."""
        if isinstance(error, errors.Corrupt):
            self.damaged.append(one.whole_path)


def gather(wanted: Sequence[tuple[Browser, Found]]) -> Gathered:
    """Each file, or folder with all in it; UsageError when two of them would have one name."""
    items: list[_Item] = []
    names: dict[bytes, bytes] = {}
    size = 0
    for browser, top in wanted:
        name = top.name
        if name in names:
            raise errors.UsageError(f"{shown(names[name])} and {shown(top.path)} would both be '{shown(name)}'")
        names[name] = top.path
        base = len([part for part in top.path.split(b"/") if part]) - (1 if name else 0)
        for _, one in browser.walk(top) if not top.stream else [(0, top)]:
            parts = tuple(part for part in one.path.split(b"/") if part)[base:]
            parts = (*parts[:-1], one.name) if parts else ()
            items.append(_Item(browser, one, parts, named=one is top))
            size += one.size if one.node.type is Type.FILE or one.stream else 0
    browsers = list(dict.fromkeys(browser for browser, _ in wanted))
    return Gathered(items, size, browsing.left_out(browsers), [path for one in browsers for path in one.damaged])


def into_folder(gathered: Gathered, folder: Path, report: Report, *, streams: bool, overwrite: bool) -> Outcome:
    """All of it is below the folder, with times, modes, attributes, hard links, and owners where root asks.

    ``streams``: named streams become files ``NAME:STREAM`` beside theirs. NoSpace before anything is written.
    """
    outcome = Outcome(damaged=list(gathered.damaged))
    counting = _Counting(report, gathered.size, f"get {gathered.files} files")
    with extraction.opened(folder, overwrite=overwrite) as target:
        _require_space(gathered, folder)
        folders: list[_Item] = []
        for item in gathered.items:
            if not item.parts:
                continue  # the root itself: what is in it goes into the folder
            if item.found.node.is_folder and not item.found.stream:
                made = target.folder(item.parts)
                folders += [item] if made else []
            else:
                made = _put(target, item, counting, outcome)
            if not made:
                continue
            outcome.files += 1
            if streams and item.found.node.streams and not item.found.stream:
                _put_streams(target, item, counting, outcome)
            elif item.found.node.streams and not item.found.stream:
                target.leave_out("named streams (--streams writes them beside their files)")
        for item in reversed(folders):  # their times, when nothing is put into them any more
            target.settle(item.parts, item.found.node, _extras(item, target.leave_out))
        outcome.left_out = target.left_out
        for why, count in gathered.left_out.items():
            outcome.leave_out(why, count)
    outcome.size = counting.done
    return outcome


def _put(target: Target, item: _Item, counting: _Counting, outcome: Outcome) -> bool:
    """One thing that is no folder; whether it is there now."""
    browser, found, node = item.browser, item.found, item.found.node
    if node.type is not Type.FILE and not found.stream:
        made = target.special(item.parts, node)
    elif node.links > 1 and not found.stream and target.hard_link(item.parts, (id(browser), node.id)):
        counting.add(node.size)
        return True
    else:
        try:
            content = browser.content(found)
            key = (id(browser), node.id) if node.links > 1 and not found.stream else None
            with counting.of(content):
                descriptor = target.file(item.parts, content, counting.add, key)
        except (errors.Unsupported, errors.Corrupt) as error:
            if item.named and isinstance(error, errors.Corrupt):
                raise
            target.leave_out(_why(error))
            outcome.note(found, error)
            return False
        if descriptor is None:
            return False
        try:
            target.settle(item.parts, node, _extras(item, target.leave_out), descriptor)
        finally:
            os.close(descriptor)
        return True
    if made:
        target.settle(item.parts, node, _extras(item, target.leave_out))
    return made


def _why(error: errors.HvmgrError) -> str:
    """Why one thing was left out, without its name: the reasons are counted."""
    if isinstance(error, errors.Corrupt):
        return DAMAGED
    cause = error.__cause__  # the browser puts the path in front
    return cause.message if isinstance(cause, errors.HvmgrError) else error.message


def _put_streams(target: Target, item: _Item, counting: _Counting, outcome: Outcome) -> None:
    for name, _ in item.found.node.streams:
        one = Found(item.found.path, item.found.node, name)
        parts = (*item.parts[:-1], one.name)
        try:
            descriptor = target.file(parts, item.browser.content(one), lambda _: None)
        except (errors.Unsupported, errors.Corrupt) as error:
            target.leave_out(_why(error))
            outcome.note(one, error)
            continue
        if descriptor is not None:
            os.close(descriptor)
            counting.add(0)


def into_archive(gathered: Gathered, sink: Callable[[memoryview], None], report: Report) -> Outcome:
    """A tar archive (pax) of all of it: owners, modes, times, links, holes, devices, attributes, ACLs, named streams.

    A named stream is a member ``NAME:STREAM`` behind its file; a security descriptor the attribute ``system.ntfs_acl``.
    """
    outcome = Outcome(left_out=dict(gathered.left_out), damaged=list(gathered.damaged))
    writer = tar.Writer(sink)
    counting = _Counting(report, gathered.size, f"get {gathered.files} files")
    written: dict[tuple[int, int], str] = {}
    for item in gathered.items:
        if not item.parts:
            continue
        try:
            _archive(writer, item, counting, written, outcome)
        except (errors.Unsupported, errors.Corrupt) as error:
            if item.named and isinstance(error, errors.Corrupt):
                raise
            outcome.leave_out(_why(error))
            outcome.note(item.found, error)
            continue
        outcome.files += 1
        if not item.found.stream:
            _archive_streams(writer, item, outcome)
    writer.end()
    outcome.size = counting.done
    return outcome


def _archive(
    writer: tar.Writer, item: _Item, counting: _Counting, written: dict[tuple[int, int], str], outcome: Outcome
) -> None:
    """One member; Unsupported or Corrupt only where nothing of it was written."""
    browser, found, node = item.browser, item.found, item.found.node
    info = _described(item, outcome)
    key = (id(browser), node.id)
    if node.type is Type.FILE or found.stream:
        if node.links > 1 and key in written and not found.stream:
            info.type, info.linkname = tarfile.LNKTYPE, written[key]
            counting.add(node.size)
            writer.header(info)
            return
        _archive_content(writer, info, browser.content(found), counting)
        if node.links > 1 and not found.stream:
            written[key] = shown(b"/".join(item.parts))
    elif node.type is Type.FOLDER:
        info.type = tarfile.DIRTYPE
        writer.header(info)
    elif node.type is Type.LINK:
        if not node.target or b"\0" in node.target:
            raise errors.Unsupported(extraction.UNLINKABLE)
        info.type, info.linkname = tarfile.SYMTYPE, shown(node.target)
        writer.header(info)
    elif node.type in _NAMES:
        info.type = _NAMES[node.type]
        info.devmajor, info.devminor = node.device or (0, 0)
        writer.header(info)
    else:
        raise errors.Unsupported(f"a tar archive has no {node.type.value}")


def _archive_streams(writer: tar.Writer, item: _Item, outcome: Outcome) -> None:
    for name, _ in item.found.node.streams:
        one = Found(item.found.path, item.found.node, name)
        try:
            beside = _described(_Item(item.browser, one, (*item.parts[:-1], one.name)), outcome)
            _archive_content(writer, beside, item.browser.content(one), _Counting(lambda _: None, 0, ""))
        except (errors.Unsupported, errors.Corrupt) as error:
            outcome.leave_out(_why(error))
            outcome.note(one, error)


def _archive_content(writer: tar.Writer, info: tarfile.TarInfo, content: Content, counting: _Counting) -> None:
    with counting.of(content):
        writer.content(info, content.size, content.ranges(), _counted(content, counting))


def _counted(content: Content, counting: _Counting) -> Iterator[tuple[int, bytes | memoryview]]:
    for offset, piece in content.pieces():
        yield offset, piece
        counting.add(len(piece))


def _described(item: _Item, outcome: Outcome) -> tarfile.TarInfo:
    """The member's header; Unsupported for a name that would lead out of the folder that it is unpacked in."""
    node = item.found.node
    if not all(extraction.stays(part) for part in item.parts):
        raise errors.Unsupported(extraction.UNNAMEABLE)
    info = tarfile.TarInfo(shown(b"/".join(item.parts)))
    info.mode = node.mode if node.mode is not None else 0o755 if node.is_folder else 0o644
    info.uid, info.gid = node.uid or 0, node.gid or 0
    headers = {}
    if node.modified is not None:
        info.mtime = node.modified // 1_000_000_000
        headers["mtime"] = _seconds(node.modified)
    if node.accessed is not None:
        headers["atime"] = _seconds(node.accessed)
    if not item.found.stream:
        for name, value in _extras(item, outcome.leave_out).items():
            if not _is_keyword(name):
                outcome.leave_out("extended attributes whose names a tar archive cannot hold")
                continue
            # Python writes these records as UTF-8 with surrogates as the bytes that they stand for.
            headers[f"SCHILY.xattr.{name}"] = value.decode("utf-8", "surrogateescape")
    info.pax_headers = headers
    return info


def _extras(item: _Item, leave_out: Callable[[str], None]) -> Mapping[str, bytes]:
    """The extended attributes; none, which is told, where they are damaged: the file itself need not be."""
    try:
        return item.browser.reader.extras(item.found.node)
    except (errors.Unsupported, errors.Corrupt):
        leave_out("extended attributes that are damaged")
        return {}


def _is_keyword(name: str) -> bool:
    """Whether a record of a pax header can have the name."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return bool(name) and not any(bad in name for bad in "=\n\0")


def _seconds(nanoseconds: int) -> str:
    whole, rest = divmod(abs(nanoseconds), 1_000_000_000)
    return f"{'-' if nanoseconds < 0 else ''}{whole}.{rest:09}"


def _require_space(gathered: Gathered, folder: Path) -> None:
    # Of sparse files only the data is written, so what they take inside is the better measure.
    needed = 0
    for one in gathered.items:
        node = one.found.node
        if node.type is Type.FILE:
            needed += -(-min(node.size, node.used or node.size) // _BLOCK) * _BLOCK
        elif node.is_folder:
            needed += _BLOCK
    free = shutil.disk_usage(folder).free
    left = min(_SPACE_LEFT, needed)
    if needed + left > free:
        stays = f", of which {units.format_size(left)} have to stay" if needed <= free else ""
        raise errors.NoSpace(
            f"{units.format_size(needed)} are to be written, and {folder} has {units.format_size(free)} free{stays}",
            hint="free space there, or name another folder with --to",
        )


class _Counting:
    """How far the work is; said now and then."""

    def __init__(self, report: Report, total: int, what: str) -> None:
        self._report, self._total, self._what = report, total, what
        self._expected = 0
        self.done = 0

    def add(self, count: int) -> None:
        """So many bytes more."""
        self.done += count
        self._report(Progress(min(self.done, self._total), self._total, self._what))

    @contextlib.contextmanager
    def of(self, content: Content) -> Iterator[None]:
        """A whole content, of which holes are not written."""
        before = self.done
        yield
        self.add(max(0, before + content.size - self.done))
