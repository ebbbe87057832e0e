"""What keeps a domain from being adopted: everything is asked before anything is made, and refused by name.

Each refusal says what is in the way, where, and the line that mends it or the option that leaves it out.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from hvmgr import errors
from hvmgr.host import libvirt_snapshots, qemu_img
from hvmgr.host.domain import Domain
from hvmgr.model import adoptee, configuration
from hvmgr.model.configuration import Configuration, Disk
from hvmgr.model.tree import Tree
from hvmgr.operations import strangers
from hvmgr.operations.adopt.libvirt_history import Past
from hvmgr.operations.session import Session
from hvmgr.storage import images, index, vm_home

_URN = "urn:hvmgr:vm:1"


def require_unmanaged(domain: Domain, root: Path) -> None:
    """Conflict when hvmgr manages the domain, or a home of it is there without libvirt knowing."""
    facts = _present(domain).metadata()
    for home in _known_homes(domain.uuid, root):
        raise errors.Conflict(f"{domain.name} is managed by hvmgr already, its home is {home}", home=str(home))
    if facts is not None:
        raise errors.Conflict(
            f"{domain.name} says that its home is {facts.home}, where none is",
            hint=f"put the home back, or take hvmgr's mark off: virsh metadata {domain.name} --uri {_URN} --remove"
            " --config",
            home=str(facts.home),
        )


def unmanaged(domains: Iterable[Domain], root: Path) -> list[Domain]:
    """Those that hvmgr has no home for, and never had."""
    known = {entry.vm_id for entry in index.entries() if _is_home_of(entry.home, entry.vm_id)}
    known |= {home.vm_id for home in vm_home.find_homes(root)}
    return [one for one in domains if one.uuid not in known and _present(one).metadata() is None]


def _present(domain: Domain) -> Configuration:
    return configuration.parse(domain.xml(live=False), source=f"libvirt's XML of {domain.name}")


def _is_home_of(folder: Path, vm_id: str) -> bool:
    try:
        return vm_home.open_home(folder).vm_id == vm_id
    except errors.HvmgrError:
        return False


def _known_homes(vm_id: str, root: Path) -> list[Path]:
    elsewhere = [entry.home for entry in index.entries() if entry.vm_id == vm_id and _is_home_of(entry.home, vm_id)]
    return [*(home.path for home in vm_home.find_homes(root) if home.vm_id == vm_id), *elsewhere]


def require_steady(domain: Domain) -> None:
    """Refuses a domain that is only half there, or that libvirt or QEMU works on."""
    name = domain.name
    if not domain.is_persistent():
        raise errors.Conflict(
            f"{name} is transient: it is gone when it stops",
            hint=f"make it last: virsh dumpxml --inactive --security-info {name} >{name}.xml; virsh define {name}.xml",
        )
    if bitmaps := libvirt_snapshots.bitmap_names(domain):
        raise errors.Unsupported(
            f"libvirt keeps checkpoints (dirty bitmaps) of {name}, which new images would break: {', '.join(bitmaps)}",
            hint="; ".join(f"virsh checkpoint-delete {name} {one}" for one in reversed(bitmaps)),
            bitmaps=bitmaps,
        )
    if domain.has_job():
        raise errors.Busy(f"libvirt or QEMU works on {name}", hint="wait until that is done, then run it again")


def require_disks(name: str, present: Configuration, excluded: frozenset[str]) -> None:
    """Every disk is one that snapshots can freeze, or one that nobody writes, or is left out."""
    slots = {disk.slot: disk for disk in present.disks()}
    for slot in sorted(excluded):
        if slot not in slots:
            raise errors.NotFound(f"{name} has no disk {slot}", hint=f"it has {', '.join(slots)}", slot=slot)
    for disk in present.disks():
        if disk.device in ("disk", "lun") and not disk.readonly and disk.slot not in excluded and disk.snapshot != "no":
            _require_disk(name, present, disk)
    vm_home.require_usable_disks(present)
    if adoptee.has_nvram_elsewhere(present):
        raise errors.Unsupported(f"{name} keeps its firmware's variables in something that is no file")


def _require_disk(name: str, present: Configuration, disk: Disk) -> None:
    why = None
    if disk.device != "disk":
        why = f"is handed to the guest as a {disk.device}"
    elif disk.type == "volume":
        pool, volume = adoptee.volume(present, disk.slot)
        why = f"is the volume '{volume}' of the pool '{pool}', which is no file or device here"
    elif disk.type not in ("file", "block") or disk.source is None:
        why = f"is of the type {disk.type}, not a file or a block device"
    elif disk.shareable:
        why = "is shareable: other VMs may write it while a snapshot needs it unchanged"
    elif disk.transient:
        why = "is transient: what the guest writes is thrown away when it stops"
    elif disk.image_parts:
        why = f"has <{disk.image_parts[0]}>, which another image cannot take over"
    elif adoptee.has_mirror(present, disk.slot):
        why = "is being copied"
    if why is not None:
        raise errors.Unsupported(
            f"disk {disk.slot} of {name} {why}",
            hint=f"leave it out of snapshots with --exclude-disk {disk.slot}",
            slot=disk.slot,
        )


def require_chains(name: str, one: Configuration, forest: Tree) -> None:
    """What the XML states of a chain is what the headers of the images say; every image of it is there."""
    for disk in one.disks():
        if not disk.takes_part or disk.source is None:
            continue
        _require_there(name, disk, forest)
        stated = adoptee.stated_chain(one, disk.slot)
        chain = forest.chain(vm_home.canonical(disk.source))
        if disk.format != chain[0].format:
            raise errors.Conflict(
                f"disk {disk.slot} of {name}: {chain[0].path} is stated as {disk.format} and as {chain[0].format}"
            )
        for upper, lower, backing in zip(chain, [*chain[1:], None], stated.parents, strict=False):
            truth = None if lower is None else (lower.path, lower.format)
            path = None if backing.path is None else vm_home.canonical(backing.path)
            if truth != (path, backing.format):
                raise _other_chain(name, disk, upper.path, truth, f"{path} ({backing.format})", backing)
        if stated.is_complete and len(chain) > len(stated.parents) + 1:
            upper, lower = chain[len(stated.parents)], chain[len(stated.parents) + 1]
            raise _other_chain(name, disk, upper.path, (lower.path, lower.format), "nothing", None)


def _require_there(name: str, disk: Disk, forest: Tree) -> None:
    assert disk.source is not None
    try:
        forest.chain(vm_home.canonical(disk.source))
    except errors.Corrupt as error:
        raise errors.Corrupt(f"disk {disk.slot} of {name}: {error}", hint=error.hint, **error.facts) from error


def _other_chain(
    name: str, disk: Disk, upper: str, truth: tuple[str, str] | None, stated: str, backing: adoptee.Backing | None
) -> errors.Conflict:
    header = "nothing" if truth is None else f"{truth[0]} ({truth[1]})"
    mend = f"virsh edit {name}, and take the <backingStore> of {disk.slot} out"
    if backing is not None and backing.path is not None:
        mend = (
            f"where the header is right: {mend}; where the XML is: "
            f"qemu-img rebase -u -b '{backing.path}' -F {backing.format} '{upper}'"
        )
    return errors.Conflict(
        f"disk {disk.slot} of {name}: by its XML {upper} stands on {stated}, by its header on {header}",
        hint=mend,
        path=upper,
        slot=disk.slot,
    )


def require_pasts(name: str, pasts: Sequence[Past], forest: Tree) -> None:
    """Every image that a snapshot froze is there with all below it, and nothing writes to it any more."""
    for past in pasts:
        for slot, path in past.images.items():
            try:
                chain = forest.chain(path)
            except errors.Corrupt as error:
                raise errors.Corrupt(
                    f"libvirt's snapshot '{past.libvirt_name}' of {name}, disk {slot}: {error}",
                    hint="put the file back, or let libvirt forget the snapshot: "
                    f"virsh snapshot-delete {name} {past.libvirt_name} --metadata",
                    **error.facts,
                ) from error
            if chain[0].format != past.formats[path]:
                raise errors.Conflict(
                    f"{path} is {past.formats[path]} for libvirt's snapshot '{past.libvirt_name}' of {name},"
                    f" and {chain[0].format} elsewhere",
                    path=path,
                )
    named, below = forest.named(), forest.children()
    for slot, path in forest.present.disks.items():
        others = [one for one in named[path] if one != "now"]
        if not others and not below.get(path):
            continue
        if others:
            needed = f"libvirt's snapshot '{next(past.libvirt_name for past in pasts if past.id == others[0])}' needs"
        else:
            needed = f"{below[path][0]} needs"
        raise errors.Conflict(
            f"disk {slot} of {name} writes to {path}, which {needed} unchanged",
            hint=f"give the VM an image on it with virsh edit: qemu-img create -f qcow2 -b '{path}'"
            f" -F {forest.images[path].format} NEW.qcow2",
            path=path,
        )


def require_plain_images(paths: Iterable[str], forest: Tree) -> None:
    """No image that the VM wrote holds snapshots inside."""
    for path in paths:
        fmt = forest.images[path].format
        if images.read(Path(path), fmt).has_internal_snapshots:
            names = qemu_img.info(Path(path), fmt, force_share=True).internal_snapshots
            raise errors.Unsupported(
                f"{path} has internal snapshots: {', '.join(names)}",
                hint=f"delete those that nobody needs: qemu-img snapshot -d NAME '{path}'; those that libvirt knows:"
                " --convert-internal makes an image of each, --drop-internal deletes them",
                path=path,
                snapshots=list(names),
            )


def require_sole_writer(session: Session, name: str, forest: Tree) -> None:
    """Nobody else writes to any of these images, and nobody stands on what this VM writes."""
    for path, other in strangers.writers(session, forest.images).items():
        raise errors.Conflict(
            f"{path} is a disk of {name} and is written by the VM '{other}' as well",
            hint="give each VM an image of its own, or leave the disk out with --exclude-disk",
            path=path,
        )
    slots = {path: slot for slot, path in forest.present.disks.items()}
    for path, others in strangers.of(session, slots).items():
        raise errors.Conflict(
            f"disk {slots[path]} of {name} writes to {path}, which {', '.join(others)} stands on",
            hint=f"give the VM an image on it with virsh edit: qemu-img create -f qcow2 -b '{path}'"
            f" -F {forest.images[path].format} NEW.qcow2",
            path=path,
        )


def require_distinct(name: str, disks: Mapping[str, str]) -> None:
    """Each disk has a file of its own."""
    found: dict[tuple[int, int], str] = {}
    for slot, path in disks.items():
        other = found.setdefault(images.identity(Path(path)), slot)
        if other != slot:
            raise errors.Conflict(f"disks {other} and {slot} of {name} are one file: {path}", path=path)


def require_own(name: str, paths: Iterable[str]) -> None:
    """Whoever runs this may make the images read-only."""
    for path in paths:
        if can_change_mode(path) and os.geteuid() not in (0, Path(path).stat().st_uid):
            raise errors.Conflict(
                f"{path}, an image of {name}, belongs to somebody else, so that it cannot be made read-only",
                hint="run the command as root",
                path=path,
            )


def can_change_mode(path: str) -> bool:
    """A device has no mode worth changing, and on a read-only file system nobody can write anyway."""
    return Path(path).is_file() and not os.statvfs(path).f_flag & os.ST_RDONLY


def require_writable(name: str, disks: Mapping[str, str]) -> None:
    """The guest can write to its disks."""
    for slot, path in disks.items():
        if not os.access(path, os.W_OK):
            raise errors.Conflict(
                f"disk {slot} of {name}: {path} cannot be written",
                hint="mount its file system writable, run as root, or leave it out with --exclude-disk " + slot,
                path=path,
            )


def require_same_running(name: str, running: Mapping[str, str], stored: Mapping[str, str], writing: set[str]) -> None:
    """The VM runs on the disks that it would be started with."""
    for slot in sorted(running.keys() | stored.keys()):
        if slot not in running or slot not in stored:
            where = "only until the VM stops" if slot in running else "only after the next start"
            raise errors.Conflict(
                f"disk {slot} of {name} is attached {where}",
                hint=f"make it the same in both (virsh attach-disk or detach-disk --config), or --exclude-disk {slot}",
            )
        if running[slot] != stored[slot] or running[slot] not in writing:
            raise errors.Conflict(
                f"disk {slot} of {name}: QEMU does not write to {stored[slot]}, which the next start would take",
                hint="make it the same with virsh edit, or stop the VM; then run the command again",
                path=stored[slot],
            )
