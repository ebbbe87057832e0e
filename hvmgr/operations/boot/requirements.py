"""What native boot asks of a VHD, its volume and its machine; each is checked and named before anything is written.

The list is that of Windows' native boot, as far as it holds for Linux: a volume that boot loader and early system can read, room
for the disk as it is when fully written, no VHD in a VHD, a version that is known, and nobody who uses the VHD now.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors, units
from hvmgr.host import volumes
from hvmgr.model.boot_entry import BootEntry, ImageFile, Volume
from hvmgr.model.image_format import ImageFormat
from hvmgr.model.image_info import Use, User
from hvmgr.operations import image_users
from hvmgr.operations.images import changes, recognition
from hvmgr.operations.images.recognition import Recognised
from hvmgr.storage import layer

if TYPE_CHECKING:
    from hvmgr.operations.host import Host
    from hvmgr.vhd.chain import Chain

_TYPES = {"ext4": Volume.EXT, "ext3": Volume.EXT, "ext2": Volume.EXT, "ntfs": Volume.NTFS, "ntfs3": Volume.NTFS}
_BUSY = {Use.RUNS: "which runs", Use.SAVED: "whose memory is saved", Use.ATTACHED: "as which it is attached"}
_BLOCKS_USE = {Use.SNAPSHOT, Use.UNDO, Use.PARENT}
_RESERVE = 64 << 20  # of the volume: nothing works well that has no byte left


class Place:
    """The volume as the machine will see it when it boots: ``folder`` is its root here."""

    def __init__(self, folder: Path, id: str, type: Volume) -> None:
        self.folder, self.id, self.type = folder, id, type

    def inside(self, path: Path) -> str:
        """A file's path on the volume."""
        if not path.is_relative_to(self.folder):
            raise errors.Unsupported(
                f"{path} is not on the volume {self.folder}", hint="all files of a disk have to be on one volume"
            )
        text = "/" + os.fspath(path.relative_to(self.folder))
        if any(ord(one) < 32 or ord(one) == 127 or "\ud800" <= one <= "\udfff" for one in text):
            raise errors.UsageError(f"the path {path!r} has characters that no boot menu can hold", hint="rename it")
        return text


def stated_place(folder: Path, id: str, type: str) -> Place:
    """The volume that the user describes: a folder that becomes its root, or is its root under another machine."""
    real = Path(os.path.realpath(folder))
    if not real.is_dir():
        raise errors.NotFound(f"there is no folder {folder}")
    return Place(real, id, _type(type, f"the volume {folder}"))


def place_of(path: Path) -> Place:
    """The volume that holds the VHD now."""
    found = volumes.of(path)
    type = _type(volumes_type(found), f"the volume {found.folder} with {path}")
    if volumes.is_stacked(found.device):
        raise errors.Unsupported(
            f"{path} lies on {found.device}, which is made of other devices (LVM, RAID, encryption, or a disk in a file)",
            hint="native boot needs an ordinary partition, and no VHD in a VHD",
        )
    if found.id is None:
        raise errors.Unsupported(f"nobody knows the id of the volume {found.folder} ({found.device})")
    if found.subfolder != "/":
        raise errors.Unsupported(
            f"only {found.subfolder} of the volume with {path} is mounted", hint="name it by --volume"
        )
    return Place(found.folder, found.id, type)


def place_again(entry: BootEntry) -> Path:
    """The folder that is the root of an entry's volume here."""
    inside = entry.files[0].path
    return Path(entry.image.removesuffix(inside) or "/")


def volumes_type(found: volumes.Volume) -> str:
    """The volume's file system; FUSE does not say what it shows, and of those only NTFS is a disk's."""
    return "ntfs" if found.type == "fuseblk" else found.type


def _type(name: str, what: str) -> Volume:
    if name not in _TYPES:
        raise errors.Unsupported(
            f"{what} is {name}: no VHD can be booted from that", hint="move the VHD to a volume with ext4 or NTFS"
        )
    return _TYPES[name]


def look(path: Path, folders: Sequence[Path]) -> Recognised:
    """The VHD; Unsupported for any other image."""
    found = recognition.look(path, folders=folders)
    if found.format is not ImageFormat.VHD:
        raise errors.Unsupported(
            f"{path} is a {found.format.value.upper()} image; only a VHD can be booted natively",
            hint=f"convert it: hvmgr image convert {path} {path.with_suffix('.vhd')}",
        )
    return found


def require_free(host: Host, path: Path, folders: Sequence[Path], *, writes: bool) -> list[str]:
    """Nobody uses the VHD now; what is worth knowing about those who do at other times.

    ``writes``: the system is going to write the file itself, so that nobody may need it as it is.
    """
    changes.complete(host, [path])
    changes.require_closed([path])
    notes = []
    for parent in recognition.known_chain(path, folders)[1:]:
        _require_idle(parent, image_users.of(host, parent))
    users = image_users.of(host, path)
    _require_idle(path, users)
    for user in users:
        if user.use in _BLOCKS_USE and writes:
            raise errors.Conflict(
                f"{path} is needed as it is by {user.name}, and a system that boots from it would write it",
                hint="boot a differencing VHD on it instead, or give --layer",
                user=user.name,
            )
        if user.use is Use.OFF:
            notes.append(f"{user.name} uses {path.name} too: never run both at once")
            if not writes:
                notes.append(f"what {user.name} writes there makes the layer useless: merge or revert it first")
    if not image_users.is_libvirt_there(host):
        notes.append("libvirt could not be asked whether one of its VMs needs the VHD")
    return notes


def _require_idle(path: Path, users: Sequence[User]) -> None:
    for user in users:
        if user.use in _BUSY:
            raise errors.Conflict(
                f"{path} is in use by {user.name}, {_BUSY[user.use]}", hint="let that end first", user=user.name
            )


def unfilled(entries: Sequence[BootEntry], path: Path) -> int:
    """What the layers of other entries on the volume of ``path`` may still take: something where nothing can reserve it."""
    device = path.stat().st_dev
    found = 0
    for one in entries:
        store = Path(one.layer_file)
        if one.layer and one.image != str(path) and store.exists() and store.stat().st_dev == device:
            found += layer.unfilled(store, one.size)
    return found


def require_space(path: Path, chain: Chain, *, has_layer: bool, others: int = 0) -> None:
    """The volume has room for all that the system may ever write, besides what ``others`` may."""
    if not has_layer:
        wanted = chain.size - path.stat().st_blocks * 512
        what = "what a fixed VHD has not taken yet"
    else:
        made = Path(f"{path}.boot/layer")
        taken = made.stat().st_blocks * 512 if made.exists() else 0
        wanted = layer.size_for(chain.size) - taken
        what = "the disk when it is fully written"
    free = max(0, shutil.disk_usage(path.parent).free - others)
    if wanted > 0 and free < wanted + _RESERVE:
        raise errors.NoSpace(
            f"the volume with {path} has {units.format_size(free)} free"
            + (" besides what the layers of other entries may take" if others else "")
            + f", and {what} needs {units.format_size(wanted)}",
            hint="free space there, make the disk smaller (hvmgr image resize --shrink), or move the VHD",
        )


def describe(path: Path, place: Place, head: int) -> ImageFile:
    """A file of the disk as it is now."""
    with path.open("rb") as file:
        facts = os.fstat(file.fileno())
        digest = hashlib.sha256(file.read(head)).hexdigest()
    return ImageFile(place.inside(path), facts.st_size, int(facts.st_mtime), head, digest)
