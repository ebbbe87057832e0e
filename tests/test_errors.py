"""The error classes: drawn in the head of errors.py, documented, with the exit codes of the contract."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hvmgr import errors
from hvmgr.errors import HvmgrError
from hvmgr.faces import cli

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PACKAGE = Path(errors.__file__).parent
OTHERS = sorted(set(PACKAGE.rglob("*.py")) - {Path(errors.__file__)})

# The contract of the command line; a subclass shares the code of the class that it refines.
EXIT_CODES = {
    "UsageError": 2,
    "NotFound": 3,
    "Conflict": 4,
    "Unsupported": 5,
    "Corrupt": 6,
    "NoSpace": 7,
    "HostFailed": 8,
    "OutcomeUnknown": 9,
    "Cancelled": 130,
}

# Each face that turns errors into answers names its map here: a function from the class to its answer.
FACE_MAPS: dict[str, Callable[[type[HvmgrError]], int]] = {
    "cli": cli.exit_code,
}


def every_class(parent: type[HvmgrError] = HvmgrError) -> Iterator[type[HvmgrError]]:
    for child in parent.__subclasses__():
        yield child
        yield from every_class(child)


CLASSES = sorted(set(every_class()), key=lambda kind: kind.__name__)


def drawn_tree() -> dict[str, tuple[str, int]]:
    """Name -> (parent, code) as the head of errors.py draws it."""
    tree, path = {}, ["HvmgrError"]
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r"    ((?:│   |    )*)[├└]── (\w+) +(\d+) ", line):
            depth = len(match[1]) // 4 + 1
            path[depth:] = [match[2]]
            tree[match[2]] = (path[depth - 1], int(match[3]))
    return tree


def test_head_draws_exactly_the_classes_there_are() -> None:
    assert drawn_tree() == {kind.__name__: (kind.__mro__[1].__name__, kind.exit_code) for kind in CLASSES}


def test_exit_codes_are_those_of_the_contract() -> None:
    first_level = {kind.__name__: kind.exit_code for kind in HvmgrError.__subclasses__()}
    assert first_level == EXIT_CODES


def test_no_exit_code_is_used_twice() -> None:
    assert len(set(EXIT_CODES.values())) == len(EXIT_CODES)


@pytest.mark.parametrize("kind", CLASSES)
class TestEachClass:
    def test_shares_the_code_of_what_it_refines(self, kind: type[HvmgrError]) -> None:
        parent = kind.__mro__[1]
        assert parent is HvmgrError or kind.exit_code == parent.exit_code

    def test_says_what_it_means(self, kind: type[HvmgrError]) -> None:
        assert inspect.cleandoc(kind.__doc__ or "").endswith(".")
        assert kind.__doc__ != kind.__mro__[1].__doc__

    def test_lives_in_errors(self, kind: type[HvmgrError]) -> None:
        assert kind.__module__ == "hvmgr.errors"

    def test_is_mapped_in_every_face(self, kind: type[HvmgrError]) -> None:
        for face, answer in FACE_MAPS.items():
            assert answer(kind) > 1, face

    def test_carries_message_hint_and_facts(self, kind: type[HvmgrError]) -> None:
        error = kind("web has no disk vdb", hint="hvmgr disk list web", vm="web", slot="vdb")
        assert (str(error), error.hint, error.facts) == (
            "web has no disk vdb",
            "hvmgr disk list web",
            {"vm": "web", "slot": "vdb"},
        )
        assert error.code == kind.__name__


def test_hint_is_optional() -> None:
    assert errors.NotFound("no VM is named web").hint is None


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_other_module_has_public_errors(path: Path) -> None:
    """A keeper in host may have exceptions of its own, as long as they are no errors of ours: it translates them.

    So may the HTTP face, in one place: what ends a request there is a value of HTTP or of the Xen API.
    """
    of_http = path.relative_to(PACKAGE) == Path("faces/http/failure.py")
    foreseen = {kind.__name__ for kind in CLASSES} | {"HvmgrError"}
    classes = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.ClassDef)]
    for node in classes:
        bases = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
        assert not bases & foreseen, node.name
        if path.relative_to(PACKAGE).parts[0] != "host" and not of_http and not node.name.startswith("_"):
            assert not [base for base in bases if base.endswith(("Exception", "Error"))], node.name
