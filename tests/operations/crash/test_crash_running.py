"""The same with a VM that runs, is paused or saved: what it had in memory is there as well, or put back."""

from __future__ import annotations

import pytest

RUNNING = [
    "running-create",
    "running-create-disk-only",
    "running-create-two-disks",
    "paused-create",
    "saved-create",
    "saved-create-disk-only",
    "apply-memory",
    "apply-memory-without",
    "running-apply",
    "running-apply-memory",
    "running-apply-discard",
    "paused-apply-memory",
    "saved-apply",
    "saved-apply-memory",
    "running-undo",
    "running-delete",
    "running-delete-other-branch",
    "running-adopt",
    "running-release",
    "saved-release",
    "running-convert",
    "running-convert-working",
]

pytestmark = pytest.mark.crash


@pytest.mark.parametrize("shape", RUNNING)
def test_killed_with_a_vm_in_memory(crash_run, shape, every):
    stride = every(11)
    crash_run(shape, stride, 1 + RUNNING.index(shape) % stride)


def test_killed_at_any_moment_with_a_running_vm(crash_run, random_kills):
    crash_run("running-create-two-disks", "random", random_kills, 2)
