"""What a storage daemon is asked over its monitor: commands, whose refusals are hvmgr's errors, and jobs until they have ended."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvmgr import errors
from hvmgr.host import qemu_errors
from hvmgr.model.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable

    from hvmgr.host import qmp

# Also the time that a slow disk gets to take a flush.
COMMAND_S = 300.0
POLL_S = 0.05


class Monitor:
    """The monitor; ``on_progress`` hears how far jobs are, and may raise: the job is cancelled then."""

    def __init__(self, session: qmp.Session, on_progress: Callable[[Progress], None] | None) -> None:
        self._session = session
        self._on_progress = on_progress
        self._numbers = itertools.count(1)

    def _run_job(
        self,
        command: str,
        arguments: dict[str, object],
        *,
        what: str,
        path: Path,
        before_end: Callable[[], None] | None = None,
    ) -> None:
        job_id = self._name("job")
        self._execute(command, {**arguments, "job-id": job_id}, path)
        try:
            while (job := self._job(job_id))["status"] != "concluded":
                self._report(job, what)
                if job["status"] == "ready":
                    self._advance("job-complete", job_id)
                elif job["status"] == "pending":
                    if before_end is not None:
                        before_end()
                    self._advance("job-finalize", job_id)
                self._session.wait_event(POLL_S)
        except BaseException:
            # Never hides what went wrong first; a daemon that is gone has no job any more.
            with contextlib.suppress(errors.HvmgrError, qemu_errors.CommandRefused):
                self._cancel(job_id)
            raise
        self._session.execute("job-dismiss", {"id": job_id}, timeout_s=COMMAND_S)
        if words := job.get("error"):
            raise qemu_errors.translated(f"{what} failed: {words}", path)
        self._report(job, what)

    def _advance(self, command: str, job_id: str) -> None:
        # Refused when the job has left that state by itself, on an error: its own text tells more.
        with contextlib.suppress(qemu_errors.CommandRefused):
            self._session.execute(command, {"id": job_id}, timeout_s=COMMAND_S)

    def _cancel(self, job_id: str) -> None:
        self._advance("job-cancel", job_id)
        while self._job(job_id)["status"] != "concluded":
            self._session.wait_event(POLL_S)
        self._session.execute("job-dismiss", {"id": job_id}, timeout_s=COMMAND_S)

    def _job(self, job_id: str) -> dict[str, Any]:
        return next(job for job in self._query("query-jobs") if job["id"] == job_id)

    def _report(self, job: dict[str, Any], what: str) -> None:
        self._report_bytes(job["current-progress"], job["total-progress"], what)

    def _report_bytes(self, done: int, total: int, what: str) -> None:
        if self._on_progress is not None:
            self._on_progress(Progress(done, total, what))

    def _query(self, command: str, arguments: dict[str, object] | None = None) -> list[dict[str, Any]]:
        answer: list[dict[str, Any]] = self._session.execute(command, arguments, timeout_s=COMMAND_S)
        return answer

    def _execute(self, command: str, arguments: dict[str, object], path: Path) -> None:
        try:
            self._session.execute(command, arguments, timeout_s=COMMAND_S)
        except qemu_errors.CommandRefused as error:
            raise qemu_errors.translated(str(error), path) from error

    def _name(self, kind: str) -> str:
        return f"{kind}{next(self._numbers)}"
