"""What every step of a plan is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath


def name(path: str) -> str:
    """The last part of a path, for sentences."""
    return PurePath(path).name


@dataclass(frozen=True, slots=True)
class Step:
    """One act of a plan."""

    def describe(self) -> str:
        """The act as a short sentence for people."""
        raise NotImplementedError
