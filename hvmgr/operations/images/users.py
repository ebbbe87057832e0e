"""Who needs an image file: differencing images beside it, VMs with a home, libvirt's domains, programs that have it open.

Found by what files say, never by their names: children by the parent that their headers name, everything else by device
and inode. libvirt may be out of reach; then ``asked_libvirt`` says so, and the rest holds all the same.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors
from hvmgr.host import qemu_errors
from hvmgr.model import configuration
from hvmgr.model.image_info import ImageUse, UseKind
from hvmgr.operations.images import recognition
from hvmgr.storage import images, index, survey

if TYPE_CHECKING:
    from hvmgr.host.domain import Domain
    from hvmgr.operations.host import Host

_Identity = tuple[int, int]


class Users:
    """The users of images, asked once for one command."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._homes: dict[_Identity, set[str]] | None = None
        self._domains: dict[_Identity, dict[str, bool]] | None = None
        self.asked_libvirt = True

    def of(self, path: Path) -> tuple[ImageUse, ...]:
        """Everybody who needs the image."""
        return (*self.children(path), *self.vms(path), *self.processes(path))

    def children(self, path: Path) -> tuple[ImageUse, ...]:
        """The differencing images in the same folder that stand on the image."""
        return tuple(ImageUse(UseKind.CHILD, str(one)) for one in children_of(path))

    def vms(self, path: Path) -> tuple[ImageUse, ...]:
        """The VMs of any home and any domain of libvirt whose disks reach the image."""
        identity = images.identity(path)
        names = dict.fromkeys(self._in_homes(path, identity), False)
        found = [ImageUse(UseKind.VM, name, active) for name, active in names.items()]
        for name, active in self._in_libvirt().get(identity, {}).items():
            if name in names:
                found = [ImageUse(one.kind, one.name, active) if one.name == name else one for one in found]
            else:
                found.append(ImageUse(UseKind.DOMAIN, name, active))
        return tuple(found)

    def processes(self, path: Path) -> tuple[ImageUse, ...]:
        """The other programs that have the file open."""
        return tuple(ImageUse(UseKind.PROCESS, str(one), active=True) for one in qemu_errors.holders_of(path))

    def _in_homes(self, path: Path, identity: _Identity) -> list[str]:
        if self._homes is None:
            self._homes = {}
            for entry in index.entries():
                for outside in entry.outside:
                    with contextlib.suppress(OSError):
                        self._homes.setdefault(images.identity(Path(outside)), set()).add(entry.name)
        inside = {entry.name for entry in index.entries() if path.is_relative_to(entry.home)}
        return sorted(inside | self._homes.get(identity, set()))

    def _in_libvirt(self) -> dict[_Identity, dict[str, bool]]:
        if self._domains is None:
            self._domains = {}
            try:
                for domain in self._host.connection.domains():
                    active = domain.is_active()
                    for identity in _identities(domain, active=active):
                        self._domains.setdefault(identity, {})[domain.name] = active
            except errors.HvmgrError:
                self.asked_libvirt = False
        return self._domains


def children_of(path: Path) -> list[Path]:
    """The differencing images in the folder of ``path`` whose headers name it; those that cannot be read are none."""
    identity = images.identity(path)
    found = []
    with os.scandir(path.parent) as entries:
        names = sorted(entry.path for entry in entries if entry.is_file() and not entry.name.startswith("."))
    for name in names:
        with contextlib.suppress(errors.HvmgrError, OSError):
            parent = recognition.parent_of(Path(name))
            if parent is not None and images.identity(parent) == identity:
                found.append(Path(name))
    return found


def _identities(domain: Domain, *, active: bool) -> Iterable[_Identity]:
    """Every file that the domain's disks reach, at the next start and, while it runs, now."""
    found: set[_Identity] = set()
    with contextlib.suppress(errors.HvmgrError):
        texts = [domain.xml(live=False), *([domain.xml(live=True)] if active else [])]
        for text in texts:
            for disk in configuration.parse(text, source=f"libvirt's XML of {domain.name}").disks():
                if disk.source is not None and Path(disk.source).is_absolute():
                    found |= survey.identities(disk.source, disk.format or images.RAW)
    return found
