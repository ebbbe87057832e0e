"""How many scheduled snapshots are kept: the rules as a value, and in the words of the command line and of files."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hvmgr import errors

KEPT_MAX = 64  # each of them is an image that every start has to open
_RULE = re.compile(r"(last|hourly|daily|weekly)=(\d{1,3})")


@dataclass(frozen=True, slots=True)
class Keep:
    """The newest ones, and the newest of each hour, day and week that has any."""

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0

    def __str__(self) -> str:
        rules = (("last", self.last), ("hourly", self.hourly), ("daily", self.daily), ("weekly", self.weekly))
        return ",".join(f"{name}={count}" for name, count in rules if count)


KEEP = Keep(last=7)  # where neither a VM nor a configuration file says anything


def parse(text: str) -> Keep:
    """``5``, ``last=3,hourly=24,daily=7,weekly=4``; UsageError says what is wrong."""
    hint = "write a number, or rules such as last=3,hourly=24,daily=7,weekly=4"
    rules = [f"last={text.strip()}"] if text.strip().isdecimal() else [one.strip() for one in text.split(",")]
    counts: dict[str, int] = {}
    for rule in rules:
        match = _RULE.fullmatch(rule)
        if match is None or match[1] in counts:
            raise errors.UsageError(f"'{text}' does not say how many snapshots are kept", hint=hint)
        counts[match[1]] = int(match[2])
    if not 1 <= sum(counts.values()) <= KEPT_MAX:
        raise errors.UsageError(
            f"'{text}' keeps {sum(counts.values())} snapshots; 1 to {KEPT_MAX} can be kept",
            hint="each one makes the next start slower; to keep none: --schedule none",
        )
    return Keep(**counts)
