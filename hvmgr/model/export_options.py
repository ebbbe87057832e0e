"""What an export is asked for, checked as far as that can be done without looking at the VM."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from hvmgr import errors
from hvmgr.model.manifest import Extent


class ImageFormat(StrEnum):
    """How a flattened disk is written."""

    QCOW2 = "qcow2"
    RAW = "raw"
    VHD = "vhd"

    @property
    def driver(self) -> str:
        """QEMU's name for it."""
        return "vpc" if self is ImageFormat.VHD else self.value

    @property
    def suffix(self) -> str:
        """What the file's name ends with."""
        return ".img" if self is ImageFormat.RAW else f".{self.value}"


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What goes into an export, and how.

    ``snapshots`` is ``all`` or ``none``; ``keep`` names the snapshots (by name or id) that alone are kept, ``snapshot``
    the one that becomes an independent VM. ``with_state`` keeps the memory of a running VM, ``without_state`` leaves
    every saved memory out. ``format`` is that of flattened disks: of one snapshot, or of the present alone.
    """

    snapshots: Extent = Extent.ALL
    keep: tuple[str, ...] = ()
    snapshot: str | None = None
    config_only: bool = False
    without_state: bool = False
    with_state: bool = False
    quiesce: bool = False
    exclude: tuple[str, ...] = ()
    format: ImageFormat | None = None
    checksums: bool = True

    @property
    def extent(self) -> Extent:
        """What the manifest says of the snapshots."""
        if self.snapshot is not None:
            return Extent.ONE
        return Extent.KEPT if self.keep else self.snapshots

    @property
    def flattens(self) -> bool:
        """Whether each disk becomes one image."""
        return self.extent in (Extent.ONE, Extent.NONE)

    def check(self) -> None:
        """UsageError for options that contradict each other, or of which one would be ignored."""
        if self.snapshots not in (Extent.ALL, Extent.NONE):
            raise errors.UsageError(f"snapshots are 'all' or 'none', not '{self.snapshots}'")
        pairs = [
            (self.snapshot is not None, "--snapshot", bool(self.keep), "--keep-snapshot"),
            (self.snapshot is not None, "--snapshot", self.snapshots is Extent.NONE, "--snapshots none"),
            (bool(self.keep), "--keep-snapshot", self.snapshots is Extent.NONE, "--snapshots none"),
            (self.with_state, "--with-state", self.without_state, "--without-state"),
            (self.with_state, "--with-state", self.quiesce, "--quiesce"),
            (self.with_state, "--with-state", self.snapshot is not None, "--snapshot"),
            (self.with_state, "--with-state", self.config_only, "--config-only"),
            (self.quiesce, "--quiesce", self.snapshot is not None, "--snapshot"),
            (self.quiesce, "--quiesce", self.config_only, "--config-only"),
            (self.config_only, "--config-only", self.snapshot is not None, "--snapshot"),
            (self.config_only, "--config-only", self.format is not None, "--format"),
        ]
        for first, name, second, other in pairs:
            if first and second:
                raise errors.UsageError(f"{name} and {other} exclude each other", hint="give one of them")
        if self.format is not None and not self.flattens:
            raise errors.UsageError(
                "--format is that of flattened disks, and trees keep theirs",
                hint="give --snapshot SNAP or --snapshots none with it, or leave it out",
            )
