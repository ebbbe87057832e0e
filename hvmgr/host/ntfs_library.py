"""NTFS in an ordinary file, written through libntfs-3g: folders, files and their contents. No root, no mount.

The library reads what a guest wrote, and so it works in a process of its own, which ``write`` starts and ``main`` is: what
it cannot stand ends that process and nothing else. Its functions are those of ntfs-3g's include/ntfs-3g, whose arguments
have been the same since 2012; every object of its own is a pointer here. Names are UTF-16, as they are on the disk.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hvmgr import errors
from hvmgr.host import file_systems, process

_LIBRARIES = ("libntfs-3g.so.89", "libntfs-3g.so.90", "libntfs-3g.so.88")
_LIMIT_S = 3600.0
_PIECE = 1 << 20
_ROOT = 5  # $MFT record of the topmost folder
_DATA = 0x80  # AT_DATA
_NUMBER = (1 << 48) - 1  # of a record, in a reference to it
_EPOCH = 116_444_736_000_000_000  # 1970, in NTFS' time: steps of 100 ns since 1601


@dataclass(frozen=True, slots=True)
class Order:
    """One thing that is to be there. ``source`` is the path of a content, None for a folder; times are nanoseconds.

    ``path`` are the names from the root on. What has that name already keeps all but its content, under its other names
    as well; where ``is_new`` it is in the way. ``acl``: the security descriptor; without one what is new inherits it from its
    folder, as Windows does. ``attributes``: hidden, system and the like, four bytes.
    """

    path: tuple[str, ...]
    source: str | None
    modified: int | None
    is_new: bool
    acl: str | None = None  # hexadecimal, as the next one
    attributes: str | None = None


def require() -> None:
    """Unsupported, with the package, where the library is missing."""
    if _load() is None:
        raise errors.Unsupported(
            "the library libntfs-3g is not installed", hint="install it, on Debian with: apt install ntfs-3g"
        )


def write(volume: Path, orders: Sequence[Order]) -> None:
    """All of it is on the volume; half of it may be when this raises: the volume has to be one that can be thrown away."""
    program = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import main; sys.exit(main(sys.argv[1]))"
    wish = json.dumps([asdict(one) for one in orders]).encode()
    argv: list[str | Path] = [sys.executable, "-I", "-c", program, volume]
    done = process.run(argv, input=wish, timeout_s=_LIMIT_S, ok_codes=(0, 1))
    if done.code == 0:
        return
    try:
        said = json.loads(done.stdout)
        number, doing = int(said["errno"]), str(said["doing"])
    except (ValueError, KeyError, TypeError) as error:
        raise errors.HostFailed(f"libntfs-3g failed: {done.stderr.strip()[-300:]}") from error
    raise _explained(number, doing)


def _explained(number: int, doing: str) -> errors.HvmgrError:
    if number == errno.ENOSPC:
        return file_systems.full("the NTFS volume")
    if doing == "open" and number in (errno.EPERM, errno.EOPNOTSUPP):
        return errors.Conflict(
            "Windows has not let go of this volume: it sleeps, or was not shut down",
            hint="start it and shut it down, with fast start off",
        )
    if doing == "open" or number == errno.EIO:
        return errors.Corrupt(
            f"the NTFS volume is damaged, or none that libntfs-3g knows ({os.strerror(number)})",
            hint="start the system and let it check its disk: chkdsk /f",
        )
    return errors.HostFailed(f"libntfs-3g cannot {doing}: {os.strerror(number)}")


# --- the program of its own -------------------------------------------------------------------------------------------


class _Failed(Exception):
    """The library said no."""

    def __init__(self, doing: str, number: int | None = None) -> None:
        super().__init__(doing)
        self.doing, self.number = doing, number or ctypes.get_errno() or errno.EIO


class _Context(ctypes.Structure):
    """struct SECURITY_CONTEXT: on whose behalf something is made."""

    _fields_ = (
        ("volume", ctypes.c_void_p),
        ("users", ctypes.c_void_p),
        ("groups", ctypes.c_void_p),
        ("cache", ctypes.c_void_p),
        ("uid", ctypes.c_uint),
        ("gid", ctypes.c_uint),
        ("process", ctypes.c_int),
        ("mask", ctypes.c_uint),
    )


def main(volume: str) -> int:
    """The program: does what stdin orders, and says on stdout what it could not do."""
    orders = [Order(**{**one, "path": tuple(one["path"])}) for one in json.load(sys.stdin)]
    try:
        with _opened(volume) as one:
            for order in orders:
                one.do(order)
    except _Failed as failure:
        os.write(1, json.dumps({"errno": failure.number, "doing": failure.doing}).encode())
        return 1
    return 0


@contextmanager
def _opened(path: str) -> Iterator[_Volume]:
    library = _load()
    assert library is not None
    volume = _function(library, "ntfs_mount", _POINTER, ctypes.c_char_p, ctypes.c_ulong)(os.fsencode(path), 0)
    if not volume:
        raise _Failed("open")
    try:
        _function(library, "ntfs_open_secure", ctypes.c_int, _POINTER)(volume)  # descriptors are shared where it exists
        yield _Volume(library, volume)
    finally:
        failed = _function(library, "ntfs_umount", ctypes.c_int, _POINTER, ctypes.c_int)(volume, 0)
    if failed:
        raise _Failed("write all of it out")


_POINTER = ctypes.c_void_p
_INT64, _UINT32 = ctypes.c_int64, ctypes.c_uint32


class _Volume:
    """An open volume."""

    def __init__(self, library: ctypes.CDLL, volume: int) -> None:
        self._volume = volume
        self._library = library
        self._empty_cache = _POINTER(None)
        self._context = _Context(volume, None, None, ctypes.addressof(self._empty_cache), 0, 0, 0, 0)
        context = ctypes.POINTER(_Context)
        self._open = _function(library, "ntfs_inode_open", _POINTER, _POINTER, ctypes.c_uint64)
        self._close = _function(library, "ntfs_inode_close", ctypes.c_int, _POINTER)
        self._close_in = _function(library, "ntfs_inode_close_in_dir", ctypes.c_int, _POINTER, _POINTER)
        self._find = _function(
            library, "ntfs_inode_lookup_by_name", ctypes.c_uint64, _POINTER, ctypes.c_char_p, ctypes.c_int
        )
        self._create = _function(
            library, "ntfs_create", _POINTER, _POINTER, _UINT32, ctypes.c_char_p, ctypes.c_uint8, _UINT32
        )
        self._inherited = _function(library, "ntfs_inherited_id", _UINT32, context, _POINTER, ctypes.c_int)
        self._set_acl = _function(
            library, "ntfs_set_ntfs_acl", ctypes.c_int, context, _POINTER, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int
        )  # fmt: skip
        self._set_times = _function(
            library, "ntfs_inode_set_times", ctypes.c_int, _POINTER, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int
        )
        self._times = _function(
            library, "ntfs_inode_get_times", ctypes.c_int, _POINTER, ctypes.c_char_p, ctypes.c_size_t
        )
        self._set_attributes = _function(
            library, "ntfs_set_ntfs_attrib", ctypes.c_int, _POINTER, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int
        )
        self._attribute = _function(library, "ntfs_attr_open", _POINTER, _POINTER, _UINT32, _POINTER, _UINT32)
        self._put = _function(library, "ntfs_attr_pwrite", _INT64, _POINTER, _INT64, _INT64, ctypes.c_char_p)
        self._truncate = _function(library, "ntfs_attr_truncate", ctypes.c_int, _POINTER, _INT64)
        self._end_compressed = _function(library, "ntfs_attr_pclose", ctypes.c_int, _POINTER)
        self._end = _function(library, "ntfs_attr_close", None, _POINTER)

    def do(self, order: Order) -> None:
        """What is ordered is there."""
        folder = self._folder(order.path[:-1])
        try:
            node = self._node(folder, order)
            try:
                if order.source is not None:
                    self._fill(node, order.source)
                self._settle(node, order)
            finally:
                failed = self._close_in(node, folder)
            if failed:
                raise _Failed(f"write {order.path[-1]!r} out")
        finally:
            self._close(folder)

    def _folder(self, path: Sequence[str]) -> int:
        here = self._open(self._volume, _ROOT)
        for name in path:
            below = self._look(here, name) if here else None
            if here:
                self._close(here)
            here = None if below is None else self._open(self._volume, below)
        if not here:
            raise _Failed(f"open the folder {'/'.join(path) or '/'!r}")
        return int(here)

    def _look(self, folder: int, name: str) -> int | None:
        """The number of the record with this name."""
        found = int(self._find(folder, *_name(name)))
        return None if found == (1 << 64) - 1 else found & _NUMBER

    def _node(self, folder: int, order: Order) -> int:
        name = order.path[-1]
        there = self._look(folder, name)
        if there is not None and order.is_new:
            raise _Failed(f"make {name!r}", errno.EEXIST)
        if there is not None:
            node = self._open(self._volume, there)
        else:
            is_folder = order.source is None
            owner = self._inherited(ctypes.byref(self._context), folder, int(is_folder))
            kind = stat.S_IFDIR if is_folder else stat.S_IFREG
            node = self._create(folder, owner, *_name(name), kind)
        if not node:
            raise _Failed(f"make {name!r}")
        return int(node)

    def _fill(self, node: int, source: str) -> None:
        unnamed = ctypes.addressof(ctypes.c_uint16.in_dll(self._library, "AT_UNNAMED"))
        attribute = self._attribute(node, _DATA, unnamed, 0)
        if not attribute:
            raise _Failed("open the content")
        try:
            if self._truncate(attribute, 0):
                raise _Failed("empty the content")
            at = 0
            with Path(source).open("rb", buffering=0) as file:
                while piece := file.read(_PIECE):
                    if self._put(attribute, at, len(piece), piece) != len(piece):
                        raise _Failed("write the content")
                    at += len(piece)
            if self._end_compressed(attribute):
                raise _Failed("end the content")
        finally:
            self._end(attribute)

    def _settle(self, node: int, order: Order) -> None:
        if order.acl is not None:
            value = bytes.fromhex(order.acl)
            if self._set_acl(ctypes.byref(self._context), node, value, len(value), 0):
                raise _Failed("set the security descriptor")
        if order.attributes is not None:
            value = bytes.fromhex(order.attributes)
            if self._set_attributes(node, value, len(value), 0):
                raise _Failed("set the attributes")
        if order.modified is not None:
            moment = max(0, order.modified // 100 + _EPOCH).to_bytes(8, "little")
            born = ctypes.create_string_buffer(moment, 8)
            if not order.is_new and self._times(node, born, 8) != 8:
                raise _Failed("read the times")
            if self._set_times(node, born.raw + moment * 2, 24, 0):  # made, modified, read
                raise _Failed("set the times")


def _name(name: str) -> tuple[bytes, int]:
    raw = name.encode("utf-16-le", "surrogatepass")
    return raw, len(raw) // 2


def _function(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    found = getattr(library, name)
    found.restype, found.argtypes = result, arguments
    return found  # type: ignore[no-any-return]


def _load() -> ctypes.CDLL | None:
    for name in _LIBRARIES:
        try:
            return ctypes.CDLL(name, use_errno=True)
        except OSError:
            continue
    return None
