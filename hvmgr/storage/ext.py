"""Files of an ext2, ext3 or ext4 at rest, by their paths: as a boot loader sees them, links followed within the file system.

The bytes are read by ``filesystems/ext``. A journal that waits to be played back is a Conflict here: GRUB does not replay it.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator

from hvmgr import errors
from hvmgr.storage.filesystems.ext import Ext
from hvmgr.storage.filesystems.reader import Node, Type, whole
from hvmgr.storage.filesystems.window import Window
from hvmgr.storage.partitions import Disk as Disk  # noqa: PLC0414 - part of what this module gives

_SUPER, _SUPER_SIZE, _JOURNAL_WAITS = 1024, 1024, 0x4
_LINKS_MAX = 40
_FILE_MAX = 512 << 20  # nobody reads more than a kernel and its initramfs


def is_ext(disk: Disk, start: int = 0) -> bool:
    """Whether such a file system begins there."""
    return start + _SUPER + _SUPER_SIZE <= disk.size and _bytes(disk, start + _SUPER + 56, 2) == b"\x53\xef"


class FileSystem:
    """A file system that begins at byte ``start`` of a disk; ``what`` names it in sentences."""

    def __init__(self, disk: Disk, start: int, what: str) -> None:
        self.what = what
        if not is_ext(disk, start):
            raise errors.Unsupported(f"{what} is not ext2, ext3 or ext4")
        (features,) = struct.unpack("<I", _bytes(disk, start + _SUPER + 96, 4))
        if features & _JOURNAL_WAITS:
            raise errors.Conflict(
                f"{what} was not unmounted cleanly", hint="start it once as a VM, and shut the system in it down"
            )
        with self._named():
            self._reader = Ext(Window(disk, start, disk.size - start))

    def listing(self, path: str) -> list[str]:
        """The names in a folder, sorted; none where there is no such folder."""
        with self._named():
            node = self._find(path)
            return [] if node is None or not node.is_folder else sorted(self._entries(node))

    def exists(self, path: str) -> bool:
        """Whether there is such a file or folder, links followed."""
        with self._named():
            return self._find(path) is not None

    def read(self, path: str) -> bytes | None:
        """The bytes of a file, links followed; None where there is none."""
        with self._named():
            node = self._find(path)
            if node is None or node.type is not Type.FILE:
                return None
            return whole(self._reader.content(node), _FILE_MAX)

    def _find(self, path: str) -> Node | None:
        parts, trail = _parts(path), [self._reader.root()]
        links = 0
        while parts:
            name = parts.pop(0)
            if not trail[-1].is_folder:
                return None
            if name == "..":
                trail = trail[:-1] or trail
                continue
            ref = self._entries(trail[-1]).get(name)
            if ref is None:
                return None
            found = self._reader.stat(ref)
            if found.type is not Type.LINK:
                trail.append(found)
                continue
            links += 1
            if links > _LINKS_MAX:
                return None
            # Texts of a link lead within the file system only, whatever they say.
            text = (found.target or b"").decode("utf-8", "surrogateescape")
            parts = [*_parts(text), *parts]
            trail = trail[:1] if text.startswith("/") else trail
        return trail[-1]

    def _entries(self, folder: Node) -> dict[str, object]:
        names = ((name.decode("utf-8", "surrogateescape"), ref) for name, ref in self._reader.names(folder))
        return {name: ref for name, ref in names if name not in {".", ".."}}

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Errors name the file system."""
        try:
            yield
        except errors.Corrupt as error:
            hint = "check it in the system itself, with e2fsck"
            raise errors.Corrupt(f"{self.what}: {error.message}", hint=hint) from error
        except errors.Unsupported as error:
            raise errors.Unsupported(f"{self.what}: {error.message}", hint=error.hint) from error


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in {"", "."}]


def _bytes(disk: Disk, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    disk.read_into(offset, memoryview(buffer))
    return bytes(buffer)
