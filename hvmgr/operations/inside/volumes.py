"""Which file system of a VM is meant: of all that lies on its disks the one that was named, or the only one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hvmgr import errors
from hvmgr.operations.inside import views
from hvmgr.storage.filesystems.signatures import Kind

if TYPE_CHECKING:
    from hvmgr.operations.inside.views import Frozen, Volume

_FIRMWARE = ("ef", "c12a7328-f81f-11d2-ba4b-00a0c93ec93b")  # the EFI system partition
_NAMES = {Kind.LUKS: "LUKS", Kind.BITLOCKER: "BitLocker", Kind.LVM: "LVM", Kind.SWAP: "swap space"}
_PACKED = {
    Kind.LUKS: "is encrypted with LUKS",
    Kind.BITLOCKER: "is encrypted with BitLocker",
    Kind.LVM: "is a physical volume of LVM, not a file system",
    Kind.SWAP: "is swap space, not a file system",
}


def choose(disks: Sequence[Frozen], partition: int | None) -> Volume:
    """The volume that is meant. UsageError where it has to be said, NotFound for a partition that is not there.

    Unsupported for what is no file system that is known: encrypted, LVM, swap space, nothing at all.
    """
    found: list[Volume] = []
    for disk in disks:
        with views.opened(disk) as source:
            found += views.volumes(disk, source)
    if partition is not None:
        named = [one for one in found if one.number == partition]
        if not named:
            raise errors.NotFound(f"there is no partition {partition}", hint=f"there is: {_list(found)}")
        found = named
    held = [one for one in found if one.kind is not None and one.kind.holds_files]
    if len(held) > 1:
        held = [one for one in held if one.type.lower() not in _FIRMWARE] or held
    if len(held) > 1:
        raise errors.UsageError(
            f"there are {len(held)} file systems: {_list(held)}",
            hint="say which one with --disk SLOT and --partition N",
        )
    if held:
        return held[0]
    raise _nothing(found)


def size_of(volume: Volume) -> int:
    """The size of the whole disk that a volume lies on, in bytes."""
    with views.opened(volume.disk) as source:
        return source.size


def _nothing(found: Sequence[Volume]) -> errors.HvmgrError:
    packed = [one for one in found if one.kind in _PACKED]
    packed.sort(key=lambda one: not (one.kind is not None and one.kind.is_encrypted))
    if packed and packed[0].kind is not None:
        one = packed[0]
        return errors.Unsupported(
            f"{one.title} {_PACKED[packed[0].kind]}",
            hint="attach the disk, and open it with the host's own tools: hvmgr image attach --read-only",
        )
    return errors.Unsupported(
        f"no file system that hvmgr knows is on {_list(found)}",
        hint="known are ext2-4, XFS, Btrfs, NTFS, FAT, exFAT, ISO 9660",
    )


def _list(found: Sequence[Volume]) -> str:
    return ", ".join(f"{one.title} ({_kind(one)})" for one in found)


def _kind(one: Volume) -> str:
    kind = "nothing known" if one.kind is None else _NAMES.get(one.kind, one.kind.value)
    return f"{kind}, '{one.label}'" if one.label else kind
