"""What libvirt itself keeps of snapshots of one domain: its metadata read, forgotten, and put back.

No image and no memory is touched by any of these calls. Raises NotFound for a domain or snapshot that is gone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hvmgr.host import libvirt_door

if TYPE_CHECKING:
    from hvmgr.host.domain import Domain


@dataclass(frozen=True, slots=True)
class Listed:
    """One snapshot as libvirt shows it: its XML with its secrets, and whether it is libvirt's current one."""

    name: str
    xml: str
    is_current: bool


def list_all(domain: Domain) -> list[Listed]:
    """Every snapshot that libvirt keeps of the domain, parents before their children."""
    libvirt = libvirt_door.library()
    with libvirt_door.translated(f"read libvirt's snapshots of {domain.name}"):
        found = _handle(domain).listAllSnapshots(libvirt.VIR_DOMAIN_SNAPSHOT_LIST_TOPOLOGICAL)
        secure = libvirt.VIR_DOMAIN_SNAPSHOT_XML_SECURE
        return [Listed(one.getName(), one.getXMLDesc(secure), bool(one.isCurrent())) for one in found]


def names(domain: Domain) -> list[str]:
    """The names alone, parents before their children."""
    libvirt = libvirt_door.library()
    with libvirt_door.translated(f"list libvirt's snapshots of {domain.name}"):
        found = _handle(domain).listAllSnapshots(libvirt.VIR_DOMAIN_SNAPSHOT_LIST_TOPOLOGICAL)
        return [one.getName() for one in found]


def forget(domain: Domain, name: str) -> None:
    """libvirt does not know the snapshot; its children hang on its parent. Fine when it did not know it."""
    libvirt = libvirt_door.library()
    with libvirt_door.translated(f"remove libvirt's note of the snapshot {name} of {domain.name}", changing=True):
        try:
            found = _handle(domain).snapshotLookupByName(name, 0)
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN_SNAPSHOT:
                raise
            return
        found.delete(libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY)


def redefine(domain: Domain, xml: str, *, current: bool = False) -> None:
    """libvirt knows the snapshot that this XML describes; its parent has to be there. One of that name is replaced."""
    libvirt = libvirt_door.library()
    flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE
    if current:
        flags |= libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_CURRENT
    if "<state>disk-snapshot</state>" in xml:
        flags |= libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY  # libvirt wants it said, or takes it for a damaged one
    with libvirt_door.translated(f"give libvirt a note of a snapshot of {domain.name}", changing=True):
        _handle(domain).snapshotCreateXML(xml, flags)


def bitmap_names(domain: Domain) -> list[str]:
    """libvirt's own checkpoints: dirty bitmaps in the images, of which libvirt keeps metadata."""
    libvirt = libvirt_door.library()
    with libvirt_door.translated(f"list libvirt's checkpoints of {domain.name}"):
        return [
            one.getName() for one in _handle(domain).listAllCheckpoints(libvirt.VIR_DOMAIN_CHECKPOINT_LIST_TOPOLOGICAL)
        ]


def _handle(domain: Domain) -> Any:
    return domain._handle()  # noqa: SLF001 - the same door, in a module of its own
