"""Cures for images: found again by id or record, names exchanged back, set aside, modes and owners, records.

An image is found again when its own record says so (size, header, time), or when it carries the missing image's id or
name, can be read as what it should be, has the size that its children have, and no record speaks against it. Two that fit
are one too many, and without libvirt nobody knows whether another VM uses a file: then none is taken.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from hvmgr import errors
from hvmgr.host import qemu_img
from hvmgr.model.diagnosis import Code
from hvmgr.operations import strangers
from hvmgr.operations.doctor import home_checks, image_checks, surroundings
from hvmgr.operations.doctor.cure import Case, Cure, move, set_aside
from hvmgr.storage import durable, frozen, images, index, vm_home
from hvmgr.storage.frozen import Condition
from hvmgr.storage.survey import Missing, Survey

_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


# --- missing --------------------------------------------------------------------------------------------------------


def reattach(case: Case) -> Iterator[Cure]:
    """Missing images that lie under another name, in the home or beside it, get their name back."""
    if case.seen is None:
        return
    for one in case.of(Code.IMAGE_MISSING):
        missing = case.seen.missing.get(one.where)
        found = [] if missing is None else candidates(case, case.seen, Path(one.where), missing)
        if len(found) == 1:
            act = partial(_put_back, case, case.seen, Path(one.where), found[0])
            is_sure = frozen.condition(case.layout, Path(one.where), file=found[0]) is Condition.UNCHANGED
            by = "its record" if is_sure else "its id alone"
            yield Cure(one, f"put {found[0]} back to its name {one.where} (known by {by})", act)


def candidates(case: Case, seen: Survey, path: Path, missing: Missing) -> list[Path]:
    """The files that are the missing image; those of which its record is sure, if there are any."""
    forest = seen.tree()
    needed = {os.path.realpath(one) for one in (*forest.named(), *forest.children())}
    files = [file for file in _near(seen, path) if os.path.realpath(file) not in needed]
    sure = [file for file in files if frozen.condition(seen.home.layout, path, file=file) is Condition.UNCHANGED]
    likely = sure or [
        file for file in files if _is_named(path, file) and _has_size_of_children(seen, path, missing, file)
    ]
    fitting = [file for file in likely if _fits(seen, path, missing, file)]
    return [file for file in _each_once(fitting) if not _is_used(case, file)]


def _near(seen: Survey, path: Path) -> Iterator[Path]:
    """Files in the home, in the folder above it, and where the image was."""
    layout = seen.home.layout
    for folder, names, files in os.walk(seen.home.path):
        names[:] = sorted(name for name in names if Path(folder) / name not in (layout.frozen, layout.trash))
        yield from (Path(folder) / name for name in sorted(files))
    for beside in dict.fromkeys((seen.home.path.parent, path.parent)):
        if beside.is_dir() and not beside.is_relative_to(seen.home.path):
            yield from sorted(file for file in beside.iterdir() if file.is_file())


def _is_named(path: Path, file: Path) -> bool:
    """By the image's id in the name, by the whole name, or by the inode that an image outside had when it was frozen."""
    if _ID.findall(path.name):
        return _ID.findall(path.name)[-1] in file.name
    return file.name == path.name or file.name.startswith(f"{path.name}.") or index.noted_path(file) == str(path)


def _has_size_of_children(seen: Survey, path: Path, missing: Missing, file: Path) -> bool:
    sizes = {header.size for header in seen.headers.values() if str(header.parent) == str(path)}
    try:
        return not sizes or images.read(file, missing.format).size in sizes
    except errors.HvmgrError:
        return False


def _fits(seen: Survey, path: Path, missing: Missing, file: Path) -> bool:
    """Whether it can be read as the image, stands on an image of this VM, and no record speaks against it."""
    if frozen.condition(seen.home.layout, path, file=file) is Condition.CHANGED:
        return False
    try:
        header = images.read(file, missing.format)
    except errors.HvmgrError:
        return False
    if header.backing is None:
        return True
    parent = os.path.realpath(path.parent / header.backing)
    return parent in seen.headers or parent in seen.missing


def _is_used(case: Case, file: Path) -> bool:
    """Whether another VM may need the file under the name that it has."""
    if case.around.connection is None or case.seen is None:
        return True
    with surroundings.looking(case.seen.home, case.around.connection) as session:
        return bool(strangers.of(session, [str(file)]))


