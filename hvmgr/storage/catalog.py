"""A catalog of images: a folder that any web server can serve as it is, with one document that says what is in it.

    catalog.json            the images: name, group, kind, file, sizes, checksum, answer file
    images/NAME.vhd …       the images, never written again
    answers/NAME.xml …      what the system of an image is told when it starts for the first time
    .links.json             images outside that stand on ones of the catalog; nobody else's business

The document is written last when something is added, and first when something goes: it never names what is not there.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from hvmgr import errors
from hvmgr.model.image_format import ImageFormat
from hvmgr.storage import durable, locks

VERSION = 1
WIM = "wim"  # the kind of an entry that is no disk
_DOCUMENT, _LINKS, _LOCK = "catalog.json", ".links.json", ".lock"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
_GROUP = re.compile(r"[^\x00-\x1f\x7f]{1,100}")


class AnswerKind(StrEnum):
    """Who reads an answer file: Windows Setup, or cloud-init."""

    UNATTEND = "unattend"
    CLOUD_INIT = "cloud-init"


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer file by its path in the catalog."""

    kind: AnswerKind
    file: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One image; ``file`` is its path in the catalog, ``kind`` its format, ``disk`` the size of its disk (None: a WIM).

    ``parts`` are the images in a WIM by index and name. Times are RFC 3339.
    """

    name: str
    group: str
    kind: str
    file: str
    size: int
    sha256: str
    disk: int | None
    description: str
    added: str
    parts: tuple[tuple[int, str], ...] = ()
    answer: Answer | None = None

    def document(self) -> dict[str, Any]:
        """As it stands in the catalog."""
        answer = self.answer
        return {
            "name": self.name, "group": self.group, "kind": self.kind, "file": self.file, "size": self.size,
            "sha256": self.sha256, "disk": self.disk, "description": self.description, "added": self.added,
            "parts": [{"index": index, "name": name} for index, name in self.parts],
            "answer": None if answer is None else
                {"kind": answer.kind.value, "file": answer.file, "sha256": answer.sha256},
        }  # fmt: skip


class Catalog:
    """The catalog in a folder, which need not be there yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def entries(self) -> list[Entry]:
        """All images, by group and name; Corrupt when the document is damaged, Unsupported when it is newer."""
        file = self.folder / _DOCUMENT
        try:
            with durable.explained(file):
                document = json.loads(file.read_bytes())
            if document["version"] > VERSION:
                raise errors.Unsupported(f"{file} was written by a newer hvmgr", hint="use that one")
            found = [_entry(one) for one in document["images"]]
        except errors.NotFound:
            return []
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise errors.Corrupt(f"{file} is damaged", path=str(file)) from error
        return sorted(found, key=lambda one: (one.group, one.name))

    def entry(self, name: str) -> Entry:
        """The image of that name; NotFound with those that there are."""
        known = self.entries()
        for one in known:
            if one.name == name:
                return one
        told = ", ".join(one.name for one in known[:20])
        raise errors.NotFound(
            f"the catalog {self.folder} has no image '{name}'", hint=f"it has {told}" if told else "it is empty"
        )

    def path(self, relative: str) -> Path:
        """A file of the catalog."""
        return self.folder / relative

    def put(self, entry: Entry) -> None:
        """The document has the entry, in the place of one of its name."""
        self._write([*(one for one in self.entries() if one.name != entry.name), entry])

    def drop(self, name: str) -> None:
        """The document does not have it, and nothing is known to stand on it."""
        self._write([one for one in self.entries() if one.name != name])
        known = self._links()
        if known.pop(name, None) is not None:
            self._write_links(known)

    def move(self, name: str, group: str) -> None:
        """The image is in that group."""
        self.put(replace(self.entry(name), group=group))

    @contextlib.contextmanager
    def changing(self, wait_s: float) -> Iterator[None]:
        """The folder is there, and no other command changes the catalog."""
        with durable.explained(self.folder):
            for one in (self.folder, self.folder / "images", self.folder / "answers"):
                durable.make_folder(one, mode=0o755)
        with locks.held(self.folder / _LOCK, wait_s=wait_s, what=f"the catalog {self.folder}"):
            yield

    def links(self, name: str) -> list[Path]:
        """Where images outside were made on an image of the catalog; a place is named once for each that was made there."""
        return [Path(one) for one in self._links().get(name, ())]

    def note_link(self, name: str, child: Path) -> None:
        """One more of them, before it has its name; the caller is ``changing`` the catalog until it has."""
        known = self._links()
        known[name] = sorted([*known.get(name, ()), str(child)])
        self._write_links(known)

    def forget_link(self, name: str, child: Path) -> None:
        """One less: it was not made. Others that were made at the same place, and moved, are still known."""
        known = self._links()
        known[name].remove(str(child))
        self._write_links(known)

    def _links(self) -> dict[str, list[str]]:
        try:
            known = json.loads((self.folder / _LINKS).read_bytes())
            return {str(name): [str(one) for one in several] for name, several in known.items()}
        except FileNotFoundError:
            return {}
        except (ValueError, AttributeError, TypeError, RecursionError) as error:
            file = self.folder / _LINKS
            raise errors.Corrupt(
                f"{file} is damaged: nobody knows what stands on the images", path=str(file)
            ) from error

    def _write_links(self, known: dict[str, list[str]]) -> None:
        durable.write_file(self.folder / _LINKS, json.dumps(known).encode())

    def _write(self, entries: list[Entry]) -> None:
        document = {"version": VERSION, "images": [one.document() for one in entries]}
        durable.write_file(self.folder / _DOCUMENT, json.dumps(document, indent=1).encode() + b"\n", mode=0o644)


def require_name(name: str) -> None:
    """UsageError for what is no good name of a file that is served."""
    if not _NAME.fullmatch(name):
        raise errors.UsageError(
            f"'{name}' is no name for an image in a catalog",
            hint="use up to 100 letters, digits, and . _ + -, and begin with a letter or digit: --name",
        )


def require_group(group: str) -> None:
    """UsageError for what is no name of a group."""
    if not _GROUP.fullmatch(group):
        raise errors.UsageError(f"{group!r} is no name for a group", hint="use 1 to 100 printable characters")


def _entry(raw: dict[str, Any]) -> Entry:
    answer = raw["answer"]
    found = Entry(
        name=str(raw["name"]), group=str(raw["group"]), kind=str(raw["kind"]), file=str(raw["file"]),
        size=int(raw["size"]), sha256=str(raw["sha256"]), disk=None if raw["disk"] is None else int(raw["disk"]),
        description=str(raw["description"]), added=str(raw["added"]),
        parts=tuple((int(one["index"]), str(one["name"])) for one in raw["parts"]),
        answer=None if answer is None else Answer(AnswerKind(answer["kind"]), str(answer["file"]), str(answer["sha256"])),
    )  # fmt: skip
    # Whoever wrote the document may not lead anybody out of the folder.
    for relative in (found.file, *(() if found.answer is None else (found.answer.file,))):
        if Path(relative).is_absolute() or ".." in Path(relative).parts:
            raise ValueError(relative)
        if "\0" in relative:
            raise ValueError(relative)
    if not _NAME.fullmatch(found.name):
        raise ValueError(found.name)
    if found.kind != WIM:
        ImageFormat(found.kind)
    return found
