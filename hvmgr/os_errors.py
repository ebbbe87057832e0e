"""What the file system answers, as hvmgr's errors: one sentence for each kind, whichever layer asked."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from hvmgr import errors

TEMPORARY = ".hvmgr-part-"  # how the names of unfinished files begin, by which they are known and swept
_IMMUTABLE = "it may be immutable (lsattr shows it, chattr -i ends it), or this process lacks a capability"


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns an OSError into the hvmgr error that says what to do; it names the file that the kernel named, else ``path``.

    A name in bytes is one below an open folder, and that of an unfinished file nobody gave: ``path`` tells more.
    """
    try:
        yield
    except OSError as error:
        raise _as_ours(error, _named(error, path)) from error


def translated(error: OSError) -> errors.HvmgrError:
    """The same for one that names its file, wherever it was met."""
    return _as_ours(error, error.filename)


def _named(error: OSError, path: Path) -> object:
    if isinstance(error.filename, bytes) or not error.filename:
        return path
    if TEMPORARY in str(error.filename):
        return path.parent if error.errno == errno.ENOENT else path
    return error.filename


def _as_ours(error: OSError, path: object) -> errors.HvmgrError:
    if error.errno == errno.EPERM and os.geteuid() == 0:
        return errors.HostFailed(f"not even root may change {path}", hint=_IMMUTABLE)
    for kind, make in _KINDS.items():
        if error.errno in kind:
            return make(path, error.strerror)
    return errors.HostFailed(f"{path}: {error.strerror}")


_KINDS: dict[tuple[int, ...], Callable[[object, str | None], errors.HvmgrError]] = {
    (errno.ENOENT,): lambda path, _: errors.NotFound(f"there is no {path}"),
    (errno.EEXIST,): lambda path, _: errors.Conflict(f"{path} exists already"),
    (errno.EACCES, errno.EPERM): lambda path, _: errors.HostFailed(
        f"no permission for {path}", hint="run as root, or give your user access to it"
    ),
    (errno.ENOSPC, errno.EDQUOT): lambda path, _: errors.NoSpace(
        f"no space left for {path}", hint="free space there and run the command again"
    ),
    (errno.EFBIG,): lambda path, _: errors.Unsupported(f"{path}: no file of this file system can be that large"),
    (errno.EROFS,): lambda path, _: errors.HostFailed(
        f"{path} is on a read-only file system", hint="mount it writable"
    ),
    (errno.ENAMETOOLONG,): lambda path, _: errors.UsageError(
        f"{path}: this name is too long for its file system", hint="give it a shorter one"
    ),
    (errno.ENOTDIR,): lambda path, _: errors.UsageError(f"{path} is no folder, or lies in none"),
    (errno.EISDIR, errno.ELOOP): lambda path, what: errors.UsageError(f"{path} is no file: {what}"),
}
