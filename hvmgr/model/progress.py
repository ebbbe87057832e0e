"""How far a long piece of work is: the one value that jobs report and faces draw."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """``done`` of ``total`` in the job's own unit (bytes for disks); ``total`` may grow and is 0 when unknown."""

    done: int
    total: int
    what: str
