"""Names that people type, and what they may have meant."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

from hvmgr.errors import NotFound, UsageError

_SHOWN = 5
_PREFIX = 8  # digits of an id that may stand for it


class Named(Protocol):
    """What people name: a snapshot."""

    @property
    def id(self) -> str:
        """Its own, of hexadecimal digits."""

    @property
    def name(self) -> str:
        """Which others may have as well."""


_Named = TypeVar("_Named", bound=Named)


def find_snapshot(reference: str, known: Iterable[_Named], *, where: str) -> _Named:
    """The snapshot with this exact name, this id, or an id with these first digits, 8 or more.

    UsageError where several are meant, NotFound, with near names, where none is.
    """
    all_of_them = list(known)
    for found in (
        [one for one in all_of_them if one.name == reference],
        [one for one in all_of_them if one.id == reference],
        [one for one in all_of_them if len(reference) >= _PREFIX and one.id.startswith(reference)],
    ):
        if len(found) > 1:
            are = f"are called '{reference}'" if found[0].name == reference else f"have ids that begin with {reference}"
            choices = ", ".join(one.id for one in found)
            raise UsageError(f"{len(found)} snapshots {are}", hint=f"name one by id: {choices}")
        if found:
            return found[0]
    raise not_found("snapshot", reference, [one.name for one in all_of_them], where=where)


def not_found(
    kind: str, name: str, known: Iterable[str], *, where: str, others: str | None = None, none: str | None = None
) -> NotFound:
    """The error for a name that is not there, with near names when there are some, else with the first of all.

    ``others`` then says how to come by another one, and ``none`` what to do where there is none at all.
    """
    import difflib

    all_of_them = list(dict.fromkeys(known))
    near = difflib.get_close_matches(name, all_of_them, n=3, cutoff=0.5)
    hint = none
    if near:
        hint = "did you mean " + " or ".join(f"'{one}'" for one in near) + "?"
    elif all_of_them:
        more = len(all_of_them) - _SHOWN
        listed = ", ".join(f"'{one}'" for one in all_of_them[:_SHOWN])
        hint = f"known: {listed}" + (f" and {more} more" if more > 0 else "") + (f"; {others}" if others else "")
    return NotFound(f"there is no {kind} '{name}' {where}", hint=hint, name=name)
