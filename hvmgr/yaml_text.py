"""YAML that people write, read with the place of each value, so that every error names file, line and key.

Only plain YAML: no tags, anchors or aliases, no key twice. Scalars are taken as they are written, so that ``no`` is a
fine name and ``52:54:00:12:34:56`` never the number that YAML 1.1 sees in it.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

import yaml

from hvmgr import errors, units

_DIGITS_MAX = 4000  # Python reads no more
_NULL = "tag:yaml.org,2002:null"
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}

E = TypeVar("E", bound=StrEnum)


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "anchor", None) is not None:
            raise yaml.composer.ComposerError(None, None, "anchors and aliases are not allowed", event.start_mark)
        if getattr(event, "tag", None) is not None:
            raise yaml.composer.ComposerError(None, None, "tags are not allowed", event.start_mark)
        return super().compose_node(parent, index)


@dataclass(frozen=True, slots=True)
class Value:
    """One value: where it stands, under which key (``disks[1].size``), and checked readings of it."""

    node: yaml.Node
    source: str
    key: str

    @property
    def line(self) -> int:
        """The line in the file, from 1."""
        return int(self.node.start_mark.line) + 1

    @property
    def is_null(self) -> bool:
        """Whether nothing, ``~`` or ``null`` is written."""
        return self.node.tag == _NULL

    @property
    def is_scalar(self) -> bool:
        """Whether it is a single value."""
        return isinstance(self.node, yaml.ScalarNode) and not self.is_null

    def error(self, message: str, hint: str | None = None) -> errors.UsageError:
        """The request is wrong at this place."""
        place = f"{self.source}, line {self.line}"
        what = f"{place}, {self.key}: {message}" if self.key else f"{place}: {message}"
        return errors.UsageError(what, hint=hint, file=self.source, line=self.line, key=self.key)

    def text(self) -> str:
        """A scalar as it is written, without its quotes."""
        if not self.is_scalar:
            raise self.error("a single value is expected")
        return str(self.node.value)

    def integer(self, *, minimum: int) -> int:
        """A whole number."""
        text = self.text()
        if not text.isdecimal() or len(text) > _DIGITS_MAX or int(text) < minimum:
            raise self.error(f"'{text}' is not a whole number of at least {minimum}")
        return int(text)

    def size(self) -> int:
        """Bytes, from a number with a unit."""
        try:
            return units.parse_size(self.text())
        except errors.UsageError as error:
            raise self.error(error.message, error.hint) from error

    def boolean(self) -> bool:
        """Yes or no, in YAML's spellings."""
        value = _BOOLEANS.get(self.text().lower())
        if value is None:
            raise self.error(f"'{self.text()}' is neither yes nor no")
        return value

    def choice(self, kind: type[E]) -> E:
        """A word of a closed set."""
        text = self.text()
        if text not in list(kind):
            raise self.error(f"'{text}' is unknown", _suggest(text, list(kind)))
        return kind(text)

    def items(self) -> list[Value]:
        """The entries of a list."""
        if not isinstance(self.node, yaml.SequenceNode):
            raise self.error("a list is expected", "begin each entry with '- '")
        return [Value(node, self.source, f"{self.key}[{i}]") for i, node in enumerate(self.node.value, 1)]

    def fields(self, *, required: Collection[str] = (), optional: Collection[str] = ()) -> dict[str, Value]:
        """The entries of a mapping that are not empty; unknown, repeated and missing keys are errors."""
        if not isinstance(self.node, yaml.MappingNode):
            raise self.error("lines of the form 'key: value' are expected")
        known, found = [*required, *optional], dict[str, Value]()
        for key_node, node in self.node.value:
            key = Value(key_node, self.source, self.key)
            name = key.text()
            if name not in known:
                raise key.error(f"unknown key '{name}'", _suggest(name, known))
            if name in found:
                raise key.error(f"'{name}' is there twice, first in line {found[name].line}")
            found[name] = Value(node, self.source, f"{self.key}.{name}" if self.key else name)
        if missing := [name for name in required if name not in found or found[name].is_null]:
            raise self.error(f"'{missing[0]}' is missing")
        return {name: value for name, value in found.items() if not value.is_null}


def parse(text: str, *, source: str) -> Value:
    """The document's value; UsageError with the line when it is not YAML or uses more than plain YAML."""
    try:
        node = _compose_fast(text) or yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = 1 if mark is None else mark.line + 1
        raise errors.UsageError(f"{source}, line {line}: {error.problem}", file=source, line=line) from error
    except RecursionError as error:
        raise errors.UsageError(
            f"{source}: lists in lists in lists, deeper than anybody writes", file=source
        ) from error
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise errors.UsageError(f"{source}: {error}", file=source) from error
    if node is None:
        raise errors.UsageError(f"{source} is empty", file=source)
    return Value(node, source, "")


def _compose_fast(text: str) -> yaml.Node | None:
    """The document as libyaml reads it, in a tenth of the time; None where the other loader has to say what is wrong."""
    loader = getattr(yaml, "CSafeLoader", None)
    if loader is None:
        return None
    try:
        if any(getattr(event, "anchor", None) or getattr(event, "tag", None) for event in yaml.parse(text, loader)):
            return None
        return yaml.compose(text, Loader=loader)
    except (yaml.YAMLError, UnicodeError):
        return None


def _suggest(word: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
