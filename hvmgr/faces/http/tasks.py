"""Tasks: what a client follows its transfers and calls by. Each one that is begun ends, as a success, failed or cancelled.

| from | to | by |
|---|---|---|
| pending | success, failure | whoever works for it, or a client that works for itself (``set_status``) |
| pending | cancelled | a client, while nobody works for it |
| pending | cancelling | a client, while somebody does: the work stops soon |
| cancelling | cancelled, success, failure | whoever works for it |

The rest never changes, and goes after a while.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from hvmgr.faces.http import notes
from hvmgr.faces.http.events import Events
from hvmgr.faces.http.failure import XenFailure
from hvmgr.faces.http.sessions import NULL, REF, new_ref

FINISHED_S = 65 * 60.0
PENDING_S = 24 * 3600.0
_MOST = 2_000  # of one user
_STEP = 0.01  # progress in smaller steps is no event
_NEVER = datetime(1970, 1, 1, tzinfo=UTC)


class Status(StrEnum):
    """Where a task is."""

    PENDING = "pending"
    SUCCESS = "success"
    FAILURE = "failure"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


@dataclass(slots=True)
class Task:
    """One task; only ``Tasks`` changes it."""

    ref: str
    owner: str
    label: str
    description: str
    created: datetime
    touched: float
    status: Status = Status.PENDING
    progress: float = 0.0
    result: str = ""
    error: tuple[str, ...] = ()
    finished: datetime = _NEVER
    other_config: dict[str, str] = field(default_factory=dict)
    working: bool = False  # somebody works for it now
    stop: Callable[[], None] | None = None  # wakes whoever works
    told: float = 0.0  # the progress of the last event

    @property
    def is_open(self) -> bool:
        """Whether it can still change."""
        return self.status in {Status.PENDING, Status.CANCELLING}


class Tasks:
    """The tasks by their references."""

    def __init__(self, events: Events, host_ref: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._events = events
        self._host_ref = host_ref
        self._clock = clock
        self._lock = threading.RLock()
        self._known: dict[str, Task] = {}

    def create(self, owner: str, label: str, description: str = "") -> str:
        """A new pending task of this user."""
        with self._lock:
            self._sweep()
            self._make_room(owner)
            task = Task(new_ref(), owner, label, description, datetime.now(UTC), self._clock())
            self._known[task.ref] = task
            self._tell(task, "add")
        return task.ref

    def destroy(self, ref: str, owner: str) -> None:
        """The task is gone; whoever works for it does not notice."""
        with self._lock:
            task = self._own(ref, owner)
            if task.working:
                self._stop(task)
            self._forget(task)

    def cancel(self, ref: str, owner: str | None) -> None:
        """The task is cancelled, or will be when whoever works for it has stopped; a finished one stays as it is.

        Without ``owner`` anybody's, for an administrator: a transfer that never ends keeps a VM from being started.
        """
        with self._lock:
            task = self._own(ref, owner)
            if task.status is Status.PENDING and task.working:
                self._stop(task)
                self._tell(task)
            elif task.status is Status.PENDING:
                self._settle(task, Status.CANCELLED, error=("TASK_CANCELLED", ref))

    def set_status(self, ref: str, owner: str, status: str) -> None:
        """A client says how its own work went."""
        with self._lock:
            task = self._own(ref, owner)
            if task.working:
                raise XenFailure("OPERATION_NOT_ALLOWED", "a transfer works for this task and ends it itself")
            if status not in {Status.SUCCESS, Status.FAILURE, Status.CANCELLED, Status.PENDING}:
                raise XenFailure("INVALID_VALUE", "status", status[:40])
            if task.is_open and status != Status.PENDING:
                self._settle(task, Status(status), progress=1.0 if status == Status.SUCCESS else task.progress)

    def set_progress(self, ref: str, owner: str, progress: float) -> None:
        """A client says how far it is."""
        with self._lock:
            task = self._own(ref, owner)
            if task.is_open:
                task.progress = min(max(progress, 0.0), 1.0)
                task.touched = self._clock()
                self._tell(task)

    def set_other_config(self, ref: str, owner: str, key: str, value: str | None) -> None:
        """A client notes something, or takes it away (None)."""
        with self._lock:
            task = self._own(ref, owner)
            if value is None:
                task.other_config.pop(key, None)
            else:
                notes.put(task.other_config, key, value, kind="task", name=ref)
            self._tell(task)

    # -- whoever works for a task --------------------------------------------------------------------------------

    def take(self, ref: str, owner: str, stop: Callable[[], None] | None = None) -> None:
        """Somebody works for this task from now on; only for a pending one of the same user, and one at a time.

        ``stop`` is called when the task is to be cancelled: it wakes whoever works, and does nothing else.
        """
        with self._lock:
            task = self._own(ref, owner)
            if task.working or task.status is not Status.PENDING:
                what = "has its transfer already" if task.working else f"is not pending but {task.status}"
                raise XenFailure("OPERATION_NOT_ALLOWED", f"the task {ref} {what}")
            task.working, task.stop = True, stop
            task.touched = self._clock()

    def report(self, ref: str, done: int, total: int) -> None:
        """How far the work is."""
        with self._lock:
            task = self._known.get(ref)
            if task is None or not task.is_open or total <= 0:
                return
            task.progress = min(done / total, 0.99)
            task.touched = self._clock()
            if task.progress - task.told >= _STEP:
                self._tell(task)

    def is_cancelled(self, ref: str) -> bool:
        """Whether the work has to stop: the task is to be cancelled, or was destroyed."""
        task = self._known.get(ref)
        return task is None or task.status is not Status.PENDING

    def succeed(self, ref: str, result: str = "") -> None:
        """The work is done."""
        with self._lock:
            if (task := self._known.get(ref)) is not None and task.is_open:
                self._settle(task, Status.SUCCESS, result=result, progress=1.0)

    def fail(self, ref: str, failure: XenFailure) -> None:
        """The work failed, or was stopped as somebody wished."""
        with self._lock:
            task = self._known.get(ref)
            if task is None or not task.is_open:
                return
            is_wish = task.status is Status.CANCELLING and failure.code == "TASK_CANCELLED"
            error = ("TASK_CANCELLED", ref) if is_wish else tuple(failure.description)
            self._settle(task, Status.CANCELLED if is_wish else Status.FAILURE, error=error)

    # -- looking -------------------------------------------------------------------------------------------------

    def record(self, ref: str) -> dict[str, Any]:
        """A task as clients see it."""
        with self._lock:
            return self._record(self._find(ref))

    def records(self) -> dict[str, dict[str, Any]]:
        """All tasks."""
        with self._lock:
            self._sweep()
            return {ref: self._record(task) for ref, task in self._known.items()}

    def find_by_uuid(self, uuid: str) -> str:
        """The reference of a task."""
        if REF + uuid not in self._known:
            raise XenFailure("UUID_INVALID", "task", uuid[:64])
        return REF + uuid

    def _record(self, task: Task) -> dict[str, Any]:
        return {
            "uuid": task.ref.removeprefix(REF),
            "name_label": task.label,
            "name_description": task.description,
            "status": task.status.value,
            "progress": task.progress,
            "type": "<none/>",
            "result": task.result,
            "error_info": list(task.error),
            "created": task.created,
            "finished": task.finished,
            "other_config": dict(task.other_config),
            "resident_on": self._host_ref,
            "subtask_of": NULL,
            "subtasks": [],
            "backtrace": "()",
            "allowed_operations": ["cancel", "destroy"] if task.is_open else ["destroy"],
            "current_operations": {},
        }

    def _find(self, ref: str) -> Task:
        if (task := self._known.get(ref)) is None:
            raise XenFailure("HANDLE_INVALID", "task", ref[:64])
        return task

    def _own(self, ref: str, owner: str | None) -> Task:
        task = self._find(ref)
        if owner not in {None, task.owner}:
            raise XenFailure("RBAC_PERMISSION_DENIED", "task", f"the task {ref} belongs to another user")
        return task

    def _settle(
        self,
        task: Task,
        status: Status,
        *,
        result: str = "",
        error: tuple[str, ...] = (),
        progress: float | None = None,
    ) -> None:
        task.status, task.result, task.error = status, result, error
        task.progress = task.progress if progress is None else progress
        task.finished, task.touched, task.working = datetime.now(UTC), self._clock(), False
        task.stop = None
        self._tell(task)

    def _stop(self, task: Task) -> None:
        task.status = Status.CANCELLING
        if task.stop is not None:
            task.stop()

    def _tell(self, task: Task, operation: str = "mod") -> None:
        task.told = task.progress
        self._events.note("task", operation, task.ref, self._record(task))

    def _make_room(self, owner: str) -> None:
        """The oldest finished task of a user goes when there are too many."""
        own = [task for task in self._known.values() if task.owner == owner]
        if len(own) < _MOST:
            return
        finished = [task for task in own if not task.is_open]
        if not finished:
            raise XenFailure("OUT_OF_SPACE", f"{owner} has {len(own)} tasks that are not finished; destroy some")
        self._forget(min(finished, key=lambda task: task.touched))

    def _forget(self, task: Task) -> None:
        del self._known[task.ref]
        self._events.note("task", "del", task.ref, None)

    def _sweep(self) -> None:
        now = self._clock()
        for task in list(self._known.values()):
            if not task.working and now - task.touched > (PENDING_S if task.is_open else FINISHED_S):
                self._forget(task)
