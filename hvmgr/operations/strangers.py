"""Who else on this host needs or writes an image: counted before anything is frozen, merged or removed."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hvmgr import errors
from hvmgr.host import libvirt_snapshots
from hvmgr.host.domain import Domain
from hvmgr.host.libvirt_snapshots import Listed
from hvmgr.model import libvirt_snapshot
from hvmgr.model.configuration import Configuration
from hvmgr.model.layout import BASES, SNAPSHOTS
from hvmgr.model.tree import Tree
from hvmgr.operations import volumes
from hvmgr.operations.session import Session
from hvmgr.storage import attachments, images, index, transfers, vm_home
from hvmgr.storage.index import Entry

Identity = tuple[int, int]  # device and inode


def of(session: Session, paths: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """For each of these images who else needs it: other VMs, by the index and by libvirt, attachments and transfers."""
    paths = list(paths)
    attached = {path: tuple(map(attachments.name_of, users)) for path, users in attachments.users(paths).items()}
    for path, names in transfers.users(paths).items():
        attached[path] = (*attached.get(path, ()), *names)
    others = [domain for domain in session.connection.domains() if domain.uuid != session.home.vm_id]
    if not others and not _entries(session):
        return attached  # a large tree is not looked at for nobody
    own = _Own.of(paths)
    mine = own.paths
    found = _needing(own, _candidates(session, own))
    for path, names in attached.items():
        found.setdefault(path, []).extend(names)
    for domain in others:
        for path in _images_of(session, domain):
            ours = mine.get(images.identity(Path(path)))
            if ours is not None:
                found.setdefault(ours, []).append(domain.name)
    return {path: tuple(dict.fromkeys(names)) for path, names in found.items()}


def needing(paths: Iterable[str], entries: Iterable[Entry]) -> dict[str, tuple[str, ...]]:
    """For each of these images the names of those of the VMs that need it today, by their homes' own files."""
    found = _needing(_Own.of(paths), entries)
    return {path: tuple(dict.fromkeys(names)) for path, names in found.items()}


