"""What the journal stores comes back as it was, and every step can say what it does."""

from __future__ import annotations

import json
import typing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvmgr.errors import Corrupt
from hvmgr.model import export_plan, image_plan, memory_plan
from hvmgr.model import plan as plans
from hvmgr.model.plan import CreateImage, Plan, RemoveImage, Step

STEP_CLASSES = sorted(Plan.STEPS.values(), key=lambda cls: cls.__name__)
texts = st.text(max_size=8)
paths = st.sampled_from(["/vm/Snapshots/x/vda_1.qcow2", "/a:b/ü\n\u2028.qcow2", "relative", ""])
st.register_type_strategy(str, texts | paths)


def steps_of(cls: type[Step]) -> st.SearchStrategy[Step]:
    """Steps of one class; every field is drawn, also those that have a default one day."""
    kinds = typing.get_type_hints(cls)
    return st.builds(cls, **{name: st.from_type(kind) for name, kind in kinds.items()})


steps = st.one_of([steps_of(cls) for cls in STEP_CLASSES])
whole_plans = st.builds(
    Plan,
    prepare=st.lists(steps, max_size=4).map(tuple),
    switch=st.none() | steps,
    finish=st.lists(steps, max_size=4).map(tuple),
    hold=st.lists(st.tuples(paths, texts), max_size=2).map(tuple),
)


def a_plan(*prepare: Step, switch: Step | None = None) -> Plan:
    return Plan("p1", "v1", "create", "snapshot a of web", prepare=prepare, switch=switch)


def a_document() -> Any:
    return json.loads(plans.dumps(a_plan(CreateImage("/i/1", 4096, "/i/0", "raw"))))


@pytest.mark.parametrize("cls", STEP_CLASSES, ids=lambda cls: cls.__name__)
@given(data=st.data())
@settings(max_examples=25, derandomize=True, database=None)
def test_each_step_comes_back_from_the_journal(cls: type[Step], data: st.DataObject) -> None:
    step = data.draw(steps_of(cls))
    back = Plan.from_json(json.loads(plans.dumps(a_plan(step, switch=step))))
    assert back == a_plan(step, switch=step)
    assert type(back.prepare[0]) is cls
    assert hash(back.prepare[0]) == hash(step)
    assert step.describe().strip()


@given(plan=whole_plans)
@settings(max_examples=100, derandomize=True, database=None)
def test_each_plan_comes_back_from_the_journal(plan: Plan) -> None:
    line = plans.dumps(plan)
    assert "\n" not in line
    assert Plan.from_json(json.loads(line)) == plan
    assert Plan.from_json(plan.to_json()) == plan


def test_every_step_of_the_module_can_be_stored() -> None:
    modules = (plans, export_plan, image_plan, memory_plan)
    known = [one for module in modules for one in vars(module).values()]
    named = {one for one in known if isinstance(one, type) and issubclass(one, Step) and one is not Step}
    assert set(Plan.STEPS.values()) == named
    assert all(Plan.STEPS[one.__name__] is one for one in named)


def test_the_steps_of_a_plan_are_in_their_order() -> None:
    first, second, third = (RemoveImage(path) for path in "abc")
    whole = Plan("p", "v", "o", "s", prepare=(first,), switch=second, finish=(third,))
    assert whole.steps() == (first, second, third)
    assert Plan("p", "v", "o", "s", finish=(third,)).steps() == (third,)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"format": None},
        {"prepare": [{"step": "FormatHost"}]},
        {"prepare": [{"step": "Step"}]},
        {"prepare": [{"step": ["CreateImage"]}]},
        {"prepare": [{"path": "/i/1"}]},
        {"prepare": [{"step": "RemoveImage"}]},
        {"prepare": [{"step": "RemoveImage", "path": "/i/1", "force": True}]},
        {"prepare": ["RemoveImage"]},
        {"prepare": None},
        {"prepare": {}},
        {"finish": 3},
        {"switch": "Define"},
        {"switch": {}},
        {"hold": [["/i/1"]]},
        {"hold": ["ab"]},
        {"later": "word"},
    ],
    ids=str,
)
def test_a_journal_that_is_not_ours_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(Corrupt):
        Plan.from_json({**a_document(), **change})


@pytest.mark.parametrize("key", sorted(a_document()))
def test_a_journal_with_a_missing_part_is_refused(key: str) -> None:
    document = a_document()
    del document[key]
    with pytest.raises(Corrupt):
        Plan.from_json(document)


@pytest.mark.parametrize("document", [None, [], "text", 5])
def test_a_document_that_is_no_object_is_refused(document: Any) -> None:
    with pytest.raises(Corrupt):
        Plan.from_json(document)
