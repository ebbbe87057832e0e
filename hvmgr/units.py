"""Sizes and times between people and numbers. A size is always bytes, a moment always UTC inside."""

from __future__ import annotations

import re
from datetime import UTC, datetime

from hvmgr import errors

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
TIB = 1024 * GIB

_FACTORS = {"": 1, "B": 1, "K": KIB, "M": MIB, "G": GIB, "T": TIB}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)

_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)\s*([smhd]?)")


def parse_size(text: str) -> int:
    """Bytes for ``512M``, ``1.5G``, ``10GiB`` or a plain number below 8 EiB; units are powers of 1024."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise errors.UsageError(f"'{text}' is not a size", hint="write a number with a unit, such as 512M or 20G")
    size = float(match[1]) * _FACTORS[match[2].upper()]
    if size >= 1 << 63:
        raise errors.UsageError(f"'{text}' is too large", hint="no file and no disk can have 8 EiB (8388608T)")
    return int(size)


def format_size(size: int) -> str:
    """A size as people read it, three digits or so: ``0 B``, ``196 KiB``, ``1.5 GiB``."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 10 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def parse_duration(text: str) -> float:
    """Seconds for ``90``, ``30s``, ``10m``, ``2h`` or ``1.5d``."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise errors.UsageError(
            f"'{text}' is not a length of time", hint="write a number with a unit, such as 30s or 2h"
        )
    return float(match[1]) * _SECONDS[match[2]]


def to_rfc3339(moment: datetime) -> str:
    """UTC with microseconds and ``Z``; sorts as text in the order of time."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def from_rfc3339(text: str) -> datetime:
    """The inverse of ``to_rfc3339``; raises ValueError on anything else."""
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError(f"no time zone in '{text}'")
    return moment.astimezone(UTC)


def format_local(moment: datetime) -> str:
    """Local time with its offset, for people: ``2026-11-21 14:03:05 +0100``."""
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
