"""Which images of this host are attached, as block devices: one record for each, in the host-wide index.

A record is written before anything is done and goes when nothing of it is left, so that what a killed command or a power
cut left over is always found. Images that are attached have a user like any other: whoever freezes, merges, removes or
starts on one asks ``users``.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from hvmgr import errors, settings
from hvmgr.storage import durable, images, index, kept_images, locks
from hvmgr.storage.kept_images import Kept

# What looks at processes is imported when there is an attachment to look at: libvirt's hook waits for this module.

_NAME = "attachments"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Phase(StrEnum):
    """How far an attachment has come."""

    ATTACHING = "attaching"
    ATTACHED = "attached"
    DETACHING = "detaching"


@dataclass(frozen=True, slots=True)
class Mount:
    """What an attachment was made for: the file system on it is mounted at ``directory``.

    ``overlay`` is a throw-away image on top, which takes all writes; ``keeps_overlay`` says that a user wrote to it.
    ``kept`` is where that image went when it was kept: nothing else is left of the mount then. ``kept_in`` is its folder,
    by ``kept_images.folder``.
    """

    directory: str
    title: str
    file_system: str
    vm: str | None = None
    snapshot: str | None = None
    slot: str | None = None
    partition: int | None = None
    logical: str | None = None  # the name of a logical volume
    encrypted: bool = False  # it was opened with a key, which is noted nowhere
    writable: bool = False
    by_user: bool = False  # by FUSE alone, without a device
    overlay: str | None = None
    kept: str | None = None
    kept_in: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Attachment:
    """An image as a block device; ``images`` are all of its chain, top first, ``processes`` (pid, start time)."""

    id: str
    path: str
    format: str
    read_only: bool
    images: tuple[str, ...]
    folder: str
    boot: str
    since: str
    phase: Phase = Phase.ATTACHING
    reason: str | None = None  # why it is read-only, where nobody asked for that
    size: int = 0
    device: str | None = None
    life: str | None = None  # which use of the device it is, as ``loop.life_of`` tells
    processes: tuple[tuple[int, int], ...] = ()
    file: tuple[int, int] = (0, 0)  # device and inode of the image when it was attached
    mount: Mount | None = None

    @property
    def is_in_place(self) -> bool:
        """Whether the image is still the file that its path leads to."""
        try:
            return images.identity(Path(self.path)) == self.file
        except OSError:
            return False

    @property
    def is_alive(self) -> bool:
        """Whether everything that makes it work is there."""
        from hvmgr.host import image_export, loop, pids

        runs = (
            self.phase is Phase.ATTACHED
            and self.boot == boot_id()
            and all(pids.is_running(*one) for one in self.processes)
        )
        if self.mount is not None and self.mount.by_user:
            return runs
        return (
            runs
            and self.device is not None
            and loop.backing(Path(self.device)) == str(image_export.file_of(Path(self.folder)))
        )

    @property
    def kept(self) -> Kept:
        """Whether the image that was kept of a mount needs the images below it."""
        if self.mount is None or self.mount.kept is None:
            return Kept.NEEDS_NOTHING
        return kept_images.look(Path(self.mount.kept), self.mount.kept_in, self.images)

    @property
    def holds_images(self) -> bool:
        """Whether a process may still read or write its images, or what was written on top of them needs them unchanged."""
        from hvmgr.host import image_export

        if self.mount is not None and self.mount.kept is not None:
            return self.kept is not Kept.NEEDS_NOTHING
        if self.mount is not None and self.mount.writable:
            return self.mount.overlay is not None and Path(self.mount.overlay).exists()
        return self.boot == boot_id() and bool(image_export.processes(Path(self.folder)))


def boot_id() -> str:
    """This start of the host."""
    return _BOOT_ID.read_text().strip()


def all_records() -> list[Attachment]:
    """Every record, the oldest first, left-over ones too; one that cannot be understood is skipped."""
    folder = settings.index_folder() / _NAME
    found = [_read(file) for file in folder.glob("*.json")] if folder.is_dir() else []
    return sorted((one for one in found if one is not None), key=lambda one: (one.since, one.id))


def record_of(one: Attachment) -> Path:
    """The file of a record."""
    return settings.index_folder() / _NAME / f"{one.id}.json"


def write(one: Attachment) -> None:
    """The record says this."""
    index.make_folder(_NAME)
    durable.write_file(record_of(one), json.dumps(asdict(one)).encode())


def remove(one: Attachment) -> None:
    """There is no such attachment any more."""
    durable.remove(record_of(one))


def users(paths: Iterable[str]) -> dict[str, tuple[Attachment, ...]]:
    """For each of these images the attachments that have it open, itself or as a parent."""
    records = all_records()
    if not records:
        return {}
    by_identity = {images.identity(Path(path)): path for path in paths if Path(path).exists()}
    found: dict[str, list[Attachment]] = {}
    for record in records:
        named = [Path(path) for path in record.images if Path(path).exists()]
        ours = [by_identity[key] for key in map(images.identity, named) if key in by_identity]
        if ours and record.holds_images:
            for path in dict.fromkeys(ours):
                found.setdefault(path, []).append(record)
    return {path: tuple(records) for path, records in found.items()}


def require_free(paths: Iterable[str]) -> None:
    """Nobody builds on an image that somebody writes, or holds open, as a block device: Conflict."""
    for path, (one, *_) in users(paths).items():
        sentence, hint = use_of(one)
        raise errors.Conflict(
            f"{path} is {sentence}",
            hint=hint,
            path=path,
            device=one.device,
        )


def is_busy() -> bool:
    """Whether another command attaches, detaches or cleans up now."""
    return locks.holder(settings.index_folder() / _NAME / "lock") not in {None, os.getpid()}


def name_of(one: Attachment) -> str:
    """How an attachment is called as the user of an image."""
    if one.mount is None:
        return f"the attachment {one.device or one.id}"
    if one.mount.kept is not None:
        return f"the image {one.mount.kept}"
    return f"the mount at {one.mount.directory}"


def use_of(one: Attachment) -> tuple[str, str]:
    """What an image is to an attachment of it, to follow "is"; and the command that ends that."""
    if one.mount is None:
        return (
            f"attached as {one.device or 'a block device'}",
            f"hvmgr image detach {shlex.quote(one.device or one.path)}",
        )
    if one.mount.kept is not None:
        return f"what {one.mount.kept} stands on", f"remove {one.mount.kept}, or give it another parent first"
    return f"mounted at {one.mount.directory}", f"hvmgr unmount {shlex.quote(one.mount.directory)}"


@contextlib.contextmanager
def locked(*, wait_s: float) -> Iterator[None]:
    """One command at a time attaches, detaches or cleans up."""
    with locks.held(index.make_folder(_NAME) / "lock", wait_s=wait_s, what="attached images"):
        yield


def _read(file: Path) -> Attachment | None:
    try:
        facts = json.loads(file.read_bytes())
        facts["images"] = tuple(map(str, facts["images"]))
        facts["processes"] = tuple((int(pid), int(started)) for pid, started in facts["processes"])
        facts["file"] = (int(facts["file"][0]), int(facts["file"][1]))
        mount = facts.get("mount")
        if mount is not None and mount.get("kept_in") is not None:
            mount["kept_in"] = tuple(map(int, mount["kept_in"]))
        facts["mount"] = None if mount is None else Mount(**mount)
        return Attachment(**{**facts, "phase": Phase(facts["phase"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None
