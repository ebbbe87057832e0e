"""Finds the parent of a differencing disk: by what the file says, beside it, and by id. The id decides each time.

The texts in a VHD are another program's words: a path in them is followed only within the child's folder and the folders
that the caller names, never to a device, never over the network.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from hvmgr import errors
from hvmgr.vhd import format, rules, structure
from hvmgr.vhd.format import NO_ID, Code
from hvmgr.vhd.image import Image
from hvmgr.vhd.locators import base_name

SUFFIXES = (".vhd", ".avhd")
_DEPTH = 8  # folders below a named one that are looked through
_CLOCK_GRAIN = 2  # seconds: FAT keeps only even ones


def find_parent(
    child: Image,
    *,
    parent: Path | None = None,
    folders: Sequence[Path] = (),
    windows_paths: Mapping[str, Path] | None = None,
    ignore_id: bool = False,
) -> Path:
    r"""The file that ``child`` was made from.

    Asked in this order: ``parent`` itself; the relative text from the child's folder; the file URL; the absolute text by
    way of ``windows_paths`` (``{"C:\\\\VMs": Path("/srv/vms")}``); a file of that name beside the child and in ``folders``;
    all VHDs in ``folders``, by id. Only ``parent`` with ``ignore_id`` may have another id.

    NotFound lists what was tried; Conflict: the named parent has another id, or several files fit equally well.
    """
    search = _Search(child, folders, windows_paths or {})
    if parent is not None:
        return search.take_named(Path(parent), ignore_id=ignore_id)
    if child.parent_uid == NO_ID:
        raise rules.fault("F45", path=child.path).error()
    for where, path in search.candidates():
        if (found := search.try_path(where, path)) is not None:
            return found
    if (found := search.scan()) is not None:
        return found
    raise search.failure()


def has_time(parent: Image, stamp: int) -> bool:
    """Whether a recorded time of the parent fits: unknown, the file's last change, or the disk's creation."""
    changed = int(parent.file.changed() - format.EPOCH.timestamp())
    return stamp in (0, parent.footer.time) or abs(stamp - changed) <= _CLOCK_GRAIN


@dataclass
class _Search:
    """One search: what was tried, and why it was not the parent."""

    child: Image
    folders: Sequence[Path]
    windows_paths: Mapping[str, Path]
    tried: list[str] = field(default_factory=list)

    def take_named(self, path: Path, *, ignore_id: bool) -> Path:
        footer = structure.peek(path)
        if footer is None:
            raise errors.Corrupt(
                f"{path} is no VHD, so it cannot be the parent of {self.child.path}",
                hint="convert it to VHD first, or name the right file",
            )
        if footer.uid != self.child.parent_uid and not ignore_id:
            if self.child.parent_uid == NO_ID:
                raise rules.fault("F45", path=self.child.path).error()
            wanted, found = self.child.parent_uid.hex(), footer.uid.hex()
            raise rules.fault("F43", path=self.child.path, wanted=wanted, parent=path, found=found).error()
        return path

    def candidates(self) -> Iterator[tuple[str, Path]]:
        """Where the file's own words lead, in the order in which they are believed."""
        own = self.child.path.parent
        texts = {text.code: text.text for text in self.child.structure.texts if text.text}
        if relative := texts.get(Code.RELATIVE):
            yield "relative locator", own / _unix(relative)
        if (url := texts.get(Code.URL)) and (path := _from_url(url)) is not None:
            yield "file URL", own / path
        if absolute := texts.get(Code.ABSOLUTE):
            if (mapped := self._map(absolute)) is not None:
                yield "absolute locator", mapped
            elif absolute.startswith((".\\", "..\\")):  # XenServer writes a relative one here
                yield "absolute locator", own / _unix(absolute)
            else:
                self.tried.append(f"{absolute} (no path on this host is known for it)")
        for name in self._names(texts.values()):
            for folder in (own, *self.folders):
                yield "name", folder / name

    def _names(self, texts: Iterable[str]) -> list[str]:
        assert self.child.header is not None
        words = [self.child.header.name, *texts]
        names = dict.fromkeys(base_name(word) for word in words)
        return [name for name in names if name not in ("", ".", "..")]

    def _map(self, text: str) -> Path | None:
        """A path of Windows by the longest prefix that the caller maps; case says nothing there."""
        wanted = text.replace("/", "\\")
        for prefix in sorted(self.windows_paths, key=len, reverse=True):
            head = prefix.replace("/", "\\").rstrip("\\")
            rest = wanted[len(head) :]
            if wanted.casefold().startswith(head.casefold()) and rest[:1] in ("", "\\"):
                return Path(self.windows_paths[prefix]) / _unix(rest.lstrip("\\"))
        return None

    def try_path(self, where: str, path: Path) -> Path | None:
        """The path when the parent is there; else why not is noted."""
        try:
            found = _without_case(path)
        except OSError as error:  # such as a name that is too long
            self._note(path, where, str(error.strerror))
            return None
        if found is None:
            self._note(path, where, "not there")
            return None
        if not self._is_allowed(found):
            self._note(path, where, "outside the folders that may be searched")
            return None
        return found if self._is_parent(found, where) else None

    def _note(self, path: Path, where: str, why: str) -> None:
        line = f"{os.path.normpath(path)} ({where}: {why})"
        if line not in self.tried:
            self.tried.append(line)

    def _is_allowed(self, path: Path) -> bool:
        real = path.resolve()
        roots = [self.child.path.parent, *self.folders, *self.windows_paths.values()]
        return any(real.is_relative_to(Path(root).resolve()) for root in roots)

    def _is_parent(self, path: Path, where: str) -> bool:
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                self._note(path, where, "no file")
                return False
            footer = structure.peek(path)
        except (errors.HvmgrError, OSError) as error:
            self._note(path, where, str(error))
            return False
        if footer is None or footer.uid != self.child.parent_uid:
            self._note(path, where, "no VHD" if footer is None else f"has the id {footer.uid.hex()}")
            return False
        return True

    def scan(self) -> Path | None:
        """The one VHD in the named folders with the right id."""
        found: dict[tuple[int, int], Path] = {}
        for folder in self.folders:
            for path in _vhds(Path(folder)):
                facts = path.stat()
                key = facts.st_dev, facts.st_ino
                if key not in found and key != self.child.file.identity() and self._has_id(path):
                    found[key] = path
            self.tried.append(f"{folder} (every VHD in it)")
        if len(found) > 1:
            names = ", ".join(str(path) for path in found.values())
            raise rules.fault("F49", path=self.child.path, names=names).error()
        return next(iter(found.values()), None)

    def _has_id(self, path: Path) -> bool:
        try:
            footer = structure.peek(path)
        except errors.HvmgrError:
            return False
        return footer is not None and footer.uid == self.child.parent_uid

    def failure(self) -> errors.HvmgrError:
        assert self.child.header is not None
        name = base_name(self.child.header.name)
        name = name or next((base_name(one.text) for one in self.child.structure.texts if one.text), "?")
        fault = rules.fault("F42", path=self.child.path, name=name, tried="; ".join(self.tried) or "nothing")
        error = fault.error()
        error.hint = "name the file, or the folder that it is in"
        error.facts |= {"parent_id": self.child.parent_uid.hex(), "tried": list(self.tried)}
        return error


