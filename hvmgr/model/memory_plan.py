"""The steps with which the memory of a running VM is saved while its guest goes on; ``model/plan`` says what steps are."""

from __future__ import annotations

from dataclasses import dataclass

from hvmgr import units
from hvmgr.model.plan import Plan, Step


@dataclass(frozen=True, slots=True)
class ReserveMemory(Step):
    """An empty file for saved memory, with all the space that it may need: QEMU must not meet a full disk."""

    path: str
    size: int

    def describe(self) -> str:
        return f"reserve {units.format_size(self.size)} for the memory"


@dataclass(frozen=True, slots=True)
class AwaitMemory(Step):
    """QEMU's background snapshot has come to its end, and the file says whether it is whole."""

    path: str

    def describe(self) -> str:
        return "wait until the memory is saved; the guest goes on meanwhile"


@dataclass(frozen=True, slots=True)
class CompressMemory(Step):
    """The stream in a complete save file is compressed with zstd."""

    path: str

    def describe(self) -> str:
        return "compress the saved memory"


Plan.STEPS.update({cls.__name__: cls for cls in (ReserveMemory, AwaitMemory, CompressMemory)})
