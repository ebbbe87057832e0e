"""Loop devices: a file as a block device, with its partitions. By the kernel's own calls (linux/loop.h, linux/blkpg.h).

Partitions are told to the kernel from outside: it may know no partition table (a kernel without parsers), or show those
of the device's earlier life. Nodes below /dev are made where nobody makes them (a container without udev), and are trusted
only when their number is what /sys says.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import stat
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from hvmgr import errors

_CONTROL = Path("/dev/loop-control")
_SYS = Path("/sys/block")
_DEV = Path("/dev")

_LOOP_CTL_GET_FREE, _LOOP_CONFIGURE, _LOOP_CLR_FD = 0x4C82, 0x4C0A, 0x4C01
_CONFIG = struct.Struct("<II5Q4I64s64s32s2Q64x")  # struct loop_config: fd, block size, loop_info64, reserved
_NOWHERE = "/"  # what is left of the path of a file whose mount namespace has ended
_READ_ONLY, _PARTSCAN = 1, 8
_BLKPG, _ADD, _DELETE = 0x1269, 1, 2
_BLKPG_PARTITION = struct.Struct("<qqi64s64s4x")
_BLKPG_ARGUMENT = struct.Struct("<iii4xQ")
_SECTOR = 512
_NODE_MODE = 0o660

_ESCAPED = re.compile(rb"\\([0-7]{3})")  # blanks and the like in /proc/self/mountinfo

_TRIES = 20  # other programs take free devices as well
_END_S = 10.0  # a program that looks at each new device (udev, blkid) closes it soon
_POLL_S = 0.05


class Partition(NamedTuple):
    """One partition of a device; ``start`` and ``size`` in bytes."""

    number: int
    start: int
    size: int


def require() -> None:
    """Unsupported where this kernel, this container or this user has no loop devices."""
    if not _CONTROL.exists():
        raise errors.Unsupported(
            "this host has no loop devices (there is no /dev/loop-control)",
            hint="load the kernel module: modprobe loop",
        )
    if not os.access(_CONTROL, os.R_OK | os.W_OK):
        raise errors.Unsupported("this user may not use loop devices", hint="attach images as root")


def attach(file: int, *, read_only: bool, name: str) -> Path:
    """A free loop device that shows the open ``file``; ``name`` is kept with it for those who look."""
    with _opened(_CONTROL) as control:
        for _ in range(_TRIES):
            number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
            device = _DEV / f"loop{number}"
            _make_node(device, _SYS / f"loop{number}" / "dev")
            flags = _PARTSCAN | (_READ_ONLY if read_only else 0)
            label = os.fsencode(name)[:63]
            config = _CONFIG.pack(file, _SECTOR, 0, 0, 0, 0, 0, 0, 0, 0, flags, label, b"", b"", 0, 0)
            try:
                with _opened(device, os.O_RDONLY if read_only else os.O_RDWR) as descriptor:
                    fcntl.ioctl(descriptor, _LOOP_CONFIGURE, config)
            except OSError as error:
                if error.errno == errno.EBUSY:
                    continue
                raise errors.HostFailed(f"{device} cannot be set up: {error.strerror}") from error
            return device
    raise errors.HostFailed("no loop device is free", hint="see which are used: losetup --list")


def backing(device: Path) -> str | None:
    """The file that a loop device shows; None when it shows none."""
    try:
        return os.fsdecode((_SYS / device.name / "loop" / "backing_file").read_bytes().removesuffix(b"\n"))
    except OSError:
        return None


def devices_of(file: Path) -> list[Path]:
    """The loop devices that show a file with this path."""
    found = [_DEV / one.name for one in _SYS.glob("loop*")]
    return sorted(device for device in found if backing(device) in {os.fspath(file), f"{file} (deleted)"})


def require_not_shown(file: Path) -> None:
    """Conflict when a loop device shows this very file: the kernel writes it then, and holds no lock on it."""
    for folder in _SYS.glob("loop*"):
        shown = backing(_DEV / folder.name)
        with contextlib.suppress(OSError):  # the path of another mount namespace, or of a file that is gone
            if shown is not None and Path(shown).samefile(file):
                raise errors.Conflict(
                    f"{file} is shown by the loop device {_DEV / folder.name}",
                    hint=f"unmount it, then: losetup --detach {_DEV / folder.name}",
                    path=str(file),
                    device=str(_DEV / folder.name),
                )


def life_of(device: Path) -> str | None:
    """What tells one use of a device from every other one of this start of the host; None where the kernel does not say."""
    try:
        return (_SYS / device.name / "diskseq").read_text().strip()
    except OSError:
        return None


def shows_nothing_any_more(device: Path, life: str | None) -> bool:
    """Whether a device still is what it was in that ``life``, but its file's mount namespace has ended."""
    return backing(device) == _NOWHERE and life_of(device) == life


def set_partitions(device: Path, wanted: Iterable[Partition]) -> None:
    """The kernel has exactly these partitions of a device, each with its node; what goes beyond the device is cut."""
    size = size_of(device)
    cut = {one.number: one._replace(size=min(one.size, size - one.start)) for one in wanted if one.start < size}
    with _opened(device, os.O_RDONLY) as descriptor:
        if not _within(_END_S, lambda: _remove(descriptor, device, keep=set(cut.values()))):
            raise errors.HostFailed(f"{device} still has partitions of another disk, and a program has them open")
        for one in sorted(set(cut.values()) - set(partitions(device))):
            with contextlib.suppress(OSError):  # one that lies over another one: the kernel takes the first
                _blkpg(descriptor, _ADD, one)
    for one in partitions(device):
        _make_node(node(device, one.number), _SYS / device.name / f"{device.name}p{one.number}" / "dev")


