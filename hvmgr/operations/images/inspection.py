"""What an image file is: everything that ``image info`` says. Nothing is changed and nothing in a chain is trusted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvmgr import errors
from hvmgr.model.image_format import ImageFormat
from hvmgr.model.image_info import ImageInfo, ImageParent, Use, User
from hvmgr.operations import image_users
from hvmgr.operations.images import changes, recognition
from hvmgr.operations.images.recognition import Recognised
from hvmgr.storage import images, journal, vhdx

if TYPE_CHECKING:
    from hvmgr import vhd
    from hvmgr.operations.host import Host

_ALIGNMENT = 4 << 10  # a gap that only makes data begin on a page of the disk below


def info(host: Host, path: Path, folders: Sequence[Path] = (), *, stated: ImageFormat | None = None) -> ImageInfo:
    """One image, whatever is wrong with its parents."""
    found = recognition.look(path, stated, folders=folders, tolerant=True)
    facts = path.stat()
    answer: dict[str, Any] = {
        "block_size": None, "creator": None, "created": None, "id": None, "parent": None, "allocation": None,
        "fragmentation": None,
    }  # fmt: skip
    answer |= _READERS[found.format](found)
    return ImageInfo(
        path=path, format=found.format.value, type=found.type, size=found.size, file_size=images.length(path),
        taken=facts.st_blocks * 512, used_by=_users(host, path), libvirt_asked=image_users.is_libvirt_there(host), faults=found.faults,
        open_change=_open_subject(path), **answer,
    )  # fmt: skip


def chain(host: Host, path: Path, folders: Sequence[Path] = ()) -> list[ImageInfo]:
    """The image and all that it stands on, highest first; it ends where a parent cannot be found."""
    found = [info(host, path, folders)]
    while (parent := found[-1].parent) is not None and parent.path is not None:
        if any(parent.path.samefile(one.path) for one in found):
            raise errors.Corrupt(f"the chain of {path} runs in a circle at {parent.path}", path=str(parent.path))
        found.append(info(host, parent.path, folders))
    return found


def _users(host: Host, path: Path) -> tuple[User, ...]:
    try:
        return tuple(image_users.of(host, path))
    except errors.Conflict as error:  # half-way between two states of a VM
        return (User(Use.UNKNOWN, str(error)),)
    except errors.HostFailed as error:  # its folder may be passed through, and not listed
        return (User(Use.UNKNOWN, f"an image or a VM that this user cannot look at ({error})"),)


def _open_subject(path: Path) -> str | None:
    """What was begun on the image and has not come to its end."""
    place = journal.beside(path)
    entry = journal.read(place) if changes.is_ours(place) else None
    return None if entry is None else entry.plan.subject


def _vhd_facts(found: Recognised) -> dict[str, Any]:
    from hvmgr import vhd
    from hvmgr.vhd import format

    with vhd.open_image(found.path, tolerant=True) as image:
        footer, table, block = image.footer, image.table, image.block_size
        stride = block + format.bitmap_size(block) if block else 0
        places = [(table[one] * format.SECTOR, stride) for one in table.allocated()]
        return {
            "block_size": block or None,
            "creator": footer.creator.decode("ascii", "replace").rstrip("\0 ") or None,
            "created": format.from_stamp(footer.time),
            "id": image.uid.hex(),
            "parent": _vhd_parent(image, found.folders) if found.is_differencing else None,
            "allocation": _percent(min(len(places) * block, found.size), found.size) if block else 100.0,
            "fragmentation": _fragmentation(places) if block else None,
        }


def _vhd_parent(image: vhd.Image, folders: Sequence[Path]) -> ImageParent:
    from hvmgr import vhd

    assert image.header is not None
    texts = ((text.code, text.text if text.text is not None else text.raw.hex()) for text in image.structure.texts)
    names = (("name", image.header.name), *texts)
    try:
        return ImageParent(names, image.parent_uid.hex(), vhd.find_parent(image, folders=folders))
    except errors.HvmgrError as error:
        return ImageParent(names, image.parent_uid.hex(), None, str(error))


def _vhdx_facts(found: Recognised) -> dict[str, Any]:
    facts = vhdx.read(found.path)
    parent = None
    if facts.is_differencing:
        problem = "differencing VHDX images cannot be read yet"
        parent = ImageParent(tuple(facts.parents.items()), facts.parents.get("parent_linkage"), None, problem)
    return {
        "block_size": facts.block_size,
        "creator": facts.creator or None,
        "id": facts.id,
        "parent": parent,
    }


def _qcow2_facts(found: Recognised) -> dict[str, Any]:
    header = images.read(found.path, images.QCOW2)
    parent = None
    if header.backing is not None:
        below = header.parent
        assert below is not None
        names = (("backing", header.backing), *((("format", header.backing_format),) if header.backing_format else ()))
        missing = None if below.exists() else f"there is no {below}"
        parent = ImageParent(names, None, None if missing else below, missing)
    from hvmgr.host import qemu_img

    extents = _own_extents(found)
    return {
        "block_size": None if extents is None else qemu_img.info(found.path, "qcow2", force_share=True).cluster_size,
        "creator": None,
        "parent": parent,
        "allocation": None if extents is None else _percent(sum(length for _, length in extents), found.size),
        "fragmentation": None if extents is None else _fragmentation(extents),
    }


def _own_extents(found: Recognised) -> list[tuple[int, int]] | None:
    """Where in the file what this image itself holds lies; None when its parents keep QEMU from looking."""
    from hvmgr.host import qemu_img

    try:
        recognition.require_no_differencing_below(found.path)
        extents = qemu_img.map(found.path, "qcow2", force_share=True)
    except errors.HvmgrError:
        return None
    return [(one.offset or 0, one.length) for one in extents if one.depth == 0 and one.data]


def _raw_facts(found: Recognised) -> dict[str, Any]:
    taken = min(found.path.stat().st_blocks * 512, found.size)
    return {"allocation": _percent(taken, found.size) if found.path.is_file() else None}


_READERS = {
    ImageFormat.VHD: _vhd_facts,
    ImageFormat.VHDX: _vhdx_facts,
    ImageFormat.QCOW2: _qcow2_facts,
    ImageFormat.RAW: _raw_facts,
}


def _fragmentation(places: Iterable[tuple[int, int]]) -> float | None:
    """The share of the runs (offset, length), in the order of the disk, that do not follow the one before them."""
    count = apart = 0
    expected: int | None = None
    for offset, length in places:
        count += 1
        apart += expected is not None and not 0 <= offset - expected < _ALIGNMENT
        expected = offset + length
    return _percent(apart, count - 1) if count > 1 else 0.0


def _percent(part: int, whole: int) -> float | None:
    return round(100 * part / whole, 1) if whole else None
