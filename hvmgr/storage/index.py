"""The host-wide index: which homes exist, and which images outside their home they use.

It does not depend on the connection or on ``--root``, so that a base which two VMs share is counted even when the VMs
live in different places. One small file per VM; a home that has gone is skipped, unless it may come back (``away``).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hvmgr import errors, settings
from hvmgr.model.layout import Layout
from hvmgr.storage import durable, images, locks

_FOLDER_MODE = 0o700


@dataclass(frozen=True, slots=True)
class Entry:
    """One VM: its name and home, the connection that it belongs to, and the images outside its home that it needs."""

    vm_id: str
    name: str
    home: Path
    uri: str
    outside: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Note:
    """One file of the index; ``entry`` is None when it is damaged."""

    file: Path
    entry: Entry | None


def entries() -> list[Entry]:
    """Every VM that hvmgr knows on this host and whose home is still there.

    The homes are the truth; a damaged note is skipped, and written again by the next operation. So is that of a VM whose
    home was removed by hand, when another VM's home stands in its place.
    """
    return [note.entry for note in notes() if note.entry is not None and _is_there(note.entry)]


def away(uri: str, known: Container[str]) -> list[Entry]:
    """Every VM whose home is not there but may come back, as from a file server that is not mounted.

    The libvirt at ``uri`` knows the VMs with the ids ``known``; of another one's VMs nobody can tell that they are gone.
    """
    found = [note.entry for note in notes() if note.entry is not None and not note.entry.home.exists()]
    return [one for one in found if one.uri != uri or one.vm_id in known]


def _is_there(entry: Entry) -> bool:
    """Whether the folder is a home of this VM, or about to become it."""
    layout = Layout(home=entry.home, vm_id=entry.vm_id)
    if layout.configuration.exists() or not entry.home.is_dir():
        return layout.configuration.exists()
    others = [one.stem for one in layout.configuration.parent.glob("*.xml") if len(one.stem) == len(entry.vm_id)]
    return layout.journal.exists() or not others


def notes() -> list[Note]:
    """Every file that the index has of a VM, damaged and outdated ones too."""
    folder = settings.index_folder() / "homes"
    return [Note(file, _read(file)) for file in (sorted(folder.glob("*.json")) if folder.is_dir() else ())]


def set_aside(note: Note) -> Path:
    """The index no longer counts on this file; it is kept in a folder beside the others."""
    target = make_folder("quarantine") / note.file.name
    durable.rename(note.file, target)
    return target


def _read(file: Path) -> Entry | None:
    try:
        facts = json.loads(file.read_bytes())
        return Entry(
            vm_id=file.stem,
            name=str(facts["name"]),
            home=Path(facts["home"]),
            uri=str(facts["uri"]),
            outside=tuple(map(str, facts["outside"])),
        )
    except (ValueError, KeyError, TypeError, OSError):
        return None


def record(entry: Entry) -> None:
    """The index says exactly this of the VM."""
    file = make_folder("homes") / f"{entry.vm_id}.json"
    facts = {"name": entry.name, "home": str(entry.home), "uri": entry.uri, "outside": sorted(entry.outside)}
    data = json.dumps(facts).encode()
    if not file.exists() or file.read_bytes() != data:
        durable.write_file(file, data)


def forget(vm_id: str) -> None:
    """The index knows nothing of the VM."""
    file = settings.index_folder() / "homes" / f"{vm_id}.json"
    if file.exists():
        durable.remove(file)


def keep_mode(path: Path, mode: int) -> None:
    """The first VM that freezes an image outside all homes notes its mode here, for the last one that lets go of it."""
    file = _mode_file(make_folder("modes"), path)
    if not file.exists():
        durable.write_file(file, json.dumps({"path": str(path), "mode": mode}).encode())


def kept_mode(path: Path) -> int | None:
    """The mode that the image had before it was frozen; None when that is not known."""
    try:
        facts = json.loads(_mode_file(settings.index_folder() / "modes", path).read_bytes())
        return int(facts["mode"])
    except (ValueError, KeyError, TypeError, OSError):
        return None


def noted_path(file: Path) -> str | None:
    """The path that an image outside all homes had when it was frozen, by its inode."""
    try:
        facts = json.loads(_mode_file(settings.index_folder() / "modes", file).read_bytes())
        return str(facts["path"])
    except (ValueError, KeyError, TypeError, OSError):
        return None


def forget_mode(path: Path) -> None:
    """The image has its own mode."""
    file = _mode_file(settings.index_folder() / "modes", path)
    if file.exists():
        durable.remove(file)


def _mode_file(folder: Path, path: Path) -> Path:
    device, inode = images.identity(path)
    return folder / f"{device}-{inode}.json"


def note_change(journal: Path) -> None:
    """An image outside all homes is being changed; its journal lies beside it."""
    durable.write_file(_change_file(make_folder("changes"), journal), json.dumps({"journal": str(journal)}).encode())


def forget_change(journal: Path) -> None:
    """That change is over."""
    durable.remove(_change_file(make_folder("changes"), journal))


def open_changes() -> list[Path]:
    """The journals of changes of images that have not come to their end, as far as they are still there."""
    folder = settings.index_folder() / "changes"
    found = []
    for file in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError, OSError):
            found.append(Path(str(json.loads(file.read_bytes())["journal"])))
    return [one for one in found if one.exists()]


def _change_file(folder: Path, journal: Path) -> Path:
    return folder / f"{hashlib.sha256(os.fsencode(journal)).hexdigest()[:32]}.json"


@contextlib.contextmanager
def making(path: Path, *, wait_s: float, what: str | None = None) -> Iterator[None]:
    """No other hvmgr command on this host makes a file of this name; ``what`` is said of it where it is one's step only."""
    name = hashlib.sha256(os.fsencode(path)).hexdigest()[:32]
    lock = make_folder("locks") / f"new-{name}"
    with locks.held(lock, wait_s=wait_s, what=what or f"the new image {path}"):
        try:
            yield
        finally:
            durable.remove(lock)


@contextlib.contextmanager
def locked(paths: Iterable[Path], *, wait_s: float) -> Iterator[None]:
    """No other hvmgr command on this host adds a user to one of these images or writes it."""
    folder = make_folder("locks")
    by_identity = {images.identity(path): path for path in paths if path.exists()}
    with contextlib.ExitStack() as stack:
        for (device, inode), path in sorted(by_identity.items()):  # one order for all: no deadlock
            lock = folder / f"{device}-{inode}"
            stack.enter_context(locks.held(lock, wait_s=wait_s, what=f"the image {path}"))
            stack.callback(durable.remove, lock)
        yield


def make_folder(name: str) -> Path:
    """A folder of the index, made if it is not there."""
    folder = settings.index_folder() / name
    try:
        for one in (folder.parent.parent, folder.parent, folder):
            durable.make_folder(one, mode=_FOLDER_MODE if one != folder.parent.parent else 0o711)
    except errors.NotFound:
        folder.parent.parent.mkdir(parents=True, exist_ok=True)
        return make_folder(name)
    return folder
