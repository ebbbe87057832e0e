"""Files of a strange file system written below a folder of this host: nothing ever lands outside of it.

Every step is taken from an open folder (``openat``) and never through a link, every name is one that cannot lead away, and
what is there already is never followed or replaced, except by ``overwrite``, which removes the name first, but never that of a
device, socket or pipe. Device nodes are not made. A file that was not completed does not stay.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hvmgr import errors
from hvmgr.storage import durable
from hvmgr.storage.filesystems.reader import Content, Node, Type
from hvmgr.write_behind import WriteBehind

_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_UNMADE = {
    Type.BLOCK: "device nodes",
    Type.CHARACTER: "device nodes",
    Type.SOCKET: "sockets",
    Type.OTHER: "special files",
}
UNNAMEABLE = "names that cannot be names here"
UNLINKABLE = "links whose target is none here"
_NAME_MAX = 255
_SIZE_MAX = (1 << 63) - 1
_KINDS = {Type.FOLDER: stat.S_IFDIR, Type.PIPE: stat.S_IFIFO, Type.LINK: stat.S_IFLNK}
_UNOPENED = {Type.PIPE, Type.LINK}  # a pipe would wait for whoever writes, a link leads elsewhere
_KEPT = {
    stat.S_IFBLK: "block device",
    stat.S_IFCHR: "character device",
    stat.S_IFIFO: "named pipe",
    stat.S_IFSOCK: "socket",
}
_NOBODY = (1 << 32) - 1  # to chown this means: as it is
_ALONE = "name a folder with --to that nobody else can write to"
_ROOT_ONLY = ("security.", "trusted.")


@dataclass(slots=True)
class Target:
    """The folder that everything goes to, open. ``left_out`` counts what was not made, by the reason.

    ``as_owner``: files get the owners that they have inside, which only root can give.
    """

    path: Path
    descriptor: int
    overwrite: bool = False
    as_owner: bool = False
    left_out: dict[str, int] = field(default_factory=dict)
    _linked: dict[Hashable, tuple[bytes, ...]] = field(default_factory=dict)
    _closed: set[tuple[bytes, ...]] = field(default_factory=set)  # folders that were left out

    def leave_out(self, why: str) -> None:
        """One thing more that was not made."""
        self.left_out[why] = self.left_out.get(why, 0) + 1

    # -- what is made --------------------------------------------------------------------------------------------

    def folder(self, parts: tuple[bytes, ...]) -> bool:
        """The folder is there, with a mode that lets us write into it; False where its name cannot be one here."""
        if not self._has_place(parts):
            self._closed.add(parts)
            return False
        with self._parent(parts) as parent:
            try:
                os.mkdir(parts[-1], 0o700, dir_fd=parent)
            except FileExistsError:
                facts = os.lstat(parts[-1], dir_fd=parent)
                if not stat.S_ISDIR(facts.st_mode):
                    if not self.overwrite:
                        raise
                    self._make_way(parent, parts)
                    os.mkdir(parts[-1], 0o700, dir_fd=parent)
                elif self.overwrite and not self.as_owner:
                    _unclose(parent, parts[-1])
        return True

    def file(
        self, parts: tuple[bytes, ...], content: Content, report: Callable[[int], None], key: Hashable = None
    ) -> int | None:
        """The file with its bytes, holes as holes; its descriptor, for what else is to be set, or None if left out.

        ``key`` says for ``hard_link`` which file of which file system it is, where it has more names.
        """
        if not self._has_place(parts):
            return None
        if content.size > _SIZE_MAX:
            self.leave_out("files larger than a file can be")
            return None
        with self._parent(parts) as parent:
            descriptor = self._created(parent, parts)
            try:
                _fill(descriptor, content, report)
            except BaseException:
                os.close(descriptor)
                self._remove(parent, parts[-1])
                raise
            if key is not None:
                self._linked.setdefault(key, parts)
            return descriptor

    def hard_link(self, parts: tuple[bytes, ...], key: Hashable) -> bool:
        """Another name of a file that was made already; False when it was not, or this name cannot be made."""
        first = self._linked.get(key)
        if first is None or not self._is_possible(parts):
            return False
        with self._parent(first) as source, self._parent(parts) as parent:
            if self.overwrite:
                self._make_way(parent, parts)
            os.link(first[-1], parts[-1], src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
        return True

    def special(self, parts: tuple[bytes, ...], node: Node) -> bool:
        """A symbolic link, which leads wherever it does inside, or a pipe; False for what is not made here."""
        if node.type in _UNMADE:
            self.leave_out(_UNMADE[node.type])
            return False
        if not self._has_place(parts):
            return False
        with self._parent(parts) as parent:
            if self.overwrite:
                self._make_way(parent, parts, pipe=node.type is Type.PIPE)
            if node.type is Type.PIPE:
                os.mkfifo(parts[-1], 0o600, dir_fd=parent)
            elif not node.target or b"\0" in node.target or len(node.target) > 4095:
                self.leave_out(UNLINKABLE)
                return False
            else:
                os.symlink(node.target, parts[-1], dir_fd=parent)
        return True

    def settle(
        self, parts: tuple[bytes, ...], node: Node, extras: Mapping[str, bytes], descriptor: int | None = None
    ) -> None:
        """Owner, mode, attributes and times of what was made: of the file that ``descriptor`` is, whatever has its name by now."""
        path = self.path / os.fsdecode(b"/".join(parts))
        if descriptor is not None:
            with durable.explained(path):
                self._settle(descriptor, node, extras)
            return
        with self._parent(parts) as parent, self._opened(parent, parts[-1], node) as found:
            self._settle(found, node, extras)

    def _settle(self, descriptor: int, node: Node, extras: Mapping[str, bytes]) -> None:
        place: int | str = descriptor if node.type not in _UNOPENED else f"/proc/self/fd/{descriptor}"
        is_owned = self._own(place, node)
        self._set_extras(place, extras, is_owned=is_owned)
        if node.type is not Type.LINK:
            os.chmod(place, _mode(node, as_owner=is_owned))  # noqa: PTH101 - it may be a descriptor
        _set_times(place, node)

    def _own(self, place: int | str, node: Node) -> bool:
        """Whether it has the owner that it has inside."""
        if not self.as_owner:
            return False
        if node.uid is None or node.gid is None:
            return True
        if not (0 <= node.uid < _NOBODY and 0 <= node.gid < _NOBODY):
            return False
        os.chown(place, node.uid, node.gid)
        return True

    def _set_extras(self, place: int | str, extras: Mapping[str, bytes], *, is_owned: bool) -> None:
        for name, value in extras.items():
            if name.startswith(_ROOT_ONLY) and not is_owned:
                continue
            if name.startswith("system.ntfs"):
                continue  # nobody but NTFS can hold them
            try:
                os.setxattr(place, name, value)
            except (OSError, ValueError):  # ValueError: a zero byte in the name, or what is no text
                self.leave_out("extended attributes that this file system does not take")

    # -- ways ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _parent(self, parts: tuple[bytes, ...]) -> Iterator[int]:
        """The open folder that the last part is a name in: reached step by step, no step through a link."""
        path = self.path / os.fsdecode(b"/".join(parts))
        with durable.explained(path), _nothing_replaced(path):
            here = os.dup(self.descriptor)
            try:
                for part in parts[:-1]:
                    if not _is_safe(part):
                        raise errors.Corrupt(f"the name {os.fsdecode(part)} leads out of its folder")
                    below = os.open(part, _FOLDER_FLAGS, dir_fd=here)
                    here, above = below, here  # however deep it goes, two are open
                    os.close(above)
                yield here
            finally:
                os.close(here)

    @contextlib.contextmanager
    def _opened(self, parent: int, name: bytes, node: Node) -> Iterator[int]:
        """What was made, by its name; nothing else that took the name meanwhile."""
        how = os.O_PATH if node.type in _UNOPENED else os.O_RDONLY | os.O_NONBLOCK
        descriptor = os.open(name, how | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        try:
            kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
            if kind != _KINDS.get(node.type, stat.S_IFREG):
                raise errors.Conflict(f"{self.path / os.fsdecode(name)} was replaced meanwhile", hint=_ALONE)
            yield descriptor
        finally:
            os.close(descriptor)

    def _created(self, parent: int, parts: tuple[bytes, ...]) -> int:
        name = parts[-1]
        try:
            return os.open(name, _FILE_FLAGS, 0o600, dir_fd=parent)
        except FileExistsError:
            if not self.overwrite or stat.S_ISDIR(os.lstat(name, dir_fd=parent).st_mode):
                raise
        self._make_way(parent, parts)
        return os.open(name, _FILE_FLAGS, 0o600, dir_fd=parent)

    def _make_way(self, parent: int, parts: tuple[bytes, ...], *, pipe: bool = False) -> None:
        """What has the name is removed, unless it is a folder, or special; ``pipe``: a pipe takes the place of one."""
        try:
            mode = os.lstat(parts[-1], dir_fd=parent).st_mode
        except FileNotFoundError:
            return
        if not (pipe and stat.S_ISFIFO(mode)):
            require_replaceable(self.path / os.fsdecode(b"/".join(parts)), mode)
        self._remove(parent, parts[-1])

    def _remove(self, parent: int, name: bytes) -> None:
        """The name is gone, unless it is a folder's."""
        durable.remove_at(parent, name)

    def _has_place(self, parts: tuple[bytes, ...]) -> bool:
        if self._is_possible(parts):
            return True
        self.leave_out(UNNAMEABLE)
        return False

    def _is_possible(self, parts: tuple[bytes, ...]) -> bool:
        return _is_safe(parts[-1]) and parts[:-1] not in self._closed


