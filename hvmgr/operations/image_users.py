"""Who on this host uses an image file: VMs of hvmgr's and libvirt's, attachments, images that stand on it.

For commands on files, which have no VM's session; within a session the same is counted by ``strangers``.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors
from hvmgr.model.image_info import Use, User
from hvmgr.storage import attachments, durable, free_disks, images, index, journal, vm_home

if TYPE_CHECKING:
    from hvmgr.host.domain import Domain
    from hvmgr.model.configuration import Disk
    from hvmgr.operations.host import Host
    from hvmgr.storage.index import Entry
    from hvmgr.storage.vm_home import VmHome


def of(host: Host, path: Path, *, gone: Container[Path] = ()) -> list[User]:
    """Every user of an image. libvirt is asked as far as it can be: a host without it has no VMs that run.

    Of VMs whose homes are not there those in ``gone`` do not count, for somebody says that they were removed. Conflict when an interrupted operation on one of these VMs is still open: nobody knows yet who needs what.
    """
    domains = _domains(host)
    found = list(_in_homes(host, path, domains, gone))
    known = {entry.vm_id for entry in index.entries()}
    for domain in domains.values():
        found += _in_domain(host, domain, path, is_managed=domain.uuid in known)
    found += _on_shelf(path)
    found += beside(path, known={user.name for user in found})
    for one in attachments.users([str(path)]).get(str(path), ()):
        found.append(User(Use.ATTACHED, one.device or one.id))
    found += _natively(path)
    return list(dict.fromkeys(found))


def _on_shelf(path: Path) -> Iterator[User]:
    """The snapshots of a free disk; such a disk itself is a file that may change like any other."""
    if path.parent.name == free_disks.FOLDER:
        for one in free_disks.Shelf(path.parent).all():
            if one.snapshot_of is not None and one.image == path.name:
                yield User(Use.SNAPSHOT, f"the snapshot {one.uuid} of a free disk")


def stated_format(host: Host, path: Path) -> str | None:
    """The format that a VM's configuration or a child states for an image; None when nobody says."""
    wanted = images.identity(path)
    for entry in index.entries():
        if _concerns(entry, path, wanted):
            with contextlib.suppress(errors.HvmgrError):
                for image in vm_home.open_home(entry.home).tree().images.values():
                    if _is(image.path, wanted):
                        return image.format
    for domain in _domains(host).values():
        for disk in _disks(host, domain):
            if disk.source is not None and _is(disk.source, wanted):
                return disk.format or images.RAW
    for child in beside(path):
        with contextlib.suppress(errors.HvmgrError):  # a VHD: its parent is one, and says so itself
            if (stated := images.read(Path(child.name), images.QCOW2).backing_format) is not None:
                return stated
    return None


def is_libvirt_there(host: Host) -> bool:
    """Whether libvirt can be asked."""
    try:
        return host.connection.is_alive()
    except (errors.HostFailed, errors.Unsupported, errors.NotFound):
        return False


def _domains(host: Host) -> dict[str, Domain]:
    try:
        return {one.uuid: one for one in host.connection.domains()}
    except (errors.HostFailed, errors.Unsupported, errors.NotFound):
        return {}


def _in_homes(host: Host, path: Path, domains: dict[str, Domain], gone: Container[Path]) -> Iterator[User]:
    wanted = images.identity(path)
    for entry in index.entries():
        if not _concerns(entry, path, wanted):
            continue
        # Of another connection's VM nobody knows here whether its memory is saved.
        present = _use(domains.get(entry.vm_id)) if entry.uri == host.uri else Use.UNKNOWN
        try:
            home = vm_home.open_home(entry.home)
            _require_complete(entry, home)
            yield from _in_home(entry, home, wanted, present)
        except (errors.Corrupt, errors.NotFound, errors.Unsupported):
            yield User(Use.UNKNOWN, f"the VM '{entry.name}', whose home cannot be read", entry.name)
    for entry in index.away(host.uri, domains):
        if entry.home not in gone and any(_is(one, wanted) for one in entry.outside):
            yield User(Use.UNKNOWN, f"the VM '{entry.name}', whose home {entry.home} is not there", entry.name)


def _require_complete(entry: Entry, home: VmHome) -> None:
    if journal.is_open(home.layout.journal):
        raise errors.Conflict(
            f"an interrupted operation on the VM '{entry.name}' is open",
            hint=f"let it be completed: hvmgr vm show {entry.name}",
        )


def _in_home(entry: Entry, home: VmHome, wanted: tuple[int, int], present: Use) -> Iterator[User]:
    forest = home.tree()
    names, below = forest.named(), forest.children()
    snapshots = {one.record.id: one.record.name for one in home.snapshots()}
    for image in (path for path in forest.images if _is(path, wanted)):
        for name in names.get(image, ()):
            if name == "now":
                yield User(present, f"the VM '{entry.name}'", entry.name)
            elif name == "undo":
                yield User(Use.UNDO, f"the undo slot of '{entry.name}'", entry.name)
            else:
                yield User(Use.SNAPSHOT, f"the snapshot '{snapshots.get(name, name)}' of '{entry.name}'", entry.name)
        for child in below.get(image, ()):
            yield User(Use.PARENT, child, entry.name)
        for user in forest.strangers.get(image, ()):
            yield User(Use.SNAPSHOT, f"{user} of '{entry.name}'", entry.name)


