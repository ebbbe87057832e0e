"""What an image file says of itself: format, size, parent. Read from the header alone, in microseconds.

qcow2: docs/interop/qcow2.txt of QEMU. VHD: "Virtual Hard Disk Image Format Specification" 1.0. The formats are told by
their magic numbers where nobody states them, and never guessed for a file that was stated to have another one.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

from hvmgr import errors

QCOW2 = "qcow2"
RAW = "raw"
VPC = "vpc"

_QCOW2_MAGIC = b"QFI\xfb"
_QCOW2_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")  # up to snapshots_offset
_QCOW2_V3 = struct.Struct(">QQQII")  # incompatible, compatible, autoclear, refcount_order, header_length
_QCOW2_SNAPSHOT = struct.Struct(">QIHHIIQII")  # one of the table, up to its extra data
_SNAPSHOTS_MAX, _SNAPSHOT_EXTRA_MAX = 65536, 64 << 10  # QEMU takes no more of them, and 1 KiB of extra data
_VERSION_3 = b"\0\0\0\3"
_INCOMPATIBLE_CORRUPT = 1 << 1
_INCOMPATIBLE_DATA_FILE = 1 << 2
_EXTENSION_END = 0
_EXTENSION_BACKING_FORMAT = 0xE2792ACA
_HEADER_READ = 4 << 10  # QEMU writes the parent's name directly behind the header; it may be anywhere in the first ...
_HEADER_MAX = 64 << 10  # ... cluster

_SECTOR = 512
_VHD_COOKIE = b"conectix"
_VHD_FOOTER = struct.Struct(">8sIIQI4sI4sQQHBBII16sB427s")
_VHD_DYNAMIC, _VHD_DIFFERENCING, _VHD_FIXED = 3, 4, 2
# QEMU takes the footer's size only from these creators, and from any with the largest geometry; else it takes CHS.
_VHD_EXACT_CREATORS = (b"win ", b"qem2", b"d2v ", b"tap\0", b"CTXS")
_VHD_LARGEST = 65535 * 16 * 255
_VHD_HEADERS = 512 + 1024  # the footer's copy and the dynamic header, at the start of a dynamic VHD
_VHD_PARENT_NAME = slice(64, 576)  # in the dynamic header

_FOREIGN_MAGICS = ((b"vhdxfile", "VHDX"), (b"KDMV", "VMDK"), (b"<<< ", "VDI"), (b"LUKS", "LUKS"), (b"QED\0", "QED"))


@dataclass(frozen=True, slots=True)
class Identity:
    """What a file is by its content: ``format`` in hvmgr's words (raw when it is nothing else).

    ``parent`` is the parent's name as a differencing VHD or VHDX, which QEMU must never open, stores it; else None.
    """

    format: str
    is_differencing: bool = False
    parent: str | None = None


@dataclass(frozen=True, slots=True)
class Header:
    """What the guest would see of one image: ``size`` in bytes; ``backing`` as it is written in the file."""

    path: Path
    format: str
    size: int
    backing: str | None
    backing_format: str | None
    data: int
    identity: tuple[int, int]
    has_internal_snapshots: bool = False

    @property
    def parent(self) -> Path | None:
        """The parent's absolute path, symbolic links resolved."""
        if self.backing is None:
            return None
        return Path(os.path.realpath(self.path.parent / self.backing))


@dataclass(frozen=True, slots=True)
class InternalSnapshot:
    """One snapshot inside a qcow2 image; ``disk_size`` is None in old ones, ``state_size`` 0 without memory."""

    id: str
    name: str
    created_ns: int
    state_size: int
    disk_size: int | None


def identity(path: Path) -> tuple[int, int]:
    """Device and inode: what an image is, whatever its path."""
    return _identity(path.stat())


def _identity(facts: os.stat_result) -> tuple[int, int]:
    if stat.S_ISBLK(facts.st_mode):
        return (-1, facts.st_rdev)
    return (facts.st_dev, facts.st_ino)


def identify(path: Path) -> Identity:
    """What a file is, by its content alone: neither its name nor QEMU's guess counts. Cheap; for everybody.

    A VHD is one whose last 512 bytes, or whose first, are its footer.
    """
    head, size, _ = _head(path)
    if head.startswith(_QCOW2_MAGIC):
        return Identity(QCOW2)
    for magic, name in _FOREIGN_MAGICS:
        if head.startswith(magic):
            return _identify_vhdx(path) if name == "VHDX" else Identity(name.lower())
    footer = _vhd_footer(path, head, size)
    if footer is None:
        return Identity(RAW)
    is_differencing = _VHD_FOOTER.unpack(footer)[13] == _VHD_DIFFERENCING
    return Identity("vhd", is_differencing, _vhd_parent(path, footer) if is_differencing else None)


