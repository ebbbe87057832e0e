"""Names that people type, and what they may have meant."""

from __future__ import annotations

from collections.abc import Iterable

from hvmgr.errors import NotFound


def not_found(kind: str, name: str, known: Iterable[str], *, where: str) -> NotFound:
    """The error for a name that is not there, with near names when there are some."""
    import difflib

    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    hint = "did you mean " + " or ".join(f"'{one}'" for one in near) + "?" if near else None
    return NotFound(f"there is no {kind} '{name}' {where}", hint=hint, name=name)
