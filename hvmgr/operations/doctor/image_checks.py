"""What doctor says of the images of one VM: there, readable, unchanged, with the right modes, and who else needs them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from hvmgr import errors, units
from hvmgr.host import confinement, qemu_img
from hvmgr.model import outside_images, tree
from hvmgr.model.diagnosis import Code, finding
from hvmgr.model.finding import Finding
from hvmgr.model.tree import Keeper, Tree
from hvmgr.storage import access, frozen, images, index, journal
from hvmgr.storage.access import Owner
from hvmgr.storage.frozen import Condition
from hvmgr.storage.survey import Survey


def examine(seen: Survey, *, owner: Owner, dynamic: bool) -> Iterator[Finding]:
    """Everything that headers and file systems tell."""
    forest = seen.tree()
    for path, facts in seen.missing.items():
        sentence = f"the image {path} is missing; needed by {', '.join(facts.needed_by)}"
        repair = "put the file back; doctor --repair does when it finds it in or beside the home under another name"
        yield finding(Code.IMAGE_MISSING, sentence, path, repair=repair)
    for fault in seen.faults:
        if fault.file.suffix != ".xml":
            yield _unreadable(seen, fault.file, fault.error)
    yield from _left_out(seen)
    yield from _chains(seen, forest)
    held = frozen_images(forest)
    yield from _since_frozen(seen, forest, held)
    yield from _modes(seen, forest, held, owner=owner, dynamic=dynamic)
    yield from _waiting(seen, forest)


def _unreadable(seen: Survey, file: Path, error: errors.HvmgrError) -> Finding:
    needed = seen.needs(str(file))
    sentence = f"{error}{'; needed by ' + ', '.join(needed) if needed else '; nothing needs it'}"
    code = Code.IMAGE_UNSUPPORTED if isinstance(error, errors.Unsupported) else Code.IMAGE_UNREADABLE
    repair = error.hint
    if code is Code.IMAGE_UNREADABLE and seen.home.layout.owns(str(file)):
        repair = "put it back from a backup; doctor --repair sets it aside, so that what does not need it works again"
    return finding(code, sentence, file, repair=repair)


def _left_out(seen: Survey) -> Iterator[Finding]:
    """What no snapshot freezes is no part of the survey, and yet QEMU has to read it as it is."""
    for part in seen.parts():
        for disk in part.configuration.disks():
            if disk.takes_part or disk.source is None or disk.type not in {"file", "block"}:
                continue
            try:
                images.require_usable(Path(disk.source))
            except errors.Unsupported as error:
                sentence = f"{error}; needed by {part.who}, disk {disk.slot}"
                yield finding(Code.IMAGE_UNSUPPORTED, sentence, disk.source, repair=error.hint)


def frozen_images(forest: Tree) -> set[str]:
    """Images that must not change: those that a snapshot names, and those that others stand on.

    A working image is none for what stands on it and is of no use to anybody: a file that somebody has put into the home.
    """
    named = {path for node in forest.nodes.values() for path in node.disks.values()}
    held = named | set(forest.children())
    return held & set(forest.images) - (_working(forest) - named - _stood_on(forest))


def _working(forest: Tree) -> set[str]:
    """What the present and the undo slot write to."""
    return set(forest.present.disks.values()) | (set() if forest.undo is None else set(forest.undo.disks.values()))


def _stood_on(forest: Tree) -> set[str]:
    """The images below those that somebody names; these themselves, too, for a snapshot of one disk alone."""
    found: set[str] = set()
    for top in forest.named():
        image = forest.images.get(top)
        while image is not None and image.parent is not None and image.parent not in found:
            found.add(image.parent)
            image = forest.images.get(image.parent)
    return found | forest.lent()


def stale_notes(seen: Survey, forest: Tree, held: set[str]) -> list[Path]:
    """Images that the present writes to, noted as frozen although nothing needs them unchanged; none where that is not sure."""
    layout = seen.home.layout
    if seen.faults or seen.missing or journal.is_open(layout.journal):
        return []  # what cannot be read could need them
    ours = {path for path in forest.present.disks.values() if layout.owns(path) and path in forest.images} - held
    noted = [Path(path) for path in sorted(ours) if frozen.is_recorded(layout, Path(path))]
    others = (
        {Path(path) for one in index.entries() if one.vm_id != seen.home.vm_id for path in one.outside} if noted else ()
    )
    needed = {images.identity(path) for path in others if path.exists()}
    return [path for path in noted if images.identity(path) not in needed]


def _chains(seen: Survey, forest: Tree) -> Iterator[Finding]:
    circles: set[str] = set()
    for part in seen.parts():
        for slot, path in part.disks.items():
            above: list[str] = []
            step: str | None = path
            while step is not None and step in forest.images:
                if step in above:
                    if step not in circles:
                        sentence = f"the chain of {part.who}, disk {slot}, runs in a circle at {step}"
                        yield finding(Code.CHAIN_CIRCLE, sentence, step, repair="put the images back from a backup")
                    circles.update(above)
                    break
                above.append(step)
                step = forest.images[step].parent
            if len(above) > tree.WARN_DEPTH:
                sentence = (
                    f"{part.who}, disk {slot}, stands on {len(above)} images: more than {tree.WARN_DEPTH} cost time"
                )
                repair = f"delete snapshots; at {tree.MAX_DEPTH} images no more are made, at 200 libvirt fails"
                yield finding(Code.CHAIN_DEEP, sentence, path, repair=repair)


def _since_frozen(seen: Survey, forest: Tree, held: set[str]) -> Iterator[Finding]:
    layout = seen.home.layout
    ours = {path for path in held if forest.images[path].keeper is not Keeper.OUTSIDE}
    for path in sorted(held):
        found = frozen.condition(layout, Path(path))
        needed = ", ".join(seen.needs(path))
        if found is Condition.CHANGED:
            sentence = f"{path} is not what it was when it was frozen (size or header); needed by {needed}"
            repair = "put it back from a backup, or delete what needs it; doctor --repair puts back what changed places"
            yield finding(Code.IMAGE_CHANGED, sentence, path, repair=repair)
        elif found is Condition.TOUCHED:
            sentence = (
                f"{path} has another time than when it was frozen, with the same size and header; needed by {needed}"
            )
            repair = "if it came from a backup or a copy: hvmgr doctor --repair --accept-touched"
            yield finding(Code.IMAGE_TOUCHED, sentence, path, repair=repair)
        elif found is Condition.UNKNOWN and path in ours:
            sentence = f"nobody noted what {path} was when it was frozen: changes would not be seen"
            yield finding(Code.IMAGE_UNRECORDED, sentence, path, repair="doctor --repair notes what it is now")


def _modes(seen: Survey, forest: Tree, held: set[str], *, owner: Owner, dynamic: bool) -> Iterator[Finding]:
    for path, mode in wrong_modes(seen, forest, held):
        is_mode = stat.S_IMODE(path.stat().st_mode)
        repair = f"chmod {mode:o} '{path}'"
        if not is_mode & stat.S_IWUSR and mode & stat.S_IWUSR:
            sentence = f"the VM writes to {path}, whose mode {is_mode:04o} forbids it"
            yield finding(Code.IMAGE_NOT_WRITABLE, sentence, path, repair=repair)
        else:
            sentence = f"{path} has the mode {is_mode:04o}; it should be {mode:04o}"
            yield finding(Code.MODE_WRONG, sentence, path, repair=repair)
    for path in stale_notes(seen, forest, held):
        if not path.stat().st_mode & stat.S_IWUSR:
            continue  # that is said already, and one cure is for both
        sentence = f"{path} is noted as frozen, which keeps the VM from starting, and nothing needs it unchanged"
        yield finding(Code.IMAGE_NOT_WRITABLE, sentence, path, repair="doctor --repair forgets the note")
    if owner is None or os.geteuid() != 0:
        return
    for file in (*wrong_owners(forest, owner, dynamic=dynamic), *_nvram(seen, owner, dynamic=dynamic)):
        sentence = f"{file} belongs to {access.name_of(file.stat().st_uid)}; QEMU runs as {access.name_of(owner[0])}"
        yield finding(Code.OWNER_WRONG, sentence, file, repair=f"chown {owner[0]}:{owner[1]} '{file}'")
    for image in forest.images.values():
        if image.keeper is Keeper.OUTSIDE and (closed := access.closed_folder(Path(image.path), owner)) is not None:
            sentence = f"QEMU's user ({access.name_of(owner[0])}) may not pass through {closed} to {image.path}"
            yield finding(Code.WAY_CLOSED, sentence, closed, repair=f"chmod o+x '{closed}'")


def _nvram(seen: Survey, owner: tuple[int, int], *, dynamic: bool) -> Iterator[Path]:
    """The present's NVRAM, when QEMU's user would be shut out from it."""
    path = None if seen.present is None else seen.present.configuration.nvram
    if path is not None and path.is_file() and not access.may_own(path, owner, dynamic=dynamic):
        yield path


def wrong_modes(seen: Survey, forest: Tree, held: set[str]) -> Iterator[tuple[Path, int]]:
    """Images with another mode than their users need, with the right one."""
    working = _working(forest)
    for path, image in forest.images.items():
        file = Path(path)
        if not file.is_file():
            continue  # a block device has no mode worth changing
        is_mode = stat.S_IMODE(file.stat().st_mode)
        if image.keeper is Keeper.OUTSIDE and not frozen.is_recorded(seen.home.layout, file):
            continue  # hvmgr never froze it: its mode is its owner's
        if path in held:
            may_be_read = (
                is_mode & 0o044 if image.keeper is Keeper.OUTSIDE else 0
            )  # by others, where libvirt runs QEMU so
            right = frozen.FROZEN_MODE | may_be_read
        elif path in working:
            is_wish = is_mode & 0o607 == frozen.WORKING_MODE  # more for a group, and for nobody else
            right = is_mode if is_wish else frozen.WORKING_MODE
        else:
            right = access.right_file_mode(file) or is_mode
        if is_mode != right:
            yield file, right


def wrong_owners(forest: Tree, owner: tuple[int, int], *, dynamic: bool) -> Iterator[Path]:
    """Images of this home from which QEMU's user would be shut out."""
    for path, image in forest.images.items():
        if image.keeper is not Keeper.OUTSIDE and not access.may_own(Path(path), owner, dynamic=dynamic):
            yield Path(path)


