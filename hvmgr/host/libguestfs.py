"""libguestfs, where it is installed: file systems read by a Linux that runs in a small machine of its own.

    with libguestfs.started([socket], work) as machine:
        for device, kind in machine.file_systems():
            top = machine.mount(device)
            machine.names(top)

The library is used by a process of its own (``libguestfs_program``): what a hostile disk does to it ends that process and
nothing else. Disks come to it by NBD. All paths are those of the machine: bytes, and below one of its mount points.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvmgr import errors
from hvmgr.host import libguestfs_program, process

NAME = "libguestfs"
DISKS_MAX = 200  # the machine's controller takes 255
PIECE = 2 << 20  # bytes in one read; the library's own limit for a message is 4 MiB
NAMES = 1000  # files that are asked for at a time: as many as the library asks its machine for

_START_S = 900.0  # it builds its system at the first start: minutes in emulation on a busy host
_ANSWER_S = 300.0  # after which a damaged file system is taken to hang it
_END_S = 10.0
_VARIABLES = ("LIBGUESTFS_", "SUPERMIN_")  # by which the library is told where its own parts are
_DAMAGED = {errno.EIO, errno.EUCLEAN, errno.EBADMSG}
_OPTIONS = {"xfs": "ro,nouuid"}  # a copy has the id of its original, which may be mounted as well
_TIME_MAX = 1 << 100
_COPY_HINT = "another disk is a copy of it, and its kernel takes one of them at a time: --disk SLOT"
_ADVICE = " To see full error messages"  # for whoever uses the library himself
_HINT = "what it lacks, its own test says: libguestfs-test-tool; it needs a Linux kernel on this host, and QEMU"


@dataclass(frozen=True, slots=True)
class Stat:
    """What ``lstat`` says of a file; times are nanoseconds, ``target`` is of a link."""

    target: bytes | None
    device: int
    number: int
    mode: int
    links: int
    uid: int
    gid: int
    special: int
    size: int
    used: int
    accessed: int
    modified: int
    changed: int


@dataclass(frozen=True, slots=True)
class Device:
    """A block device of the machine: its size in bytes, and what the file system on it says of itself."""

    size: int
    label: str
    uuid: str
    raid: str  # the name of an array (md), else empty


def require() -> None:
    """Unsupported, with the package, where the library is not installed."""
    if not libguestfs_program.is_installed():
        raise errors.Unsupported(f"{NAME} is not installed", hint="install it, on Debian with: apt install libguestfs0")


@contextlib.contextmanager
def started(sockets: Sequence[Path], work: Path) -> Iterator[Machine]:
    """The machine, with a disk (``a``, ``b`` and so on) behind each NBD socket; some 7 s in emulation, 2 s with KVM.

    ``work`` is a folder for what it needs meanwhile. Nothing is written to the disks. HostFailed where it does not start.
    """
    require()
    own = {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES)}
    ours, theirs = socket.socketpair()
    with contextlib.ExitStack() as stack:
        stack.enter_context(ours)
        with theirs:
            number, name = theirs.fileno(), libguestfs_program.__name__
            text = f"import sys; sys.path[:] = {sys.path!r}; from {name} import main; main({number})"
            program = stack.enter_context(
                process.spawned(
                    [sys.executable, "-I", "-c", text],
                    pass_fds=[number],
                    environment={**own, "LIBGUESTFS_TMPDIR": os.fspath(work)},
                )
            )
        machine = Machine(ours, program)
        machine.start(sockets)
        yield machine
        machine.end()


class Machine:
    """The running machine."""

    def __init__(self, connection: socket.socket, program: process.Spawned) -> None:
        self._connection, self._program = connection, program
        self._stream = connection.makefile("rwb")
        self.version = ""

    def start(self, sockets: Sequence[Path]) -> None:
        """It runs."""
        self._connection.settimeout(_START_S)
        try:
            self.version = str(self._ask("start", [os.fspath(one) for one in sockets])[0])
        except _Refused as error:
            said = str(error).partition(_ADVICE)[0]
            raise errors.HostFailed(f"{NAME} cannot start its machine: {said}", hint=_HINT) from error
        self._connection.settimeout(_ANSWER_S)

    def end(self) -> None:
        """It is gone, and so is what it had in its folder."""
        with contextlib.suppress(errors.HostFailed):
            self._ask("end")
        self._program.wait(_END_S)

    def file_systems(self) -> Mapping[str, str]:
        """Devices with a file system or something else on them, and what that is in the words of blkid."""
        found = self._call("file_systems")
        with _sensible():
            return {str(device): str(kind) for device, kind in found.items()}

    def device(self, name: str) -> Device:
        """What is to be known of a device."""
        found = self._call("device", name)
        with _sensible():
            size, *words = found
            return Device(_number(size), *(str(one) for one in words))

    def mount(self, device: str, kind: str) -> bytes:
        """Where the file system of a device is, to be read; Corrupt with the kernel's words where it cannot be mounted."""
        try:
            with _sensible():
                return _bytes(self._ask("mount", device, _OPTIONS.get(kind, "ro"))[0])
        except _Refused as error:
            hint = _COPY_HINT if os.strerror(errno.EEXIST) in str(error) else None
            raise errors.Corrupt(f"{NAME} cannot mount it: {error}", hint=hint) from error

    def names(self, folder: bytes) -> list[bytes]:
        """The names in a folder."""
        found = self._call("names", _text(folder))
        with _sensible():
            return [_bytes(one) for one in found]

    def stats(self, folder: bytes, names: Sequence[bytes]) -> list[Stat | None]:
        """What ``lstat`` says of files in a folder, at most ``NAMES``; None of one that cannot be read."""
        found = self._call("stats", _text(folder), [_text(one) for one in names])
        with _sensible():
            return [None if one is None else _stat(*one) for _, one in zip(names, found, strict=True)]

    def attributes(self, path: bytes) -> dict[str, bytes]:
        """Extended attributes by their names; none where the file system has none."""
        try:
            found: dict[str, str] = self._ask("attributes", _text(path))[0]
        except _Refused as error:
            if error.number in {errno.EOPNOTSUPP, errno.ENOSYS}:
                return {}
            raise self._explained(error) from error
        with _sensible():
            return {os.fsdecode(_bytes(name)): _bytes(value) for name, value in found.items()}

    def read(self, path: bytes, offset: int, length: int) -> bytes:
        """Bytes of a file, at most ``PIECE``; fewer at its end only."""
        try:
            return self._ask("read", _text(path), offset, length)[1]
        except _Refused as error:
            raise self._explained(error) from error

    # -- the conversation ----------------------------------------------------------------------------------------

    def _call(self, *words: object) -> Any:
        try:
            return self._ask(*words)[0]
        except _Refused as error:
            raise self._explained(error) from error

    def _ask(self, *words: object) -> tuple[Any, bytes]:
        try:
            libguestfs_program.put(self._stream, list(words))
            answer, data = libguestfs_program.take(self._stream)
            failed = (str(answer["no"]), int(answer["number"])) if "no" in answer else None
            result = answer["yes"] if failed is None else None
        except TimeoutError as error:
            raise errors.HostFailed(f"{NAME} gives no answer", hint="what it reads may be damaged") from error
        except (OSError, EOFError, ValueError) as error:
            said = self._program.stderr_text().strip().splitlines()
            raise errors.HostFailed(f"{NAME} ended without an answer: {' '.join(said[-1:])}") from error
        except (TypeError, KeyError, RecursionError) as error:
            raise _nonsense() from error
        if failed is not None:
            raise _Refused(*failed)
        return result, data

    def _explained(self, error: _Refused) -> errors.HvmgrError:
        if error.number == errno.ENOENT:
            return errors.NotFound(f"{NAME}: {error}")
        if error.number in _DAMAGED:
            return errors.Corrupt(f"the file system is damaged: {error}")
        return errors.HostFailed(f"{NAME}: {error}")


