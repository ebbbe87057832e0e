"""The one place that makes changes on disk last: written, synced, renamed, and the folder synced.

After each function returns, a loss of power no longer takes the change back. A process that dies inside one of them
leaves the old file or the new one, and at most a temporary file that ``sweep`` knows by its name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from hvmgr import errors
from hvmgr.os_errors import TEMPORARY as TEMPORARY  # noqa: PLC0414 - part of what this module gives
from hvmgr.os_errors import explained as explained  # noqa: PLC0414
from hvmgr.storage import holes

_TRIES = 5  # of copying a folder in which files are replaced meanwhile
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # renameat2(2)
_SYNCS_AT_ONCE = 16


def sync_folder(folder: Path) -> None:
    """The folder's entries are on disk; file systems that cannot sync a folder say EINVAL, which is fine."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """The file's bytes are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(paths: Sequence[Path]) -> None:
    """The bytes of all files are on disk: asked for at once, so that the file system writes its journal once for many."""
    if len(paths) > 1:
        from concurrent.futures import ThreadPoolExecutor  # not for readers

        with ThreadPoolExecutor(min(len(paths), _SYNCS_AT_ONCE)) as pool:
            list(pool.map(sync_file, paths))
    elif paths:
        sync_file(paths[0])


def write_file(
    path: Path,
    data: bytes,
    *,
    mode: int = 0o600,
    owner: tuple[int, int] | None = None,
    alone: bool = False,
    synced: bool = True,
) -> None:
    """The file holds exactly ``data``: always the old content or the new one.

    ``alone``: no other process writes this file now, so that what a dead one left of an attempt is written over. Unless
    ``synced``, a loss of power may leave it missing, old or torn: a hint, or something that ``sync_files`` ends.
    """
    part = part_of(path) if alone else None
    with explained(path), replacing(path, mode, owner, part=part, synced=synced) as descriptor:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]


