"""Where everything stands in a new VHD, before its first byte is written.

Fixed: the disk, then the footer. Others: copy of the footer, header, texts that lead to the parent, block table, blocks whose
data begins at multiples of 4 KiB, footer.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from hvmgr import errors
from hvmgr.vhd import format
from hvmgr.vhd.format import FOOTER_SIZE, HEADER_SIZE, NOWHERE, SECTOR, Code, Footer, Header, Kind, Locator


@dataclass(frozen=True, slots=True)
class Parentage:
    """What a child says of its parent. Texts are as Windows writes paths; ``absolute`` only when one is known."""

    uid: bytes
    name: str
    relative: str
    absolute: str | None = None
    time: int = 0

    @property
    def texts(self) -> list[tuple[Code, bytes]]:
        """The locators' texts. Without a path of Windows the absolute one is relative too, as XenServer writes it."""
        return [
            (Code.RELATIVE, format.encode_text(Code.RELATIVE, self.relative)),
            (Code.ABSOLUTE, format.encode_text(Code.ABSOLUTE, self.absolute or self.relative)),
        ]


def parentage(child: Path, parent: Path, uid: bytes, *, absolute: str | None = None, time: int = 0) -> Parentage:
    """What a file at ``child`` says of a parent at ``parent``: the path between them, in Windows' writing."""
    relative = os.path.relpath(parent.absolute(), child.absolute().parent).replace("/", "\\")
    if not relative.startswith("..\\"):
        relative = ".\\" + relative
    return Parentage(uid, parent.name, relative, absolute, time)


@dataclass(frozen=True, slots=True)
class Layout:
    """A new VHD: its footer and header, and where the texts, the table and the first block stand."""

    footer: Footer
    header: Header | None = None
    texts: tuple[tuple[int, bytes], ...] = ()
    start: int = 0  # where blocks may begin

    @property
    def bitmap_size(self) -> int:
        """Bytes of a block's bitmap."""
        assert self.header is not None
        return format.bitmap_size(self.header.block_size)

    def place(self, free: int) -> int:
        """Where a block begins when the file is free from ``free`` on: its data is aligned to 4 KiB."""
        return format.round_up(free + self.bitmap_size, format.ALIGNMENT) - self.bitmap_size

    def front(self) -> list[tuple[int, bytes]]:
        """What stands before the blocks, the table excepted: offsets and bytes."""
        if self.header is None:
            return []
        return [(0, self.footer.pack()), (FOOTER_SIZE, self.header.pack()), *self.texts]


def require_size(size: int) -> None:
    """UsageError for a size that no VHD can have."""
    if size <= 0 or size % SECTOR:
        raise errors.UsageError(
            f"a VHD cannot have {size} bytes: its size is a multiple of 512, and not 0",
            hint=f"the next possible size is {max(1, -(-size // SECTOR)) * SECTOR}",
        )
    if size > format.MAX_SIZE:
        raise errors.UsageError(f"a VHD cannot have {size} bytes: 2040 GiB ({format.MAX_SIZE}) are the most")


def require_block_size(block_size: int) -> None:
    """UsageError for a size of blocks that other programs do not read."""
    low, high = format.MIN_BLOCK, format.MAX_BLOCK
    if not low <= block_size <= high or block_size & (block_size - 1):
        raise errors.UsageError(
            f"blocks cannot have {block_size} bytes: a power of two from 512 KiB to 256 MiB is possible",
            hint="2 MiB is what every program reads",
        )


def design(
    size: int,
    kind: Kind,
    *,
    block_size: int = format.DEFAULT_BLOCK,
    parent: Parentage | None = None,
    uid: bytes | None = None,
    time: datetime | None = None,
) -> Layout:
    """The layout of a new disk; UsageError for sizes that cannot be, and for a parent that does not fit the kind."""
    require_size(size)
    if (kind is Kind.DIFFERENCING) != (parent is not None):
        raise errors.UsageError(f"a {kind} disk {'needs' if parent is None else 'has no'} parent")
    footer = Footer(
        size=size,
        original_size=size,
        type=kind.number,
        uid=os.urandom(16) if uid is None else uid,
        time=format.to_stamp(time or datetime.now(UTC)),
        geometry=format.geometry(size),
        data_offset=NOWHERE if kind is Kind.FIXED else FOOTER_SIZE,
    )
    if kind is Kind.FIXED:
        return Layout(footer)
    require_block_size(block_size)
    free, locators, texts = FOOTER_SIZE + HEADER_SIZE, [], []
    for code, text in parent.texts if parent else []:
        space = format.round_up(len(text), SECTOR)
        locators.append(Locator(code.encode(), space, len(text), free))
        texts.append((free, text.ljust(space, b"\0")))
        free += space
    entries = format.block_count(size, block_size)
    header = Header(
        table_offset=free,
        entries=entries,
        block_size=block_size,
        parent_uid=parent.uid if parent else format.NO_ID,
        parent_time=parent.time if parent else 0,
        parent_name=format.encode_name(parent.name if parent else ""),
        locators=(*locators, *(Locator(),) * (format.LOCATORS - len(locators))),
    )
    return Layout(footer, header, tuple(texts), free + format.table_size(entries))
