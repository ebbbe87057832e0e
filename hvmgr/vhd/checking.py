"""A VHD held against every rule of the format.

What a file says of itself is judged by ``structure``; here its bitmaps are held against its data, and its parents are
looked at. A check reads all bitmaps, and data only where a bitmap says that there is none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from hvmgr import errors
from hvmgr.vhd import bits, format, rules, structure
from hvmgr.vhd.chain import MAX_DEPTH
from hvmgr.vhd.file import File
from hvmgr.vhd.format import FOOTER_SIZE, SECTOR, Kind
from hvmgr.vhd.image import Image, open_image
from hvmgr.vhd.parents import find_parent, has_time
from hvmgr.vhd.rules import Fault, Severity
from hvmgr.vhd.source import is_zero
from hvmgr.vhd.structure import Structure

EXACT_CREATORS = (b"win ", b"qem2", b"tap\0", b"CTXS")  # of these QEMU's driver believes the current size
_PIECE = 1 << 20
# With these the table leads to no blocks, or to others' bytes.
_LOST = frozenset({"F14", "F26", "F27", "F29", "F30", "F31", "F37"})


def check(
    path: Path | str,
    *,
    chain: bool = False,
    strict: bool = False,
    parent: Path | None = None,
    folders: Sequence[Path] = (),
    windows_paths: Mapping[str, Path] | None = None,
) -> list[Fault]:
    """Everything that is wrong with the file, and with ``chain`` with its parents too; nothing is written.

    ``strict`` makes an error of a parent that was written at another time than its child recorded. The other arguments are
    those of ``find_parent``. Raises only what the file system answers for the file itself; a parent that cannot be read is
    a fault.
    """
    path = Path(path)
    faults = _judge(path)
    if chain:
        find = partial(find_parent, folders=folders, windows_paths=windows_paths)
        above = list(_judge_parents(path, find, parent, strict=strict))
        # What was a doubt about the file alone is decided by now.
        decided = {(one.code, one.path) for one in above}
        faults = [one for one in faults if (one.code, one.path) not in decided] + above
    return faults


def qemu_reads_alike(path: Path | str) -> bool:
    """Whether QEMU's driver shows exactly this disk, so that its own conversion, the fastest there is, may read the file.

    It does not for differencing disks, for data under clear bits, for what is damaged, and where it goes by the geometry
    (qemu 7.2 block/vpc.c: it believes the size of a few creators, and of all others with the largest geometry).
    """
    file = File(Path(path))
    try:
        found = structure.read(file)
        faults = [*found.faults, *judge_blocks(file, found)]
    finally:
        file.close()
    footer = found.footer
    if footer is None or footer.kind not in (Kind.FIXED, Kind.DYNAMIC) or footer.size > format.MAX_SIZE:
        return False
    is_exact = footer.creator in EXACT_CREATORS or footer.geometry == format.MAX_GEOMETRY
    return (is_exact or footer.geometry.size == footer.size) and all(one.severity is Severity.WARNING for one in faults)


def _judge(path: Path) -> list[Fault]:
    file = File(path)
    try:
        found = structure.read(file)
        return rules.of_file([*found.faults, *judge_blocks(file, found)], path)
    finally:
        file.close()


def judge_blocks(file: File, found: Structure) -> Iterator[Fault]:
    """Data where a bitmap says that there is none, and bits for what is behind the disk's end."""
    if any(one.code in _LOST and one.severity is Severity.ERROR for one in found.faults):
        return
    if found.length % SECTOR == FOOTER_SIZE - 1:
        yield rules.fault("F2", found.end, severity=Severity.WARNING, length=found.length)  # as very old programs did
    last = -1
    for block, at, _ in unclaimed(file, found):
        if block != last:
            yield rules.fault("F33", at, block=block)
        last = block
    yield from _behind_the_end(file, found)


# --- parents ----------------------------------------------------------------------------------------------------------


