"""Deleting snapshots and merging images: killed before every act, the bytes of all that stays are the same."""

from __future__ import annotations

import pytest

MERGES = [
    "delete-leaf",
    "delete-with-the-reserve",
    "delete-middle",
    "delete-two-children",
    "delete-root",
    "delete-above-now",
    "delete-subtree",
    "delete-everything",
    "delete-two-disks",
    "delete-in-place",
    "delete-state",
    "merge-by-name",
    "merge-pending",
]

pytestmark = pytest.mark.crash


@pytest.mark.parametrize("shape", MERGES)
def test_killed_deletion_is_completed(crash_run, shape, every):
    crash_run(shape, every(5, shape))


def test_killed_at_any_moment_nothing_is_lost(crash_run, random_kills):
    crash_run("delete-two-disks", "random", random_kills, 1)