def append(path: Path, data: bytes) -> None:
    """``data`` stands at the end of the existing file; a death in the middle leaves a torn last line."""
    with explained(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def copy_file(
    source: Path, target: Path, *, mode: int = 0o600, owner: tuple[int, int] | None = None, plain: bool = False
) -> None:
    """``target`` holds the bytes of ``source``, holes as holes; shared blocks where the file system can.

    ``plain``: Conflict where a link leads to the source.
    """
    with explained(target), source.open("rb") as reader, replacing(target, mode, owner) as descriptor:
        if plain:
            require_plain(reader.fileno(), source)
        size = os.fstat(reader.fileno()).st_size
        if not size:  # a block device has no length in its inode
            size = os.lseek(reader.fileno(), 0, os.SEEK_END)
        os.ftruncate(descriptor, size)
        for start, end in holes.data_ranges(reader.fileno(), size):
            holes.copy_range(reader.fileno(), descriptor, start, end)


def require_plain(descriptor: int, path: Path) -> None:
    """Conflict when a link led to the open file: who owns a folder above it has put one there since it was looked at."""
    if os.readlink(f"/proc/self/fd/{descriptor}") != os.fspath(path):
        raise errors.Conflict(f"{path} became a link while it was looked at", hint="run the command again")


def link_or_copy(source: Path, target: Path, *, owner: tuple[int, int] | None = None) -> None:
    """``target`` is another name of the file ``source``, or a copy of it where a file cannot have two names.

    A copy has the file's time of change, so that ``is_same_or_copy`` knows it.
    """
    with explained(target):
        try:
            os.link(source, target)
        except FileExistsError:
            return
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
                raise
            facts = source.stat()
            copy_file(source, target, owner=owner)
            os.utime(target, ns=(facts.st_atime_ns, facts.st_mtime_ns))
            sync_file(target)
        else:
            sync_folder(target.parent)


def is_same_or_copy(one: Path, other: Path) -> bool:
    """Whether two names are one file, or ``link_or_copy`` made one of the other and neither was changed since."""
    first, second = one.stat(), other.stat()
    if (first.st_dev, first.st_ino) == (second.st_dev, second.st_ino):
        return True
    return (first.st_size, first.st_mtime_ns) == (second.st_size, second.st_mtime_ns)


def copy_folder(source: Path, target: Path) -> None:
    """``target`` becomes a complete copy of the folder ``source``, with owners, who alone may read and write what is in it.

    Modes are those of TPM states in libvirt's own place, whatever an export made of them: swtpm, which runs as a user of
    its own, passes through the outer folder. A running swtpm replaces its files by renaming others.
    """
    with explained(target):
        part = target.with_name(f"{TEMPORARY}{_unique()}")
        _copy_tree(source, part)
        for folder, _, names in os.walk(part):
            for name in names:
                (Path(folder) / name).chmod(0o600)
                sync_file(Path(folder) / name)
            Path(folder).chmod(0o711 if Path(folder) == part else 0o700)
            sync_folder(Path(folder))
        _take_owner(source, part)
        if target.exists():
            remove_folder(target)
        os.rename(part, target)
        sync_folder(target.parent)


def _copy_tree(source: Path, part: Path) -> None:
    """A file that was renamed between looking and copying is looked for again."""
    for left in reversed(range(_TRIES)):
        try:
            shutil.copytree(source, part, symlinks=True, copy_function=_copy_with_owner)
        except BaseException as error:
            shutil.rmtree(part, ignore_errors=True)
            if not isinstance(error, shutil.Error | FileNotFoundError):
                raise
            if not left:
                raise OSError(errno.EIO, f"cannot be copied: {error}", source) from error
        else:
            return


def make_folder(path: Path, *, mode: int = 0o711, owner: tuple[int, int] | None = None, synced: bool = True) -> None:
    """The folder exists; an existing one keeps its mode. ``synced``: lastingly."""
    with explained(path):
        if path.is_dir():
            return
        path.mkdir(mode=mode)  # a death before the next line leaves it with fewer rights, never with more
        path.chmod(mode)
        if owner is not None:
            os.chown(path, *owner)
        if synced:
            sync_folder(path.parent)


def rename(source: Path, target: Path) -> None:
    """``source`` has the name ``target``, replacing what was there."""
    with explained(source):
        os.rename(source, target)
        sync_folder(target.parent)
        if source.parent != target.parent:
            sync_folder(source.parent)


def replace_unsynced(source: Path, target: Path) -> None:
    """``source`` has the name ``target``, for what may be lost: after a loss of power it may have the old name."""
    with explained(target):
        os.replace(source, target)


@contextlib.contextmanager
def appearing(path: Path, *, mode: int = 0o600) -> Iterator[Path]:
    """A path in the same folder at which a program makes a file; it takes the name ``path`` when the block ends well.

    Nothing is ever replaced: Conflict when ``path`` is there, now or then. Only one process at a time may make ``path``:
    what a dead one left of an attempt is removed first.
    """
    part = part_of(path)
    with explained(path):
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        if not path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
        part.unlink(missing_ok=True)
        try:
            yield part
            part.chmod(mode)
            sync_file(part)
            _name_without_replacing(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def _name_without_replacing(part: Path, path: Path) -> None:
    try:
        os.link(part, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        if os.path.lexists(path):  # no hard links here: the name is looked at just before
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        os.rename(part, path)
    else:
        part.unlink()


@contextlib.contextmanager
def rewriting(path: Path) -> Iterator[Path]:
    """A path at which a program makes a file that takes the place of ``path``, with its owner and mode.

    When the block removes what it made, ``path`` stays as it is.
    """
    part = part_of(path)
    with explained(path):
        part.unlink(missing_ok=True)
        try:
            yield part
            if not part.exists():
                return
            part.chmod(path.stat().st_mode & 0o7777)
            _take_owner(path, part)
            sync_file(part)
            os.rename(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def exchange(first: Path, second: Path) -> None:
    """Two files of one file system have each other's name, both at one instant.

    Unsupported where the file system cannot do that; nothing was changed then.
    """
    import ctypes  # as rare as this is

    libc = ctypes.CDLL(None, use_errno=True)
    with explained(first):
        names = [os.fsencode(one) for one in (first, second)]
        if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) != 0:
            number = ctypes.get_errno()
            if number in (errno.EINVAL, errno.ENOSYS):
                raise errors.Unsupported(
                    f"this file system cannot exchange the names of {first} and {second}",
                    hint="rename them by hand, by way of a third name",
                )
            raise OSError(number, os.strerror(number), str(first))
        for folder in {first.parent, second.parent}:
            sync_folder(folder)


def remove(path: Path) -> None:
    """The file is not there; it need not have been."""
    with explained(path):
        try:
            path.unlink()
        except FileNotFoundError:
            return
        sync_folder(path.parent)


def remove_at(folder: int, name: bytes) -> None:
    """There is no file of this name in an open folder; for what is no state of ours, and so not synced."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)


def remove_folder(path: Path) -> None:
    """The folder and all in it are not there; it need not have been."""
    with explained(path):
        if not path.is_dir():
            return
        shutil.rmtree(path)
        sync_folder(path.parent)


def remove_empty_folder(path: Path) -> None:
    """The folder is gone if nothing was in it."""
    try:
        path.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.ENOENT, errno.ENOTDIR):
            raise
        return
    sync_folder(path.parent)


def set_mode(path: Path, mode: int) -> None:
    """The file or folder has the mode, lastingly; a device keeps its own."""
    with explained(path):
        if (path.is_file() or path.is_dir()) and path.stat().st_mode & 0o7777 != mode:
            path.chmod(mode)
            sync_file(path)


def set_folder_mode(path: Path, mode: int, owner: tuple[int, int] | None = None, *, synced: bool = True) -> None:
    """The folder has the mode, and the owner where this process may give it away. ``synced``: lastingly."""
    with explained(path):
        if owner is not None and os.geteuid() == 0:
            os.chown(path, *owner)
        if path.stat().st_mode & 0o7777 != mode:
            path.chmod(mode)
        if synced:
            sync_folder(path)


def link(path: Path, target: Path) -> None:
    """``path`` is a symbolic link to the folder ``target``; an empty folder of that name makes place for it."""
    with explained(path):
        if path.is_symlink() and os.readlink(path) == os.fspath(target):
            return
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        path.symlink_to(target)
        sync_folder(path.parent)


def set_owner(path: Path, owner: tuple[int, int] | None) -> None:
    """The file belongs to ``owner`` (uid, gid), where this process may give it away."""
    with explained(path):
        if owner is not None and os.geteuid() == 0:
            os.chown(path, *owner)


def sweep(folder: Path) -> None:
    """Temporary files that a dead process left in ``folder`` are gone."""
    if not folder.is_dir():
        return
    for name in os.listdir(folder):
        if name.startswith(TEMPORARY):
            entry = folder / name
            if entry.is_dir() and not entry.is_symlink():
                remove_folder(entry)
            else:
                remove(entry)


def part_of(path: Path) -> Path:
    """The one temporary name of a file that only one process at a time makes."""
    return path.with_name(f"{TEMPORARY}{path.name}")


@contextlib.contextmanager
def replacing(
    path: Path,
    mode: int,
    owner: tuple[int, int] | None,
    *,
    part: Path | None = None,
    named: bool = True,
    synced: bool = True,
) -> Iterator[int]:
    """A descriptor, for reading and writing, of a new file that takes the name ``path`` when the block ends well.

    ``part`` is a temporary name that nobody else uses now. Unless ``named``, the name itself may be lost with the power:
    the caller syncs the folder, once for many files; unless ``synced``, the bytes too.
    """
    if part is not None:
        part.unlink(missing_ok=True)
    part = part or path.with_name(f"{TEMPORARY}{_unique()}")
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            yield descriptor
            os.fchmod(descriptor, mode)
            if owner is not None and os.geteuid() == 0:
                os.fchown(descriptor, *owner)
            if synced:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if named and synced:
        sync_folder(path.parent)


def _copy_with_owner(source: str, target: str) -> str:
    shutil.copy2(source, target, follow_symlinks=False)
    _take_owner(Path(source), Path(target))
    return target


def _take_owner(source: Path, target: Path) -> None:
    if os.geteuid() == 0:
        facts = source.lstat()
        os.chown(target, facts.st_uid, facts.st_gid, follow_symlinks=False)


def _unique() -> str:
    import uuid  # 3 ms that readers need not pay

    return uuid.uuid4().hex
