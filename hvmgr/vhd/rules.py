"""What can be wrong with a VHD: one code for each fault, how grave it is, which error it becomes, and its sentence.

The table is the whole of it; who finds a fault says where and fills in the sentence. Windows' own code (0xC03A00nn in
``winerror.h``) is told where it has one for the same fault.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from hvmgr import errors


class Severity(StrEnum):
    """What a reader does about it."""

    WARNING = "warning"  # reads on
    REPAIRABLE = "repairable"  # refuses, but the file can be put right without guessing
    ERROR = "error"  # refuses


class Rule(NamedTuple):
    """One row: ``{…}`` in the sentence is filled in by who finds the fault."""

    severity: Severity
    error: type[errors.HvmgrError]
    sentence: str
    windows: int | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that is wrong with one file; ``offset`` is the place in it, where there is one."""

    code: str
    severity: Severity
    offset: int | None
    text: str
    path: Path | None = None
    answer: type[errors.HvmgrError] = errors.Corrupt

    @property
    def repairable(self) -> bool:
        """Whether it can be put right without guessing."""
        return self.severity is Severity.REPAIRABLE

    @property
    def windows(self) -> int | None:
        """The code by which Windows refuses the same."""
        code = RULES[self.code].windows
        return None if code is None else 0xC03A0000 + code

    def describe(self) -> str:
        """The sentence with its code and place."""
        place = "" if self.offset is None else f" (at byte {self.offset})"
        return f"{self.code}: {self.text}{place}"

    def error(self, path: Path | None = None) -> errors.HvmgrError:
        """The error that a reader raises for it."""
        path = self.path or path
        hint = None
        if self.repairable:
            hint = f"'hvmgr image check --repair {path}' puts it right"
        place = "" if self.offset is None else f" (at byte {self.offset})"
        facts: dict[str, object] = {"path": str(path), "fault": self.code, "offset": self.offset}
        if self.windows is not None:
            facts["windows"] = f"0x{self.windows:08X}"
        return self.answer(f"{path}: {self.text}{place}", hint=hint, **facts)


def fault(
    code: str,
    offset: int | None = None,
    *,
    severity: Severity | None = None,
    answer: type[errors.HvmgrError] | None = None,
    path: Path | None = None,
    **values: object,
) -> Fault:
    """A fault by its code; ``severity`` and ``answer`` only where the row leaves a choice."""
    rule = RULES[code]
    text = rule.sentence.format(**values)
    return Fault(code, severity or rule.severity, offset, text, path, answer or rule.error)


class Notes:
    """The faults of one file, as they are met."""

    def __init__(self, path: Path) -> None:
        self.faults: list[Fault] = []
        self._path = path

    def add(
        self,
        code: str,
        offset: int | None = None,
        *,
        severity: Severity | None = None,
        answer: type[errors.HvmgrError] | None = None,
        **values: object,
    ) -> None:
        """One more, as ``fault`` makes it."""
        self.faults.append(fault(code, offset, severity=severity, answer=answer, path=self._path, **values))


def refuse(faults: list[Fault] | tuple[Fault, ...], path: Path) -> None:
    """Raises the error of the gravest fault; warnings raise nothing."""
    for severity in (Severity.ERROR, Severity.REPAIRABLE):
        for one in faults:
            if one.severity is severity:
                raise one.error(path)


def of_file(faults: list[Fault] | tuple[Fault, ...], path: Path) -> list[Fault]:
    """The same faults with the file that they are in."""
    return [one if one.path else replace(one, path=path) for one in faults]


_W, _R, _E = Severity.WARNING, Severity.REPAIRABLE, Severity.ERROR
_CORRUPT, _UNSUPPORTED = errors.Corrupt, errors.Unsupported
_NOT_FOUND, _CONFLICT = errors.NotFound, errors.Conflict

