"""An export in one file (tar, or tar compressed with zstd) as something that can be looked into, and unpacked once.

``find`` reads an archive from one end to the other and lays out a folder of what it holds: small files whole, of images
and saved memory the beginning and the end alone, at their true length, so that a header can be read as that of any file.
The folder lies beside the host-wide index and goes with the process, or with the next archive that is opened when the
process was killed. ``unpack`` reads the archive once more and puts files where they are to be, checked on the way.

Who packed it may not wish us well: see ``untar`` for what is refused. Nothing is written under a name of the archive's
outside that folder.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import errno
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from hvmgr import errors, settings
from hvmgr.host import process
from hvmgr.model import manifest
from hvmgr.model.finding import Finding
from hvmgr.model.layout import BASES, SNAPSHOTS
from hvmgr.storage import copy, durable, locks, untar
from hvmgr.write_behind import WriteBehind

_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_TAR_MAGIC, _TAR_MAGIC_AT = b"ustar", 257
_OTHERS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"PK\x03\x04": "zip"}
_ZSTD = ("zstd", "-q", "-d", "-c")

MEMORY = "memory.save"
_HEAD, _HEAD_OF_MEMORY, _TAIL = 1 << 20, 16 << 20, 64 << 10
_HEAD_OF_VHD = 20 << 20  # with the whole table of blocks of the largest disk
_SMALL_MAX = 128 << 20  # NVRAM is 64 MiB on some machines
_ALL_MAX = 1 << 30
_SHOWN_MAX = 8 << 30  # what is laid out of images and saved memory: that of hundreds
_FOLDER_MODE, _FILE_MODE = 0o700, 0o600
_PARENT_LOCK_S = 60.0

Report = Callable[[int, int], None]  # bytes of the archive that are read, and all


@dataclass(frozen=True, slots=True)
class Member:
    """A file of the archive: its length, what of it is data, and the hash of what is in it (None: not read)."""

    size: int
    data: int
    sha256: str | None


@dataclass(slots=True)
class Archive:
    """An archive that was looked into: ``folder`` shows what it holds, ``members`` are its files by their names there."""

    path: Path
    state: tuple[int, int, int, int]
    folder: Path
    members: dict[str, Member] = field(default_factory=dict)
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def name_of(self, path: Path | str) -> str | None:
        """The member that a file of the folder stands for."""
        name = Path(path)
        if not name.is_relative_to(self.folder):
            return None
        found = str(name.relative_to(self.folder))
        return found if found in self.members else None

    def sha256(self, path: Path | str) -> str | None:
        """The hash of a whole member; the archive is read for it when that has not been done."""
        name = self.name_of(path)
        if name is None:
            return None
        if self.members[name].sha256 is None:
            self.read_hashes()
        return self.members[name].sha256

    def read_hashes(self, report: Report | None = None) -> None:
        """The hashes of all members are known."""
        if any(one.sha256 is None for one in self.members.values()):
            with _opened(self.path, self.state, report) as reader:
                for entry in reader.entries():
                    if not entry.is_folder and entry.name in self.members:
                        digest = _digest(reader, entry.size)
                        self.members[entry.name] = dataclasses.replace(self.members[entry.name], sha256=digest)

    def say(self, text: str) -> str:
        """A sentence with the archive's own name in place of the folder's."""
        return text.replace(f"{self.folder}/", f"{self.path}: ").replace(str(self.folder), str(self.path))

    def named(self, finding: Finding) -> Finding:
        """The finding as one of the archive."""
        repair = None if finding.repair is None else self.say(finding.repair)
        return dataclasses.replace(
            finding, sentence=self.say(finding.sentence), where=self.say(finding.where), repair=repair
        )

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        """Errors speak of the archive."""
        try:
            yield
        except errors.HvmgrError as error:
            error.message = self.say(error.message)
            error.hint = None if error.hint is None else self.say(error.hint)
            error.facts = {key: self.say(one) if isinstance(one, str) else one for key, one in error.facts.items()}
            raise


_open: dict[tuple[int, int, int, int], Archive] = {}
_guard = threading.RLock()


def is_archive(path: Path) -> bool:
    """Whether the file is a tar archive, compressed or not; Unsupported for a compression that is not read here."""
    if not path.is_file():  # whoever opens a pipe waits for its other end
        return False
    try:
        with path.open("rb") as file:
            head = file.read(_TAR_MAGIC_AT + len(_TAR_MAGIC))
    except OSError:
        return False
    for magic, name in _OTHERS.items():
        if head.startswith(magic):
            raise errors.Unsupported(
                f"{path} is compressed with {name}; archives are read plain or with zstd",
                hint="unpack it, and name the folder",
                path=str(path),
            )
    return head.startswith(_ZSTD_MAGIC) or head[_TAR_MAGIC_AT:] == _TAR_MAGIC


def find(path: Path, *, hashed: bool = False, report: Report | None = None) -> Archive | None:
    """What the archive holds; None for anything that is no archive. One look serves as long as the file is the same.

    ``hashed``: the hashes of all members are made in the same pass. Corrupt for an archive that is not sound.
    """
    if not is_archive(path):
        return None
    path = Path(os.path.realpath(path))
    state = _state(path.stat())
    with _guard:
        if state not in _open:
            _open[state] = _look(path, state, hashed=hashed, report=report)
        if hashed:
            _open[state].read_hashes(report)
        return _open[state]


def release() -> None:
    """The folders of all archives that this process has looked into are gone."""
    with _guard:
        while _open:
            _, one = _open.popitem()
            one._stack.close()  # noqa: SLF001 - of this module


atexit.register(release)


def sweep() -> None:
    """What processes left that were killed is gone; whoever opens an archive at this moment does that himself."""
    place = _place()
    if place.is_dir():
        with contextlib.suppress(errors.Busy), _place_locked(place, wait_s=0):
            _sweep(place)


def unpack(
    archive: Path,
    state: tuple[int, int],
    files: Mapping[str, tuple[Path, str]],
    *,
    owner: tuple[int, int] | None,
    report: Report | None = None,
) -> None:
    """Each named member is a file of its own, on disk: holes as holes, its SHA-256 (where one is given) the stated one.

    ``state`` is the archive's size and time, as it was planned on: Conflict when it is another one by now.
    """
    facts = archive.stat()
    if (facts.st_size, facts.st_mtime_ns) != state:
        raise errors.Conflict(f"{archive} was changed meanwhile", hint="run the command again")
    missing = dict(files)
    with _opened(archive, _state(facts), report) as reader:
        for entry in reader.entries():
            target, sha256 = missing.pop(entry.name, (None, ""))
            if target is not None and _unpack(reader, entry.size, target, owner) != sha256 and sha256:
                raise errors.Corrupt(
                    f"{entry.name} in {archive} holds other bytes than were recorded",
                    hint="get a whole copy of the archive",
                    path=str(archive),
                )
    for name in missing:
        raise errors.Conflict(f"{archive} holds no {name} any more", hint="run the command again")


# --- inside ---------------------------------------------------------------------------------------------------------


def _place() -> Path:
    return settings.index_folder() / "archives"


def _place_locked(place: Path, *, wait_s: float) -> contextlib.AbstractContextManager[None]:
    """Nobody makes or removes a folder there."""
    return locks.held(place / ".lock", wait_s=wait_s, what="the folder for archives")


def _sweep(place: Path) -> None:
    for folder in sorted(place.iterdir()):
        if folder.is_dir() and not locks.is_held(folder / "lock"):
            durable.remove_folder(folder)


def _state(facts: os.stat_result) -> tuple[int, int, int, int]:
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


@contextlib.contextmanager
def _opened(path: Path, state: tuple[int, int, int, int], report: Report | None) -> Iterator[untar.Reader]:
    """One pass; the block has to read to the end."""
    with durable.explained(path), path.open("rb", buffering=0) as file:
        is_plain = file.read(len(_ZSTD_MAGIC)) != _ZSTD_MAGIC
        file.seek(0)

        said = 0

        def counted(take: untar.Take) -> untar.Take:
            def counting(view: memoryview) -> int:
                nonlocal said
                done = os.lseek(file.fileno(), 0, os.SEEK_CUR)  # zstd reads by the same descriptor
                if report is not None and done != said:
                    report(done, state[2])
                    said = done
                return take(view)

            return counting

        if is_plain:
            yield untar.Reader(counted(_taker(file)), str(path))
        else:
            with _decompressed(path, file) as stream:
                yield untar.Reader(counted(_taker(stream)), str(path))
        if _state(os.fstat(file.fileno())) != state:
            raise errors.Conflict(f"{path} was changed while it was read", hint="run the command again")


def _taker(file: IO[bytes]) -> untar.Take:
    def take(view: memoryview) -> int:
        return file.readinto(view) or 0  # type: ignore[attr-defined]

    return take


@contextlib.contextmanager
def _decompressed(path: Path, file: IO[bytes]) -> Iterator[IO[bytes]]:
    try:
        with process.output_of(_ZSTD, source=file.fileno()) as stream:
            yield stream
    except errors.HostFailed as error:
        words = str(error.facts.get("words", error))
        raise errors.Corrupt(
            f"{path} is no sound archive: {words}", hint="get a whole copy of the archive", path=str(path)
        ) from error


def _look(path: Path, state: tuple[int, int, int, int], *, hashed: bool, report: Report | None) -> Archive:
    archive = _make_folder(path, state)
    try:
        _lay_out(archive, hashed=hashed, report=report)
    except BaseException:
        archive._stack.close()  # noqa: SLF001 - of this module
        raise
    return archive


def _make_folder(path: Path, state: tuple[int, int, int, int]) -> Archive:
    """An empty folder that is this process' own, by a lock in it."""
    place = _place()
    with durable.explained(place):
        place.mkdir(mode=_FOLDER_MODE, parents=True, exist_ok=True)
    folder = place / uuid.uuid4().hex
    with _place_locked(place, wait_s=_PARENT_LOCK_S), contextlib.ExitStack() as stack:
        _sweep(place)
        stack.callback(durable.remove_folder, folder)
        for one in (folder, folder / "content"):
            durable.make_folder(one, mode=_FOLDER_MODE)
        stack.enter_context(locks.held(folder / "lock", wait_s=_PARENT_LOCK_S, what=str(path)))
        return Archive(path, state, folder / "content", _stack=stack.pop_all())


