"""Where the sectors of a disk lie in its image files, said to GRUB (a block list) and to device mapper (a table).

Everything is counted in sectors of 512 bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

SECTOR = 512


class Run(NamedTuple):
    """``length`` sectors of the disk from ``start`` on: at ``place`` in the file ``level``, or zeros where that is None."""

    start: int
    length: int
    level: int | None
    place: int


def joined(pieces: Iterable[tuple[int, int, int | None, int]]) -> Iterator[Run]:
    """Pieces of a disk (offset, length, file, position; in bytes; ascending, without gaps) as as few runs as possible."""
    pending: Run | None = None
    for offset, length, level, position in pieces:
        place = position // SECTOR if level is not None else 0
        run = Run(offset // SECTOR, length // SECTOR, level, place)
        if (
            pending is not None
            and pending.level == level
            and (level is None or pending.place + pending.length == place)
        ):
            pending = pending._replace(length=pending.length + run.length)
            continue
        if pending is not None:
            yield pending
        pending = run
    if pending is not None:
        yield pending


def mapper_table(runs: Iterable[Run]) -> str:
    """Device mapper's table of the disk; ``@0``, ``@1`` stand for the devices of its files."""
    return "".join(
        f"{run.start} {run.length} zero\n"
        if run.level is None
        else f"{run.start} {run.length} linear @{run.level} {run.place}\n"
        for run in runs
    )


def block_runs(held: Iterable[tuple[int, int]], *, block: int, bitmap: int, size: int) -> Iterator[Run]:
    """The disk of a dynamic VHD, from its table alone: ``held`` are the blocks that it has and their entries, ascending.

    ``block`` and ``bitmap`` are a block's lengths, ``size`` the disk's. Sectors of a block that its bitmap calls unwritten are
    taken from the file too: they are zeros there.
    """
    end = 0
    for number, entry in held:
        start = number * block
        if start > end:
            yield Run(end, start - end, None, 0)
        end = min(start + block, size)
        yield Run(start, end - start, 0, entry + bitmap)
    if end < size:
        yield Run(end, size - end, None, 0)


def block_list(runs: Iterable[Run], length: int) -> list[str]:
    """GRUB's block list of the disk on a file of ``length`` sectors, in the order of the disk.

    GRUB knows no zeros: where the disk holds nothing, sectors from the beginning of the file stand in, which nobody reads.
    It refuses a stretch that is longer than the file, so a hole becomes several.
    """
    found = []
    for run in runs:
        if run.level is not None:
            found.append(f"{run.place}+{run.length}")
            continue
        whole, rest = divmod(run.length, length)
        found += [f"0+{length}"] * whole + ([f"0+{rest}"] if rest else [])
    return found
