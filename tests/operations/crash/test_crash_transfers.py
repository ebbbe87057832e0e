"""Disks that arrive, and snapshots of one disk alone: killed before every act."""

from __future__ import annotations

import pytest

SHAPES = ["put-files", "import-disk", "import-delta", "snapshot-disk", "snapshot-disk-running", "destroy-disk-snapshot"]

pytestmark = pytest.mark.crash


@pytest.mark.parametrize("shape", SHAPES)
def test_killed_transfer_is_undone_or_completed(crash_run, shape, every):
    crash_run(shape, every(12, shape))
