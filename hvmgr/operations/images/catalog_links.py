"""Images outside a catalog that were made on ones of it: noted in the catalog, because nobody else can know of all of them.

One that is not at its place may have been removed or moved, to whatever disk; a file that stands there now and does not need
the parent is another. It counts as one that needs its parent until somebody says that it is gone. So does a VM whose home is
not at its place: the index of the host knows on what it stood.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from pathlib import Path

from hvmgr import errors
from hvmgr.operations.images import recognition
from hvmgr.storage import index
from hvmgr.storage.catalog import Catalog


def gone(catalog: Catalog, name: str, path: Path, told: Sequence[Path | str]) -> Counter[Path]:
    """Those that the caller speaks of, each as often; UsageError for what does not stand on the image in ``path``."""
    known = {*catalog.links(name), *(one.home for one in _lost(path))}
    found: Counter[Path] = Counter()
    for one in told:
        # As it was noted: what the path leads through today may be another folder.
        places = [Path(os.path.normpath(Path(one).absolute())), Path(os.path.realpath(one))]
        place = next((place for place in places if place in known), None)
        if place is None:
            raise errors.UsageError(f"{places[0]} was not made on '{name}'")
        found[place] += 1
    return found


def require_none(catalog: Catalog, name: str, path: Path, gone: Counter[Path]) -> None:
    """Conflict while there is one that stands on the image in ``path``, or may."""
    for child, count in Counter(catalog.links(name)).items():
        is_there = _is_there(child)
        if is_there and _may_stand_on(child, path):
            raise errors.Conflict(f"{child} stands on '{name}'", hint="remove or merge that one first", path=str(child))
        if count > gone[child]:
            raise _missing(name, child, count, is_there=is_there)
    _require_no_lost(name, path, gone)


def _missing(name: str, child: Path, count: int, *, is_there: bool) -> errors.Conflict:
    if count > 1:
        what = (
            f"{count} images were made on '{name}' as {child}, one after the other; any that was moved needs '{name}'"
        )
    elif is_there:
        what = (
            f"{child} is another image than that which was made there on '{name}'; if that was moved, it needs '{name}'"
        )
    else:
        what = f"{child}, which was made on '{name}', is not there any more; if it was moved, it needs '{name}'"
    told = " ".join([f"--gone {shlex.quote(str(child))}"] * count)
    return errors.Conflict(
        what,
        hint=f"if {'all of them were' if count > 1 else 'it was'} removed, say so: hvmgr catalog remove {name} {told}",
        path=str(child),
    )


def _require_no_lost(name: str, path: Path, gone: Container[Path]) -> None:
    for one in _lost(path):
        if one.home not in gone:
            raise errors.Conflict(
                f"the VM '{one.name}' stands on '{name}', and its home {one.home} is not there",
                hint="bring its disk or folder back; if it was removed, say so: "
                f"hvmgr catalog remove {name} --gone {shlex.quote(str(one.home))}",
                path=str(one.home),
            )


def _lost(path: Path) -> list[index.Entry]:
    """The VMs on the image whose homes are not where the index has them: moved, not mounted, or removed by hand."""
    there = {one.vm_id for one in index.entries()}
    known = [note.entry for note in index.notes() if note.entry is not None]
    return [one for one in known if one.vm_id not in there and any(_is_same(outside, path) for outside in one.outside)]


def _is_same(outside: str, path: Path) -> bool:
    try:
        return path.samefile(outside)
    except OSError:
        return outside == str(path)


@contextlib.contextmanager
def noted(catalog: Catalog, name: str, child: Path) -> Iterator[None]:
    """Before it is there: a note without an image asks a question, an image without a note is lost."""
    catalog.note_link(name, child)
    try:
        yield
    except BaseException:
        if not child.exists():
            catalog.forget_link(name, child)
        raise


def _is_there(child: Path) -> bool:
    """Whether there is anything at the place of an image; what nobody can look at may be there."""
    try:
        child.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def _may_stand_on(child: Path, path: Path) -> bool:
    """Whether an image has another below it; one that nobody can read may have."""
    try:
        return any(one.samefile(path) for one in recognition.chain_of(child, [path.parent]))
    except (errors.HvmgrError, OSError):
        return True