def _each_once(files: list[Path]) -> list[Path]:
    """A file with two names is one file."""
    return list({images.identity(file): file for file in reversed(files)}.values())


def _put_back(case: Case, seen: Survey, target: Path, file: Path) -> None:
    with case.locked():
        if not _fits(seen, target, seen.missing[str(target)], file):
            raise errors.Conflict(f"{file} has changed meanwhile", hint="run doctor again")
        move(file, target)


# --- exchanged ------------------------------------------------------------------------------------------------------


def exchange(case: Case) -> Iterator[Cure]:
    """Frozen images that others took the names of get them back, when their records say which file is which."""
    if case.seen is None or case.is_active:
        return
    done: set[Path] = set()
    for one in case.of(Code.IMAGE_CHANGED):
        path = Path(one.where)
        if path in done:
            continue
        true = _true_file(case.seen, path)
        if true is None:
            continue
        done |= {path, true}
        if str(true) in case.seen.headers:
            yield Cure(one, f"exchange the names of {path} and {true}", partial(_exchange_true, case, path, true))
        elif case.layout.owns(str(path)) and not _is_used(case, true):
            yield Cure(one, f"set {path} aside and put {true} in its place", partial(_replace, case, path, true))


def _true_file(seen: Survey, path: Path) -> Path | None:
    """The one file that the record of a frozen image fits in every respect."""
    fitting = [
        file
        for file in _each_once([file for file in _near(seen, path) if file.is_file()])
        if file != path
        and frozen.condition(seen.home.layout, path, file=file) is Condition.UNCHANGED
        and frozen.condition(seen.home.layout, file) is not Condition.UNCHANGED
    ]
    return fitting[0] if len(fitting) == 1 else None


def _exchange_true(case: Case, path: Path, true: Path) -> None:
    with case.locked():
        _require_true(case, path, true)
        durable.exchange(path, true)


def _replace(case: Case, path: Path, true: Path) -> None:
    with case.locked():
        _require_true(case, path, true)
        set_aside(case.layout, path, f"it is not the image that was frozen under this name: that one was {true}")
        move(true, path)  # should we die before: the image is missing then, and its record finds it again


def _require_true(case: Case, path: Path, true: Path) -> None:
    if frozen.condition(case.layout, path, file=true) is not Condition.UNCHANGED:
        raise errors.Conflict(f"{true} has changed meanwhile", hint="run doctor again")


def exchange_working(case: Case) -> Iterator[Cure]:
    """Two working images that stand on each other's frozen image changed names: no record, but their headers say so."""
    if case.seen is None or case.is_active or case.seen.present is None:
        return
    swapped = [Path(one.where) for one in case.of(Code.IMAGE_SWAPPED)]
    if len(swapped) != 2 or swapped[0].parent != swapped[1].parent:
        return
    first, second = swapped
    bases = _expected_bases(case.seen)
    headers = case.seen.headers
    fits = str(headers[str(first)].parent) == bases.get(str(second)) and str(headers[str(second)].parent) == bases.get(
        str(first)
    )
    if not fits:
        return

    act = partial(_exchange, case, first, second)
    yield Cure(case.of(Code.IMAGE_SWAPPED)[0], f"exchange the names of {first} and {second}", act)


def _exchange(case: Case, first: Path, second: Path) -> None:
    with case.locked():
        durable.exchange(first, second)


def _expected_bases(seen: Survey) -> dict[str, str]:
    """For each working image what the snapshot above the present froze for its disk; disks are the same by id."""
    assert seen.present is not None
    facts = seen.present.facts
    above = next((one for one in seen.snapshots if one.file.stem == facts.parent), None)
    if above is None:
        return {}
    slots = {record.id: record.slot for record in above.facts.disks}
    ids = {record.slot: record.id for record in facts.disks}
    frozen_at = above.disks
    found = {}
    for slot, working in seen.present.disks.items():
        base = frozen_at.get(slots.get(ids.get(slot, ""), ""))
        if base is not None:
            found[working] = base
    return found


# --- useless ----------------------------------------------------------------------------------------------------------


