"""Who else on this host needs an image: counted before anything is merged or removed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from hvmgr import errors
from hvmgr.host.domain import Domain
from hvmgr.model import configuration
from hvmgr.operations.session import Session
from hvmgr.storage import images, index, vm_home


def of(session: Session, paths: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """For each of these images the names of other VMs that need it, by hvmgr's index and by libvirt."""
    mine = [Path(path) for path in paths]
    found = {str(path): list(names) for path, names in index.users(mine, besides=session.home.vm_id).items()}
    theirs = [
        (domain.name, path)
        for domain in session.connection.domains()
        if domain.uuid != session.home.vm_id
        for path in _images_of(session, domain)
    ]
    by_identity = {images.identity(path): str(path) for path in mine if path.exists()} if theirs else {}
    for name, path in theirs:
        ours = by_identity.get(images.identity(Path(path)))
        if ours is not None:
            found.setdefault(ours, []).append(name)
    return {path: tuple(dict.fromkeys(names)) for path, names in found.items()}


def _images_of(session: Session, domain: Domain) -> set[str]:
    """Every image that a domain has or would open, as far as its files tell."""
    texts = [domain.xml(live=False)] + ([domain.xml(live=True)] if domain.is_active() else [])
    found: set[str] = set()
    for text in texts:
        for disk in configuration.parse(text, source=f"libvirt's XML of {domain.name}").disks():
            if disk.source is None or disk.type not in {"file", "block"} or not Path(disk.source).exists():
                continue
            path = vm_home.canonical(disk.source)
            found.add(path)
            try:
                found |= set(session.home.load_images({path: disk.format or images.RAW}))
            except errors.HvmgrError:
                continue  # another VM's broken image is not ours to judge
    return {path for path in found if Path(path).exists()}
