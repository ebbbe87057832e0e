"""How a snapshot is named: by exact name, then by id, then by the first digits of one."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from hvmgr import errors
from hvmgr.model import names


@dataclass
class One:
    id: str
    name: str


FIRST, SECOND = "11111111-aaaa-4aaa-8aaa-aaaaaaaaaaaa", "11111111-bbbb-4bbb-8bbb-bbbbbbbbbbbb"


def find(reference, *known):
    return names.find_snapshot(reference, [One(*one) for one in known], where="in web").id


@pytest.mark.parametrize(
    ("reference", "expected"),
    [("a", FIRST), ("b", SECOND), (FIRST, FIRST), ("11111111-a", FIRST), ("11111111-bbbb", SECOND)],
)
def test_name_id_and_first_digits(reference, expected):
    assert find(reference, (FIRST, "a"), (SECOND, "b")) == expected


def test_name_comes_before_id_and_id_before_digits():
    assert find(FIRST, (FIRST, "a"), (SECOND, FIRST)) == SECOND
    assert find("11111111", ("11111111", "a"), (SECOND, "b")) == "11111111"


def test_several_are_never_guessed():
    with pytest.raises(errors.UsageError, match="2 snapshots are called 'a'") as called:
        find("a", (FIRST, "a"), (SECOND, "a"))
    assert called.value.hint == f"name one by id: {FIRST}, {SECOND}"
    with pytest.raises(errors.UsageError, match="2 snapshots have ids that begin with 11111111"):
        find("11111111", (FIRST, "a"), (SECOND, "b"))


def test_too_few_digits_and_wrong_names_are_not_found():
    with pytest.raises(errors.NotFound, match="there is no snapshot '1111111' in web"):
        find("1111111", (FIRST, "a"))
    with pytest.raises(errors.NotFound) as missing:
        find("befor", (FIRST, "before"))
    assert missing.value.hint == "did you mean 'before'?"