def quarantine(case: Case) -> Iterator[Cure]:
    """Images in the home that QEMU cannot open either are set aside: commands that do not need them work again."""
    if case.seen is None or case.is_active:
        return
    for one in case.of(Code.IMAGE_UNREADABLE):
        file = Path(one.where)
        if case.layout.owns(one.where) and file.is_file() and not _can_be_opened(file):
            yield Cure(one, f"set {file} aside", partial(_set_aside, case, file, one.sentence))


def _set_aside(case: Case, file: Path, why: str) -> None:
    with case.locked():
        set_aside(case.layout, file, why)


def _can_be_opened(file: Path) -> bool:
    try:
        qemu_img.info(file, images.QCOW2, force_share=True)
    except errors.Corrupt:
        return False
    except errors.HvmgrError:
        return True  # nobody said that it is damaged
    return True


# --- modes, owners, records -------------------------------------------------------------------------------------------


def modes(case: Case) -> Iterator[Cure]:
    """Folders, files and images get the modes that their users need, and nobody else's; a note that forbids more goes."""
    if case.seen is None:
        return
    forest = case.seen.tree()
    held = image_checks.frozen_images(forest)
    right = dict(home_checks.wrong_modes(case.seen))
    right |= dict(image_checks.wrong_modes(case.seen, forest, held))
    stale = image_checks.stale_notes(case.seen, forest, held)
    for one in (*case.of(Code.MODE_WRONG), *case.of(Code.IMAGE_NOT_WRITABLE)):
        path = Path(one.where)
        mode, is_stale = right.get(path), path in stale
        words = [] if mode is None else [f"give {path} the mode {mode:04o}"]
        words += [f"forget that {path} was frozen"] if is_stale else []
        if words:
            yield Cure(one, " and ".join(words), partial(_set_mode, case, path, mode, forget=is_stale))


def _set_mode(case: Case, path: Path, mode: int | None, *, forget: bool) -> None:
    with case.locked():
        if mode is not None:
            durable.set_mode(path, mode)
        if forget:
            frozen.forget(case.layout, path)


def owners(case: Case) -> Iterator[Cure]:
    """Images belong to QEMU's user."""
    owner = case.around.owner
    for one in case.of(Code.OWNER_WRONG):
        yield Cure(one, f"give {one.where} to uid {owner[0] if owner else '?'}", partial(_own, case, Path(one.where)))


def _own(case: Case, path: Path) -> None:
    with case.locked():
        durable.set_owner(path, case.around.owner)


def records(case: Case) -> Iterator[Cure]:
    """What frozen images are is noted: those without a record, and, if the user vouches for them, touched ones."""
    for one in case.of(Code.IMAGE_UNRECORDED):
        yield Cure(one, f"note what {one.where} is now", partial(_record, case, Path(one.where)))
    for one in case.of(Code.IMAGE_TOUCHED) if case.accept_touched else ():
        yield Cure(
            one, f"check {one.where}, and take it as it is", partial(_record, case, Path(one.where), checked=True)
        )


def _record(case: Case, path: Path, *, checked: bool = False) -> None:
    with case.locked():
        if checked and images.probe(path) == images.QCOW2 and not qemu_img.check(path, images.QCOW2).is_sound:
            raise errors.Corrupt(f"{path} is damaged inside", hint="put it back from a backup", path=str(path))
        if frozen.condition(case.layout, path) is Condition.CHANGED:
            raise errors.Corrupt(f"{path} was changed meanwhile", path=str(path))
        frozen.record(case.layout, path)


def leaks(case: Case) -> Iterator[Cure]:
    """Working images get the clusters back that nothing uses; frozen ones are left as they are."""
    if case.seen is None or case.is_active:
        return
    working = set() if case.seen.present is None else set(case.seen.present.disks.values())
    held = image_checks.frozen_images(case.seen.tree())
    for one in case.of(Code.IMAGE_LEAKS):
        if one.where in working - held and case.layout.owns(vm_home.canonical(one.where)):
            yield Cure(one, f"give the unused clusters of {one.where} back", partial(_plug, case, Path(one.where)))


def _plug(case: Case, path: Path) -> None:
    with case.locked():
        qemu_img.check(path, images.QCOW2, repair_leaks=True)