def _judge_parents(path: Path, find: Callable[..., Path], parent: Path | None, *, strict: bool) -> Iterator[Fault]:
    """Of every file of the chain, what is wrong with it and with its bond to its child."""
    seen: set[tuple[int, int]] = set()
    with contextlib.ExitStack() as stack:
        try:
            child = stack.enter_context(open_image(path, tolerant=True))
        except errors.HvmgrError:
            return  # what is wrong with it is known, and where its parent is nobody can say
        while child.kind is Kind.DIFFERENCING:
            seen.add(child.file.identity())
            try:
                where = find(child, parent=parent)
                facts = where.stat()
                if (facts.st_dev, facts.st_ino) in seen or len(seen) >= MAX_DEPTH:
                    is_circle = len(seen) < MAX_DEPTH
                    yield rules.fault("F47", path=path, what=f"comes back to {where}" if is_circle else "is endless")
                    return
                faults = _judge(where)
                yield from faults
                above = stack.enter_context(open_image(where, tolerant=True))
            except errors.HvmgrError as error:
                yield _as_fault(error, child)
                return
            yield from _judge_bond(child, above, faults, strict=strict)
            child, parent = above, None


def _judge_bond(child: Image, above: Image, faults: list[Fault], *, strict: bool) -> Iterator[Fault]:
    assert child.header is not None
    if any(one.severity is not Severity.WARNING for one in faults):
        grave = next(one for one in faults if one.severity is not Severity.WARNING)
        yield rules.fault("F48", path=child.path, text=f"{above.path}: {grave.text}", answer=grave.answer)
    if above.uid == format.NO_ID:
        yield rules.fault("F20", path=above.path, severity=Severity.ERROR)
    if above.size != child.size:
        yield rules.fault("F46", path=child.path, size=child.size, parent=above.path, found=above.size)
    recorded = child.header.parent_time
    if not has_time(above, recorded):
        severity = Severity.ERROR if strict else None
        found = above.footer.time
        yield rules.fault("F44", path=child.path, severity=severity, parent=above.path, found=found, wanted=recorded)


def _as_fault(error: errors.HvmgrError, child: Image) -> Fault:
    """What a search or an opening answered, as a fault of the child."""
    code = str(error.facts.get("fault", "F49" if isinstance(error, errors.Conflict) else "F48"))
    own = error.facts.get("path") in (None, str(child.path))
    text = error.message.removeprefix(f"{child.path}: ")
    if own and code in ("F42", "F43", "F45", "F49"):
        return Fault(code, Severity.ERROR, None, text, child.path, type(error))
    return rules.fault("F48", path=child.path, text=text, answer=type(error))


# --- blocks -----------------------------------------------------------------------------------------------------------


def _bitmaps(file: File, found: Structure) -> Iterator[tuple[int, int, bytes]]:
    """Of each block in the file its number, where its data begins, and its bitmap."""
    if found.table is None or found.header is None:
        return
    size = format.bitmap_size(found.header.block_size)
    for block in found.table.allocated():
        place = found.table[block] * SECTOR
        if place + size <= found.end:
            yield block, place + size, file.read(place, size)


def unclaimed(file: File, found: Structure) -> Iterator[tuple[int, int, int]]:
    """Data in sectors of the disk whose bits are clear: block, and where it is in the file, in pieces."""
    if found.footer is None or found.header is None:
        return
    block_size = found.header.block_size
    whole = b"\xff" * (block_size // SECTOR // 8)
    for block, data, bitmap in _bitmaps(file, found):
        held = min(block_size, found.footer.size - block * block_size)
        if whole and bitmap.startswith(whole):
            continue
        for first, end, is_here in bits.runs(bitmap, 0, held // SECTOR):
            if not is_here:
                yield from ((block, *piece) for piece in _not_zero(file, data + first * SECTOR, data + end * SECTOR))


def _not_zero(file: File, start: int, end: int) -> Iterator[tuple[int, int]]:
    for low, high in file.data_ranges(start, min(end, file.length())):
        for at in range(low, high, _PIECE):
            piece = file.read(at, min(_PIECE, high - at))
            if not is_zero(piece):
                yield at, at + len(piece)


def _behind_the_end(file: File, found: Structure) -> Iterator[Fault]:
    """Only in the disk's last block."""
    if found.table is None or found.header is None or found.footer is None or not len(found.table):
        return
    block, block_size = len(found.table) - 1, found.header.block_size
    place = found.table[block] * SECTOR
    held = (found.footer.size - block * block_size) // SECTOR
    if found.table[block] != format.UNUSED and place < found.end:
        bitmap = file.read(place, format.bitmap_size(block_size))
        if bits.any_set(bitmap, held, block_size // SECTOR - held):
            yield rules.fault("F34", place, block=block)
