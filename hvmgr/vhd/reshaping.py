"""Changes VHDs that exist: merges a child into an ancestor, resizes, compacts, gives a child another parent.

A crash at any point leaves valid files, with the old state or the new one. Who else uses an image is the caller's to know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hvmgr import errors
from hvmgr.vhd import format, layout, rules, sizing
from hvmgr.vhd.chain import Chain, open_chain
from hvmgr.vhd.creation import OnProgress, Writer, describe_parent
from hvmgr.vhd.file import replacing
from hvmgr.vhd.format import Kind, Locator
from hvmgr.vhd.image import ZEROS, Image, open_image
from hvmgr.vhd.layout import Layout

_PIECE = 2 << 20


def merge(chain: Chain, into: int = 1, *, on_progress: OnProgress | None = None) -> None:
    """The image ``into`` of the chain gets the bytes of the whole disk, and its size; the images above stay as they are.

    All the while the disk shows the same bytes through each of them, and after a crash merging again goes on. What the
    images between hide by being shorter is written as zeros. ``into`` must have no other children, and the chain is to be
    closed afterwards: it does not see what became of it.
    Conflict when a saved VM is on one of them.
    """
    if not 0 < into < len(chain.images):
        raise errors.UsageError(f"{chain.top.path} has no ancestor number {into}")
    for image in chain.images[: into + 1]:
        require_unsaved(image)
    chain.flush()
    with open_image(chain.images[into].path, writable=True) as target:
        below = Chain([target, *chain.images[into + 1 :]])
        _set_size(below, max(chain.size, target.size))
        for piece in chain.pieces(depth=into):
            if piece.level is not None:
                target.copy_from(chain.images[piece.level].file, piece.position, piece.offset, piece.length)
            elif piece.position == ZEROS:
                below.write_zeros(piece.offset, piece.length)
            if on_progress is not None:
                on_progress(piece.offset + piece.length, chain.size)
        _set_size(below, chain.size)


def _set_size(chain: Chain, size: int) -> None:
    """The first of the chain has this size; what it grows by is zeros, whatever its parents have there."""
    hidden = _hidden(Chain(chain.images[1:]), chain.size, size) if chain.images[1:] else []
    sizing.set_size(chain.top, size, hidden)


def _hidden(parents: Chain, start: int, end: int) -> list[tuple[int, int]]:
    """Where the parents have data that a disk which ends at ``start`` hides."""
    stop = min(end, parents.size)
    return (
        [(one.offset, one.length) for one in parents.stretches(start, stop - start) if one.data] if start < stop else []
    )


def resize(
    path: Path | str,
    size: int,
    *,
    allow_shrink: bool = False,
    folders: Sequence[Path] = (),
    windows_paths: Mapping[str, Path] | None = None,
) -> None:
    """The disk has another size; what it grows by reads as zeros.

    Shrinking loses what lies behind the new end, so it is a Conflict unless it is allowed. The parents of a differencing
    disk have to be there: a larger one must not show through where the disk grows.
    """
    layout.require_size(size)
    with open_chain(path, writable=True, folders=folders, windows_paths=windows_paths, any_size=True) as chain:
        require_unsaved(chain.top)
        if size < chain.size and not allow_shrink:
            raise errors.Conflict(
                f"{path} has {chain.size} bytes; what lies behind {size} would be lost",
                hint="shrink the partitions and file systems in it first, then allow it",
            )
        _set_size(chain, size)


def compact(path: Path | str, *, on_progress: OnProgress | None = None) -> tuple[int, int]:
    """The file is written anew without the blocks that say nothing, and takes its own place: its sizes before and after.

    Of a dynamic disk blocks of zeros go, of a differencing one blocks without a sector of its own. The id stays, so that
    children still know it. It needs space for the new file beside the old one.
    """
    path = Path(path).resolve()  # a link stays one
    with open_image(path) as image:
        require_unsaved(image)
        if image.header is None:
            raise errors.Unsupported(
                f"{path} is a fixed disk, which has no blocks to drop", hint="convert it to a dynamic one"
            )
        before = image.file.length()
        with replacing(path) as file:
            Writer(file, _same_layout(image)).copy(image, on_progress).finish()
            after = file.length()
    return before, after


def _same_layout(image: Image) -> Layout:
    """The layout of a new file that says the same as this one."""
    header, footer = image.header, image.footer
    assert header is not None
    texts = {text.number: text.raw for text in image.structure.texts}
    free, locators, placed = format.FOOTER_SIZE + format.HEADER_SIZE, [], []
    for number, raw in texts.items():
        space = format.round_up(len(raw), format.SECTOR)
        locators.append(Locator(header.locators[number].code, space, len(raw), free))
        placed.append((free, raw.ljust(space, b"\0")))
        free += space
    entries = format.block_count(footer.size, header.block_size)
    locators += [Locator()] * (format.LOCATORS - len(locators))
    new = replace(header, table_offset=free, entries=entries, locators=tuple(locators))
    ours = replace(
        footer,
        data_offset=format.FOOTER_SIZE,
        geometry=format.geometry(footer.size),
        creator=format.CREATOR,
        creator_version=format.CREATOR_VERSION,
        creator_host=format.CREATOR_HOST,
    )
    return Layout(ours, new, tuple(placed), free + format.table_size(entries))


def reparent(
    child: Path | str,
    parent: Path | str,
    *,
    ignore_id: bool = False,
    prove: bool = False,
    any_size: bool = False,
    windows_path: str | None = None,
    folders: Sequence[Path] = (),
    windows_paths: Mapping[str, Path] | None = None,
) -> None:
    """The child names ``parent`` from now on: its id, time, name and path.

    Conflict when the parent has another id (unless ``ignore_id``) or another size (unless ``any_size``), and when it is a
    descendant of the child. ``prove``: also when it shows other bytes than the present parent wherever the child shows
    its parent's; NotFound when the present parent is not there to compare with.
    """
    child, parent = Path(child), Path(parent)
    with (
        open_image(child, writable=True) as image,
        open_chain(parent, folders=folders, windows_paths=windows_paths, any_size=True) as new,
    ):
        _require_possible(image, new, ignore_id=ignore_id, any_size=any_size)
        if prove:
            with open_chain(child, folders=folders, windows_paths=windows_paths, any_size=True) as old:
                _require_equal(image, Chain(old.images[1:]), new)
        origin = describe_parent(child, parent, windows_path=windows_path)
        _name_parent(image, origin)


def _require_possible(image: Image, new: Chain, *, ignore_id: bool, any_size: bool) -> None:
    if image.kind is not Kind.DIFFERENCING:
        raise errors.Conflict(f"{image.path} is a {image.kind} disk; only a differencing one has a parent")
    if image.file.identity() in [one.file.identity() for one in new.images]:
        raise rules.fault("F47", path=image.path, what=f"would come back to it from {new.top.path}").error()
    if new.top.uid != image.parent_uid and not ignore_id:
        wanted, found = image.parent_uid.hex(), new.top.uid.hex()
        raise rules.fault("F43", path=image.path, wanted=wanted, parent=new.top.path, found=found).error()
    if new.size != image.size and not any_size:
        raise rules.fault("F46", path=image.path, size=image.size, parent=new.top.path, found=new.size).error()


def _require_equal(image: Image, old: Chain, new: Chain) -> None:
    """Conflict at the first bytes that differ where the child shows its parent."""
    first, second = bytearray(_PIECE), bytearray(_PIECE)
    for extent in image.extents():
        if extent.is_held:
            continue
        for offset in range(extent.offset, extent.offset + extent.length, _PIECE):
            length = min(_PIECE, extent.offset + extent.length - offset)
            one, other = memoryview(first)[:length], memoryview(second)[:length]
            _read_padded(old, offset, one)
            _read_padded(new, offset, other)
            if one.tobytes() != other.tobytes():
                raise errors.Conflict(
                    f"{new.top.path} is not what {image.path} was made from: they differ at byte "
                    f"{offset + _first_difference(one, other)} of the disk",
                    hint="look for the unchanged parent",
                )


def _read_padded(disk: Chain, offset: int, buffer: memoryview) -> None:
    inside = max(0, min(len(buffer), disk.size - offset))
    if inside:
        disk.read_into(offset, buffer[:inside])
    buffer[inside:] = bytes(len(buffer) - inside)


def _first_difference(one: memoryview, other: memoryview) -> int:
    return next(at for at in range(len(one)) if one[at] != other[at])


def _name_parent(image: Image, origin: layout.Parentage) -> None:
    assert image.header is not None
    had = {one.code: one for one in image.header.locators if not one.is_unused}
    locators = []
    for code, text in origin.texts:
        word, space = code.encode(), format.round_up(len(text), format.SECTOR)
        old = had.get(word)
        if old is not None and old.space_bytes >= space:
            place, space = old.offset, old.space_bytes
        else:
            place = image.take_space(space)
        image.file.write(place, text.ljust(space, b"\0"))
        locators.append(Locator(word, space, len(text), place))
    image.file.sync()
    image.change_header(
        parent_uid=origin.uid,
        parent_time=origin.time,
        parent_name=format.encode_name(origin.name),
        locators=(*locators, *(Locator(),) * (format.LOCATORS - len(locators))),
    )


def require_unsaved(image: Image) -> None:
    """Conflict when the disk belongs to a saved VM."""
    if image.footer.saved_state:
        what = "a saved VM is on it; start that VM, or discard its state"
        raise rules.fault("F17", path=image.path, value=1, what=what, answer=errors.Conflict).error()
