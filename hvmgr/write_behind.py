"""New files go to the disk while they are written.

Left alone, Linux collects what was written until it is a tenth of the memory or somebody syncs. The sync at the end then
waits for all of it, and each further write costs more processor time the more there is (docs/speed.md has the figures).
"""

from __future__ import annotations

import os

_ENOUGH = 8 << 20  # bytes; a call for less costs more than it gives


class WriteBehind:
    """What was written of one new file since the kernel was last told to bring it to the disk."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._length, self._start, self._end = 0, 0, 0

    def wrote(self, offset: int, length: int) -> None:
        """Notes a write; now and then the kernel is told to begin with what has come together."""
        self._start = min(self._start, offset) if self._length else offset
        self._end = max(self._end, offset + length) if self._length else offset + length
        self._length += length
        if self._length >= _ENOUGH:
            # Dirty pages are not forgotten by this: the kernel only begins to write them.
            os.posix_fadvise(self._descriptor, self._start, self._end - self._start, os.POSIX_FADV_DONTNEED)
            self._length = 0
