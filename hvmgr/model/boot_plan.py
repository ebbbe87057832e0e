"""The steps of the commands on boot entries. Pure; ``model/plan`` says what steps are.

What an entry needs is written first, the menu last, in one piece: until then it is the old one.
"""

from __future__ import annotations

from dataclasses import dataclass

from hvmgr import units
from hvmgr.model.plan import Step


@dataclass(frozen=True, slots=True)
class PutBootFiles(Step):
    """The folder beside a VHD holds what its entry needs."""

    path: str
    kernel: str
    copied: bool

    def describe(self) -> str:
        what = f"the kernel {self.kernel}, its initramfs" if self.copied else "the second initramfs"
        return f"write {what}{' and the second one' if self.copied else ''} into {self.path}"


@dataclass(frozen=True, slots=True)
class MakeLayer(Step):
    """An empty layer for what the system writes; one that is there is thrown away."""

    path: str
    size: int

    def describe(self) -> str:
        return f"make an empty layer for {units.format_size(self.size)} at {self.path}"


@dataclass(frozen=True, slots=True)
class WriteMenu(Step):
    """The boot menu says something else, all at once; ``what`` is a short sentence."""

    path: str
    what: str

    def describe(self) -> str:
        return f"{self.what} in {self.path}"


@dataclass(frozen=True, slots=True)
class KeepLayer(Step):
    """What the system wrote becomes a differencing VHD."""

    path: str
    parent: str

    def describe(self) -> str:
        return f"write what lies in the layer as {self.path}, a differencing VHD on {self.parent}"


@dataclass(frozen=True, slots=True)
class MergeLayer(Step):
    """That differencing VHD goes into the VHD."""

    path: str
    into: str

    def describe(self) -> str:
        return f"merge {self.path} into {self.into}"


@dataclass(frozen=True, slots=True)
class RemoveBootFiles(Step):
    """The folder beside a VHD is gone, layer and all."""

    path: str

    def describe(self) -> str:
        return f"remove {self.path}"
