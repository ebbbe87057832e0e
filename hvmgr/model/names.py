"""Names that people type, and what they may have meant."""

from __future__ import annotations

from collections.abc import Iterable

from hvmgr.errors import NotFound

_SHOWN = 5


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