RULES: dict[str, Rule] = {
    "F1": Rule(_E, _CORRUPT, "the file ends before its {what} does: {length} bytes, {needed} are needed"),
    "F2": Rule(_E, _CORRUPT, "its length of {length} bytes is no whole number of sectors", 0x13),
    "F3": Rule(_E, _CORRUPT, "no footer in the last 512 bytes: {what}", 0x01),
    "F4": Rule(_R, _CORRUPT, "the checksum of the footer at the end is wrong, that of its copy is right", 0x02),
    "F5": Rule(
        _R, _CORRUPT, "the copy of the footer at the start is wrong ({what}), the one at the end is right", 0x02
    ),
    "F6": Rule(_E, _CORRUPT, "the checksum of {what} is wrong", 0x03),
    "F7": Rule(_R, _CORRUPT, "the footer at the end and its copy at the start differ in {fields}"),
    "F8": Rule(_E, _CORRUPT, "the features field is 0x{features:08X}: {what}"),
    "F9": Rule(_E, _UNSUPPORTED, "version 0x{version:08X} of the format is not 1.0", 0x05),
    "F10": Rule(_E, _UNSUPPORTED, "disk type {type} is none of fixed, dynamic and differencing", 0x04),
    "F11": Rule(_E, _CORRUPT, "a fixed disk whose data offset is 0x{found:X} instead of 64 ones"),
    "F12": Rule(_E, _CORRUPT, "a fixed disk of {size} bytes in a file that has {held} bytes before its footer", 0x13),
    "F13": Rule(_E, _CORRUPT, "its header cannot be at byte {where}: {what}"),
    "F14": Rule(_E, _CORRUPT, "a disk cannot have {size} bytes: {what}", 0x12),
    "F15": Rule(_W, _CORRUPT, "the {what} time {time} is in the future"),
    "F16": Rule(_W, _CORRUPT, "the geometry {found} covers more than the disk's {size} bytes"),
    "F17": Rule(_E, _CORRUPT, "the saved-state byte is {value}: {what}"),
    "F18": Rule(_W, _CORRUPT, "byte 85 of the footer is {value}, neither 0 nor 1"),
    "F19": Rule(_W, _CORRUPT, "reserved bytes of the {what} are not zero"),
    "F20": Rule(_W, _CORRUPT, "its unique id is all zeros"),
    "F21": Rule(_E, _CORRUPT, "no header cookie 'cxsparse'", 0x08),
    "F22": Rule(_E, _CORRUPT, "the checksum of the header is wrong", 0x06),
    "F23": Rule(_E, _UNSUPPORTED, "version 0x{version:08X} of the header is not 1.0", 0x07),
    "F24": Rule(_W, _CORRUPT, "the header's next offset is 0x{found:X} instead of 64 ones"),
    "F25": Rule(_E, _CORRUPT, "its block table cannot be at byte {where}: {what}", 0x0A),
    "F26": Rule(_E, _CORRUPT, "blocks cannot have {size} bytes: {what}", 0x0B),
    "F27": Rule(_E, _CORRUPT, "its block table has {entries} entries, the disk needs {needed}", 0x0A),
    "F28": Rule(_W, _CORRUPT, "a dynamic disk that names a parent ({what})"),
    "F29": Rule(_E, _CORRUPT, "block {block} lies at byte {at}, over the {what}", 0x0A),
    "F30": Rule(_E, _CORRUPT, "block {block} at byte {at} reaches {over} bytes past the end of the data", 0x0A),
    "F31": Rule(_E, _CORRUPT, "blocks {block} and {other} lie over each other at byte {at}", 0x0A),
    "F32": Rule(_W, _CORRUPT, "block {block} is allocated, but lies behind the end of the disk"),
    "F33": Rule(_R, _CORRUPT, "block {block} has data in sectors that its bitmap says are not there", 0x0C),
    "F34": Rule(_W, _CORRUPT, "block {block} has bits set behind the end of the disk"),
    "F35": Rule(_E, _CORRUPT, "locator {number} ({locator}) is impossible: {what}"),
    "F36": Rule(_E, _CORRUPT, "locator {number}: {what}"),
    "F37": Rule(_E, _CORRUPT, "locator {number} ({locator}) lies over the {what}"),
    "F38": Rule(_W, _CORRUPT, "locator {number} ({locator}) is no proper text: {what}"),
    "F39": Rule(_W, _CORRUPT, "locator {number} ({locator}) '{text}' {what}"),
    "F40": Rule(_W, _CORRUPT, "its locators name different files: {names}"),
    "F41": Rule(_E, _NOT_FOUND, "a differencing disk without a locator that can be used"),
    "F42": Rule(_E, _NOT_FOUND, "its parent '{name}' was not found; tried: {tried}", 0x0D),
    "F43": Rule(_E, _CONFLICT, "its parent has the id {wanted}, but {parent} has {found}", 0x0E),
    "F44": Rule(_W, _CONFLICT, "its parent {parent} has the time {found}, {wanted} was recorded", 0x0F),
    "F45": Rule(_E, _UNSUPPORTED, "it names no id of its parent, as over a raw disk of XenServer"),
    "F46": Rule(_E, _CONFLICT, "it has {size} bytes, its parent {parent} has {found}", 0x17),
    "F47": Rule(_E, _CORRUPT, "its chain of parents {what}", 0x18),
    "F48": Rule(_E, _CORRUPT, "its parent is damaged: {text}", 0x19),
    "F49": Rule(_E, _CONFLICT, "more than one file can be its parent: {names}"),
    "F50": Rule(_E, _UNSUPPORTED, "{what} is not read"),
    "F51": Rule(_E, _CORRUPT, "the stream ends early, at byte {at} of {total}"),
    "F52": Rule(_E, _UNSUPPORTED, "the {what} lies before what was read already, so it cannot be read as a stream"),
    "F53": Rule(_E, _CORRUPT, "the stream does not end with its footer: {what}"),
}
