"""What is around the homes: libvirt's domains, the index, the folders that could be homes. Asked once, for a doctor.

libvirt may be out of reach: then its part is empty, and ``failure`` says why.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors
from hvmgr.host import hypervisor
from hvmgr.host.domain import Domain
from hvmgr.model import configuration
from hvmgr.model.configuration import Configuration
from hvmgr.model.layout import CONFIGURATIONS, PRIVATE, SNAPSHOTS
from hvmgr.model.metadata import Metadata
from hvmgr.operations.reporter import Reporter
from hvmgr.operations.session import Session
from hvmgr.storage import durable, index, survey, vm_home
from hvmgr.storage.access import Owner
from hvmgr.storage.index import Note
from hvmgr.storage.survey import Survey
from hvmgr.storage.vm_home import VmHome

if TYPE_CHECKING:
    from hvmgr.host.hypervisor import Capabilities, Connection
    from hvmgr.operations.host import Host

Identity = tuple[int, int]  # device and inode


@dataclass(frozen=True, slots=True)
class Known:
    """A domain of libvirt: its inactive configuration, and hvmgr's facts in it (None: it is not ours, or damaged)."""

    domain: Domain = field(repr=False)
    text: str = field(repr=False)
    configuration: Configuration = field(repr=False)
    facts: Metadata | None

    @property
    def home(self) -> Path | None:
        """The home that the domain names, links resolved."""
        return None if self.facts is None else Path(os.path.realpath(self.facts.home))

    def chains(self) -> set[Identity]:
        """Every image that its disks reach, as the next start and as QEMU has them, as far as headers can be read."""
        configurations = [self.configuration]
        with contextlib.suppress(errors.HvmgrError):
            if self.domain.is_active():
                live = self.domain.xml(live=True)
                configurations.append(configuration.parse(live, source=f"libvirt's live XML of {self.domain.name}"))
        found: set[Identity] = set()
        for one in configurations:
            for path, fmt in vm_home.formats_of(one).items():
                found |= survey.identities(path, fmt)
        return found


class Users:
    """Which VMs of libvirt have something to do with which images, by device and inode; read when first asked."""

    def __init__(self, domains: Mapping[str, Known]) -> None:
        self._domains = domains
        self._found: dict[Identity, set[str]] | None = None

    def others(self, vm_id: str, images: Iterable[Identity]) -> bool:
        """Whether another VM's chains reach one of these images."""
        if self._found is None:
            self._found = {}
            for uuid, known in self._domains.items():
                for one in known.chains():
                    self._found.setdefault(one, set()).add(uuid)
        return any(self._found.get(one, set()) - {vm_id} for one in images)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Everything outside one home that its examination needs."""

    uri: str
    root: Path
    connection: Connection | None
    capabilities: Capabilities | None
    failure: errors.HvmgrError | None
    domains: Mapping[str, Known]  # by id
    users: Users = field(repr=False)
    notes: tuple[Note, ...]
    folders: tuple[Path, ...]  # of this connection's homes, whole or not
    homes: Mapping[str, tuple[Path, ...]]  # id to folders that claim it

    @property
    def owner(self) -> Owner:
        """QEMU's user; None where libvirt cannot be asked or QEMU runs as the caller."""
        return None if self.capabilities is None else self.capabilities.qemu_owner

    def domain(self, home: VmHome) -> Known | None:
        """libvirt's domain of a home's VM."""
        return self.domains.get(home.vm_id)


def look(host: Host) -> Surroundings:
    """What is there now; UsageError or Unsupported when the connection is none that could ever work."""
    hypervisor.parse_uri(host.uri)
    connection, capabilities, failure, domains = None, None, None, dict[str, Known]()
    try:
        connection = host.connection
        capabilities = connection.capabilities()
        domains = {one.uuid: known for one in connection.domains() if (known := _known(one)) is not None}
    except errors.HvmgrError as error:
        connection, failure = None, error
    notes = tuple(index.notes())
    folders = _folders(host, notes, domains)
    homes: dict[str, list[Path]] = {}
    for folder in folders:
        for file in _configurations(folder):
            homes.setdefault(file.stem, []).append(folder)
    return Surroundings(
        uri=host.uri,
        root=host.root,
        connection=connection,
        capabilities=capabilities,
        failure=failure,
        domains=domains,
        users=Users(domains),
        notes=notes,
        folders=folders,
        homes={vm_id: tuple(found) for vm_id, found in homes.items()},
    )