def _concerns(entry: Entry, path: Path, wanted: tuple[int, int]) -> bool:
    inside = is_inside(path, entry.home) or path.stat().st_nlink > 1
    return inside or any(_is(one, wanted) for one in entry.outside)


def is_inside(path: Path, home: Path) -> bool:
    """Whether a file lies in a home, by whatever link or bind mount it is reached."""
    if path.is_relative_to(home):
        return True
    return home.exists() and any(_is(str(folder), images.identity(home)) for folder in path.parents)


def _in_domain(host: Host, domain: Domain, path: Path, *, is_managed: bool) -> Iterator[User]:
    """A VM as libvirt has it; its home, where hvmgr manages it, knows neither left out disks nor what was plugged in since."""
    wanted = images.identity(path)
    for disk in _disks(host, domain):
        assert disk.source is not None
        for number, one in enumerate(_chain(vm_home.canonical(disk.source), disk.format or images.RAW)):
            if number and is_managed and disk.takes_part:
                break
            if _is(one, wanted):
                yield User(Use.PARENT if number else _use(domain), f"the VM '{domain.name}'", domain.name)


def _use(domain: Domain | None) -> Use:
    if domain is None:
        return Use.OFF
    if domain.is_active():
        return Use.RUNS
    return Use.SAVED if domain.has_managed_save() else Use.OFF


def _disks(host: Host, domain: Domain) -> list[Disk]:
    """Its disks that are files or devices of this host."""
    from hvmgr.operations import volumes

    return [
        disk
        for one in volumes.configurations(host.connection, domain)
        for disk in one.disks()
        if disk.source is not None and disk.type in {"file", "block"} and Path(disk.source).exists()
    ]


def _chain(path: str, fmt: str) -> Iterator[str]:
    """An image and its parents, as far as the files tell."""
    seen: set[str] = set()
    while path not in seen and Path(path).exists():
        seen.add(path)
        yield path
        try:
            header = images.read(Path(path), fmt)
        except errors.HvmgrError:
            return
        if header.parent is None:
            return
        path, fmt = str(header.parent), header.backing_format or images.RAW


def beside(path: Path, known: Container[str] = ()) -> Iterator[User]:
    """Children that lie in the same folder: nobody else can know of those that no VM uses.

    What a killed command has not finished is none; while one makes a child, it has the lock of the parent.
    """
    if stat.S_ISBLK(path.stat().st_mode):
        return
    is_child = _child_test(path)
    with durable.explained(path.parent):
        files = sorted(path.parent.iterdir())
    for file in files:
        if str(file) not in known and not file.name.startswith(durable.TEMPORARY) and file.is_file():
            with contextlib.suppress(errors.HvmgrError, OSError):
                if is_child(file):
                    yield User(Use.PARENT, str(file))


def _natively(path: Path) -> Iterator[User]:
    """Layers of native boot that hold something and fit this file as it is, be it their VHD or below that.

    As with children those are found whose VHD lies in the same folder.
    """
    if stat.S_ISBLK(path.stat().st_mode):
        return
    wanted = images.identity(path)
    for folder in sorted(Path(os.path.realpath(path)).parent.glob("*.boot")):
        store = _held_layer(folder)
        if store is not None and any(_is(one, wanted) for one in _vhd_chain(folder.with_suffix(""))):
            yield User(Use.NATIVE, f"the layer {store}, which a system wrote natively")


def _held_layer(folder: Path) -> Path | None:
    from hvmgr.storage import layer

    for store in (folder / "layer", folder / "layer.merging"):
        try:
            is_used = layer.is_used(store)
        except OSError:
            is_used = True  # who cannot look has to take it for one
        if is_used:
            return store
    return None


def _vhd_chain(path: Path) -> Iterator[str]:
    """A VHD and its parents, as far as they are found."""
    from hvmgr import vhd

    seen: set[Path] = set()
    with contextlib.suppress(errors.HvmgrError, OSError):
        while path not in seen and path.exists():
            seen.add(path)
            yield str(path)
            if vhd.identify(path) is not vhd.Kind.DIFFERENCING:
                return
            with vhd.open_image(path, tolerant=True) as image:
                path = vhd.find_parent(image)


def _child_test(path: Path) -> Callable[[Path], bool]:
    """Whether a file says that it stands on ``path``: qcow2 by the name in its header, VHD by the id.

    Of two files with one id it is the one that the child's own words lead to; where they lead nowhere, it may be either.
    """
    from hvmgr import vhd

    wanted = images.identity(path)
    own = vhd_id(path)

    def is_child(file: Path) -> bool:
        if images.probe(file) == images.QCOW2:
            parent = images.read(file, images.QCOW2).parent
            return parent is not None and _is(str(parent), wanted)
        if own is None or vhd.identify(file) is not vhd.Kind.DIFFERENCING:
            return False
        with vhd.open_image(file, tolerant=True) as image:
            if image.parent_uid != own:
                return False
            try:
                return _is(str(vhd.find_parent(image)), wanted)
            except errors.HvmgrError:
                return True

    return is_child


def vhd_id(path: Path) -> bytes | None:
    """The id by which children know a VHD; None for all else, and for one that cannot be read."""
    from hvmgr import vhd

    with contextlib.suppress(errors.HvmgrError, OSError):
        if vhd.identify(path) is not None:
            with vhd.open_image(path, tolerant=True) as image:
                return image.uid
    return None


def _is(path: str, wanted: tuple[int, int]) -> bool:
    try:
        return images.identity(Path(path)) == wanted
    except OSError:
        return False