def _lay_out(archive: Archive, *, hashed: bool, report: Report | None) -> None:
    small = shown = 0
    with _opened(archive.path, archive.state, report) as reader:
        for entry in reader.entries():
            target = archive.folder / entry.name
            with durable.explained(target):
                (target if entry.is_folder else target.parent).mkdir(_FOLDER_MODE, parents=True, exist_ok=True)
            if entry.is_folder:
                continue
            is_large = _is_large(entry.name)
            small += 0 if is_large else entry.data
            if not is_large and (entry.size > _SMALL_MAX or small > _ALL_MAX):
                raise errors.Corrupt(
                    f"{entry.name} in {archive.path} has {entry.size} bytes: no such file is that long",
                    hint="name an archive that hvmgr export made",
                )
            shown += min(entry.data, _head_of(target) + _TAIL) if is_large else 0
            if shown > _SHOWN_MAX:
                raise errors.Corrupt(
                    f"{archive.path} holds more images than any export", hint="unpack it, and name the folder"
                )
            digest = _show(reader, entry, target, hashed=hashed or not is_large)
            archive.members[entry.name] = Member(entry.size, entry.data, digest)


def _is_large(name: str) -> bool:
    """Whether only the ends of a file are laid out: an image, or saved memory."""
    parts = PurePosixPath(name).parts[-3:]
    is_image = len(parts) > 1 and (parts[-2] == BASES or (len(parts) > 2 and parts[0] == SNAPSHOTS))
    return parts[-1] == MEMORY or (is_image and parts[-1] != "nvram")


