"""The file systems of some disks at one moment, opened as they are needed; and which of them a path means.

with looking.opened(views.of_vm(vm)) as inside:
    browser = inside.choose(b"/etc/passwd")
    print(browser.find(b"/etc/passwd").node.size)
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hvmgr import errors, units
from hvmgr.operations.inside import unlocking, views
from hvmgr.operations.inside.browsing import Browser, shown
from hvmgr.operations.inside.unlocking import Key
from hvmgr.operations.inside.views import Frozen, Volume
from hvmgr.storage.filesystems import opening, window
from hvmgr.storage.filesystems.signatures import Kind
from hvmgr.storage.filesystems.window import Mapped, Window
from hvmgr.storage.partitions import Disk

if TYPE_CHECKING:
    from hvmgr.storage.filesystems.luks import Decrypted

_HINTS = {
    Kind.LUKS: unlocking.NO_KEY,
    Kind.BITLOCKER: "it is encrypted (BitLocker), and its key is only in the guest",
    Kind.SWAP: "it is swap space",
    Kind.SWSUSPEND: "it is swap space, with the memory of a system that sleeps",
    Kind.LVM: "its logical volumes (LVM) are told on their own",
}


@dataclass(frozen=True, slots=True)
class Place:
    """A volume that lies in one piece: from ``start`` on, of the disk or of what is encrypted on it (``lock``)."""

    disk: Frozen
    start: int
    size: int
    lock: Decrypted | None = None

    def of(self, source: Disk) -> Disk:
        """The volume on the bytes of that disk, or of one that differs from it within the volume alone."""
        return Window(source if self.lock is None else self.lock.moved(source, self.lock.start), self.start, self.size)


@dataclass(slots=True)
class Inside:
    """Disks with what lies on them. ``volumes`` are all places, those that nothing can read included."""

    disks: list[Frozen]
    volumes: list[Volume]
    _places: dict[Volume, Disk | None]
    _sources: dict[int, Frozen]  # which disk it is, by the identity of its bytes
    _browsers: dict[Volume, Browser] = field(default_factory=dict)

    def bytes_of(self, volume: Volume) -> Disk:
        """The volume's own bytes; Unsupported, with the reason, where nobody can read them."""
        disk = self._places[volume]
        if disk is None:
            raise errors.Unsupported(f"{volume.title} of {volume.disk.name} cannot be read: {why_not(volume)}")
        return disk

    def browser(self, volume: Volume) -> Browser:
        """The volume's file system; Unsupported, with the reason, where there is none that can be read."""
        if volume not in self._browsers:
            disk = self.bytes_of(volume)
            opened = None if volume.kind is None or volume.why_not else opening.open_reader(volume.kind, disk)
            if opened is None:
                raise errors.Unsupported(f"{volume.title} of {volume.disk.name} cannot be read: {why_not(volume)}")
            self._browsers[volume] = Browser(volume, opened)
        return self._browsers[volume]

    @property
    def everything(self) -> list[Volume]:
        """All places of the disks, whichever partition was asked for."""
        return list(self._places)

    def place(self, volume: Volume) -> Place:
        """Where a volume lies in one piece.

        Unsupported for one that is scattered or encrypted twice, or of which there is a second copy that would not follow.
        """
        from hvmgr.storage.filesystems.luks import Decrypted

        if volume.copied:
            raise errors.Unsupported(f"{volume.title} cannot be written so: {volume.copied}", hint=_RUNNING)
        below, start, inner = self._places[volume], 0, 0
        lock: Decrypted | None = None
        while isinstance(below, Window | Mapped):
            if isinstance(below, Mapped):
                piece = below.piece
                if piece is None:
                    raise errors.Unsupported(
                        f"{volume.title} lies in several pieces, or on several disks, and cannot be written so",
                        hint=_RUNNING,
                    )
                below, start = piece[0], piece[1] + start
                continue
            self._require_alone(volume, below)
            if isinstance(below, Decrypted):
                if lock is not None:
                    raise errors.Unsupported(
                        f"{volume.title} is encrypted twice, and cannot be written so", hint=_RUNNING
                    )
                lock, inner, start = below, start, 0
            start += below.start
            below = below.disk
        if below is None:
            raise errors.Unsupported(f"{volume.title} cannot be read: {why_not(volume)}", hint=_RUNNING)
        self._require_alone(volume, below)
        disk = self._sources[id(below)]
        if lock is None:
            return Place(disk, start, volume.size)
        return Place(disk, inner, volume.size, lock.moved(below, start))

    def _require_alone(self, volume: Volume, place: Disk) -> None:
        from hvmgr.storage.filesystems import raid

        one = next((one for one, disk in self._places.items() if disk is place and not one.logical), volume)
        if raid.is_type(one.type) or raid.is_member(place):
            raise errors.Unsupported(
                f"{one.title} is a part of a RAID or of a dynamic disk, and cannot be written on its own", hint=_RUNNING
            )

    def is_placed(self, volume: Volume) -> bool:
        """Whether it is known where a volume lies."""
        return self._places[volume] is not None

    def is_blank(self, volume: Volume, size: int) -> bool:
        """Whether the first ``size`` bytes of a volume are zeros; not of one that nobody can read."""
        disk = self._places[volume]
        return disk is not None and not any(window.read(disk, 0, size))

    def parts(self, volume: Volume) -> list[tuple[str, tuple[object, int, int]]]:
        """Where a volume lies, each part with the slot of its disk; nothing of one that cannot be read.

        What is encrypted lies where it would lie in clear: a byte that nobody wrote is the same, as long as ``seals`` are.
        """
        disk = self._places[volume]
        found = [] if disk is None else window.flattened(disk)
        return [("" if one[0] is None else self._sources[id(one[0])].slot or "", one) for one in found]

    def seals(self, volume: Volume) -> frozenset[bytes]:
        """What a volume is encrypted with; the same at two moments unless it was encrypted anew in between."""
        disk = self._places[volume]
        if not volume.encrypted or disk is None:
            return frozenset()
        from hvmgr.storage.filesystems import luks

        return luks.seals(disk)

    def choose(self, path: bytes) -> Browser:
        """The file system that a path is looked for in: the only one, or the only one that has it.

        UsageError with the choice where several have it; NotFound where none has.
        """
        readable = [one for one in self.volumes if is_readable(one)]
        if not readable:
            raise self._nothing_readable()
        is_locked = any(one.kind is Kind.LUKS for one in self.volumes)
        if len(readable) == 1 and not is_locked:
            return self.browser(readable[0])
        having: list[Volume] = []
        broken: list[errors.HvmgrError] = []
        for one in readable:
            try:
                having += [one] if self.browser(one).has(path) else []
            except (errors.Corrupt, errors.Unsupported) as error:
                broken.append(error)  # the path may well be on another one
        if len(having) == 1:
            return self.browser(having[0])
        if not having and broken:
            raise broken[0]
        if not having:
            where = ", ".join(one.title for one in readable)
            others = [one for one in self.volumes if not is_readable(one) and one.kind not in _SWAP]
            more = "".join(f"; {one.title} cannot be read: {why_not(one)}" for one in others)
            raise errors.NotFound(f"there is no {shown(path)} in {where}{more}", hint=_CHOOSE)
        raise errors.UsageError(f"{shown(path)} is in {len(having)} file systems: {described(having)}", hint=_CHOOSE)

    def _nothing_readable(self) -> errors.HvmgrError:
        what = self.disks[0].name if len(self.disks) == 1 else f"{len(self.disks)} disks"
        known = [one for one in self.volumes if one.kind is not None]
        if known:
            said = "; ".join(f"{one.title}: {why_not(one)}" for one in known)
            return errors.Unsupported(f"{what} holds no file system that can be read ({said})")
        places = [one for one in self.volumes if one.number is not None]
        if places:
            return errors.Unsupported(f"nothing that is known lies on the {len(places)} partitions of {what}")
        return errors.Unsupported(f"{what} has neither a partition table nor a file system that is known", hint=_FORMAT)


