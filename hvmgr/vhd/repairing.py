"""Puts right what is wrong with a VHD where that needs no guess."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path

from hvmgr import errors
from hvmgr.vhd import format, rules, structure
from hvmgr.vhd.checking import EXACT_CREATORS, check, judge_blocks, unclaimed
from hvmgr.vhd.file import File
from hvmgr.vhd.format import FOOTER_SIZE, SECTOR, Footer, Kind
from hvmgr.vhd.rules import Fault, Severity
from hvmgr.vhd.structure import Structure

_MAX_TAIL = 64 << 20  # where a lost closing footer is looked for
_REPAIRED = frozenset({"F2", "F3", "F4", "F5", "F6", "F7", "F11", "F16", "F33"})


class Keep(StrEnum):
    """One of the two footers."""

    START = "start"
    END = "end"


def repair(path: Path | str, *, keep: Keep | None = None) -> list[Fault]:
    """Puts right what needs no guess, and returns what that was; nothing is written when anything else is wrong.

    A footer is written from the good one, or from two that agree, with its checksum; trailing bytes behind a good footer
    are cut off; data under clear bits, which nobody may read, becomes zeros; a geometry larger than the disk becomes the
    right one. Where both footers are good and differ, the caller says which one to ``keep``, else that is a Conflict.

    A death in the middle leaves a file that can be repaired again: the good footer is only written when the other one
    is right and on the disk. Where both change, the one at the end is then the newer one.
    """
    path = Path(path)
    file = File(path, writable=True)
    try:
        found = structure.read(file)
        faults = [*found.faults, *judge_blocks(file, found)]
        _require_repairable(faults, path)
        codes = {one.code for one in faults} & _REPAIRED
        if "F7" in codes and keep is None:
            raise errors.Conflict(
                next(one for one in faults if one.code == "F7").error(path).message,
                hint="say which of the two is to be kept",
            )
        if "F33" in codes:
            _clear(file, found)
        if codes - {"F33"}:
            _write_footers(file, found, keep)
    finally:
        file.close()
    left = {(one.code, one.offset) for one in check(path)}
    return rules.of_file([one for one in faults if (one.code, one.offset) not in left], path)


def _require_repairable(faults: list[Fault], path: Path) -> None:
    """An odd length is the same fault as the missing footer: bytes that are too many, or too few of the footer's."""
    is_cut = any(one.code == "F3" and one.repairable for one in faults)
    grave = [one for one in faults if one.severity is Severity.ERROR and not (is_cut and one.code == "F2")]
    rules.refuse(grave, path)


def _write_footers(file: File, found: Structure, keep: Keep | None) -> None:
    """Both alike; the one that is worth less first."""
    assert found.footer is not None
    codes = {one.code for one in found.faults}
    footer, end = found.footer, found.end
    if keep is Keep.START and "F7" in codes:
        footer = Footer.unpack(file.read(0, FOOTER_SIZE))
    if "F16" in codes:
        # To programs that go by the geometry, the largest one says that they should not.
        exact = footer.creator in EXACT_CREATORS
        footer = replace(footer, geometry=format.geometry(footer.size) if exact else format.MAX_GEOMETRY)
    if found.kind is Kind.FIXED:
        _write(file, end, replace(footer, data_offset=format.NOWHERE))
        return
    if "F3" in codes and (closing := _find_closing(file, found)) is not None:
        end = closing
    places = (0, end) if "F5" in codes or keep is Keep.END else (end, 0)
    for place in places:
        _write(file, place, footer)
    if file.length() != end + FOOTER_SIZE:
        file.set_length(end + FOOTER_SIZE)
        file.sync()


def _write(file: File, at: int, footer: Footer) -> None:
    data = footer.pack()
    if file.read(at, FOOTER_SIZE) != data:
        file.write(at, data)
        file.sync()


def _find_closing(file: File, found: Structure) -> int | None:
    """Where the footer stands behind which there is only what does not belong to the disk."""
    start = format.round_up(found.data_end, SECTOR)
    if start >= found.length:
        return None
    tail = file.read(start, min(found.length - start, _MAX_TAIL))
    opening = file.read(0, FOOTER_SIZE)
    at = tail.find(opening)
    while at >= 0 and at % SECTOR:
        at = tail.find(opening, at + 1)
    if at >= 0:
        return start + at
    # Cut within the footer: what is left of it stays no riddle.
    return start if opening.startswith(tail) else None


def _clear(file: File, found: Structure) -> None:
    for _, start, end in unclaimed(file, found):
        file.write(start, bytes(end - start))
    file.sync()
