"""How a new disk is divided: a partition table, what boots it, and one volume over the rest. Pure arithmetic.

All partitions begin at whole MiB, as Windows and Linux lay them. Places and sizes are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from hvmgr import errors, units

_SECTOR = 512
_GPT_END = 33 * _SECTOR  # the second copy of the table
_MBR_MAX = 2 * units.TIB
_MSR_SIZE = 16 * units.MIB
_ESP_MIN = 34 * units.MIB  # FAT32 has 65525 clusters at least
ESP_SIZE = 260 * units.MIB  # enough for disks with sectors of 4 KiB, too


class TableKind(StrEnum):
    """What stands at the head of a disk."""

    GPT = "gpt"
    MBR = "mbr"
    NONE = "none"  # the volume is the whole disk


class FileSystem(StrEnum):
    """What a volume can be formatted with."""

    NTFS = "ntfs"
    EXT4 = "ext4"
    FAT32 = "fat32"
    XFS = "xfs"
    BTRFS = "btrfs"


class Role(StrEnum):
    """What a partition is for."""

    ESP = "esp"
    MSR = "msr"
    MAIN = "main"


# The longest label, in bytes (NTFS: UTF-16 units), and the least size of a volume.
_LABELS = {FileSystem.NTFS: 128, FileSystem.EXT4: 16, FileSystem.FAT32: 11, FileSystem.XFS: 12, FileSystem.BTRFS: 255}
_LEAST = {
    FileSystem.NTFS: 4 * units.MIB, FileSystem.EXT4: 4 * units.MIB, FileSystem.FAT32: _ESP_MIN,
    FileSystem.XFS: 300 * units.MIB, FileSystem.BTRFS: 128 * units.MIB,
}  # fmt: skip

_GPT_TYPES = {
    Role.ESP: "C12A7328-F81F-11D2-BA4B-00A0C93EC93B",
    Role.MSR: "E3C9E316-0B5C-4DB8-817D-F92DF00215AE",
}
_GPT_DATA = "EBD0A0A2-B9E5-4433-87C0-68B6B72699C7"
_GPT_LINUX = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
_MBR_DATA = {FileSystem.NTFS: "7", FileSystem.FAT32: "c"}
_NAMES = {Role.ESP: "EFI system partition", Role.MSR: "Microsoft reserved partition"}


@dataclass(frozen=True, slots=True)
class LayoutWish:
    """How a disk is wanted: its table, an EFI system partition of this size or none, Microsoft's reserved one, the volume."""

    file_system: FileSystem
    table: TableKind = TableKind.GPT
    label: str = ""
    esp: int | None = None
    msr: bool = False


@dataclass(frozen=True, slots=True)
class Volume:
    """One partition to be; ``number`` is 0 when it is the whole disk, ``file_system`` None where nothing is formatted."""

    number: int
    role: Role
    start: int
    size: int
    file_system: FileSystem | None
    label: str = ""

    def describe(self) -> str:
        what = "reserved for Windows" if self.file_system is None else f"{self.file_system.value}"
        label = f" '{self.label}'" if self.label else ""
        return f"{what}{label}, {units.format_size(self.size)}"


@dataclass(frozen=True, slots=True)
class Layout:
    """A disk's table and volumes, in the order in which they lie."""

    table: TableKind
    volumes: tuple[Volume, ...]

    @property
    def main(self) -> Volume:
        """The volume over the rest of the disk."""
        return self.volumes[-1]

    def script(self) -> str:
        """The table in the words of sfdisk."""
        lines = [f"label: {'gpt' if self.table is TableKind.GPT else 'dos'}", "unit: sectors"]
        for one in self.volumes:
            words = [f"start={one.start // _SECTOR}", f"size={one.size // _SECTOR}", f"type={self._type(one)}"]
            if self.table is TableKind.GPT:
                words += [f'name="{_NAMES[one.role]}"'] if one.role in _NAMES else []
            elif one.role is Role.MAIN:
                words.append("bootable")
            lines.append(", ".join(words))
        return "\n".join(lines) + "\n"

    def _type(self, one: Volume) -> str:
        if self.table is TableKind.MBR:
            return "ef" if one.role is Role.ESP else _MBR_DATA.get(one.file_system or FileSystem.EXT4, "83")
        is_windows = one.file_system in (FileSystem.NTFS, FileSystem.FAT32)
        return _GPT_TYPES.get(one.role) or (_GPT_DATA if is_windows else _GPT_LINUX)


def laid_out(wish: LayoutWish, size: int) -> Layout:
    """The layout of a disk of ``size`` bytes; UsageError or Unsupported where it does not fit."""
    require_label(wish.file_system, wish.label)
    if wish.table is TableKind.NONE:
        if wish.esp is not None or wish.msr:
            raise errors.UsageError(
                "a disk without a partition table has no further partitions", hint="use --table gpt"
            )
        whole = Volume(0, Role.MAIN, 0, size // _SECTOR * _SECTOR, wish.file_system, wish.label)
        _require_room(whole, size)
        return Layout(wish.table, (whole,))
    if wish.table is TableKind.MBR and size > _MBR_MAX:
        raise errors.Unsupported(
            f"an MBR reaches no further than {units.format_size(_MBR_MAX)}, and the disk has {units.format_size(size)}",
            hint="use --table gpt",
        )
    if wish.msr and wish.table is TableKind.MBR:
        raise errors.UsageError(
            "only a GPT has a reserved partition of Microsoft's", hint="use --table gpt, or no --msr"
        )
    return Layout(wish.table, tuple(_partitions(wish, size)))


def require_label(file_system: FileSystem, label: str) -> None:
    """Refuses a label that the file system cannot hold."""
    length = len(label.encode("utf-16-le")) // 2 if file_system is FileSystem.NTFS else len(label.encode())
    if length > _LABELS[file_system]:
        raise errors.UsageError(
            f"'{label}' is too long for a label of {file_system.value}: at most {_LABELS[file_system]} bytes"
        )
    if not label.isprintable() or (file_system is FileSystem.FAT32 and not label.isascii()):
        raise errors.UsageError(f"{label!r} is no label", hint="use printable characters (FAT32: ASCII)")


def _partitions(wish: LayoutWish, size: int) -> list[Volume]:
    found: list[Volume] = []
    at = units.MIB
    if wish.esp is not None:
        if wish.esp < _ESP_MIN:
            raise errors.UsageError(
                f"an EFI system partition of {units.format_size(wish.esp)} is too small for FAT32",
                hint=f"give it {units.format_size(_ESP_MIN)} or more; {units.format_size(ESP_SIZE)} are usual",
            )
        esp = -(-wish.esp // units.MIB) * units.MIB
        found.append(Volume(1, Role.ESP, at, esp, FileSystem.FAT32, "ESP"))
        at += esp
    if wish.msr:
        found.append(Volume(len(found) + 1, Role.MSR, at, _MSR_SIZE, None))
        at += _MSR_SIZE
    end = (size - (_GPT_END if wish.table is TableKind.GPT else 0)) // units.MIB * units.MIB
    main = Volume(len(found) + 1, Role.MAIN, at, end - at, wish.file_system, wish.label)
    _require_room(main, size)
    return [*found, main]


def _require_room(main: Volume, size: int) -> None:
    assert main.file_system is not None
    if main.size < _LEAST[main.file_system]:
        raise errors.UsageError(
            f"a disk of {units.format_size(size)} is too small for that: {units.format_size(max(0, main.size))} would be "
            f"left, and {main.file_system.value} needs {units.format_size(_LEAST[main.file_system])}",
            hint="make a larger image",
        )
