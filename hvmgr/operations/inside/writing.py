"""Which program writes which file system, and what it is told: ext by debugfs, NTFS by libntfs-3g, FAT by mtools.

Each works on an ordinary file that shows one volume, as an ordinary user. The file is half-written when one of them fails, and
thrown away then. What a program cannot take as it is, is refused before anything is written (``Writer.require``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import stat
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from hvmgr import errors
from hvmgr.host import e2fsprogs, file_systems, mtools, ntfs, ntfs_library
from hvmgr.operations.inside.arranging import Act
from hvmgr.operations.inside.browsing import Browser, shown
from hvmgr.operations.inside.kernel_writing import KernelWriter
from hvmgr.operations.inside.sources import Report
from hvmgr.storage.filesystems.ext import Ext
from hvmgr.storage.filesystems.reader import Type
from hvmgr.storage.filesystems.signatures import Kind

_ACTS_AT_ONCE = 200
BYTES_AT_ONCE = 256 << 20  # of what another moment holds, but for a larger file
# A key goes into debugfs' script as it is: nothing that could end the line, or the word.
_KEY = re.compile(r"(user|trusted|security|system)\.[A-Za-z0-9_.@:+-]+")
_KINDS = {Type.FILE: stat.S_IFREG, Type.FOLDER: stat.S_IFDIR, Type.LINK: stat.S_IFLNK}
_SECOND = 1_000_000_000
_BEYOND = 1 << 34  # seconds that a large inode can hold, counted from 1901
_OURS = re.compile(r'[<>:"|?*\\\x00-\x1f]')  # what no name on Windows can hold
_DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
_FULL = ("Could not allocate", "No free space", "no free space", "Can't allocate", "No space left")
_FAT_MAX = (4 << 30) - 1
_FAT_TIMES = (315_532_800 * _SECOND, 4_354_819_198 * _SECOND)  # 1980 to 2107
_SHORT = re.compile(r"[^.]{1,6}~[0-9]+(\.[^.]{0,3})?")
# Of what Windows calls attributes those that say nothing of how a content is kept: read-only, hidden, system, temporary,
# offline, not indexed.
_NTFS_ATTRIBUTES = 0x3107
_NTFS_ACL, _NTFS_ATTRIB = "system.ntfs_acl", "system.ntfs_attrib"
_OTHERS = {Kind.ISO: "an ISO 9660 file system is never written"}


class Writer(Protocol):
    """One way to write."""

    @property
    def title(self) -> str:
        """What it is, in a few words."""

    @property
    def keeps_owners(self) -> bool:
        """Whether modes and owners mean anything."""

    @property
    def writes_in_place(self) -> bool:
        """Whether a replaced file changes under its other names, too."""

    def times(self, browser: Browser) -> tuple[int, int]:
        """The first and the last moment that the file system can keep, in nanoseconds."""

    def kept(self, extras: Mapping[str, bytes]) -> dict[str, bytes]:
        """What has to read back of these attributes as it was ordered, and nothing besides where all is made anew."""

    def require(self, acts: Sequence[Act], browser: Browser) -> None:
        """Unsupported for what cannot be written, or where a program is missing."""

    def write(self, volume: Path, acts: Sequence[Act], spool: Path, report: Report) -> None:
        """All acts are done on the volume, and it is sound; NoSpace, Corrupt. ``report`` hears of bytes that are written."""


def find(kind: Kind | None, title: str) -> Writer:
    """The writer for a kind of file system; Unsupported, with what can be done, where there is none."""
    if kind in {Kind.EXT2, Kind.EXT3, Kind.EXT4}:
        return _Ext()
    if kind is Kind.NTFS:
        return _Ntfs()
    if kind is Kind.FAT:
        return _Fat()
    if kind is Kind.XFS:
        return KernelWriter("xfs", keeps_owners=True, options="rw,nouuid")
    if kind is Kind.BTRFS:
        return KernelWriter("btrfs", keeps_owners=True)
    if kind is Kind.EXFAT:
        return KernelWriter("exfat", keeps_owners=False, first=_FAT_TIMES[0], last=_FAT_TIMES[1])
    why = "nothing that is known lies there" if kind is None else _OTHERS.get(kind, f"{kind} cannot be written")
    raise errors.Unsupported(
        f"files cannot be put into {title}: {why}",
        hint="ext2-4, XFS, Btrfs, NTFS, FAT and exFAT can be written while the VM is off",
    )


def within(acts: Sequence[Act], first: int, last: int) -> list[Act]:
    """The acts, with moments that a file system cannot keep moved to the nearest one that it can."""
    return [
        one if one.modified is None else dataclasses.replace(one, modified=min(max(one.modified, first), last))
        for one in acts
    ]


@contextlib.contextmanager
def _opened(acts: Sequence[Act], spool: Path) -> Iterator[list[str]]:
    """The contents as paths that a program of this user can open, whatever their names are; empty for what has none."""
    with contextlib.ExitStack() as stack:
        paths = []
        for one in acts:
            source = one.item.source
            descriptor = None if source is None else stack.enter_context(source.opened(spool))
            paths.append("" if descriptor is None else _path_of(descriptor))
        yield paths


def _path_of(descriptor: int) -> str:
    return f"/proc/{os.getpid()}/fd/{descriptor}"


def _batches(acts: Sequence[Act]) -> Iterator[Sequence[Act]]:
    first, size = 0, 0
    for number, one in enumerate(acts):
        if number > first and (number - first >= _ACTS_AT_ONCE or size + one.item.size > BYTES_AT_ONCE):
            yield acts[first:number]
            first, size = number, 0
        size += one.item.size
    if first < len(acts):
        yield acts[first:]


def _in_batches(
    acts: Sequence[Act], spool: Path, report: Report, do: Callable[[Sequence[Act], list[str]], None]
) -> None:
    for batch in _batches(acts):
        with _opened(batch, spool) as paths:
            do(batch, paths)
        report(sum(one.item.size for one in batch))


def _folders(acts: Sequence[Act]) -> list[Act]:
    """Those whose times are set when nothing is put into them any more."""
    return [one for one in acts if one.item.type is Type.FOLDER and one.modified is not None]


# --- ext2, ext3, ext4 -------------------------------------------------------------------------------------------------


class _Ext:
    title = "debugfs (e2fsprogs)"
    keeps_owners = True
    writes_in_place = False
    _has_fractions = _has_quota = True

    def times(self, browser: Browser) -> tuple[int, int]:
        is_large = browser.root().node.born is not None
        return 0, (_BEYOND - (1 << 31) if is_large else 1 << 31) * _SECOND - _SECOND

    def kept(self, extras: Mapping[str, bytes]) -> dict[str, bytes]:
        return dict(extras)

    def require(self, acts: Sequence[Act], browser: Browser) -> None:
        e2fsprogs.require()
        self._has_fractions = browser.root().node.born is not None  # inodes of 256 bytes
        assert isinstance(browser.reader, Ext)
        self._has_quota = browser.reader.has_quota
        for one in acts:
            for text in (one.path, one.item.target):
                e2fsprogs.quoted(shown(text))
            for key in one.extras:
                if not _KEY.fullmatch(key):
                    raise errors.Unsupported(
                        f"{shown(one.path)} has the extended attribute {key!r}, which debugfs cannot write"
                    )

    def write(self, volume: Path, acts: Sequence[Act], spool: Path, report: Report) -> None:
        e2fsprogs.settle(volume)
        _in_batches(acts, spool, report, lambda batch, paths: self._batch(volume, batch, paths))
        if folders := _folders(acts):
            words = [(e2fsprogs.quoted(shown(one.path)), one.modified) for one in folders]
            e2fsprogs.change(volume, [line for word, moment in words for line in self._time(word, "mtime", moment)])
        if self._has_quota:  # debugfs does not count whose the space is that it takes
            e2fsprogs.settle(volume, whole=True)
        e2fsprogs.check(volume)

    def _batch(self, volume: Path, batch: Sequence[Act], paths: Sequence[str]) -> None:
        with contextlib.ExitStack() as stack:
            commands = [
                line for one, path in zip(batch, paths, strict=True) for line in self._commands(one, path, stack)
            ]
            try:
                e2fsprogs.change(volume, commands)
            except errors.HostFailed as error:
                if any(words in error.message for words in _FULL):
                    raise file_systems.full("the file system") from error
                raise

    def _commands(self, act: Act, source: str, stack: contextlib.ExitStack) -> Iterator[str]:
        path = shown(act.path)
        folder, _, name = path.rpartition("/")
        word, above = e2fsprogs.quoted(path), e2fsprogs.quoted(folder or "/")
        if act.replaced is not None:
            yield f"rm {word}"
        if act.item.type is Type.FOLDER:
            yield f"mkdir {word}"
        elif act.item.type is Type.LINK:
            yield f"symlink {word} {e2fsprogs.quoted(shown(act.item.target))}"
        else:
            yield f"cd {above}"
            yield f"write {e2fsprogs.quoted(source)} {e2fsprogs.quoted(name)}"
        mode = 0o777 if act.item.type is Type.LINK else act.mode
        yield f"set_inode_field {word} mode 0{_KINDS[act.item.type] | mode:o}"
        yield f"set_inode_field {word} uid {act.uid}"
        yield f"set_inode_field {word} gid {act.gid}"
        yield from self._time(word, "mtime", act.modified)
        for key, value in act.extras.items():
            descriptor = os.memfd_create("value")
            stack.callback(os.close, descriptor)
            os.write(descriptor, value)
            yield f"ea_set -f {e2fsprogs.quoted(_path_of(descriptor))} {word} {key}"
        for field in ("mtime", "ctime"):
            yield from self._time(above, field, time.time_ns())

    def _time(self, word: str, field: str, moment: int | None) -> Iterator[str]:
        seconds, rest = divmod(time.time_ns() if moment is None else moment, _SECOND)
        if self._has_fractions and seconds < _BEYOND - (1 << 31):
            yield f"set_inode_field {word} {field} @{seconds}"
            yield f"set_inode_field {word} {field}_extra {rest << 2 | (seconds + (1 << 31)) >> 32}"
        else:
            yield f"set_inode_field {word} {field} @{min(seconds, (1 << 31) - 1)}"


# --- NTFS, FAT --------------------------------------------------------------------------------------------------------


def _require_windows_name(act: Act) -> None:
    for part in act.parts:
        try:
            name = part.decode()
        except UnicodeDecodeError:
            raise errors.Unsupported(
                f"{shown(act.path)} is not UTF-8, and this file system has Unicode names"
            ) from None
        if _OURS.search(name) or name.endswith((" ", ".")) or _DEVICES.fullmatch(name):
            raise errors.Unsupported(f"Windows could not open '{name}'", hint="give it another name")
    if act.item.type is Type.LINK:
        raise errors.Unsupported(
            f"{act.item.origin} is a link, and none can be made on this file system", hint="put a file"
        )
    if act.replaced is not None and act.replaced.node.type is Type.LINK:
        raise errors.Unsupported(
            f"{shown(act.path)} is a link, and is not replaced here", hint="put it under another name"
        )


class _Ntfs:
    title = "libntfs-3g"
    keeps_owners = False
    writes_in_place = True

    def times(self, browser: Browser) -> tuple[int, int]:  # noqa: ARG002 - as its promise
        return -11_644_473_600 * _SECOND, (1 << 63) - 1

    def kept(self, extras: Mapping[str, bytes]) -> dict[str, bytes]:
        found = {name: value for name, value in extras.items() if name == _NTFS_ACL}
        if _NTFS_ATTRIB in extras:
            number = int.from_bytes(extras[_NTFS_ATTRIB], "little") & _NTFS_ATTRIBUTES
            found[_NTFS_ATTRIB] = number.to_bytes(4, "little")
        return found

    def require(self, acts: Sequence[Act], browser: Browser) -> None:  # noqa: ARG002 - as its promise
        ntfs_library.require()
        for one in acts:
            _require_windows_name(one)

    def write(self, volume: Path, acts: Sequence[Act], spool: Path, report: Report) -> None:
        def do(batch: Sequence[Act], paths: list[str]) -> None:
            pairs = zip(batch, paths, strict=True)
            ntfs_library.write(volume, [_order(one, path, is_new=one.replaced is None) for one, path in pairs])

        _in_batches(acts, spool, report, do)
        if folders := _folders(acts):
            ntfs_library.write(volume, [_order(one, "", is_new=False) for one in folders])
        ntfs.check(volume)


def _order(act: Act, source: str, *, is_new: bool) -> ntfs_library.Order:
    path = tuple(part.decode() for part in act.parts)
    extras = act.extras if act.anew else {}
    acl, attributes = (extras[name].hex() if name in extras else None for name in (_NTFS_ACL, _NTFS_ATTRIB))
    return ntfs_library.Order(path, source or None, act.modified, is_new, acl, attributes)


class _Fat:
    title = "mtools"
    keeps_owners = False
    writes_in_place = False

    def times(self, browser: Browser) -> tuple[int, int]:  # noqa: ARG002 - as its promise
        return _FAT_TIMES

    def kept(self, extras: Mapping[str, bytes]) -> dict[str, bytes]:  # noqa: ARG002 - as its promise
        return {}

    def require(self, acts: Sequence[Act], browser: Browser) -> None:  # noqa: ARG002 - as its promise
        mtools.require()
        crowded = Counter(one.parts[:-1] for one in acts)
        for one in acts:
            if one.replaced is None and crowded[one.parts[:-1]] > 1 and _SHORT.fullmatch(shown(one.parts[-1])):
                raise errors.Unsupported(
                    f"{shown(one.path)} may become the short name (8.3) of what is put beside it", hint="put it alone"
                )
            _require_windows_name(one)
            mtools.require_possible(shown(one.path))
            if one.item.size > _FAT_MAX:
                raise errors.Unsupported(f"{one.item.origin} is larger than a file on FAT can be (4 GiB)")

    def write(self, volume: Path, acts: Sequence[Act], spool: Path, report: Report) -> None:
        def do(batch: Sequence[Act], paths: list[str]) -> None:
            for one, path in zip(batch, paths, strict=True):
                if one.item.type is Type.FOLDER:
                    mtools.make_folder(volume, shown(one.path))
                else:
                    self._put(volume, one, path, spool)

        _in_batches(acts, spool, report, do)
        mtools.check(volume)

    def _put(self, volume: Path, act: Act, path: str, spool: Path) -> None:
        with contextlib.ExitStack() as stack:
            if act.modified is not None and act.modified != act.item.modified:  # mcopy takes the time of what it reads
                copy = stack.enter_context(tempfile.NamedTemporaryFile(dir=spool, prefix="put-"))
                shutil.copyfile(path, copy.name)
                os.utime(copy.name, ns=(act.modified, act.modified))
                path = copy.name
            mtools.write(volume, shown(act.path), path, replaces=act.replaced is not None)
