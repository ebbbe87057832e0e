"""A Linux root file system, from a folder or a tar archive, as an ext4 volume in a file. No root.

mke2fs takes a folder as it is: owners, modes, times, links, extended attributes. What an ordinary user cannot unpack from an
archive (owners, modes, device nodes, capabilities) is written into the finished volume afterwards.
"""

from __future__ import annotations

import contextlib
import itertools
import lzma
import math
import os
import re
import stat
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from tarfile import EOFHeaderError, HeaderError, ReadError  # type: ignore[attr-defined]  # typeshed lacks the first
from typing import Protocol, Self

from hvmgr import errors, units
from hvmgr.host import e2fsprogs, formatting
from hvmgr.model.disk_layout import Volume
from hvmgr.model.progress import Progress
from hvmgr.operations.images.disks import Report
from hvmgr.storage import durable

_LINKS_MAX = 40
_XATTR = "SCHILY.xattr."
# A key goes into debugfs' script as it is: nothing that could end the line, or the word.
_KEY = re.compile(r"(user|trusted|security|system)\.[A-Za-z0-9_.@:+-]+")
_KIND = {
    tarfile.DIRTYPE: stat.S_IFDIR, tarfile.SYMTYPE: stat.S_IFLNK, tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK, tarfile.FIFOTYPE: stat.S_IFIFO,
}  # fmt: skip
_TIMES = (-(1 << 31), (1 << 34) - (1 << 31))  # what an inode can hold
_OWNERS = 1 << 32
# What reading a damaged archive ends with; besides these, an OSError without a number.
_DAMAGE = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, ValueError, OverflowError, RecursionError)
_NODES = {tarfile.CHRTYPE: "c", tarfile.BLKTYPE: "b", tarfile.FIFOTYPE: "p"}


class Tree(Protocol):
    """What a volume can be filled with."""

    def fill(self, file: Path, volume: Volume, report: Report) -> None:
        """The file, as long as the volume, holds ext4 with the tree in it."""


def opened(source: Path) -> Tree:
    """A folder or a tar archive; NotFound, or Corrupt when it is neither."""
    if not source.exists():
        raise errors.NotFound(f"there is no {source}", path=str(source))
    if source.is_dir():
        return _Folder(source)
    try:
        with tarfile.open(source) as archive:
            archive.next()
    except (*_DAMAGE, OSError) as error:
        raise errors.Corrupt(f"{source} is no tar archive, as it is or compressed", path=str(source)) from error
    return _Archive(source)


class _Folder:
    def __init__(self, source: Path) -> None:
        self._source = source

    def fill(self, file: Path, volume: Volume, report: Report) -> None:
        report(Progress(0, 0, f"copy {self._source.name}"))
        _make(file, volume, self._source, self._source)
        report(Progress(1, 1, f"copy {self._source.name}"))


class _Archive:
    def __init__(self, source: Path) -> None:
        self._source = source

    def fill(self, file: Path, volume: Volume, report: Report) -> None:
        tree = file.with_name("tree")
        tree.mkdir(mode=0o700)
        with durable.explained(self._source), _understood(self._source):
            members = self._unpack(tree, report)
        _make(file, volume, tree, self._source)
        values = file.with_name("values")
        values.mkdir(mode=0o700)
        e2fsprogs.change(file, [*_implied(tree, set(members)), *_corrections(members, values)])
        try:
            e2fsprogs.check(file)
        except errors.Corrupt as error:
            raise errors.Corrupt(
                f"{self._source} makes no sound file system: {error}", path=str(self._source)
            ) from error
        durable.remove_folder(tree)
        durable.remove_folder(values)

    def _unpack(self, tree: Path, report: Report) -> dict[str, tarfile.TarInfo]:
        """The bytes of all members are below ``tree``, and never outside of it; what each path of the volume is in the end."""
        length, what = self._source.stat().st_size, f"unpack {self._source.name}"
        found: dict[str, tarfile.TarInfo] = {}
        with self._source.open("rb") as raw, tarfile.open(fileobj=raw, tarinfo=_Member) as archive:
            for member in archive:
                report(Progress(min(raw.tell(), length), length, what))
                _require_sound(member)
                target = _inside(tree, member.name)
                if target == tree:
                    if not member.isdir():
                        raise errors.Corrupt(f"{self._source} is damaged: its root is no folder")
                    found["/"] = member
                    continue
                _put(archive, member, tree, target, self._source)
                origin = _inside(tree, member.linkname) if member.islnk() else None
                found[_named(target, tree)] = member if origin is None else found[_named(origin, tree)]
            _require_end(archive, self._source)
        report(Progress(length, length, what))
        return found


