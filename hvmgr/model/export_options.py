"""What an export is asked for, checked as far as that can be done without looking at the VM."""

from __future__ import annotations

from dataclasses import dataclass

from hvmgr import errors
from hvmgr.model.image_format import ImageFormat
from hvmgr.model.manifest import Extent

_WRITTEN = (ImageFormat.QCOW2, ImageFormat.RAW, ImageFormat.VHD)


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What goes into an export, and how.

    ``snapshots`` is ``all`` or ``none``; ``keep`` names the snapshots (by name or id) that alone are kept, ``snapshot``
    the one that becomes an independent VM. ``with_state`` keeps the memory of a running VM, ``without_state`` leaves
    every saved memory out. ``format`` is that of flattened disks (of one snapshot, or of the present alone); VHD also of trees.
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
        if self.format is not None and self.format not in _WRITTEN:
            raise errors.UsageError(
                f"disks are exported as {', '.join(_WRITTEN)}, not as {self.format}",
                hint="hvmgr image convert writes other formats",
            )
        if self.format not in (None, ImageFormat.VHD) and not self.flattens:
            raise errors.UsageError(
                f"a tree is exported as it is, or as VHDs: --format {self.format} is for flattened disks",
                hint="give --snapshot SNAP or --snapshots none with it, or leave it out",
            )