def _waiting(seen: Survey, forest: Tree) -> Iterator[Finding]:
    waiting = dict(tree.pending(forest))
    for path, child in waiting.items():
        size = units.format_size(forest.images[path].data)
        sentence = f"{path} ({size}) waits to be merged with {Path(child).name}"
        yield finding(Code.MERGE_PENDING, sentence, path, repair=f"hvmgr snapshot merge '{seen.name}'")
    by_name = outside_images.names_needed(forest)
    for path, names in by_name.items():
        words = " ".join(f"--image '{name}'" for name in names)
        sentence = f"{path} has no name and one child, and is merged only by name: others made it, or what stands on it"
        yield finding(Code.IMAGE_UNNAMED, sentence, path, repair=f"hvmgr snapshot merge '{seen.name}' {words}")
    children = forest.children()
    for path in tree.unnamed(forest):
        if forest.strangers.get(path):
            continue  # a snapshot of that disk alone
        if path not in waiting and path not in by_name and forest.images[path].keeper is Keeper.IMAGES:
            sentence = f"{path} has no name; it is kept for the {len(children[path])} images that stand on it"
            yield finding(Code.IMAGE_UNNAMED, sentence, path)
    for path in tree.detached(forest):
        size = units.format_size(forest.images[path].data)
        sentence = f"{path} ({size}) is a detached disk: nothing uses it, and it is kept"
        yield finding(Code.DISK_DETACHED, sentence, path, repair="move it away if nobody needs it")


