from __future__ import annotations

from enum import StrEnum

import pytest

from hvmgr import errors, yaml_text


class Colour(StrEnum):
    RED = "red"
    GREEN = "green"


def parse(text: str) -> yaml_text.Value:
    return yaml_text.parse(text, source="a.yaml")


def field(text: str) -> yaml_text.Value:
    return parse(f"first: 1\nkey: {text}").fields(optional=["first", "key"])["key"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "a.yaml is empty"),
        ("a: [1", "a.yaml, line 1: "),
        ("a: 1\n\tb: 2", "a.yaml, line 2: "),
        ("a: \x00", "a.yaml: "),
        ("a: 1\nb: !!python/object:os.system x", "a.yaml, line 2: tags are not allowed"),
        ("a: !!str 1", "line 1: tags are not allowed"),
        ("a: &x 1\nb: *x", "line 1: anchors and aliases are not allowed"),
        ("a: &x [*x]", "anchors and aliases"),
        ("a: 1\n---\nb: 2", "line 2: "),
        ("a: " + "[" * 30_000, "lists in lists"),
    ],
    ids=["empty", "open list", "tab", "nul", "object", "tag", "alias", "loop", "two documents", "depth"],
)
def test_what_is_not_plain_yaml_is_refused(text, words):
    with pytest.raises(errors.UsageError) as caught:
        parse(text)
    assert words in str(caught.value)


def test_number_that_python_reads_no_more():
    with pytest.raises(errors.UsageError):
        field("9" * 5000).integer(minimum=1)


@pytest.mark.parametrize("text", ["no", "007", "52:54:00:12:34:56", "2026-01-01", "1e3", "'a b'"])
def test_text_is_what_is_written(text):
    assert field(text).text() == text.strip("'")


def test_values_are_read_by_type():
    assert field("7").integer(minimum=7) == 7
    assert field("1.5G").size() == 3 << 29
    assert field("Yes").boolean() is True
    assert field("off").boolean() is False
    assert field("red").choice(Colour) is Colour.RED
    assert [item.text() for item in field("[a, b]").items()] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "read", "words"),
    [
        ("[1]", lambda value: value.text(), "a.yaml, line 2, key: a single value"),
        ("6", lambda value: value.integer(minimum=7), "line 2, key: '6' is not a whole number of at least 7"),
        ("1.5", lambda value: value.integer(minimum=0), "line 2, key: '1.5' is not"),
        ("big", lambda value: value.size(), "line 2, key: 'big' is not a size"),
        ("maybe", lambda value: value.boolean(), "line 2, key: 'maybe' is neither"),
        ("gren", lambda value: value.choice(Colour), "line 2, key: 'gren' is unknown"),
        ("x", lambda value: value.items(), "line 2, key: a list"),
        ("x", lambda value: value.fields(), "line 2, key: lines of the form"),
        ("\n- x\n- [y]", lambda value: value.items()[1].text(), "line 4, key\\[2\\]: a single value"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(text, read, words):
    with pytest.raises(errors.UsageError, match=words) as caught:
        read(field(text))
    assert caught.value.facts["file"] == "a.yaml"


@pytest.mark.parametrize(
    ("text", "words", "hint"),
    [
        ("nme: x", "line 1: unknown key 'nme'", "did you mean 'name'?"),
        ("zzz: x", "line 1: unknown key 'zzz'", "known: name, size"),
        ("name: x\nname: y", "line 2: 'name' is there twice, first in line 1", None),
        ("size: 1", "line 1: 'name' is missing", None),
        ("name:", "line 1: 'name' is missing", None),
    ],
    ids=["near", "unknown", "twice", "missing", "empty"],
)
def test_keys_are_checked(text, words, hint):
    with pytest.raises(errors.UsageError, match=words) as caught:
        parse(text).fields(required=["name"], optional=["size"])
    assert caught.value.hint == hint


def test_empty_values_count_as_absent():
    assert list(parse("name: x\nsize: ~").fields(required=["name"], optional=["size"])) == ["name"]