def partitions(device: Path) -> list[Partition]:
    """The partitions that the kernel has of a device, by number."""
    found = []
    for folder in (_SYS / device.name).glob(f"{device.name}p*"):
        with contextlib.suppress(OSError, ValueError):
            start, size = (int((folder / what).read_text()) * _SECTOR for what in ("start", "size"))
            found.append(Partition(int((folder / "partition").read_text()), start, size))
    return sorted(found)


def node(device: Path, number: int) -> Path:
    """The node of a partition."""
    return device.with_name(f"{device.name}p{number}")


def size_of(device: Path) -> int:
    """The bytes of a device."""
    return int((_SYS / device.name / "size").read_text()) * _SECTOR


def mount_points(device: Path) -> list[str]:
    """Where a device or one of its partitions is mounted, as far as this process can see."""
    folders = [_SYS / device.name, *(_SYS / device.name).glob(f"{device.name}p*")]
    numbers = {(folder / "dev").read_text().strip() for folder in folders if (folder / "dev").exists()}
    found = []
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        fields = line.split(b" ")
        if fields[2].decode() in numbers:
            found.append(os.fsdecode(_ESCAPED.sub(lambda one: bytes([int(one[1], 8)]), fields[4])))
    return found


@contextlib.contextmanager
def claimed(device: Path) -> Iterator[int]:
    """Nobody has the device or a partition of it mounted, or can mount it, during the block; Conflict who does."""
    try:
        descriptor = os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise errors.HostFailed(f"{device} cannot be opened: {error.strerror}") from error
        places = mount_points(device)
        what = f"mounted at {', '.join(places)}" if places else "in use: by swap, LVM, RAID, or mounted elsewhere"
        hint = "; ".join(f"umount '{place}'" for place in places) or f"see what uses it: lsblk {device}"
        raise errors.Conflict(
            f"{device} is {what}",
            hint=hint,
            device=str(device),
            mounts=places,
        ) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def detach(device: Path, *, sync: Callable[[Path], None]) -> None:
    """The device shows nothing any more, and all that was written to it or its partitions is in the file.

    ``sync`` is fsync for a path. Conflict, and the device stays usable, while it is mounted or a program has it open.
    HostFailed when a write was lost.
    """
    file = backing(device)
    with claimed(device) as descriptor:
        _flush(device, sync)
        _remove_partitions(descriptor, device)
        with contextlib.suppress(OSError):  # ENXIO: it shows nothing
            fcntl.ioctl(descriptor, _LOOP_CLR_FD)
    # Where another program has it open, the kernel waits for that one.
    if not _within(_END_S, lambda: file is None or backing(device) != file):
        raise _open_elsewhere(device)


def _flush(device: Path, sync: Callable[[Path], None]) -> None:
    parts = [node(device, one.number) for one in partitions(device)]
    try:
        for one in parts:
            _make_node(one, _SYS / device.name / one.name / "dev")
        for one in (*parts, device):  # each has a cache of its own
            sync(one)
    except (OSError, errors.HvmgrError) as error:
        raise errors.HostFailed(
            f"not all that was written to {device} could be written to its image: {error}",
            hint="the kernel's log says why: dmesg",
            device=str(device),
        ) from error


def _remove_partitions(descriptor: int, device: Path) -> None:
    before = partitions(device)
    if not _within(_END_S, lambda: _remove(descriptor, device, keep=set())):
        busy = partitions(device)
        for one in before:
            with contextlib.suppress(OSError):
                _blkpg(descriptor, _ADD, one)
        raise _open_elsewhere(node(device, busy[0].number) if busy else device)


def _remove(descriptor: int, device: Path, *, keep: set[Partition]) -> bool:
    """Whether the kernel has no other partitions than these; a program that looks at each new one closes it soon."""
    for one in set(partitions(device)) - keep:
        with contextlib.suppress(OSError):
            _blkpg(descriptor, _DELETE, one)
    return set(partitions(device)) <= keep


def _open_elsewhere(device: Path) -> errors.Conflict:
    return errors.Conflict(f"a program has {device} open", hint=f"see which one: fuser -v {device}", device=str(device))


def _within(seconds: float, is_so: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def _blkpg(descriptor: int, operation: int, one: Partition) -> None:
    part = ctypes.create_string_buffer(_BLKPG_PARTITION.pack(one.start, one.size, one.number, b"", b""))
    fcntl.ioctl(descriptor, _BLKPG, _BLKPG_ARGUMENT.pack(operation, 0, len(part) - 1, ctypes.addressof(part)))


def _make_node(path: Path, number: Path) -> None:
    """The node is there, with the number that /sys says."""
    major, minor = map(int, number.read_text().split(":"))
    try:
        facts = path.stat()
        if stat.S_ISBLK(facts.st_mode) and facts.st_rdev == os.makedev(major, minor):
            return
        path.unlink()  # of a device that had this name before
    except FileNotFoundError:
        pass
    with contextlib.suppress(FileExistsError):  # udev was quicker
        os.mknod(path, stat.S_IFBLK | _NODE_MODE, os.makedev(major, minor))


@contextlib.contextmanager
def _opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
