"""Plans: the named steps of an operation, as values that a journal can store and ``--dry-run`` can print.

A plan has three parts. ``prepare`` makes new things only, so each of its steps can be undone. ``switch`` is the one act
that makes the new state the VM's present; afterwards anybody can tell whether it happened. ``finish`` steps may be run
again as often as needed. Before the switch a plan that was cut off is undone, after it the plan is completed. A plan
without a switch changes no guest-visible content and is completed from the start.

Steps hold strings, numbers and tuples of them, so that ``to_json`` and ``from_json`` are exact.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, ClassVar

from hvmgr.errors import Corrupt
from hvmgr.model.plan.domain import *
from hvmgr.model.plan.files import *
from hvmgr.model.plan.files import MakeHome, RemoveFile, RemoveFolder, RemoveHome, RemoveSnapshot
from hvmgr.model.plan.images import *
from hvmgr.model.plan.images import Flatten, RemoveImage
from hvmgr.model.plan.sources import *
from hvmgr.model.plan.sources import LeaveHome, TakeHome
from hvmgr.model.plan.step import Step as Step

JOURNAL_FORMAT = 1

_FREEING = (RemoveFile, RemoveFolder, RemoveHome, RemoveImage, RemoveSnapshot)


@dataclass(frozen=True, slots=True)
class Plan:
    """What an operation will do; ``subject`` says it to people, ``hold`` names images (path, format) to lock meanwhile."""

    plan_id: str
    vm_id: str
    operation: str
    subject: str
    prepare: tuple[Step, ...] = ()
    switch: Step | None = None
    finish: tuple[Step, ...] = ()
    hold: tuple[tuple[str, str], ...] = ()

    STEPS: ClassVar[dict[str, type[Step]]]

    def steps(self) -> tuple[Step, ...]:
        """All steps in order."""
        middle = () if self.switch is None else (self.switch,)
        return (*self.prepare, *middle, *self.finish)

    @property
    def makes_or_removes_home(self) -> bool:
        """Whether there is no VM before it, or none after it."""
        return any(isinstance(step, MakeHome | TakeHome | RemoveHome | LeaveHome) for step in self.steps())

    @property
    def only_frees(self) -> bool:
        """Whether it takes files away and changes nothing else: a deletion of snapshots or memory, a merge, or a whole VM's."""
        kinds = {type(step) for step in self.finish}
        changes = self.prepare or Flatten in kinds or (self.switch is not None and RemoveHome not in kinds)
        return not changes and not kinds.isdisjoint(_FREEING)

    def to_json(self) -> dict[str, Any]:
        """A JSON document that ``from_json`` turns into an equal plan."""
        return {
            "format": JOURNAL_FORMAT,
            "plan": self.plan_id,
            "vm": self.vm_id,
            "operation": self.operation,
            "subject": self.subject,
            "prepare": [_step_to_json(step) for step in self.prepare],
            "switch": None if self.switch is None else _step_to_json(self.switch),
            "finish": [_step_to_json(step) for step in self.finish],
            "hold": [list(pair) for pair in self.hold],
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Plan:
        """The plan of a journal; raises Corrupt for anything that ``to_json`` did not write."""
        try:
            if document["format"] != JOURNAL_FORMAT:
                raise Corrupt(f"the journal has format {document['format']}, this hvmgr reads {JOURNAL_FORMAT}")
            switch = document["switch"]
            plan = cls(
                plan_id=document["plan"],
                vm_id=document["vm"],
                operation=document["operation"],
                subject=document["subject"],
                prepare=tuple(_step_from_json(step) for step in document["prepare"]),
                switch=None if switch is None else _step_from_json(switch),
                finish=tuple(_step_from_json(step) for step in document["finish"]),
                hold=tuple((path, fmt) for path, fmt in document["hold"]),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise Corrupt(f"the journal holds no readable plan ({error})") from error
        if json.dumps(plan.to_json(), sort_keys=True) != json.dumps(document, sort_keys=True):
            raise Corrupt("the journal holds more than this hvmgr understands")
        return plan


def dumps(plan: Plan) -> str:
    """One line of JSON."""
    return json.dumps(plan.to_json(), separators=(",", ":"))


def _step_to_json(step: Step) -> dict[str, Any]:
    return {"step": type(step).__name__, **dataclasses.asdict(step)}


def _step_from_json(document: dict[str, Any]) -> Step:
    fields = {key: _frozen(value) for key, value in document.items() if key != "step"}
    return Plan.STEPS[document["step"]](**fields)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


Plan.STEPS = {cls.__name__: cls for cls in Step.__subclasses__()}