def confined(seen: Survey, models: frozenset[str] | None) -> Iterator[Finding]:
    """Images and homes that AppArmor or SELinux keep QEMU from, as far as files tell.

    ``models`` are those by which libvirt confines its guests; None when it cannot be asked, and any may be.
    """
    yield from _labelled(seen, models)
    yield from _profiled(seen, models)


def _labelled(seen: Survey, models: frozenset[str] | None) -> Iterator[Finding]:
    if models is not None and "selinux" not in models:
        return
    if confinement.has_selinux() and not confinement.is_labelled(seen.home.path):
        sentence = f"SELinux is on, and {seen.home.path} has no label that QEMU may use"
        repair = f"semanage fcontext -a -t virt_image_t '{seen.home.path}(/.*)?' && restorecon -R '{seen.home.path}'"
        yield finding(Code.SELINUX_LABEL, sentence, seen.home.path, repair=repair)


def _profiled(seen: Survey, models: frozenset[str] | None) -> Iterator[Finding]:
    if not confinement.has_apparmor() or (models is not None and "apparmor" not in models):
        return
    for path in seen.headers:
        verdict = confinement.apparmor_verdict(Path(path))
        if verdict is None:
            continue
        sentence = f"AppArmor is on, and libvirt's helper may not read {path}: a VM may be kept from it"
        repair = f"add the line '{verdict.missing}' to {confinement.apparmor_local_file()}"
        if verdict.denied is not None:
            sentence += f" (its profile says '{verdict.denied}', which no local rule can lift)"
            repair = "keep images in a folder that is not hidden: below /var/lib/hvmgr, or choose one with --home"
        yield finding(Code.APPARMOR_RULE, sentence, path, repair=repair)


def thorough(seen: Survey, *, busy: set[str]) -> Iterator[Finding]:
    """What ``qemu-img check`` finds in each image; those that a running VM writes to are left alone."""
    for path, header in seen.headers.items():
        if header.format != images.QCOW2 or path in busy:
            continue
        try:
            result = qemu_img.check(Path(path), header.format)
        except errors.Conflict:
            continue  # somebody writes to it: its tables mean nothing now
        except errors.HvmgrError as error:
            yield finding(Code.IMAGE_DAMAGED, str(error), path, repair="put it back from a backup")
            continue
        if not result.is_sound:
            needed = ", ".join(seen.needs(path)) or "nothing"
            sentence = f"{path} is damaged inside ({result.corruptions} corruptions); needed by {needed}"
            repair = f"put it back from a backup; the last resort is: qemu-img check -r all '{path}'"
            yield finding(Code.IMAGE_DAMAGED, sentence, path, repair=repair)
        elif result.leaks:
            sentence = f"{path} has {result.leaks} clusters that nothing uses; they cost space, nothing else"
            yield finding(Code.IMAGE_LEAKS, sentence, path, repair="doctor --repair gives those of working images back")