class _Member(tarfile.TarInfo):
    """A member of an archive that has to be whole: tarfile takes a damaged or missing one for the archive's end."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile)
        except HeaderError as error:
            if isinstance(error, EOFHeaderError):
                raise
            raise ReadError(f"it breaks off or is damaged at byte {tarfile.offset} ({error})") from error


def _require_end(archive: tarfile.TarFile, source: Path) -> None:
    """A compressed archive has its checksum at the end, behind what tarfile reads."""
    assert archive.fileobj is not None
    while piece := archive.fileobj.read(units.MIB):
        if piece.strip(b"\0"):
            raise errors.Corrupt(
                f"{source} goes on behind its end: it is damaged, or more than one archive",
                hint="unpack it, and apply the folder",
                path=str(source),
            )


@contextlib.contextmanager
def _understood(source: Path) -> Iterator[None]:
    """Whatever a damaged archive makes Python's readers say is Corrupt."""
    try:
        yield
    except _DAMAGE as error:
        raise errors.Corrupt(f"{source} is damaged: {error}", path=str(source)) from error
    except OSError as error:
        if error.errno is not None:  # gzip's and bzip2's own have no number
            raise
        raise errors.Corrupt(f"{source} is damaged: {error}", path=str(source)) from error


def _require_sound(member: tarfile.TarInfo) -> None:
    """What is said of a member can be written."""
    _attributes(member)
    least, beyond = _TIMES
    if not math.isfinite(member.mtime) or not least <= member.mtime < beyond:
        raise errors.Corrupt(f"the archive is damaged: {member.name!r} has the time {member.mtime}")
    if not (0 <= member.uid < _OWNERS and 0 <= member.gid < _OWNERS):
        raise errors.Corrupt(f"the archive is damaged: {member.name!r} is owned by {member.uid}:{member.gid}")


def _named(target: Path, tree: Path) -> str:
    """The path in the volume."""
    return f"/{target.relative_to(tree)}"


def _put(archive: tarfile.TarFile, member: tarfile.TarInfo, tree: Path, target: Path, source: Path) -> None:
    with durable.explained(target):
        _make_parents(member, target)
        if member.isdir():
            if target.is_symlink() or not target.is_dir():
                durable.remove(target)  # a link is not followed: it may lead out of the tree
            target.mkdir(exist_ok=True, mode=0o700)
            return
        if target.is_dir() and not target.is_symlink():
            raise errors.Corrupt(f"the archive has '{member.name}' as a folder and as something else")
        durable.remove(target)  # a later member takes the place of an earlier one
        if member.issym():
            target.symlink_to(member.linkname)
        elif member.islnk():
            other = _inside(tree, member.linkname)
            if not other.is_file() or other.is_symlink():
                raise errors.Corrupt(f"'{member.name}' is a link to '{member.linkname}', which is not in the archive")
            os.link(other, target)
        elif member.isfile():
            with _understood(source), target.open("wb") as file:
                content = archive.extractfile(member)
                assert content is not None
                while piece := content.read(units.MIB):
                    file.write(piece)
            os.utime(target, (member.mtime, member.mtime))
        elif member.type not in _NODES:
            raise errors.Unsupported(f"'{member.name}' is of a kind that is not known here ({member.type!r})")