def _needing(own: _Own, entries: Iterable[Entry]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for entry in entries:
        for one in own.paths.keys() & _needed_by(entry, own):
            found.setdefault(own.paths[one], []).append(entry.name)
    return found


def libvirts_own(session: Session, forest: Tree) -> dict[str, tuple[str, ...]]:
    """For each image of this VM the snapshots and dirty bitmaps (checkpoints) of libvirt's own that need it.

    A bitmap goes on through every image that a disk writes to: without one of them a backup tool's next increment
    would be wrong, so that the whole present counts.
    """
    domain = session.find_domain()
    if domain is None:
        return {}
    mine = _by_identity(forest.images)
    found: dict[str, list[str]] = {}
    for listed in libvirt_snapshots.list_all(domain):
        for path in _named_by(listed, domain):
            ours = mine.get(images.identity(Path(path))) if Path(path).exists() else None
            if ours is not None:
                found.setdefault(ours, []).append(f"libvirt's snapshot '{listed.name}'")
    for name in libvirt_snapshots.bitmap_names(domain):
        for path in forest.present.disks.values():
            found.setdefault(path, []).append(f"libvirt's checkpoint '{name}'")
    return {path: tuple(dict.fromkeys(names)) for path, names in found.items()}


def in_other_slots(session: Session, forest: Tree) -> set[str]:
    """Images of this VM that it has in a slot which snapshots leave out, too: somebody looks at an old state there."""
    domain = session.find_domain()
    needed = set[str]() if domain is None else _images_of(session, domain, left_out=True)
    if not needed:
        return set()
    named, below = forest.named(), forest.children()
    mine = _by_identity(path for path in forest.images if path in named or below.get(path))
    return {mine[one] for one in _by_identity(needed) if one in mine}


def say_what_bitmaps_lose(session: Session) -> None:
    """libvirt's checkpoints do not go on in the images that the VM is about to get while it is off."""
    domain = session.find_domain()
    for name in [] if domain is None else libvirt_snapshots.bitmap_names(domain):
        session.say(
            f"libvirt's checkpoint '{name}' ends here: the next backup has to be a full one; "
            f"let libvirt forget it: virsh checkpoint-delete {session.home.name} {name} --metadata"
        )


def _named_by(listed: Listed, domain: Domain) -> Iterator[str]:
    one = libvirt_snapshot.parse(listed.xml, source=f"libvirt's snapshot {listed.name} of {domain.name}")
    yield from one.went_on().values()
    for then in (one.configuration, one.inactive):
        if then is not None:
            yield from (disk.source for disk in then.disks() if disk.takes_part and disk.source is not None)


def writers(session: Session, paths: Iterable[str]) -> dict[str, str]:
    """For each of these images the name of another VM that writes it, or would after an undo, if there is one."""
    own = _Own.of(paths)
    mine = own.paths
    found: dict[str, str] = {}
    for name, theirs in _written(session, own):
        for one in theirs:
            ours = mine.get(images.identity(Path(one))) if Path(one).exists() else None
            if ours is not None:
                found.setdefault(ours, name)
    return found


@dataclass(frozen=True, slots=True)
class _Own:
    """Images by what they are; where each lies, whatever the way to it is called; and which have other names."""

    paths: dict[Identity, str]
    folders: dict[Path, frozenset[Identity]]
    linked: frozenset[Identity]

    @classmethod
    def of(cls, paths: Iterable[str]) -> _Own:
        found = _by_identity(paths)
        folders = {folder: _folders_above(folder) for folder in {Path(path).parent for path in found.values()}}
        return cls(found, folders, frozenset(one for one, path in found.items() if _has_other_names(path)))


def _by_identity(paths: Iterable[str]) -> dict[Identity, str]:
    return {images.identity(Path(path)): path for path in paths if Path(path).exists()}


def _folders_above(folder: Path) -> frozenset[Identity]:
    return frozenset(images.identity(one) for one in (folder, *folder.parents))


def _has_other_names(path: str) -> bool:
    facts = Path(path).stat()
    return stat.S_ISREG(facts.st_mode) and facts.st_nlink > 1


def _candidates(session: Session, mine: _Own) -> Iterator[Entry]:
    """Other VMs that have, or once had, something to do with these images: the index only ever adds."""
    for entry in _entries(session):
        if mine.paths.keys() & _by_identity(entry.outside).keys() or _inside(entry, mine):
            yield entry


def _entries(session: Session) -> list[Entry]:
    """Other VMs; one whose home is away may need all that it ever had."""
    known = {domain.uuid for domain in session.connection.domains()}
    found = [*index.entries(), *index.away(session.connection.uri, known)]
    return [entry for entry in found if entry.vm_id != session.home.vm_id]


def _inside(entry: Entry, mine: _Own) -> set[Identity]:
    """What lies in a home, also when it is named by a way that a bind mount made, or by a hard link elsewhere."""
    if not entry.home.exists():
        return set()
    home = images.identity(entry.home)
    found = {one for one, path in mine.paths.items() if home in mine.folders[Path(path).parent]}
    if mine.linked - found:
        folders = (entry.home / BASES, entry.home / SNAPSHOTS / entry.vm_id)
        files = [str(file) for folder in folders if folder.is_dir() for file in folder.iterdir()]
        found |= mine.linked & _by_identity(files).keys()
    return found


def _needed_by(entry: Entry, mine: _Own) -> set[Identity]:
    """What a home needs today, by its own files; one that cannot be read may need all that it ever had."""
    try:
        forest = vm_home.open_home(entry.home).tree()
    except errors.HvmgrError:
        return set(_by_identity(entry.outside)) | _inside(entry, mine)
    names, below = forest.named(), forest.children()
    return set(_by_identity(path for path in forest.images if path in names or below.get(path)))


def _written(session: Session, mine: _Own) -> Iterator[tuple[str, list[str]]]:
    for domain in session.connection.domains():
        if domain.uuid != session.home.vm_id:
            yield (
                domain.name,
                [path for one in volumes.configurations(session.connection, domain) for path in _written_by(one)],
            )
    for entry in _candidates(session, mine):
        try:
            home = vm_home.open_home(entry.home)
            for one in (home.present(), home.undo()):
                yield entry.name, [] if one is None else _written_by(one)
        except errors.HvmgrError:
            continue  # a home that cannot be read writes nothing through hvmgr


def _written_by(one: Configuration) -> list[str]:
    """What a guest may write to: also what its snapshots leave out."""
    return [
        vm_home.canonical(disk.source)
        for disk in one.disks()
        if disk.source is not None and disk.type in {"file", "block"} and disk.device != "cdrom" and not disk.readonly
    ]


def _images_of(session: Session, domain: Domain, *, left_out: bool = False) -> set[str]:
    """Every image that a domain has or would open, as far as its files tell; or those that snapshots leave out alone."""
    found: set[str] = set()
    for one in volumes.configurations(session.connection, domain):
        for disk in one.disks():
            if disk.source is None or disk.type not in {"file", "block"} or not Path(disk.source).exists():
                continue
            if left_out and disk.takes_part:
                continue
            path = vm_home.canonical(disk.source)
            found.add(path)
            try:
                found |= set(session.home.load_images({path: disk.format or images.RAW}))
            except errors.HvmgrError:
                continue  # another VM's broken image is not ours to judge
    return {path for path in found if Path(path).exists()}