_SWAP = {None, Kind.SWAP, Kind.SWSUSPEND}
_RUNNING = "start the VM: file restore --to running"
_FORMAT = "let the guest, or 'hvmgr image prepare' on an image of its own, make a file system there first"
_CHOOSE = "choose one with --disk SLOT and --partition N or GROUP/VOLUME; all of them: hvmgr file list without a path"


def is_readable(volume: Volume) -> bool:
    """Whether there is a reader for what lies there."""
    return volume.kind in opening.READABLE and not volume.why_not


def why_not(volume: Volume) -> str:
    """Why a volume has no files for us."""
    if volume.why_not:
        return volume.why_not
    if volume.kind is None:
        return "nothing that is known lies there"
    return _HINTS.get(volume.kind) or f"no reader here knows {volume.kind.value}"


def described(volumes: Sequence[Volume]) -> str:
    """Volumes in a sentence."""
    return ", ".join(
        f"{one.title} ({' '.join(filter(None, (one.kind and one.kind.value, one.label, units.format_size(one.size))))})"
        for one in volumes
    )


def named(volumes: Sequence[Volume], partition: str) -> list[Volume]:
    """Those that are meant by a number or a name; NotFound, with the choice, where none is."""
    found = [one for one in volumes if one.is_meant(partition)]
    if not found:
        there = described(volumes) or "none"
        raise errors.NotFound(f"there is no partition {partition}", hint=f"there are: {there}")
    return found