def require_usable(path: Path) -> None:
    """Unsupported for a differencing VHD or VHDX, whatever somebody states that it is: QEMU would show other bytes.

    A file that is not there or cannot be read is nobody's concern here.
    """
    if not path.is_file() and not path.is_block_device():  # whoever opens a pipe waits for its other end
        return
    try:
        found = identify(path)
    except (errors.NotFound, errors.HostFailed, errors.Corrupt):
        return
    if found.is_differencing:
        raise _differencing(path, found)


def _differencing(path: Path, found: Identity) -> errors.Unsupported:
    name = found.format.upper()
    below = f" of {found.parent}" if found.parent else ""
    why = "QEMU would read zeros in place of its parent's data" if name == "VHD" else "QEMU cannot read its parent"
    way = (
        f"convert it with its parents: hvmgr image convert {shlex.quote(str(path))} NEW.qcow2"
        if name == "VHD"
        else "merge it into its parent on Windows (Merge-VHD), then convert the result"
    )
    return errors.Unsupported(
        f"{path} is a differencing {name}{below}; {why}", hint=way, path=str(path), parent=found.parent
    )


def _identify_vhdx(path: Path) -> Identity:
    from hvmgr.storage import vhdx  # rarely met

    facts = vhdx.read(path)
    return Identity("vhdx", facts.is_differencing, facts.parent)


def probe(path: Path) -> str:
    """QEMU's word for the format, by the file's content; raises Unsupported for one that hvmgr cannot run on."""
    found = identify(path)
    if found.format in (QCOW2, RAW):
        return found.format
    if found.format == "vhd":
        return VPC
    if found.is_differencing:
        raise _differencing(path, found)
    raise errors.Unsupported(f"{path} is a {found.format.upper()} image", hint=_convert_hint(path, found.format))


def _convert_hint(path: Path, fmt: str) -> str:
    if fmt in ("vhdx", VPC):
        return f"convert it: hvmgr image convert {shlex.quote(str(path))} NEW.qcow2"
    return f"convert it: qemu-img convert -f {fmt} -O qcow2 {shlex.quote(str(path))} NEW.qcow2"


