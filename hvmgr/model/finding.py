"""What an examination found: a stable code for machines, a sentence for people, and what puts it right.

Doctor, the start guard of the hook, and every report that is made before something is touched speak in findings.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """How much a finding stands in the way."""

    INFO = "info"  # worth knowing, nothing to do
    WARNING = "warning"  # works, but somebody should look
    ERROR = "error"  # something cannot work, or must not start, until it is put right


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found.

    ``code`` is stable and lower-case with hyphens (``image-missing``); ``sentence`` says what and where; ``where`` is the
    file, VM or disk alone; ``repair`` is the command or the step that puts it right, None when there is nothing to do.
    """

    code: str
    severity: Severity
    sentence: str
    where: str
    repair: str | None = None
    vm: str | None = None  # the VM that it concerns: its name, or its folder where nobody can read the name