def _show(reader: untar.Reader, entry: untar.Entry, target: Path, *, hashed: bool) -> str | None:
    """The file, or what is shown of it; its hash when that is wanted."""
    is_large, digest = _is_large(entry.name), copy.Digest() if hashed else None
    head = _head_of(target) if is_large else entry.size
    tail = entry.size - _TAIL
    with durable.explained(target), target.open("xb", buffering=0) as file:
        os.fchmod(file.fileno(), _FILE_MODE)
        _set_size(file.fileno(), entry)
        for offset, piece in reader.pieces():
            if digest is not None:
                digest.update(offset, piece)
            if offset < head or offset + len(piece) > tail:
                copy.write_data(file.fileno(), offset, piece)
    return None if digest is None else digest.finish(entry.size)


def _set_size(descriptor: int, entry: untar.Entry) -> None:
    try:
        os.ftruncate(descriptor, entry.size)
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
        raise errors.Unsupported(
            f"{entry.name} has {entry.size} bytes, and no file in {_place()} can be that long",
            hint="unpack the archive where it can, and name the folder",
        ) from error


def _head_of(target: Path) -> int:
    if target.name == MEMORY:
        return _HEAD_OF_MEMORY
    return _HEAD_OF_VHD if target.suffix in (".vhd", ".avhd") else _HEAD


def _digest(reader: untar.Reader, size: int) -> str:
    digest = copy.Digest()
    for offset, piece in reader.pieces():
        digest.update(offset, piece)
    return digest.finish(size)


def _unpack(reader: untar.Reader, size: int, target: Path, owner: tuple[int, int] | None) -> str:
    digest = copy.Digest()
    part = durable.part_of(target)
    with durable.explained(target), durable.replacing(target, 0o600, owner, part=part) as writer:
        os.ftruncate(writer, size)
        behind = WriteBehind(writer)
        for offset, piece in reader.pieces():
            digest.update(offset, piece)
            copy.write_data(writer, offset, piece)
            behind.wrote(offset, len(piece))
    return digest.finish(size)


def recorded(folder: Path) -> dict[str, str]:
    """The hashes that the export's own list gives its files, by name; none when there is no list, or no sound one."""
    try:
        text = (folder / manifest.SUMS).read_text("utf-8", "surrogateescape")
        return dict(map(manifest.read_sum, text.splitlines()))
    except (OSError, ValueError):
        return {}
