"""Where an export is made: ``DEST/.<name>.hvmgr-export``, until it is complete and gets its name.

    lock      held by the command at work
    journal   the plan; then ``switch`` when the export is about to get its name
    notes/    what is finished: an interrupted export goes on with that
    home/     the export

| cut off                 | what the next export to this place finds | what it does                          |
|-------------------------|------------------------------------------|---------------------------------------|
| before the first step   | an empty place                           | uses it                               |
| while it is made        | a journal, finished files, half a home   | plans anew, keeps the finished files  |
| at the switch           | a journal with ``switch``, and the home  | the same: everything is finished      |
| after the switch        | the same without the home                | removes the place: that export is done |
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hvmgr import errors
from hvmgr.model import export_plan  # noqa: F401 - journals hold its steps
from hvmgr.model.plan import Plan
from hvmgr.storage import durable, journal, locks
from hvmgr.storage.finished import Notes

_MODE = 0o700
PUBLISHED_MODE = 0o550


@dataclass(frozen=True, slots=True)
class Place:
    """Where the export ``target`` is made."""

    target: Path
    at: Path | None = None  # an archive is made elsewhere

    @property
    def folder(self) -> Path:
        """The place itself."""
        return self.at or self.target.parent / f".{self.target.name}.hvmgr-export"

    @property
    def home(self) -> Path:
        """The export, as long as it is not complete."""
        return self.folder / "home"

    @property
    def journal(self) -> Path:
        """The plan that is under way."""
        return self.folder / "journal"

    @property
    def notes(self) -> Notes:
        """What is finished."""
        return Notes(self.folder / "notes")

    def require_free(self) -> None:
        """Conflict when something has the export's name already."""
        if os.path.lexists(self.target):
            raise errors.Conflict(
                f"{self.target} exists already, and an export replaces nothing",
                hint="export to another folder, or remove it",
                path=str(self.target),
            )

    def complete(self) -> bool:
        """What an earlier export left open is completed, when it came as far as to its name; whether there was that."""
        if not self.folder.is_dir() or locks.is_held(self.folder / "lock"):
            return False
        if self._is_published():
            self.close()
            return True
        if self.target.is_dir() and not journal.is_open(self.journal):
            durable.remove_folder(self.folder)  # the very end of the same
        return False

    @contextlib.contextmanager
    def opened(self, *, wait_s: float) -> Iterator[None]:
        """The place, for this command alone; it goes again when nothing in it would help the next attempt."""
        with durable.explained(self.folder):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
        durable.make_folder(self.folder, mode=_MODE)
        with locks.held(self.folder / "lock", wait_s=wait_s, what=f"the export {self.target}"):
            try:
                durable.sweep(self.folder)
                durable.make_folder(self.notes.folder, mode=_MODE)
                yield
            finally:
                if self.folder.is_dir() and not self._is_worth_keeping():
                    durable.remove_folder(self.folder)

    def begin(self, one: Plan) -> None:
        """It is on disk what this place is for."""
        journal.begin(self.journal, one)

    def publish(self) -> None:
        """The export has its name."""
        journal.reach_switch(self.journal)
        self.require_free()
        durable.rename(self.home, self.target)

    def close(self) -> None:
        """The export is closed for everybody's writing, and the place is gone: the journal last."""
        durable.set_folder_mode(self.target, PUBLISHED_MODE)
        durable.remove_folder(self.notes.folder)
        durable.remove_folder(self.folder)

    def _is_worth_keeping(self) -> bool:
        folder = self.notes.folder
        return self._is_published() or (folder.is_dir() and any(folder.iterdir()))

    def _is_published(self) -> bool:
        entry = journal.read(self.journal, obeyed=False)
        return entry is not None and entry.switch_reached and not self.home.exists() and self.target.is_dir()
