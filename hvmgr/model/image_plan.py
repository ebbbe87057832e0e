"""The steps of the commands on image files. Pure; ``model/plan`` says what steps are.

A plan without a journal makes a new file, complete or absent. Every step of a plan that changes an image in place may be
done again: a command that was cut off is completed by the next one on that image.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

from hvmgr import units
from hvmgr.model.plan import Plan, Step


def _name(path: str) -> str:
    return PurePath(path).name


@dataclass(frozen=True, slots=True)
class MakeImage(Step):
    """A new image of ``size`` bytes; with ``parent`` a differencing one."""

    path: str
    format: str
    type: str
    size: int
    parent: str | None
    parent_format: str | None
    block_size: int | None

    def describe(self) -> str:
        below = f" on {self.parent}" if self.parent else ""
        return f"create the {self.type} {self.format} image {self.path} of {units.format_size(self.size)}{below}"


@dataclass(frozen=True, slots=True)
class ConvertImage(Step):
    """A new image that shows the same disk; with ``parent`` only what differs from that is in it."""

    source: str
    source_format: str
    path: str
    format: str
    type: str
    parent: str | None
    parent_format: str | None
    keep_id: bool
    block_size: int | None

    def describe(self) -> str:
        below = f" on {self.parent}" if self.parent else ""
        return f"write what {self.source} shows as the {self.type} {self.format} image {self.path}{below}"


@dataclass(frozen=True, slots=True)
class MergeChain(Step):
    """The data of ``merged`` (highest first) goes into ``into`` below them, which then shows the same.

    ``formats`` are those of all of them, ``into`` last. As long as the first is there, what it shows never changes.
    """

    merged: tuple[str, ...]
    into: str
    formats: tuple[str, ...]

    @property
    def images(self) -> tuple[str, ...]:
        """All of them, highest first."""
        return (*self.merged, self.into)

    def describe(self) -> str:
        return f"merge {', '.join(_name(one) for one in self.merged)} into {self.into}"


@dataclass(frozen=True, slots=True)
class GrowImage(Step):
    """An image that has nothing below it grows to ``size`` bytes, so that a larger child can be merged into it."""

    path: str
    format: str
    size: int

    def describe(self) -> str:
        return f"grow {self.path} to {units.format_size(self.size)}"


@dataclass(frozen=True, slots=True)
class PointChild(Step):
    """The header of ``child`` names ``parent``, whose disk is the same as that of the parent before."""

    child: str
    format: str
    parent: str
    parent_format: str

    def describe(self) -> str:
        return f"name {self.parent} as the parent of {self.child}"


@dataclass(frozen=True, slots=True)
class RemoveMerged(Step):
    """An image whose data is in another one goes."""

    path: str

    def describe(self) -> str:
        return f"remove {self.path}"


@dataclass(frozen=True, slots=True)
class FitPartitions(Step):
    """The second copy of a GPT moves to the place where the disk is going to end."""

    path: str
    format: str
    size: int

    def describe(self) -> str:
        return f"move the second copy of the partition table to the new end of {self.path}"


@dataclass(frozen=True, slots=True)
class SetSize(Step):
    """The disk gets ``size`` bytes."""

    path: str
    format: str
    size: int
    shrink: bool

    def describe(self) -> str:
        return f"{'cut' if self.shrink else 'grow'} {self.path} to {units.format_size(self.size)}"


@dataclass(frozen=True, slots=True)
class CompactImage(Step):
    """Blocks that hold nothing but zeros are given back; the disk stays the same."""

    path: str
    format: str

    def describe(self) -> str:
        return f"give back the blocks of {self.path} that hold zeros only"


@dataclass(frozen=True, slots=True)
class RepairImage(Step):
    """What a check calls repairable is put right."""

    path: str
    format: str

    def describe(self) -> str:
        return f"repair {self.path}"


@dataclass(frozen=True, slots=True)
class PrepareWork(Step):
    """Made in a file of its own, while the image is not touched: ``what`` says what that is."""

    what: str

    def describe(self) -> str:
        return self.what or "prepare it"


@dataclass(frozen=True, slots=True)
class WriteWork(Step):
    """A part of the disk, from ``offset`` on, gets the bytes of the file ``work``.

    It is done only while the image is as it was when the work was made (``stamp``): once it has begun, the file is named
    ``going``, and it may be done again until that file is gone.
    """

    path: str
    format: str
    work: str
    offset: int
    stamp: tuple[int, ...]

    @property
    def going(self) -> str:
        """The file's name from the first byte on that is written."""
        return f"{self.work}.going"

    def describe(self) -> str:
        return f"write that into {self.path}"


@dataclass(frozen=True, slots=True)
class RemoveWork(Step):
    """The folder in which the work was made goes."""

    folder: str

    def describe(self) -> str:
        return f"remove {self.folder}"


STEPS = {cls.__name__: cls for cls in Step.__subclasses__() if cls.__module__ == __name__}
Plan.STEPS.update(STEPS)
