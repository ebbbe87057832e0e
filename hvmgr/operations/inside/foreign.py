"""File systems that libguestfs reads, for whoever asks for it: what no reader of ours knows, arrays, thin logical volumes.

Its machine gets each place of the disks as a disk of its own, in clear where a key opened it: what we found stays what it
is called, and what only that machine puts together (``GROUP/VOLUME``, ``md/NAME``, parts of a table that we do not know) comes
besides. A journal is replayed in the machine's memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hvmgr import errors
from hvmgr.host import libguestfs
from hvmgr.host.libguestfs import Machine, Stat
from hvmgr.host.nbd_server import Server, Unmapped
from hvmgr.model.ranges import Range
from hvmgr.operations.inside.views import Volume
from hvmgr.storage.filesystems import raid
from hvmgr.storage.filesystems.reader import Content, Geometry, Node, Reader, Segment, Type, damaged
from hvmgr.storage.filesystems.signatures import Kind
from hvmgr.storage.partitions import Disk


@dataclasses.dataclass(frozen=True, slots=True)
class Foreign:
    """A place: what opens its file system, None where there is none, and its own bytes, None of what only the machine has."""

    reader: Callable[[], Reader] | None
    disk: Disk | None


_WORDS = {"vfat": Kind.FAT, "msdos": Kind.FAT, "ntfs3": Kind.NTFS, "LVM2_member": Kind.LVM, "crypto_LUKS": Kind.LUKS,
          "BitLocker": Kind.BITLOCKER}  # fmt: skip
_IGNORING_CASE = {Kind.FAT, Kind.EXFAT, Kind.NTFS, Kind.HFSPLUS, Kind.HFS}
_PART = re.compile(r"(/dev/sd[a-z]+)(\d+)")
_ARRAY = re.compile(r"/dev/md[^/]*")
_SPECIAL = {Type.BLOCK, Type.CHARACTER}
_TYPES = {
    stat.S_IFREG: Type.FILE, stat.S_IFDIR: Type.FOLDER, stat.S_IFLNK: Type.LINK, stat.S_IFBLK: Type.BLOCK,
    stat.S_IFCHR: Type.CHARACTER, stat.S_IFIFO: Type.PIPE, stat.S_IFSOCK: Type.SOCKET,
}  # fmt: skip


@contextlib.contextmanager
def opened(places: Mapping[Volume, Disk | None], clear: Mapping[Volume, Disk]) -> Iterator[dict[Volume, Foreign]]:
    """All places and what libguestfs makes of them, under the names that they have now.

    ``clear`` are those that it gets. Unsupported where it is not installed, HostFailed where it does not start.
    """
    if len(clear) > libguestfs.DISKS_MAX:
        raise errors.Unsupported(
            f"these disks have {len(clear)} partitions, and libguestfs takes {libguestfs.DISKS_MAX} at a time",
            hint="name one disk: --disk SLOT",
        )
    libguestfs.require()
    shared = one_at_a_time(clear)
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hvmgr-")))
        sockets = [work / f"nbd{number}" for number in range(len(shared))]
        for address, disk in zip(sockets, shared.values(), strict=True):
            stack.enter_context(Server(Unmapped(disk), writable=False).listening(address))
        machine = stack.enter_context(libguestfs.started(sockets, work))
        yield _found(machine, {**places, **shared}, {_device(number): one for number, one in enumerate(shared)})


def one_at_a_time(disks: Mapping[Volume, Disk]) -> dict[Volume, Disk]:
    """The same disks for several threads: their bytes may come by one file or one connection, whichever they are."""
    lock = threading.Lock()
    return {one: _Guarded(disk, lock) for one, disk in disks.items()}


class _Guarded:
    def __init__(self, disk: Disk, lock: threading.Lock) -> None:
        self._disk, self._lock = disk, lock
        self.size = disk.size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        with self._lock:
            self._disk.read_into(offset, buffer)


def _found(
    machine: Machine, places: Mapping[Volume, Disk | None], drives: Mapping[str, Volume]
) -> dict[Volume, Foreign]:
    there = {device: _kind(words) for device, words in machine.file_systems().items() if device.startswith("/dev/")}
    devices = {one: device for device, one in drives.items()}
    found: dict[Volume, Foreign] = {}
    for one, disk in places.items():
        device = devices.get(one)
        if device is not None and device in there:
            volume = dataclasses.replace(one, kind=there[device] or one.kind, why_not="")
            found |= _read(machine, device, volume, disk)
        elif device is not None and disk is not None:
            found[_without(one, disk)] = Foreign(None, disk)
        elif not one.logical:
            found[one] = Foreign(None, disk)
    first = next(iter(drives.values()), None)
    for device, kind in there.items():
        if kind is not None and device not in drives and first is not None:
            about = machine.device(device)
            name = _name(device, about.raid, drives)
            if any(one.logical == name for one in found):
                name = device.removeprefix("/dev/")  # two arrays may have one name
            ours = next((one for one in places if one.logical == name), None)
            volume = Volume(first.disk, None, 0, about.size, kind, about.label, about.uuid, logical=name)
            volume = dataclasses.replace(volume, encrypted=ours is not None and ours.encrypted)
            found |= _read(machine, device, volume, None)
    known = {one.logical for one in found}
    return found | {
        _unseen(one): Foreign(None, at) for one, at in places.items() if one.logical and one.logical not in known
    }


def _read(machine: Machine, device: str, volume: Volume, disk: Disk | None) -> dict[Volume, Foreign]:
    if volume.kind is None or not volume.kind.holds_files:
        return {volume: Foreign(None, disk)}
    read = dataclasses.replace(volume, reader=f"{libguestfs.NAME} {machine.version}")
    return {read: Foreign(functools.partial(_FileSystem, machine, device, read), disk)}


def _without(volume: Volume, disk: Disk) -> Volume:
    """A place on which the machine sees no file system of its own."""
    with contextlib.suppress(errors.Corrupt):  # its end may be beyond that of the disk
        if raid.is_type(volume.type) or raid.is_member(disk):
            return dataclasses.replace(volume, kind=Kind.RAID, why_not="it is a part of an array (md)")
    return _unseen(volume)


def _unseen(volume: Volume) -> Volume:
    if volume.kind is not None and volume.kind.holds_files and not volume.why_not:
        return dataclasses.replace(volume, why_not=f"{libguestfs.NAME} sees no file system there")
    return volume


def _device(number: int) -> str:
    """The machine's disks: a to z, aa to zz."""
    high, low = divmod(number, 26)
    return "/dev/sd" + (chr(96 + high) if high else "") + chr(97 + low)


