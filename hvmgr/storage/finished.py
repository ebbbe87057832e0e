"""What an interrupted piece of work has finished: one small note per file that it made.

A note says from which files, as they were then, and how a file was made, and what it was afterwards. As long as all of
that is still so, the file need not be made again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hvmgr.storage import durable


@dataclass(frozen=True, slots=True)
class Made:
    """A finished file: its length in bytes, and its hash where one was wanted."""

    target: Path
    size: int
    sha256: str | None
    shared: bool = False  # blocks with its source


@dataclass(frozen=True, slots=True)
class Notes:
    """The notes in a folder that exists."""

    folder: Path

    def write(self, made: Made, sources: Sequence[os.stat_result], how: str) -> None:
        """The file is finished and on disk; ``sources`` is what was seen of its sources before they were read.

        A note that is lost with the power costs only the work.
        """
        facts = {
            "target": str(made.target),
            "how": how,
            "sources": [_stamp(one) for one in sources],
            "made": _stamp(made.target.stat()),
            "sha256": made.sha256,
            "shared": made.shared,
        }
        durable.write_file(self._file(made.target), json.dumps(facts).encode(), synced=False)

    def find(self, target: Path, sources: Sequence[Path], how: str, *, hashed: bool) -> Made | None:
        """The finished file, when it and its sources are what they were."""
        try:
            facts = json.loads(self._file(target).read_bytes())
            now = target.stat()
            same = (facts["how"], facts["made"]) == (how, _stamp(now))
            same = same and facts["sources"] == [_stamp(one.stat()) for one in sources]
            if not same or (hashed and facts["sha256"] is None):
                return None
            return Made(target, now.st_size, facts["sha256"], bool(facts["shared"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _file(self, target: Path) -> Path:
        return self.folder / hashlib.sha256(os.fsencode(target)).hexdigest()[:32]


def _stamp(facts: os.stat_result) -> list[int]:
    return [facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns]