@contextlib.contextmanager
def opened(path: Path, *, overwrite: bool = False) -> Iterator[Target]:
    """The folder, made if only its last part is missing."""
    with durable.explained(path):
        try:
            path.mkdir()
        except FileExistsError:
            pass
        except FileNotFoundError as error:
            raise errors.NotFound(f"there is no {path.parent}", hint="make it first") from error
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield Target(path, descriptor, overwrite, as_owner=os.geteuid() == 0)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _nothing_replaced(path: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError as error:
        with contextlib.suppress(OSError):
            require_replaceable(path, path.lstat().st_mode)
        raise errors.Conflict(
            f"{path} exists already", hint="name another folder with --to, or replace it with --overwrite"
        ) from error


def require_replaceable(path: Path, mode: int) -> None:
    """Conflict where ``path`` is a device, a socket or a pipe: whoever uses it would lose it."""
    what = _KEPT.get(stat.S_IFMT(mode))
    if what is not None:
        raise errors.Conflict(f"{path} is a {what}, which nothing replaces", hint="give another name with --to")


def stays(name: bytes) -> bool:
    """Whether a name means something in its own folder, and nothing elsewhere."""
    return name not in {b"", b".", b".."} and b"/" not in name and b"\0" not in name


def _unclose(parent: int, name: bytes) -> None:
    """A folder of our own lets us write into it, as a new one does: it may have come with a mode that does not."""
    descriptor = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        facts = os.fstat(descriptor)
        if facts.st_uid == os.geteuid() and facts.st_mode & 0o700 != 0o700:
            os.chmod(f"/proc/self/fd/{descriptor}", stat.S_IMODE(facts.st_mode) | 0o700)  # noqa: PTH101 - not by its name
    finally:
        os.close(descriptor)


def _is_safe(name: bytes) -> bool:
    return stays(name) and len(name) <= _NAME_MAX


def _set_times(place: int | str, node: Node) -> None:
    if node.modified is not None:
        times = (node.accessed if node.accessed is not None else node.modified, node.modified)
        with contextlib.suppress(OverflowError):
            os.utime(place, ns=times)


def _mode(node: Node, *, as_owner: bool) -> int:
    if node.mode is None:
        return 0o755 if node.is_folder else 0o644
    # For another owner than the one inside these bits would mean something else.
    return node.mode if as_owner else node.mode & 0o1777


def _fill(descriptor: int, content: Content, report: Callable[[int], None]) -> None:
    behind = WriteBehind(descriptor)
    for offset, piece in content.pieces():
        view, at = memoryview(piece), offset
        while view:
            count = os.pwrite(descriptor, view, at)
            view, at = view[count:], at + count
        behind.wrote(offset, len(piece))
        report(len(piece))
    os.ftruncate(descriptor, content.size)
