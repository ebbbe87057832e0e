"""Exports that are killed: the source is whole, the name of the export is free or true, and the next attempt goes on."""

from __future__ import annotations

import pytest

# Kills of each, unless HVMGR_CRASH is ``all``: every so many-th act.
STRIDES = {
    "export-tree": 61,
    "export-vhd": 61,
    "export-pruned": 53,
    "export-flat": 31,
    "export-snapshot-memory": 37,
    "export-in-place": 47,
    "export-saved": 89,
    "export-running": 67,
    "export-running-memory": 53,
}

pytestmark = pytest.mark.crash


@pytest.mark.parametrize("shape", STRIDES)
def test_killed_export_goes_on(crash_run, shape, every):
    stride = every(STRIDES[shape])
    first = 1 + (13 * list(STRIDES).index(shape)) % stride
    crash_run(shape, stride, first, program="exports")
