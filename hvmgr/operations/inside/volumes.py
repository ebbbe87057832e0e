"""Which file system of a VM is meant: of all that lies on its disks the one that was named, or the only one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hvmgr import errors
from hvmgr.host.image_export import VOLUME, Link
from hvmgr.operations.inside import looking, serving, views
from hvmgr.operations.inside.unlocking import Key
from hvmgr.operations.inside.views import Frozen, Volume
from hvmgr.storage.filesystems.signatures import Kind

_FIRMWARE = ("ef", "c12a7328-f81f-11d2-ba4b-00a0c93ec93b")  # the EFI system partition
_NAMES = {
    Kind.LUKS: "LUKS",
    Kind.BITLOCKER: "BitLocker",
    Kind.LVM: "LVM",
    Kind.SWAP: "swap space",
    Kind.SWSUSPEND: "a system that sleeps",
    Kind.RAID: "a part of an array",
}


@dataclass(frozen=True, slots=True)
class Chosen:
    """The volume that is meant, and how others come by its bytes: by the ``links`` of a chain, or by one link that is served.

    ``text`` describes what is to be served (``serving``), ``number`` is the partition on the disk that the links show.
    """

    volume: Volume
    images: tuple[Link, ...]
    text: bytes = field(default=b"", repr=False)

    @property
    def links(self) -> tuple[Link, ...]:
        """What a storage daemon opens, top first."""
        return (Link(self.images[0].path, VOLUME),) if self.text else self.volume.disk.links

    @property
    def number(self) -> int | None:
        """The partition; None where the links show the volume alone."""
        return None if self.text else self.volume.number

    @property
    def start(self) -> int:
        """Where the volume begins on what the links show."""
        return 0 if self.text else self.volume.start

    @property
    def size(self) -> int:
        """Of all that the links show, in bytes."""
        return self.volume.size if self.text else size_of(self.volume)


def choose(disks: Sequence[Frozen], partition: str | None, keys: Sequence[Key] = ()) -> Chosen:
    """The volume that is meant. UsageError where it has to be said, NotFound for a partition that is not there.

    Unsupported for what is no file system that is known: encrypted, LVM, swap space, nothing at all.
    """
    with looking.opened(disks, keys=keys) as inside:
        found = inside.volumes
    if partition is not None:
        found = looking.named(found, partition)
    held = [one for one in found if one.kind is not None and one.kind.holds_files and not one.why_not]
    if len(held) > 1:
        held = [one for one in held if one.type.lower() not in _FIRMWARE] or held
    if len(held) > 1:
        raise errors.UsageError(
            f"there are {len(held)} file systems: {_list(held)}",
            hint="say which one with --disk SLOT and --partition N or GROUP/VOLUME",
        )
    if not held:
        raise _nothing(found)
    volume = held[0]
    if not (volume.logical or volume.encrypted):
        return Chosen(volume, volume.disk.links)
    images = tuple(dict.fromkeys(link for disk in disks for link in disk.links))
    return Chosen(volume, images, serving.to_text(disks, volume, keys))


def size_of(volume: Volume) -> int:
    """The size of the whole disk that a volume lies on, in bytes."""
    with views.opened(volume.disk) as source:
        return source.size


def _nothing(found: Sequence[Volume]) -> errors.HvmgrError:
    packed = [one for one in found if one.kind is not None and not one.kind.holds_files]
    packed.sort(key=lambda one: not (one.kind is not None and one.kind.is_encrypted))
    if packed:
        return errors.Unsupported(
            f"{packed[0].title} cannot be mounted: {looking.why_not(packed[0])}",
            hint="attach the disk, and open it with the host's own tools: hvmgr image attach --read-only",
        )
    broken = [one for one in found if one.why_not]
    if broken:
        return errors.Unsupported(f"{broken[0].title} cannot be mounted: {broken[0].why_not}")
    return errors.Unsupported(
        f"no file system that hvmgr knows is on {_list(found)}",
        hint="known are ext2-4, XFS, Btrfs, NTFS, FAT, exFAT, ISO 9660",
    )


def _list(found: Sequence[Volume]) -> str:
    return ", ".join(f"{one.title} ({_kind(one)})" for one in found)


def _kind(one: Volume) -> str:
    kind = "nothing known" if one.kind is None else _NAMES.get(one.kind, one.kind.value)
    return f"{kind}, '{one.label}'" if one.label else kind
