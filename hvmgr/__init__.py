"""The Hyper-V way of working with virtual machines, on KVM.

    import hvmgr

    with hvmgr.Host.open() as host:
        for vm in host.vms():
            print(vm.name, [snapshot.name for snapshot in vm.snapshots()])

Every name in ``__all__`` is imported when it is first used, so that ``import hvmgr`` costs nothing.
"""

from __future__ import annotations

from hvmgr.version import __version__

TYPE_CHECKING = False  # typing's own costs 8 ms to import; type checkers know the name
if TYPE_CHECKING:
    from hvmgr import errors
    from hvmgr.host.domain import State
    from hvmgr.model.boot_entry import BootEntry
    from hvmgr.model.boot_options import BootOptions
    from hvmgr.model.disk_layout import FileSystem, Layout, LayoutWish, TableKind
    from hvmgr.model.export_options import ExportOptions
    from hvmgr.model.finding import Finding, Severity
    from hvmgr.model.image_format import ImageFormat
    from hvmgr.model.image_info import ImageCheck, ImageFault, ImageInfo, ImageOptions, ImageParent
    from hvmgr.model.import_options import ImportOptions, Mode
    from hvmgr.model.metadata import SavedState, SnapshotType
    from hvmgr.model.netboot import NetbootOptions
    from hvmgr.model.plan import Plan
    from hvmgr.model.policy import Origin, Policy
    from hvmgr.model.progress import Progress
    from hvmgr.model.put_options import FilesWanted, PutOptions
    from hvmgr.model.specification import DiskSpecification, NetworkSpecification, Specification
    from hvmgr.model.wim_options import WimApplyOptions, WimCaptureOptions, WimCompression
    from hvmgr.operations.adopt.adoption import AdoptOptions
    from hvmgr.operations.adopt.release import Release
    from hvmgr.operations.boot.entries import BootMenu
    from hvmgr.operations.doctor.repair import Repaired
    from hvmgr.operations.exchange.import_plan import ImportPlan
    from hvmgr.operations.exchange.importing import CloneOptions
    from hvmgr.operations.host import Host
    from hvmgr.operations.images.image_files import Images
    from hvmgr.operations.images.wims import Wims
    from hvmgr.operations.reporter import Reporter
    from hvmgr.operations.snapshot import Snapshot
    from hvmgr.operations.transfer.outgoing import Outgoing
    from hvmgr.operations.transfer.vdis import Disks, Vdi
    from hvmgr.operations.usage import Usage
    from hvmgr.operations.vm import VM
    from hvmgr.operations.watching import Happening

__all__ = [
    "VM",
    "AdoptOptions",
    "BootEntry",
    "BootMenu",
    "BootOptions",
    "CloneOptions",
    "DiskSpecification",
    "Disks",
    "ExportOptions",
    "FileSystem",
    "FilesWanted",
    "Finding",
    "Happening",
    "Host",
    "ImageCheck",
    "ImageFault",
    "ImageFormat",
    "ImageInfo",
    "ImageOptions",
    "ImageParent",
    "Images",
    "ImportOptions",
    "ImportPlan",
    "Layout",
    "LayoutWish",
    "Mode",
    "NetbootOptions",
    "NetworkSpecification",
    "Origin",
    "Outgoing",
    "Plan",
    "Policy",
    "Progress",
    "PutOptions",
    "Release",
    "Repaired",
    "Reporter",
    "SavedState",
    "Severity",
    "Snapshot",
    "SnapshotType",
    "Specification",
    "State",
    "TableKind",
    "Usage",
    "Vdi",
    "WimApplyOptions",
    "WimCaptureOptions",
    "WimCompression",
    "Wims",
    "__version__",
    "errors",
]

_HOMES = {
    "VM": "hvmgr.operations.vm",
    "AdoptOptions": "hvmgr.operations.adopt.adoption",
    "BootEntry": "hvmgr.model.boot_entry",
    "BootMenu": "hvmgr.operations.boot.entries",
    "BootOptions": "hvmgr.model.boot_options",
    "CloneOptions": "hvmgr.operations.exchange.importing",
    "DiskSpecification": "hvmgr.model.specification",
    "Disks": "hvmgr.operations.transfer.vdis",
    "ExportOptions": "hvmgr.model.export_options",
    "FileSystem": "hvmgr.model.disk_layout",
    "FilesWanted": "hvmgr.model.put_options",
    "Finding": "hvmgr.model.finding",
    "Happening": "hvmgr.operations.watching",
    "Host": "hvmgr.operations.host",
    "ImageCheck": "hvmgr.model.image_info",
    "ImageFault": "hvmgr.model.image_info",
    "ImageFormat": "hvmgr.model.image_format",
    "ImageInfo": "hvmgr.model.image_info",
    "ImageOptions": "hvmgr.model.image_info",
    "ImageParent": "hvmgr.model.image_info",
    "Images": "hvmgr.operations.images.image_files",
    "ImportOptions": "hvmgr.model.import_options",
    "ImportPlan": "hvmgr.operations.exchange.import_plan",
    "Layout": "hvmgr.model.disk_layout",
    "LayoutWish": "hvmgr.model.disk_layout",
    "Mode": "hvmgr.model.import_options",
    "NetbootOptions": "hvmgr.model.netboot",
    "NetworkSpecification": "hvmgr.model.specification",
    "Origin": "hvmgr.model.policy",
    "Outgoing": "hvmgr.operations.transfer.outgoing",
    "Plan": "hvmgr.model.plan",
    "Policy": "hvmgr.model.policy",
    "Progress": "hvmgr.model.progress",
    "PutOptions": "hvmgr.model.put_options",
    "Release": "hvmgr.operations.adopt.release",
    "Repaired": "hvmgr.operations.doctor.repair",
    "Reporter": "hvmgr.operations.reporter",
    "SavedState": "hvmgr.model.metadata",
    "Severity": "hvmgr.model.finding",
    "Snapshot": "hvmgr.operations.snapshot",
    "SnapshotType": "hvmgr.model.metadata",
    "Specification": "hvmgr.model.specification",
    "State": "hvmgr.host.domain",
    "TableKind": "hvmgr.model.disk_layout",
    "Usage": "hvmgr.operations.usage",
    "Vdi": "hvmgr.operations.transfer.vdis",
    "WimApplyOptions": "hvmgr.model.wim_options",
    "WimCaptureOptions": "hvmgr.model.wim_options",
    "WimCompression": "hvmgr.model.wim_options",
    "Wims": "hvmgr.operations.images.wims",
}


def __getattr__(name: str) -> object:
    import importlib

    if name == "errors":
        return importlib.import_module("hvmgr.errors")
    if name not in _HOMES:
        raise AttributeError(f"module 'hvmgr' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
