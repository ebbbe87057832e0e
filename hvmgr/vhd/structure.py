"""Reads what a VHD says of itself: footers, header, locators, block table; and what is wrong with that.

Nothing is believed: every offset is held against the file's length before anything is read there, and nothing larger than
the file is allocated. What is wrong is collected (``Structure.faults``); ``Structure.refuse`` makes an error of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

from hvmgr import errors
from hvmgr.vhd import format, locators, rules, table
from hvmgr.vhd.file import File
from hvmgr.vhd.format import FOOTER_SIZE, HEADER_SIZE, NO_ID, NOWHERE, SECTOR, Footer, Header, Kind
from hvmgr.vhd.locators import Area, Text
from hvmgr.vhd.rules import Fault, Notes, Severity
from hvmgr.vhd.table import Table

MAX_TABLE = 64 << 20  # a table of 16 million blocks; only blocks far smaller than any writer's need more
_CLOCK_ERROR = 30 * 60  # seconds that another computer's clock may be ahead
_READABLE = frozenset({"F4", "F5", "F6", "F7", "F22"})  # faults over which the rest can still be read


@dataclass(frozen=True)
class Structure:
    """What one file says of itself.

    ``footer`` is None when there is none at all, ``header`` and ``table`` for fixed disks and where they cannot be read.
    """

    path: Path
    length: int
    end: int  # where the footer at the end begins; all data lies before it
    footer: Footer | None = None
    header: Header | None = None
    table: Table | None = None
    texts: tuple[Text, ...] = ()
    areas: tuple[Area, ...] = ()  # header, table, locators, batmap: where no block may lie
    data_end: int = 0  # where the last block, or the last of the areas, ends
    blocks_end: int = 0  # where the last block would end if its writer had not cut it at the disk's end
    faults: tuple[Fault, ...] = ()

    @property
    def kind(self) -> Kind | None:
        """None when the type is unknown."""
        return self.footer.kind if self.footer else None

    def refuse(self, *, tolerant: bool = False) -> None:
        """Raises the error of the gravest fault.

        ``tolerant``: not for wrong checksums and footers that contradict each other, as long as the rest can be read.
        """
        grave = [one for one in self.faults if not (tolerant and _is_readable(one))]
        rules.refuse(grave, self.path)
        if self.footer is None or (self.kind is not Kind.FIXED and (self.header is None or self.table is None)):
            rules.refuse(self.faults, self.path)
            raise errors.Corrupt(f"{self.path} is no VHD")


def identify(path: Path | str) -> Kind | None:
    """Which VHD a file is by its content alone; None when it is none. Reads two sectors.

    A damaged VHD is still one: its cookie and its type decide, not its checksums.
    """
    footer = peek(path)
    return footer.kind if footer else None


def peek(path: Path | str) -> Footer | None:
    """The footer of a file without a judgement of it; None when the file is no VHD."""
    file = File(Path(path))
    try:
        length = file.length()
        if length < 2 * SECTOR - 1:
            return None
        closing = _unpack(_read_end(file, length)[1])
        if closing is not None and closing.kind is Kind.FIXED:
            return closing
        opening = _unpack(file.read(0, FOOTER_SIZE))
        return next((one for one in (closing, opening) if one is not None and one.kind is not None), None)
    finally:
        file.close()


def read(file: File) -> Structure:
    """All that the file says of itself, and all that is wrong with it; raises only what the file system does."""
    return _Reading(file).run()


def _unpack(data: bytes) -> Footer | None:
    return Footer.unpack(data) if data[:8] == format.FOOTER_COOKIE and len(data) >= FOOTER_SIZE - 1 else None


def _read_end(file: File, length: int) -> tuple[int, bytes]:
    """Where the footer at the end begins, and its bytes; the old short one counts as followed by a zero."""
    size = FOOTER_SIZE - 1 if length % SECTOR == FOOTER_SIZE - 1 else FOOTER_SIZE
    end = max(0, length - size)
    return end, file.read(end, size).ljust(FOOTER_SIZE, b"\0")


class _Reading:
    """One file being read; faults are noted as they are met."""

    def __init__(self, file: File) -> None:
        self._file = file
        self._length = file.length()
        self._end, self._closing = _read_end(file, self._length)
        self._opening = file.read(0, FOOTER_SIZE)
        self._notes = Notes(file.path)
        self._note = self._notes.add
        self._cut = False  # the footer at the end is missing

    def run(self) -> Structure:
        footer = self._choose_footer()
        result = Structure(self._file.path, self._length, self._end, footer)
        if footer is not None:
            self._judge_footer(footer)
            if footer.kind is Kind.FIXED:
                self._judge_fixed(footer)
                result = replace(result, data_end=footer.size)
            elif footer.kind is not None:
                result = self._read_dynamic(result, footer)
        return replace(result, faults=tuple(self._notes.faults))

    # --- the footers ---

    def _choose_footer(self) -> Footer | None:
        if self._length % SECTOR not in (0, SECTOR - 1):
            self._note("F2", length=self._length)
        if self._length < 2 * SECTOR - 1:
            self._note("F1", what="footer", length=self._length, needed=2 * SECTOR)
            return None
        opening, closing = _unpack(self._opening), _unpack(self._closing)
        if closing is not None and (closing.kind is Kind.FIXED or opening is None):
            return self._take_closing(closing)
        if opening is None:
            self._note("F3", self._end, what="it is no VHD")
        elif closing is None:
            self._take_opening()
        else:
            return self._choose_between(opening, closing)
        return opening

    def _take_opening(self) -> None:
        self._cut = True  # how grave that is, the blocks say
        self._end = self._length
        if not format.has_right_sum(self._opening, format.FOOTER_SUM_AT):
            self._note("F6", 0, what="the only footer")

    def _choose_between(self, opening: Footer, closing: Footer) -> Footer:
        right = format.has_right_sum(self._opening, format.FOOTER_SUM_AT)
        if not format.has_right_sum(self._closing, format.FOOTER_SUM_AT):
            if right:
                self._note("F4", self._end)
                return opening
            # Two copies that agree in every byte were not damaged: a program forgot the checksum.
            agreed = Severity.REPAIRABLE if self._opening == self._closing else None
            self._note("F6", self._end, severity=agreed, what="the footer and of its copy")
        elif not right:
            self._note("F5", 0, what="checksum")
            return closing
        if opening != closing:
            self._note("F7", self._end, fields=", ".join(_differences(opening, closing)))
        return closing

    def _take_closing(self, closing: Footer) -> Footer:
        if not format.has_right_sum(self._closing, format.FOOTER_SUM_AT):
            self._note("F6", self._end, what="the only footer")
        if closing.kind in (Kind.DYNAMIC, Kind.DIFFERENCING):
            self._note("F5", 0, what="no cookie 'conectix'")
        return closing

    def _judge_footer(self, footer: Footer) -> None:
        self._judge_features(footer)
        if footer.version != format.VERSION:
            self._note("F9", version=footer.version)
        if footer.kind is None:
            self._note("F10", type=footer.type)
        if footer.creator == b"tap\0" and footer.creator_version == 1:
            self._note("F50", what="tap 0.1, whose bitmaps are little-endian,")
        elif self._file.path.with_suffix(".v01").exists():
            self._note("F50", what="an image that is split into .vhd, .v01 and so on")
        self._judge_size(footer)
        self._judge_time(footer.time, "creation")
        self._judge_state(footer)
        if any(footer.reserved):
            self._note("F19", what="footer")
        if footer.uid == NO_ID:
            self._note("F20")

    def _judge_state(self, footer: Footer) -> None:
        if footer.geometry != format.MAX_GEOMETRY and footer.geometry.size > footer.size:
            found = footer.geometry
            text = f"{found.cylinders}/{found.heads}/{found.sectors}"
            self._note("F16", found=text, size=footer.size)
        if footer.saved_state == 1:
            what = "a saved VM is on it, so it cannot be resized, compacted or merged"
            self._note("F17", value=1, what=what, severity=Severity.WARNING, answer=errors.Conflict)
        elif footer.saved_state:
            self._note("F17", value=footer.saved_state, what="neither 0 nor 1")
        if footer.hidden not in (0, 1):
            self._note("F18", value=footer.hidden)

    def _judge_features(self, footer: Footer) -> None:
        known = format.RESERVED_FEATURE | format.TEMPORARY_FEATURE
        if footer.features & ~known:
            what = "bits that are not known"
            self._note("F8", features=footer.features, what=what, answer=errors.Unsupported)
        elif not footer.features & format.RESERVED_FEATURE:
            self._note("F8", features=footer.features, what="bit 1 is always set")

    def _judge_size(self, footer: Footer) -> None:
        if footer.size == 0 or footer.size % SECTOR:
            what = "it must be a whole number of sectors, and one at least"
            self._note("F14", size=footer.size, what=what)
        elif footer.size > format.MAX_SIZE and footer.kind is not Kind.FIXED:
            what = "2040 GiB are the most"
            self._note("F14", size=footer.size, what=what, answer=errors.Unsupported)

    def _judge_time(self, stamp: int, what: str) -> None:
        moment = format.from_stamp(stamp)
        if moment is not None and moment.timestamp() > time.time() + _CLOCK_ERROR:
            self._note("F15", what=what, time=f"{moment:%Y-%m-%d %H:%M:%S} UTC")

    def _judge_fixed(self, footer: Footer) -> None:
        if footer.data_offset != NOWHERE:
            severity = Severity.WARNING if footer.data_offset == 0xFFFFFFFF else None
            self._note("F11", self._end + 16, severity=severity, found=footer.data_offset)
        if footer.size != self._end:
            self._note("F12", size=footer.size, held=self._end)

    # --- header, locators, table ---

    def _read_dynamic(self, result: Structure, footer: Footer) -> Structure:
        needed = FOOTER_SIZE + HEADER_SIZE + SECTOR + FOOTER_SIZE
        if self._length < needed - 1:
            self._note("F1", what="header", length=self._length, needed=needed)
            return result
        at = footer.data_offset
        if at < FOOTER_SIZE or at % SECTOR or at + HEADER_SIZE > self._end:
            self._note("F13", 16, where=at, what="it is not in the file, or no sector begins there")
            return result
        data = self._file.read(at, HEADER_SIZE)
        header = Header.unpack(data)
        if header.cookie != format.HEADER_COOKIE:
            self._note("F21", at)
            return result
        if not format.has_right_sum(data, format.HEADER_SUM_AT):
            self._note("F22", at)
        self._judge_header(header, footer, at)
        areas = [Area(0, FOOTER_SIZE, "copy of the footer"), Area(at, at + HEADER_SIZE, "header")]
        entries = self._read_table(header, footer, areas)
        reading = locators.Reading(self._file, self._end, self._notes)
        texts = tuple(reading.read(header.locators, areas))
        if footer.kind is Kind.DIFFERENCING:
            reading.judge_parent(header, texts)
        result = replace(result, header=header, texts=texts, areas=tuple(areas))
        data_end = max(area.end for area in areas)
        if entries is not None and not self._has("F14", "F26"):
            blocks_end = self._judge_blocks(entries, header, footer, areas)
            data_end = max(data_end, blocks_end if self._cut else min(blocks_end, self._end))
            result = replace(result, table=entries, blocks_end=blocks_end)
        if self._cut:
            self._judge_cut(data_end)
        return replace(result, data_end=data_end, end=self._end)

    def _has(self, *codes: str) -> bool:
        return any(one.code in codes and one.severity is Severity.ERROR for one in self._notes.faults)

    def _judge_header(self, header: Header, footer: Footer, at: int) -> None:
        if header.version != format.VERSION:
            self._note("F23", at + 24, version=header.version)
        if header.next_offset != NOWHERE:
            self._note("F24", at + 8, found=header.next_offset)
        size = header.block_size
        if size < SECTOR or size & (size - 1):
            self._note("F26", at + 32, size=size, what="it must be 512 times a power of two")
        if header.reserved_word or any(header.reserved):
            self._note("F19", at + 60, what="header")
        self._judge_time(header.parent_time, "parent's")
        if footer.kind is Kind.DYNAMIC:
            named = {
                "id": header.parent_uid != NO_ID,
                "time": header.parent_time != 0,
                "name": any(header.parent_name),
                "locators": any(not one.is_unused for one in header.locators),
            }
            if found := [word for word, is_there in named.items() if is_there]:
                self._note("F28", at + 40, what=", ".join(found))

    def _read_table(self, header: Header, footer: Footer, areas: list[Area]) -> Table | None:
        if self._has("F14", "F26"):
            return None
        at, needed = header.table_offset, format.block_count(footer.size, header.block_size)
        if why := self._misplaced(at, needed, areas):
            self._note("F25", footer.data_offset + 16, where=at, what=why)
            return None
        if header.entries < needed:
            self._note("F27", footer.data_offset + 28, entries=header.entries, needed=needed)
            return None
        if 4 * needed > MAX_TABLE:
            what = f"that takes a table of {4 * needed} bytes"
            self._note("F26", footer.data_offset + 32, size=header.block_size, what=what, answer=errors.Unsupported)
            return None
        end = at + 4 * header.entries
        own = Area(at, min(end, self._end), "block table")
        areas.append(own)
        if footer.creator == b"tap\0":
            areas.extend(self._batmap(format.round_up(end, SECTOR)))
        self._judge_superfluous(at + 4 * needed, own.end, needed)
        return Table.unpack(self._file.read(at, 4 * needed))

    def _misplaced(self, at: int, needed: int, areas: list[Area]) -> str | None:
        """Why the table cannot be there."""
        end = at + 4 * needed
        if at < FOOTER_SIZE or at % SECTOR:
            return "no sector of the data begins there"
        if end > self._end:
            return f"it would end at byte {end}, behind the file's {self._end} bytes of data"
        if any(one.start < end and at < one.end for one in areas):
            return "it lies over the header"
        return None

    def _batmap(self, at: int) -> Iterator[Area]:
        """XenServer keeps behind the table which blocks are written in full; the bitmaps say the same."""
        data = self._file.read(at, SECTOR)
        if data[:8] == format.BATMAP_COOKIE and len(data) == SECTOR:
            start, sectors = int.from_bytes(data[8:16], "big"), int.from_bytes(data[16:20], "big")
            yield Area(at, at + SECTOR, "batmap's header")
            if start + sectors * SECTOR <= self._end:
                yield Area(start, start + sectors * SECTOR, "batmap")

    def _judge_superfluous(self, start: int, end: int, first: int) -> None:
        """Entries behind the disk's last block say nothing; one that is used is worth a word."""
        for at in range(start, end, 1 << 20):
            data = self._file.read(at, min(1 << 20, end - at))
            if len(data) >= 4 and data.count(b"\xff") != len(data):
                entries = Table.unpack(data[: len(data) & ~3])
                block = entries.next_allocated(0, len(entries))
                if block < len(entries):
                    self._note("F32", at + 4 * block, block=first + (at - start) // 4 + block)
                return

    # --- blocks ---

    def _judge_blocks(self, entries: Table, header: Header, footer: Footer, areas: list[Area]) -> int:
        """Where the last block in the file ends, be all of it there or not."""
        bitmap, places = format.bitmap_size(header.block_size), entries.places()
        stride = bitmap + header.block_size
        for area in areas:
            for place in table.within(places, stride // SECTOR, area.start, area.end):
                code = "F37" if area.what.startswith("locator") else "F29"
                block = entries.block_at(place)
                if code == "F37":
                    number = area.what.split()[1]
                    self._note(code, area.start, number=number, locator="its text", what=f"block {block}")
                else:
                    self._note(code, self._entry_at(header, block), block=block, at=place * SECTOR, what=area.what)
        for one, other in table.overlaps(places, stride // SECTOR):
            first = entries.block_at(one)
            second = entries.block_at(other, first + 1 if one == other else 0)
            self._note("F31", self._entry_at(header, second), block=first, other=second, at=other * SECTOR)
        end = 0 if not places else places[-1] * SECTOR + stride
        if end <= self._end or self._cut:
            return end
        last = len(entries) - 1
        tail = format.round_up(footer.size - last * header.block_size, SECTOR)
        for place in table.within(places, stride // SECTOR, self._end, end):
            block = entries.block_at(place)
            over = place * SECTOR + stride - self._end
            is_tail = block == last and place * SECTOR + bitmap + tail <= self._end
            severity = Severity.WARNING if is_tail else None
            at = self._entry_at(header, block)
            self._note("F30", at, severity=severity, block=block, at=place * SECTOR, over=over)
        return end

    def _entry_at(self, header: Header, block: int) -> int:
        return header.table_offset + 4 * block

    def _judge_cut(self, data_end: int) -> None:
        """Without the footer at the end: nothing is lost as long as no block is cut."""
        whole = data_end <= self._length
        what = f"it should stand at byte {data_end} or later, the file ends at {self._length}"
        severity = Severity.REPAIRABLE if whole else None
        self._note("F3", self._length, severity=severity, what=what)
        self._end = format.round_up(max(data_end, self._length), SECTOR) if whole else self._length


def _is_readable(fault: Fault) -> bool:
    """F3 is grave only when a block is cut."""
    return fault.code in _READABLE or (fault.code == "F3" and fault.repairable)


def _differences(one: Footer, other: Footer) -> list[str]:
    names = [field.name for field in fields(Footer) if getattr(one, field.name) != getattr(other, field.name)]
    return [f"{name} ({_shown(getattr(one, name))} at the start, {_shown(getattr(other, name))})" for name in names]


def _shown(value: object) -> str:
    if isinstance(value, bytes):
        return value.hex() if len(value) <= 16 else "other bytes"
    return str(value)