def _name(device: str, array: str, drives: Mapping[str, Volume]) -> str:
    part = _PART.fullmatch(device)
    if part is not None and part[1] in drives:
        whole = drives[part[1]]
        return f"{whole.disk.slot or 'disk'}{whole.number or ''}/{part[2]}"
    if _ARRAY.fullmatch(device):
        return f"md/{array or device.removeprefix('/dev/md')}"
    return device.removeprefix("/dev/mapper/").removeprefix("/dev/")


def _kind(words: str) -> Kind | None:
    if words == "unknown":
        return None
    try:
        return _WORDS.get(words) or Kind(words)
    except ValueError:
        return Kind.OTHER


class _FileSystem:
    """A file system in the machine. A node's ``ref`` is where it is there: its folder, with what is known of it, and its name."""

    def __init__(self, machine: Machine, device: str, volume: Volume) -> None:
        self._machine, self._volume = machine, volume
        self._top = machine.mount(device, volume.kind or "")
        self.title = volume.reader
        self.notes = [f"read by {self.title}"]
        self.ignores_case = volume.kind in _IGNORING_CASE
        self._device: int | None = None
        self._root = self.stat((_Folder(b"/", [self._top[1:]]), self._top[1:]))

    def root(self) -> Node:
        return self._root

    def names(self, folder: Node) -> Iterator[tuple[bytes, Any]]:
        path = _path(folder.ref)
        found = _Folder(path, self._machine.names(path))
        yield from ((name, (found, name)) for name in found.names)

    def stat(self, ref: Any) -> Node:
        folder, name = ref
        if name not in folder.known:
            wanted = folder.wanted(name)
            folder.known.update(zip(wanted, self._machine.stats(folder.path, wanted), strict=True))
        return self._node(ref, folder.known[name])

    def _node(self, ref: tuple[_Folder, bytes], found: Stat | None) -> Node:
        if found is None:
            raise damaged(f"{os.fsdecode(_path(ref))} cannot be read")
        self._device = found.device if self._device is None else self._device
        # Several file systems may be one tree, as those of Btrfs, each with numbers of its own.
        number = found.number if found.device == self._device else (found.device + 1) << 64 | found.number
        type = _TYPES.get(stat.S_IFMT(found.mode), Type.OTHER)
        return Node(
            id=number,
            ref=ref,
            type=type,
            size=found.size if type in {Type.FILE, Type.FOLDER, Type.LINK} else 0,
            mode=stat.S_IMODE(found.mode),
            uid=found.uid,
            gid=found.gid,
            links=found.links,
            modified=found.modified,
            changed=found.changed,
            accessed=found.accessed,
            target=found.target,
            device=(os.major(found.special), os.minor(found.special)) if type in _SPECIAL else None,
            used=found.used,
        )

    def content(self, node: Node, stream: str = "") -> Content:
        if stream:
            raise errors.Unsupported(f"{self.title} gives no named streams", hint="leave --reader out")
        return _File(self._machine, _path(node.ref), node.size, self._volume.size)

    def stored(self, node: Node, stream: str = "") -> Content:
        return self.content(node, stream)

    def extras(self, node: Node) -> Mapping[str, bytes]:
        return self._machine.attributes(_path(node.ref))

    # -- what only comparing needs: nothing is known of where things lie ------------------------------------------

    @contextlib.contextmanager
    def watching(self) -> Iterator[list[Range]]:
        yield [(0, self._volume.size)]

    def geometry(self) -> Geometry | None:
        return None

    def departed(self, other: Reader) -> Sequence[Range] | None:  # noqa: ARG002 - as its promise
        return None

    def replaced(self) -> Sequence[Range]:
        return ()