def read(path: Path, fmt: str) -> Header:
    """The header of an image of the stated format; raises NotFound, Corrupt or Unsupported."""
    if fmt == QCOW2:
        return _read_qcow2(path)
    if fmt == VPC:
        return _read_vhd(path)
    if fmt == RAW:
        head, size, facts = _head(path)
        if head.startswith((_VHD_COOKIE, b"vhdxfile")):
            require_usable(path)  # stated as raw, its container would be the guest's disk
        return _plain(path, RAW, -(-size // _SECTOR) * _SECTOR, facts)  # QEMU fills the last sector up with zeros
    require_usable(path)
    raise errors.Unsupported(f"{path} has the format {fmt}", hint=_convert_hint(path, fmt))


def internal_snapshots(path: Path) -> tuple[InternalSnapshot, ...]:
    """The snapshots inside a qcow2 image, in the order of its table."""
    head, _, _ = _head(path)
    if not head.startswith(_QCOW2_MAGIC) or len(head) < _QCOW2_HEADER.size:
        return ()
    count, offset = _QCOW2_HEADER.unpack_from(head)[11:13]
    found: list[InternalSnapshot] = []
    if count > _SNAPSHOTS_MAX:
        raise errors.Corrupt(f"{path} says that it holds {count} internal snapshots", path=str(path))
    with path.open("rb") as file:
        for _ in range(count):
            file.seek(offset)
            entry = file.read(_QCOW2_SNAPSHOT.size)
            if len(entry) < _QCOW2_SNAPSHOT.size:
                raise errors.Corrupt(f"{path} has a cut off table of internal snapshots", path=str(path))
            _, _, id_length, name_length, seconds, nanoseconds, _, state, extra = _QCOW2_SNAPSHOT.unpack(entry)
            if extra > _SNAPSHOT_EXTRA_MAX:
                raise errors.Corrupt(f"{path} has a damaged table of internal snapshots", path=str(path))
            more, words = file.read(extra), file.read(id_length + name_length)
            state, size = struct.unpack_from(">QQ", more) if extra >= 16 else (state, None)
            found.append(
                InternalSnapshot(
                    id=words[:id_length].decode(errors="replace"),
                    name=words[id_length:].decode(errors="replace"),
                    created_ns=seconds * 1_000_000_000 + nanoseconds,
                    state_size=state,
                    disk_size=size,
                )
            )
            offset += (_QCOW2_SNAPSHOT.size + extra + id_length + name_length + 7) // 8 * 8
    return tuple(found)


def fingerprint(path: Path) -> str | None:
    """A hash of all that the header says, which no write of data inside the image changes; None where there is none.

    qcow2: the header, its extensions, the parent's name. VHD: both footers and the dynamic header. raw: None.
    """
    head, size, _ = _head(path)
    if head.startswith(_QCOW2_MAGIC) and len(head) >= _QCOW2_HEADER.size:
        said = _qcow2_header(path, head)
    else:
        footer = _vhd_footer_at_end(path, size)
        if footer is None and not head.startswith(_VHD_COOKIE):
            return None
        said = (head[:_VHD_HEADERS] if head.startswith(_VHD_COOKIE) else b"") + (footer or b"")
    return hashlib.sha256(said).hexdigest()


def _qcow2_header(path: Path, head: bytes) -> bytes:
    """The bytes of a header up to the end of what it says; as many as there are when it is damaged."""
    fields = _QCOW2_HEADER.unpack_from(head)
    backing_end = fields[2] + fields[3] if fields[2] else 0
    position = _QCOW2_V3.unpack_from(head, 72)[4] if fields[1] >= 3 and len(head) >= 104 else 72
    whole, _, _ = _head(path, _HEADER_MAX)
    while position + 8 <= len(whole):
        kind, length = struct.unpack_from(">II", whole, position)
        position += 8
        if kind == _EXTENSION_END:
            break
        position += (length + 7) // 8 * 8
    return whole[: max(position, backing_end)]


def _plain(path: Path, fmt: str, size: int, facts: os.stat_result) -> Header:
    return Header(path, fmt, size, None, None, _allocated(facts), _identity(facts))


def _read_qcow2(path: Path) -> Header:
    head, _, facts = _head(path)
    is_short = len(head) < _QCOW2_HEADER.size + (_QCOW2_V3.size if head[4:8] == _VERSION_3 else 0)
    if is_short or not head.startswith(_QCOW2_MAGIC):
        raise errors.Corrupt(f"{path} is no qcow2 image", hint="see what it is with: qemu-img info", path=str(path))
    fields = _QCOW2_HEADER.unpack_from(head)
    version, backing_offset, backing_length, size, encryption = fields[1], fields[2], fields[3], fields[5], fields[6]
    snapshots = fields[11]
    if version not in (2, 3):
        raise errors.Unsupported(f"{path} is qcow2 version {version}; 2 and 3 are known", version=version)
    incompatible, header_length = 0, 72
    if version == 3:
        incompatible, _, _, _, header_length = _QCOW2_V3.unpack_from(head, 72)
    if encryption:
        raise errors.Unsupported(f"{path} is encrypted", hint="decrypt it first: qemu-img convert")
    if incompatible & _INCOMPATIBLE_DATA_FILE:
        raise errors.Unsupported(f"{path} keeps its data in another file", hint="convert it: qemu-img convert")
    if incompatible & _INCOMPATIBLE_CORRUPT:
        raise errors.Corrupt(f"{path} is marked corrupt by QEMU", hint=f"repair it: qemu-img check -r all {path}")
    backing = backing_format = None
    if backing_offset:
        if backing_offset + backing_length > len(head):
            head, _, facts = _head(path, _HEADER_MAX)
        if backing_offset + backing_length > len(head):
            raise errors.Corrupt(f"{path} names its parent outside its header", path=str(path))
        backing = head[backing_offset : backing_offset + backing_length].decode(errors="surrogateescape")
        backing_format = _backing_format(path, head, header_length, backing_offset)
        backing = _as_path(path, backing)
    return Header(path, QCOW2, size, backing, backing_format, _allocated(facts), _identity(facts), bool(snapshots))


def _as_path(path: Path, backing: str) -> str:
    """QEMU reads ``name:`` as a protocol; only files can be parents here. To QEMU a name ends with its first zero byte."""
    if "\0" in backing:
        raise errors.Corrupt(f"{path} names its parent with a zero byte in it", path=str(path))
    if backing.startswith("file:"):
        return backing.removeprefix("file:")
    if ":" in backing.split("/", 1)[0]:
        raise errors.Unsupported(f"the parent of {path} is no file: {backing}")
    return backing


def _backing_format(path: Path, head: bytes, start: int, end: int) -> str | None:
    """The stated format of the parent. Of two QEMU takes the last; nobody but an attacker writes two."""
    found = None
    while start + 8 <= end:
        kind, length = struct.unpack_from(">II", head, start)
        if kind == _EXTENSION_END:
            break
        if kind == _EXTENSION_BACKING_FORMAT:
            if found is not None:
                raise errors.Corrupt(f"{path} states the format of its parent twice", path=str(path))
            found = head[start + 8 : start + 8 + length].decode(errors="replace")
        start += 8 + (length + 7) // 8 * 8
    return found


def _read_vhd(path: Path) -> Header:
    head, size, facts = _head(path)
    at_end = _vhd_footer_at_end(path, size)
    footer = head[:512] if head.startswith(_VHD_COOKIE) and len(head) >= 512 else at_end
    if footer is None:
        raise errors.Corrupt(f"{path} is no VHD: it has no footer", path=str(path))
    fields = _VHD_FOOTER.unpack(footer)
    creator, current = fields[5], fields[9]
    cylinders, heads, sectors, kind = fields[10], fields[11], fields[12], fields[13]
    if kind == _VHD_DIFFERENCING:
        raise _differencing(path, Identity("vhd", True, _vhd_parent(path, footer)))
    if _vhd_checksum(footer) != struct.unpack_from(">I", footer, 64)[0]:
        raise errors.Corrupt(
            f"{path} has a footer with a wrong checksum", hint="get a whole copy of the file", path=str(path)
        )
    if kind not in (_VHD_FIXED, _VHD_DYNAMIC):
        raise errors.Unsupported(f"{path} is a VHD of the unknown type {kind}")
    geometry = cylinders * heads * sectors
    seen = current if creator in _VHD_EXACT_CREATORS or geometry == _VHD_LARGEST else geometry * 512
    if seen != current:
        raise errors.Unsupported(
            f"{path} was made by '{creator.decode(errors='replace').strip()}': QEMU would cut it from {current} to {seen} bytes",
            hint=_convert_hint(path, VPC),
            path=str(path),
        )
    if kind == _VHD_FIXED and size < current + 512:
        raise errors.Corrupt(f"{path} is cut off: a disk of {current} bytes in a file of {size}", path=str(path))
    return _plain(path, VPC, current, facts)


def _vhd_footer(path: Path, head: bytes, size: int) -> bytes | None:
    """The footer at the end, else its copy in front; before 2004 it had 511 bytes at the end."""
    at_end = _vhd_footer_at_end(path, size)
    if at_end is not None:
        return at_end
    return head[:512] if head.startswith(_VHD_COOKIE) and len(head) >= 512 else None


def _vhd_parent(path: Path, footer: bytes) -> str | None:
    """The name of the parent that a differencing VHD keeps in its header, as far as it can be read."""
    with path.open("rb") as file:
        file.seek(min(_VHD_FOOTER.unpack(footer)[3], 1 << 62))
        header = file.read(1024)
    if not header.startswith(b"cxsparse") or len(header) < 1024:
        return None
    return header[_VHD_PARENT_NAME].decode("utf-16-be", "replace").partition("\0")[0] or None


def _vhd_footer_at_end(path: Path, size: int) -> bytes | None:
    if size < 512:
        return None
    with path.open("rb") as file:
        file.seek(size - 512)
        footer = file.read(512)
    return footer if footer.startswith(_VHD_COOKIE) else None


def _vhd_checksum(footer: bytes) -> int:
    return ~(sum(footer) - sum(footer[64:68])) & 0xFFFFFFFF


def _head(path: Path, length: int = _HEADER_READ) -> tuple[bytes, int, os.stat_result]:
    """The first bytes, the size, and what the file system says; a block device has no size in its inode."""
    try:
        if _is_endless(path.stat().st_mode):
            raise errors.UsageError(f"{path} is no image file", hint="name an image file, or a block device")
        with path.open("rb", buffering=0) as file:
            head = file.read(length)
            size = file.seek(0, os.SEEK_END)
            facts = os.fstat(file.fileno())
    except FileNotFoundError as error:
        raise errors.NotFound(
            f"the image {path} is missing", hint="put the file back where it was", path=str(path)
        ) from error
    except IsADirectoryError as error:
        raise errors.UsageError(f"{path} is a folder, not an image") from error
    except OSError as error:
        hint = "run as root, or give your user access to it" if isinstance(error, PermissionError) else None
        raise errors.HostFailed(f"{path} cannot be read: {error.strerror}", hint=hint, path=str(path)) from error
    return head, size, facts


def _is_endless(mode: int) -> bool:
    """Whether who opens or reads it may wait for ever: a pipe, a socket, a terminal."""
    return not (stat.S_ISREG(mode) or stat.S_ISBLK(mode) or stat.S_ISDIR(mode))


def _allocated(facts: os.stat_result) -> int:
    return facts.st_blocks * 512


def length(path: Path) -> int:
    """The bytes of the file or device, whatever is in them."""
    return _head(path, 0)[1]
