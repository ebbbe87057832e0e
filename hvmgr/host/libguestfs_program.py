"""The program of its own that uses libguestfs, for ``host/libguestfs``; it is asked over a socket, one thing after the other.

A message is two lengths of 4 bytes, a JSON text and plain bytes. A question is a list of words, of which the first names a
method of ``_Library``; the answer has ``yes``, or ``no`` with the library's words and its ``errno``. Bytes within JSON are text in
which each character is one byte.

The functions are those of guestfs(3); their arguments have been the same since libguestfs 1.30, and its major version is in
the library's name.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import struct
from collections.abc import Sequence
from io import BufferedRWPair
from typing import Any

_LIBRARY = "libguestfs.so.0"
_LENGTHS = struct.Struct(">II")
_TEXT_MAX, _DATA_MAX = 1 << 30, 4 << 20  # some millions of names; the library's own limit of a piece
_SECOND = 1_000_000_000
_SECTOR = 512
_READONLY, _FORMAT, _PROTOCOL, _SERVER, _END = 0, 1, 5, 6, -1  # GUESTFS_ADD_DRIVE_OPTS_*
_STATNS = 22  # numbers of 64 bits in struct guestfs_statns
_GONE = -1  # the inode of what lstatnslist cannot find
_FORCE_TCG = "force_tcg"
_ARGUMENTS = (
    b"md_mod.start_ro=1"  # of its kernel: an array that is not in step stays so, and does not fill the overlays
)
_CALLS: dict[str, tuple[Any, ...]] = {
    "guestfs_create": (ctypes.c_void_p,),
    "guestfs_close": (None, ctypes.c_void_p),
    "guestfs_set_error_handler": (None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p),
    "guestfs_last_error": (ctypes.c_char_p, ctypes.c_void_p),
    "guestfs_last_errno": (ctypes.c_int, ctypes.c_void_p),
    "guestfs_set_backend": (ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p),
    "guestfs_set_backend_setting": (ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p),
    "guestfs_set_append": (ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p),
    "guestfs_launch": (ctypes.c_int, ctypes.c_void_p),
    "guestfs_version": (ctypes.POINTER(ctypes.c_int64), ctypes.c_void_p),
    "guestfs_list_devices": (ctypes.c_void_p, ctypes.c_void_p),
    "guestfs_list_partitions": (ctypes.c_void_p, ctypes.c_void_p),
    "guestfs_list_md_devices": (ctypes.c_void_p, ctypes.c_void_p),
    "guestfs_lvs": (ctypes.c_void_p, ctypes.c_void_p),
    "guestfs_list_ldm_volumes": (ctypes.c_void_p, ctypes.c_void_p),
    "guestfs_list_ldm_partitions": (ctypes.c_void_p, ctypes.c_void_p),
    "guestfs_vfs_type": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p),
    "guestfs_blockdev_getsize64": (ctypes.c_int64, ctypes.c_void_p, ctypes.c_char_p),
    "guestfs_vfs_label": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p),
    "guestfs_vfs_uuid": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p),
    "guestfs_md_detail": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p),
    "guestfs_mkmountpoint": (ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p),
    "guestfs_mount_options": (ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p),
    "guestfs_ls": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p),
    "guestfs_lstatnslist": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p),
    "guestfs_readlinklist": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p),
    "guestfs_lgetxattrs": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p),
    "guestfs_pread": (
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_int64, ctypes.POINTER(ctypes.c_size_t),
    ),
    "guestfs_free_statns_list": (None, ctypes.c_void_p),
    "guestfs_free_xattr_list": (None, ctypes.c_void_p),
}  # fmt: skip


def is_installed() -> bool:
    """Whether the library is there."""
    return _load() is not None


def put(stream: BufferedRWPair, message: object, data: bytes = b"") -> None:
    """Send a message."""
    text = json.dumps(message).encode()
    stream.write(_LENGTHS.pack(len(text), len(data)))
    stream.write(text)
    stream.write(data)
    stream.flush()


def take(stream: BufferedRWPair) -> tuple[Any, bytes]:
    """The next message; EOFError where there is none, ValueError for what is none."""
    head = stream.read(_LENGTHS.size)
    if len(head) < _LENGTHS.size:
        raise EOFError
    length, size = _LENGTHS.unpack(head)
    if length > _TEXT_MAX or size > _DATA_MAX:
        raise ValueError("a message without end")
    return json.loads(stream.read(length)), stream.read(size)


def main(descriptor: int) -> None:
    """The program: answers until it is told to end, or until nobody asks any more."""
    library = _load()
    assert library is not None
    with socket.socket(fileno=descriptor) as connection, connection.makefile("rwb") as stream:
        known = _Library(library)
        while True:
            try:
                (word, *rest), _ = take(stream)
            except EOFError:
                return
            try:
                found = getattr(known, word)(*rest)
            except _Failed as error:
                put(stream, {"no": error.words, "number": error.number})
                continue
            if isinstance(found, bytes):
                put(stream, {"yes": None}, found)
            else:
                put(stream, {"yes": found})
            if word == "end":
                return


class _Failed(Exception):
    def __init__(self, words: str, number: int) -> None:
        super().__init__(words)
        self.words, self.number = words, number


class _Library:
    """What may be asked."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._handle: int | None = None
        self._mounted = 0

    def start(self, sockets: Sequence[str]) -> str:
        """The machine runs, under KVM if that works here; which version of the library it is."""
        self._open(sockets, emulated=False)
        if self._library.guestfs_launch(self._handle) != 0:
            if _FORCE_TCG in os.environ.get("LIBGUESTFS_BACKEND_SETTINGS", ""):
                raise self._failed()
            # Some hosts have the device of KVM, and no guest of it can run.
            self._close()
            self._open(sockets, emulated=True)
            self._checked(self._library.guestfs_launch(self._handle))
        version = self._library.guestfs_version(self._handle)
        return ".".join(str(version[number]) for number in range(3))

    def end(self) -> None:
        """The machine is gone."""
        self._close()

    def _open(self, sockets: Sequence[str], *, emulated: bool) -> None:
        self._handle = self._library.guestfs_create()
        self._library.guestfs_set_error_handler(self._handle, None, None)  # it would write to stderr
        self._checked(self._library.guestfs_set_backend(self._handle, b"direct"))
        self._checked(self._library.guestfs_set_append(self._handle, _ARGUMENTS))
        if emulated:
            self._checked(self._library.guestfs_set_backend_setting(self._handle, _FORCE_TCG.encode(), b"1"))
        for one in sockets:
            server = _strings([b"unix:" + os.fsencode(one)])
            number, handle = ctypes.c_int, ctypes.c_void_p(self._handle)
            self._checked(
                self._library.guestfs_add_drive_opts(
                    handle, b"", number(_READONLY), number(1), number(_FORMAT), b"raw", number(_PROTOCOL), b"nbd",
                    number(_SERVER), server, number(_END),
                )
            )  # fmt: skip

    def _close(self) -> None:
        if self._handle is not None:
            self._library.guestfs_close(self._handle)
            self._handle = None

    def file_systems(self) -> dict[str, str]:
        """Devices, and what is on them; without parts of what is a device of its own.

        guestfs_list_filesystems would say it too, but mounts each Btrfs for that: where one is damaged there is no list.
        """
        library = self._library
        sources = (
            library.guestfs_list_devices, library.guestfs_list_partitions, library.guestfs_list_md_devices,
            library.guestfs_lvs, library.guestfs_list_ldm_volumes, library.guestfs_list_ldm_partitions,
        )  # fmt: skip
        devices: dict[str, str] = {}
        for ask in sources:
            found = ask(self._handle)  # nothing where its machine has no programs for these
            for device in self._words(found) if found else []:
                kind = self._word(library.guestfs_vfs_type(self._handle, device.encode("latin-1"))) or "unknown"
                if kind != "crypto_LUKS" and not kind.endswith("_member"):
                    devices[device] = kind
        return devices

    def device(self, name: str) -> tuple[int, str, str, str]:
        """Size, label, uuid, and the name of an array."""
        raw = name.encode("latin-1")
        size = self._library.guestfs_blockdev_getsize64(self._handle, raw)
        self._checked(-1 if size < 0 else 0)
        label, uuid = (
            self._word(ask(self._handle, raw)) or ""
            for ask in (self._library.guestfs_vfs_label, self._library.guestfs_vfs_uuid)
        )
        return size, label, uuid, self._raid(raw) if name.startswith("/dev/md") else ""

    def _raid(self, name: bytes) -> str:
        found = self._library.guestfs_md_detail(self._handle, name)
        if not found:
            return ""
        words = self._words(found)
        about = dict(zip(words[::2], words[1::2], strict=True))
        return about.get("name", "").rpartition(":")[2] or about.get("uuid", "")

    def mount(self, device: str, options: str) -> str:
        """A mount point of its own for the file system."""
        place = f"/{self._mounted}"
        self._checked(self._library.guestfs_mkmountpoint(self._handle, place.encode()))
        self._mounted += 1
        words = [options.encode(), device.encode("latin-1"), place.encode()]
        self._checked(self._library.guestfs_mount_options(self._handle, *words))
        return place

    def names(self, folder: str) -> list[str]:
        """What is in a folder."""
        return self._words(self._library.guestfs_ls(self._handle, folder.encode("latin-1")))

    def stats(self, folder: str, names: Sequence[str]) -> list[Any]:
        """For each name a link's target, and the numbers of ``Stat``."""
        if not names:
            return []
        place, these = folder.encode("latin-1"), _strings([one.encode("latin-1") for one in names])
        found = self._library.guestfs_lstatnslist(self._handle, place, these)
        if not found:
            raise self._failed()
        try:
            rows = [list(one) for one in _array(found, ctypes.c_int64 * _STATNS)]
        finally:
            self._library.guestfs_free_statns_list(found)
        targets: Sequence[str | None] = [None] * len(rows)
        if any(row[2] & 0o170000 == 0o120000 for row in rows):
            targets = self._words(self._library.guestfs_readlinklist(self._handle, place, these))
        return [_stat(row, target) for row, target in zip(rows, targets, strict=True)]

    def attributes(self, path: str) -> dict[str, str]:
        """Extended attributes."""
        found = self._library.guestfs_lgetxattrs(self._handle, path.encode("latin-1"))
        if not found:
            raise self._failed()
        try:
            return {
                one.name.decode("latin-1"): ctypes.string_at(one.value, one.size).decode("latin-1")
                for one in _array(found, _Attribute)
            }
        finally:
            self._library.guestfs_free_xattr_list(found)

    def read(self, path: str, offset: int, length: int) -> bytes:
        """A piece of a file."""
        size = ctypes.c_size_t(0)
        found = self._library.guestfs_pread(self._handle, path.encode("latin-1"), length, offset, ctypes.byref(size))
        if not found:
            raise self._failed()
        try:
            return ctypes.string_at(found, size.value)
        finally:
            _free(found)

    # -- the library's ways --------------------------------------------------------------------------------------

    def _checked(self, code: int) -> None:
        if code != 0:
            raise self._failed()

    def _failed(self) -> _Failed:
        words = self._library.guestfs_last_error(self._handle) or b"it does not say why"
        return _Failed(
            " ".join(words.decode("utf-8", "replace").split()), self._library.guestfs_last_errno(self._handle)
        )

    def _word(self, found: int | None) -> str | None:
        """A string of the library's, which is then freed."""
        if not found:
            return None
        try:
            return ctypes.string_at(found).decode("latin-1")
        finally:
            _free(found)

    def _words(self, found: int | None) -> list[str]:
        """A list of strings of the library's, which is then freed with all of them."""
        if not found:
            raise self._failed()
        pointers = ctypes.cast(found, ctypes.POINTER(ctypes.c_void_p))
        words: list[str] = []
        while (one := pointers[len(words)]) is not None:
            words.append(self._word(one) or "")
        _free(found)
        return words


