"""The journal of one home: which plan is open, and whether its switch was reached.

| file                     | what is true                                  | the next command                          |
|--------------------------|-----------------------------------------------|-------------------------------------------|
| absent                   | no operation is open                          | goes on                                   |
| plan                     | only new things were made                     | undoes them                               |
| plan, ``switch`` line    | the switch was about to happen or happened    | looks, then undoes or completes           |
| plan without a switch    | steps that may be repeated are under way      | completes it                              |
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hvmgr import errors
from hvmgr.storage import durable

if TYPE_CHECKING:
    from hvmgr.model.plan import Plan  # readers of homes ask whether a journal is open, and do without

_SWITCH = b"switch\n"


@dataclass(frozen=True, slots=True)
class Entry:
    """An open operation."""

    plan: Plan
    switch_reached: bool


def is_open(path: Path) -> bool:
    """Whether a plan is open; costs one look."""
    return path.exists()


def read(path: Path) -> Entry | None:
    """The open operation, if there is one; raises Corrupt when the journal cannot be understood."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    from hvmgr.model.plan import Plan

    first, _, rest = data.partition(b"\n")
    try:
        document = json.loads(first)
    except ValueError as error:
        raise errors.Corrupt(f"the journal {path} is damaged: {error}", path=str(path)) from error
    return Entry(plan=Plan.from_json(document), switch_reached=rest.startswith(_SWITCH))


def begin(path: Path, plan: Plan) -> None:
    """The intention is on disk."""
    from hvmgr.model import plan as plans

    durable.write_file(path, plans.dumps(plan).encode() + b"\n")


def reach_switch(path: Path) -> None:
    """It is on disk that the switch comes next."""
    durable.append(path, _SWITCH)


def end(path: Path) -> None:
    """The operation is over."""
    durable.remove(path)
