"""Whom an operation tells what it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hvmgr.model.plan import Plan
    from hvmgr.model.progress import Progress


def _silent(_: object) -> None:
    """Nobody listens."""


def _agree(_: Plan) -> bool:
    """Every plan is fine."""
    return True


@dataclass(frozen=True, slots=True)
class Reporter:
    """Whom an operation tells what people want to know: sentences, how far long work is, and what it is about to do."""

    notice: Callable[[str], None] = _silent
    progress: Callable[[Progress], None] = _silent
    approve: Callable[[Plan], bool] = _agree
    dry_run: bool = False  # nothing is changed, not even what would be set right first