class _Attribute(ctypes.Structure):
    """struct guestfs_xattr."""

    _fields_ = (("name", ctypes.c_char_p), ("size", ctypes.c_uint32), ("value", ctypes.c_void_p))


class _List(ctypes.Structure):
    """struct guestfs_…_list."""

    _fields_ = (("count", ctypes.c_uint32), ("items", ctypes.c_void_p))


def _array(found: int, kind: Any) -> Any:
    about = _List.from_address(found)
    return (kind * about.count).from_address(about.items) if about.count else ()


def _stat(row: Sequence[int], target: str | None) -> list[Any] | None:
    device, number, mode, links, uid, gid, special, size, _, blocks = row[:10]
    if number == _GONE:
        return None
    number %= 1 << 64  # it has no sign
    times = [row[at] * _SECOND + row[at + 1] for at in (10, 12, 14)]
    is_link = mode & 0o170000 == 0o120000
    return [target if is_link else None, device, number, mode, links, uid, gid, special, size, blocks * _SECTOR, *times]


def _strings(words: Sequence[bytes]) -> Any:
    return (ctypes.c_char_p * (len(words) + 1))(*words, None)


def _free(pointer: int) -> None:
    free = ctypes.CDLL(None).free
    free.restype, free.argtypes = None, (ctypes.c_void_p,)
    free(pointer)


def _load() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError:
        return None
    for name, (result, *arguments) in _CALLS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