@contextlib.contextmanager
def opened(disks: Sequence[Frozen], *, partition: str | None = None, keys: Sequence[Key] = ()) -> Iterator[Inside]:
    """The disks with all their volumes, or with those of a number or with the name ``GROUP/VOLUME`` only.

    What is encrypted is opened with the ``keys``. NotFound when no disk has such a partition.
    """
    with contextlib.ExitStack() as stack:
        places: dict[Volume, Disk | None] = {}
        sources: dict[int, Frozen] = {}
        for disk in disks:
            source = stack.enter_context(views.opened(disk))
            sources[id(source)] = disk
            places |= {one: views.window(one, source) for one in views.volumes(disk, source)}
        number = partition if partition is not None and partition.isdigit() else None
        places = unlocking.unlocked(places, keys, number)
        good, bad = _physical(places)
        places = {dataclasses.replace(one, why_not=bad[one]) if one in bad else one: at for one, at in places.items()}
        places |= unlocking.unlocked(dict(_logical(good)), keys, number)
        volumes = list(places)
        unlocking.check(volumes, keys)
        if partition is not None:
            volumes = named(volumes, partition)
        yield Inside(list(disks), volumes, places, sources)


def _physical(places: Mapping[Volume, Disk | None]) -> tuple[dict[Volume, Disk], dict[Volume, str]]:
    """The physical volumes (LVM) that can be read; and those whose metadata is damaged, with what is wrong."""
    windows = {one: disk for one, disk in places.items() if one.kind is Kind.LVM and disk is not None}
    bad: dict[Volume, str] = {}
    if not windows:
        return {}, bad
    from hvmgr.storage.filesystems import lvm

    for one, disk in windows.items():
        try:
            lvm.volumes([disk])
        except errors.Corrupt as error:
            bad[one] = error.message  # what lies on the others can be read all the same
    good = {one: disk for one, disk in windows.items() if one not in bad}
    try:
        lvm.volumes(list(good.values()))
    except errors.Corrupt as error:  # they are sound, and make no sense together
        return {}, bad | dict.fromkeys(good, error.message)
    return good, bad


def _logical(physical: Mapping[Volume, Disk]) -> Iterator[tuple[Volume, Disk | None]]:
    """The logical volumes of all physical ones: encrypted where one of their group's is, for parts may lie there."""
    if not physical:
        return
    from hvmgr.storage.filesystems import lvm, signatures

    first = next(iter(physical)).disk
    encrypted = {id(disk) for one, disk in physical.items() if one.encrypted}
    for one in lvm.volumes(list(physical.values())):
        why_not = one.why
        try:
            found = None if one.disk is None else signatures.recognise(one.disk)
        except errors.Corrupt as error:
            found, why_not = None, error.message
        kind, label, uuid = (None, "", one.uuid) if found is None else (found.kind, found.label, found.uuid)
        is_encrypted = any(id(disk) in encrypted for disk in one.physical)
        volume = Volume(first, None, 0, one.size, kind, label, uuid, "lvm", one.name, one.name, why_not)
        yield dataclasses.replace(volume, copied=one.copied, encrypted=is_encrypted), one.disk
