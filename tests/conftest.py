"""What every test may count on: nothing of this machine is touched, and a missing program is never silent."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_numbers = itertools.count()


def is_complete_run() -> bool:
    """Whether everything that tests need has to be there: in continuous integration and under ``.ci/run``."""
    return os.environ.get("HVMGR_REQUIRE_ALL", "0") == "1" or os.environ.get("CI") == "true"


@pytest.fixture(scope="session")
def require() -> Callable[[bool, str], None]:
    """``require(condition, reason)``: skips with the reason at a desk, fails in a complete run."""

    def check(condition: bool, reason: str) -> None:
        if condition:
            return
        if is_complete_run():
            pytest.fail(f"{reason} (a complete run skips nothing)", pytrace=False)
        pytest.skip(reason)

    return check


@pytest.fixture(scope="session")
def require_program(require: Callable[[bool, str], None]) -> Callable[[str], Path]:
    """``require_program(name)``: the path of a program in PATH or sbin; without it as ``require``."""

    def find(name: str) -> Path:
        found = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
        require(found is not None, f"the program {name} is missing: make setup installs it")
        return Path(str(found))

    return find


@pytest.fixture(scope="session")
def _own_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hvmgr")


@pytest.fixture(autouse=True)
def _own_settings(_own_place: Path) -> Iterator[None]:
    """Each test has a root and a host-wide index of its own (not made yet), never those of the machine."""
    number = next(_numbers)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HVMGR_ROOT", str(_own_place / f"root{number}"))
        environment.setenv("HVMGR_INDEX", str(_own_place / f"index{number}"))
        yield
