"""Images outside a catalog that were made on ones of it: noted in the catalog, because nobody else can know of all of them.

One that is not at its place may have been removed or moved, to whatever disk. It counts as one that needs its parent until
somebody says that it is gone.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Container, Iterator, Sequence
from pathlib import Path

from hvmgr import errors
from hvmgr.operations.images import recognition
from hvmgr.storage.catalog import Catalog


def gone(catalog: Catalog, name: str, told: Sequence[Path | str]) -> set[Path]:
    """Those that the caller speaks of; UsageError for what was not made on the image."""
    found = {Path(os.path.realpath(one)) for one in told}
    if unknown := found - set(catalog.links(name)):
        raise errors.UsageError(f"{min(unknown)} was not made on '{name}'")
    return found


def require_none(catalog: Catalog, name: str, path: Path, gone: Container[Path]) -> None:
    """Conflict while there is one that stands on the image in ``path``, or may."""
    for child in catalog.links(name):
        if _is_there(child):
            if _may_stand_on(child, path):
                raise errors.Conflict(
                    f"{child} stands on '{name}'", hint="remove or merge that one first", path=str(child)
                )
        elif child not in gone:
            raise errors.Conflict(
                f"{child}, which was made on '{name}', is not there any more; if it was moved, it needs '{name}'",
                hint=f"if it was removed, say so: hvmgr catalog remove {name} --gone {shlex.quote(str(child))}",
                path=str(child),
            )


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