class _Refused(Exception):
    """The library said no."""

    def __init__(self, words: str, number: int) -> None:
        super().__init__(words)
        self.number = number


# What it reads may have taken it over: whatever it answers has to be what was asked for.


@contextlib.contextmanager
def _sensible() -> Iterator[None]:
    """What makes no sense in an answer is HostFailed."""
    try:
        yield
    except (TypeError, ValueError, AttributeError) as error:
        raise _nonsense() from error


def _nonsense() -> errors.HostFailed:
    return errors.HostFailed(f"{NAME} answers what makes no sense", hint="do not trust the disks that it reads")


def _stat(target: str | None, *numbers: int) -> Stat:
    *counts, accessed, modified, changed = numbers
    times = (_number(one, least=-_TIME_MAX, most=_TIME_MAX) for one in (accessed, modified, changed))
    return Stat(None if target is None else _bytes(target), *(_number(one) for one in counts), *times)


def _number(value: object, *, least: int = 0, most: int = (1 << 64) - 1) -> int:
    if not isinstance(value, int) or not least <= value <= most:
        raise ValueError(value)
    return value


def _text(raw: bytes) -> str:
    """Any bytes as what JSON can say."""
    return raw.decode("latin-1")


def _bytes(text: str) -> bytes:
    return text.encode("latin-1")