def _make_parents(member: tarfile.TarInfo, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (FileExistsError, NotADirectoryError):
        raise errors.Corrupt(f"the archive has '{member.name}' in what is no folder") from None


def _inside(tree: Path, name: str) -> Path:
    """Where a name leads with ``tree`` as the root: links on the way are followed inside, the last one is not."""
    words = [one for one in name.split("/") if one not in {"", "."}]
    if any("\n" in one or "\r" in one for one in words):
        raise errors.Unsupported(f"{name!r} has a line break in its name, which debugfs cannot take")
    at, followed = tree, 0
    while words:
        word = words.pop(0)
        if word == "..":
            at = at.parent if at != tree else tree
            continue
        step = at / word
        if words and step.is_symlink():
            followed += 1
            if followed > _LINKS_MAX:
                raise errors.Corrupt(f"the links on the way to '{name}' run in a circle")
            target = str(step.readlink())
            words = [*(one for one in target.split("/") if one not in {"", "."}), *words]
            at = tree if target.startswith("/") else at
            continue
        at = step
    return at


def _make(file: Path, volume: Volume, tree: Path, source: Path) -> None:
    try:
        formatting.make(file, volume, root=tree)
    except errors.HostFailed as error:
        words = str(error.facts.get("words", error))
        if any(one in words for one in ("Could not allocate", "No free space", "no free space", "No space left")):
            raise errors.NoSpace(
                f"{source} does not fit into {units.format_size(volume.size)}", hint="use a larger disk"
            ) from error
        raise


def _implied(tree: Path, known: set[str]) -> Iterator[str]:
    """Folders that the archive has no member for belong to root."""
    for one in (tree, *(one for one in tree.rglob("*") if one.is_dir() and not one.is_symlink())):
        path = "/" if one == tree else f"/{one.relative_to(tree)}"
        if path not in known:
            for field in (f"mode 0{stat.S_IFDIR | 0o755:o}", "uid 0", "gid 0"):
                yield f"set_inode_field {e2fsprogs.quoted(path)} {field}"


def _corrections(members: dict[str, tarfile.TarInfo], values: Path) -> Iterator[str]:
    """What debugfs has to write so that the volume says of each member what the archive does."""
    numbers = itertools.count()
    for path, member in members.items():
        word = e2fsprogs.quoted(path)
        if member.type in _NODES:
            folder, _, name = path.rpartition("/")
            yield f"cd {e2fsprogs.quoted(folder or '/')}"
            device = "" if member.isfifo() else f" {member.devmajor} {member.devminor}"
            yield f"mknod {e2fsprogs.quoted(name)} {_NODES[member.type]}{device}"
        kind = _KIND.get(member.type, stat.S_IFREG)
        mode = 0o777 if member.issym() else member.mode & 0o7777
        yield f"set_inode_field {word} mode 0{kind | mode:o}"
        yield f"set_inode_field {word} uid {member.uid}"
        yield f"set_inode_field {word} gid {member.gid}"
        yield f"set_inode_field {word} mtime @{int(member.mtime)}"
        for key, value in _attributes(member).items():
            file = values / str(next(numbers))
            file.write_bytes(value.encode("utf-8", "surrogateescape"))
            yield f"ea_set -f {e2fsprogs.quoted(str(file))} {word} {key}"


def _attributes(member: tarfile.TarInfo) -> dict[str, str]:
    """The extended attributes of a member; Unsupported for a name that debugfs cannot take."""
    found = {key.removeprefix(_XATTR): value for key, value in member.pax_headers.items() if key.startswith(_XATTR)}
    for key in found:
        if not _KEY.fullmatch(key):
            raise errors.Unsupported(
                f"{member.name!r} has the extended attribute {key!r}, which cannot be written here"
            )
    return {} if member.issym() else found
