"""Progress bars on stderr, for people: made when the first job reports, gone when the command ends.

While they are drawn, rich puts what is written to stderr above them.
"""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from hvmgr.faces.cli import render
from hvmgr.model import progress


class Bars:
    """One bar per piece of work."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self._drawn = Progress(*columns, console=Console(stderr=True), transient=True)
        self._tasks: dict[str, TaskID] = {}
        self._drawn.start()

    def update(self, how_far: progress.Progress) -> None:
        """Draw how far a piece of work is; one that is complete goes."""
        task = self._tasks.get(how_far.what)
        if task is None:
            task = self._tasks[how_far.what] = self._drawn.add_task(render.clean(how_far.what), total=None)
        self._drawn.update(task, completed=how_far.done, total=how_far.total or None)
        if how_far.total and how_far.done >= how_far.total:
            self._drawn.remove_task(self._tasks.pop(how_far.what))

    def close(self) -> None:
        """Nothing of the bars stays."""
        self._drawn.stop()