class _Folder:
    """A folder of the machine, with what was asked of the files in it."""

    def __init__(self, path: bytes, names: list[bytes]) -> None:
        self.path, self.names = path, names
        self.known: dict[bytes, Stat | None] = {}
        self._places = {name: place for place, name in enumerate(names)}

    def wanted(self, name: bytes) -> list[bytes]:
        """Which files to ask for when this one is: it alone along a path; who asks for a second one will ask for all of them."""
        if not self.known:
            return [name]
        start = self._places[name]
        return self.names[start : start + libguestfs.NAMES]


class _File:
    """The bytes of a file; what is a piece of zeros is left out."""

    def __init__(self, machine: Machine, path: bytes, size: int, volume: int) -> None:
        self._machine, self._path, self._volume = machine, path, volume
        self.size = size

    def pieces(self, start: int = 0, end: int | None = None) -> Iterator[tuple[int, bytes | memoryview]]:
        last = self.size if end is None else min(end, self.size)
        for offset in range(start, last, libguestfs.PIECE):
            length = min(libguestfs.PIECE, last - offset)
            piece = self._machine.read(self._path, offset, length)
            if len(piece) != length:
                raise damaged(f"{os.fsdecode(self._path)} ends before its size")
            if piece.count(0) != length:
                yield offset, piece

    def segments(self) -> list[Segment]:
        return [Segment(0, self.size, 0, self._path, ((0, self._volume),))] if self.size else []

    def ranges(self) -> list[tuple[int, int]]:
        return [(0, self.size)] if self.size else []


def _path(ref: tuple[_Folder, bytes]) -> bytes:
    folder, name = ref
    return folder.path + name if folder.path.endswith(b"/") else folder.path + b"/" + name
