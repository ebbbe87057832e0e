"""Who else on this host needs or writes an image: counted before anything is frozen, merged or removed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from hvmgr import errors
from hvmgr.host.domain import Domain
from hvmgr.model import configuration
from hvmgr.operations.session import Session
from hvmgr.storage import images, index, vm_home
from hvmgr.storage.index import Entry

Identity = tuple[int, int]  # device and inode


def of(session: Session, paths: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """For each of these images the names of other VMs that need it, by hvmgr's index and by libvirt."""
    others = [domain for domain in session.connection.domains() if domain.uuid != session.home.vm_id]
    if not others and all(entry.vm_id == session.home.vm_id for entry in index.entries()):
        return {}  # a large tree is not looked at for nobody
    mine = _by_identity(paths)
    found: dict[str, list[str]] = {}
    for entry in _candidates(session, mine):
        for one in mine.keys() & _needed_by(entry, mine):
            found.setdefault(mine[one], []).append(entry.name)
    for domain in others:
        for path in _images_of(session, domain):
            ours = mine.get(images.identity(Path(path)))
            if ours is not None:
                found.setdefault(ours, []).append(domain.name)
    return {path: tuple(dict.fromkeys(names)) for path, names in found.items()}


def writers(session: Session, paths: Iterable[str]) -> dict[str, str]:
    """For each of these images the name of another VM that writes it, or would after an undo, if there is one."""
    mine = _by_identity(paths)
    found: dict[str, str] = {}
    for name, theirs in _written(session, mine):
        for one in theirs:
            ours = mine.get(images.identity(Path(one))) if Path(one).exists() else None
            if ours is not None:
                found.setdefault(ours, name)
    return found


def _by_identity(paths: Iterable[str]) -> dict[Identity, str]:
    return {images.identity(Path(path)): path for path in paths if Path(path).exists()}


def _candidates(session: Session, mine: Mapping[Identity, str]) -> Iterator[Entry]:
    """Other VMs that have, or once had, something to do with these images: the index only ever adds."""
    for entry in index.entries():
        if entry.vm_id == session.home.vm_id:
            continue
        if mine.keys() & _by_identity(entry.outside).keys() or _inside(entry, mine):
            yield entry


def _inside(entry: Entry, mine: Mapping[Identity, str]) -> set[Identity]:
    return {one for one, path in mine.items() if Path(path).is_relative_to(entry.home)}


def _needed_by(entry: Entry, mine: Mapping[Identity, str]) -> set[Identity]:
    """What a home needs today, by its own files; one that cannot be read may need all that it ever had."""
    try:
        forest = vm_home.open_home(entry.home).tree()
    except errors.HvmgrError:
        return set(_by_identity(entry.outside)) | _inside(entry, mine)
    names, below = forest.named(), forest.children()
    return set(_by_identity(path for path in forest.images if path in names or below.get(path)))


def _written(session: Session, mine: Mapping[Identity, str]) -> Iterator[tuple[str, list[str]]]:
    for domain in session.connection.domains():
        if domain.uuid != session.home.vm_id:
            parsed = configuration.parse(domain.xml(live=False), source=f"libvirt's XML of {domain.name}")
            yield domain.name, list(vm_home.disks_of(parsed).values())
    for entry in _candidates(session, mine):
        try:
            home = vm_home.open_home(entry.home)
            for one in (home.present(), home.undo()):
                yield entry.name, [] if one is None else list(vm_home.disks_of(one).values())
        except errors.HvmgrError:
            continue  # a home that cannot be read writes nothing through hvmgr


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
