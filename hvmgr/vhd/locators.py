"""Reads the texts by which a differencing disk leads to its parent, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from hvmgr.vhd import format
from hvmgr.vhd.file import File
from hvmgr.vhd.format import NO_ID, Code, Header, Locator
from hvmgr.vhd.rules import Notes, Severity

MAX_TEXT = 128 << 10  # twice the longest path that Windows knows


class Text(NamedTuple):
    """What a locator says, as bytes and, where it is one, as text."""

    number: int
    code: str
    raw: bytes
    text: str | None


class Area(NamedTuple):
    """A range of the file and what stands there."""

    start: int
    end: int
    what: str


class Reading:
    """The locators of one file; ``end`` is where its data ends."""

    def __init__(self, file: File, end: int, notes: Notes) -> None:
        self._file, self._end, self._note = file, end, notes.add

    def read(self, found: tuple[Locator, ...], areas: list[Area]) -> Iterator[Text]:
        """The texts of all locators that are possible; the areas that they take are added."""
        seen: set[bytes] = set()
        known = {code.value.encode() for code in Code}
        fixed = list(areas)
        for number, locator in enumerate(found):
            if locator.is_unused:
                if locator != Locator():
                    self._note("F35", number=number, locator="none", what="an unused entry is all zeros")
                continue
            code = locator.code.decode("latin-1")
            if locator.code in seen:
                self._note("F36", number=number, what=f"the code {code!r} is there twice")
                continue
            seen.add(locator.code)
            if locator.code not in known:
                self._note("F36", number=number, what=f"the code {code!r} is not known", severity=Severity.WARNING)
            if why := self._impossible(locator):
                self._note("F35", number=number, locator=code, what=why)
                continue
            end = locator.offset + locator.space_bytes
            for area in fixed:
                if area.start < end and locator.offset < area.end:
                    self._note("F37", locator.offset, number=number, locator=code, what=area.what)
            areas.append(Area(locator.offset, end, f"locator {number}"))
            yield self._read_text(number, code, locator)

    def _impossible(self, locator: Locator) -> str | None:
        space = locator.space_bytes
        if locator.reserved:
            return "its reserved bytes are not zero"
        if locator.offset == 0:
            return "its offset is 0"
        if space <= 0:
            return f"a space of {locator.space} is neither sectors nor bytes"
        if not 0 < locator.length <= min(space, MAX_TEXT):
            return f"a text of {locator.length} bytes in a space of {space}"
        if locator.offset + space > self._end:
            return "its text is not in the file"
        return None

    def _read_text(self, number: int, code: str, locator: Locator) -> Text:
        raw = self._file.read(locator.offset, locator.length)
        text = format.locator_text(locator.code, raw)
        if text is None:
            return Text(number, code, raw, None)
        if why := _flaw(raw, code):
            self._note("F38", locator.offset, number=number, locator=code, what=why)
            return Text(number, code, raw, None)
        if code == Code.RELATIVE and not text.startswith((".\\", "..\\")):
            what = "does not begin with .\\ or ..\\"
            self._note("F39", locator.offset, number=number, locator=code, text=text, what=what)
        return Text(number, code, raw, text or None)

    def judge_parent(self, header: Header, texts: tuple[Text, ...]) -> None:
        """Whether what a differencing disk says of its parent can lead there."""
        if header.parent_uid == NO_ID:
            self._note("F45", severity=Severity.WARNING)
        names = {base_name(one.text) for one in texts if one.text}
        if not names:
            self._note("F41", severity=Severity.WARNING)
        names |= {base_name(header.name)} - {""}
        if len({name.casefold() for name in names}) > 1:
            self._note("F40", names=", ".join(sorted(names)))


def base_name(text: str) -> str:
    """The last part of a path of Windows or of Unix."""
    return text.replace("\\", "/").rpartition("/")[2]


def _flaw(raw: bytes, code: str) -> str | None:
    """Why these bytes are no proper text."""
    encoding = "utf-8" if code == Code.URL else "utf-16-le"
    if encoding == "utf-16-le" and len(raw) % 2:
        return "an odd number of bytes"
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        return error.reason
    return "zeros within it" if "\0" in text.rstrip("\0") else None
