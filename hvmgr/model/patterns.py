"""Paths inside disks, and patterns of them: ``*``, ``?``, ``[…]`` and ``**``. Names are bytes, with or without regard to case."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Sequence

_GLOB = frozenset(b"*?[")


def parts_of(path: bytes, *, ignoring_case: bool = False) -> list[bytes]:
    """The names in a path; where case is ignored it may be one of Windows'."""
    if ignoring_case and b"/" not in path:
        path = path[2:] if path[1:2] == b":" else path
        path = path.replace(b"\\", b"/") if not is_pattern(path) or path.startswith(b"\\") else path
    return [one for one in path.split(b"/") if one not in {b"", b"."}]


def beginnings(parts: Sequence[bytes], pattern: Sequence[bytes], *, ignoring_case: bool) -> Iterator[int]:
    """How many names of a path, from its start, are what a pattern means; as often as it means one of them."""
    if not pattern:
        yield 0
    elif pattern[0] == b"**":
        for count in range(len(parts) + 1):
            for more in beginnings(parts[count:], pattern[1:], ignoring_case=ignoring_case):
                yield count + more
    elif parts and _means(parts[0], pattern[0], ignoring_case=ignoring_case):
        for more in beginnings(parts[1:], pattern[1:], ignoring_case=ignoring_case):
            yield 1 + more


def _means(name: bytes, pattern: bytes, *, ignoring_case: bool) -> bool:
    if name == pattern or (ignoring_case and folded_name(name) == folded_name(pattern)):
        return True
    if not is_pattern(pattern) or (name.startswith(b".") and not pattern.startswith((b".", b"["))):
        return False
    return fits(name, pattern, ignoring_case=ignoring_case)


def is_pattern(part: bytes) -> bool:
    """Whether something in it may stand for something else."""
    return bool(_GLOB & set(part))


def literals(pattern: bytes) -> list[str]:
    """What every name that fits a pattern holds, both of them ``folded``."""
    text = re.sub(r"\[!?\]?[^\]]*\]", "*", folded_name(pattern))
    return [one for one in re.split(r"[*?\[\udc80-\udcff]", text) if one]


def fits(name: bytes, pattern: bytes, *, ignoring_case: bool = False) -> bool:
    """Whether a name fits a pattern with ``*``, ``?`` and ``[…]``."""
    if ignoring_case:
        return fnmatch.fnmatchcase(folded_name(name), folded_name(pattern))
    return fnmatch.fnmatchcase(_text(name), _text(pattern))


def folded(name: str) -> str:
    """A name as file systems fold it that ignore case: one letter of UTF-16 becomes one other, and never two ('ß' is no 'ss')."""
    return "".join(map(_capital, name))


def _capital(letter: str) -> str:
    upper = letter.upper()
    return upper if len(upper) == 1 and upper.lower() == letter <= "\uffff" else letter


def folded_name(name: bytes) -> str:
    """The same of a name as it is on the disk."""
    return folded(_text(name))


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
