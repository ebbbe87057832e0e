"""Who may change VMs through which connection (docs/users.md).

Root may on every connection, an ordinary user on those whose QEMU runs as that user: the session's and an embedded one.
The system's QEMU has a user of its own. Images that it uses belong to it, saved memory belongs to root: an ordinary
user, member of the group libvirt or not, could neither freeze the one nor read the other. No access list helps there:
a mode is changed by a file's owner alone, and takes an access list's rights away.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from hvmgr import errors, settings
from hvmgr.storage import access

if TYPE_CHECKING:
    from hvmgr.host.hypervisor import Connection


def require_role(connection: Connection) -> None:
    """Unsupported when this process cannot keep the images of this connection's VMs in order."""
    if (missing := find_limit(connection)) is not None:
        raise missing


def find_limit(connection: Connection) -> errors.Unsupported | None:
    """What this process lacks to change this connection's VMs."""
    from hvmgr.host.hypervisor import Driver

    if settings.is_root() or connection.driver is not Driver.SYSTEM:
        return None
    owner = connection.capabilities().qemu_owner
    runs = "another user" if owner is None else access.name_of(owner[0])
    return errors.Unsupported(
        f"{access.name_of(os.geteuid())} cannot change VMs on {connection.uri}: QEMU runs as {runs} there, "
        "and only root can keep the images and the saved memory of its VMs in order",
        hint="run it as root (sudo), or have VMs of your own with -c qemu:///session",
        uri=connection.uri,
    )
