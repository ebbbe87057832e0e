"""Creating, applying, undoing, renaming; whole VMs made and removed: killed before every act."""

from __future__ import annotations

import pytest

CHANGES = [
    "create-off",
    "create-undo-full",
    "create-two-disks",
    "apply-off",
    "apply-undo-full",
    "apply-no-undo",
    "apply-snapshot-first",
    "apply-other-disks",
    "undo",
    "rename",
    "resize",
    "resize-smaller",
]
WHOLES = [
    "vm-create",
    "vm-create-copy",
    "vm-create-in-place",
    "vm-adopt",
    "vm-adopt-elsewhere",
    "vm-adopt-convert",
    "vm-adopt-drop",
    "vm-release",
    "vm-release-flatten",
    "vm-release-in-place",
    "vm-delete",
    "vm-delete-with-disks",
    "vm-delete-saved",
    "vm-delete-in-place",
]

FOREIGN = ["foreign-overlay", "foreign-commit", "foreign-commit-paused", "foreign-commit-below", "foreign-pull"]

pytestmark = pytest.mark.crash


@pytest.mark.parametrize("shape", CHANGES)
def test_killed_change_is_undone_or_completed(crash_run, shape, every):
    crash_run(shape, every(3, shape))


@pytest.mark.parametrize("shape", WHOLES)
def test_killed_creation_or_deletion_of_a_vm_is_undone_or_completed(crash_run, shape, every):
    crash_run(shape, every(8, shape))


@pytest.mark.parametrize("shape", FOREIGN)
def test_killed_take_over_of_what_others_did_is_undone_or_completed(crash_run, shape, every):
    crash_run(shape, every(19 if shape.endswith("paused") else 9))
