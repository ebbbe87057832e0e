"""What a domain of libvirt's names by storage pool and volume: the file or device behind it, by which images are counted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from hvmgr import errors
from hvmgr.host.domain import Domain
from hvmgr.host.hypervisor import Connection
from hvmgr.model import adoptee, configuration
from hvmgr.model.configuration import Configuration, Disk


def resolve(connection: Connection, one: Configuration, disk: Disk) -> None:
    """A disk that is a volume names its file or device itself, where there is one."""
    if disk.type == "volume":
        found = connection.find_volume(*adoptee.volume(one, disk.slot))
        if found is not None:
            adoptee.use_file(one, disk.slot, str(found.path), is_device=found.is_device)


def configurations(connection: Connection, domain: Domain) -> Iterator[Configuration]:
    """What a domain would start with and, when it is active, what it runs with; its volumes resolved."""
    for live in (False, True) if domain.is_active() else (False,):
        one = configuration.parse(domain.xml(live=live), source=f"libvirt's XML of {domain.name}")
        for disk in one.disks():
            with contextlib.suppress(
                errors.HvmgrError
            ):  # a pool that is not active tells nothing; nor can its VM start
                resolve(connection, one, disk)
        yield one