def _unix(text: str) -> str:
    """A path of Windows with this system's separators; never absolute."""
    return text.replace("\\", "/").lstrip("/")


def _from_url(url: str) -> str | None:
    """The path in a file URL: relative ones begin with a dot instead of a host."""
    for prefix in ("file://localhost/", "file:///"):
        if url.startswith(prefix):
            return "/" + unquote(url[len(prefix) :])
    return unquote(url[len("file://") :]) if url.startswith("file://.") else None


def _without_case(path: Path) -> Path | None:
    """The file of that name; without it the one whose name differs in case only. Two of those are a Conflict."""
    path = Path(os.path.normpath(path))
    if path.exists():
        return path
    found = Path(path.anchor or ".")
    for part in path.parts[1 if path.anchor else 0 :]:
        if (found / part).exists():
            found /= part
            continue
        try:
            names = [entry.name for entry in found.iterdir() if entry.name.casefold() == part.casefold()]
        except OSError:
            return None
        if len(names) > 1:
            both = ", ".join(str(found / name) for name in sorted(names))
            raise errors.Conflict(f"{path} is not there, and these differ in case only: {both}")
        if not names:
            return None
        found /= names[0]
    return found


def _vhds(folder: Path) -> Iterator[Path]:
    for where, below, names in os.walk(folder):
        if len(Path(where).relative_to(folder).parts) >= _DEPTH:
            below.clear()
        for name in sorted(names):
            path = Path(where) / name
            if name.casefold().endswith(SUFFIXES) and path.is_file() and not path.is_symlink():
                yield path
