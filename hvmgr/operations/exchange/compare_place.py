"""What stands at the place where a VM is to be: names and ids that are taken, space, and who may read what."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors, units
from hvmgr.host.hypervisor import Connection
from hvmgr.model.compatibility import found
from hvmgr.model.finding import Finding
from hvmgr.model.import_options import Mode
from hvmgr.operations.exchange import gold, import_, intake
from hvmgr.storage import index, vm_home
from hvmgr.storage.source_home import SourceHome

if TYPE_CHECKING:
    from hvmgr.operations.exchange.compare import Comparison

_MARGIN = 1 << 20


def findings(connection: Connection, comparison: Comparison) -> Iterator[Finding]:
    """Everything about ids, names, folders and space."""
    yield from _identity_findings(connection, comparison)
    yield from _source_use(connection, comparison)
    options, owner = comparison.options, connection.capabilities().qemu_owner
    if options.mode is Mode.REGISTER:
        yield from _register_findings(comparison)
    elif not options.replace:
        yield from _target_findings(comparison)
    if options.mode is Mode.COPY:
        yield from _space_findings(comparison)
    if options.mode is Mode.LINK:
        yield from _link_findings(comparison, owner)
    if options.mode is not Mode.COPY:
        yield from _owner_findings(comparison.source, owner)
    for folder in {comparison.layout.home, *(place for _, place in comparison.layout.links())}:
        yield from way_findings(folder, owner)


def _identity_findings(connection: Connection, comparison: Comparison) -> Iterator[Finding]:
    who, options = comparison.identity, comparison.options
    same_id = connection.find_domain(who.vm_id)
    elsewhere = [one for one in index.entries() if one.vm_id == who.vm_id and one.home != comparison.layout.home]
    if not options.replace and (same_id is not None or elsewhere):
        name = same_id.name if same_id is not None else elsewhere[0].name
        sentence = f"the id {who.vm_id} belongs to the VM '{name}'"
        yield found("id-in-use", sentence, who.vm_id, "--new-id, or --keep-id --replace to put it in its place")
    if options.replace and same_id is None and all(one.vm_id != who.vm_id for one in index.entries()):
        raise errors.NotFound(
            f"there is no VM with the id {who.vm_id} to replace", hint="import it with --keep-id alone", id=who.vm_id
        )
    if not options.replace:
        same_name = connection.find_domain_by_name(who.name)
        if same_name is not None and (same_id is None or same_name.uuid != who.vm_id):
            yield found("name-in-use", f"libvirt has a VM '{who.name}' already", who.name, "--name NEW")
    addresses = {who.macs.get(nic.mac, nic.mac) for one in comparison.source.configurations() for nic in one.nics()}
    for mac, name in import_.macs_of_host(connection).items():
        if mac in addresses and not (same_id is not None and name == same_id.name):
            yield found("mac-in-use", f"the VM '{name}' has the address {mac} too", mac, "import it with --new-id")


def _source_use(connection: Connection, comparison: Comparison) -> Iterator[Finding]:
    """Nobody may write to what is copied or shared."""
    paths = [one.path for one in intake.needed_images(comparison.source, comparison.snapshots)]
    for path, name in import_.written_by(connection, paths).items():
        repair = f"stop it, or use a snapshot: hvmgr vm clone {name} NEW --snapshot SNAP"
        yield found("source-in-use", f"{path} is being written by the VM '{name}'", path, repair)


def _target_findings(comparison: Comparison) -> Iterator[Finding]:
    layout = comparison.layout
    if layout.home.exists() and not (layout.home.is_dir() and vm_home.holds_nothing(layout.home)):
        yield found("target-exists", f"{layout.home} is there already", layout.home, "--name NEW, or --vm-path DIR")
    if (home := vm_home.around(layout.home)) is not None:
        sentence = f"{layout.home} lies in {home}, which is a VM's home or an export"
        yield found("target-exists", sentence, layout.home, "choose another folder")
    for place in (layout.home, *(place for _, place in layout.links())):
        above = next(one for one in place.parents if one.exists())
        if not above.is_dir():
            yield found("target-exists", f"{above} is no folder", above, "choose another folder")
            return
    for _, place in layout.links():
        if place.exists() and any(place.iterdir()):
            yield found("target-exists", f"{place} is there already", place, "--name NEW, or another folder")
    for entry in comparison.maps.disk_targets:
        target = Path(entry.new)
        if target.exists() and not target.is_dir():
            yield found("target-exists", f"{target} is there already", target, f"--disk-target {entry.old}=OTHER")
        elif not target.parent.is_dir():
            yield found(
                "missing-file", f"there is no folder {target.parent}", target.parent, f"mkdir '{target.parent}'"
            )


def _register_findings(comparison: Comparison) -> Iterator[Finding]:
    source = comparison.source
    if not source.is_home:
        sentence = f"{source.file} lies in no home, and cannot become one where it is"
        yield found("target-exists", sentence, source.file, "use --mode copy")
    if not os.access(source.folder, os.W_OK):
        yield found("not-readable", f"{source.folder} cannot be written", source.folder, "use --mode copy or link")
    yield from _users_findings(comparison)
    if not source.trusted:
        yield from _odd_files(source.folder)
    if source.layout.journal.exists() and not source.is_known:
        sentence = f"{source.layout.journal} speaks of an operation that no command of this host began"
        yield found(
            "source-in-use", sentence, source.layout.journal, "finish it where it was begun, or use --mode copy"
        )
    if source.is_export:
        yield found("export-used-up", f"{source.folder} becomes the VM, and is no export any more", source.folder)


def _odd_files(folder: Path) -> Iterator[Finding]:
    """A home changes modes and owners of what is in it, empties its trash, writes notes: never by a link that leads out."""
    for place, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(place) / name
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISSOCK(mode)):
                yield found("link", f"{path} is no plain file", path)


def _users_findings(comparison: Comparison) -> Iterator[Finding]:
    """A registered VM writes to the images of its present; with a new id, all of them get other names."""
    source = comparison.source
    moved = comparison.identity.vm_id != source.vm_id
    touched = [path for path in source.images if moved or path in source.disks.values()]
    for user in gold.users(source.folder, touched):
        sentence = f"the VM {user} stands on images in {source.folder}, which would not stay what they are"
        yield found(
            "source-shared", sentence, source.folder, "use --mode copy or link, or localize that VM's disks first"
        )


def _space_findings(comparison: Comparison) -> Iterator[Finding]:
    layout = comparison.layout
    needed: dict[Path, int] = {}
    targets = {one.old: Path(one.new) for one in comparison.maps.disk_targets}
    slots = intake.slots_of(comparison.source, comparison.snapshots)
    for image in intake.needed_images(comparison.source, comparison.snapshots):
        target = layout.images if image.parent is not None else targets.get(slots[image.path], layout.bases)
        needed[_nearest(target)] = needed.get(_nearest(target), 0) + image.data
    if not comparison.options.without_state:
        for memory in (comparison.source.memory, *(one.memory for one in comparison.snapshots)):
            if memory is not None:
                place = _nearest(layout.snapshots)
                needed[place] = needed.get(place, 0) + comparison.source.data_of(memory)
    by_device: dict[int, tuple[Path, int]] = {}
    for folder, size in needed.items():
        first, total = by_device.get(folder.stat().st_dev, (folder, 0))
        by_device[folder.stat().st_dev] = (first, total + size)
    for folder, size in by_device.values():
        yield from space_finding(folder, size)


def space_finding(folder: Path, size: int) -> Iterator[Finding]:
    """Whether this much more fits where a folder lies."""
    facts = os.statvfs(folder)
    free = facts.f_bavail * facts.f_frsize
    if size + _MARGIN > free:
        sentence = f"the copies need {units.format_size(size)}, {folder} has {units.format_size(free)} free"
        yield found("no-space", sentence, folder, "free space there, or --vm-path, --disk-path, --snapshot-path")


def _link_findings(comparison: Comparison, owner: tuple[int, int] | None) -> Iterator[Finding]:
    source = comparison.source
    for image in intake.needed_images(source, comparison.snapshots, left_out=False):
        path = Path(image.path)
        facts = path.stat()
        read_only = os.statvfs(path).f_flag & os.ST_RDONLY
        if facts.st_mode & 0o222 and not read_only:
            repair = f"make it read-only: chmod -R a-w '{source.folder}'"
            if source.trusted:
                repair = f"share a snapshot: hvmgr vm clone {source.present.name} NEW --snapshot SNAP --linked"
            yield found("source-writable", f"{path} can still be written", path, repair)
        if not _may(facts, owner, 0o4) and read_only:
            yield found("not-readable", f"QEMU's user cannot read {path}", path, "export it anew, or use --mode copy")
        yield from way_findings(path.parent, owner)


def _owner_findings(source: SourceHome, owner: tuple[int, int] | None) -> Iterator[Finding]:
    """Whose files the VM goes on reading: who may replace one of them may put a link to any file of this host there."""
    known = {0, os.geteuid(), *(() if owner is None else owner[:1])}
    images_of = [Path(one.path) for one in source.images.values()]
    for step in dict.fromkeys((source.folder, *images_of, *(above for one in images_of for above in one.parents))):
        facts = step.stat()
        is_open = stat.S_ISDIR(facts.st_mode) and facts.st_mode & 0o022 and not facts.st_mode & stat.S_ISVTX
        if (facts.st_uid in known and not is_open) or os.statvfs(step).f_flag & os.ST_RDONLY:
            continue
        who = "others" if facts.st_uid in known else f"the user {facts.st_uid}"
        sentence = f"{step} can be changed by {who} at any time, and with it what the VM reads of this host"
        yield found("source-of-others", sentence, step, "use --mode copy")
        return


def way_findings(folder: Path, owner: tuple[int, int] | None) -> Iterator[Finding]:
    """The first folder above this one that QEMU's user may not pass."""
    for step in reversed(folder.parents):
        if not step.is_dir():
            return
        if not _may(step.stat(), owner, 0o1):
            repair = f"let it: chmod o+x '{step}', or choose another place"
            yield found("not-readable", f"QEMU's user may not pass through {step}", step, repair)
            return


def _may(facts: os.stat_result, owner: tuple[int, int] | None, right: int) -> bool:
    """Whether QEMU's user has a right (4 to read, 1 to pass) by mode and owner alone."""
    if owner is None or owner[0] == 0:
        return True
    shift = 6 if facts.st_uid == owner[0] else 3 if facts.st_gid == owner[1] else 0
    return bool(stat.S_IMODE(facts.st_mode) & (right << shift))


def _nearest(path: Path) -> Path:
    return next(one for one in (path, *path.parents) if one.is_dir())
