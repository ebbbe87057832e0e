"""Which files are put into a disk, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PutOptions:
    """How things are put. ``mode``, ``uid`` and ``gid`` where they are not to be what is usual.

    ``as_before``: they are put back, with the owners, modes and attributes that they had; else what is new belongs to root,
    and what is replaced keeps its own.
    """

    overwrite: bool = False
    parents: bool = False
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    as_before: bool = False


@dataclass(frozen=True, slots=True)
class FilesWanted:
    """Which files of which snapshot; ``into`` is the folder that gets them, None for where they were."""

    snapshot: str
    paths: Sequence[bytes]
    slot: str | None = None
    partition: str | None = None
    into: bytes | None = None
