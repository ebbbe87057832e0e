"""The journal of one home: which plan is open, and whether its switch was reached.

| file                     | what is true                                  | the next command                          |
|--------------------------|-----------------------------------------------|-------------------------------------------|
| absent                   | no operation is open                          | goes on                                   |
| plan                     | only new things were made                     | undoes them                               |
| plan, ``switch`` line    | the switch was about to happen or happened    | looks, then undoes or completes           |
| plan without a switch    | steps that may be repeated are under way      | completes it                              |

Anywhere behind the plan, a line ``start`` names a start of the VM that the operation makes itself, for the start guard;
``started`` takes it back.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors
from hvmgr.storage import durable

if TYPE_CHECKING:
    from hvmgr.model.plan import Plan  # readers of homes ask whether a journal is open, and do without

_SWITCH = b"switch"
_START = b"start "
_STARTED = b"started"


@dataclass(frozen=True, slots=True)
class Start:
    """A start of the VM that a command makes: its process id, and the images that the VM is going to write."""

    process: int
    images: frozenset[str]


@dataclass(frozen=True, slots=True)
class Entry:
    """An open operation; ``start`` is one that it is about to make, or was when it died."""

    plan: Plan
    switch_reached: bool
    start: Start | None = None


def beside(image: Path) -> Path:
    """Where the journal of a change of this image file lies, which belongs to no home."""
    return image.with_name(f".{image.name}.hvmgr-change")


def is_open(path: Path) -> bool:
    """Whether a plan is open; costs one look."""
    return os.path.exists(path)  # noqa: PTH110 - False also for a name that is too long for this file system


def read(path: Path, *, obeyed: bool = True) -> Entry | None:
    """The open operation, if there is one; raises Corrupt when the journal cannot be understood, Conflict for a stranger's.

    Unless ``obeyed``, nobody does what stands in it: then it may be anybody's, as root's is on a share that maps root.
    """
    data = _read_own(path, obeyed=obeyed)
    if data is None:
        return None
    from hvmgr.model import memory_plan  # noqa: F401 - its steps are known then
    from hvmgr.model.plan import Plan

    first, _, rest = data.partition(b"\n")
    try:
        document = json.loads(first)
    except ValueError as error:
        raise errors.Corrupt(f"the journal {path} is damaged: {error}", path=str(path)) from error
    lines = rest.split(b"\n")[:-1]  # a last line that was cut off says nothing
    return Entry(plan=Plan.from_json(document), switch_reached=_SWITCH in lines, start=_last_start(lines))


def _read_own(path: Path, *, obeyed: bool) -> bytes | None:
    """Whoever else could write a journal would have any file of the host written."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise _foreign(path) from error
    with os.fdopen(descriptor, "rb") as file:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode) or (obeyed and facts.st_uid not in {0, os.geteuid()}):
            raise _foreign(path)
        return file.read()


def _foreign(path: Path) -> errors.Conflict:
    return errors.Conflict(
        f"{path} was written neither by this user nor by root, and is not followed",
        hint="let its owner finish what he began, or remove it",
        path=str(path),
    )


def begin(path: Path, plan: Plan, *, alone: bool = False) -> None:
    """The intention is on disk; ``alone`` as in ``durable.write_file``."""
    from hvmgr.model import plan as plans

    durable.write_file(path, plans.dumps(plan).encode() + b"\n", alone=alone)


def reach_switch(path: Path) -> None:
    """It is on disk that the switch comes next."""
    durable.append(path, _SWITCH + b"\n")


@contextlib.contextmanager
def start_named(path: Path, written: Iterable[str]) -> Iterator[None]:
    """What is done in here may start the VM on these images, and on no others; nobody else may meanwhile."""
    words = json.dumps({"process": os.getpid(), "images": sorted(written)}).encode()
    durable.append(path, _START + words + b"\n")
    try:
        yield
    finally:
        take_back_start(path)


def take_back_start(path: Path) -> None:
    """No start is named any more; where a death cut a line off, this one stands on its own all the same."""
    durable.append(path, b"\n" + _STARTED + b"\n")


def _last_start(lines: list[bytes]) -> Start | None:
    for line in reversed(lines):
        if line == _STARTED:
            return None
        if line.startswith(_START):
            try:
                facts = json.loads(line.removeprefix(_START))
                return Start(process=int(facts["process"]), images=frozenset(facts["images"]))
            except (ValueError, KeyError, TypeError):
                return None
    return None


def end(path: Path) -> None:
    """The operation is over."""
    durable.remove(path)
