"""Measuring in turns, and the table that it ends in.

A promise is a ratio of two medians of one run: the contenders take turns (A B A B), so that whatever else the machine
does meets all of them. Seconds alone say something about one machine only.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from hvmgr import units


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the table: medians in seconds; ``aim`` is the largest ratio, ``limit`` the most seconds, if any.

    ``is_size``: they are bytes.
    """

    what: str
    ours: float
    theirs: float | None = None
    other: str = ""
    in_process: float | None = None
    aim: float | None = None
    limit: float | None = None
    is_size: bool = False

    @property
    def ratio(self) -> float | None:
        """How many times as long as the other one takes."""
        return None if self.theirs is None else self.ours / self.theirs

    @property
    def is_met(self) -> bool | None:
        """Whether the aim is reached; None where there is none."""
        if self.limit is not None:
            return self.ours <= self.limit
        return None if self.aim is None or self.ratio is None else self.ratio <= self.aim


def in_turns(contenders: Mapping[str, Callable[[], object]], *, rounds: int, warm_up: int = 1) -> dict[str, float]:
    """The median seconds of each contender; ``warm_up`` rounds are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(warm_up + rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def program(argv: Sequence[str], *, environment: Mapping[str, str] | None = None) -> None:
    """Runs a program to its end with its output in a pipe; one that fails stops the measurement with its words."""
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=False, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"bench: {argv} ended with {done.returncode}\n{done.stderr.decode(errors='replace')}")


def table(results: Iterable[Result]) -> str:
    """All results as plain text."""
    rows: list[tuple[str, ...]] = [("what", "hvmgr", "in process", "the other", "", "ratio", "aim", "met")]
    rows += [_row(result) for result in results]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _row(result: Result) -> tuple[str, ...]:
    aim, shown = "" if result.aim is None else f"<= {result.aim:g}", _bytes if result.is_size else _seconds
    return (
        result.what,
        shown(result.ours),
        shown(result.in_process),
        shown(result.theirs),
        result.other,
        "" if result.ratio is None else f"{result.ratio:.2f}",
        aim if result.limit is None else f"<= {shown(result.limit)}",
        {True: "yes", False: "NO", None: ""}[result.is_met],
    )


def _bytes(value: float | None) -> str:
    return "" if value is None else units.format_size(int(value))


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value * 1000:.1f} ms" if value < 0.1 else f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"