def find_folder(around: Surroundings, name: str) -> Path:
    """The folder of the home that a VM's name, id or path means, however damaged it is; NotFound offers near names."""
    if "/" in name:
        folder = Path(os.path.realpath(name))
        if not is_home_like(folder):
            raise errors.NotFound(f"{folder} is no VM home", hint="name the folder that holds the VM", path=str(folder))
        return folder
    by_name: dict[str, Path] = {}
    for folder in around.folders:
        for word in (*_names(folder), *(file.stem for file in _configurations(folder))):
            by_name.setdefault(word, folder)
    for known in around.domains.values():
        if known.home in around.folders:
            by_name.setdefault(known.domain.name, known.home)
    for folder in around.folders:
        by_name.setdefault(folder.name, folder)
    if name not in by_name:
        from hvmgr.model import names

        words = [word for word, folder in by_name.items() if all(word != one.stem for one in _configurations(folder))]
        raise names.not_found("VM", name, words, where=f"in {around.root}")
    return by_name[name]


def is_home_like(folder: Path) -> bool:
    """Whether a folder is a home, or what is left of one; what a deleted VM or one that was released left behind is none."""
    if not folder.is_dir():
        return False
    try:
        with durable.explained(folder):
            if (folder / PRIVATE).is_dir():
                return True
            files = (file for name in (CONFIGURATIONS, SNAPSHOTS) for file in (folder / name).glob("*.xml"))
            return any(vm_home.is_id(file.stem) for file in files)
    except errors.HvmgrError:
        return True  # nobody may look into it: that is a finding


def take(folder: Path) -> Survey:
    """The survey of a home; NotFound or Corrupt when there is not exactly one configuration."""
    with durable.explained(folder):
        return survey.take(vm_home.open_home(folder))


@contextlib.contextmanager
def looking(home: VmHome, connection: Connection) -> Iterator[Session]:
    """A session for questions alone: without the home's lock, and nothing may be changed in it."""
    session = Session(home, connection, Reporter(dry_run=True), wait_s=0)
    try:
        yield session
    finally:
        session.close()


def _folders(host: Host, notes: tuple[Note, ...], domains: Mapping[str, Known]) -> tuple[Path, ...]:
    """Below the root, and where the index or libvirt's own configurations say that this connection has homes."""
    with durable.explained(host.root):
        below = sorted(one for one in host.root.iterdir() if one.is_dir()) if host.root.is_dir() else []
    noted = [note.entry.home for note in notes if note.entry is not None and note.entry.uri == host.uri]
    named = [known.home for known in domains.values() if known.home is not None and known.home.is_dir()]
    found = [folder for folder in (*below, *noted) if folder.is_dir() and is_home_like(folder)]
    return tuple(dict.fromkeys((*found, *named)))


def _configurations(folder: Path) -> list[Path]:
    try:
        return survey.configurations(folder)
    except errors.HvmgrError:
        return []


def _names(folder: Path) -> list[str]:
    """What the VM of a home is called, as far as that can be read."""
    names = []
    for file in _configurations(folder):
        try:
            names.append(vm_home.parse_file(file).name)
        except errors.HvmgrError:
            continue
    return names


def _known(domain: Domain) -> Known | None:
    try:
        text = domain.xml(live=False)
    except errors.NotFound:
        return None  # it ended meanwhile
    parsed = configuration.parse(text, source=f"libvirt's XML of {domain.name}")
    try:
        facts = parsed.metadata()
    except errors.HvmgrError:
        facts = None
    return Known(domain, text, parsed, facts)
